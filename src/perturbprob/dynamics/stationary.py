"""The causal context as a stationary diffusion: cells go on moving, and their law stays where it is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbprob.dynamics.causal_context import CausalContext
from perturbprob.dynamics.transition import CellState, Effects, Transition
from perturbprob.experiment.vocabulary import Segment

SETTLED = 6.0
"""After how many decay times cells count as at rest: e⁻⁶ of where they came from is left, without feedback that slows them."""


@final
class StationaryDiffusion(Transition):
    """dx = (W (f − 1) + context − x) ds + σ ⊙ dB, the drift of `CausalContext` from x = 0, at rest (Lorch et al., 2024).

    A cell is δ = x from the mean of control; f = (1 − lost) ⊙ 2 σ(x) + gained is the functional product of each gene. What cells at rest
    show does not tell how fast they move (`stationarity_deviation`), so every gene decays at the rate 1.

    Waiting for any time above 0 is waiting for good: ``noise_shape`` is (n_waits, n_steps, gene), and the steps, together 6 decay
    times, are Euler-Maruyama steps with the decay solved exactly, x ← y + (x − y) e^(−h) + σ √((1 − e^(−2h)) / 2) ε with y where x is drawn
    to: of the right variance at any h where genes do not act on each other. Waits compose in law.
    """

    def __init__(self, n_genes: int, *, n_waits: int = 1, n_steps: int = 24) -> None:
        """Start without a drift that cells share, and at the σ that gives genes without regulators a variance of 1."""
        super().__init__()
        self.context = CausalContext(torch.zeros(n_genes))
        self.context.decay_unconstrained.requires_grad_(False)  # not used: the speed is not to be learnt
        self.noise_unconstrained = nn.Parameter(torch.full((n_genes,), 1.1346))
        self.noise_shape = (n_waits, n_steps, n_genes)

    @property
    def noise(self) -> Float[Tensor, " gene"]:
        """σ, per square root of a decay time."""
        return softplus(self.noise_unconstrained)

    def drift(self, x: Float[Tensor, "cell gene"], protocol: Sequence[Segment], effects: Effects) -> Float[Tensor, "cell gene"]:
        """Return where cells are going at the end of their protocols, and how fast."""
        state = CellState.at_rest(torch.zeros_like(x), protocol[0])
        for segment in protocol:
            state = state.marked(segment)
        return self.context.target(state, effects)(x) - x

    def wait(
        self,
        state: CellState,
        time: Float[Tensor, " cell"],
        effects: Effects,
        noise: Float[Tensor, "*path gene"] | None = None,
    ) -> CellState:
        """Let cells come to rest, unless they do not wait."""
        if noise is None:
            raise ValueError("A StationaryDiffusion waits with noise of shape (cell, step, gene), and got none.")
        drawn, delta = self.context.target(state, effects), state.delta
        keep = torch.exp(torch.tensor(-SETTLED / noise.shape[-2]))
        spread = self.noise * ((1 - keep.square()) / 2).sqrt()
        for shock in noise.unbind(-2):
            aim = drawn(delta)
            delta = aim + keep * (delta - aim) + spread * shock
        return replace(state, delta=torch.where(time[:, None] > 0, delta, state.delta), clock=state.clock + time)
