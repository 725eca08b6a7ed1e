"""One function per figure of a screen, a fit or an answer.

Each returns a matplotlib Figure that pyplot does not keep: a notebook shows it once, and ``figure.savefig("losses.png")`` writes it.
With ``ax=`` or ``figure=`` the function draws into one of yours instead. Blue and red are told apart by colour-blind readers, and
every mark has a shape of its own.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from perturbprob.experiment.screen import Screen
from perturbprob.experiment.vocabulary import nearest
from perturbprob.inference.fit import Fit
from perturbprob.studies.predictive_check import PredictiveCheck
from perturbprob.studies.steady_state import SteadyStates

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7f7f7f"
_N_INTERVALS = 25
_MANY = 250  # more rows or columns have no names: none could be read
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
    axes = _axes(ax, (6.5, 4.0))
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
    axes.set(xlabel="epoch", ylabel="−ELBO per cell and gene [nat]", title="Loss over the training", xlim=(0.5, max(2, len(train)) + 0.5))
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
    figure = _figure((12.0, 7.5)) if figure is None else figure
    above, below = figure.subplots(2, 3)
    for axes, statistic in zip(above, _STATISTIC, strict=True):
        _genes_observed(axes, check.gene.sel(statistic=statistic), statistic)
    _depths(below[0], below[1], check)
    _tails(below[2], check.condition["tail_probability"])
    figure.suptitle(f"Posterior predictive check: {check.n_draws} replicated screens")
    return figure


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
    part = part if genes is None else part.sel(gene=_known([genes] if isinstance(genes, str) else genes, part.gene.values, "gene"))
    shown = part if genes is not None else part.isel(gene=_surest(part, n_genes))
    strong = _changes(part if perturbation is None else _of(part, perturbation), named=perturbation is None)
    width, height = min(max(0.2 * shown.sizes["gene"], 1.5) + 2.5, 60.0), min(0.22 * max(part.sizes["row"], len(strong)) + 1.8, 60.0)
    figure = _figure((width + 4.5, height)) if figure is None else figure
    left, right = figure.subplots(1, 2, width_ratios=[width, 4.5])
    _heatmap(left, shown)
    _intervals(right, strong, part.attrs["level"])
    right.set_title(f"Surest changes{'' if perturbation is None else f' after {_plain(perturbation)}'}")
    return figure


def layout(screen: Screen, *, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw how many cells each perturbation has in each media, time and batch; control stands above a line, and 0 is left blank.

    Combinations of media, time and batch without any cell have no column.

    >>> import perturbprob as pb
    >>> figure = pb.plots.layout(pb.datasets.ishikawa2023())
    >>> figure.axes[0].images[0].get_array().shape
    (24, 4)
    """
    table = _cells(screen)
    axes = _axes(ax, (max(0.55 * table.shape[1] + 3.2, 4.5), min(0.22 * len(table) + 2.2, 60.0)))
    counts = np.ma.masked_equal(table.to_numpy(), 0)
    image = axes.imshow(counts, aspect="auto", cmap="cividis", vmin=0)
    if max(table.shape) <= _MANY:
        _write_counts(axes, counts)
    if "control" in table.index and len(table) > 1:
        axes.axhline(0.5, color="white", lw=5)
    several = len(screen.media) > 1
    columns = [" · ".join([*([m] if several else []), _moment(t, screen.time_unit), b]) for m, t, b in table.columns]
    _name(axes.xaxis, columns, rotation=90)
    _name(axes.yaxis, table.index)
    axes.set(xlabel=f"{'media · ' if several else ''}time · batch", ylabel="perturbation", title=f"Where the {screen.n_cells:,} cells are")
    axes.figure.colorbar(image, ax=axes, label="cells", shrink=0.6)
    return axes.figure.figure


def branches(screen: Screen, *, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw Figure 1B of the paper for a screen: untouched cells X are perturbed, their media changed, and left alone.

    One branch for each perturbation and media (all perturbations together where there are more than eight), with its path 1-4, the
    cells measured at its end and their times. Dashed red branches were not measured.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, media=("rest", "drug"), seed=1).screen
    >>> len(pb.plots.branches(screen).axes[0].texts)
    19
    """
    table = _branches(screen)
    axes = _axes(ax, (8.5, 1.2 + 0.42 * len(table)))
    middle = (len(table) - 1) / 2
    _write(axes, 0, middle, "X", weight="bold")
    for name, rows in table.groupby("branch", sort=False):
        height = float(rows.row.mean())
        axes.plot([0.15, 0.75], [middle, height], color="black" if rows.observed.any() else RED, lw=1)
        _write(axes, 1, height, str(name))
        for end in rows.itertuples():
            axes.plot([1.3, 2.1], [height, end.row], color="black" if end.observed else RED, ls="-" if end.observed else "--", lw=1)
            _write(axes, 2.5, end.row, end.media)
            _write(axes, 3.0, end.row, end.label, ha="left", color="black" if end.observed else RED)
    for x, title in ((1, "P"), (2.5, "M"), (3.4, "W, then measured")):
        _write(axes, x, -1, title, weight="bold")
    axes.set(xlim=(-0.2, 5.2), ylim=(len(table) - 0.5, -1.6))
    axes.axis("off")
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


def _write(axes: "matplotlib.axes.Axes", x: float, y: float, text: str, **style: Any) -> None:
    """Write a text that is not read as mathematics, centred unless said otherwise."""
    axes.text(x, y, _plain(text), ha=style.pop("ha", "center"), va="center", fontsize=9, **style)


def steady_states(
    result: SteadyStates, *, media: str | None = None, figure: "matplotlib.figure.Figure | None" = None
) -> "matplotlib.figure.Figure":
    """Draw |LFC| of each perturbation between sequential times, joined by a line, in one ``media`` (default: the first); figure 9.

    Those known from most cells come first. Above, |LFC| as measured; the grey band is what halves of control show at their worst time.
    Below, |LFC| beyond the drift that all share; grey bars are the noise of control cells in the same numbers. Steps that the rule of
    their panel calls moving are red diamonds; the last step counts.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=8, n_perturbations=2, times=(1.0, 2.0, 3.0), seed=1).screen
    >>> len(pb.plots.steady_states(pb.steady_states(screen, n_splits=50)).axes)
    2
    """
    table = result.table.sel(media=_known([media], result.table.media.values, "media") if media else result.table.media.values[:1])
    part = table.isel(media=0, perturbation=np.argsort(-table["precision"].sum(["media", "step"]).values, kind="stable"))
    figure = _figure((min(0.38 * len(part.perturbation) + 2.5, 40.0), 7.0)) if figure is None else figure
    above, below = figure.subplots(2, 1, sharex=True)
    within = f"{100 * (1 - part.attrs['tolerance']):g} % of"
    above.axhspan(0, float(part["control_bound"]), color=GREY, alpha=0.25, lw=0, label=f"{within} halves of control, worst time")
    _steps(above, part["lfc"], part["steady_by_control"])
    place = _steps(below, part["lfc_beyond_drift"], part["steady_by_matched"]).ravel()
    noise, style = part["matched_bound"].values.ravel(), {"color": GREY, "alpha": 0.35, "zorder": 0}
    below.bar(place, noise, 0.8 / len(part.step), label=f"{within} noise in the same numbers of cells", **style)
    above.set(ylabel="|LFC| [log₂]", title=f"Steps between times, {_plain(part.media.values)}")
    steps = f"{', '.join(part.step.values)} {part.attrs['time_unit']}"
    below.set(ylabel="|LFC| beyond shared drift [log₂]", xlabel=f"perturbation, most cells first; each from left to right: {steps}")
    _name(below.xaxis, part.perturbation.values, rotation=90)
    for axes in (above, below):
        axes.set(xlim=(-0.7, len(part.perturbation) - 0.3), ylim=(0, 1.3 * axes.dataLim.ymax))
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return figure


def _figure(size: tuple[float, float]) -> "matplotlib.figure.Figure":
    """Return a new figure that pyplot has forgotten: it would show it a second time in a notebook, and keep it for ever."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install perturbprob[plots]") from error
    figure = pyplot.figure(figsize=size, layout="constrained")
    pyplot.close(figure)
    return figure


def _axes(ax: "matplotlib.axes.Axes | None", size: tuple[float, float]) -> "matplotlib.axes.Axes":
    """Return the axes given, or those of a new figure."""
    return _figure(size).subplots() if ax is None else ax


def _plain(name: object) -> str:
    """Return a name as text in which matplotlib finds no mathematics."""
    return str(name).replace("$", r"\$")


def _name(axis: Any, names: Iterable[object], **style: Any) -> None:
    """Label the ticks of an axis by names."""
    labels = [_plain(n) for n in names]
    axis.set_ticks(range(len(labels)), labels if len(labels) <= _MANY else [""] * len(labels), fontsize=8, **style)


def _moment(time: float, unit: str | None) -> str:
    """Return a time with its unit."""
    return f"{unit} {time:g}" if unit else f"time {time:g}"


def _genes_observed(axes: "matplotlib.axes.Axes", part: xr.Dataset, statistic: str) -> None:
    """Draw one statistic of every gene, observed against replicated, and name the genes that the model misses most."""
    x, y = part["observed"].values, part["replicated"].values
    missed = np.abs(part["tail_probability"].values - 0.5) > 0.475
    for chosen, marker, colour, where in ((~missed, "o", BLUE, "inside"), (missed, "D", RED, "outside")):
        axes.plot(x[chosen], y[chosen], marker, ms=4, alpha=0.7, mew=0, color=colour, label=f"{where}: {chosen.sum()} genes")
    _agreement(axes, x, y, log=statistic != "zero_fraction")
    far = np.abs(x - y) / np.maximum(part["replicated_sd"].values, 1e-12)
    worst = [_plain(part["gene"].values[g]) for g in np.argsort(-far) if missed[g]][:5]
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
    _name(of_batches.xaxis, batches, rotation=90 if len(batches) > 6 else 0)
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


def _known(names: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """Return names that are all known; refuse none at all, and say what is nearest to one that is not."""
    wanted, there = list(names), set(map(str, known))
    if not wanted:
        raise ValueError(f"No {what} to draw: name at least one.")
    for name in wanted:
        if name not in there:
            raise ValueError(f"There is no {what} {name!r} here. {nearest(name, there)}")
    return wanted


def _at(hits: xr.Dataset, time: float | None, media: str | None) -> xr.Dataset:
    """Return the effects in one media at one time over (row, gene); rows are perturbations, or conditions where those occur twice."""
    if not hits.sizes["condition"]:
        raise ValueError("There is no effect to draw: the fit has no perturbed condition.")
    media = str(hits.media.values[0]) if media is None else _known([media], hits.media.values, "media")[0]
    part = hits.isel(condition=hits.media.values == media)
    moments, unit = np.unique(part.time.values), hits.time.attrs.get("units")
    time = float(moments[-1]) if time is None else time
    at = np.isclose(part.time.values, time)
    if not at.any():
        raise ValueError(
            f"No effect was fitted at {_moment(time, unit)} in media {media!r}. Known times: {', '.join(f'{t:g}' for t in moments)}."
        )
    part = part.isel(condition=at)
    names = part.perturbation.values.astype(str)
    rows = names if len(set(names)) == len(names) else part.condition.values.astype(str)
    where = f"{_moment(time, unit)}{f', {_plain(media)}' if len(set(hits.media.values)) > 1 else ''}"
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
    name = _known([perturbation], part.perturbation.values, "perturbation")[0]
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
    _name(axes.xaxis, part.gene.values, rotation=90)
    _name(axes.yaxis, [f"● {row}" if hit else row for row, hit in zip(part.row.values, part.is_hit.values, strict=True)])
    for text, hit in zip(axes.get_yticklabels(), part.is_hit.values, strict=True):
        text.set_fontweight("bold" if hit else "normal")
    marks = f"dot: the {100 * part.attrs['level']:g} % interval leaves out 0{'   ● hit' if 'hit' in part else ''}"
    axes.set(xlabel=f"gene\n{marks}", ylabel="perturbation", title=f"Change of each gene at {part.attrs['where']}")
    label = f"log fold change against {_plain(part.attrs['against'])} [natural log]"
    axes.figure.colorbar(image, ax=axes, label=label, extend="both", shrink=0.9)


def _intervals(axes: "matplotlib.axes.Axes", changes: pd.DataFrame, level: float) -> None:
    """Draw changes with their intervals, the surest on top."""
    place = np.arange(len(changes))
    axes.hlines(place, changes["lower"], changes["upper"], color=BLUE, lw=2)
    axes.plot(changes["log_fold_change"], place, "o", ms=4, color="black")
    axes.axvline(0, color=GREY, lw=1)
    _name(axes.yaxis, changes.index)
    axes.set(xlabel=f"log fold change [natural log]\nwith {100 * level:g} % interval", ylim=(len(changes) - 0.5, -0.5))


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
