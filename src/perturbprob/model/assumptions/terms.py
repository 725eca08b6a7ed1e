"""What terms are made of: rest states carried through protocols, and the noise of a screen that changes are held against."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.dynamics.transition import CellState
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.moments import Moments, membership, relative_counts

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel


N_REST = 32
"""How many rest states a term is averaged over."""


def rest_points(model: "CellModel", n_conditions: int) -> Float[Tensor, "rest condition latent"]:
    """Return the same rest states for each condition."""
    n_rest = 1 if model.start is not None else N_REST
    uniform = SobolEngine(model.n_latent, scramble=True, seed=0).draw(n_rest).clamp(1e-6, 1 - 1e-6).to(model.log_share)
    return model.rest_points(uniform)[:, None].expand(-1, n_conditions, -1)


def carried(
    model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol], z0: Float[Tensor, "rest condition latent"] | None = None
) -> CellState:
    """Carry rest states through each protocol."""
    segments = [s.to(model.log_share.device) for s in model.vocabulary.encode(protocols)]
    return model.moved(sites, rest_points(model, len(protocols)) if z0 is None else z0, segments)


def location(
    model: "CellModel", sites: dict[str, Tensor], z: Float[Tensor, "rest condition latent"]
) -> Float[Tensor, "rest condition gene"]:
    """Return the log share of each gene, or the location of each value, without condition effects."""
    return model.decoder(z, sites["gene_bias"])


def standard_error(screen: "Screen", protocols: Sequence[Protocol]) -> Float[np.ndarray, "condition gene"]:
    """Return the standard error of the log of each condition's mean; of the value itself where values are continuous.

    A condition without cells has the error of all cells.
    """
    number = {p: k for k, p in enumerate(screen.conditions)}
    error = np.concatenate([_errors(screen, screen.condition, len(number)), _errors(screen, np.zeros(screen.n_cells, np.int64), 1)])
    return error[[number.get(p, -1) for p in protocols]]


def _errors(screen: "Screen", group: Int[np.ndarray, " cell"], n_groups: int) -> Float[np.ndarray, "group gene"]:
    """Return the standard error of groups of cells."""
    if screen.values == "continuous":
        known = np.nan if screen.standard_error is None else screen.standard_error
        square = np.where(np.isfinite(known), known, 0.1).astype(float) ** 2 * np.ones((screen.n_cells, screen.n_genes))
        return np.sqrt(membership(group, n_groups) @ square / np.bincount(group, minlength=n_groups)[:, None]) + 1e-3
    found = Moments.of(relative_counts(screen.counts, screen.size_factor), group, n_groups)
    n = found.n_cells[:, None]
    return np.sqrt((found.variance + 0.5 / n) / n) / (found.mean + 0.5 / n)
