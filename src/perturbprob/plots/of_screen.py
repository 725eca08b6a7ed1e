"""Figures of a screen: its layout, its branches, and how far its conditions move."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.vocabulary import nearest
from perturbprob.plots.axes import BLUE, GREY, MANY, RED, known_names, moment, name_axis, new_axes, new_figure, plain, write
from perturbprob.studies.steady_state import SteadyStates

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_GRAPH = (40, 20)  # conditions and batches of a graph that can still be read


def layout(screen: Screen, *, kind: str | None = None, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw where the cells of a screen are: its valid set V (eq 16) as a graph (Figure 6), or a table of cells.

    ``kind="graph"``, the default up to 40 conditions and 20 batches: perturbations in media to the left, batches to the right, a line
    where a batch holds a condition, the wider the more cells. Squares are batches with control in baseline media (V_00), and blue lines
    lead there; batches without it are red diamonds. A hollow condition is missing in some batch. Times are not told apart; which factors
    are confounded stands below.

    ``kind="table"``: how many cells each perturbation has in each media, time and batch; control stands above a line, 0 is left blank,
    and combinations without any cell have no column.

    >>> import perturbprob as pb
    >>> pb.plots.layout(pb.datasets.ishikawa2023()).axes[0].get_title()
    'Conditions (left) and the batches that hold them'
    >>> pb.plots.layout(pb.datasets.ishikawa2023(), kind="table").axes[0].images[0].get_array().shape
    (24, 4)
    """
    require_screen(screen)
    if kind not in (None, "graph", "table"):
        raise ValueError(f"kind={kind!r} is neither 'graph' nor 'table'. {nearest(kind, ('graph', 'table'))}")
    small = len({(p.perturbation, p.media) for p in screen.conditions}) <= _GRAPH[0] and len(screen.batches) <= _GRAPH[1]
    return _graph(screen, ax) if kind == "graph" or (kind is None and small) else _table(screen, ax)


def branches(screen: Screen, *, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw Figure 1B of the paper for a screen: untouched cells X are perturbed, their media changed, and left alone.

    One branch for each perturbation and media (all perturbations together where there are more than eight), with its path 1-4, the
    cells measured at its end and their times. Dashed red branches were not measured.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, media=("rest", "drug"), seed=1).screen
    >>> len(pb.plots.branches(screen).axes[0].texts)
    19
    """
    require_screen(screen)
    table = _branches(screen)
    axes = new_axes(ax, (8.5, 1.2 + 0.42 * len(table)))
    middle = (len(table) - 1) / 2
    write(axes, 0, middle, "X", weight="bold")
    for name, rows in table.groupby("branch", sort=False):
        height = float(rows.row.mean())
        axes.plot([0.15, 0.75], [middle, height], color="black" if rows.observed.any() else RED, lw=1)
        write(axes, 1, height, str(name))
        for end in rows.itertuples():
            axes.plot([1.3, 2.1], [height, end.row], color="black" if end.observed else RED, ls="-" if end.observed else "--", lw=1)
            write(axes, 2.5, end.row, end.media)
            write(axes, 3.0, end.row, end.label, ha="left", color="black" if end.observed else RED)
    for x, title in ((1, "P"), (2.5, "M"), (3.4, "W, then measured")):
        write(axes, x, -1, title, weight="bold")
    axes.set(xlim=(-0.2, 5.2), ylim=(len(table) - 0.5, -1.6))
    axes.axis("off")
    return axes.figure.figure


def steady_states(
    result: SteadyStates, *, media: str | None = None, figure: "matplotlib.figure.Figure | None" = None
) -> "matplotlib.figure.Figure":
    """Draw ``|LFC|`` of each perturbation between sequential times, joined by a line, in one ``media`` (default: the first); figure 9.

    Those known from most cells come first. Above, ``|LFC|`` as measured; the grey band is what halves of control show at their worst time.
    Below, ``|LFC|`` beyond the drift that all share; grey bars are the noise of control cells in the same numbers. Steps that the rule of
    their panel calls moving are red diamonds; the last step counts.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=8, n_perturbations=2, times=(1.0, 2.0, 3.0), seed=1).screen
    >>> len(pb.plots.steady_states(pb.steady_states(screen, n_splits=50)).axes)
    2
    """
    table = result.table.sel(media=known_names([media], result.table.media.values, "media") if media else result.table.media.values[:1])
    part = table.isel(media=0, perturbation=np.argsort(-table["precision"].sum(["media", "step"]).values, kind="stable"))
    figure = new_figure((min(0.38 * len(part.perturbation) + 2.5, 40.0), 7.0)) if figure is None else figure
    above, below = figure.subplots(2, 1, sharex=True)
    within = f"{100 * (1 - part.attrs['tolerance']):g} % of"
    above.axhspan(0, float(part["control_bound"]), color=GREY, alpha=0.25, lw=0, label=f"{within} halves of control, worst time")
    _steps(above, part["lfc"], part["steady_by_control"])
    place = _steps(below, part["lfc_beyond_drift"], part["steady_by_matched"]).ravel()
    noise, style = part["matched_bound"].values.ravel(), {"color": GREY, "alpha": 0.35, "zorder": 0}
    below.bar(place, noise, 0.8 / len(part.step), label=f"{within} noise in the same numbers of cells", **style)
    above.set(ylabel="|LFC| [log₂]", title=f"Steps between times, {plain(part.media.values)}")
    steps = f"{', '.join(part.step.values)} {part.attrs['time_unit']}"
    below.set(ylabel="|LFC| beyond shared drift [log₂]", xlabel=f"perturbation, most cells first; each from left to right: {steps}")
    name_axis(below.xaxis, part.perturbation.values, rotation=90)
    for axes in (above, below):
        axes.set(xlim=(-0.7, len(part.perturbation) - 0.3), ylim=(0, 1.3 * axes.dataLim.ymax))
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return figure


def _graph(screen: Screen, ax: "matplotlib.axes.Axes | None") -> "matplotlib.figure.Figure":
    """Draw V as a graph of conditions and batches."""
    cells = _seen(screen)
    height = max(*cells.shape, 4)
    axes = new_axes(ax, (7.5, 0.24 * height + 1.6))
    left, right = (_heights(n, height) for n in cells.shape)
    _lines(axes, cells, (left, right), ("control", screen.baseline or "baseline"))
    everywhere, untouched = (cells > 0).all(axis=1).to_numpy(), cells.columns.isin(screen.layout.batches_with_control)
    _nodes(axes, 0, left[everywhere], "o", "black", "condition in every batch")
    _nodes(axes, 0, left[~everywhere], "o", "white", "condition missing in some batch")
    _nodes(axes, 1, right[untouched], "s", BLUE, "batch with control in baseline media")
    _nodes(axes, 1, right[~untouched], "D", RED, "batch without control in baseline media")
    for place, (perturbation, media) in zip(left, cells.index, strict=True):
        write(axes, -0.04, place, perturbation if len(screen.media) == 1 else f"{perturbation} · {media}", ha="right")
    for place, name, total in zip(right, cells.columns, cells.sum(), strict=True):
        write(axes, 1.04, place, f"{name}: {total:,} cells", ha="left")
    title = "Conditions (left) and the batches that hold them"
    axes.set(title=title, xlim=(-0.75, 1.75), ylim=(height - 0.2, -0.8))
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False, fontsize=8)
    for k, (first, second) in enumerate(screen.layout.confounded()):
        words = f"{first} and {second} are fully confounded"
        axes.text(0.5, -0.1 - 0.04 * k, words, transform=axes.transAxes, ha="center", color=RED, fontsize=8)
    return axes.figure.figure


def _seen(screen: Screen) -> pd.DataFrame:
    """Count cells, (perturbation, media) × batch: baseline media and control first, batches by where their conditions stand."""
    cells = screen.summary().groupby(level=["perturbation", "media"]).sum()
    order = sorted(cells.index, key=lambda node: (screen.media.index(node[1]), node[0] != "control", node[0]))
    cells = cells.loc[order]
    middle = [np.flatnonzero(column).mean() for column in cells.to_numpy().T]  # fewer lines cross
    return cells.iloc[:, np.argsort(np.round(middle, 6), kind="stable")]


def _lines(axes: "matplotlib.axes.Axes", cells: pd.DataFrame, heights: tuple[np.ndarray, np.ndarray], untouched: tuple[str, str]) -> None:
    """Join each condition to its batches, the wider the more cells; lines of untouched cells stand out."""
    counts = cells.to_numpy()
    pairs = np.argwhere(counts)
    widest = 4.0 * min(1.0, 10 / np.sqrt(len(pairs)))  # many lines would cover each other
    for condition, batch in pairs:
        ends = [heights[0][condition], heights[1][batch]]
        width = widest * (0.1 + 0.9 * np.sqrt(counts[condition, batch] / counts.max()))
        colour, alpha, order = (BLUE, 1.0, 2) if cells.index[condition] == untouched else (GREY, 0.4, 1)
        axes.plot([0, 1], ends, color=colour, lw=width, alpha=alpha, zorder=order)


def _heights(n: int, height: int) -> Float[np.ndarray, " node"]:
    """Spread nodes evenly over a height."""
    return (np.arange(n) + 0.5) * height / n - 0.5


def _nodes(axes: "matplotlib.axes.Axes", x: float, y: Float[np.ndarray, " node"], marker: str, colour: str, label: str) -> None:
    """Draw nodes of one kind, if there are any."""
    if len(y):
        axes.scatter(np.full(len(y), x), y, s=42, marker=marker, color=colour, edgecolors="black", zorder=3, label=f"{label}: {len(y)}")


def _table(screen: Screen, ax: "matplotlib.axes.Axes | None") -> "matplotlib.figure.Figure":
    """Draw how many cells each perturbation has in each media, time and batch."""
    table = _cells(screen)
    axes = new_axes(ax, (min(max(0.55 * table.shape[1] + 3.2, 4.5), 60.0), min(0.22 * len(table) + 2.2, 60.0)))
    counts = np.ma.masked_equal(table.to_numpy(), 0)
    image = axes.imshow(counts, aspect="auto", cmap="cividis", vmin=0)
    if max(table.shape) <= MANY:
        _write_counts(axes, counts)
    if "control" in table.index and len(table) > 1:
        axes.axhline(0.5, color="white", lw=5)
    several = len(screen.media) > 1
    columns = [" · ".join([*([m] if several else []), moment(t, screen.time_unit), b]) for m, t, b in table.columns]
    name_axis(axes.xaxis, columns, rotation=90)
    name_axis(axes.yaxis, table.index)
    axes.set(xlabel=f"{'media · ' if several else ''}time · batch", ylabel="perturbation", title=f"Where the {screen.n_cells:,} cells are")
    axes.figure.colorbar(image, ax=axes, label="cells", shrink=0.6)
    return axes.figure.figure


def _branches(screen: Screen) -> pd.DataFrame:
    """Return one row for each branch of the drawing: a perturbation, or all of them, in one media."""
    table = screen.layout.paths()
    many = len(screen.perturbations) > 8
    together = f"{len(screen.perturbations)} perturbations"
    table["branch"] = [p if p == "control" or not many else together for p in table.perturbation]
    order = {name: k for k, name in enumerate(dict.fromkeys(["control", *sorted(table.branch)]))}
    grouped = table.sort_values("branch", key=lambda names: names.map(order), kind="stable").groupby(["branch", "media"], sort=False)
    rows = [_branch(screen, branch, media, part) for (branch, media), part in grouped]
    return pd.DataFrame(rows).assign(row=range(len(rows)))


def _branch(screen: Screen, branch: str, media: str, part: pd.DataFrame) -> dict[str, object]:
    """Say what was measured at the end of a branch."""
    seen, times = int(part.observed.sum()), sorted({t for times in part.times for t in times})
    of = f"{seen} of {len(part)} measured, " if len(part) > 1 else ""
    found = f"{of}{part.cells.sum():,} cells at {', '.join(f'{t:g}' for t in times)} {screen.time_unit or ''}" if seen else "not measured"
    return {"branch": branch, "media": media, "observed": seen > 0, "label": f"path {part.path.iloc[0]}: {found.strip()}"}


def _steps(axes: "matplotlib.axes.Axes", values: xr.DataArray, steady: xr.DataArray) -> Float[np.ndarray, "perturbation step"]:
    """Draw the steps of each perturbation as a line, those that are not steady as red diamonds; return where they are drawn."""
    rows, n = values.shape
    place, seen = np.arange(rows)[:, None] + 0.8 * ((np.arange(n) + 0.5) / n - 0.5), values.notnull().values
    axes.plot(place.T, values.values.T, color=BLUE, lw=1)
    for mask, marker, colour, label in ((steady.values, "o", BLUE, "steady"), (~steady.values, "D", RED, "moving")):
        axes.plot(place[mask & seen], values.values[mask & seen], marker, ms=4.5, mew=0, color=colour, label=label)
    return place


def _cells(screen: Screen) -> pd.DataFrame:
    """Count cells, perturbation (control first) × (media, time, batch)."""
    tall = screen.summary().melt(ignore_index=False, value_name="cells").reset_index()
    tall["media"] = pd.Categorical(tall["media"], screen.media, ordered=True)
    table = tall.pivot_table("cells", "perturbation", ["media", "time", "batch"], aggfunc="sum", fill_value=0, observed=True)
    table = table.loc[[*table.index.intersection(["control"]), *table.index.difference(["control"])]]
    return table.loc[:, table.sum() > 0]


def _write_counts(axes: "matplotlib.axes.Axes", counts: np.ma.MaskedArray) -> None:
    """Write each number of cells into its field, dark on light and light on dark."""
    for row, column in np.argwhere(~np.ma.getmaskarray(counts)):
        colour = "black" if counts[row, column] > 0.5 * counts.max() else "white"
        axes.text(column, row, f"{counts[row, column]:d}", ha="center", va="center", fontsize=8, color=colour)
