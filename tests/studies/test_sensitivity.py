"""Sensitivity: refits without each assumption, and says what moved."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import perturbprob as pb

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """A small screen in two media."""
    return pb.simulate(n_cells=300, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0, 2.0), n_batches=2, seed=1).screen


def test_each_assumption_is_left_out_once(screen: pb.Screen) -> None:
    assumptions = [pb.UneditedStable(), pb.SilentInBaseline()]
    fit = pb.fit(pb.node(screen, 2, assumptions=assumptions), screen, epochs=5, progress=False)
    found = pb.sensitivity(fit, n_draws=10, progress=False)
    assert list(found.table["assumption"].values) == ["UneditedStable", "SilentInBaseline"]
    assert float(found.table["change"].sel(assumption="SilentInBaseline").mean()) > 0
    assert found.report().count("without ") == 2
    assert "another seed alone moves predictions by" in found.report()
    assert float(found.table["noise"].min()) > 0
    alone = pb.fit(pb.node(screen, 2, assumptions=[pb.SilentInBaseline()]), screen, epochs=5, progress=False)
    moved = pb.predict(alone, n_draws=10, progress=False)["mean"].identical(pb.predict(fit, n_draws=10, progress=False)["mean"])
    assert not moved


def test_it_needs_an_assumption_and_the_screen_of_the_fit(screen: pb.Screen, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="declares no assumption"):
        pb.sensitivity(pb.fit(pb.node(screen, 2), screen, epochs=1, progress=False), screen)
    fit = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, epochs=1, progress=False)
    with pytest.raises(ValueError, match="these are other cells"):
        pb.sensitivity(fit, screen[:100])
    fit.save(tmp_path / "fit")
    loaded = pb.load(tmp_path / "fit")
    with pytest.raises(ValueError, match=r"does not hold its cells: pass the screen .* sensitivity\(fit, screen\)"):
        pb.sensitivity(loaded)
    one, two = (pb.sensitivity(f, screen, n_draws=2, progress=False).table for f in (fit, loaded))
    assert one.identical(two)


def test_networks_start_from_the_seed_of_the_model_and_training_losses_are_not_compared(screen: pb.Screen) -> None:
    """An assumption without weight moves nothing at all, since settings and seeds stay."""
    model = pb.node(screen, 2, assumptions=[pb.Lipschitz(weight=1e-30)], seed=7)
    found = pb.sensitivity(pb.fit(model, screen, epochs=3, seed=5, validation=0.0, progress=False), n_draws=3, progress=False)
    assert float(found.table["change"].max()) < 1e-4
    assert float(found.table["noise"].mean()) > 0.01
    assert np.isnan(found.table["validation"]).all()
    assert "no cell was held out" in found.report()


@pytest.mark.parametrize(
    "make",
    [
        partial(pb.vae, shift="network"),
        pb.causal_context,
        partial(pb.node, penetrance=True, batch_effect="state"),
    ],
)
def test_a_refit_has_the_structure_of_the_fit(screen: pb.Screen, make: Callable[..., pb.CellModel]) -> None:
    """Without an assumption that weighs nothing it is the same fit."""
    model = make(screen, n_latent=2, assumptions=[pb.Lipschitz(weight=1e-30)], seed=7)
    found = pb.sensitivity(pb.fit(model, screen, epochs=1, progress=False), n_draws=3, progress=False)
    assert float(found.table["change"].max()) < 1e-3
    assert float(found.table["noise"].mean()) > 0


@pytest.mark.usefixtures("unchecked")
def test_it_takes_a_fit(screen: pb.Screen) -> None:
    with pytest.raises(TypeError, match="A fit is needed here; got Screen"):
        pb.sensitivity(screen)


def test_a_fit_without_a_posterior_has_no_deviations(screen: pb.Screen) -> None:
    """Movements are then told in log mean; held-out cells are judged without the terms of assumptions."""
    model = pb.node(screen, 2, assumptions=[pb.SilentInBaseline()])
    found = pb.sensitivity(pb.fit(model, screen, objective="paths", epochs=2, progress=False), n_draws=1, progress=False)
    assert "nan" not in found.report()
    assert "in log mean" in found.report()
    assert abs(float(found.table["validation"].max())) < 0.1
