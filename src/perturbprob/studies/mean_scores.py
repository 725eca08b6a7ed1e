"""The scores of one prediction of the means of conditions, each against what was observed."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from perturbprob.studies.distribution_metrics import coverage, crps
from perturbprob.studies.metrics import (
    UNCHANGED,
    direction,
    discrimination,
    mean_square_error,
    overlap_at_n,
    sign_agreement,
    weighted_error,
)

if TYPE_CHECKING:
    from perturbprob.studies.held_out_means import Means

MEAN_SCORES = ("error", "weighted_error", "direction_control", "direction_mean", "discrimination", "de_overlap", "de_sign")
INTERVAL_SCORES = ("coverage50", "coverage80", "coverage90", "crps")

Scores = dict[str, Float[np.ndarray, " condition"]]


def score_means(means: "Means", predicted: Float[np.ndarray, "condition gene"]) -> Scores:
    """Return every score of predicted means by name; all but the error are NaN of control and where nothing was seen to compare with."""
    (differential, t), edited = means.differential, means.edited
    change, seen = predicted - means.control, means.observed - means.control
    found = {
        "weighted_error": weighted_error(predicted, means.observed, means.weights),
        "direction_control": direction(change, seen),
        "direction_mean": direction(predicted - means.reference, means.observed - means.reference),
        "discrimination": _discrimination(means, predicted),
        "de_overlap": overlap_at_n(_in_standard_errors(means, change), t, differential.sum(1), edited),
        "de_sign": sign_agreement(change, seen, differential, edited),
    }
    error = mean_square_error(predicted, means.observed)
    return {"error": error} | {name: np.where(means.perturbed, value, np.nan) for name, value in found.items()}


def score_intervals(means: "Means", draws: Float[np.ndarray, "draw condition gene"], seed: int) -> Scores:
    """Return how well draws of the predicted mean say where the observed one lies.

    To each draw the noise of the observed mean is added, Normal(0, V_g / n) with V the variance between training cells of one condition.
    """
    noise = np.random.default_rng([seed, 1]).standard_normal(draws.shape) * np.sqrt(means.within / means.n[:, None])
    points = draws + noise
    levels = {f"coverage{level}": coverage(points, means.observed, level / 100) for level in (50, 80, 90)}
    return levels | {"crps": crps(points, means.observed)}


def overall_mean(values: Float[np.ndarray, " condition"]) -> float:
    """Return the mean over conditions that have a value; NaN where none has.

    >>> overall_mean(np.array([1.0, np.nan, 2.0]))
    1.5
    """
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _in_standard_errors(means: "Means", change: Float[np.ndarray, "condition gene"]) -> Float[np.ndarray, "condition gene"]:
    """Return predicted changes in standard errors of those observed, as Welch's t has them: the truth then ranks genes as t does."""
    error = np.sqrt(means.noise + means.control_variance / means.control_n[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(change) < UNCHANGED, 0, change / error)


def _discrimination(means: "Means", predicted: Float[np.ndarray, "condition gene"]) -> Float[np.ndarray, " condition"]:
    """Return it within perturbed conditions of the same media and time."""
    found = np.full(len(predicted), np.nan)
    for _, rows in means.groups:
        found[rows] = discrimination(predicted[rows], means.observed[rows], [means.edited[k] for k in rows])
    return found
