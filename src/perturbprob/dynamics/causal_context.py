"""The causal context: genes make genes through a signed network that perturbations cut and media surround (Figure 8)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import CellState, Effects, Transition


@dataclass(frozen=True)
class NetworkEffects(Effects):
    """The network, and what each perturbation does to the product of each gene.

    ``weights`` hold the regulators of each gene; ``lost`` the share of a gene's product that a perturbation takes away (× takes all),
    ``gained`` what it adds. ``perturbation`` and ``media`` are what marks add to the production of each gene.
    """

    weights: Float[Tensor, "*draw gene regulator"]
    lost: Float[Tensor, "*draw perturbation gene"]
    gained: Float[Tensor, "*draw perturbation gene"]


@final
class CausalContext(Transition):
    """Waiting in gene space, dδ/ds = γ ⊙ (W (f − f₀) + context − δ), γ > 0, δ being how far log rates are from the cell's own rest.

    f = (1 − lost) ⊙ 2 σ(z) + gained is the functional product of each gene, bounded, 1 at the median cell's rest; f₀ = 2 σ(z₀) is what
    the cell made before anything was done to it, so a cell that nothing is done to stays where it is. A perturbation acts on the product of
    its own gene, never on what its transcript is: × takes the product away and the transcript goes on. ``context`` is what media
    add to each gene, what a perturbation adds to its own transcript, and a drift that all cells share (without it where ``drifts`` is
    False). Cycles are allowed: as f is bounded, so is δ. ``centre`` is where z is at the median cell's rest.
    """

    invertible = True
    centre: Tensor

    def __init__(self, centre: Float[Tensor, " gene"], *, drifts: bool = True, solver: Solver | None = None) -> None:
        """Start all genes at γ = 0.7 per median wait, without a drift."""
        super().__init__()
        self.register_buffer("centre", centre, persistent=False)
        self.decay_unconstrained = nn.Parameter(torch.zeros_like(centre))
        self.drift = nn.Parameter(torch.zeros_like(centre)) if drifts else None
        self.solver = solver if solver is not None else Solver()

    @property
    def decay(self) -> Float[Tensor, " gene"]:
        """γ, per median wait."""
        return softplus(self.decay_unconstrained) + 1e-3

    def product(self, z: Float[Tensor, "*plate cell gene"]) -> Float[Tensor, "*plate cell gene"]:
        """Return the functional product of each gene in cells that nothing is done to."""
        return 2 * torch.sigmoid(z - self.centre)

    def kept(self, state: CellState, effects: NetworkEffects) -> Float[Tensor, "*plate cell gene"]:
        """Return the share of each gene's product that perturbations leave."""
        return 1 - (state.perturbation @ effects.lost).clamp(max=1)

    def target(self, state: CellState, effects: Effects) -> Callable[[Tensor], Tensor]:
        """Return where δ is drawn to, as a function of δ: W (f − f₀) + context."""
        effects = _with_network(effects)
        kept, gained = self.kept(state, effects), state.perturbation @ effects.gained
        context = state.perturbation @ effects.perturbation + state.media @ effects.media
        context = context if self.drift is None else context + self.drift
        before, to_gene = self.product(state.z0), effects.weights.mT

        def drawn(delta: Tensor) -> Tensor:
            return (kept * self.product(state.z0 + delta) + gained - before) @ to_gene + context

        return drawn

    def wait(self, state: CellState, time: Float[Tensor, " cell"], effects: Effects, noise: Tensor | None = None) -> CellState:
        """Solve the deviation over each cell's wait."""
        drawn, pace = self.target(state, effects), time[:, None] * self.decay
        return replace(state, delta=self.solver(lambda _, delta: pace * (drawn(delta) - delta), state.delta), clock=state.clock + time)

    def settled(self, state: CellState, effects: Effects, *, tolerance: float = 1e-5, max_steps: int = 500) -> CellState:
        """Return the state after waiting for good, δ = W (f − f₀) + context, from where the cells are.

        Damped fixed-point steps lead there, and where strong feedback makes them swing, implicit steps. The derivative of the answer, where
        one is asked for, is that of the solution (implicit function theorem), whatever the way to it. Raises a ValueError where a cell
        does not come to rest: no such point is found, or the cells would move away from it.
        """
        effects = _with_network(effects)
        drawn, delta = self.target(state, effects), state.delta
        with torch.no_grad():
            for _ in range(max_steps):
                step = drawn(delta) - delta
                if step.abs().amax() <= tolerance:
                    break
                delta = delta + 0.5 * step
            else:
                delta = self._implicit(drawn, state, effects, delta, tolerance)
        if not torch.is_grad_enabled():
            return replace(state, delta=delta)
        flat = delta.detach()
        return replace(state, delta=flat + self._towards(drawn(flat) - flat, state, effects, flat))

    def _implicit(
        self, drawn: Callable[[Tensor], Tensor], state: CellState, effects: NetworkEffects, delta: Tensor, tolerance: float
    ) -> Tensor:
        """Find the point of rest by implicit steps in time, ever longer, and see that cells near it come back."""
        for k in range(200):
            step = drawn(delta) - delta
            if step.abs().amax() <= tolerance:
                break
            step = self._towards(step, state, effects, delta, held=2.0 * 0.9**k)
            delta = delta + step / step.abs().amax(-1, keepdim=True).clamp(min=1.0)  # no gene by more than 1
        else:
            raise ValueError(
                f"No point of rest was found (the state still moves by {float(step.abs().amax()):.2g}). Ask for a finite wait."
            )
        back = self.decay[:, None] * (self._slope(state, effects, delta) - torch.eye(delta.shape[-1]).to(delta))
        if (torch.linalg.eigvals(back).real > 0).any():
            raise ValueError(
                "This network has a cycle that goes on: cells move away from the only point of rest found. Ask for a finite wait."
            )
        return delta

    def _slope(self, state: CellState, effects: NetworkEffects, delta: Tensor) -> Float[Tensor, "*plate cell gene regulator"]:
        """Return the derivative of where δ is drawn to."""
        product = self.product(state.z0 + delta)
        return effects.weights.unsqueeze(-3) * (self.kept(state, effects) * product * (1 - product / 2)).unsqueeze(-2)

    def _towards(self, step: Tensor, state: CellState, effects: NetworkEffects, delta: Tensor, held: float = 0.0) -> Tensor:
        """Return Newton's step, (I − J)⁻¹ of the plain one, J taken as it is; ((1 + ``held``) I − J)⁻¹, held back."""
        slope = self._slope(state, effects, delta).detach()
        system = (1 + held) * torch.eye(delta.shape[-1], dtype=delta.dtype, device=delta.device) - slope
        return torch.linalg.solve(system, step.unsqueeze(-1)).squeeze(-1)


def _with_network(effects: Effects) -> NetworkEffects:
    """Refuse effects that hold no network."""
    if not isinstance(effects, NetworkEffects):
        raise TypeError(f"CausalContext waits with NetworkEffects, which hold the network; got {type(effects).__name__}.")
    return effects
