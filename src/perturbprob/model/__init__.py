"""The generative story."""

from perturbprob.model.cell_model import CellModel
from perturbprob.model.guide import Guide
from perturbprob.model.structures import node

__all__ = ["CellModel", "Guide", "node"]
