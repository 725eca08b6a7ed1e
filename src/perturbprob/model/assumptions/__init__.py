"""What the literature leaves silent, as objects: each enters the fit, counts the pairs that it adds, and tests itself.

An assumption has a ``term``, a log-density that counts once per screen; ``pairs(screen)``, the input-output pairs that it adds to those
of eq 5; and ``test(screen)``, which says how large the effect is that it denies, how well that is known, and what makes the test
impossible. ``node(screen, assumptions=[...])`` puts it into the fit.
"""

from perturbprob.model.assumptions.assumption import Assumption, Bound, bind
from perturbprob.model.assumptions.evidence import AssumptionTest
from perturbprob.model.assumptions.exchangeable import ExchangeableBatches, check_connected
from perturbprob.model.assumptions.lipschitz import Lipschitz
from perturbprob.model.assumptions.self_reconstruction import SelfReconstruction
from perturbprob.model.assumptions.silent import SilentInBaseline
from perturbprob.model.assumptions.steady import SteadyState
from perturbprob.model.assumptions.unedited_stable import UneditedStable

__all__ = [
    "Assumption",
    "AssumptionTest",
    "Bound",
    "ExchangeableBatches",
    "Lipschitz",
    "SelfReconstruction",
    "SilentInBaseline",
    "SteadyState",
    "UneditedStable",
    "bind",
    "check_connected",
]
