"""Scores of cells: how far cells that a fit replicates are from those observed, and how probable the observed ones are."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from perturbprob.experiment.action import Protocol
from perturbprob.inference.density import log_density
from perturbprob.inference.draws import global_draws
from perturbprob.model.cells import CellTable
from perturbprob.studies.baselines import condition_negative_binomial, negative_binomial
from perturbprob.studies.distribution_metrics import cell_distances
from perturbprob.studies.predictive_check import replicate

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit
    from perturbprob.studies.held_out_means import Means
    from perturbprob.studies.mean_scores import Scores

DISTANCES = ("energy", "mmd", "sinkhorn")
GLOBAL_DRAWS = 5
"""Of how many draws of the globals replicated cells are, in equal parts, and log densities an average."""
DENSITIES: dict[str, Callable[["Screen", "Screen"], Any]] = {
    "negative binomial": negative_binomial,
    "condition negative binomial": condition_negative_binomial,
}


def chosen_cells(means: "Means", at_most: int, seed: int) -> list[Int[np.ndarray, " _"]]:
    """Return the cells of each perturbed condition that are looked at, at most so many, drawn by the seed; none of control."""
    rng, of = np.random.default_rng([seed, 3]), means.test.condition
    rows = [rng.permutation(np.flatnonzero(of == k))[:at_most] for k in range(len(means.n))]
    return [np.sort(part) if seen else part[:0] for part, seen in zip(rows, means.perturbed, strict=True)]


@torch.no_grad()
def replicates(fit: "Fit", cells: "Screen", *, seed: int, progress: bool) -> Float[np.ndarray, "cell gene"]:
    """Return counts of as many cells as there are, of the same conditions, batches and size factors, replicated from rest.

    Of each of `GLOBAL_DRAWS` draws of the globals is an equal part of the cells, taken in turn. In a batch that the fit never saw η is
    taken as 0.
    """
    known = np.isin(np.array(cells.batches)[cells.batch], fit.model.vocabulary.batches)
    found = np.zeros((cells.n_cells, cells.n_genes), np.float32)
    for rows, batch in ((np.flatnonzero(known), None), (np.flatnonzero(~known), -1)):
        if not len(rows):
            continue
        table, n_draws = CellTable(fit.model, cells[rows], batch=batch), min(GLOBAL_DRAWS, len(rows))
        for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="cells" if progress else None)):
            own = torch.arange(k, len(rows), n_draws)
            found[rows[own.numpy()]] = replicate(fit, table, draw, own, seed=(seed, k, 9))
    return found


def fit_distances(means: "Means", fit: "Fit", at_most: int, seed: int, *, progress: bool) -> "Scores":
    """Return the distances of replicated from observed cells, per condition."""
    rows = chosen_cells(means, at_most, seed)
    predicted = np.log1p(replicates(fit, means.test[np.concatenate(rows)], seed=seed, progress=progress))
    parts = np.split(predicted, np.cumsum([len(part) for part in rows])[:-1])
    return distances(means, parts, rows, at_most, seed)


def half_distances(means: "Means", halves: list[tuple[np.ndarray, np.ndarray]], at_most: int, seed: int) -> "Scores":
    """Return the distances of one half of the cells of each condition from the other."""
    values, rows, parts = means.test.counts.log1p(), [], []
    for (own, other), seen in zip(halves, means.perturbed, strict=True):
        rows.append(own if seen else own[:0])
        parts.append(values[other if seen else other[:0]].toarray())
    return distances(means, parts, rows, at_most, seed)


def control_distances(means: "Means", at_most: int, seed: int) -> "Scores":
    """Return the distances of the real control cells beside each condition, of its batches where there are any."""
    parts = []
    for condition, cells in zip(means.test.conditions, means.cells, strict=True):
        batches = {batch for batch, n in zip(means.test.batches, cells, strict=True) if n}
        parts.append(control_beside(means, condition, batches).toarray())
    return distances(means, parts, chosen_cells(means, at_most, seed), at_most, seed)


def control_beside(means: "Means", condition: Protocol, batches: set[str]) -> csr_array:
    """Return log(1 + count) of the control cells of the media and time of a condition, of these batches where there are any."""
    rows = {batch: part for (c, batch), part in means.control_cells.items() if c == condition.unperturbed()}
    inside = [part for batch, part in rows.items() if batch in batches] or list(rows.values())
    return csr_array(vstack(inside)) if inside else means.test.counts[:0]


def distances(
    means: "Means", predicted: list[Float[np.ndarray, "_ gene"]], rows: list[Int[np.ndarray, " _"]], at_most: int, seed: int
) -> "Scores":
    """Return the distances of predicted cells of each condition from those observed, of which the rows say which."""
    found = {name: np.full(len(rows), np.nan) for name in DISTANCES}
    for k, (cells, own) in enumerate(zip(predicted, rows, strict=True)):
        if len(own) < 2 or len(cells) < 2:
            continue
        each = cell_distances(cells, means.test.counts[own].log1p().toarray(), at_most=at_most, seed=seed)
        for name, value in each.items():
            found[name][k] = value
    return found


def has_density(fit: "Fit") -> bool:
    """Tell whether a fit has a density of counts: one by the ELBO has."""
    return fit.settings["objective"] == "elbo"


def fit_log_density(means: "Means", fit: "Fit", *, particles: int, seed: int, progress: bool) -> Float[np.ndarray, " condition"]:
    """Return the mean log density of the cells of each perturbed condition, per count; NaN where the fit has none or lacks the batch."""
    test = means.test
    cells = np.flatnonzero(means.perturbed[test.condition] & np.isin(np.array(test.batches)[test.batch], fit.model.vocabulary.batches))
    if not has_density(fit) or not len(cells):
        return np.full(len(means.n), np.nan)
    part = test[cells]
    n_seen = part.n_genes + sum(len(assay.features) for assay in part.assays.values())
    found = log_density(fit, part, particles, n_draws=GLOBAL_DRAWS, seed=seed, progress=progress).values / n_seen
    total = np.bincount(test.condition[cells], found, len(means.n))
    whole = np.bincount(test.condition[cells], minlength=len(means.n)) == means.n
    return np.where(whole & means.perturbed, total / means.n, np.nan)


def baseline_log_density(means: "Means", train: "Screen", name: str) -> Float[np.ndarray, " condition"]:
    """Return the same of one of the negative binomials of `perturbprob.studies.baselines`."""
    found = DENSITIES[name](train.with_rna, means.test).values / means.test.n_genes
    return np.where(means.perturbed, np.bincount(means.test.condition, found, len(means.n)) / means.n, np.nan)
