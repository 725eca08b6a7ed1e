"""Cells at rest under the network: where they stay, how they spread, and what a perturbation does to them."""

import numpy as np
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov

from perturbprob.dynamics import NetworkEffects, StationaryDiffusion
from perturbprob.dynamics.transition import CellState
from perturbprob.experiment.vocabulary import Segment
from perturbprob.measurement import stationarity_deviation


@pytest.fixture
def effects() -> NetworkEffects:
    """Three genes in a chain and back, the first of them knocked out by the one perturbation."""
    weights = torch.tensor([[0.0, 0.0, -0.6], [0.9, 0.0, 0.0], [0.0, 0.8, 0.0]])
    lost, none = torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 3)
    return NetworkEffects(none, torch.zeros(0, 3), weights, lost, none)


def segment(n_cells: int, *, edited: bool, time: float = 1.0) -> Segment:
    """Cells that are all edited, or none is, and wait."""
    mark = torch.full((n_cells, 1), float(edited))
    return Segment(mark, torch.zeros(n_cells, 0), torch.zeros(n_cells, dtype=torch.bool), torch.full((n_cells,), time))


def simulated(transition: StationaryDiffusion, effects: NetworkEffects, n_cells: int, *, edited: bool, time: float = 1.0) -> CellState:
    """Cells simulated to rest."""
    noise = torch.randn(n_cells, *transition.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return transition(torch.zeros(n_cells, 3), [segment(n_cells, edited=edited, time=time)], effects, noise)


def test_cells_spread_as_the_lyapunov_equation_says(effects: NetworkEffects) -> None:
    """At little noise the network is linear, with slope 1/2 · 2 · 1/2 = 1/2 at rest."""
    transition = StationaryDiffusion(3, n_steps=60)
    with torch.no_grad():
        transition.noise_unconstrained.fill_(-3.0)
    found = np.cov(simulated(transition, effects, 40_000, edited=False).delta.numpy().T)
    jacobian = 0.5 * effects.weights.numpy() - np.eye(3)
    expected = solve_continuous_lyapunov(jacobian, -np.diag(transition.noise.detach().numpy() ** 2))
    np.testing.assert_allclose(found, expected, atol=0.04 * expected.max())


def test_a_gene_that_nothing_regulates_has_its_variance_at_any_step() -> None:
    transition = StationaryDiffusion(3, n_steps=3)
    none = torch.zeros(1, 3)
    still = NetworkEffects(none, torch.zeros(0, 3), torch.zeros(3, 3), none, none)
    torch.testing.assert_close(simulated(transition, still, 40_000, edited=False).delta.var(0), torch.ones(3), rtol=0.03, atol=0)


@pytest.mark.parametrize("edited", [False, True])
def test_what_it_simulates_is_at_rest_under_its_own_drift(effects: NetworkEffects, edited: bool) -> None:
    transition, n, found = StationaryDiffusion(3, n_steps=100), 4000, []
    x = simulated(transition, effects, n, edited=edited).delta
    with torch.no_grad():
        drifts = [transition.drift(x, [segment(n, edited=now)], effects) for now in (edited, not edited)]
        for part in torch.arange(n).split(200):
            found.append([float(stationarity_deviation(x[part], drift[part], transition.noise, 2.0)) for drift in drifts])
    own, other = np.mean(found, 0) / (np.std(found, 0) / len(found) ** 0.5)
    assert abs(own) < 3
    assert other > 10


def test_a_knockout_moves_what_its_gene_regulates_and_not_its_own_transcript_directly(effects: NetworkEffects) -> None:
    transition = StationaryDiffusion(3)
    x = torch.zeros(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(transition.drift(x, [segment(1, edited=True)], effects), torch.tensor([[0.0, -0.9, 0.0]]))
        torch.testing.assert_close(transition.drift(x, [segment(1, edited=False)], effects), x)


def test_any_wait_is_for_good_and_none_is_none(effects: NetworkEffects) -> None:
    transition = StationaryDiffusion(3)
    once, longer, never = (simulated(transition, effects, 5, edited=True, time=time) for time in (1.0, 7.0, 0.0))
    torch.testing.assert_close(once.delta, longer.delta, rtol=0, atol=0)
    assert not never.delta.any()
    with pytest.raises(ValueError, match="waits with noise of shape"):
        transition(torch.zeros(1, 3), [segment(1, edited=False)], effects)
