"""The figure of a trajectory: where the cells of each perturbation are along it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from perturbprob.experiment.along import along, transferred
from perturbprob.experiment.pseudotime import Pseudotime
from perturbprob.experiment.vocabulary import labels
from perturbprob.plots.axes import BLUE, GREEN, GREY, RED, known_names, name_axis, new_figure, plain

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_BINS = 20
_HEIGHT = 0.85  # of the highest column, in rows


def pseudotime(
    ordered: Pseudotime,
    perturbations: str | Sequence[str] | None = None,
    *,
    level: float = 0.05,
    figure: "matplotlib.figure.Figure | None" = None,
) -> "matplotlib.figure.Figure":
    """Draw how the cells of each perturbation are spread along the trajectory, beside control (Figure 7, inset).

    Left, a row for each perturbation, the earliest on top: its cells in twenty parts of pseudotime (blue) over those of control (grey
    line); a bold name with a dot differs from control at a share of false discoveries of ``level`` (`pseudotime.along`). Right, how many
    more or fewer cells it sends to each lineage, filled where that differs. ``perturbations`` names rows; default: all.

    Raises ValueError for a perturbation that the screen does not have.

    >>> import perturbprob as pb
    >>> ordered = pb.pseudotime.order(pb.datasets.ishikawa2023(), "PRDM14", n_bootstraps=0)
    >>> len(pb.plots.pseudotime(ordered, ["NANOG", "SOX2"]).axes)
    2
    """
    table = along(ordered, level=level)
    part = table.isel(perturbation=np.argsort(table["pseudotime_change"].fillna(0).values, kind="stable"))
    named = [perturbations] if isinstance(perturbations, str) else perturbations
    known = part["perturbation"].values[part["perturbation"].values != "control"]
    chosen = known if named is None else known_names(named, known, "perturbation")
    part = part.sel(perturbation=[name for name in known if name in chosen])
    figure = new_figure((9.5, min(0.42 * part.sizes["perturbation"] + 1.8, 60.0))) if figure is None else figure
    left, right = figure.subplots(1, 2, width_ratios=[2, 1], sharey=True)
    differs = part["pseudotime_q_value"].values <= level
    _spread(left, ordered, part["perturbation"].values)
    _shares(right, part, level)
    name_axis(left.yaxis, [f"● {name}" if mark else name for name, mark in zip(part["perturbation"].values, differs, strict=True)])
    for text, mark in zip(left.get_yticklabels(), differs, strict=True):
        text.set_fontweight("bold" if mark else "normal")
    left.set(ylim=(part.sizes["perturbation"] + 0.2, -1.0), xlim=(0, 1), title="Cells along the trajectory", ylabel="perturbation")
    left.set_xlabel(f"pseudotime: share of control cells that come before\n● differs from control, false discoveries ≤ {100 * level:g} %")
    return figure


def _spread(axes: "matplotlib.axes.Axes", ordered: Pseudotime, names: np.ndarray) -> None:
    """Draw the share of a perturbation's cells in each part of pseudotime, and that of control."""
    screen, value = ordered.ordered_screen, transferred(ordered)[:, 0]
    own = np.array(labels(screen.conditions), object)[screen.condition]
    edges = np.linspace(0, 1, _BINS + 1)
    heights = {name: np.histogram(value[own == name], edges)[0] / (own == name).sum() for name in ("control", *names)}
    scale = _HEIGHT / max(height.max() for height in heights.values())
    for row, name in enumerate(names):
        axes.stairs(row - scale * heights[name], edges, baseline=row, fill=True, color=BLUE, alpha=0.7, label=None if row else "perturbed")
        axes.stairs(row - scale * heights["control"], edges, baseline=row, color=GREY, lw=1.2, label=None if row else "control")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")


def _shares(axes: "matplotlib.axes.Axes", part: xr.Dataset, level: float) -> None:
    """Draw the change of the share of cells committed to each lineage; filled where it is not chance."""
    rows = np.arange(part.sizes["perturbation"])
    axes.axvline(0, color=GREY, lw=1)
    for k, lineage in enumerate(part["lineage"].values):
        colour, one = (BLUE, RED, GREEN, "black")[k % 4], part.sel(lineage=lineage)
        filled = np.where(one["share_q_value"].values <= level, colour, "white")
        style: dict[str, Any] = {"marker": "oDs^v<>P"[k % 8], "edgecolors": colour, "s": 32, "zorder": 3}
        axes.scatter(one["share_change"].values, rows - 0.3, c=filled, **style)
        axes.scatter([], [], c=colour, label=plain(lineage), **style)
    axes.set(title="Commitment to lineages", xlabel="change of the share of cells\nagainst control; filled: not chance")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center")
