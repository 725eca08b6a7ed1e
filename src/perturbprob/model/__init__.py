"""The generative story."""

from perturbprob.model.assumptions import (
    Assumption,
    ExchangeableBatches,
    Lipschitz,
    SelfReconstruction,
    SilentInBaseline,
    SteadyState,
    UneditedStable,
)
from perturbprob.model.cell_model import CellModel
from perturbprob.model.guide import Guide
from perturbprob.model.structures import causal_context, neural_sde, node, stationary, vae

__all__ = [
    "Assumption",
    "CellModel",
    "ExchangeableBatches",
    "Guide",
    "Lipschitz",
    "SelfReconstruction",
    "SilentInBaseline",
    "SteadyState",
    "UneditedStable",
    "causal_context",
    "neural_sde",
    "node",
    "stationary",
    "vae",
]
