"""The causal context: what perturbations do to products, rest, steady states and their gradients."""

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from perturbprob.dynamics.causal_context import CausalContext, NetworkEffects
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import CellState, Effects

N, RANDOM = 5, torch.Generator().manual_seed(0)
WEIGHTS = 0.5 * torch.randn(N, N, generator=RANDOM, dtype=torch.float64)
REST = 0.3 * torch.randn(4, N, generator=RANDOM, dtype=torch.float64)
CUT, HALVED, RAISED = range(3)  # what is done to gene 0


def effects(weights: Tensor = WEIGHTS) -> NetworkEffects:
    """A knock-out, an interference of strength a half, and an activation, all of gene 0."""
    lost, gained = torch.zeros(3, N, dtype=torch.float64), torch.zeros(3, N, dtype=torch.float64)
    lost[CUT, 0], lost[HALVED, 0], gained[RAISED, 0] = 1.0, 0.5, 0.7
    return NetworkEffects(torch.zeros_like(lost), torch.zeros(0, N, dtype=torch.float64), weights, lost, gained)


def cells(*done: int) -> CellState:
    """Four cells at rest, with marks."""
    marks = torch.zeros(4, 3, dtype=torch.float64)
    marks[:, list(done)] = 1
    return CellState(REST, torch.zeros_like(REST), torch.zeros(4, dtype=torch.float64), marks, torch.zeros(4, 0, dtype=torch.float64))


@pytest.fixture
def context() -> CausalContext:
    """A transition with decays that differ."""
    made = CausalContext(torch.zeros(N, dtype=torch.float64), solver=Solver("dopri5")).double()
    made.decay_unconstrained.data = torch.linspace(-1, 1, N, dtype=torch.float64)
    return made


def test_cells_that_nothing_is_done_to_stay_where_they_are(context: CausalContext) -> None:
    assert not context.wait(cells(), torch.full((4,), 3.0, dtype=torch.float64), effects()).delta.any()
    assert not context.settled(cells(), effects()).delta.any()


@pytest.mark.parametrize(("done", "kept", "gained"), [(CUT, 0.0, 0.0), (HALVED, 0.5, 0.0), (RAISED, 1.0, 0.7)])
def test_a_wait_is_the_solution_of_its_equation(context: CausalContext, done: int, kept: float, gained: float) -> None:
    """Against scipy, the equation written out for one cell."""
    z0, w, gamma = REST[1].numpy(), WEIGHTS.numpy(), context.decay.detach().numpy()

    def slope(_: float, delta: Tensor) -> Tensor:
        product = 2 / (1 + torch.exp(-torch.as_tensor(z0 + delta))).numpy()
        product[0] = kept * product[0] + gained
        return gamma * (w @ (product - 2 / (1 + torch.exp(-torch.as_tensor(z0)).numpy())) - delta)

    found = context.wait(cells(done), torch.full((4,), 1.5, dtype=torch.float64), effects()).delta[1]
    wanted = solve_ivp(slope, (0, 1.5), 0 * z0, rtol=1e-9, atol=1e-11).y[:, -1]
    torch.testing.assert_close(found.detach(), torch.as_tensor(wanted), rtol=1e-3, atol=1e-4)


def test_a_knock_out_takes_the_product_and_not_the_transcript(context: CausalContext) -> None:
    """Without regulators of its own the transcript of the gene stays, and what others make falls or rises by its weights alone."""
    weights = torch.zeros(N, N, dtype=torch.float64)
    weights[1, 0], weights[2, 0] = 1.0, -1.0
    delta = context.settled(cells(CUT), effects(weights)).delta
    product = 2 * torch.sigmoid(REST[:, 0])
    torch.testing.assert_close(delta[:, :3].detach(), torch.stack([0 * product, -product, product], 1), rtol=0, atol=1e-4)
    assert not delta[:, 3:].any()


def test_a_product_cannot_be_taken_away_twice(context: CausalContext) -> None:
    one, both = (context.settled(cells(*done), effects()).delta for done in ((CUT,), (CUT, HALVED)))
    torch.testing.assert_close(one, both)


def test_the_steady_state_is_where_a_long_wait_ends_and_its_gradient_is_right(context: CausalContext) -> None:
    """The gradient against finite differences; cycles are in these weights."""
    settled = context.settled(cells(CUT), effects(), tolerance=1e-10, max_steps=5000)
    waited = context.wait(cells(CUT), torch.full((4,), 60.0, dtype=torch.float64), effects())
    torch.testing.assert_close(settled.delta, waited.delta, rtol=0, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(context.settled(cells(CUT), effects()).delta, settled.delta, rtol=0, atol=1e-4)

    def at_rest(weights: Tensor) -> Tensor:
        return context.settled(cells(CUT), effects(weights), tolerance=1e-12, max_steps=20000).delta

    assert torch.autograd.gradcheck(at_rest, WEIGHTS.clone().requires_grad_(), eps=1e-6, atol=1e-5)


def test_a_cycle_that_goes_on_is_refused(context: CausalContext) -> None:
    weights = torch.zeros(N, N, dtype=torch.float64)
    weights[1, 0] = weights[2, 1] = weights[0, 2] = -12.0  # three genes, each silencing the next
    with pytest.raises(ValueError, match="has a cycle that goes on: cells move away from the only point of rest found"):
        context.settled(cells(RAISED), effects(weights))


@pytest.mark.parametrize("strength", [3.0, 4.0, 6.0])
def test_a_pair_that_swings_comes_to_rest_where_a_long_wait_does(context: CausalContext, strength: float) -> None:
    """Two genes, one making the other, which silences it: damped steps swing for ever, the state does not."""
    weights = torch.zeros(N, N, dtype=torch.float64)
    weights[0, 1], weights[1, 0] = strength, -strength
    with torch.no_grad():
        settled = context.settled(cells(RAISED), effects(weights), tolerance=1e-9)
        waited = cells(RAISED)
        for _ in range(12):
            waited = context.wait(waited, torch.full((4,), 10.0, dtype=torch.float64), effects(weights))
    torch.testing.assert_close(settled.delta, waited.delta, rtol=0, atol=1e-3)


def test_effects_without_a_network_are_refused(context: CausalContext) -> None:
    plain = Effects(torch.zeros(3, N, dtype=torch.float64), torch.zeros(0, N, dtype=torch.float64))
    with pytest.raises(TypeError, match="waits with NetworkEffects"):
        context.wait(cells(), torch.ones(4, dtype=torch.float64), plain)
