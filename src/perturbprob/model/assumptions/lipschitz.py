"""Neighbours that part no faster than a constant allows (B.2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.dynamics.neighbours import gradient_constant, map_constant
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.paths import Pair
from perturbprob.model.assumptions.assumption import Assumption, Bound
from perturbprob.model.assumptions.evidence import AssumptionTest
from perturbprob.model.assumptions.terms import carried, rest_points

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel


@final
@dataclass(frozen=True)
class Lipschitz(Assumption):
    """F does not change faster than its input, by a constant (B.2).

    ``of="gradient"`` is the paper's inequality, ‖∇F(x) − ∇F(x′)‖ ≤ L ‖x − x′‖; ``of="map"`` is ‖F(x) − F(x′)‖ ≤ L ‖x − x′‖. A number for
    ``bound`` adds −weight · relu(L̂ − bound)², "penalty" −weight · L̂², with L̂ the largest constant between random neighbours
    at rest of the screen's conditions. A spectral norm on the field would bound the flow by e^(Lt) only. `constant` gives the constant
    at given rest states from Jacobian-vector products.
    """

    of: str = "map"
    bound: float | str = "penalty"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the words and numbers."""
        if self.of not in ("map", "gradient"):
            raise ValueError(f"Lipschitz(of={self.of!r}): use 'map' or 'gradient'.")
        if self.bound != "penalty" and (isinstance(self.bound, str) or not self.bound > 0):
            raise ValueError(f"Lipschitz(bound={self.bound!r}): use a number above 0, or 'penalty'.")
        if not self.weight > 0:
            raise ValueError(f"Lipschitz needs a weight above 0; got {self.weight!r}.")

    def bind(self, screen: "Screen") -> Bound:
        """Take the conditions of the screen."""
        return Bound(self, tuple(screen.conditions), (1.0,) * len(screen.conditions))

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return minus the weighted square of the constant, or of its excess over the bound."""
        rest_states, step = rest_points(model, len(bound.protocols)), 1e-2
        direction = torch.nn.functional.normalize(torch.randn_like(rest_states), dim=-1)
        at = [carried(model, sites, bound.protocols, rest_states + k * step * direction).z for k in (0, 1, 2)]
        slope = at[1] - at[0] if self.of == "map" else (at[2] - 2 * at[1] + at[0]) / step
        constant = (slope.norm(dim=-1) / step).amax()
        return -self.weight * (constant if self.bound == "penalty" else torch.relu(constant - self.bound)).square()

    @torch.no_grad()
    def constant(self, model: "CellModel", sites: dict[str, Tensor], z0: Float[Tensor, "cell latent"], protocol: Protocol) -> float:
        """Return the largest constant over cells, from Jacobian-vector products; `lipschitz_constant` asks a fit at its data."""
        flow = lambda z: carried(model, sites, [protocol] * len(z0), z[None]).z[0]  # noqa: E731
        return float((map_constant if self.of == "map" else gradient_constant)(flow, z0).max())

    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return nothing: it adds no pair."""
        return []

    def test(self, screen: "Screen") -> AssumptionTest:
        """Say that a screen cannot test it: no two cells were both followed."""
        words = "each cell is measured once, so no screen shows how two neighbours part; ask a fit for the constant."
        return AssumptionTest.impossible(type(self).__name__, "Lipschitz constant", words)
