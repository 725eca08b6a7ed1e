"""What a prediction of means must beat: what is known without a model of why cells move.

Each baseline is a function of a training screen and of the protocols to predict; it returns the mean over cells of log(1 + count), dims
(condition, gene), with the coordinates perturbation, media, time. Y[p, t] is such a mean in the training screen, c is control, t the
time to predict, t − 1 the last time before it, v the conditions of the same media that were seen at t, control among them, n cells,
and δ[p, t] = Y[p, t] − Y[c, t]. Genes are those of the screen. Numbers that must be chosen are chosen by 4-fold validation over the
perturbations seen at t (over those seen at t − 1, for that time, where fewer than 4 were seen at t); what is tested is never looked at.
All raise ValueError for what they cannot predict: a perturbation without training cells at every earlier time, a time at which nothing
was seen.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Float

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.studies.hierarchical_gaussian import hierarchical_gaussian
from perturbprob.studies.time_course import Means, Posterior, Rows, TimeCourse, predict_means

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

Predictor = Callable[..., Means | Posterior]
Grid = list[dict[str, float]]

FOLDS = 4
RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20)
SMALLEST_SPREAD = 1e-6  # of the variance of a perturbation's effects


def control_mean(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict control at the same time, Y[c, t]: nothing happens. Any perturbation can be asked for.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> control_mean(part.train, part.held_out).sizes
    Frozen({'condition': 1, 'gene': 103})
    """

    def method(course: TimeCourse, asked: list[Protocol]) -> Means:
        """Repeat control."""
        course = course.taking([-1])
        course.check_control()
        return np.repeat(course.mean[:1, -1], len(asked), 0)

    return predict_means(train, conditions, "control_mean", method)


def perturbation_mean(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict the mean of the training conditions at the same time, mean over v of Y[v, t]. Any perturbation can be asked for.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> perturbation_mean(part.train, part.held_out).attrs["units"]
    'mean of log(1 + count)'
    """

    def method(course: TimeCourse, asked: list[Protocol]) -> Means:
        """Repeat the mean of what was seen."""
        course.check_target()
        return np.repeat(course.mean[course.seen[:, -1], -1].mean(0)[None], len(asked), 0)

    return predict_means(train, conditions, "perturbation_mean", method)


def last_time(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict that nothing changes after the last time seen, Y[p, t − 1]. Control and other perturbations are not used.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> prediction = last_time(part.train, part.held_out)
    >>> truth = pseudobulk(part.test)["mean"]
    >>> float(((prediction - truth) ** 2).mean()) > noise_floor(part.test)
    True
    """
    return _from_history(train, conditions, "last_time", lambda course, rows: course.mean[rows, -2], control=False)


def last_time_drift(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict the last time and what all conditions share, Y[p, t − 1] + drift.

    drift = mean over v of Y[v, t] − Y[v, t − 1] with weights 1 / (1 / n[v, t] + 1 / n[v, t − 1]).

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> (last_time_drift(part.train, part.held_out) - last_time(part.train, part.held_out)).dims
    ('condition', 'gene')
    """
    return _from_history(train, conditions, "last_time_drift", lambda course, rows: course.mean[rows, -2] + _drift(course), control=False)


def control_offset(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict control and the last difference from it, Y[c, t] + δ[p, t − 1].

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> control_offset(part.train, part.held_out)["perturbation"].item()
    'NANOG'
    """
    return _from_history(train, conditions, "control_offset", lambda course, rows: course.mean[0, -1] + course.offsets[rows, -2])


def shrunk_offset(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict control, denoised, and the mean difference from it, shrunken as far as its noise asks: r + m τ² / (τ² + s²).

    r = ½ (Y[c, t] + Y[c, t − 1] + drift), with the drift of `last_time_drift`; m is the mean of δ[p, ·] over the earlier times with weights
    1 / (V / n[p, ·] + V / n[c, ·]), V the variance between cells of one condition, pooled for each time and gene; s² is the variance of
    m; τ², one for each perturbation, is the mean over genes of m² − s², at least 10⁻⁶ (empirical Bayes, by moments). The coordinate ``sd``
    is that of the effect given m, (1 / τ² + 1 / s²)^(−½): r is taken for known, and the effect for lasting.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> shrunk_offset(part.train, part.held_out)["time"].item()
    5.0
    """
    return _from_history(train, conditions, "shrunk_offset", _shrunk_offset)


def denoised_offset(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict control, denoised, and the last difference from it, projected on the directions in which perturbations differ.

    r + δ[p, t − 1] Wₖ Wₖᵀ, with r of `shrunk_offset` and Wₖ the first k right singular vectors of δ[p, ·] stacked over all
    perturbations and earlier times. k is chosen by validation.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> denoised_offset(part.train, part.held_out).shape
    (1, 103)
    """
    return _from_history(train, conditions, "denoised_offset", _denoised_offset, [{"rank": k} for k in RANKS])


def low_rank_linear(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict Y[p, t] ≈ b + G K P[p]ᵀ, linear in what the perturbation did before (after Ahlmann-Eltze, Huber and Anders).

    G (gene, rank) and P (perturbation, rank) are principal components of δ at the earlier times; b is the mean of Y[v, t], and K
    is fitted to Y[v, t] − b by ridge regression. Rank and ridge are chosen by validation.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> low_rank_linear(part.train, part.held_out).shape
    (1, 103)
    """
    grid = [{"rank": k, "ridge": a} for k, a in product((2, 3, 5, 8, 10), (0.01, 0.03, 0.1, 0.3, 1.0))]
    return _from_history(train, conditions, "low_rank_linear", _low_rank_linear, grid)


def linear_ode(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict one step of the linear system dδ[p] / dt = δ[p] A + b[p], on r of `shrunk_offset`.

    A (gene, gene) and b (perturbation, gene) are fitted to the slopes between successive times by ridge regression, with weights as in
    `last_time_drift`. Both ridges are chosen by validation.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"])
    >>> linear_ode(part.train, part.held_out).shape
    (1, 103)
    """
    grid = [{"field": a, "push": b} for a, b in product((0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0))]
    return _from_history(train, conditions, "linear_ode", _linear_ode, grid)


MEAN_BASELINES: dict[str, Callable[["Screen", Sequence[Protocol]], xr.DataArray]] = {
    "control mean": control_mean,
    "perturbation mean": perturbation_mean,
    "low-rank linear": low_rank_linear,
    "last time": last_time,
    "control + offset": control_offset,
    "linear ODE": linear_ode,
    "last time + drift": last_time_drift,
    "shrunk offset": shrunk_offset,
    "denoised offset": denoised_offset,
    "hierarchical Gaussian": hierarchical_gaussian,
}
"""Every baseline of means by the name it has in tables, in the order of the errors measured on Ishikawa 2023."""


def noise_floor(test: "Screen") -> float:
    """Return the error that no prediction of the test means can beat on average: mean over conditions and genes of variance / n.

    The variance is that of log(1 + count) over the n cells of a condition; conditions with one cell have none and are left out. In squared
    natural logs, to be held against a mean squared error over the same conditions. Raises ValueError where every condition has one cell.

    >>> from perturbprob.experiment import datasets
    >>> screen = datasets.ishikawa2023()
    >>> round(noise_floor(screen[screen.cells_of("control")]), 5)
    0.00102
    """
    bulk = pseudobulk(test)
    several = bulk["n_cells"].values > 1
    if not several.any():
        raise ValueError("Every condition of the test screen has a single cell: the noise of its mean cannot be told.")
    return float((bulk["variance"] / bulk["n_cells"])[several].mean())


def _from_history(
    train: "Screen", conditions: Sequence[Protocol], name: str, predictor: Predictor, grid: Grid | None = None, *, control: bool = True
) -> xr.DataArray:
    """Predict from the perturbations that were seen at every earlier time, with the numbers of the grid that validate best."""

    def method(course: TimeCourse, asked: list[Protocol]) -> Means | Posterior:
        """Check, tune, predict."""
        for protocol in asked:
            course.check_history(protocol)
        course = course.with_history()
        if control:
            course.check_control()
        tuned = _tuned(predictor, course, grid) if grid else {}
        return predictor(course, np.array([course.row(p) for p in asked]), **tuned)

    return predict_means(train, conditions, name, method)


def _tuned(predictor: Predictor, course: TimeCourse, grid: Grid) -> dict[str, float]:
    """Return the entry of the grid with the least squared error, each fold of visible perturbations predicted from the others."""
    rows = 1 + np.flatnonzero(course.seen[1:, -1])
    if len(rows) < FOLDS:
        if len(course.times) < 3 or len(course.perturbations) <= FOLDS:
            raise ValueError(
                f"{len(rows)} perturbations have training cells in media {course.media!r} at time {course.times[-1]:g}; this baseline "
                f"chooses its numbers by validation over at least {FOLDS}. Hide fewer, or use a baseline without such numbers."
            )
        return _tuned(predictor, course.taking(range(len(course.times) - 1)), grid)
    fold = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    return min(grid, key=lambda tuned: sum(_error(predictor, course, rows[fold == k], tuned) for k in range(FOLDS)))


def _error(predictor: Predictor, course: TimeCourse, rows: Rows, tuned: dict[str, float]) -> float:
    """Return the squared error on rows whose last time is hidden."""
    found = predictor(course.hiding(rows), rows, **tuned)
    mean = found.mean if isinstance(found, Posterior) else found
    return float(((mean - course.mean[rows, -1]) ** 2).sum())


def _drift(course: TimeCourse) -> Float[np.ndarray, " gene"]:
    """Return the change from the last but one time to the last, averaged over what was seen at both."""
    both = course.seen[:, -1] & course.seen[:, -2]
    if not both.any():
        before, time = (f"{t:g}" for t in course.times[-2:])
        raise ValueError(f"Nothing was seen in media {course.media!r} both at time {before} and at {time}: their drift is unknown.")
    weight = 1 / (1 / course.cells[both, -2:]).sum(1)
    return weight @ (course.mean[both, -1] - course.mean[both, -2]) / weight.sum()


def _reference(course: TimeCourse) -> Float[np.ndarray, " gene"]:
    """Return r, control at the last time, half of it carried there by the drift."""
    return (course.mean[0, -1] + course.mean[0, -2] + _drift(course)) / 2


def _shrunk_offset(course: TimeCourse, rows: Rows) -> Posterior:
    """Return the reference and the shrunken mean offset, and how far that may be off."""
    noise = course.pooled_variance[:-1] / course.cells[:, :-1, None]
    # a gene without any variance has no noise to weigh by: all its means are equal
    precision = 1 / np.maximum(noise[rows] + noise[0], np.finfo(float).tiny ** 0.5)
    total = precision.sum(1)
    mean = (precision * course.offsets[rows, :-1]).sum(1) / total
    spread = np.maximum((mean**2 - 1 / total).mean(1, keepdims=True), SMALLEST_SPREAD)
    return Posterior(_reference(course) + mean * spread / (spread + 1 / total), np.sqrt(spread / (spread * total + 1)))


def _denoised_offset(course: TimeCourse, rows: Rows, rank: int) -> Means:
    """Return the reference and the projected offset."""
    directions = _right_singular(course.offsets[:, :-1].reshape(-1, course.mean.shape[2]), rank)
    return _reference(course) + course.offsets[rows, -2] @ directions.T @ directions


def _right_singular(matrix: Float[np.ndarray, "row gene"], rank: int) -> Float[np.ndarray, "rank gene"]:
    """Return the first right singular vectors, as many as there are."""
    return np.linalg.svd(matrix, full_matrices=False)[2][:rank]


def _low_rank_linear(course: TimeCourse, rows: Rows, rank: int, ridge: float) -> Means:
    """Return the prediction of the low-rank linear model; with orthonormal gene components, its ridge is a division."""
    n_perturbations, _, n_genes = course.mean.shape
    earlier, visible = course.offsets[:, :-1], course.seen[:, -1]
    wide, tall = earlier.reshape(n_perturbations, -1), earlier.reshape(-1, n_genes)
    features = np.linalg.svd(wide - wide.mean(0), full_matrices=False)[0][:, :rank] * n_perturbations**0.5
    genes = _right_singular(tall - tall.mean(0), rank)
    mean = course.mean[visible, -1].mean(0)
    gram = features[visible].T @ features[visible] + ridge * visible.sum() * np.eye(features.shape[1])
    core = np.linalg.solve(gram, features[visible].T @ (course.mean[visible, -1] - mean) @ genes.T) / (1 + ridge)
    return mean + features[rows] @ core @ genes


def _linear_ode(course: TimeCourse, rows: Rows, field: float, push: float) -> Means:
    """Return the reference and one step from the last offset, by ridge regression in kernel form: a row for each step, not each gene."""
    p, k = np.nonzero(course.seen[1:, :-1] & course.seen[1:, 1:])
    p, gap = p + 1, np.diff(course.times)
    start = course.offsets[p, k]
    slope = (course.offsets[p, k + 1] - start) / gap[k, None]
    weight = gap[k] ** 2 / (1 / course.cells[p, k] + 1 / course.cells[p, k + 1])
    field_ridge, push_ridge = field * (start**2).sum() / 10, push * len(gap)

    def kernel(x: Float[np.ndarray, "row gene"], of: Rows) -> Float[np.ndarray, "row step"]:
        """Return how much of each fitted step a state takes."""
        return x @ start.T / field_ridge + (of[:, None] == p) / push_ridge

    fitted = np.linalg.solve(kernel(start, p) + np.diag(weight.mean() / weight), slope)
    last = course.offsets[rows, -2]
    return _reference(course) + last + gap[-1] * kernel(last, rows) @ fitted
