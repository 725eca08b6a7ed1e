"""From data to posterior."""

from perturbprob.inference.adapt import adapt
from perturbprob.inference.caveats import AliasedWarning, UndeclaredWarning
from perturbprob.inference.counterfactual import IllConditioned, counterfactual, translate
from perturbprob.inference.density import log_density
from perturbprob.inference.do import do
from perturbprob.inference.draws import coherent_draws
from perturbprob.inference.edges import edges
from perturbprob.inference.effects import effects
from perturbprob.inference.escape import false_hits, hit_probability
from perturbprob.inference.fit import Fit, NonFiniteLoss, fit
from perturbprob.inference.lipschitz import lipschitz_constant
from perturbprob.inference.posterior import posterior, prior
from perturbprob.inference.predict import predict, predict_assay
from perturbprob.inference.projected import Projected, projected
from perturbprob.inference.rank import rank_perturbations
from perturbprob.inference.storage import load

__all__ = [
    "AliasedWarning",
    "Fit",
    "IllConditioned",
    "NonFiniteLoss",
    "Projected",
    "UndeclaredWarning",
    "adapt",
    "coherent_draws",
    "counterfactual",
    "do",
    "edges",
    "effects",
    "false_hits",
    "fit",
    "hit_probability",
    "lipschitz_constant",
    "load",
    "log_density",
    "posterior",
    "predict",
    "predict_assay",
    "prior",
    "projected",
    "rank_perturbations",
    "translate",
]
