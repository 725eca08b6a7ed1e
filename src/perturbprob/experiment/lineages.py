"""Where a branching trajectory ends, and to which end each cell leads."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.sparse import csr_array, diags_array

from perturbprob.experiment.diffusion import parts

SHARE = 0.05
"""The least share of cells that a branch holds before it joins another; smaller ones are for the user to name."""
_BACK = 0.1  # how probable a step back is, next to one forward over an edge of the same weight
_LEVELS = 100
_STEPS = 1000


def find_ends(graph: csr_array, pseudotime: Float[np.ndarray, " cell"], share: float = SHARE) -> list[Int[np.ndarray, "_"]]:
    """Return the ends of a trajectory, the latest first: cells that hang together among the late, and hold a share of all cells.

    The graph is cut down to the cells later than a level, which falls in steps of 1/100 of the cells. Whenever one of its parts first
    reaches the share without holding an end already, it is an end. So a branch counts if it has as many cells beyond the point
    where it joins another.

    >>> chain = csr_array(np.eye(41, k=1) + np.eye(41, k=-1))  # the middle is the root
    >>> [end.tolist() for end in find_ends(chain, np.abs(np.arange(41) - 20.2))]
    [[0, 1, 2], [38, 39, 40]]
    """
    fewest, ends = share * len(pseudotime), list[np.ndarray]()
    for level in np.quantile(pseudotime, np.linspace(1, 0, _LEVELS + 1)):
        late = np.flatnonzero(pseudotime >= level)
        part = parts(graph[late][:, late])
        for number in np.flatnonzero(np.bincount(part) >= fewest):
            cells = late[part == number]
            if not any(np.isin(end, cells).any() for end in ends):
                ends.append(cells)
    return ends


def lineage_weights(
    graph: csr_array, pseudotime: Float[np.ndarray, " cell"], ends: Sequence[Int[np.ndarray, "_"]]
) -> Float64[np.ndarray, "cell lineage"]:
    """Return the probability that a walk from each cell comes to each end first; rows sum to 1.

    A step goes to a neighbour in proportion to the weight of the edge, a tenth of it where that leads back in pseudotime. Of walks of
    up to 1,000 steps those count that arrive. So a cell leads where later cells like it lead, and the root's weights are the odds that
    an uncommitted cell has.

    >>> chain = csr_array(np.eye(41, k=1) + np.eye(41, k=-1))
    >>> lineage_weights(chain, np.abs(np.arange(41) - 20.0), [np.array([0]), np.array([40])])[[5, 20, 35], 0].round(2)
    array([1. , 0.5, 0. ])
    """
    edges = graph.tocoo()
    forward = np.where(pseudotime[edges.col] >= pseudotime[edges.row], 1.0, _BACK)
    walk = csr_array((edges.data * forward, (edges.row, edges.col)), shape=graph.shape)
    walk = diags_array(1 / walk.sum(axis=1)) @ walk
    at_end = np.stack([np.isin(np.arange(len(pseudotime)), cells) for cells in ends], axis=1)
    on_the_way, arrived = ~at_end.any(axis=1, keepdims=True), at_end.astype(float)
    for _ in range(_STEPS):
        before, arrived = arrived, np.where(on_the_way, walk @ arrived, at_end)
        if np.abs(arrived - before).max() < 1e-9:
            break
    return arrived / arrived.sum(axis=1, keepdims=True)
