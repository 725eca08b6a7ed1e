"""A latent shift in place of waiting: the state after a protocol is a function L of the cell at rest (eqs 26-28)."""

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbprob.dynamics.transition import CellState, Effects, Transition


@final
class Additive(nn.Module):
    """A shift that is the same for every cell: the sum of the effects of its marks, and a drift that all cells share."""

    def __init__(self, n_latent: int) -> None:
        """Start without a drift."""
        super().__init__()
        self.drift = nn.Parameter(torch.zeros(n_latent))

    def forward(
        self,
        z: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
        clock: Float[Tensor, "*plate cell 1"],
    ) -> Float[Tensor, "*plate cell latent"]:
        """Return the shift."""
        return perturbation + media + self.drift


@final
class Network(nn.Module):
    """A shift by a small network of the state, the marks and the time."""

    def __init__(self, n_latent: int, n_hidden: int = 64) -> None:
        """Make the network."""
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3 * n_latent + 1, n_hidden), nn.Tanh(), nn.Linear(n_hidden, n_latent))

    def forward(
        self,
        z: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
        clock: Float[Tensor, "*plate cell 1"],
    ) -> Float[Tensor, "*plate cell latent"]:
        """Return the shift."""
        return self.network(torch.cat([z, perturbation, media, clock.expand_as(z[..., :1])], -1))


@final
class Unmoved(nn.Module):
    """No shift: L is the identity, and every cell can only be mapped onto itself (D.1)."""

    def forward(
        self,
        z: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
        clock: Float[Tensor, "*plate cell 1"],
    ) -> Float[Tensor, "*plate cell latent"]:
        """Return 0."""
        return torch.zeros_like(z)


@final
class LatentShift(Transition):
    """L(z₀, p, m, t) = z₀ + (1 − e^(−κ t)) ⊙ shift(z₀, marks, t), κ > 0, t the time since the start (eq 27).

    It reads the marks that are there at the end and the time since the start, not the way: what L(L(z, t), s) should be is not
    defined, so it is no semigroup, and two protocols that differ in when a media was changed have the same end. At time 0 it is the
    identity. ``field`` is any ``nn.Module`` called as ``field(z, perturbation, media, clock)`` that returns the shift, as in `NeuralODE`.
    """

    semigroup = False

    def __init__(self, n_latent: int, *, field: nn.Module | None = None) -> None:
        """Fill the shift and start all axes at κ = 1 per median wait."""
        super().__init__()
        self.field = field if field is not None else Additive(n_latent)
        self.rate_unconstrained = nn.Parameter(torch.full((n_latent,), 0.5413))

    @property
    def rate(self) -> Float[Tensor, " latent"]:
        """κ, per median wait."""
        return softplus(self.rate_unconstrained)

    def wait(self, state: CellState, time: Float[Tensor, " cell"], effects: Effects, noise: Tensor | None = None) -> CellState:
        """Return the shift of each cell's rest state by its marks, after all the time since its start."""
        perturbation = (state.perturbation @ effects.perturbation).expand_as(state.z0)
        media = (state.media @ effects.media).expand_as(state.z0)
        clock = (state.clock + time)[:, None]
        shift = self.field(state.z0, perturbation, media, clock.expand_as(state.z0[..., :1]))
        return replace(state, delta=-torch.expm1(-self.rate * clock) * shift, clock=clock[:, 0])
