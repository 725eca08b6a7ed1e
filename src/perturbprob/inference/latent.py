"""The latent state of cells, beside the user's own annotations."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from perturbprob.inference.draws import centre
from perturbprob.model.cells import CellTable

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit


@torch.no_grad()
def latent(fit: "Fit", screen: "Screen", *, minibatch: int = 1024) -> dict[str, np.ndarray]:
    """Return each cell's posterior mean of the rest state z₀ and of the state z now, each (cell, latent), at the centre of the globals."""
    table = CellTable(fit.model, screen)
    sites = table.sites(centre(fit.model, fit.guide))
    rest, state = [], []
    for cells in table.minibatches(minibatch):
        rest.append(fit.guide.rest(cells).mean.cpu().numpy())
        state.append(fit.model.moved(sites, fit.guide.rest(cells).mean, cells).z.cpu().numpy())
    return {"rest": np.concatenate(rest), "state": np.concatenate(state)}
