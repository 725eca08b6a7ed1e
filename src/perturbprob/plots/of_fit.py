"""Figures of a fit: its losses, and how its replicates compare with the data."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob.inference.fit import Fit
from perturbprob.plots.axes import BLUE, GREEN, GREY, RED, name_axis, new_axes, new_figure, plain
from perturbprob.studies.predictive_check import PredictiveCheck

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

_STATISTIC = {
    "mean": ("Mean count of each gene", " [counts per cell]"),
    "variance": ("Variance of each gene's counts", " [counts²]"),
    "zero_fraction": ("Share of cells without a count", ""),
}


def losses(fit: Fit, *, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw the loss of training and held-out cells over the epochs, with the epoch that was kept; the warm-up is shaded.

    During the warm-up the weight of the cells' KL term rises, so the training loss rises with it and cannot be compared with later
    epochs; the held-out loss can.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=1, progress=False)
    >>> pb.plots.losses(fit).axes[0].get_xlabel()
    'epoch'
    """
    axes = new_axes(ax, (6.5, 4.0))
    train, held = fit.losses["train"], fit.losses["validation"]
    if (warm := min(fit.settings["warmup"], len(train))) > 1:
        axes.axvspan(0.5, warm + 0.5, color=GREY, alpha=0.15, lw=0, label="warm-up")
    for values, colour, label in ((train, BLUE, "training cells"), (held, RED, "held-out cells")):
        if values:
            axes.plot(np.arange(1, len(values) + 1), values, color=colour, label=label)
    if train:
        best = fit.settings["best_epoch"]
        axes.plot(best + 1, (held or train)[best], "o", color="black", label=f"kept: epoch {best + 1}")
        axes.legend(frameon=False)
    words = {"paths": fit.settings["distance"], "kds": "deviation from stationarity, and penalty"}
    loss = words.get(fit.settings["objective"], "−ELBO per cell and gene [nat]")
    axes.set(xlabel="epoch", ylabel=loss, title="Loss over the training", xlim=(0.5, max(2, len(train)) + 0.5))
    axes.locator_params(axis="x", integer=True)
    return axes.figure.figure


def predictive_check(check: PredictiveCheck, *, figure: "matplotlib.figure.Figure | None" = None) -> "matplotlib.figure.Figure":
    """Draw observed statistics against those of replicated screens, in six panels.

    Above: mean, variance and zero fraction, one point per gene; genes whose observed value lies outside the central 95 % of the
    replicates are diamonds, and the five furthest off are named. Below: mean and standard deviation of the depth of cells in each
    condition and batch, replicated relative to observed; and the tail probabilities of all conditions and genes, which are even
    where the model makes such data.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=1, progress=False)
    >>> check = pb.predictive_check(fit, screen, n_draws=2, progress=False)
    >>> len(pb.plots.predictive_check(check).axes)
    6
    """
    figure = new_figure((12.0, 7.5)) if figure is None else figure
    above, below = figure.subplots(2, 3)
    for axes, statistic in zip(above, _STATISTIC, strict=True):
        _genes_observed(axes, check.gene.sel(statistic=statistic), statistic)
    _depths(below[0], below[1], check)
    _tails(below[2], check.condition["tail_probability"])
    figure.suptitle(f"Posterior predictive check: {check.n_draws} replicated screens")
    return figure


def _genes_observed(axes: "matplotlib.axes.Axes", part: xr.Dataset, statistic: str) -> None:
    """Draw one statistic of every gene, observed against replicated, and name the genes that the model misses most."""
    x, y = part["observed"].values, part["replicated"].values
    missed = np.abs(part["tail_probability"].values - 0.5) > 0.475
    for chosen, marker, colour, where in ((~missed, "o", BLUE, "inside"), (missed, "D", RED, "outside")):
        axes.plot(x[chosen], y[chosen], marker, ms=4, alpha=0.7, mew=0, color=colour, label=f"{where}: {chosen.sum()} genes")
    _agreement(axes, x, y, log=statistic != "zero_fraction")
    far = np.abs(x - y) / np.maximum(part["replicated_sd"].values, 1e-12)
    worst = [plain(part["gene"].values[g]) for g in np.argsort(-far) if missed[g]][:5]
    if worst:
        axes.text(0.97, 0.03, "\n".join(["furthest off:", *worst]), transform=axes.transAxes, ha="right", va="bottom", fontsize=8)
    title, unit = _STATISTIC[statistic]
    axes.set(title=title, xlabel=f"observed{unit}", ylabel=f"replicated{unit}")
    axes.legend(title="central 95 % of replicates", frameon=False, fontsize=8, title_fontsize=8, loc="upper left")


def _agreement(axes: "matplotlib.axes.Axes", x: np.ndarray, y: np.ndarray, *, log: bool = False) -> None:
    """Draw the line on which observed and replicated agree; logarithmic axes where every scale matters alike."""
    values = np.concatenate([x, y])
    values = values[values > 0] if log else values
    if log and len(values):
        axes.set(xscale="log", yscale="log")
    ends = [values.min(), values.max()] if len(values) else [0, 1]
    axes.plot(ends, ends, color=GREY, lw=1, zorder=0)


def _depth(axes: "matplotlib.axes.Axes", table: xr.Dataset, place: np.ndarray) -> None:
    """Draw mean and spread of the depth of each group's cells, replicated relative to observed (left out where that is 0)."""
    for statistic, label, marker, colour in (("mean", "mean", "o", BLUE), ("sd", "standard deviation", "s", GREEN)):
        part = table.sel(depth_statistic=statistic)
        observed = part["observed_depth"].where(part["observed_depth"] > 0)
        y, bar = part["replicated_depth"] / observed, 2 * part["replicated_sd_depth"] / observed
        axes.errorbar(place, y.values, bar.values, fmt=marker, ms=5, lw=0.8, mew=0, alpha=0.8, color=colour, label=f"{label} (± 2 sd)")
    axes.axhline(1, color=GREY, lw=1, zorder=0)
    axes.set_ylabel("replicated / observed")
    axes.margins(y=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _depths(of_conditions: "matplotlib.axes.Axes", of_batches: "matplotlib.axes.Axes", check: PredictiveCheck) -> None:
    """Draw the depth of cells per condition, along the observed depth, and per batch."""
    _depth(of_conditions, check.condition, check.condition["observed_depth"].sel(depth_statistic="mean").values)
    of_conditions.set(xlabel="observed mean depth [counts per cell]", title="Depth of the cells of each condition")
    batches = check.batch["batch"].values
    _depth(of_batches, check.batch, np.arange(len(batches)))
    name_axis(of_batches.xaxis, batches, rotation=90 if len(batches) > 6 else 0)
    of_batches.set(xlabel="batch", title="Depth of the cells of each batch", xlim=(-0.5, len(batches) - 0.5))


def _tails(axes: "matplotlib.axes.Axes", tails: xr.DataArray) -> None:
    """Draw how the tail probabilities of conditions and genes are spread, one line per statistic."""
    for statistic, colour, style in zip(_STATISTIC, (BLUE, RED, GREEN), ("-", "--", "-."), strict=True):
        values = tails.sel(statistic=statistic).values.ravel()
        share, edges = np.histogram(values, bins=10, range=(0, 1))
        axes.stairs(100 * share / len(values), edges, color=colour, ls=style, lw=1.5, label=statistic.replace("_", " "))
    axes.axhline(10, color=GREY, lw=1, label="even: 10 %")
    axes.set(xlabel="tail probability (share of replicates above the data)", ylabel="share of conditions × genes [%]")
    axes.set(title="Tail probabilities, per condition and gene", xlim=(0, 1), ylim=(0, 1.35 * axes.get_ylim()[1]))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
