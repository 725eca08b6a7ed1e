"""Coherent draws: one value of every global site for all cells."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import perturbprob as pb
from perturbprob.inference.draws import centre, global_draws

N_CELLS, SPREAD = 200, 0.5


def one_global(index: torch.Tensor) -> None:
    """A global g, and a site per cell that equals it."""
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("cell", N_CELLS, subsample=index):
        pyro.sample("same", dist.Normal(g, 1e-6))


def one_global_guide(index: torch.Tensor) -> None:
    """The guide of the same shape, with a spread of its own."""
    g = pyro.sample("g", dist.Normal(2.0, SPREAD))
    with pyro.plate("cell", N_CELLS, subsample=index):
        pyro.sample("same", dist.Normal(g, 1e-6))


@pytest.mark.parametrize("minibatch", [1, 50, 200])
def test_each_draw_has_one_global_over_all_cells(minibatch: int) -> None:
    minibatches = torch.arange(N_CELLS).split(minibatch)
    n_draws = 60 if minibatch == 1 else 400
    draws = list(pb.coherent_draws(one_global, one_global_guide, minibatches, n_draws))
    for draw in draws:
        assert draw["same"].shape == (N_CELLS,)
        assert torch.allclose(draw["same"], draw["g"].expand(N_CELLS), atol=1e-4)
    means = torch.stack([draw["same"].mean() for draw in draws])
    globals_ = torch.stack([draw["g"] for draw in draws])
    assert torch.allclose(means, globals_, atol=1e-5)
    # the variance of n normal draws has a relative standard error of sqrt(2 / n); four of them
    assert means.var() == pytest.approx(SPREAD**2, rel=4 * (2 / n_draws) ** 0.5)
    assert means.mean() == pytest.approx(2.0, abs=4 * SPREAD / n_draws**0.5)


def test_draws_do_not_depend_on_the_minibatch_for_their_globals() -> None:
    first, second = (
        next(pb.coherent_draws(one_global, one_global_guide, torch.arange(N_CELLS).split(m), 1, seed=4))["g"] for m in (10, 100)
    )
    assert first == second


def test_global_draws_leave_the_random_state_alone_and_repeat(fit: pb.Fit) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = list(global_draws(fit.model, fit.guide, 3, seed=7))
    assert torch.equal(before, torch.random.get_rng_state())
    second = list(global_draws(fit.model, fit.guide, 3, seed=7))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert not torch.equal(first[0]["gene_bias"], first[1]["gene_bias"])


def test_draws_taken_one_by_one_leave_the_random_state_alone(fit: pb.Fit) -> None:
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    draws = global_draws(fit.model, fit.guide, 3)
    for _ in zip(draws, pb.coherent_draws(one_global, one_global_guide, [torch.arange(5)], 2), strict=False):
        assert torch.equal(before, torch.random.get_rng_state())
    next(global_draws(fit.model, fit.guide, 3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_surround_the_centre(fit: pb.Fit) -> None:
    middle = centre(fit.model, fit.guide)
    draws = torch.stack([d["batch_effect"] for d in global_draws(fit.model, fit.guide, 400)])
    error = (draws.mean(0) - middle["batch_effect"]) / (draws.std(0) / 20)
    assert error.abs().max() < 4.5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("n_draws", [0, -1, True, "5"])
def test_no_draws_is_refused(fit: pb.Fit, n_draws: int) -> None:
    with pytest.raises(ValueError, match="n_draws must be a whole number of at least 1"):
        next(global_draws(fit.model, fit.guide, n_draws))
    with pytest.raises(ValueError, match="n_draws must be"):
        pb.posterior(fit, n_draws)
    with pytest.raises(ValueError, match="n_draws must be"):
        pb.predict(fit, pb.Wait(1), n_draws=n_draws)
    with pytest.raises(ValueError, match="n_draws must be"):
        pb.effects(fit, n_draws=n_draws)
