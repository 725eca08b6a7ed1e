"""Time labels for cells of a differentiating system, from the control cells alone (appendix C.1)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from perturbprob.experiment import reading
from perturbprob.experiment.action import Protocol, Wait
from perturbprob.experiment.along import along
from perturbprob.experiment.diffusion import Diffusion, components, nearest_cells
from perturbprob.experiment.growing_support import GrowingSupport, growing_support
from perturbprob.experiment.landmarks import check_connected, check_ends, check_enough, control_cells, is_control, meant, middle
from perturbprob.experiment.lineages import find_ends, lineage_weights
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_whole
from perturbprob.experiment.vocabulary import nearest

__all__ = ["GrowingSupport", "Pseudotime", "along", "growing_support", "order"]

_FAR = 0.99


@final
@dataclass(frozen=True, eq=False, repr=False)
class Pseudotime:
    """Where each cell of a screen is on the trajectory of the control cells; made by `order`.

    ``cells`` is a Dataset over (cell) and (cell, lineage):

    - ``pseudotime``: the share of control cells that come before, in (0, 1). Under a steady flow of cells it is proportional to time.
    - ``diffusion_pseudotime``: scanpy's, 0 at the root and 1 at the control cell farthest from it.
    - ``lineage_weight``: the probability that the cell leads to each end, and ``commitment``, the part of what is possible by which it
      exceeds that of the root; 0 where it does not.
    - ``pseudotime_sd`` and ``lineage_weight_sd``: standard deviations over random halves of the control cells.
    - ``nearest_control``: the nearest control cell other than itself, whose labels a perturbed cell took; ``far``: whether it is farther
      away than that of 99 % of control cells, in all genes. The labels of far cells are those of cells unlike them.

    ``ordered_screen`` is what was ordered. ``ends`` holds the names of the control cells at the end of each lineage, the latest first.
    ``cells.attrs`` holds the root and the settings.
    """

    ordered_screen: Screen
    cells: xr.Dataset
    ends: dict[str, tuple[str, ...]]

    def screen(self, *, n_times: int = 10, lineage: str | None = None) -> Screen:
        """Return the screen with the pseudotime of each cell as the Wait of its protocol, in place of every other wait.

        Pseudotime is cut into ``n_times`` equal parts, which hold equally many control cells; the times are their middles. With
        ``lineage`` the cells that are committed to another one, to more than half, are left out: control then follows one path, as
        eq 25 asks.

        >>> from perturbprob.experiment import datasets
        >>> order(datasets.ishikawa2023(), "PRDM14", n_bootstraps=0).screen(n_times=4).times
        (0.125, 0.375, 0.625, 0.875)
        """
        check_whole(1, n_times=n_times)
        chosen = np.ones(self.ordered_screen.n_cells, bool) if lineage is None else self._not_elsewhere(lineage)
        screen, value = self.ordered_screen[chosen], self.cells["pseudotime"].values[chosen]
        pair, code = np.unique(screen.condition * n_times + np.floor(value * n_times).astype(np.int64), return_inverse=True)
        written = [_waiting(screen.conditions[k // n_times], (k % n_times + 0.5) / n_times) for k in pair.tolist()]
        conditions = tuple(sorted(set(written), key=reading.order))
        condition = np.array([conditions.index(p) for p in written], dtype=np.int64)[code]
        return replace(screen, conditions=conditions, condition=condition, time_unit="pseudotime", columns={})

    def report(self) -> str:
        """Say in words what was ordered, how surely, and what should not be trusted."""
        made, control = self.cells.attrs, is_control(self.ordered_screen)
        ends = ", ".join(f"{name} ({len(cells):,} control cells at its end)" for name, cells in self.ends.items())
        lines = [f"{len(control):,} cells on the trajectory of {control.sum():,} control cells from {made['root']}, to {ends}."]
        if made["n_connected"] > 1:
            spread = f"{float(self.cells['pseudotime_sd'].median()):.2g} in the median cell"
            lines.append(f"Standard deviation of pseudotime over {made['n_connected']} halves of control: {spread}.")
        if broken := made["n_bootstraps"] - made["n_connected"]:
            lines.append(f"In {broken} more halves the graph fell into parts: the order hangs on few cells. Raise n_neighbours.")
        if not control.all():
            far = 100 * float(self.cells["far"].values[~control].mean())
            lines.append(f"{far:.0f} % of perturbed cells are farther from control than 99 % of control cells are from each other.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()

    def _not_elsewhere(self, lineage: str) -> Bool[np.ndarray, " cell"]:
        """Say which cells are not committed to another lineage."""
        if lineage not in self.ends:
            raise ValueError(f"There is no lineage {lineage!r}. {nearest(lineage, self.ends)}")
        return (self.cells["commitment"].drop_sel(lineage=lineage) <= 0.5).all("lineage").values


def order(
    screen: Screen,
    root: str | ArrayLike,
    *,
    ends: Mapping[str, str | ArrayLike] | None = None,
    n_neighbours: int = 15,
    n_components: int = 50,
    n_bootstraps: int = 20,
    seed: int = 0,
) -> Pseudotime:
    """Order cells by diffusion pseudotime on control cells only; perturbed cells take the labels of the nearest control cell (C.1).

    Control cells are normalised, put on their own principal components and joined to their nearest neighbours; pseudotime is scanpy's,
    from ``root``. Perturbed cells have no part in it. All genes of the screen count, and control cells of all media, times and batches:
    order parts of a screen one by one where those differ more than cells along the trajectory do.

    Main arguments:

    - ``root``: where the trajectory starts. The name of a control cell; a marker gene, for the cell whose neighbours hold most of it; or
      cells as in ``screen[cells]``, such as ``adata.obs["cell_type"] == "HSC"``, for the control cell in their middle.
    - ``ends``: the end of each lineage by name, written like the root; of a mask or list all control cells count. None: they are found
      (`perturbprob.experiment.lineages.find_ends`), and called "lineage 1", ..., the latest first.

    Other arguments: ``n_neighbours`` and ``n_components`` are scanpy's defaults. ``n_bootstraps`` random halves of the control cells,
    from ``seed``, go through the same steps: a half is as far from the whole as the whole is from all cells there are, and holds no cell
    twice, which a graph of neighbours could not bear. The root and one cell of each end are in every half.

    Raises ValueError for a screen of continuous values, without control or with fewer than 4 ``n_neighbours`` control cells, an unknown
    root or end, and a neighbour graph that falls into parts.

    >>> from perturbprob.experiment import datasets
    >>> ordered = order(datasets.ishikawa2023(), "PRDM14", n_bootstraps=0)
    >>> dict(ordered.cells.sizes)
    {'cell': 14945, 'lineage': 1}
    """
    require_screen(screen)
    check_whole(2, n_neighbours=n_neighbours, n_components=n_components)
    check_whole(0, n_bootstraps=n_bootstraps, seed=seed)
    control = control_cells(screen)
    check_enough(control, n_neighbours)
    place, beside = components(screen, control, n_components)
    diffusion = Diffusion.of(place[control], n_neighbours)
    check_connected(diffusion, n_neighbours)
    start = middle(place[control], meant(screen, control, diffusion, "root", root))
    reached = diffusion.pseudotime(start)
    found = _ends(screen, control, diffusion, reached, ends)
    check_ends(found, start)
    weight = lineage_weights(diffusion.graph, reached, list(found.values()))
    settings = {"n_neighbours": n_neighbours, "n_components": n_components, "n_bootstraps": n_bootstraps, "seed": seed}
    tips = [start, *(int(cells[reached[cells].argmax()]) for cells in found.values())]
    draws = list(_halves(screen, control, [control[cells] for cells in (np.array(tips), *found.values())], **settings))
    distance, near = _nearest_control(place, control)
    squares, own = distance**2 + beside, near.copy()
    own[control] = np.arange(len(control))
    labels = {name: values[own] for name, values in _labels(reached, weight, start).items()} | _spread(draws, (len(own), len(found)))
    labels |= {"nearest_control": screen.cells[control[near]], "far": squares > np.quantile(squares[control], _FAR)}
    variables = {name: (("cell", "lineage")[: values.ndim], values) for name, values in labels.items()}
    attrs = {"root": str(screen.cells[control[start]]), "n_connected": len(draws), **settings}
    table = xr.Dataset(variables, {"cell": screen.cells, "lineage": list(found)}, attrs)
    return Pseudotime(screen, table, {name: tuple(screen.cells[control[cells]]) for name, cells in found.items()})


def _ends(
    screen: Screen,
    control: Int[np.ndarray, " control"],
    diffusion: Diffusion,
    reached: Float[np.ndarray, " control"],
    ends: Mapping[str, str | ArrayLike] | None,
) -> dict[str, np.ndarray]:
    """Return which of the control cells are at each end: as the user names them, or as they are found."""
    if ends is not None and not isinstance(ends, Mapping):
        raise TypeError(f"ends= gives the end of each lineage by name, as in {{'erythroid': cells}}; got {type(ends).__name__}.")
    if ends:
        return {name: meant(screen, control, diffusion, f"end {name!r}", cells) for name, cells in ends.items()}
    return {f"lineage {k + 1}": cells for k, cells in enumerate(find_ends(diffusion.graph, reached))}


def _labels(
    reached: Float[np.ndarray, " control"], weight: Float[np.ndarray, "control lineage"], root: int
) -> dict[str, Float64[np.ndarray, "control ..."]]:
    """Return what control cells are labelled with: pseudotime as a share of them, and by how much each leads to an end beyond the root."""
    possible = 1 - weight[root]
    commitment = np.clip(weight - weight[root], 0, None) / np.where(possible > 0, possible, 1)
    return {
        "pseudotime": _shares(reached),
        "diffusion_pseudotime": reached,
        "lineage_weight": weight,
        "commitment": np.where(possible > 0, commitment, 1.0),  # with one end, all cells are on their way to it
    }


def _halves(
    screen: Screen,
    control: Int[np.ndarray, " control"],
    kept: list[np.ndarray],
    *,
    n_neighbours: int,
    n_components: int,
    n_bootstraps: int,
    seed: int,
) -> Iterator[tuple[Float64[np.ndarray, " cell"], Float64[np.ndarray, "cell lineage"]]]:
    """Yield the pseudotime and lineage weights of all cells by each random half of control whose graph hangs together.

    ``kept`` holds cells of the screen: first those that are in each half, the root before the others, then the cells of each end.
    """
    (fixed, *ends), rng = kept, np.random.default_rng(seed)
    for _ in range(n_bootstraps):
        half = np.union1d(rng.choice(control, len(control) // 2, replace=False), fixed)
        place = components(screen, half, n_components)[0]
        diffusion = Diffusion.of(place[half], n_neighbours)
        if not diffusion.parts.any():
            reached = diffusion.pseudotime(int(np.searchsorted(half, fixed[0])))
            weight = lineage_weights(diffusion.graph, reached, [np.flatnonzero(np.isin(half, cells)) for cells in ends])
            near = nearest_cells(place[half], place)[1][:, 0]
            yield _shares(reached)[near], weight[near]


def _spread(draws: list[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return standard deviations over halves; NaN where fewer than two could be ordered."""
    if len(draws) < 2:
        return {"pseudotime_sd": np.full(shape[0], np.nan), "lineage_weight_sd": np.full(shape, np.nan)}
    share, weight = zip(*draws, strict=True)
    return {"pseudotime_sd": np.std(share, axis=0, ddof=1), "lineage_weight_sd": np.std(weight, axis=0, ddof=1)}


def _shares(reached: Float[np.ndarray, " control"]) -> Float64[np.ndarray, " control"]:
    """Return the share of control cells that come before each, and half of itself."""
    return (rankdata(reached) - 0.5) / len(reached)


def _nearest_control(
    place: Float[np.ndarray, "cell component"], control: Int[np.ndarray, " control"]
) -> tuple[Float64[np.ndarray, " cell"], Int[np.ndarray, " cell"]]:
    """Return how far the nearest control cell other than itself is from each cell, and which of the control cells it is."""
    distances, cells = nearest_cells(place[control], place, 2)
    itself = np.full(len(place), -1)
    itself[control] = np.arange(len(control))
    column = (cells[:, 0] == itself).astype(int)
    return np.take_along_axis(distances, column[:, None], 1)[:, 0], np.take_along_axis(cells, column[:, None], 1)[:, 0]


def _waiting(protocol: Protocol, time: float) -> Protocol:
    """Return a protocol with one wait at its end in place of all that it has."""
    return Protocol([*(action for action in protocol if not isinstance(action, Wait)), Wait(time)])
