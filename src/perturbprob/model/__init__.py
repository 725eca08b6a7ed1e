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
from perturbprob.model.structures import neural_sde, node, vae

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
    "neural_sde",
    "node",
    "vae",
]
