"""How many more genes perturbations change in other media than in baseline media, at matched cell numbers (appendix A, Figure 5)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control, norm

from perturbprob.experiment.moments import Moments, membership, relative_counts
from perturbprob.experiment.vocabulary import labels, meant

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

_BOOTSTRAPS = 2000
_PRIOR_CELLS = 20  # for how many cells the variance of all groups counts in that of one
_THINNED = 20


@final
@dataclass(frozen=True)
class Group:
    """Mean of each gene over the cells of a perturbation in one media at one time, the variance between its cells, and their number.

    Both are NaN for a gene of which nothing is known.
    """

    mean: Float[np.ndarray, " gene"]
    variance: Float[np.ndarray, " gene"]
    n_cells: float

    def thinned(self, n_cells: float, rng: np.random.Generator) -> "Group":
        """Return what so many of its cells would have shown: the mean with the noise that the other cells took away."""
        missing = self.variance * max(0.0, 1 / n_cells - 1 / self.n_cells)
        return Group(self.mean + rng.standard_normal(len(self.mean)) * np.sqrt(missing), self.variance, n_cells)


Groups = dict[tuple[str, str | None, float], Group]
"""Groups by the label of a perturbation, its media (None: baseline) and time."""


def groups(screen: "Screen") -> Groups:
    """Return the mean of log(1 + count / size factor) for each perturbation in each media (None: baseline) at each time.

    Of continuous values, the mean of the rows, weighted by the cells behind each where these are known. A row whose standard error
    is not known is left out; but a control of which none is known counts as exact. The variance of few cells is shrunken towards that
    of all groups, which counts for 20 cells: a gene with zeros in every cell of a small group is not known exactly.
    """
    screen = screen.with_rna
    keys = [(label, p.media, p.time) for label, p in zip(labels(screen.conditions), screen.conditions, strict=True)]
    names = list(dict.fromkeys(keys))
    group = np.array([names.index(key) for key in keys])[screen.condition]
    if screen.values == "continuous":
        mean, error, n_cells = _rows(screen, group, [name == "control" for name, *_ in names])
        variance = error * n_cells[:, None]
    else:
        found = Moments.of(relative_counts(screen.counts, screen.size_factor).log1p(), group, len(names))
        mean, variance, n_cells = found.mean, found.unbiased_variance, found.n_cells.astype(float)
    parts = zip(mean, _shrunken(variance, n_cells), n_cells, strict=True)
    return {name: Group(*part) for name, part in zip(names, parts, strict=True)}


def _shrunken(variance: Float[np.ndarray, "group gene"], n_cells: Float[np.ndarray, " group"]) -> Float[np.ndarray, "group gene"]:
    """Shrink variances towards their mean over all groups; an exact group, of variance 0 in every gene, stays exact."""
    exact, freedom = (variance == 0).all(axis=1), np.maximum(n_cells - 1, 0)[:, None]
    counted = freedom * (np.isfinite(variance) & ~exact[:, None])
    pooled = (counted * np.nan_to_num(variance)).sum(axis=0) / np.maximum(counted.sum(axis=0), 1e-12)
    single = np.where(np.isnan(variance) & (freedom == 0), pooled, variance)
    shrunken = (freedom * single + _PRIOR_CELLS * pooled) / (freedom + _PRIOR_CELLS)
    return np.where(exact[:, None], 0.0, shrunken)


def _rows(screen: "Screen", group: Int[np.ndarray, " cell"], control: list[bool]) -> tuple[Float[np.ndarray, "group ..."], ...]:
    """Return mean and squared error of groups of rows, and the cells behind them."""
    member, shape = membership(group, len(control)), (screen.n_cells, screen.n_genes)
    error = np.full(shape, np.nan) if screen.standard_error is None else screen.standard_error.astype(float)
    number = np.ones(screen.n_cells) if screen.cells_behind is None else np.nan_to_num(screen.cells_behind, nan=1.0)
    known = np.isfinite(error)
    exact = np.array(control)[:, None] & (member @ known.astype(float) == 0)
    weight = number[:, None] * (known | exact[group])
    total = member @ weight
    total[total == 0] = np.nan
    mean = member @ (weight * screen.counts.toarray()) / total
    return mean, member @ (weight * np.nan_to_num(error)) ** 2 / total**2, member @ number


def changed(own: Group, control: Group, rate: float = 0.05) -> Bool[np.ndarray, " gene"]:
    """Return which genes differ from control at a false discovery rate.

    z = (mean − mean of control) / standard error of the difference; p from the normal law, corrected by Benjamini and Hochberg. A gene
    of which nothing is known counts as unchanged.
    """
    error = np.sqrt(own.variance / own.n_cells + control.variance / control.n_cells) + 1e-12
    z = np.nan_to_num(np.abs(own.mean - control.mean) / error)
    return false_discovery_control(2 * norm.sf(z)) < rate


@final
@dataclass(frozen=True)
class Silence:
    """Genes changed in other media over genes changed in baseline media: the ``ratio`` and its 90 % interval over perturbations."""

    ratio: float
    interval: tuple[float, float]
    spread: float
    confounds: tuple[str, ...] = ()


def silence(screen: "Screen", perturbations: list[str], seed: int = 0) -> Silence:
    """Compare the numbers of genes that perturbations change in other media and in baseline media.

    Perturbation and control of one time are compared, and the numbers of genes added up over the times seen in both media: what time
    changes is no effect. Every perturbation counts in both media with the smaller of its numbers of cells, and so does control, as more
    cells alone would change more genes: the noise that the other cells took away is added again, in 20 draws from ``seed``. The
    interval is a bootstrap over perturbations and media. ``confounds`` says what a screen of continuous values leaves open.
    """
    found, media = groups(screen), sorted({p.media for p in screen.conditions if p.media is not None})
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(label for name in perturbations for label in meant(name, screen.conditions)))
    pairs = [_pair(found, name, m, rng) for name in names for m in media]
    counts = np.array([pair for pair in pairs if pair is not None], dtype=float)
    if not len(counts) or (screen.values == "continuous" and screen.standard_error is None):
        what = "no perturbation is measured, with control, both in baseline and in other media at one time."
        noise = "values without standard errors do not show which genes change: read them with standard_error=."
        return Silence(math.nan, (math.nan, math.nan), math.nan, (noise if len(counts) else what,))
    rows = rng.integers(len(counts), size=(_BOOTSTRAPS, len(counts)))
    logs = _log_ratio(counts[rows].sum(axis=1))
    low, high = (float(np.exp(q)) for q in np.quantile(logs, (0.05, 0.95)))
    unmatched = "numbers of cells are not known, so they are not matched, and more cells alone change more genes: read cells_behind=."
    few = f"{len(counts)} pairs of perturbation and media are too few to know how far they differ."
    confounds: tuple[str, ...] = (few,) if len(counts) < 3 else ()
    confounds += (unmatched,) if screen.values == "continuous" and screen.cells_behind is None else ()
    return Silence(float(np.exp(_log_ratio(counts.sum(axis=0)))), (low, high), float(logs.std()), confounds)


def _pair(found: Groups, name: str, media: str, rng: np.random.Generator) -> tuple[float, float] | None:
    """Return how many genes a perturbation changes in one media and in baseline media, at matched cell numbers, over all times."""
    times = sorted({time for *_, time in found})
    keys = [[(who, where, time) for where in (media, None) for who in (name, "control")] for time in times]
    seen = [_matched([found[key] for key in four], rng) for four in keys if all(key in found for key in four)]
    if not seen:
        return None
    first, second = np.sum(seen, axis=0)
    return float(first), float(second)


def _matched(four: list[Group], rng: np.random.Generator) -> Float[np.ndarray, "2"]:
    """Return how many genes differ from control here, and there, with as many cells of either as there are in both."""
    here, control, there, reference = four
    own, unperturbed = min(here.n_cells, there.n_cells), min(control.n_cells, reference.n_cells)
    sides = [(here, control), (there, reference)]
    draws = [[changed(one.thinned(own, rng), c.thinned(unperturbed, rng)).sum() for one, c in sides] for _ in range(_THINNED)]
    return np.mean(draws, axis=0)


def _log_ratio(counts: Float[np.ndarray, "*draw media"]) -> Float[np.ndarray, "*draw"]:
    """Return the log of other over baseline, half a gene added to both."""
    return np.asarray(np.log((counts[..., 0] + 0.5) / (counts[..., 1] + 0.5)))
