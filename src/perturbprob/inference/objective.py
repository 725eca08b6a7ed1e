"""What `fit` minimises beside the ELBO: the distance between predicted and measured ends of the paths of eq 5."""

from functools import partial
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.dynamics.stationary import StationaryDiffusion
from perturbprob.inference.draws import Sites, sites_at
from perturbprob.measurement.counts import CountLaw
from perturbprob.measurement.distances import DISTANCES, energy, mmd, sinkhorn
from perturbprob.model.cells import Cells

if TYPE_CHECKING:
    from perturbprob.model.cell_model import CellModel
    from perturbprob.model.guide import Guide

OBJECTIVES = ("elbo", "paths", "kds")
MSE = "mse"
UNBIASED = {"energy": partial(energy, unbiased=True), "mmd": partial(mmd, unbiased=True)}
# a thousandth of the mass in the wrong place moves a gradient by less than the choice of the minibatch does
TRAINED = DISTANCES | {"sinkhorn": partial(sinkhorn, tolerance=1e-3)}


@final
class PathLoss(nn.Module):
    """Σ over conditions of L(F(X, p, m, t), X_{m,t}^p) (eq 5), averaged: F is deterministic, every global site at the centre of its law.

    Each assumption adds a mean of its own (`Assumption.loss`): of its pairs (eqs 9, 14) the square of the change that it denies, on the
    scale on which values are compared, of `Lipschitz` its penalty.

    Of continuous values, ``distance`` "mse" compares the predicted value with each row, as for pseudobulks; a distance between sets of
    cells (eq 23) compares cells drawn around the prediction with the cells of the condition.

    Of counts, cells start anywhere at rest, z₀ ~ Normal(0, I), and have batch and size factor of the measured cells. Sets are compared as
    log1p of counts, predicted ones by `CountLaw.rsample_log1p`. "mse" compares the means of log1p over a condition's cells, a pseudobulk:
    the distance of moments of order 1, which has no hold on the spread of cells but to make it smaller, as it adds noise to the mean
    of a minibatch's few cells. Where a distance has an unbiased form, that is taken.
    """

    def __init__(self, model: "CellModel", guide: "Guide", distance: str) -> None:
        """Keep model and guide, whose parameters are trained."""
        super().__init__()
        self.model, self.guide, self.distance = model, guide, distance

    def forward(self, cells: Cells) -> Float[Tensor, ""]:
        """Return the loss of a minibatch, and of the assumptions."""
        sites = sites_at(self.model, self.guide)
        assumed = [bound.loss(self.model, sites, partial(self.scale, sites)) for bound in self.model.assumptions]
        return sum(assumed, self.of_cells(sites, cells))

    def between_cells(self, cells: Cells) -> Float[Tensor, ""]:
        """Return the loss of cells alone, as held-out cells are judged: it compares fits under different assumptions."""
        return self.of_cells(sites_at(self.model, self.guide), cells)

    def scale(self, sites: Sites, location: Float[Tensor, "*plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return what is compared: of a log share, E[log(1 + count)] at size factor 1; of continuous values, the value."""
        law = self.model.law(sites, self.model.log_depth + location)
        return law.mean_log1p() if isinstance(law, CountLaw) else location

    def of_cells(self, sites: Sites, cells: Cells) -> Float[Tensor, ""]:
        """Return the loss of a minibatch."""
        law = self.model.measured(sites, self.model.moved(sites, self.model.at_rest(len(cells)).sample(), cells.protocol), cells)
        mse, measured = self.distance == MSE, cells.counts
        if isinstance(law, CountLaw):
            predicted, measured = law.mean_log1p() if mse else law.rsample_log1p(), torch.log1p(measured)
        elif mse:
            return (law.mean - measured).square().mean()
        else:
            predicted = law.rsample()
        groups = [torch.where(cells.condition == k)[0] for k in cells.condition.unique()]
        return torch.stack([self.between(predicted[group], measured[group]) for group in groups]).mean()

    def between(self, predicted: Float[Tensor, "cell gene"], measured: Float[Tensor, "cell gene"]) -> Float[Tensor, ""]:
        """Return the distance between the predicted and the measured cells of one condition."""
        if self.distance == MSE:
            return (predicted.mean(0) - measured.mean(0)).square().mean()
        if self.distance in UNBIASED and len(predicted) > 1:
            # a cell's pair with itself, at distance 0, would reward a smaller spread, the more so the fewer the cells
            return UNBIASED[self.distance](predicted, measured)
        return TRAINED[self.distance](predicted, measured)


def chosen_objective(objective: str | None, distance: str, model: "CellModel") -> str:
    """Return the objective, by default that of the structure; refuse what does not exist, and terms that a distance cannot take in."""
    at_rest = isinstance(model.transition, StationaryDiffusion)
    objective = objective or ("kds" if at_rest else "elbo")
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}. Use one of {', '.join(map(repr, OBJECTIVES))}.")
    if (objective == "kds") != at_rest:
        raise ValueError(
            "objective='kds' and the structure stationary go together: it has no likelihood, and others have no law at rest. Leave "
            "objective= out: fit takes the one that the structure has."
        )
    if objective != "paths" and distance != MSE:
        raise ValueError(f"distance={distance!r} goes with objective='paths': objective={objective!r} compares no predicted set of cells.")
    if distance not in (MSE, *DISTANCES):
        raise ValueError(f"Unknown distance {distance!r}. Use one of {', '.join(map(repr, (MSE, *DISTANCES)))}.")
    if objective == "paths" and model.penetrance is not None:
        raise ValueError(
            "objective='paths' has no probabilities, and penetrance is one. Fit with objective='elbo', or leave penetrance out."
        )
    if objective == "paths" and model.assays:
        raise ValueError(
            f"objective='paths' compares RNA only, and the model has the assay {next(iter(model.assays))!r} too. Fit with "
            "objective='elbo', or leave the assays out: screen.with_assays({})."
        )
    if objective == "paths" and any(bound.assumption.learns_noise for bound in model.assumptions):
        raise ValueError(
            "objective='paths' minimises a distance, and SteadyState(scale='learnt') learns a noise, which no distance knows. Fit with "
            "objective='elbo', or take scale='fixed'."
        )
    return objective
