"""Sums, means and variances of sparse values over groups of cells, by one product with the matrix that says who belongs where."""

from dataclasses import dataclass
from typing import Self, final

import numpy as np
from jaxtyping import Float64, Int
from scipy.sparse import csr_array


def membership(group: Int[np.ndarray, " cell"], n_groups: int) -> csr_array:
    """Return a matrix (group, cell) that is 1 where a cell is in a group; its product with values of cells is their sums.

    >>> membership(np.array([0, 1, 0]), 2).toarray()
    array([[1., 0., 1.],
           [0., 1., 0.]])
    """
    cells = np.arange(len(group))
    return csr_array((np.ones(len(cells)), (group, cells)), shape=(n_groups, len(cells)))


def relative_counts(counts: csr_array, size_factor: Float64[np.ndarray, " cell"]) -> csr_array:
    """Return counts over size factors, as sparse as the counts, in float64."""
    result = counts.astype(np.float64)
    result.data /= np.repeat(size_factor, np.diff(counts.indptr))
    return result


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """What the cells of each group have in common: their number, the ``mean`` of each gene, and ``squares``, Σ (x − mean)².

    ``mean`` is NaN in a group without cells. Cells × genes are never dense at once.

    >>> found = Moments.of(csr_array([[1.0, 0.0], [3.0, 0.0], [2.0, 5.0]]), np.array([0, 0, 1]), 2)
    >>> found.n_cells, found.mean[0], found.variance[0], found.unbiased_variance[0]
    (array([2, 1]), array([2., 0.]), array([1., 0.]), array([2., 0.]))
    """

    n_cells: Int[np.ndarray, " group"]
    mean: Float64[np.ndarray, "group gene"]
    squares: Float64[np.ndarray, "group gene"]

    @classmethod
    def of(cls, values: csr_array, group: Int[np.ndarray, " cell"] | None = None, n_groups: int = 1) -> Self:
        """Take the moments of values (cell, gene) over groups of cells; by default, over all."""
        group = np.zeros(values.shape[0], np.int64) if group is None else group
        values, member, n = values.astype(np.float64), membership(group, n_groups), np.bincount(group, minlength=n_groups)
        number = np.where(n > 0, n, np.nan)[:, None]
        mean = (member @ values).toarray() / number
        return cls(n, mean, np.maximum((member @ values.power(2)).toarray() - number * mean**2, 0))

    @property
    def variance(self) -> Float64[np.ndarray, "group gene"]:
        """The variance of the cells themselves: squares over their number."""
        return self.squares / np.where(self.n_cells > 0, self.n_cells, np.nan)[:, None]

    @property
    def unbiased_variance(self) -> Float64[np.ndarray, "group gene"]:
        """The variance of cells that these are a sample of: squares over one less than their number, NaN for a single cell."""
        return self.squares / np.where(self.n_cells > 1, self.n_cells - 1.0, np.nan)[:, None]
