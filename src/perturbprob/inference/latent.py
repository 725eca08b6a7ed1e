"""The latent state of cells, beside the user's own annotations."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from perturbprob.experiment.screen import Screen, ScreenWarning
from perturbprob.inference.draws import centre
from perturbprob.model.cells import CellTable

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbprob.inference.fit import Fit


@torch.no_grad()
def latent(fit: "Fit", screen: "Screen", *, minibatch: int = 1024) -> dict[str, np.ndarray]:
    """Return each cell's posterior mean of the rest state z₀ and the state z that it leads to, each (cell, latent)."""
    table = CellTable(fit.model, screen)
    sites = table.sites(centre(fit.model, fit.guide))
    rest, state = [], []
    for cells in table.minibatches(minibatch):
        rest.append(fit.guide.rest(cells).mean.cpu().numpy())
        state.append(fit.model.moved(sites, fit.guide.rest(cells).mean, cells.protocol).z.cpu().numpy())
    return {"rest": np.concatenate(rest), "state": np.concatenate(state)}


def to_anndata(fit: "Fit", adata: "AnnData") -> "AnnData":
    """Return a copy of an AnnData with the latent state of each cell; see `Fit.to_anndata`."""
    columns = fit.trained_on["columns"]
    if not columns:
        raise ValueError(
            "The screen of this fit was not read from the columns of an AnnData alone (made by hand, or size factors given as an array)."
        )
    missing = set(fit.model.vocabulary.genes) - set(map(str, adata.var_names))
    if missing:
        raise ValueError(f"{len(missing)} genes of the fit are not in adata.var_names, such as {sorted(missing)[:3]}.")
    part = adata[:, list(fit.model.vocabulary.genes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScreenWarning)
        states = latent(fit, Screen.from_anndata(part, **columns))
    result = adata.copy()
    result.obsm["X_perturbprob"], result.obsm["X_perturbprob_rest"] = states["state"], states["rest"]
    return result
