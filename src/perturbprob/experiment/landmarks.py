"""The cells that a user names as the root or an end of a trajectory, and what a trajectory of control cells needs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from perturbprob.experiment import reading
from perturbprob.experiment.diffusion import Diffusion
from perturbprob.experiment.moments import relative_counts
from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


def is_control(screen: "Screen") -> Bool[np.ndarray, " cell"]:
    """Say which cells are control."""
    return np.array([not p.perturbations for p in screen.conditions])[screen.condition]


def control_cells(screen: "Screen") -> Int[np.ndarray, " control"]:
    """Return the indices of the control cells; refuse a screen of continuous values, or without them."""
    if screen.values == "continuous":
        raise ValueError(
            "This screen holds continuous values; cells are ordered by their counts. Read the counts of single cells: values='counts'."
        )
    control = np.flatnonzero(is_control(screen))
    if not len(control):
        raise ValueError(
            "This screen has no control cells, of which the trajectory is made. Keep them in it, or name their label when reading it: "
            "control='NT'."
        )
    return control


def meant(
    screen: "Screen", control: Int[np.ndarray, " control"], diffusion: Diffusion, what: str, chosen: str | ArrayLike
) -> Int[np.ndarray, " chosen"]:
    """Return which of the control cells are meant by a cell's name, a marker gene, or cells as in ``screen[cells]``.

    A gene means the cell whose neighbours hold most of it. Raises ValueError for what is neither, and for no control cell.
    """
    if isinstance(chosen, str) and chosen in screen.genes and chosen not in screen.cells:
        values = relative_counts(screen.counts[control], screen.size_factor[control]).log1p()[:, [screen.genes.index(chosen)]]
        graph = diffusion.graph
        return np.argmax((graph @ values.toarray())[:, 0] / graph.sum(axis=1), keepdims=True)
    if isinstance(chosen, str) and chosen not in screen.cells:
        hint = nearest(chosen, screen.genes)
        raise ValueError(f"The {what} {chosen!r} is neither a cell nor a gene of this screen. {hint} Or pass a mask or a list of cells.")
    if chosen is None:
        raise TypeError(f"The {what} is None: name a control cell or a marker gene, or pass a mask or a list of cells.")
    try:
        cells = np.flatnonzero(np.isin(control, reading.places(chosen, screen.cells)))
    except (TypeError, ValueError, IndexError) as error:
        raise type(error)(f"The {what} is not understood. {error}") from None
    if not len(cells):
        raise ValueError(f"No control cell is among those named as {what}: trajectories are made of control cells. Name control cells.")
    return cells


def middle(place: Float[np.ndarray, "cell component"], cells: Int[np.ndarray, " chosen"]) -> int:
    """Return the one of the chosen cells that is nearest to their median place.

    >>> middle(np.array([[0.0], [1.0], [9.0], [100.0]]), np.array([0, 1, 2]))
    1
    """
    return int(cells[((place[cells] - np.median(place[cells], axis=0)) ** 2).sum(axis=1).argmin()])


def check_enough(control: Int[np.ndarray, " control"], n_neighbours: int) -> None:
    """Refuse fewer than four control cells for each neighbour: halves of them are ordered too."""
    if len(control) < 4 * n_neighbours:
        raise ValueError(
            f"Only {len(control)} control cells: at least {4 * n_neighbours} are needed, 4 for each of a cell's neighbours, as halves are "
            f"ordered too. Lower n_neighbours (now {n_neighbours}), or measure more control cells."
        )


def check_connected(diffusion: Diffusion, n_neighbours: int) -> None:
    """Refuse a graph that falls into parts: diffusion does not pass from one to another."""
    sizes = np.sort(np.bincount(diffusion.parts))[::-1]
    if len(sizes) > 1:
        shown = ", ".join(f"{size:,}" for size in sizes[:5]) + (", ..." if len(sizes) > 5 else "")
        raise ValueError(
            f"The neighbour graph of the control cells falls into {len(sizes)} parts, of {shown} cells: there is no path between them. "
            f"Raise n_neighbours (now {n_neighbours}); if kinds of cells are truly apart, or media or batches are, order them one by one: "
            "screen[cells]."
        )


def check_ends(ends: Mapping[str, Int[np.ndarray, "_"]], root: int) -> None:
    """Refuse ends that share a cell with each other, or hold the root."""
    names = list(ends)
    for k, name in enumerate(names):
        if root in ends[name]:
            raise ValueError(f"The root is among the cells of the end {name!r}: nothing leads there. Name later cells.")
        for other in names[:k]:
            if shared := np.intersect1d(ends[name], ends[other]).size:
                raise ValueError(f"The ends {other!r} and {name!r} share {shared:,} control cells. Name cells that are at one end only.")
