"""What every structure with a likelihood must do: train, keep the laws it declares, answer, and come back from disk."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

import perturbprob as pb
from perturbprob.experiment.vocabulary import Segment
from perturbprob.inference.draws import centre, global_draws
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide, node_design

Make = Callable[[pb.Screen], pb.CellModel]
STRUCTURES: dict[str, Make] = {
    "node": partial(pb.node, n_latent=2),
    "additive": partial(pb.vae, n_latent=2),
    "network": partial(pb.vae, n_latent=2, shift="network"),
    "sparse": partial(pb.vae, n_latent=2, shift="sparse"),
    "identity": partial(pb.vae, n_latent=2, shift="identity"),
    "neural_sde": partial(pb.neural_sde, n_latent=2, n_steps=3),
    "causal_context": partial(pb.causal_context, n_latent=2),
    "escaping": partial(pb.node, n_latent=2, penetrance=True),
}
STILL = {"identity"}  # its latent state does not move, so effects on it are not learnt


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Two media, two times, two batches."""
    return pb.simulate(n_cells=200, n_genes=9, n_perturbations=2, media=("rest", "drug"), times=(1.0, 2.0), n_batches=2, seed=4).screen


@pytest.fixture(scope="module", params=list(STRUCTURES))
def name(request: pytest.FixtureRequest) -> str:
    """The name of a structure."""
    return request.param


@pytest.fixture(scope="module")
def fit(name: str, screen: pb.Screen) -> pb.Fit:
    """A short fit of it."""
    return pb.fit(STRUCTURES[name](screen), screen, epochs=3, progress=False)


def test_every_parameter_has_a_finite_gradient(name: str, screen: pb.Screen) -> None:
    model = STRUCTURES[name](screen)
    elbo = Trace_ELBO()(model, Guide(model, node_design(model, screen)))
    elbo(CellTable(model, screen).cells(torch.arange(screen.n_cells))).backward()
    for path, parameter in elbo.named_parameters():
        if not parameter.numel():  # a causal context has no condition effects beside its network
            continue
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path
        if name not in STILL and "lower" not in path and "condition_weight" not in path:
            assert parameter.grad.abs().sum() > 0, path


def waits(*times: float) -> list[Segment]:
    """The first perturbation in the first media, and waits."""
    marks = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]]), torch.tensor([True])]
    none = [torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor([False])]
    return [Segment(*(none if k else marks), torch.tensor([time])) for k, time in enumerate(times)]


def test_waits_add_up_where_the_structure_says_so(fit: pb.Fit) -> None:
    """W(s) then W(t) is W(s + t) for a semigroup; for L it is not defined, and not so by chance."""
    z, sites = torch.randn(5, fit.model.rest_size), centre(fit.model, fit.guide)
    if fit.model.transition.noise_shape:  # in law alone (tests/dynamics/test_neural_sde.py), and with noise for each wait
        with pytest.raises(ValueError, match="A protocol has 2 waits, and this transition was made with noise for 1"):
            fit.model.moved(sites, z, [s[torch.zeros(5, dtype=torch.long)] for s in waits(1.0, 0.5)])
        return
    with torch.no_grad():
        at_once, in_two = (
            fit.model.moved(sites, z, [s[torch.zeros(5, dtype=torch.long)] for s in waits(*times)]) for times in ((1.5,), (1.0, 0.5))
        )
    if fit.model.transition.semigroup:
        torch.testing.assert_close(at_once.z, in_two.z, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(at_once.clock, in_two.clock)


def test_nothing_happens_at_time_0(fit: pb.Fit) -> None:
    z = torch.randn(4, fit.model.rest_size)
    with torch.no_grad():
        state = fit.model.moved(centre(fit.model, fit.guide), z, [s[torch.zeros(4, dtype=torch.long)] for s in waits(0.0)])
    torch.testing.assert_close(state.z, fit.model.resting(z))


def test_it_predicts_a_condition_it_has_not_seen_and_counts_its_draws(fit: pb.Fit, screen: pb.Screen) -> None:
    new = pb.Knockout(screen.perturbations[0]) >> pb.Media("drug") >> pb.Wait(1.5)
    found = pb.predict(fit, [new, screen.conditions[0]], n_draws=6, progress=False)
    assert np.isfinite(found["mean"]).all()
    np.testing.assert_allclose(found["mean"].sum("gene"), 1.0, rtol=1e-4)
    assert (found["lower"] < found["upper"]).all()
    again = pb.predict(fit, [new, screen.conditions[0]], n_draws=6, progress=False)
    np.testing.assert_array_equal(found["mean"], again["mean"])


def test_prior_posterior_checks_and_densities(fit: pb.Fit, screen: pb.Screen, name: str) -> None:
    assert pb.prior(STRUCTURES[name](screen), screen, 3).prior["gene_bias"].sizes["draw"] == 3
    assert pb.posterior(fit, 3).posterior["gene_bias"].sizes["draw"] == 3
    assert np.isfinite(pb.log_density(fit, screen[:40], particles=5, n_draws=2, progress=False)).all()
    assert np.isfinite(pb.predictive_check(fit, screen, n_draws=3, progress=False).gene["replicated"]).all()
    assert np.isfinite(pb.effects(fit, n_draws=5, progress=False)["log_fold_change"]).all()


def test_a_draw_of_the_globals_is_the_same_whatever_is_done_between(fit: pb.Fit) -> None:
    one = [sites["gene_bias"] for sites in global_draws(fit.model, fit.guide, 3, 5)]
    other = []
    for sites in global_draws(fit.model, fit.guide, 3, 5):
        torch.randn(7)
        other.append(sites["gene_bias"])
    torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=0)


def test_it_comes_back_from_disk_bit_for_bit(fit: pb.Fit, screen: pb.Screen, tmp_path: Path) -> None:
    fit.save(tmp_path)
    loaded = pb.load(tmp_path)
    assert type(loaded.model.transition) is type(fit.model.transition)
    one, other = (pb.predict(f, screen.conditions[-1], n_draws=4, progress=False)["mean"] for f in (fit, loaded))
    np.testing.assert_array_equal(one, other)


def test_two_structures_in_one_process_leave_each_other_alone(fit: pb.Fit, screen: pb.Screen) -> None:
    before = pb.predict(fit, screen.conditions[-1], n_draws=4, progress=False)["mean"]
    pb.fit(pb.vae(screen, 3, shift="network", seed=9), screen, epochs=1, progress=False)
    np.testing.assert_array_equal(before, pb.predict(fit, screen.conditions[-1], n_draws=4, progress=False)["mean"])


def test_batch_error_and_the_decomposition_take_it(fit: pb.Fit, screen: pb.Screen) -> None:
    assert np.isfinite(pb.batch_error(fit, screen, n_draws=2, n_points=2, progress=False).table["tight"]).all()
    parts = pb.decompose_batches(fit, n_draws=3, progress=False)
    assert parts is not None
