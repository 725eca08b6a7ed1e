"""How far each perturbation moves between times, against the noise of control cells, and how probably it is at rest (appendix E).

The level of gene g in cells C is log₂((Σ x_g + ½) / Σ ℓ), counts over size factors of the cells; a step is the change of levels
between sequential times, and ``|LFC|`` is its mean absolute value over genes, in log₂ units. With few cells ``|LFC|`` is large from
noise alone, so it is held against control cells that do not move: random halves of one time (`split_halves`), and draws of as many
cells as each perturbation has (`matched_steps`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import csr_array

from perturbprob.experiment.moments import Moments, membership, relative_counts
from perturbprob.experiment.vocabulary import labels

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

FEWEST = 10  # control cells at one time, below which halves and draws say nothing of noise
_BLOCK = 20_000_000  # numbers held at a time
_PRIOR_CELLS = 20  # for how many cells the variance of all perturbations counts in that of one
_GRID = 400
_PROBES = 128
_ROUNDS = 10


@final
@dataclass(frozen=True, eq=False)
class Course:
    """The cells of one media, by perturbation and time; in the order of their names, so that draws do not depend on another.

    - ``counts``: csr_array (cell, gene); ``size_factor``: the relative depth of each cell.
    - ``perturbations``: names, control first; ``perturbation``: each cell's index into them.
    - ``times``: sorted; ``time``: each cell's index into them.
    """

    counts: csr_array
    size_factor: Float64[np.ndarray, " cell"]
    perturbations: tuple[str, ...]
    perturbation: Int64[np.ndarray, " cell"]
    times: tuple[float, ...]
    time: Int64[np.ndarray, " cell"]

    @classmethod
    def of(cls, screen: "Screen", media: str | None = None) -> Self:
        """Take the cells of one media (default: the first) from a screen; perturbations and times are those of the whole screen.

        Raises ValueError for a screen with a single time, without perturbations or without control, and for fewer than 10 control
        cells at a time at which the media has cells.

        >>> from perturbprob.experiment import datasets
        >>> Course.of(datasets.ishikawa2023()).n_cells[:2]
        array([[138, 283, 397, 364],
               [173, 303, 384, 350]])
        """
        _check_screen(screen)
        media = screen.media[0] if media is None else media
        own = labels(screen.conditions)
        names = ("control", *sorted(set(own) - {"control"}))
        ends = np.array([(screen.baseline or "baseline") if p.media is None else p.media for p in screen.conditions])
        cells = np.flatnonzero((ends == media)[screen.condition])
        cells = cells[np.argsort(screen.cells[cells], kind="stable")]
        codes = np.array([(names.index(a), screen.times.index(p.time)) for a, p in zip(own, screen.conditions, strict=True)])
        perturbation, time = codes[screen.condition[cells]].astype(np.int64).T
        course = cls(screen.counts[cells].astype(np.float64), screen.size_factor[cells], names, perturbation, screen.times, time)
        _check_controls(course, media, screen.time_unit)
        return course

    @property
    def n_cells(self) -> Int64[np.ndarray, "perturbation time"]:
        """Number of cells of each perturbation at each time."""
        return np.bincount(self._group, minlength=self._n_groups).reshape(len(self.perturbations), len(self.times))

    @property
    def precision(self) -> Float64[np.ndarray, "perturbation step"]:
        """How well a step is known: 1 / (1 / n(earlier) + 1 / n(later)) cells, 0 where either is missing."""
        earlier, later = self.n_cells[:, :-1], self.n_cells[:, 1:]
        return earlier * later / np.maximum(earlier + later, 1)

    def sums(self, values: csr_array) -> Float64[np.ndarray, "perturbation time gene"]:
        """Add up values of cells by perturbation and time."""
        return (membership(self._group, self._n_groups) @ values).toarray().reshape(len(self.perturbations), len(self.times), -1)

    def controls(self, time: int) -> tuple[Float64[np.ndarray, "cell gene"], Float64[np.ndarray, " cell"]]:
        """Return counts and size factors of the control cells at one time."""
        chosen = np.flatnonzero((self.perturbation == 0) & (self.time == time))
        return self.counts[chosen].toarray(), self.size_factor[chosen]

    @property
    def _n_groups(self) -> int:
        """Number of perturbations times number of times."""
        return len(self.perturbations) * len(self.times)

    @property
    def _group(self) -> Int64[np.ndarray, " cell"]:
        """Number of each cell's perturbation and time."""
        return self.perturbation * len(self.times) + self.time

    def moments(self, values: csr_array) -> Moments:
        """Return the moments of values of cells by perturbation and time, groups in that order."""
        return Moments.of(values, self._group, self._n_groups)


def steps(course: Course) -> Float64[np.ndarray, "perturbation step gene"]:
    """Return the change of each gene's level between sequential times, in log₂ units; NaN where a perturbation has no cell.

    >>> from perturbprob.experiment import datasets
    >>> change = steps(Course.of(datasets.ishikawa2023()))
    >>> change.shape, f"{abs(change[0, 2]).mean():.2f}"  # control, from day 4 to day 5
    ((24, 3, 103), '0.17')
    """
    exposure = np.bincount(course._group, course.size_factor, course._n_groups).reshape(course.n_cells.shape)
    return np.diff(_level(course.sums(course.counts), exposure), axis=1)


def drift_weights(course: Course) -> Float64[np.ndarray, "perturbation step"]:
    """Return how much each perturbation's step tells of the drift that all share: 1 / (noise + movement), 0 where not seen.

    Both are variances of the step of mean log₂(1 + x/ℓ), averaged over genes: noise from sampling cells, and movement what the step
    beyond the drift has above noise, in ten rounds of drift and movement. So a perturbation that moves much does not pass for drift.
    """
    change, noise = _changes(course, _log_values(course))
    known = np.nan_to_num(noise.mean(axis=-1))
    moved = np.zeros_like(known)
    for _ in range(_ROUNDS):
        weight = np.where(known > 0, 1 / np.where(known > 0, known + moved, 1), 0.0)
        excess = beyond_drift(change, weight) ** 2 - noise - _drift_variance(noise + moved[..., None], weight)
        moved = np.maximum(np.nan_to_num(excess.mean(axis=-1)), 0)
    return weight


def beyond_drift(
    change: Float64[np.ndarray, "*draw perturbation step gene"], weight: Float64[np.ndarray, "perturbation step"]
) -> Float64[np.ndarray, "*draw perturbation step gene"]:
    """Take from each step the drift, the weighted mean of the same step over all other perturbations and control.

    A step is NaN where it is not seen, or where no other is.
    """
    weight = weight[..., None]
    known = weight * np.where(weight > 0, change, 0.0)
    others = weight.sum(axis=0) - weight
    drift = (known.sum(axis=-3, keepdims=True) - known) / np.where(others > 0, others, np.nan)
    return change - drift


def split_halves(course: Course, n_splits: int, seed: int = 0) -> Float64[np.ndarray, "split time"]:
    """Return ``|LFC|`` between random halves of the control cells of one time (appendix E; five splits there).

    >>> from perturbprob.experiment import datasets
    >>> halves = split_halves(Course.of(datasets.ishikawa2023()), 200)
    >>> np.quantile(halves, 0.95, axis=0).round(1)  # few control cells on day 2
    array([0.2, 0.1, 0.1, 0.1])
    """
    rng, result = np.random.default_rng([seed, 0]), np.full((n_splits, len(course.times)), np.nan)
    for time in np.flatnonzero(course.n_cells[0]).tolist():
        counts, size = course.controls(time)
        for rows in _blocks(n_splits, max(counts.shape)):
            half = rng.permuted(np.tile(np.arange(len(size)) < len(size) // 2, (rows.stop - rows.start, 1)), axis=1).astype(float)
            first, exposure = half @ counts, half @ size
            change = _level(first, exposure) - _level(counts.sum(axis=0) - first, size.sum() - exposure)
            result[rows, time] = np.abs(change).mean(axis=1)
    return result


def matched_steps(course: Course, n_splits: int, seed: int = 0) -> Float64[np.ndarray, "split perturbation step"]:
    """Return the ``|LFC|`` beyond drift of whole screens in which nothing moves, with the numbers of cells of this one.

    Every perturbation's cells are control cells of the same time, drawn with replacement; levels are taken relative to all control
    cells of the time, so control's own steps and the shared drift are 0 but for noise. Time and memory grow with perturbations ×
    times × genes.
    """
    rng, shape, weight = np.random.default_rng([seed, 1]), (*course.n_cells.shape, course.counts.shape[1]), drift_weights(course)
    result = np.empty((n_splits, shape[0], shape[1] - 1))
    for rows in _blocks(n_splits, int(np.prod(shape))):
        levels = np.full((rows.stop - rows.start, *shape), np.nan)
        for time in np.flatnonzero(course.n_cells[0]).tolist():
            counts, size = course.controls(time)
            for k in np.flatnonzero(course.n_cells[:, time]).tolist():
                times_drawn = _draw(rng, len(levels), len(size), int(course.n_cells[k, time]))
                levels[:, k, time] = _level(times_drawn @ counts, times_drawn @ size) - _level(counts.sum(axis=0), size.sum())
        result[rows] = np.abs(beyond_drift(np.diff(levels, axis=2), weight)).mean(axis=-1)
    return result


def matched_bound(noise: Float64[np.ndarray, "split perturbation step"], tolerance: float) -> Float64[np.ndarray, "perturbation step"]:
    """Return, per step, bounds that noise exceeds in any perturbation at all with probability ``tolerance``.

    bound_k = c q_k, with q_k the quantile 1 − tolerance of the noise of k, and c that of max_k noise_k / q_k: so many perturbations are
    asked that some would exceed bounds of their own.
    """
    own = np.quantile(noise, 1 - tolerance, axis=0)
    largest = np.where(np.isnan(noise), 0, noise / own).max(axis=1)
    return own * np.maximum(np.quantile(largest, 1 - tolerance, axis=0), 1.0)


def probability_of_rest(course: Course, change: float) -> Float64[np.ndarray, "perturbation step"]:
    """Return the posterior probability that a perturbation is at rest: that it moves by at most ``change`` beyond the shared drift.

    Y_kg(t) is the mean over cells of log₂(1 + x/ℓ), and r the difference of Y between two times Δ apart, less that of all others
    (`beyond_drift`). Its sampling variance s² is known, V/n at both times and that of the drift, and

        r_kg ~ N(0, s²_kg + (τ_k Δ)²),  τ_k ~ half-Cauchy(change),  P(rest) = P(τ_k ≤ change | r):

    τ_k is the root-mean-square change per unit of time over genes, and before the data it is as probably below as above ``change``.
    τ is summed out on a grid of 400 quantiles of its prior. V is the condition's own variance, shrunken towards that of all cells of the
    time, which counts for 20 cells. Noise is alike in genes that vary together in single cells, so the log-likelihood of G genes is
    multiplied by G_eff / G, with G_eff = G² / Σ_gh ρ²_gh and ρ the correlation of cells about the means of their conditions. A step
    that is not seen is NaN.

    >>> from perturbprob.experiment import datasets
    >>> course = Course.of(datasets.ishikawa2023())
    >>> bool(probability_of_rest(course, 0.05)[course.perturbations.index("POU5F1"), 2] < 0.01)
    True
    """
    residual, noise, share = _beyond_noise(course)
    wait = np.diff(course.times)[:, None]
    quantile = (np.arange(_GRID) + 0.5) / _GRID
    log = share * np.stack([_log_density(residual, noise + (t * wait) ** 2) for t in change * np.tan(np.pi / 2 * quantile)])
    weight = np.exp(log - log.max(axis=0))
    return np.where(np.isnan(residual).all(axis=-1), np.nan, weight[quantile < 0.5].sum(axis=0) / weight.sum(axis=0))


def movement(course: Course, *, drift: bool = False) -> Float64[np.ndarray, "part perturbation step"]:
    """Return how far each perturbation moves beyond noise: a mean square, its standard error, and that error if nothing moved.

    The mean over genes of r² − s² per unit of time squared, r and its known variance s² as in `probability_of_rest`; with ``drift`` the
    drift that all share is left in. Genes count for G_eff.

    >>> from perturbprob.experiment import datasets
    >>> course = Course.of(datasets.ishikawa2023())
    >>> square, error, null = movement(course)[:, course.perturbations.index("POU5F1"), 2]
    >>> bool(square > 5 * null)
    True
    """
    residual, noise, share = _beyond_noise(course, drift=drift)
    genes, unit = residual.shape[-1] * share, np.diff(course.times) ** 2
    square = (residual**2 - noise).mean(axis=-1)
    spread = [np.sqrt(2 * ((noise + extra[..., None]) ** 2).mean(axis=-1) / genes) for extra in (square.clip(0), np.zeros_like(square))]
    return np.stack([square, *spread]) / unit


def _beyond_noise(course: Course, *, drift: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    """Return each step beyond the shared drift, its known sampling variance, and the share of genes that count."""
    values, weight = _log_values(course), drift_weights(course)
    change_of, noise = _changes(course, values)
    if drift:
        return change_of, noise, _effective_genes(course, values) / change_of.shape[-1]
    residual = beyond_drift(change_of, weight)
    moved = np.where(weight > 0, 1 / np.where(weight > 0, weight, 1) - noise.mean(axis=-1), 0.0)
    noise = noise + _drift_variance(noise + moved[..., None], weight)
    share = _effective_genes(course, values) / residual.shape[-1]
    return residual, noise, share


def _level(
    counts: Float64[np.ndarray, "*group gene"], exposure: Float64[np.ndarray, "*group"] | np.float64
) -> Float64[np.ndarray, "*group gene"]:
    """Return log₂ of counts, and half a count, over size factors; NaN without cells."""
    return np.log2((counts + 0.5) / np.where(exposure > 0, exposure, np.nan)[..., None])


def _blocks(n_draws: int, size: int) -> Iterator[slice]:
    """Cut draws of ``size`` numbers each into blocks that fit into memory."""
    width = max(1, _BLOCK // size)
    return (slice(start, min(start + width, n_draws)) for start in range(0, n_draws, width))


def _draw(rng: np.random.Generator, n_draws: int, n_known: int, n_cells: int) -> Float64[np.ndarray, "draw cell"]:
    """Return how often each known cell is drawn, with replacement."""
    cell = rng.integers(n_known, size=(n_draws, n_cells)) + n_known * np.arange(n_draws)[:, None]
    return np.bincount(cell.ravel(), minlength=n_draws * n_known).reshape(n_draws, n_known).astype(float)


def _log_values(course: Course) -> csr_array:
    """Return log₂(1 + x/ℓ) of every cell."""
    return relative_counts(course.counts, course.size_factor).log1p() / np.log(2)


def _changes(course: Course, values: csr_array) -> tuple[Float64[np.ndarray, "perturbation step gene"], ...]:
    """Return the change of the mean over cells between sequential times, and its sampling variance."""
    found, n = course.moments(values), np.where(course.n_cells > 0, course.n_cells, np.nan)[..., None]
    mean, squares = (part.reshape(*course.n_cells.shape, -1) for part in (found.mean, found.squares))
    pooled = np.nansum(squares, axis=0) / np.maximum(np.nansum(n - 1, axis=0), 1)
    variance = (squares + _PRIOR_CELLS * pooled) / (n - 1 + _PRIOR_CELLS) / n
    return np.diff(mean, axis=1), variance[:, 1:] + variance[:, :-1]


def _drift_variance(
    variance: Float64[np.ndarray, "perturbation step gene"], weight: Float64[np.ndarray, "perturbation step"]
) -> Float64[np.ndarray, "perturbation step gene"]:
    """Return the variance of the drift that `beyond_drift` takes from each step, from those of the steps."""
    weight = weight[..., None]
    known = weight**2 * np.where(weight > 0, variance, 0.0)
    others = weight.sum(axis=0) - weight
    return (known.sum(axis=0) - known) / np.where(others > 0, others, np.nan) ** 2


def _log_density(
    residual: Float64[np.ndarray, "perturbation step gene"], variance: Float64[np.ndarray, "perturbation step gene"]
) -> Float64[np.ndarray, "perturbation step"]:
    """Return the log density of residuals about 0, up to a constant; a step not seen says nothing."""
    return np.where(np.isnan(residual), 0, -0.5 * (np.log(variance) + residual**2 / variance)).sum(axis=-1)


def _effective_genes(course: Course, values: csr_array) -> float:
    """Return how many independent genes the genes count for, G² / Σ ρ², by random probes of the correlation where genes are many."""
    found, group = course.moments(values), course._group
    means, variance = np.nan_to_num(found.mean), np.nansum(found.squares, axis=0) / len(group)
    scale = 1 / np.sqrt(np.where(variance > 1e-12, variance, np.inf))
    n_genes = len(scale)
    probes = np.random.default_rng(0).choice([-1.0, 1.0], (n_genes, _PROBES)) / _PROBES**0.5 if n_genes > _PROBES else np.eye(n_genes)
    cells = values @ (scale[:, None] * probes) - (means @ (scale[:, None] * probes))[group]
    correlated = scale[:, None] * (values.T @ cells - means.T @ (membership(group, course._n_groups) @ cells)) / len(group)
    varied = int((scale > 0).sum())
    return varied**2 / max((correlated**2).sum() - varied**2 / len(group), varied, 1)


def _check_screen(screen: "Screen") -> None:
    """Refuse a screen in which nothing can be followed, or compared."""
    if screen.values == "continuous":
        raise ValueError(
            "This screen holds continuous values; whether means move beyond noise is asked of single cells. "
            "Read the counts of the cells: values='counts'."
        )
    if len(screen.times) < 2:
        raise ValueError(
            f"This screen has a single time, {screen.times[0]:g}; what moves shows between two. "
            "Name the column of times when reading the screen: time='day'."
        )
    if all(p.perturbations for p in screen.conditions):
        raise ValueError(
            "This screen has no control cells, which show the noise. Keep them in it, or name their label when reading it: control='NT'."
        )
    if not screen.perturbations:
        raise ValueError(
            "This screen has control cells only; what changes in control cannot be told from the drift of all. Keep perturbed cells in it."
        )


def _check_controls(course: Course, media: str, unit: str | None) -> None:
    """Refuse a time with cells but too few of control."""
    few = (course.n_cells[0] < FEWEST) & (course.n_cells.sum(axis=0) > 0)
    if few.any():
        at = np.flatnonzero(few)[0]
        raise ValueError(
            f"Only {course.n_cells[0, at]} control cells in media {media!r} at {unit or 'time'} {course.times[at]:g}: at least {FEWEST} at "
            "every time are needed to know the noise. Leave that time or media out: screen[cells]."
        )
