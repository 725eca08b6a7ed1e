"""By how much each perturbation moves the depth of cells: their log total as an observation of its own (text after eq 19)."""

import warnings
from typing import TYPE_CHECKING, final

import numpy as np
import xarray as xr
from jaxtyping import Float, Float64
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.special import ndtr, ndtri

from perturbprob.experiment.moments import Moments, membership
from perturbprob.experiment.screen import require_screen
from perturbprob.experiment.settings import is_within

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

SPREADS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
"""The standard deviations τ of effects on log depth that are averaged over, alike a priori."""
EDITED, FLAT = 0.5, 1e-4
"""The prior deviation of what all edited cells share, and the prior precision of what all cells share."""


def depth_effects(screen: "Screen", *, total: ArrayLike | None = None, level: float = 0.9) -> xr.Dataset:
    """Return by how much each perturbation moves log depth against control of the same media, time and batch, with intervals.

    Stressed cells leak RNA and large ones hold more, so a cell's total is an answer and not only a nuisance. It is observed as

        log total_n = a_(media, time) + b_batch + v_condition + ε_n,   v ~ Normal(e_(media, time), τ²), 0 in control,   ε ~ Normal(0, σ²),

    with flat priors on a and b, e ~ Normal(0, 0.5²) for what all edited cells share, σ² pooled within conditions and batches, and τ
    averaged over a grid: the posterior is in closed form.
    `node` takes the same total as given. Its log rate is log ℓ + log share + η, of which depth is no part, so the two laws
    have no unknown in common, and fitted together they would answer as they do apart.

    A Dataset: over (condition) ``log_depth_change``, v, the natural log of a ratio of depths, with ``lower`` and ``upper``, the central
    interval of probability ``level``, and ``local_false_sign_rate``; over (tested_perturbation) ``overall``, ``overall_lower`` and
    ``overall_upper``, the mean over the perturbation's conditions. ``attrs`` says σ and the posterior mean of τ.

    ``total`` (cell,) is what to take for the totals, such as those of the whole transcriptome where the screen is a panel. Raises
    ValueError for continuous values, totals that are not above 0, and a screen without control or without perturbed cells.

    >>> import perturbprob as pb
    >>> found = depth_effects(pb.datasets.ishikawa2023())
    >>> found["log_depth_change"].sel(condition="Knockout('PRDM14') >> Wait(5)").round(2).item()
    -0.05
    """
    require_screen(screen)
    logs = _log_totals(screen, total)
    edited = [bool(p.perturbations) for p in screen.conditions]
    if all(edited) or not any(edited):
        raise ValueError("depth_effects compares perturbed cells with control cells, and this screen lacks one of them.")
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")
    _say_apart(screen)
    depth, asked = _Depth(screen, logs), _asked(screen)
    evidence, mean, variance = (np.stack(part) for part in zip(*(depth.posterior(tau, asked) for tau in SPREADS), strict=True))
    weight = np.exp(evidence - evidence.max()) / np.exp(evidence - evidence.max()).sum()
    average = weight @ mean
    deviation = np.sqrt(weight @ (variance + (mean - average) ** 2))
    attrs = {"level": level, "residual_deviation": depth.noise**0.5, "effect_deviation": float(weight @ np.array(SPREADS))}
    return _dataset(screen, average, deviation, attrs)


def _say_apart(screen: "Screen") -> None:
    """Say which perturbations share no batch with control, directly or by way of others."""
    edited = np.array([bool(p.perturbations) for p in screen.conditions])[screen.condition]
    with_control = set(np.array(screen.batches, object)[np.unique(screen.batch[~edited])])
    apart = [batch for part in screen.layout.components() if not with_control & set(part) for batch in part]
    if apart:
        warnings.warn(
            f"Batches {', '.join(apart[:3])}{' and others' if len(apart) > 3 else ''} share no condition with one that holds control: "
            "of the depth of their perturbations the cells say nothing, and their intervals are those of the prior.",
            stacklevel=3,
        )


def _log_totals(screen: "Screen", total: ArrayLike | None) -> Float64[np.ndarray, " cell"]:
    """Return the log of each cell's total."""
    if screen.values != "counts":
        raise ValueError("This screen holds continuous values, which have no depth.")
    found = np.asarray(screen.counts.sum(axis=1, dtype=np.float64) if total is None else total, np.float64)
    if found.shape != (screen.n_cells,) or not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"Totals are one number above 0 for each of the {screen.n_cells:,} cells.")
    return np.log(found)


def _asked(screen: "Screen") -> Float64[np.ndarray, "answer condition"]:
    """Return what is asked of the effects of conditions: each perturbed one, and the mean over those of each perturbation."""
    names = np.array([p.perturbation for p in screen.conditions], object)
    each = np.eye(len(names))[[bool(p.perturbations) for p in screen.conditions]]
    whole = np.stack([names == name for name in screen.perturbations]).astype(float)
    return np.concatenate([each, whole / whole.sum(1, keepdims=True)])


@final
class _Depth:
    """Log totals of cells, added up over those of one condition in one batch, and what their means hold."""

    def __init__(self, screen: "Screen", logs: Float64[np.ndarray, " cell"]) -> None:
        """Average over cells; σ² is what is left within."""
        n = len(screen.batches)
        pair, code = np.unique(screen.condition * n + screen.batch, return_inverse=True)
        moments = Moments.of(csr_array(logs[:, None] - logs.mean()), code, len(pair))
        self.noise = float(moments.squares.sum() / max(1, len(logs) - len(pair)))
        if not self.noise > 0:
            raise ValueError("Within conditions and batches all cells have one total: depth was taken out of these counts.")
        self.mean, self.precision = moments.mean[:, 0], moments.n_cells / self.noise
        places = {key: k for k, key in enumerate(dict.fromkeys((p.media, p.time) for p in screen.conditions))}
        where = np.array([places[p.media, p.time] for p in screen.conditions])
        self.free = np.array([bool(p.perturbations) for p in screen.conditions], float)
        at = np.eye(len(places))[where]
        edited = self.free[:, None] * at
        self.shared = np.concatenate([edited[pair // n], at[pair // n], np.eye(n)[pair % n]], 1)
        self.edited = np.pad(edited, ((0, 0), (0, len(places) + n)))
        self.prior = np.repeat([EDITED**-2, FLAT], [len(places), len(places) + n])
        self.member = membership(pair // n, len(screen.conditions))

    def posterior(
        self, tau: float, asked: Float64[np.ndarray, "answer condition"]
    ) -> tuple[float, Float64[np.ndarray, " answer"], Float64[np.ndarray, " answer"]]:
        """Return the log evidence of τ, and mean and variance of what is asked of v.

        Given a, b and e the conditions are independent, v − e = gain · (what is left of their cells) with variance ``gain``; a, b and e
        have the normal equations that are left when v is integrated out.
        """
        sums = self.member @ np.column_stack([self.precision, self.precision * self.mean, self.precision[:, None] * self.shared])
        known, seen, shares = sums[:, 0], sums[:, 1], sums[:, 2:]
        gain = self.free * tau**2 / (1 + self.free * tau**2 * known)
        weighted = self.precision[:, None] * self.shared
        equations = np.diag(self.prior) + self.shared.T @ weighted - (gain * shares.T) @ shares
        right = weighted.T @ self.mean - shares.T @ (gain * seen)
        covariance = np.linalg.inv(equations)
        common = covariance @ right
        square = self.precision @ self.mean**2 - gain @ seen**2 - right @ common
        evidence = -0.5 * (square + np.log1p(self.free * tau**2 * known).sum() + np.linalg.slogdet(equations)[1])
        carried = asked @ (self.edited - gain[:, None] * shares)
        mean = asked @ (gain * seen) + carried @ common
        return float(evidence), mean, asked**2 @ gain + ((carried @ covariance) * carried).sum(1)


def _dataset(
    screen: "Screen", mean: Float[np.ndarray, " answer"], deviation: Float[np.ndarray, " answer"], attrs: dict[str, float]
) -> xr.Dataset:
    """Put names on the answers."""
    conditions = [p for p in screen.conditions if p.perturbations]
    n, width = len(conditions), ndtri(0.5 + attrs["level"] / 2)
    lower, upper = mean - width * deviation, mean + width * deviation
    each = {"log_depth_change": mean, "lower": lower, "upper": upper, "local_false_sign_rate": ndtr(-np.abs(mean) / deviation)}
    whole = {"overall": mean, "overall_lower": lower, "overall_upper": upper}
    arrays = {name: ("condition", value[:n]) for name, value in each.items()}
    arrays |= {name: ("tested_perturbation", value[n:]) for name, value in whole.items()}
    coords = {
        "condition": [str(p) for p in conditions],
        "perturbation": ("condition", [p.perturbation for p in conditions]),
        "media": ("condition", [p.media or screen.baseline or "baseline" for p in conditions]),
        "time": ("condition", [p.time for p in conditions]),
        "tested_perturbation": list(screen.perturbations),
    }
    return xr.Dataset(arrays, coords, attrs)
