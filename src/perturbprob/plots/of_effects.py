"""The figure of effects: perturbation × gene, with intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from perturbprob.plots.axes import BLUE, GREY, known_names, moment, name_axis, new_figure, plain

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_N_INTERVALS = 25


def effects(
    hits: xr.Dataset,
    genes: str | Sequence[str] | None = None,
    *,
    n_genes: int = 30,
    time: float | None = None,
    media: str | None = None,
    perturbation: str | None = None,
    figure: "matplotlib.figure.Figure | None" = None,
) -> "matplotlib.figure.Figure":
    """Draw what `effects` returned: a heatmap of perturbations × genes, and the strongest changes with their intervals.

    The heatmap shows log fold changes at one ``time`` (default: the last) in one ``media`` (default: the first), the most probable
    perturbation on top, hits marked, and a dot where the interval leaves out 0. ``genes`` names its columns; otherwise the ``n_genes``
    that change most surely are shown, similar ones side by side. The right panel shows the changes whose interval lies furthest from
    0, of all perturbations or of the one named ``perturbation``.

    Raises ValueError for a gene, perturbation, media or time that is not in ``hits``.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=1, progress=False)
    >>> figure = pb.plots.effects(pb.effects(fit, n_draws=3), n_genes=5)
    >>> figure.axes[0].images[0].get_array().shape
    (2, 5)
    """
    part = _by_probability(_at(hits, time, media))
    part = part if genes is None else part.sel(gene=known_names([genes] if isinstance(genes, str) else genes, part.gene.values, "gene"))
    shown = part if genes is not None else part.isel(gene=_surest(part, n_genes))
    strong = _changes(part if perturbation is None else _of(part, perturbation), named=perturbation is None)
    width, height = min(max(0.2 * shown.sizes["gene"], 1.5) + 2.5, 60.0), min(0.22 * max(part.sizes["row"], len(strong)) + 1.8, 60.0)
    figure = new_figure((width + 4.5, height)) if figure is None else figure
    left, right = figure.subplots(1, 2, width_ratios=[width, 4.5])
    _heatmap(left, shown)
    _intervals(right, strong, part.attrs["level"])
    right.set_title(f"Surest changes{'' if perturbation is None else f' after {plain(perturbation)}'}")
    return figure


def _at(hits: xr.Dataset, time: float | None, media: str | None) -> xr.Dataset:
    """Return the effects in one media at one time over (row, gene); rows are perturbations, or conditions where those occur twice."""
    if not hits.sizes["condition"]:
        raise ValueError("There is no effect to draw: the fit has no perturbed condition.")
    media = str(hits.media.values[0]) if media is None else known_names([media], hits.media.values, "media")[0]
    part = hits.isel(condition=hits.media.values == media)
    moments, unit = np.unique(part.time.values), hits.time.attrs.get("units")
    time = float(moments[-1]) if time is None else time
    at = np.isclose(part.time.values, time)
    if not at.any():
        raise ValueError(
            f"No effect was fitted at {moment(time, unit)} in media {media!r}. Known times: {', '.join(f'{t:g}' for t in moments)}."
        )
    part = part.isel(condition=at)
    names = part.perturbation.values.astype(str)
    rows = names if len(set(names)) == len(names) else part.condition.values.astype(str)
    where = f"{moment(time, unit)}{f', {plain(media)}' if len(set(hits.media.values)) > 1 else ''}"
    return part.assign_coords(row=("condition", rows)).swap_dims(condition="row").assign_attrs(where=where)


def _by_probability(part: xr.Dataset) -> xr.Dataset:
    """Put the most probable perturbation first and mark hits; without a test, the one with the surest change."""
    hit = np.zeros(part.sizes["row"], dtype=bool)
    score = _distance(part).max(axis=1)
    if "hit" in part:
        tested = part[["hit", "log_evidence"]].sel(tested_perturbation=part.perturbation.values)
        hit, score = tested["hit"].values, tested["log_evidence"].values
    return part.assign_coords(is_hit=("row", hit)).isel(row=np.argsort(-score, kind="stable"))


def _distance(part: xr.Dataset) -> Float[np.ndarray, "row gene"]:
    """Return how far each interval lies from 0; negative where it holds 0."""
    return np.maximum(part.lower.values, -part.upper.values)


def _surest(part: xr.Dataset, n_genes: int) -> Int[np.ndarray, " chosen"]:
    """Return the genes that change most surely, similar ones side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if n_genes < 1:
        raise ValueError(f"n_genes must be at least 1; got {n_genes}.")
    chosen = np.sort(np.argsort(-_distance(part).max(axis=0), kind="stable")[:n_genes])
    if len(chosen) < 3:
        return chosen
    return chosen[leaves_list(linkage(part.log_fold_change.values.T[chosen], "average", optimal_ordering=True))]


def _of(part: xr.Dataset, perturbation: str) -> xr.Dataset:
    """Return the rows of one perturbation."""
    name = known_names([perturbation], part.perturbation.values, "perturbation")[0]
    return part.isel(row=part.perturbation.values == name)


def _changes(part: xr.Dataset, *, named: bool) -> pd.DataFrame:
    """Return the changes whose intervals lie furthest from 0, the surest first, with names to show."""
    rows, genes = np.unravel_index(np.argsort(-_distance(part), axis=None, kind="stable")[:_N_INTERVALS], _distance(part).shape)
    values = {name: part[name].values[rows, genes] for name in ("log_fold_change", "lower", "upper")}
    names = [
        f"{part.row.values[r]}: {part.gene.values[g]}" if named or part.sizes["row"] > 1 else part.gene.values[g]
        for r, g in zip(rows, genes, strict=True)
    ]
    return pd.DataFrame(values, index=names)


def _heatmap(axes: "matplotlib.axes.Axes", part: xr.Dataset) -> None:
    """Draw the log fold changes of perturbations × genes, with marks for hits and for intervals that leave out 0."""
    values = part.log_fold_change.values
    limit = max(float(np.quantile(np.abs(values), 0.99)), 1e-3)
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    rows, genes = np.nonzero(_distance(part) > 0)
    axes.scatter(genes, rows, s=7, c=np.where(np.abs(values[rows, genes]) > 0.6 * limit, "white", "black"), lw=0)
    name_axis(axes.xaxis, part.gene.values, rotation=90)
    name_axis(axes.yaxis, [f"● {row}" if hit else row for row, hit in zip(part.row.values, part.is_hit.values, strict=True)])
    for text, hit in zip(axes.get_yticklabels(), part.is_hit.values, strict=True):
        text.set_fontweight("bold" if hit else "normal")
    marks = f"dot: the {100 * part.attrs['level']:g} % interval leaves out 0{'   ● hit' if 'hit' in part else ''}"
    axes.set(xlabel=f"gene\n{marks}", ylabel="perturbation", title=f"Change of each gene at {part.attrs['where']}")
    label = f"log fold change against {plain(part.attrs['against'])} [natural log]"
    axes.figure.colorbar(image, ax=axes, label=label, extend="both", shrink=0.9)


def _intervals(axes: "matplotlib.axes.Axes", changes: pd.DataFrame, level: float) -> None:
    """Draw changes with their intervals, the surest on top."""
    place = np.arange(len(changes))
    axes.hlines(place, changes["lower"], changes["upper"], color=BLUE, lw=2)
    axes.plot(changes["log_fold_change"], place, "o", ms=4, color="black")
    axes.axvline(0, color=GREY, lw=1)
    name_axis(axes.yaxis, changes.index)
    axes.set(xlabel=f"log fold change [natural log]\nwith {100 * level:g} % interval", ylim=(len(changes) - 0.5, -0.5))
