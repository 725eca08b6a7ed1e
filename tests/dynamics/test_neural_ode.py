"""The neural ODE against torchdiffeq and closed forms."""

import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from perturbprob.dynamics.neural_ode import NeuralODE, Push
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import Effects
from perturbprob.experiment.vocabulary import Segment

N_LATENT, WAITS = 4, (0.0, 0.4, 1.0, 3.0)


@pytest.fixture
def screen():
    """Cells at rest, a segment with a wait of its own for each, and the effects of two perturbations and one media."""
    random = torch.Generator().manual_seed(0)
    n = len(WAITS)
    marks = (torch.rand(n, size, generator=random, dtype=torch.float64).round() for size in (2, 1))
    segment = Segment(*marks, torch.ones(n, dtype=torch.bool), torch.tensor(WAITS, dtype=torch.float64))
    effects = Effects(*(torch.randn(size, N_LATENT, generator=random, dtype=torch.float64) for size in (2, 1)))
    return torch.randn(n, N_LATENT, generator=random, dtype=torch.float64), segment, effects


def make(solver=None, field=None):
    """A neural ODE in float64, with a decay that differs between latents."""
    torch.manual_seed(3)
    move = NeuralODE(N_LATENT, field=field, solver=solver).double()
    with torch.no_grad():
        move.decay_unconstrained.copy_(torch.linspace(-2, 2, N_LATENT))
    return move


class Linear(nn.Module):
    """A push linear in the state."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(0.5 * torch.randn(N_LATENT, N_LATENT))

    def forward(self, z, perturbation, media, clock):
        return z @ self.matrix.T


# References.


@torch.no_grad()
def test_each_cell_ends_where_torchdiffeq_takes_it_in_its_own_time(screen):
    z0, segment, effects = screen
    move = make(Solver(n_steps=32))
    state = move(z0, [segment], effects)
    for cell, wait in enumerate(WAITS[1:], start=1):
        marks = segment.perturbation[cell] @ effects.perturbation, segment.media[cell] @ effects.media

        def slope(t, z, start=z0[cell], marks=marks):
            return move.field.network(torch.cat([z, *marks])) - move.decay * (z - start)

        span = torch.tensor([0.0, wait], dtype=torch.float64)
        expected = odeint(slope, z0[cell], span, method="dopri5", rtol=1e-10, atol=1e-12)[-1]
        torch.testing.assert_close(state.z[cell], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(state.z[0], z0[0])


@torch.no_grad()
def test_dopri5_is_a_choice_of_solver_and_gives_the_same_state(screen):
    ours, theirs = (make(solver)(screen[0], [screen[1]], screen[2]).z for solver in (Solver(n_steps=32), Solver("dopri5", tolerance=1e-6)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_dopri5(screen):
    gradients = []
    for solver in (Solver(n_steps=32), Solver("dopri5", tolerance=1e-7)):
        move = make(solver)
        z0 = screen[0].clone().requires_grad_()
        move(z0, [screen[1]], screen[2]).z.square().sum().backward()
        gradients.append([z0.grad, *(parameter.grad for parameter in move.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_linear_push_is_the_matrix_exponential(screen):
    z0, segment, effects = screen
    move = make(Solver(n_steps=128), Linear())
    state = move(z0, [segment], effects)
    matrix = move.field.matrix
    generator = torch.cat(
        [torch.cat([matrix - torch.diag(move.decay), matrix], 1), torch.zeros(N_LATENT, 2 * N_LATENT, dtype=torch.float64)]
    )
    for cell, wait in enumerate(WAITS):
        start = torch.cat([torch.zeros(N_LATENT, dtype=torch.float64), z0[cell]])  # d(δ, z₀)/dt = (A (z₀ + δ) − γ δ, 0)
        expected = (torch.matrix_exp(wait * generator) @ start)[:N_LATENT]
        torch.testing.assert_close(state.delta[cell], expected, rtol=1e-7, atol=1e-7)


# Laws.


@torch.no_grad()
def test_only_the_deviation_decays_so_cells_keep_their_heterogeneity(screen):
    class Still(nn.Module):
        def forward(self, z, perturbation, media, clock):
            return 0 * z

    assert torch.equal(make(field=Still())(screen[0], [screen[1]], screen[2]).z, screen[0])


def test_the_decay_is_positive_whatever_its_parameter():
    move = make()
    with torch.no_grad():
        move.decay_unconstrained.copy_(torch.tensor([-100.0, -1.0, 0.0, 50.0]))
    assert (move.decay >= 1e-3).all()


def test_the_default_push_does_not_read_the_clock(screen):
    push, marks = Push(N_LATENT).double(), [torch.randn(3, N_LATENT, dtype=torch.float64) for _ in range(3)]
    early, late = (push(*marks, torch.full((3, 1), clock, dtype=torch.float64)) for clock in (0.0, 9.0))
    assert torch.equal(early, late)


def test_float32_is_float64_to_the_tolerance_of_the_solver(screen):
    z0, segment, effects = screen
    exact = make(Solver(n_steps=32))(z0, [segment], effects).z
    single = Segment(segment.perturbation.float(), segment.media.float(), segment.changed, segment.wait.float())
    state = make().float()(z0.float(), [single], Effects(effects.perturbation.float(), effects.media.float()))
    assert state.z.dtype == torch.float32
    torch.testing.assert_close(state.z.double(), exact, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_without_decay_the_field_alone_moves_the_state(screen):
    """dz/dt = A z (eq 25), against the matrix exponential."""
    torch.manual_seed(3)
    move = NeuralODE(N_LATENT, field=Linear(), solver=Solver(n_steps=128), decays=False).double()
    assert [name for name, _ in move.named_parameters()] == ["field.matrix"]
    state = move(screen[0], [screen[1]], screen[2])
    exact = [torch.linalg.matrix_exp(move.field.matrix * wait) @ z0 for wait, z0 in zip(WAITS, screen[0], strict=True)]
    torch.testing.assert_close(state.z, torch.stack(exact), rtol=1e-6, atol=1e-6)
