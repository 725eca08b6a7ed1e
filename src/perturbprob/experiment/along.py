"""Where the cells of each perturbation are along the trajectory, beside control (Figure 7, inset)."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Float64, Int
from scipy.special import ndtr
from scipy.stats import false_discovery_control, rankdata

from perturbprob.experiment.settings import is_within
from perturbprob.experiment.vocabulary import labels

if TYPE_CHECKING:
    from perturbprob.experiment.pseudotime import Pseudotime
    from perturbprob.experiment.screen import Screen


def along(ordered: "Pseudotime", *, level: float = 0.05) -> xr.Dataset:
    """Compare where the cells of each perturbation are along the trajectory with control of the same media, time and batch.

    A Dataset over (perturbation) and (perturbation, lineage), control first:

    - ``n_cells``; ``far``, the share of cells unlike any control cell (see `Pseudotime`).
    - ``pseudotime``: its mean; ``pseudotime_change`` against control; ``pseudotime_p_value`` of the rank test of van Elteren, which with
      one media, time and batch is that of Mann and Whitney; ``pseudotime_q_value``.
    - ``share``: the mean commitment of cells to the lineage, 1 where all cells are at its end, 0 where none is nearer than the root;
      ``share_change`` against control; ``share_p_value`` of a permutation of labels, of which the first two moments are exact and the
      law is taken as normal; ``share_q_value``.
    - ``fewer``: the share is lower than in control, and its q-value at most ``level``: the lineage is blocked, or on its way to be.

    Labels of control cells, too, are those of the control cell next to them here, as those of perturbed cells are: `transferred`.
    Changes are means over media, times and batches, by how well each is known; they are NaN where a perturbation shares none with control.
    q-values are Benjamini and Hochberg's over all perturbations (and lineages). Cells count as independent: where a few clones or
    replicates make up a perturbation, its p-values are too small.

    >>> from perturbprob.experiment import datasets, pseudotime
    >>> table = along(pseudotime.order(datasets.ishikawa2023(), "PRDM14", n_bootstraps=0))
    >>> table["perturbation"].values[:2].tolist(), dict(table.sizes)
    (['control', 'ETS2'], {'perturbation': 24, 'lineage': 1})
    """
    from perturbprob.experiment.pseudotime import Pseudotime

    if not isinstance(ordered, Pseudotime):
        raise TypeError(f"An order is needed here; got {type(ordered).__name__}. Give what pseudotime.order(screen, root) returned.")
    screen, cells = ordered.ordered_screen, ordered.cells
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a share of false discoveries, between 0 and 1; got {level!r}.")
    if not screen.perturbations:
        raise ValueError("This screen has control cells only; there is no perturbation to compare with them.")
    own = np.array(labels(screen.conditions), object)[screen.condition]
    names = ["control", *sorted(set(own) - {"control"})]
    groups = {name: own == name for name in names}
    scores = transferred(ordered)
    mean = np.stack([scores[group].mean(axis=0) for group in groups.values()])
    stratum = _strata(screen)
    tested = np.stack([_tested(scores, groups["control"], group, stratum) for name, group in groups.items() if name != "control"])
    change, p = np.concatenate([np.full((1, *tested.shape[1:]), np.nan), tested]).transpose(1, 0, 2)
    table = xr.Dataset(
        {
            "n_cells": ("perturbation", [int(group.sum()) for group in groups.values()]),
            "far": ("perturbation", [float(cells["far"].values[group].mean()) for group in groups.values()]),
            **_named("pseudotime", ("perturbation",), mean[:, 0], change[:, 0], p[:, 0]),
            **_named("share", ("perturbation", "lineage"), mean[:, 1:], change[:, 1:], p[:, 1:]),
        },
        {"perturbation": names, "lineage": cells["lineage"].values},
        {"level": level},
    )
    return table.assign(fewer=(table["share_q_value"] <= level) & (table["share_change"] < 0))


def transferred(ordered: "Pseudotime") -> Float64[np.ndarray, "cell score"]:
    """Return pseudotime and commitments of the control cell next to each cell, of control cells too.

    Perturbed cells only have the labels of cells next to them, and some control cells are next to many others. Beside labels of their own
    control cells would seem to differ from perturbed ones to which nothing was done.
    """
    labels = ordered.cells[["pseudotime", "commitment"]].sel(cell=ordered.cells["nearest_control"].values)
    return np.column_stack([labels["pseudotime"].values, labels["commitment"].values])


def stratified_test(
    scores: Float[np.ndarray, "cell score"], edited: Bool[np.ndarray, " cell"], stratum: Int[np.ndarray, " cell"]
) -> tuple[Float64[np.ndarray, " score"], Float64[np.ndarray, " score"]]:
    """Return the change of mean scores of edited cells against the others, within strata, and its p-value under permutation in them.

    With n_s edited cells of N_s and h_s = n_s (N_s − n_s) / N_s, the change is Σ_s h_s (difference of means in s) / Σ_s h_s. Given the
    scores its numerator has mean 0 and variance Σ_s h_s v_s if labels mean nothing, v_s the variance of the scores in s; it is
    taken as normal. Both are NaN where no stratum holds both kinds of cells; scores that are all the same have p = 1.

    >>> change, p = stratified_test(np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([False, False, True, True]), np.zeros(4, int))
    >>> change, p.round(3)
    (array([2.]), array([0.121]))
    """
    codes = np.unique(stratum, return_inverse=True)[1]
    member = codes == np.arange(codes.max() + 1)[:, None]
    total, n = member.sum(axis=1), (member & edited).sum(axis=1)
    centred = scores - (member @ scores / total[:, None])[codes]
    known = n * (total - n) / total
    variance = (known / np.maximum(total - 1, 1)) @ (member @ centred**2)
    change = centred[edited].sum(axis=0)
    spread = np.sqrt(np.where(variance > 1e-24, variance, np.inf))
    seen = np.where(known.sum() > 0, 1.0, np.nan)
    return seen * change / max(known.sum(), 1e-300), seen * 2 * ndtr(-np.abs(change) / spread)


def _tested(
    scores: Float[np.ndarray, "cell score"],
    control: Bool[np.ndarray, " cell"],
    group: Bool[np.ndarray, " cell"],
    stratum: Int[np.ndarray, " cell"],
) -> Float64[np.ndarray, "two score"]:
    """Return changes and p-values of one perturbation: pseudotime, the first score, by its ranks, the others by their values."""
    cells = control | group
    change, p = stratified_test(scores[cells], group[cells], stratum[cells])
    ranks = np.empty((cells.sum(), 1))
    for code in np.unique(stratum[cells]):
        inside = stratum[cells] == code
        ranks[inside, 0] = rankdata(scores[cells, 0][inside]) / (inside.sum() + 1)
    p[:1] = stratified_test(ranks, group[cells], stratum[cells])[1]
    return np.stack([change, p])


def _strata(screen: "Screen") -> Int[np.ndarray, " cell"]:
    """Number the combinations of media, time and batch of cells."""
    beside = [p.unperturbed() for p in screen.conditions]
    number = {protocol: k for k, protocol in enumerate(dict.fromkeys(beside))}
    return np.array([number[protocol] for protocol in beside])[screen.condition] * len(screen.batches) + screen.batch


def _named(name: str, dims: tuple[str, ...], mean: np.ndarray, change: np.ndarray, p: np.ndarray) -> dict[str, tuple]:
    """Name what is known of one score, with q-values over all that was tested."""
    q, tested = np.full(p.shape, np.nan), np.isfinite(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested])
    return {name: (dims, mean), f"{name}_change": (dims, change), f"{name}_p_value": (dims, p), f"{name}_q_value": (dims, q)}
