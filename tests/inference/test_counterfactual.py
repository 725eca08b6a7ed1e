"""Counterfactuals: the factual comes back, truth is found, and what cannot be run backward is refused."""

import warnings

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation

SHORT = {"n_draws": 10, "progress": False}


@pytest.fixture(scope="module")
def controls(screen: pb.Screen) -> pb.Screen:
    """Control cells that waited for one unit of time."""
    return screen[screen.cells_of(pb.Protocol([pb.Wait(1)]))[:40]]


def test_the_routes_agree_where_the_flow_is_well_conditioned(fit: pb.Fit, controls: pb.Screen, screen: pb.Screen) -> None:
    target = screen.conditions[-1]
    here, back = (pb.counterfactual(fit, controls, target, route=route, **SHORT) for route in ("encoder", "inverse"))
    assert float(back["condition_number"].max()) < 100
    assert float(back["round_trip"].max()) < 1e-2
    inside = (here["lower"] <= back["mean"]) & (back["mean"] <= here["upper"])
    assert float(inside.mean()) > 0.99
    np.testing.assert_allclose(here["mean"], back["mean"], atol=0.05)


def test_a_flow_that_contracts_is_refused(fit: pb.Fit, controls: pb.Screen, screen: pb.Screen) -> None:
    with pytest.raises(pb.IllConditioned, match=r"of 38 cells have a condition number .* above 1 .*route='encoder'"):
        pb.counterfactual(fit, controls, screen.conditions[-1], route="inverse", condition_bound=1.0, **SHORT)


def test_the_cells_own_protocol_gives_their_own_rate(fit: pb.Fit, controls: pb.Screen) -> None:
    own = pb.counterfactual(fit, controls, controls.conditions[0], **SHORT)
    counts = controls.counts.toarray()
    residual = counts / np.exp(own["mean"].values) - 1
    assert abs(residual.mean()) < 0.1
    assert own.attrs["protocol"] == str(controls.conditions[0])


def test_the_answer_does_not_depend_on_what_else_is_asked(fit: pb.Fit, controls: pb.Screen, screen: pb.Screen) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again = (pb.counterfactual(fit, controls, screen.conditions[-1], **SHORT) for _ in range(2))
    assert first.identical(again)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.slow
def test_it_beats_the_shift_of_the_population() -> None:
    """Known rates of the same cells under both protocols; the shift is the difference of mean log1p counts added to the cell's own."""
    simulation: Simulation = pb.simulate(n_cells=1200, n_genes=30, n_perturbations=3, times=(2.0,), heterogeneity=0.6, inactive=0.0, seed=6)
    screen = simulation.screen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = pb.fit(pb.node(screen, 4), screen, epochs=40, minibatch=64, learning_rate=1e-2, progress=False)
    controls, errors = screen[screen.cells_of("control")], []
    for target in (p for p in screen.conditions if p.perturbations):
        truth = simulation.log_rate(target).sel(cell=list(controls.cells))
        answer = pb.counterfactual(fit, controls, target, **SHORT)["mean"]
        own, other = controls.counts.toarray(), screen[screen.cells_of(target)].counts.toarray()
        shifted = np.log1p(own) + np.log1p(other).mean(0) - np.log1p(own).mean(0)
        errors.append([((answer - truth) ** 2).mean("gene"), ((shifted - truth.values) ** 2).mean(1)])
    ours, shift = np.concatenate(errors, 1)
    better = shift - ours
    assert better.mean() > 5 * better.std() / len(better) ** 0.5
    assert ours.mean() < 0.5 * shift.mean()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"route": "backward"}, "Unknown route 'backward'. Use one of 'encoder', 'inverse'"),
        ({"level": 1.0}, "level is a probability"),
        ({"n_draws": 0}, "n_draws must be a whole number of at least 1"),
    ],
)
def test_what_it_refuses(fit: pb.Fit, controls: pb.Screen, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.counterfactual(fit, controls, controls.conditions[0], **({"progress": False} | how))


def test_it_refuses_what_cannot_run_backward(fit: pb.Fit, controls: pb.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(fit.model.transition), "invertible", False)
    with pytest.raises(ValueError, match="NeuralODE cannot run backward, so eq 6 has no inverse here"):
        pb.counterfactual(fit, controls, controls.conditions[0], route="inverse", **SHORT)


def test_it_refuses_a_gene_never_perturbed(fit: pb.Fit, controls: pb.Screen) -> None:
    with pytest.raises(ValueError, match="never seen"):
        pb.counterfactual(fit, controls, pb.Knockout("NEVER") >> pb.Wait(1), **SHORT)


def test_one_draw_has_no_spread_and_no_wait_is_pointed_out(fit: pb.Fit, controls: pb.Screen, screen: pb.Screen) -> None:
    one = pb.counterfactual(fit, controls[:3], screen.conditions[-1], n_draws=1, progress=False)
    assert np.isnan(one["sd"]).all()
    with pytest.warns(UserWarning, match="waits for no time, so nothing has happened yet"):
        pb.counterfactual(fit, controls[:3], pb.Knockout(screen.perturbations[0]), n_draws=2, progress=False)
