"""Batches never seen: one new η from given cells, everything else fixed; and cells read as if measured in another batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.inference.adapt import widening

SHORT = {"n_draws": 20, "progress": False}


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    """Four batches with large effects."""
    return pb.simulate(n_cells=2000, n_genes=15, n_perturbations=3, times=(1.0,), n_batches=4, batch_scale=0.4, seed=2)


@pytest.fixture(scope="module")
def fit(simulation: Simulation) -> pb.Fit:
    """A fit of three of them."""
    train = simulation.screen[simulation.screen.batch < 3]
    model = pb.node(train, 3, assumptions=[pb.UneditedStable()])
    return pb.fit(model, train, epochs=30, warmup=5, minibatch=64, learning_rate=6e-3, progress=False)


@pytest.fixture(scope="module")
def controls(simulation: Simulation) -> pb.Screen:
    """The control cells of the fourth."""
    new = simulation.screen[simulation.screen.batch == 3]
    return new[new.cells_of("control")]


@pytest.fixture(scope="module")
def adapted(fit: pb.Fit, controls: pb.Screen) -> pb.Fit:
    """The fit adapted to the fourth batch by its control cells."""
    return pb.adapt(fit, controls, "batch4", **SHORT)


def truth(simulation: Simulation) -> np.ndarray:
    """The new batch's effect relative to the mean of the fitted ones, centred over genes by rate."""
    eta, share = simulation.truth["batch_effect"].values, simulation.truth["rate_share"].values[0]
    own = eta[3] - eta[:3].mean(0)
    return own - (own * share).sum() / share.sum()


@pytest.mark.parametrize("wide", [0.5, 1.0, 30.0])
def test_how_much_further_off_a_new_batch_is_comes_from_its_genes(wide: float) -> None:
    """The maximum of the marginal likelihood, by a finer search; ten genes that say 1 count for little among 4,000."""
    generator = torch.Generator().manual_seed(3)
    prior, variance = (torch.rand(4000, generator=generator) * scale + 0.01 for scale in (0.1, 0.05))
    mode = torch.randn(4000, generator=generator) * (wide * prior + variance).sqrt()
    grid = torch.logspace(-2, 3, 2001)
    total = grid[:, None] * prior + variance
    best = grid[(total.log() + mode.square() / total).sum(1).argmin()]
    assert float(widening(mode, variance, prior)) == pytest.approx(float(best), rel=0.05)


def test_a_handful_of_genes_does_not_decide_how_far_off_a_batch_is() -> None:
    assert float(widening(torch.tensor([3.0]), torch.tensor([0.01]), torch.tensor([1.0]))) < 2


@pytest.mark.slow
def test_a_new_batch_is_found_from_its_controls_with_its_uncertainty(adapted: pb.Fit, simulation: Simulation) -> None:
    draws = pb.posterior(adapted, n_draws=400).posterior["batch_effect"].sel(batch="batch4").squeeze("chain")
    expected = truth(simulation)
    error = draws.mean("draw").values - expected
    assert np.sqrt((error**2).mean()) < 0.45 * np.sqrt((expected**2).mean())
    lower, upper = draws.quantile([0.05, 0.95], "draw").values
    assert ((lower <= expected) & (expected <= upper)).mean() >= 0.7


@pytest.mark.slow
def test_means_of_the_new_batch_are_predicted_better_than_without(adapted: pb.Fit, fit: pb.Fit, simulation: Simulation) -> None:
    screen = simulation.screen
    new = screen[screen.batch == 3]
    perturbed = new[np.array([bool(new.conditions[k].perturbations) for k in new.condition])]
    observed = perturbed.pseudobulk().counts.toarray()
    errors = []
    for one, batch in ((adapted, "batch4"), (fit, "average")):
        predicted = pb.predict(one, list(perturbed.conditions), scale="log1p", batch=batch, **SHORT)["mean"].values
        errors.append(((predicted - observed) ** 2).mean(1))
    assert (errors[0] < errors[1]).all()


@pytest.mark.slow
def test_everything_else_is_as_it_was_fitted(adapted: pb.Fit, fit: pb.Fit) -> None:
    for part in ("model", "guide"):
        before, after = (getattr(f, part).state_dict() for f in (fit, adapted))
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert {name.rsplit("_", 1)[0].removesuffix("_log") for name in set(after) - set(before)} <= {"batch_adapted"}
    assert fit.model.vocabulary.batches == ("batch1", "batch2", "batch3")
    one, two = (pb.predict(f, pb.Protocol([pb.Wait(1)]), batch="average", **SHORT)["mean"] for f in (fit, adapted))
    np.testing.assert_allclose(one, two, rtol=0.05)


@pytest.mark.slow
def test_an_adapted_fit_survives_saving_and_can_be_adapted_again(adapted: pb.Fit, controls: pb.Screen, tmp_path: Path) -> None:
    again = pb.adapt(adapted, controls[:40], "other", n_draws=5, progress=False)
    again.save(tmp_path / "fit")
    loaded = pb.load(tmp_path / "fit")
    assert loaded.model.vocabulary.batches[-2:] == ("batch4", "other")
    for batch in ("batch4", "other", "average"):
        one, two = (pb.predict(f, pb.Protocol([pb.Wait(1)]), batch=batch, n_draws=3, progress=False)["mean"] for f in (again, loaded))
        assert one.identical(two)
    assert np.isfinite(pb.log_density(again, controls[:5], 2, progress=False)).all()


@pytest.mark.slow
def test_cells_are_translated_by_the_difference_of_batch_effects(fit: pb.Fit, simulation: Simulation) -> None:
    cells = simulation.screen[simulation.screen.batch == 0][:20]
    own, other, average = (pb.translate(fit, cells, batch_to=b, **SHORT) for b in ("batch1", "batch2", "average"))
    eta = pb.posterior(fit, n_draws=20, seed=0).posterior["batch_effect"].mean(("chain", "draw"))
    np.testing.assert_allclose(
        (other - own)["mean"], np.broadcast_to(eta.sel(batch="batch2") - eta.sel(batch="batch1"), (20, 15)), atol=0.02
    )
    np.testing.assert_allclose((average - own)["mean"], np.broadcast_to(-eta.sel(batch="batch1"), (20, 15)), atol=0.02)
    target = simulation.screen.conditions[-1]
    moved, same = pb.translate(fit, cells, batch_to="batch1", protocol=target, **SHORT), pb.counterfactual(fit, cells, target, **SHORT)
    np.testing.assert_allclose(moved["mean"], same["mean"])


@pytest.mark.slow
def test_what_adapt_and_translate_refuse(fit: pb.Fit, controls: pb.Screen, simulation: Simulation) -> None:
    screen = simulation.screen
    with pytest.raises(ValueError, match=r"batch= names the new batch, by a word .*; got ''"):
        pb.adapt(fit, controls, "")
    with pytest.raises(ValueError, match="knows batch 'batch1' already"):
        pb.adapt(fit, controls, "batch1", **SHORT)
    with pytest.raises(ValueError, match="No cell is in batch 'batch9'; the screen holds 'batch1', 'batch2'"):
        pb.adapt(fit, screen, "batch9", **SHORT)
    with pytest.raises(ValueError, match=r"Batch 'batch9' was never seen.*Did you mean"):
        pb.translate(fit, screen[:3], batch_to="batch9", **SHORT)
    one = screen[screen.batch == 0]
    with pytest.warns(UserWarning, match="one batch"):
        alone = pb.fit(pb.node(one, 2), one, epochs=1, progress=False)
    with pytest.raises(ValueError, match="has one batch, so how far batches differ was never seen"):
        pb.adapt(alone, controls, "batch4", **SHORT)


@pytest.mark.slow
def test_in_gene_space_the_effect_is_the_mean_of_what_is_left(simulation: Simulation) -> None:
    bulk = simulation.screen.pseudobulk()
    train, new = bulk[bulk.batch < 3], bulk[bulk.batch == 3]
    fit = pb.fit(pb.node(train, assumptions=[pb.UneditedStable()]), train, epochs=150, learning_rate=1e-2, validation=0.0, progress=False)
    again = pb.adapt(fit, new, "batch4", n_draws=10, progress=False)
    draws = pb.posterior(again, n_draws=50).posterior["batch_effect"].sel(batch="batch4")
    left = new.counts.toarray() - pb.predict(fit, list(new.conditions), n_draws=20, progress=False)["mean"].values
    assert np.corrcoef(draws.mean(("chain", "draw")), left.mean(0))[0, 1] > 0.95
