"""The neural SDE: a push with decay, and noise on the way, so that cells alike at rest may end in different branches (C.1)."""

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbprob.dynamics.neural_ode import Push, given
from perturbprob.dynamics.transition import CellState, Effects, Transition


@final
class NeuralSDE(Transition):
    """dδ = (push(z₀ + δ, marks, clock) − γ ⊙ δ) ds + σ ⊙ dB, γ, σ > 0, in Itô's sense, by Euler-Maruyama in ``n_steps`` equal steps a wait.

    ``noise_shape`` is (n_waits, n_steps, latent): the increments of B over a step of length h are √h times standard normal numbers, which
    `CellModel` samples with the cell's rest state. So the field stays pure, and given the noise the state is a function like any
    other. Waits compose in law, as far as the steps are fine, and not path by path: a wait cut in two uses other noise. It does
    not run backward.
    """

    def __init__(self, n_latent: int, *, field: nn.Module | None = None, n_waits: int = 1, n_steps: int = 8) -> None:
        """Fill the field; start at γ = 0.7 and σ = 0.5 per median wait."""
        super().__init__()
        self.field = field if field is not None else Push(n_latent)
        self.decay_unconstrained = nn.Parameter(torch.zeros(n_latent))
        self.noise_unconstrained = nn.Parameter(torch.full((n_latent,), -0.4328))
        self.noise_shape = (n_waits, n_steps, n_latent)

    @property
    def decay(self) -> Float[Tensor, " latent"]:
        """γ, per median wait."""
        return softplus(self.decay_unconstrained) + 1e-3

    @property
    def noise(self) -> Float[Tensor, " latent"]:
        """σ, per square root of a median wait."""
        return softplus(self.noise_unconstrained)

    def wait(
        self,
        state: CellState,
        time: Float[Tensor, " cell"],
        effects: Effects,
        noise: Float[Tensor, "*path latent"] | None = None,
    ) -> CellState:
        """Take the steps of each cell's wait."""
        if noise is None:
            raise ValueError("A NeuralSDE waits with noise of shape (cell, step, latent), and got none. Without noise, use NeuralODE.")
        perturbation = (state.perturbation @ effects.perturbation).expand_as(state.z0)
        media = (state.media @ effects.media).expand_as(state.z0)
        push, n_steps, delta = given(self.field, state.z0, perturbation, media), noise.shape[-2], state.delta
        step = (time / n_steps)[:, None]
        for k, shock in enumerate(noise.unbind(-2)):
            clock = (state.clock[:, None] + k * step).expand_as(state.z0[..., :1])
            delta = delta + step * (push(delta, clock) - self.decay * delta) + step.sqrt() * self.noise * shock
        return replace(state, delta=delta, clock=state.clock + time)
