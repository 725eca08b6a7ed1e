"""One function per figure of a screen, a fit or an answer.

Each returns a matplotlib Figure that pyplot does not keep: a notebook shows it once, and ``figure.savefig("losses.png")`` writes it.
With ``ax=`` or ``figure=`` the function draws into one of yours instead. Blue and red are told apart by colour-blind readers, and
every mark has a shape of its own.
"""

from perturbprob.plots.of_batches import batch_decomposition
from perturbprob.plots.of_effects import effects
from perturbprob.plots.of_fit import losses, predictive_check
from perturbprob.plots.of_network import network
from perturbprob.plots.of_pseudotime import pseudotime
from perturbprob.plots.of_screen import branches, layout, steady_states
from perturbprob.plots.of_study import compare, proof_of_principle

__all__ = [
    "batch_decomposition",
    "branches",
    "compare",
    "effects",
    "layout",
    "losses",
    "network",
    "predictive_check",
    "proof_of_principle",
    "pseudotime",
    "steady_states",
]
