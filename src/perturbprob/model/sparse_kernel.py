"""The compiled products of sparse counts with a layer's weights. Imported where it is first needed (`perturbprob.compiled`)."""

from typing import no_type_check

import numpy as np

from perturbprob.compiled import compiled

BLOCK = 256
"""Weights of so many genes are dealt with at a time, one gene's behind another's: a core's own cache holds them."""


@compiled
@no_type_check
def gather(start: np.ndarray, gene: np.ndarray, value: np.ndarray, weight: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
    """Add to each of the cells from ``first`` to ``last`` the weights (unit, gene) of its genes, in order, times their values."""
    n_units, n_genes = weight.shape
    here, place = np.empty((BLOCK, n_units), np.float32), start[first:last].copy()
    for low in range(0, n_genes, BLOCK):
        high = min(low + BLOCK, n_genes)
        for unit in range(n_units):
            for g in range(low, high):
                here[g - low, unit] = weight[unit, g]
        for cell in range(first, last):
            row, entry, end = out[cell], place[cell - first], start[cell + 1]
            while entry < end and gene[entry] < high:
                x, own = value[entry], here[gene[entry] - low]
                for unit in range(n_units):
                    row[unit] += x * own[unit]
                entry += 1
            place[cell - first] = entry


@compiled
@no_type_check
def scatter(
    start: np.ndarray, gene: np.ndarray, value: np.ndarray, outward: np.ndarray, first: int, last: int, by_weight: np.ndarray
) -> None:
    """Fill in for the weights (unit, gene) of genes from ``first`` to ``last`` what comes back (cell, unit) to cells that have them."""
    n_cells, n_units = outward.shape
    here, place = np.empty((BLOCK, n_units), np.float32), start[:-1].copy()
    for cell in range(n_cells):
        while place[cell] < start[cell + 1] and gene[place[cell]] < first:
            place[cell] += 1
    for low in range(first, last, BLOCK):
        high = min(low + BLOCK, last)
        here[:] = 0
        for cell in range(n_cells):
            back, entry, end = outward[cell], place[cell], start[cell + 1]
            while entry < end and gene[entry] < high:
                x, row = value[entry], here[gene[entry] - low]
                for unit in range(n_units):
                    row[unit] += x * back[unit]
                entry += 1
            place[cell] = entry
        for unit in range(n_units):
            for g in range(low, high):
                by_weight[unit, g] = here[g - low, unit]
