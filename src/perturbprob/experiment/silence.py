"""How many more genes perturbations change in other media than in baseline media, at matched cell numbers (appendix A, Figure 5)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control, norm

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

_BOOTSTRAPS = 2000


@final
@dataclass(frozen=True)
class Group:
    """Mean of each gene over the cells of a perturbation in one media, the squared error of that mean, and the cells behind it."""

    mean: Float[np.ndarray, " gene"]
    squared_error: Float[np.ndarray, " gene"]
    n_cells: float

    def with_cells(self, n_cells: float) -> Float[np.ndarray, " gene"]:
        """Return the squared error that so many cells would have left."""
        return self.squared_error * self.n_cells / n_cells


def group(screen: "Screen", perturbation: str, media: str | None, cells: Float[np.ndarray, " row"] | None = None) -> Group | None:
    """Return the group of a perturbation in one media (None: baseline), or None where it was not measured.

    ``cells`` says how many cells stand behind each row of a screen of continuous values.
    """
    own = [k for k, p in enumerate(screen.conditions) if p.perturbation == perturbation and p.media == media]
    rows = np.isin(screen.condition, own)
    n = int(rows.sum())
    if not n:
        return None
    if screen.values == "continuous":
        error = np.zeros((n, screen.n_genes)) if screen.standard_error is None else np.nan_to_num(screen.standard_error[rows])
        behind = 1.0 if cells is None else float(np.nansum(cells[rows])) or 1.0
        return Group(np.asarray(screen.counts[rows].mean(0)).ravel(), (error.astype(float) ** 2).sum(0) / n**2, behind)
    share = screen.counts[rows].multiply(1 / screen.size_factor[rows, None]).tocsr()
    share.data = np.log1p(share.data)
    mean = np.asarray(share.mean(0)).ravel()
    variance = np.maximum(np.asarray(share.multiply(share).mean(0)).ravel() - mean**2, 0)
    return Group(mean, (variance + 1e-9) / n, float(n))


def changed(own: Group, control: Group, n_cells: float, rate: float = 0.05) -> Bool[np.ndarray, " gene"]:
    """Return which genes differ from control at a false discovery rate, as if there were ``n_cells`` cells of the perturbation.

    z = (mean − mean of control) / standard error of the difference; p from the normal law, corrected by Benjamini and Hochberg.
    """
    error = np.sqrt(own.with_cells(n_cells) + control.squared_error) + 1e-12
    return false_discovery_control(2 * norm.sf(np.abs(own.mean - control.mean) / error)) < rate


@final
@dataclass(frozen=True)
class Silence:
    """Genes changed in other media over genes changed in baseline media: the ``ratio`` and its 90 % interval over perturbations."""

    ratio: float
    interval: tuple[float, float]
    spread: float
    confounds: tuple[str, ...] = ()


def silence(screen: "Screen", perturbations: list[str], cells: Float[np.ndarray, " row"] | None = None, seed: int = 0) -> Silence:
    """Compare the numbers of genes that perturbations change in other media and in baseline media.

    Every perturbation counts in both with the smaller of its numbers of cells: more cells alone would change more genes. The
    interval is a bootstrap over perturbations and media.
    """
    media = sorted({p.media for p in screen.conditions if p.media is not None})
    pairs = [_pair(screen, name, m, cells) for name in perturbations for m in media]
    counts = np.array([pair for pair in pairs if pair is not None], dtype=float)
    if not len(counts):
        what = "no perturbation is measured, with control, both in baseline and in other media."
        return Silence(math.nan, (math.nan, math.nan), math.nan, (what,))
    rows = np.random.default_rng(seed).integers(len(counts), size=(_BOOTSTRAPS, len(counts)))
    logs = _log_ratio(counts[rows].sum(axis=1))
    low, high = (float(np.exp(q)) for q in np.quantile(logs, (0.05, 0.95)))
    return Silence(float(np.exp(_log_ratio(counts.sum(axis=0)))), (low, high), float(logs.std()))


def _pair(screen: "Screen", name: str, media: str, cells: Float[np.ndarray, " row"] | None) -> tuple[int, int] | None:
    """Return how many genes a perturbation changes in one media and in baseline media, at matched cell numbers."""
    here, there = group(screen, name, media, cells), group(screen, name, None, cells)
    control, reference = group(screen, "control", media, cells), group(screen, "control", None, cells)
    if here is None or there is None or control is None or reference is None:
        return None
    n_cells = min(here.n_cells, there.n_cells)
    return int(changed(here, control, n_cells).sum()), int(changed(there, reference, n_cells).sum())


def _log_ratio(counts: Float[np.ndarray, "*draw media"]) -> Float[np.ndarray, "*draw"]:
    """Return the log of other over baseline, half a gene added to both."""
    return np.asarray(np.log((counts[..., 0] + 0.5) / (counts[..., 1] + 0.5)))
