"""The neural ODE: waiting as a learnt push with decay."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbprob.dynamics.hidden_layer import HiddenLayer, RelaxingLayer
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import CellState, Effects, Transition

PushOfDelta = Callable[[Float[Tensor, "*plate cell latent"], Float[Tensor, "*plate cell 1"]], Float[Tensor, "*plate cell latent"]]


def given(
    field: nn.Module,
    z0: Float[Tensor, "*plate cell latent"],
    perturbation: Float[Tensor, "*plate cell latent"],
    media: Float[Tensor, "*plate cell latent"],
) -> PushOfDelta:
    """Return the push of a field over one wait, as a function of δ and the clock alone.

    A field that has a method ``given(z0, perturbation, media)`` returns that function itself, and computes what is constant once.

    >>> push = given(Push(2), *torch.zeros(3, 1, 2))
    >>> push(torch.zeros(1, 2), torch.zeros(1, 1)).shape
    torch.Size([1, 2])
    """
    own = getattr(field, "given", None)
    if own is not None:
        return own(z0, perturbation, media)
    return lambda delta, clock: field(z0 + delta, perturbation, media, clock)


class Push(nn.Module):
    """The default field: a small network of the state and of what the marks add to the push."""

    def __init__(self, n_latent: int, n_hidden: int = 64) -> None:
        """Make the network."""
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3 * n_latent, n_hidden), nn.Tanh(), nn.Linear(n_hidden, n_latent))

    def forward(
        self,
        z: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
        clock: Float[Tensor, "*plate cell 1"],
    ) -> Float[Tensor, "*plate cell latent"]:
        """Return the push. It does not read the clock, so waits compose."""
        return self.network(torch.cat([z, perturbation, media], -1))

    def given(
        self,
        z0: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
    ) -> HiddenLayer:
        """Return the push over one wait."""
        first, last = (cast("nn.Linear", self.network[k]) for k in (0, 2))
        shift = first(torch.cat([z0, perturbation, media], -1))
        return HiddenLayer(first.weight[:, : z0.shape[-1]].mT, shift, last.weight.mT, last.bias)


@final
class Stable(nn.Module):
    """A field whose push without marks is 0 by construction: unedited cells in baseline media stay where they are (2.3.1)."""

    def __init__(self, field: nn.Module) -> None:
        """Keep the field that moves marked cells."""
        super().__init__()
        self.field = field

    def forward(
        self,
        z: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
        clock: Float[Tensor, "*plate cell 1"],
    ) -> Float[Tensor, "*plate cell latent"]:
        """Return the push beyond that on unmarked cells."""
        none = torch.zeros_like(perturbation)
        return self.field(z, perturbation, media, clock) - self.field(z, none, none, clock)

    def given(
        self,
        z0: Float[Tensor, "*plate cell latent"],
        perturbation: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "*plate cell latent"],
    ) -> PushOfDelta:
        """Return the push over one wait."""
        none = torch.zeros_like(perturbation)
        marked, unmarked = given(self.field, z0, perturbation, media), given(self.field, z0, none, none)
        return lambda delta, clock: marked(delta, clock) - unmarked(delta, clock)


@final
class NeuralODE(Transition):
    """Waiting moves the deviation δ of a cell from its rest: dδ/ds = push(z₀ + δ, marks, clock) − γ⊙δ, γ > 0 (eq 25).

    Only the deviation decays: production minus decay of the whole state would contract away the heterogeneity that X stands
    for. Cells with different waits share one solve, time being scaled by each cell's wait.

    ``field`` may be any ``nn.Module`` called as ``field(z, perturbation, media, clock)``, all of shape (..., cell, latent)
    except the clock's last axis of 1, that returns the push, and may compute what is constant over a wait once (`given`); ``solver`` is a
    `Solver`. With ``decays`` False γ is 0, and the field alone
    moves the state, as eq 25 has it.
    """

    invertible = True

    def __init__(self, n_latent: int, *, field: nn.Module | None = None, solver: Solver | None = None, decays: bool = True) -> None:
        """Fill the field, the decay and the solver."""
        super().__init__()
        self.field = field if field is not None else Push(n_latent)
        self.decay_unconstrained = nn.Parameter(torch.zeros(n_latent)) if decays else None
        self.solver = solver if solver is not None else Solver()

    @property
    def decay(self) -> Float[Tensor, "*latent"]:
        """γ, per median wait."""
        return torch.zeros(()) if self.decay_unconstrained is None else softplus(self.decay_unconstrained) + 1e-3

    def wait(self, state: CellState, time: Float[Tensor, " cell"], effects: Effects, noise: Tensor | None = None) -> CellState:
        """Solve the deviation over each cell's wait."""
        perturbation = (state.perturbation @ effects.perturbation).expand_as(state.z0)
        media = (state.media @ effects.media).expand_as(state.z0)
        duration, start = time[:, None].expand_as(state.z0[..., :1]), state.clock[:, None]
        push, decay = given(self.field, state.z0, perturbation, media), self.decay

        def slope(s: Tensor, delta: Tensor) -> Tensor:
            return duration * (push(delta, start + s * duration) - decay * delta)

        relaxing = RelaxingLayer(push, decay, duration) if isinstance(push, HiddenLayer) else slope
        return replace(state, delta=self.solver(relaxing, state.delta), clock=state.clock + time)
