"""Where L is the identity, each cell is mapped onto itself (D.1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from perturbprob.dynamics.latent_shift import LatentShift, Unmoved
from perturbprob.dynamics.neural_ode import Stable
from perturbprob.experiment.paths import Pair, path_of
from perturbprob.model.assumptions.assumption import Assumption
from perturbprob.model.assumptions.evidence import AssumptionTest

if TYPE_CHECKING:
    from perturbprob.dynamics.transition import Transition
    from perturbprob.experiment.screen import Screen


@final
@dataclass(frozen=True)
class SelfReconstruction(Assumption):
    """The protocol does not move the latent state, so each cell is its own input and output: as many more pairs as there are cells (D.1).

    The evidence lower bound scores each cell against itself through q(z₀ | x) already, so the term is 0: it is what that bound is of, with
    L(z) = z. A structure whose L moves the state cannot carry it, as a cell then is the output of a cell at rest that nobody saw.

    >>> from perturbprob.experiment import datasets
    >>> len(SelfReconstruction().pairs(datasets.ishikawa2023()[:50]))
    50
    """

    def refuses(self, transition: "Transition") -> str | None:
        """Refuse a transition that moves the state."""
        field = getattr(transition, "field", None)
        field = field.field if isinstance(field, Stable) else field
        if isinstance(transition, LatentShift) and isinstance(field, Unmoved):
            return None
        return f"maps each cell onto itself, and {type(transition).__name__} moves it. Leave it out, or use vae(shift='identity')."

    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return x → x for each cell."""
        baseline, pairs = screen.baseline or "baseline", []
        for cell, condition in zip(screen.cells, screen.condition, strict=True):
            p = screen.conditions[condition]
            path = path_of(bool(p.perturbations), p.media is None)
            pairs.append(Pair(type(self).__name__, path, p.perturbation, p.media or baseline, f"cell {cell}", "(·, ·, 0)", f"cell {cell}"))
        return pairs

    def _test(self, screen: "Screen") -> AssumptionTest:
        """Say that no screen can test it."""
        why = "each cell is measured once, so no screen shows a cell before and after; compare fits with and without."
        return AssumptionTest.impossible(type(self).__name__, "protocols move the latent state", why)
