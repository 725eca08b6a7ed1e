"""How near predicted means of conditions are to observed ones: error, direction, discrimination, differential genes.

Units are conditions, never cells. Means are of log(1 + count), natural logarithm, and so are changes, against control cells that were
observed: nothing here takes predicted controls, so no score can move with them. What cannot be told is NaN. ``edited`` holds the numbers
of the genes edited in each condition, which are left out: what an edit does to its own target is no prediction.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from perturbprob.experiment.settings import is_within

UNCHANGED = 1e-6
"""A predicted change below this is none: in single precision it is what rounding leaves."""


def mean_square_error(
    predicted: Float[np.ndarray, "condition gene"], observed: Float[np.ndarray, "condition gene"]
) -> Float[np.ndarray, " condition"]:
    """Return the mean over genes of the square of predicted minus observed.

    >>> mean_square_error(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
    array([2.])
    """
    return np.square(predicted - observed).mean(1)


def weighted_error(
    predicted: Float[np.ndarray, "condition gene"],
    observed: Float[np.ndarray, "condition gene"],
    weight: Float[np.ndarray, "condition gene"],
) -> Float[np.ndarray, " condition"]:
    """Return the weighted mean over genes of the square of predicted minus observed, Σ_g w_g (ŷ_g − y_g)² / Σ_g w_g.

    Weights are not negative and need not sum to 1. A gene of weight 0 counts for nothing, whatever it is; a condition without weight
    is NaN.

    >>> weighted_error(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]), np.array([[1.0, 3.0]]))
    array([3.])
    """
    total = weight.sum(1)
    squares = np.where(weight == 0, 0, weight * np.square(predicted - observed)).sum(1)
    return np.divide(squares, total, out=np.full(len(total), np.nan), where=total != 0)


def rest_weights(
    observed: Float[np.ndarray, "condition gene"],
    variance_of_mean: Float[np.ndarray, "condition gene"],
    edited: Sequence[Sequence[int]] | None = None,
) -> Float[np.ndarray, "condition gene"]:
    """Return how surely each gene of a condition differs from the mean of the other conditions, as weights that sum to 1 over genes.

    With y the observed means, v the squares of their standard errors (variance over cells / cells) and K conditions,

        t_kg = abs(y_kg − Σ_{j≠k} y_jg / (K − 1)) / √(v_kg + Σ_{j≠k} v_jg / (K − 1)²),    w_kg ∝ ((t_kg − min t_k) / (max t_k − min t_k))².

    With ``weighted_error`` this is the "weighted MSE against the rest" of Mejia et al. (2025, arXiv:2506.22641), by which the mean of all
    perturbations is no good prediction. Their t is scanpy's ``t-test_overestim_var`` against the cells of all other perturbations; here
    conditions count alike, with the noise they have. Give perturbed conditions of one media and time. t is 0 of a gene without noise on
    both sides, one that no cell expresses. Weights are even where all t are alike, and NaN where a condition is alone or v unknown.

    The weights follow the noise of the observed means, so that even the truth scores above Σ w v: compare errors by the same weights.

    >>> observed = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    >>> rest_weights(observed, np.full((3, 3), 0.01)).round(2)
    array([[0.  , 0.2 , 0.8 ],
           [0.  , 0.06, 0.94],
           [0.  , 0.5 , 0.5 ]])
    """
    known, kept = np.isfinite(observed) & np.isfinite(variance_of_mean), _kept(observed.shape, edited)
    mean, noise = (np.where(known, part, 0) for part in (observed, variance_of_mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        others = (known.sum(0) - known).astype(float)
        error = np.sqrt(variance_of_mean + (noise.sum(0) - noise).clip(0) / others**2)
        score = np.where(error == 0, 0, np.abs(observed - (mean.sum(0) - mean) / others) / error)
        low = np.where(kept, score, np.inf).min(1, keepdims=True)
        width = np.where(kept, score, -np.inf).max(1, keepdims=True) - low
        weight = np.where(kept, np.where(width == 0, 1, (score - low) / width) ** 2, 0)
        return weight / weight.sum(1, keepdims=True)


def direction(
    predicted: Float[np.ndarray, "condition gene"], observed: Float[np.ndarray, "condition gene"]
) -> Float[np.ndarray, " condition"]:
    """Return Pearson's correlation over genes of predicted and observed changes; NaN where one is, or does not differ between genes.

    Changes from one and the same measured reference share its noise, and a prediction that does not know it looks alike even where nothing
    changed: the fewer cells the reference has, the less 0 is where nothing is known.

    >>> direction(np.array([[1.0, 2.0, 4.0]]), np.array([[2.0, 4.0, 8.0]])).round(6)
    array([1.])
    """
    a, b = (part - part.mean(1, keepdims=True) for part in (predicted, observed))
    spread = [np.square(part).sum(1) for part in (a, b)]
    told = [square > 1e-20 * (1 + np.square(part).sum(1)) for square, part in zip(spread, (predicted, observed), strict=True)]
    return np.divide((a * b).sum(1), np.sqrt(spread[0] * spread[1]), out=np.full(len(a), np.nan), where=told[0] & told[1])


def discrimination(
    predicted: Float[np.ndarray, "condition gene"],
    observed: Float[np.ndarray, "condition gene"],
    edited: Sequence[Sequence[int]] | None = None,
) -> Float[np.ndarray, " condition"]:
    """Return the share of the other conditions whose observed mean is further from the prediction than the condition's own.

    1 where the prediction is nearest to what it predicts, 0.5 for a prediction that does not know which condition it is for; ties count
    half, and one condition alone has none (NaN). Distances are sums over genes of absolute differences. Two conditions are compared
    without the genes ``edited`` in either, whose numbers are given: the name of a target is not enough. Give conditions of one media
    and time, or knowing these will do.

    >>> observed = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    >>> discrimination(observed + 0.1, observed)
    array([1., 1., 1.])
    """
    n = len(observed)
    kept, found = _kept(observed.shape, edited), np.full(n, np.nan)
    for k in range(n if n > 1 else 0):
        both = kept & kept[k]
        gain = (both * (np.abs(predicted[k] - observed) - np.abs(predicted[k] - observed[k]))).sum(1)
        found[k] = np.delete((gain > 0) + 0.5 * (gain == 0), k).mean()
    return found


def differential_genes(
    mean: Float[np.ndarray, "condition gene"],
    variance: Float[np.ndarray, "condition gene"],
    n: Int[np.ndarray, " condition"],
    control_mean: Float[np.ndarray, "condition gene"],
    control_variance: Float[np.ndarray, "condition gene"],
    control_n: Int[np.ndarray, " condition"],
    *,
    level: float = 0.05,
    edited: Sequence[Sequence[int]] | None = None,
) -> tuple[Bool[np.ndarray, "condition gene"], Float[np.ndarray, "condition gene"]]:
    """Return which genes of a condition differ from control, and by how many standard errors: Welch's t.

    Everything is of cells that were observed: mean and unbiased variance over n cells of a condition, and the same of the control cells
    beside it (of its media, time and batches, one row for each condition):

        t = (μ − μ_c) / √(s² / n + s_c² / n_c),

    p values by Student's law with the degrees of freedom of Welch (1947), and the false discovery rate over the genes of a condition held
    at ``level`` by Benjamini and Hochberg (1995). An edited gene is never differential and not among those tested; its t is given. Genes
    alike without any noise have t = 0. With fewer than two cells on either side t is NaN and no gene differential. Raises ValueError for
    a level outside (0, 1).

    >>> part, n = np.array([[1.0, 1.0]]), np.array([50])
    >>> found, t = differential_genes(np.array([[2.0, 1.1]]), part, n, part, part, n)
    >>> found, t.round(3)
    (array([[ True, False]]), array([[5. , 0.5]]))
    """
    if not is_within(level, 0, 1):
        raise ValueError(f"level must lie between 0 and 1, and is {level!r}: pass 0.05 for one false discovery in twenty.")
    sides = (mean, np.sqrt(variance), n[:, None]), (control_mean, np.sqrt(control_variance), control_n[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        t, p = scipy.stats.ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False)
    alike = (mean == control_mean) & (variance == 0) & (control_variance == 0)
    t, p = np.where(alike, 0, t), np.where(alike, 1, p)
    found = np.zeros(t.shape, dtype=bool)
    for row, chance, tested in zip(found, p, _kept(t.shape, edited) & np.isfinite(p), strict=True):
        if tested.any():
            row[tested] = scipy.stats.false_discovery_control(chance[tested]) <= level
    return found, t


def overlap_at_n(
    predicted_change: Float[np.ndarray, "condition gene"],
    observed_score: Float[np.ndarray, "condition gene"],
    n: Int[np.ndarray, " condition"] | int,
    edited: Sequence[Sequence[int]] | None = None,
) -> Float[np.ndarray, " condition"]:
    """Return the share of the n genes of largest absolute observed score that are among the n of largest absolute predicted change.

        overlap = #(top_n(abs(t)) ∩ top_n(abs(Δ̂))) / n

    ``observed_score`` is the t of ``differential_genes`` and n how many genes it finds in a condition, or one number for all: overlap@N
    of cell-eval (Arc Institute, 2025), which ranks both sides by fold change and predicted genes by a test of predicted cells; here no
    predicted cells are needed. Ties count by what breaking them at random brings on average: a prediction of no change has the overlap of
    chance, n / genes. Of more than all genes n is all of them. NaN where n is 0, or where a prediction or score is NaN.

    >>> overlap_at_n(np.array([[0.5, -0.9, 0.1], [0.0, 0.0, 0.0]]), np.array([[3.0, 1.0, 0.2], [3.0, 1.0, 0.2]]), 1).round(3)
    array([0.   , 0.333])
    """
    kept = _kept(predicted_change.shape, edited)
    number: np.ndarray = np.minimum(n, kept.sum(1))
    size, score = np.abs(predicted_change), np.abs(observed_score)
    both = _chance_in_top(np.where(size < UNCHANGED, 0, size), number, kept) * _chance_in_top(score, number, kept)
    told = (number > 0) & ~(kept & np.isnan(size + score)).any(1)
    return np.divide(both.sum(1), number, out=np.full(len(number), np.nan), where=told)


def sign_agreement(
    predicted_change: Float[np.ndarray, "condition gene"],
    observed_change: Float[np.ndarray, "condition gene"],
    differential: Bool[np.ndarray, "condition gene"],
    edited: Sequence[Sequence[int]] | None = None,
) -> Float[np.ndarray, " condition"]:
    """Return the share of differential genes whose change is predicted in the direction observed.

    A predicted change of none counts half, as a guess would: Σ_g (1 + sign Δ̂_g sign Δ_g) / 2 over the genes that ``differential_genes``
    finds, divided by their number. NaN where there are none, or where a prediction of one is NaN.

    >>> change, all_three = np.array([[0.4, -0.2, 0.3]]), np.array([[True, True, True]])
    >>> sign_agreement(np.array([[0.1, 0.3, 0.0]]), change, all_three)
    array([0.5])
    """
    counted = differential & _kept(differential.shape, edited)
    predicted = np.where(np.abs(predicted_change) < UNCHANGED, 0, np.sign(predicted_change))
    right = np.where(counted, (1 + predicted * np.sign(observed_change)) / 2, 0).sum(1)
    number = counted.sum(1)
    return np.divide(right, number, out=np.full(len(number), np.nan), where=number > 0)


def _kept(shape: tuple[int, ...], edited: Sequence[Sequence[int]] | None) -> Bool[np.ndarray, "condition gene"]:
    """Return which genes of each condition are not edited in it."""
    kept = np.ones(shape, dtype=bool)
    for row, genes in zip(kept, edited or [()] * len(kept), strict=True):
        row[list(genes)] = False
    return kept


def _chance_in_top(
    size: Float[np.ndarray, "condition gene"], n: Int[np.ndarray, " condition"], kept: Bool[np.ndarray, "condition gene"]
) -> Float[np.ndarray, "condition gene"]:
    """Return the chance of each gene to be among the n largest that are kept, if ties are broken at random."""
    size = np.where(kept, size, -np.inf)
    least = np.take_along_axis(-np.sort(-size, 1), (n[:, None] - 1).clip(0), 1)  # that still has a place
    above, tied = size > least, size == least
    return above + tied * (n - above.sum(1))[:, None] / tied.sum(1, keepdims=True).clip(1)
