"""The latent state of cells, beside the user's own annotations."""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from anndata import AnnData

from perturbprob.experiment.screen import Screen, ScreenWarning
from perturbprob.inference.caveats import AliasedWarning
from perturbprob.inference.draws import GIVEN_CELLS, Sites, centre, require_likelihood, seeded, warn_if_large
from perturbprob.inference.escape import gone
from perturbprob.inference.expectation import interpolated_log1p
from perturbprob.model.cells import Cells, CellTable

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit


@torch.no_grad()
def latent(fit: "Fit", screen: "Screen", *, minibatch: int = 1024) -> dict[str, np.ndarray]:
    """Return each cell's posterior mean of the rest state z₀ and the state z that it leads to, each (cell, latent).

    Of a cell that may have escaped, those of the more probable case.
    """
    require_likelihood(fit, GIVEN_CELLS)
    table = CellTable(fit.model, screen)
    sites = table.sites(centre(fit.model, fit.guide))
    rest, state = [], []
    for cells in _gone(fit, table, sites, minibatch):
        rest.append(fit.model.resting(fit.guide.rest(cells).mean).cpu().numpy())
        state.append(fit.model.moved(sites, fit.guide.rest(cells).mean, cells.protocol).z.cpu().numpy())
    return {"rest": np.concatenate(rest), "state": np.concatenate(state)}


@torch.no_grad()
def corrected(fit: "Fit", screen: Screen, *, minibatch: int = 1024) -> np.ndarray:
    """Return what each cell would be expected to show at the average over batches, E[log(1 + x)] at η = 0, (cell, gene) in float32.

    The cell's rest state is that of q(z₀ | x) in its own batch, its protocol its own, all at the centre of their laws, and the size factor
    is 1 for every cell. Of continuous values, the expected values themselves.
    """
    warn_if_large(screen.n_cells * screen.n_genes, "corrected expectations", "Ask for fewer cells or genes.")
    table = CellTable(fit.model, screen)
    sites, found = table.sites(centre(fit.model, fit.guide)), []
    for cells in _gone(fit, table, sites, minibatch):
        state = fit.model.moved(sites, fit.guide.rest(cells).mean, cells.protocol)
        location = fit.model.log_shares(sites, state, cells.rows)
        if fit.model.start is None:
            location = interpolated_log1p(fit.model.law(sites, location + fit.model.log_depth))
        found.append(location.cpu().numpy())
    return np.concatenate(found)


def _gone(fit: "Fit", table: CellTable, sites: Sites, minibatch: int) -> Iterator[Cells]:
    """Iterate over all cells in their order, each by the way that it has most probably gone."""
    with seeded(0):
        yield from (gone(fit, table, sites, index, sure=True) for index in torch.arange(table.screen.n_cells).split(minibatch))


def to_anndata(fit: "Fit", adata: AnnData, *, corrected: bool = False) -> AnnData:
    """Return a copy of an AnnData with the latent state of each cell; see `Fit.to_anndata`."""
    part = _read(fit, adata)
    states, result = latent(fit, part), adata.copy()
    result.obsm["X_perturbprob"], result.obsm["X_perturbprob_rest"] = states["state"], states["rest"]
    if corrected:
        _say_aliased(fit)
        result.layers["perturbprob_corrected"] = _layer(fit, adata, part)
    return result


def _layer(fit: "Fit", adata: AnnData, part: Screen) -> np.ndarray:
    """Return corrected expectations in the genes of an AnnData, NaN in those that the fit does not know."""
    layer = np.full(adata.shape, np.nan, np.float32)
    layer[:, adata.var_names.get_indexer(list(fit.model.vocabulary.genes))] = corrected(fit, part)
    return layer


def _say_aliased(fit: "Fit") -> None:
    """Say that what is taken away with the batches may be what an aliased factor does."""
    others = sorted({name for pair in fit.trained_on["confounded"] if "batch" in pair for name in pair if name != "batch"})
    if others:
        warnings.warn(
            f"{' and '.join([', '.join(others), 'batch'])} are aliased in this screen: what all cells of one {others[0]} share may have "
            "been taken away with its batch effect. Do not compare corrected expectations between them.",
            AliasedWarning,
            stacklevel=4,
        )


def _read(fit: "Fit", adata: AnnData) -> Screen:
    """Read an AnnData by the columns and genes of a fit."""
    if not isinstance(adata, AnnData):
        raise TypeError(f"to_anndata takes an AnnData; got {type(adata).__name__}. Give the one that the screen was read from.")
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
        return Screen.from_anndata(part, **columns)
