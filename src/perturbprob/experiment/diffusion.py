"""Cells in the space of control cells, and how far each is from a root by diffusion on the graph of its neighbours (appendix C.1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

import numpy as np
from anndata import AnnData
from jaxtyping import Float, Float64, Int
from scipy.sparse import csr_array, csr_matrix
from scipy.sparse.csgraph import connected_components

from perturbprob.experiment.moments import relative_counts

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


def components(
    screen: "Screen", cells: Int[np.ndarray, " fitted"], n_components: int
) -> tuple[Float64[np.ndarray, "cell component"], Float64[np.ndarray, " cell"]]:
    """Return every cell's place on the principal components of some cells, and its squared distance from the space they span.

    Components are those of log(1 + count / size factor), centred on the fitted cells, and no more than half of the genes or of these.
    Size factors are relative to the median of the fitted cells, so that the others have no part in the space.

    >>> from perturbprob.experiment import datasets
    >>> screen = datasets.ishikawa2023()
    >>> place, beside = components(screen, screen.cells_of("control"), 10)
    >>> place.shape, beside.shape
    ((14945, 10), (14945,))
    """
    from sklearn.decomposition import PCA

    values = relative_counts(screen.counts, screen.size_factor / np.median(screen.size_factor[cells])).log1p()
    number = max(1, min(n_components, screen.n_genes // 2, len(cells) // 2))
    space = PCA(number, svd_solver="arpack", random_state=0).fit(csr_matrix(values[cells]))
    place, mean = space.transform(csr_matrix(values)).astype(np.float64), space.mean_
    squares = values.power(2).sum(axis=1) - 2 * values @ mean + mean @ mean
    return place, np.clip(squares - (place**2).sum(axis=1), 0, None)


@final
@dataclass(frozen=True, eq=False)
class Diffusion:
    """The graph of nearest neighbours of cells, and diffusion on it; ``adata`` is as scanpy keeps it.

    >>> far = Diffusion.of(np.concatenate([np.arange(10.0), np.arange(100.0, 110)])[:, None], 3)
    >>> np.bincount(far.parts)
    array([10, 10])
    """

    adata: AnnData

    @classmethod
    def of(cls, place: Float[np.ndarray, "cell component"], n_neighbours: int) -> Self:
        """Join each cell to its exact nearest neighbours by `scanpy.pp.neighbors`, with the adaptive Gaussian kernel.

        It is the kernel of diffusion pseudotime (Haghverdi et al. 2016, doi:10.1038/nmeth.3971), and needs no compilation.
        """
        import scanpy

        adata = AnnData(obsm={"X_pca": place})
        scanpy.pp.neighbors(adata, n_neighbors=n_neighbours, use_rep="X_pca", method="gauss", transformer="sklearn")
        return cls(adata)

    @property
    def graph(self) -> csr_array:
        """The symmetric weights of edges (cell, cell)."""
        return csr_array(self.adata.obsp["connectivities"])

    @property
    def parts(self) -> Int[np.ndarray, " cell"]:
        """The number of the connected part that each cell is in; all 0 where the graph hangs together."""
        return parts(self.graph)

    def pseudotime(self, root: int) -> Float64[np.ndarray, " cell"]:
        """Return diffusion pseudotime from the root, 0 to 1, by `scanpy.tl.dpt` with its defaults; the graph must hang together."""
        import scanpy

        adata = self.adata.copy()
        scanpy.tl.diffmap(adata)
        adata.uns["iroot"] = root
        scanpy.tl.dpt(adata)
        return adata.obs["dpt_pseudotime"].to_numpy(np.float64)


def parts(graph: csr_array) -> Int[np.ndarray, " cell"]:
    """Return the number of the connected part of a graph that each cell is in.

    >>> parts(csr_array(np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])))
    array([0, 0, 1], dtype=int32)
    """
    return connected_components(graph, directed=False)[1]


def nearest_cells(
    known: Float[np.ndarray, "known component"], place: Float[np.ndarray, "cell component"], k: int = 1
) -> tuple[Float64[np.ndarray, "cell k"], Int[np.ndarray, "cell k"]]:
    """Return the distances to the k nearest of the known cells, nearest first, and which those are.

    >>> nearest_cells(np.array([[0.0], [5.0]]), np.array([[4.0]]))
    (array([[1.]]), array([[1]]))
    """
    from sklearn.neighbors import NearestNeighbors

    distance, index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(known).kneighbors(place)
    return distance.astype(np.float64), index
