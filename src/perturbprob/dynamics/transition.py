"""F: how the state of a cell moves through a protocol. P and M leave marks, W reads them (eq 4)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.dynamics.solve import Solver
from perturbprob.experiment.vocabulary import Segment


@dataclass(frozen=True)
class CellState:
    """The state of cells: ``z = z0 + delta``, a clock, and the marks that P and M leave.

    ``z0`` is the cell at rest X and keeps its heterogeneity; ``delta`` is what the protocol has done to it so far.
    """

    z0: Float[Tensor, "*plate cell latent"]
    delta: Float[Tensor, "*plate cell latent"]
    clock: Float[Tensor, " cell"]
    perturbation: Float[Tensor, "cell perturbation"]
    media: Float[Tensor, "cell media"]

    @property
    def z(self) -> Float[Tensor, "*plate cell latent"]:
        """The latent state."""
        return self.z0 + self.delta

    @classmethod
    def at_rest(cls, z0: Float[Tensor, "*plate cell latent"], segment: Segment) -> Self:
        """Return untouched cells in baseline media at time 0."""
        return cls(z0, torch.zeros_like(z0), torch.zeros_like(segment.wait), *map(torch.zeros_like, (segment.perturbation, segment.media)))

    def marked(self, segment: Segment) -> Self:
        """P and M of one instant. P is idempotent and commutes by construction; its mark stays for good."""
        media = torch.where(segment.changed[:, None], segment.media, self.media)
        return replace(self, perturbation=torch.maximum(self.perturbation, segment.perturbation), media=media)


@dataclass(frozen=True)
class Effects:
    """What each perturbation and each media adds to the push on the latent state."""

    perturbation: Float[Tensor, "*draw perturbation latent"]
    media: Float[Tensor, "*draw media latent"]


class Transition(nn.Module, ABC):
    """W, and the fold over a protocol's actions around it. Subclasses give `wait` only.

    A transition draws no random values: a site inside a vector field would take a new value at every solver step.
    """

    semigroup: bool = True
    """Whether W(s) then W(t) is W(s + t) within solver error."""
    invertible: bool = False
    """Whether it runs backward."""
    solver: Solver | None = None
    """What solves its waits, where they are solved by steps."""
    noise_shape: tuple[int, ...] = ()
    """The shape, per cell, of the standard normal noise it wants, the first axis one row for each wait; `CellModel` samples it."""

    @abstractmethod
    def wait(
        self, state: CellState, time: Float[Tensor, " cell"], effects: Effects, noise: Float[Tensor, "*path latent"] | None = None
    ) -> CellState:
        """Leave the cells alone for a time (eq 3), in units of the median wait, with the ``noise`` of this wait. Return their new state."""

    @final
    def forward(
        self,
        z0: Float[Tensor, "*plate cell latent"],
        protocol: Sequence[Segment],
        effects: Effects,
        noise: Float[Tensor, "*path latent"] | None = None,
    ) -> CellState:
        """Carry untouched cells through their protocols: for each segment P and M, then W, one batched solve."""
        return self.course(z0, protocol, effects, noise)[-1]

    @final
    def course(
        self,
        z0: Float[Tensor, "*plate cell latent"],
        protocol: Sequence[Segment],
        effects: Effects,
        noise: Float[Tensor, "*path latent"] | None = None,
    ) -> list[CellState]:
        """Return the state at the end of each segment of the protocols, and so on the way to the last."""
        if self.noise_shape and len(protocol) > self.noise_shape[0]:
            raise ValueError(
                f"A protocol has {len(protocol)} waits, and this transition was made with noise for {self.noise_shape[0]}: the longest of "
                "the screen. Make the model from a screen that holds such a protocol, or ask for a shorter one."
            )
        states = [CellState.at_rest(z0, protocol[0])]
        for k, segment in enumerate(protocol):
            own = () if noise is None else (noise.select(z0.ndim - 1, k),)
            states.append(self.wait(states[-1].marked(segment), segment.wait, effects, *own))
        return states[1:]
