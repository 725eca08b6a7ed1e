"""A push by one hidden layer: its compiled steps against the plain ones, autograd and torchdiffeq."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from perturbprob.dynamics import hidden_layer
from perturbprob.dynamics.hidden_layer import HiddenLayer, RelaxingLayer
from perturbprob.dynamics.inverse import jacobian
from perturbprob.dynamics.neural_ode import NeuralODE, Push, Stable, given
from perturbprob.dynamics.neural_sde import NeuralSDE
from perturbprob.dynamics.solve import Solver, runge_kutta
from perturbprob.dynamics.transition import Effects
from perturbprob.experiment.vocabulary import Segment
from perturbprob.studies.networks import PushOfSeeds

PARTS = ("inner", "shift", "outer", "offset")


class Plain(nn.Module):
    """A field that is another, and tells nothing of what is constant over a wait: the way every field is solved that users make."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, z, perturbation, media, clock):
        return self.field(z, perturbation, media, clock)


def relaxing(plate=(), n_cells=70, n_latent=5, n_hidden=7, dtype=torch.float64, seed=0):
    """A slope of which everything but the pace wants a gradient, and a state."""
    random = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=random, dtype=dtype).requires_grad_()

    rows = (*plate, n_cells)
    push = HiddenLayer(leaf(n_latent, n_hidden), leaf(*rows, n_hidden), leaf(n_hidden, n_latent), leaf(n_latent))
    pace = torch.rand(*rows, 1, generator=random, dtype=dtype)
    return RelaxingLayer(push, leaf(n_latent), pace), leaf(*rows, n_latent)


def with_gradients(end, slope, state):
    """The end of a solve, and the gradients of a function of it that weighs every number differently."""
    inputs = [state, slope.decay, *(getattr(slope.push, name) for name in PARTS)]
    weight = torch.linspace(-1, 2, end.numel(), dtype=end.dtype).reshape(end.shape)
    return [end, *torch.autograd.grad((weight * end.sin()).sum(), inputs)]


def assert_compiled(end):
    """Check that the end comes from the compiled steps."""
    assert type(end.grad_fn).__name__ == "_StepsBackward"


# References.


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"n_cells": 1},
        {"n_cells": 64},
        {"plate": (3,), "n_cells": 2},
        {"plate": (2, 3)},
        {"n_latent": 9, "n_hidden": 16},
    ],
    ids=str,
)
def test_compiled_steps_are_the_plain_ones_with_the_same_gradients(shapes, n_steps):
    slope, state = relaxing(**shapes)
    end = slope.steps(state, n_steps)
    assert_compiled(end)
    for ours, plain in zip(
        with_gradients(end, slope, state), with_gradients(runge_kutta(slope, state, n_steps), slope, state), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_compiled_steps_in_single_precision_are_those_in_double():
    slope, state = relaxing(n_cells=200, n_latent=10, n_hidden=64)
    exact = with_gradients(slope.steps(state, 4), slope, state)
    push = HiddenLayer(*(getattr(slope.push, name).detach().float().requires_grad_() for name in PARTS))
    single = RelaxingLayer(push, slope.decay.detach().float().requires_grad_(), slope.pace.float())
    start = state.detach().float().requires_grad_()
    end = single.steps(start, 4)
    assert_compiled(end)
    for ours, double in zip(with_gradients(end, single, start), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - double).abs().max() < 2e-5 * (1 + double.abs().max())


def test_hidden_units_are_tanh_to_single_precision():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-8, 0, 400)])[:, None]
    one, none = torch.ones(1, 1), torch.zeros(1)
    push = HiddenLayer(0 * one, x.requires_grad_(), one, none)
    end = RelaxingLayer(push, none, torch.ones_like(x)).steps(torch.zeros_like(x), 1)  # of a slope that is tanh x
    np.testing.assert_allclose(end.detach().numpy(), np.tanh(x.detach().double().numpy()), rtol=1e-6)


def test_autograd_finds_the_gradients_of_compiled_steps_by_differences():
    slope, state = relaxing(n_cells=3, n_latent=2, n_hidden=3)
    inputs = (state, slope.decay, *(getattr(slope.push, name) for name in PARTS))

    def end(state, decay, *parts):
        return RelaxingLayer(HiddenLayer(*parts), decay, slope.pace).steps(state, 2)

    assert torch.autograd.gradcheck(end, inputs)
    assert torch.autograd.gradgradcheck(end, inputs)


def test_compiled_steps_end_where_dopri5_does():
    slope, state = relaxing(n_cells=20)
    span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ours = with_gradients(slope.steps(state, 64), slope, state)
    theirs = with_gradients(odeint(slope, state, span, method="dopri5", rtol=1e-10, atol=1e-12)[-1], slope, state)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# Laws.


@pytest.mark.parametrize("make", [lambda: Push(4), lambda: Stable(Push(4)), lambda: Stable(Plain(Push(4)))], ids=["push", "stable", "own"])
def test_what_is_computed_once_for_a_wait_changes_no_push(make):
    field, random = make().double(), torch.Generator().manual_seed(1)
    z0, perturbation, media, delta = torch.randn(4, 2, 3, 4, generator=random, dtype=torch.float64).unbind()
    clock = torch.zeros(2, 3, 1, dtype=torch.float64)
    push = given(field, z0, perturbation, media)(delta, clock)
    torch.testing.assert_close(push, field(z0 + delta, perturbation, media, clock), rtol=1e-12, atol=1e-12)


@pytest.fixture
def screen():
    """Cells at rest in two draws, with waits of their own, and the effects of two perturbations and one media."""
    random = torch.Generator().manual_seed(0)
    marks = (torch.rand(5, size, generator=random, dtype=torch.float64).round() for size in (2, 1))
    segment = Segment(*marks, torch.ones(5, dtype=torch.bool), torch.tensor([0.0, 0.4, 1.0, 2.0, 3.0], dtype=torch.float64))
    effects = Effects(*(torch.randn(2, size, 4, generator=random, dtype=torch.float64).requires_grad_() for size in (2, 1)))
    return torch.randn(2, 5, 4, generator=random, dtype=torch.float64).requires_grad_(), segment, effects


def test_a_wait_is_that_of_a_field_of_the_users_own(screen):
    z0, segment, effects = screen
    fast = NeuralODE(4, solver=Solver(n_steps=3)).double()
    slow = NeuralODE(4, field=Plain(fast.field), solver=Solver(n_steps=3)).double()
    slow.decay_unconstrained = fast.decay_unconstrained
    found = []
    for move in (fast, slow):
        end = move(z0, [segment, replace(segment, changed=~segment.changed)], effects).z
        found.append([end, *torch.autograd.grad(end.square().sum(), [z0, effects.perturbation, effects.media, *move.parameters()])])
    for ours, plain in zip(*found, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    assert torch.equal(found[0][0][:, 0], z0[:, 0])  # of a wait of no time


def test_a_noisy_wait_is_that_of_a_field_of_the_users_own(screen):
    z0, segment, effects = screen
    fast = NeuralSDE(4).double()
    slow = NeuralSDE(4, field=Plain(fast.field)).double()
    noise = torch.randn(2, 5, 1, 8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = [move(z0, [segment], effects, noise).z for move in (fast, slow)]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_seeds_at_once_are_each_by_itself():
    field, random = PushOfSeeds(3, 4).double(), torch.Generator().manual_seed(1)
    z0, perturbation, media, delta = torch.randn(4, 3, 6, 4, generator=random, dtype=torch.float64).unbind()
    push = given(field, z0, perturbation, media)
    clock = torch.zeros(3, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(push(delta, clock), field(z0 + delta, perturbation, media, clock), rtol=1e-12, atol=1e-12)
    slope = RelaxingLayer(push, torch.rand(3, 1, 4, generator=random, dtype=torch.float64), clock + 1)
    assert torch.equal(slope.steps(delta, 2), runge_kutta(slope, delta, 2))


def test_steps_of_a_wide_layer_are_left_to_torch():
    slope, state = relaxing(n_latent=33, n_hidden=64)
    assert torch.equal(slope.steps(state, 2), runge_kutta(slope, state, 2))


def test_one_cell_that_is_not_finite_leaves_the_others_alone():
    slope, state = relaxing(dtype=torch.float32)
    ill = state.detach().clone()
    ill[3] = torch.nan
    end, sound = slope.steps(ill.requires_grad_(), 2), slope.steps(state, 2)
    assert end[3].isnan().all()
    assert torch.equal(end[4:], sound[4:])


# Other ways.


def test_without_numba_and_in_transforms_steps_are_plain(monkeypatch):
    slope, state = relaxing(n_cells=6)
    expected = runge_kutta(slope, state, 2)
    turned = jacobian(lambda y: slope.steps(y, 2), state)[1]
    (back,) = torch.func.vjp(lambda y: slope.steps(y, 2), state)[1](torch.ones_like(state))
    torch.testing.assert_close(turned.sum(1), back)
    torch.testing.assert_close(back, torch.autograd.grad(slope.steps(state, 2).sum(), [state])[0])
    monkeypatch.setattr(hidden_layer, "kernel", lambda: None)
    assert torch.equal(slope.steps(state, 2), expected)


def test_a_wait_that_wants_a_gradient_has_one():
    slope, state = relaxing(n_cells=4)
    slope.pace.requires_grad_()
    (by_pace,) = torch.autograd.grad(slope.steps(state, 8).sum(), [slope.pace])
    end = slope.steps(state, 8)
    torch.testing.assert_close(by_pace[:, 0], (slope(torch.zeros(()), end) / slope.pace).sum(-1), rtol=0.02, atol=0.02)
