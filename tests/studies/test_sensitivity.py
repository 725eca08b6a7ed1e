"""Sensitivity: refits without each assumption, and says what moved."""

from pathlib import Path

import pytest

import perturbprob as pb


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """A small screen over two times."""
    return pb.simulate(n_cells=400, n_genes=8, n_perturbations=2, times=(1.0, 2.0), n_batches=2, seed=1).screen


def test_each_assumption_is_left_out_once(screen: pb.Screen) -> None:
    assumptions = [pb.UneditedStable(), pb.SilentInBaseline()]
    fit = pb.fit(pb.node(screen, 2, assumptions=assumptions), screen, epochs=8, progress=False)
    found = pb.sensitivity(fit, n_draws=10, progress=False)
    assert list(found.table["assumption"].values) == ["UneditedStable", "SilentInBaseline"]
    assert float(found.table["change"].sel(assumption="SilentInBaseline").mean()) > 0
    assert found.report().count("without ") == 2
    alone = pb.fit(pb.node(screen, 2, assumptions=[pb.SilentInBaseline()]), screen, epochs=8, progress=False)
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
