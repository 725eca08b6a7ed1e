"""Unedited cells stay as they are (2.3.1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from perturbprob.experiment import rest
from perturbprob.experiment.paths import Pair
from perturbprob.model.assumptions.assumption import Assumption
from perturbprob.model.assumptions.evidence import AssumptionTest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


@final
@dataclass(frozen=True)
class UneditedStable(Assumption):
    """Unedited cells do not respond to baseline media: X_t = X (2.3.1).

    The push without marks is 0 by construction, so the term is 0, and control cells of any time are X: path 4 is the identity, counted as
    one pair, F(X_t, ·, ·, 0) → X, whatever the number of times. The pairs of eq 5 that start from X may then start from any X_t.
    """

    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return X_t → X for path 4, which is then an identity: one pair."""
        baseline = screen.baseline or "baseline"
        return [Pair(type(self).__name__, 4, "control", baseline, "X[t]", "(·, ·, 0)", "X")]

    def _test(self, screen: "Screen") -> AssumptionTest:
        """Ask how far control cells in baseline media move per unit of time, root mean square over genes in log₂ units."""
        what, baseline = "control cells in baseline media move, per unit of time, by log₂", screen.baseline or "baseline"
        control = lambda course, _: rest.movement(course, drift=True)[:, 0]  # noqa: E731
        return AssumptionTest.of_movement(type(self).__name__, what, screen, control, [baseline])
