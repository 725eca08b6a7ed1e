"""What terms are made of: rest states carried through protocols, and the noise of a screen that changes are held against."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
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
    uniform = SobolEngine(model.rest_size, scramble=True, seed=0).draw(n_rest).clamp(1e-6, 1 - 1e-6).to(model.log_share)
    return model.rest_points(uniform)[:, None].expand(-1, n_conditions, -1)


def carried(
    model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol], z0: Float[Tensor, "*rest condition latent"] | None = None
) -> CellState:
    """Carry rest states through each protocol."""
    segments = [s.to(model.log_share.device) for s in model.vocabulary.encode(protocols)]
    return model.moved(sites, rest_points(model, len(protocols)) if z0 is None else z0, segments)


def log_shares(
    model: "CellModel", sites: dict[str, Tensor], state: CellState, protocols: Sequence[Protocol]
) -> Float[Tensor, "rest condition gene"]:
    """Return the log share of each gene, or the location of each value, at the end of each protocol, condition effects included.

    An effect that was not measured at that time has its expected value: a term draws nothing.
    """
    effect, names = model.condition_effect, model.vocabulary
    parts = [effect.parts(names.protocol(p), names.time_scale) for p in protocols]
    extra = effect.unknown(parts)
    filled = torch.cat([sites["condition_effect"], effect.expected(sites, extra)])
    return model.log_shares(sites | {"condition_effect": filled}, state, effect.rows(parts, extra).to(filled.device))


def standard_error(screen: "Screen", protocols: Sequence[Protocol]) -> Float[np.ndarray, "condition gene"]:
    """Return the standard error of the log of each condition's mean; of the value itself where values are continuous.

    A condition without cells has the median error of those with cells.
    """
    number, n_groups = {p: k for k, p in enumerate(screen.conditions)}, len(screen.conditions)
    if screen.values == "continuous":
        square = membership(screen.condition, n_groups) @ _row_errors(screen) ** 2
        error = np.sqrt(square) / np.bincount(screen.condition, minlength=n_groups)[:, None]
    else:
        found = Moments.of(relative_counts(screen.counts, screen.size_factor), screen.condition, n_groups)
        n = found.n_cells[:, None]
        error = np.sqrt((found.variance + 0.5 / n) / n) / (found.mean + 0.5 / n)
    return np.concatenate([error, np.median(error, axis=0, keepdims=True)])[[number.get(p, -1) for p in protocols]]


def _row_errors(screen: "Screen") -> Float[np.ndarray, "cell gene"]:
    """Return the standard error of continuous values; an unknown one is the gene's spread between rows of one condition.

    Where no condition has two rows it is the spread over all. No error is below a thousandth of that spread: an exact value would
    have an infinite density.
    """
    every, within = Moments.of(screen.counts), Moments.of(screen.counts, screen.condition, len(screen.conditions))
    overall = np.sqrt(every.squares[0] / max(screen.n_cells - 1, 1))
    overall = np.where(overall > 0, overall, np.median(overall[overall > 0]) if (overall > 0).any() else 1.0)
    spread = np.sqrt(within.squares.sum(axis=0) / max(screen.n_cells - len(screen.conditions), 1))
    unknown = np.where(spread > 1e-6 * overall, spread, overall)  # sums of squares differ in their last digits
    known = np.full(unknown.shape, np.nan) if screen.standard_error is None else screen.standard_error.astype(float)
    return np.maximum(np.where(np.isfinite(known), known, unknown), 1e-3 * overall) * np.ones((screen.n_cells, 1))
