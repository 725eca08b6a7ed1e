"""How strongly the cells of each perturbation speak against the perturbation doing nothing."""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.model.cell_model import CellModel
from perturbprob.model.cells import Cells, CellTable
from perturbprob.model.guide import Guide

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
