"""What `fit` minimises for cells at rest: how far the diffusion is from leaving each condition as it is, and a penalty."""

from typing import TYPE_CHECKING, cast, final

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perturbprob.dynamics.stationary import StationaryDiffusion
from perturbprob.inference.draws import sites_at
from perturbprob.measurement.decoder import Log1p
from perturbprob.measurement.distances import default_bandwidth
from perturbprob.measurement.stationarity import stationarity_deviation
from perturbprob.model.structures import require_at_rest

if TYPE_CHECKING:
    from perturbprob.model.cell_model import CellModel
    from perturbprob.model.cells import Cells, CellTable
    from perturbprob.model.guide import Guide


@final
class AtRestLoss(nn.Module):
    """ℓ² times the mean over conditions of the kernel deviation from stationarity, less log p / N of the network and the effects.

    ℓ, the bandwidth of the kernel, is the median distance of two cells; times ℓ² the deviation is in squared units of the drift. p is the
    prior of all that `MarkEffect` samples, N the number of cells trained on, so that the penalty weighs less the more cells there are.
    Conditions with fewer than two cells in a minibatch are left out of it.

    Before the training the level and scale of each gene are measured (the mean of control, and the standard deviation of cells within
    conditions) and stay, as do the batch effects, which start at a regression of condition means (`Guide.start`).
    """

    def __init__(self, model: "CellModel", guide: "Guide", table: "CellTable", training: Int[Tensor, " cell"]) -> None:
        """Measure level, scale and bandwidth on the cells trained on."""
        super().__init__()
        require_at_rest(table.screen)
        self.model, self.guide, self.n_cells = model, guide, len(training)
        with torch.no_grad():
            cells, self.fixed = table.cells(training), sites_at(model, guide)
            if not (cells.condition == 0).any():
                raise ValueError("No control cell is left to train on, and stationary counts from their mean: fit with validation=0.0.")
            values = torch.log1p(self._corrected(cells))
            means = torch.stack([values[cells.condition == k].mean(0) for k in range(len(table.screen.conditions))])
            self.decoder.scale.copy_((values - means[cells.condition]).square().mean(0).sqrt().clamp(min=1e-3))
            guide.block_loc[:, 0] = means[0].expm1().clamp(min=1e-6).log() - model.log_depth
            self.fixed = sites_at(model, guide)
            x = self.states(cells)
            self.bandwidth = default_bandwidth(x, x)

    @property
    def decoder(self) -> Log1p:
        """What counts and states are to each other."""
        return cast("Log1p", self.model.decoder)

    def forward(self, cells: "Cells") -> Float[Tensor, ""]:
        """Return the loss of a minibatch, and the penalty."""
        prior = self._effects()
        return self._deviation(prior, cells) - prior.log_prob_sum() / self.n_cells

    def between_cells(self, cells: "Cells") -> Float[Tensor, ""]:
        """Return the loss of cells alone, as held-out cells are judged."""
        return self._deviation(self._effects(), cells)

    def states(self, cells: "Cells") -> Float[Tensor, "cell gene"]:
        """Return the state of each cell."""
        return self.decoder.state(self._corrected(cells), self.fixed["gene_bias"])

    def _effects(self) -> pyro.poutine.Trace:
        """Sample the network and the effects at the centre of their law."""
        return pyro.poutine.trace(pyro.poutine.condition(self.model.mark_effect, self.guide.centre())).get_trace()

    def _deviation(self, effects: pyro.poutine.Trace, cells: "Cells") -> Float[Tensor, ""]:
        """Return the mean deviation of the conditions that have at least two of these cells."""
        transition, x = cast("StationaryDiffusion", self.model.transition), self.states(cells)
        drift = transition.drift(x, cells.protocol, self.model.pushes(effects.nodes["_RETURN"]["value"]))
        groups = [torch.where(cells.condition == k)[0] for k in cells.condition.unique()]
        found = [stationarity_deviation(x[g], drift[g], transition.noise, self.bandwidth) for g in groups if len(g) > 1]
        return self.bandwidth**2 * sum(found, x.new_zeros(())) / max(1, len(found))

    def _corrected(self, cells: "Cells") -> Float[Tensor, "cell gene"]:
        """Return counts over size factors and batch effects."""
        eta = self.model.batch_effect.at(self.fixed, cells.batch, torch.zeros_like(cells.counts), cells.protocol[-1].media)
        return cells.counts * torch.exp(-cells.log_size_factor[:, None] - eta)
