"""The figure of a decomposition: where the variance comes from, in all genes and in those that batches move most."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob.plots.axes import BLUE, GREEN, GREY, RED, name_axis, new_figure, plain

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

    from perturbprob.studies.batch_decomposition import BatchDecomposition

_COLOUR = {"state": "#56B4E9", "perturbation": BLUE, "media": GREEN, "time": "#CC79A7", "rest": "#4d4d4d", "noise": "#d9d9d9"}
_HATCHED = ("#E69F00", "#F0E442", "#b07aa1", "#9c755f")


def batch_decomposition(
    parts: "BatchDecomposition", *, n_genes: int = 20, figure: "matplotlib.figure.Figure | None" = None
) -> "matplotlib.figure.Figure":
    """Draw what `decompose_batches` returned: shares of variance over genes with their intervals, and genes by their batch share.

    The left panel has a point and an interval for each source, of variances summed over genes. The middle one stacks the shares of
    all genes together and of the ``n_genes`` with the largest batch share, batch first; ● marks genes whose batch share is
    above the threshold with probability 0.9 or more. The right one shows how far each batch moves them.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=1, progress=False)
    >>> parts = pb.decompose_batches(fit, n_draws=3, n_states=4, progress=False)
    >>> len(pb.plots.batch_decomposition(parts, n_genes=5).axes)
    4
    """
    if n_genes < 1:
        raise ValueError(f"n_genes must be at least 1; got {n_genes}.")
    table, batch = parts.table, parts.batch_source
    order = np.argsort(-table["share"].sel(source=batch).values, kind="stable")[:n_genes]
    shown, height = table.isel(gene=order), max(3.2, 0.24 * (len(order) + 1) + 1.6)
    figure = new_figure((14.0, min(height, 60.0))) if figure is None else figure
    left, middle, right = figure.subplots(1, 3, width_ratios=[3.6, 5.0, 1.2 + 0.5 * min(table.sizes["batch"], 8)])
    sources = [batch, *(s for s in map(str, table["source"].values) if s != batch)]
    spare = iter(_HATCHED * len(sources))
    colours = {s: RED if s == batch else _COLOUR[s] if s in _COLOUR else next(spare) for s in sources}
    _overall(left, table, colours)
    _stacked(middle, shown, colours, set(parts.batch_genes()))
    _loadings(right, shown)
    return figure


def _overall(axes: "matplotlib.axes.Axes", table: xr.Dataset, colours: dict[str, str]) -> None:
    """Draw the share of each source over genes with its interval, and write it beside."""
    for k, (source, colour) in enumerate(colours.items()):
        mean, low, high = (100 * float(table[name].sel(source=source)) for name in ("overall", "overall_lower", "overall_upper"))
        axes.barh(k, mean, color=colour, edgecolor="black", lw=0.5, hatch=_hatch(source))
        axes.hlines(k, low, high, color="black", lw=2)
        axes.text(high + 1.5, k, f"{mean:.1f}", va="center", fontsize=8)
    name_axis(axes.yaxis, colours)
    axes.set(xlabel=f"share of variance [%]\nwith {100 * table.attrs['level']:g} % interval", title="Over all genes")
    axes.set(ylim=(len(colours) - 0.4, -0.6), xlim=(0, min(118.0, 1.18 * 100 * float(table["overall_upper"].max()) + 6)))


def _stacked(axes: "matplotlib.axes.Axes", shown: xr.Dataset, colours: dict[str, str], marked: set[str]) -> None:
    """Stack the shares of all genes and of each gene shown, one row each."""
    rows = np.arange(shown.sizes["gene"] + 1)
    left = np.zeros(len(rows))
    for source, colour in colours.items():
        part = shown.sel(source=source)
        width = 100 * np.append(float(part["overall"]), part["share"].values)
        if width.max() < 0.05:
            continue
        axes.barh(rows, width, left=left, height=0.8, color=colour, edgecolor="black", lw=0.3, hatch=_hatch(source), label=plain(source))
        left += width
    genes = [f"● {gene}" if gene in marked else str(gene) for gene in shown["gene"].values]
    name_axis(axes.yaxis, ["all genes", *genes])
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xlabel="share of variance [%]", title="Genes with the largest batch share")
    axes.axhline(0.5, color="black", lw=1)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.5 / max(2.2, 0.24 * len(rows) + 0.6)))


def _loadings(axes: "matplotlib.axes.Axes", shown: xr.Dataset) -> None:
    """Draw how far each batch lies from the mean over batches, in the genes shown."""
    values = shown["loading"].transpose("gene", "batch").values
    limit = max(float(np.abs(values).max()), 1e-3)
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    name_axis(axes.xaxis, shown["batch"].values, rotation=90)
    name_axis(axes.yaxis, shown["gene"].values)
    axes.set(xlabel="batch", ylim=(shown.sizes["gene"] - 0.5, -1.5), title="What each batch does")
    axes.axhline(-0.5, color=GREY, lw=0.5)
    axes.figure.colorbar(image, ax=axes, label="change of the log rate [natural log]", shrink=0.9)


def _hatch(source: str) -> str:
    """Return the hatch of an interaction, so that it is told from factors without colour."""
    return "///" if ":" in source else ""
