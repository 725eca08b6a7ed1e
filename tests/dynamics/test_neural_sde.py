"""Waiting with noise: an Ornstein-Uhlenbeck process where the push is 0, in law, and waits that add up in law."""

import math

import pytest
import torch
from torch import nn

from perturbprob.dynamics.neural_sde import NeuralSDE
from perturbprob.dynamics.transition import Effects
from perturbprob.experiment.vocabulary import Segment

N = 40_000


class Still(nn.Module):
    """A push of a constant."""

    def forward(self, z, perturbation, media, clock):
        return torch.full_like(z, 0.5)


def segments(*times):
    none = torch.zeros(N, 0)
    return [Segment(none, none, torch.zeros(N, dtype=torch.bool), torch.full((N,), t)) for t in times]


def waited(transition, *times, seed=0):
    """δ after waits without marks, from z₀ = 0."""
    noise = torch.randn(N, *transition.noise_shape, generator=torch.Generator().manual_seed(seed))
    effects = Effects(torch.zeros(0, 1), torch.zeros(0, 1))
    with torch.no_grad():
        return transition(torch.zeros(N, 1), segments(*times), effects, noise).delta[:, 0]


def test_without_a_push_it_is_an_ornstein_uhlenbeck_process():
    """Mean c (1 − e^(−γt)) / γ and variance σ² (1 − e^(−2γt)) / (2γ)."""
    transition = NeuralSDE(1, field=Still(), n_steps=100)
    gamma, sigma = transition.decay.item(), transition.noise.item()
    delta = waited(transition, 1.7)
    assert float(delta.mean()) == pytest.approx(0.5 * -math.expm1(-gamma * 1.7) / gamma, abs=0.01)
    assert float(delta.var()) == pytest.approx(sigma**2 * -math.expm1(-2 * gamma * 1.7) / (2 * gamma), rel=0.03)


def test_waits_add_up_in_law_but_not_path_by_path():
    transition = NeuralSDE(1, field=Still(), n_waits=2, n_steps=50)
    at_once, in_two = waited(transition, 2.0), waited(transition, 0.7, 1.3, seed=1)
    assert float(at_once.mean() - in_two.mean()) == pytest.approx(0, abs=0.01)
    assert float(at_once.var() / in_two.var()) == pytest.approx(1, abs=0.04)


def test_a_protocol_of_more_waits_than_it_has_noise_for_is_refused():
    with pytest.raises(ValueError, match="A protocol has 2 waits, and this transition was made with noise for 1"):
        waited(NeuralSDE(1), 1.0, 1.0)


def test_no_noise_is_refused():
    with pytest.raises(ValueError, match=r"waits with noise of shape .*, and got none. Without noise, use NeuralODE"):
        NeuralSDE(1)(torch.zeros(N, 1), segments(1.0), Effects(torch.zeros(0, 1), torch.zeros(0, 1)))
