"""Neighbours that part no faster than a constant allows (B.2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.dynamics.neighbours import near_gradient_constant, near_map_constant
from perturbprob.experiment.paths import Pair
from perturbprob.model.assumptions.assumption import Assumption, Bound, Scale
from perturbprob.model.assumptions.evidence import AssumptionTest
from perturbprob.model.assumptions.terms import carried, rest_points

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel

CONSTANTS = {"map": near_map_constant, "gradient": near_gradient_constant}


@final
@dataclass(frozen=True)
class Lipschitz(Assumption):
    """F does not change faster than its input, by a constant (B.2).

    ``of="gradient"`` is the paper's inequality, ‖∇F(x) − ∇F(x′)‖ ≤ L ‖x − x′‖; ``of="map"`` is ‖F(x) − F(x′)‖ ≤ L ‖x − x′‖. A number for
    ``bound`` adds −weight · relu(L̂ − bound)², "penalty" −weight · L̂², with L̂ the largest constant over the screen's conditions at
    fixed rest states, from a few power iterations along fixed directions: a function of the sites alone, from below, and near the true
    constant there. The weight stands beside a density summed over cells, and with ``objective="paths"`` beside a mean of squares.
    A spectral norm on the field would bound the flow by e^(Lt) only. `perturbprob.lipschitz_constant` gives the constants of a
    fit at its data.
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
        z0 = rest_points(model, len(bound.protocols))
        constant = CONSTANTS[self.of](lambda z: carried(model, sites, bound.protocols, z).z, z0, _directions(z0)).amax()
        return -self.weight * (constant if isinstance(self.bound, str) else torch.relu(constant - self.bound)).square()

    def loss(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound, scale: Scale) -> Float[Tensor, ""]:
        """Return the weighted square of the constant, or of its excess over the bound."""
        return -self.term(model, sites, bound)

    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return nothing: it adds no pair."""
        return []

    def _test(self, screen: "Screen") -> AssumptionTest:
        """Say that a screen cannot test it: no two cells were both followed."""
        words = "each cell is measured once, so no screen shows how two neighbours part; ask a fit for the constant."
        return AssumptionTest.impossible(type(self).__name__, "Lipschitz constant", words)


def _directions(z0: Float[Tensor, "*plate latent"]) -> Float[Tensor, "*plate latent"]:
    """Return a unit direction for each rest state, always the same, spread evenly over the sphere."""
    uniform = SobolEngine(z0.shape[-1], scramble=True, seed=1).draw(z0[..., 0].numel()).clamp(1e-6, 1 - 1e-6)
    return torch.nn.functional.normalize(torch.special.ndtri(uniform).to(z0), dim=-1).reshape(z0.shape)
