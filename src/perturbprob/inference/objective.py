"""What `fit` minimises: the ELBO, or the distance between predicted and measured ends of the paths of eq 5."""

from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.inference.draws import sites_at
from perturbprob.measurement.distances import DISTANCES
from perturbprob.model.cells import Cells

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel
    from perturbprob.model.guide import Guide

OBJECTIVES = ("elbo", "paths")
MSE = "mse"


@final
class PathLoss(nn.Module):
    """Σ over conditions of L(F(X, p, m, t), X_{m,t}^p) (eq 5), averaged: F is deterministic, every global site at the centre of its law.

    ``distance`` "mse" compares the predicted value with each row, as for pseudobulks; a distance between sets of cells (eq 23)
    compares cells drawn around the prediction with the cells of the condition.
    """

    def __init__(self, model: "CellModel", guide: "Guide", distance: str) -> None:
        """Keep model and guide, whose parameters are trained."""
        super().__init__()
        self.model, self.guide, self.distance = model, guide, distance

    def forward(self, cells: Cells) -> Float[Tensor, ""]:
        """Return the loss of a minibatch."""
        sites = sites_at(self.model, self.guide)
        law = self.model.measured(sites, self.model.moved(sites, self.model.at_rest(len(cells)).sample(), cells.protocol), cells)
        if self.distance == MSE:
            return (law.mean - cells.counts).square().mean()
        drawn = law.rsample()
        groups = [torch.where(cells.condition == k)[0] for k in cells.condition.unique()]
        losses = [DISTANCES[self.distance](drawn[group], cells.counts[group]) for group in groups]
        return torch.stack(losses).mean()


def check_objective(objective: str, distance: str, screen: "Screen") -> None:
    """Refuse objectives that do not exist, or that do not fit what was measured."""
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}. Use one of {', '.join(map(repr, OBJECTIVES))}.")
    if distance not in (MSE, *DISTANCES):
        raise ValueError(f"Unknown distance {distance!r}. Use one of {', '.join(map(repr, (MSE, *DISTANCES)))}.")
    if objective == "paths" and screen.values == "counts":
        raise ValueError(
            "objective='paths' needs continuous values: counts have a law, and objective='elbo' fits it. "
            "To train on eq 5, take screen.pseudobulk(), or read normalised cells with values='continuous'."
        )
