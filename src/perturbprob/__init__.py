"""perturbprob: probabilistic models of perturbation screens with single-cell readouts, built on Pyro.

A screen is a protocol of actions on a latent cell state (perturb P, change media M, wait W), seen through a measurement V with batch
effects η^b. ``import perturbprob as pb``.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # without ipywidgets tqdm, which pyro imports, warns in a notebook and shows bars as text
    import tqdm.auto  # noqa: F401

import pyro

# a second model in one session must not take over the parameters of the first
pyro.settings.set(module_local_params=True)

from perturbprob.experiment import datasets, pseudotime, split  # noqa: E402
from perturbprob.experiment.action import Activation, Interference, Knockout, Media, Protocol, Wait  # noqa: E402
from perturbprob.experiment.assays import Assay  # noqa: E402
from perturbprob.experiment.screen import Screen, ScreenWarning  # noqa: E402
from perturbprob.experiment.simulate import simulate  # noqa: E402
from perturbprob.inference import (  # noqa: E402
    AliasedWarning,
    Fit,
    IllConditioned,
    NonFiniteLoss,
    UndeclaredWarning,
    adapt,
    coherent_draws,
    counterfactual,
    do,
    edges,
    effects,
    false_hits,
    fit,
    hit_probability,
    lipschitz_constant,
    load,
    log_density,
    posterior,
    predict,
    predict_assay,
    prior,
    projected,
    rank_perturbations,
    translate,
)
from perturbprob.model import (  # noqa: E402
    CellModel,
    ExchangeableBatches,
    Lipschitz,
    SelfReconstruction,
    SilentInBaseline,
    SteadyState,
    UneditedStable,
    causal_context,
    neural_sde,
    node,
    stationary,
    vae,
)
from perturbprob.response import GaussianResponse, gaussian_response  # noqa: E402
from perturbprob.studies import (  # noqa: E402
    BatchPrior,
    Evaluation,
    baselines,
    batch_error,
    branch_shares,
    compare,
    decompose_batches,
    decompose_means,
    depth_effects,
    evaluate,
    improve_layout,
    plan_batches,
    predictive_check,
    prior_screen,
    proof_of_principle,
    propose_layouts,
    select,
    sensitivity,
    steady_states,
    to_cell_eval,
)

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "AliasedWarning",
    "Assay",
    "BatchPrior",
    "CellModel",
    "Evaluation",
    "ExchangeableBatches",
    "Fit",
    "GaussianResponse",
    "IllConditioned",
    "Interference",
    "Knockout",
    "Lipschitz",
    "Media",
    "NonFiniteLoss",
    "Protocol",
    "Screen",
    "ScreenWarning",
    "SelfReconstruction",
    "SilentInBaseline",
    "SteadyState",
    "UndeclaredWarning",
    "UneditedStable",
    "Wait",
    "adapt",
    "baselines",
    "batch_error",
    "branch_shares",
    "causal_context",
    "coherent_draws",
    "compare",
    "counterfactual",
    "datasets",
    "decompose_batches",
    "decompose_means",
    "depth_effects",
    "do",
    "edges",
    "effects",
    "evaluate",
    "false_hits",
    "fit",
    "gaussian_response",
    "hit_probability",
    "improve_layout",
    "lipschitz_constant",
    "load",
    "log_density",
    "neural_sde",
    "node",
    "plan_batches",
    "plots",
    "posterior",
    "predict",
    "predict_assay",
    "predictive_check",
    "prior",
    "prior_screen",
    "projected",
    "proof_of_principle",
    "propose_layouts",
    "pseudotime",
    "rank_perturbations",
    "select",
    "sensitivity",
    "simulate",
    "split",
    "stationary",
    "steady_states",
    "to_cell_eval",
    "translate",
    "vae",
]


def __getattr__(name: str) -> object:
    """Load the plots when they are first asked for: they need matplotlib."""
    if name == "plots":
        import importlib

        return importlib.import_module("perturbprob.plots")
    raise AttributeError(f"module 'perturbprob' has no attribute {name!r}")
