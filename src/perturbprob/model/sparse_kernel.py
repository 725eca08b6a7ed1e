"""The compiled products of sparse counts with a layer's weights. Imported where it is first needed (`perturbprob.compiled`)."""

from typing import no_type_check

import numpy as np

from perturbprob.compiled import compiled


@compiled
@no_type_check
def gather(start: np.ndarray, gene: np.ndarray, value: np.ndarray, weight: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
    """Add to each of the cells from ``first`` to ``last`` the weights (gene, unit) of the genes that it has, times their values."""
    for cell in range(first, last):
        row = out[cell]
        for entry in range(start[cell], start[cell + 1]):
            x, own = value[entry], weight[gene[entry]]
            for unit in range(len(row)):
                row[unit] += x * own[unit]


@compiled
@no_type_check
def scatter(start: np.ndarray, gene: np.ndarray, value: np.ndarray, outward: np.ndarray, first: int, last: int, into: np.ndarray) -> None:
    """Add to the weights (gene, unit) of each gene, for the units from ``first`` to ``last``, what comes back (cell, unit) to its cells."""
    for cell in range(len(outward)):
        back = outward[cell, first:last]
        for entry in range(start[cell], start[cell + 1]):
            x, row = value[entry], into[gene[entry], first:last]
            for unit in range(len(row)):
                row[unit] += x * back[unit]
