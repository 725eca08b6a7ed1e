"""How near a predicted distribution is to what was observed: intervals and draws of means, and sets of cells.

Values are of log(1 + count), natural logarithm. Draws are of what is observed: for the mean over the cells of a condition they hold the
noise of sampling these cells, not the uncertainty of the expected mean alone. What cannot be told is NaN.
"""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.settings import check_seed, check_whole, is_within
from perturbprob.measurement.distances import default_bandwidth, default_blur, energy, mmd, sinkhorn


def coverage(
    points: Float[np.ndarray, "draw condition gene"], observed: Float[np.ndarray, "condition gene"], level: float
) -> Float[np.ndarray, " condition"]:
    """Return the share of genes whose observed value lies in the central interval of that level, ends included.

    The interval runs between the quantiles (1 − level) / 2 and (1 + level) / 2 of the draws, each at place q (draws + 1) of the draws in
    order (numpy's "weibull"; Hyndman and Fan 1996, type 6). So an observation that is one more draw of the same law is covered with
    probability ``level`` at any number of draws, exactly where these places are whole; numpy's default would cover about
    level · (draws − 1) / (draws + 1). NaN with fewer than (1 + level) / (1 − level) draws, 19 for 0.9, from which no interval of that
    level can be read, and where a value is NaN. Raises ValueError for a level outside (0, 1).

    >>> points = np.arange(99.0).reshape(99, 1, 1) * np.ones(4)
    >>> coverage(points, np.array([[49.0, 5.0, 3.0, 98.0]]), 0.9)
    array([0.5])
    """
    if not is_within(level, 0, 1):
        raise ValueError(f"level must lie between 0 and 1, and is {level!r}: pass 0.9 for intervals of 90 %.")
    tail = (1 - level) / 2
    if (len(points) + 1) * tail < 1 - 1e-9:
        return np.full(len(observed), np.nan)

    def covered(draws: Float[np.ndarray, "draw gene"], value: Float[np.ndarray, " gene"]) -> float:
        """The share of one condition."""
        low, high = np.quantile(draws, [tail, 1 - tail], axis=0, method="weibull")
        return float(np.where(np.isnan(low + high + value), np.nan, (low <= value) & (value <= high)).mean())

    return np.array([covered(points[:, k], observed[k]) for k in range(len(observed))])


def crps(
    points: Float[np.ndarray, "draw condition gene"], observed: Float[np.ndarray, "condition gene"]
) -> Float[np.ndarray, " condition"]:
    """Return the continuous ranked probability score of independent draws, the mean over genes: E abs(X − y) − ½ E abs(X − X').

    In the units of the values; of a single certain value it is the absolute error, and less is better. The fair estimate of Ferro (2014)
    from n draws: pairs of a draw with itself are left out,

        ½ E abs(X − X') = Σ_{i<j} abs(x_i − x_j) / (n (n − 1)) = Σ_i (2 i − n − 1) x_(i) / (n (n − 1)),    x_(1) ≤ … ≤ x_(n),

    so the score does not depend on n on average, and may be negative for one gene. Points that are spread evenly over quantiles are not
    independent draws, and score too well by it. One draw has none (NaN).

    >>> crps(np.array([[[1.0]], [[3.0]]]), np.array([[2.5]])), crps(np.ones((2, 1, 1)), np.array([[2.5]]))
    (array([0.]), array([1.5]))
    """
    n = len(points)
    if n < 2:
        return np.full(len(observed), np.nan)
    weight = (2 * np.arange(1.0, n + 1) - n - 1) / (n * (n - 1))

    def score(draws: Float[np.ndarray, "draw gene"], value: Float[np.ndarray, " gene"]) -> float:
        """The score of one condition; draws are taken about what was observed, against cancellation."""
        errors = np.sort(draws.astype(np.float64) - value, axis=0)
        return float((np.abs(errors).mean(0) - weight @ errors).mean())

    return np.array([score(points[:, k], observed[k]) for k in range(len(observed))])


def cell_distances(
    predicted_cells: Float[np.ndarray, "cell gene"],
    observed_cells: Float[np.ndarray, "other_cell gene"],
    *,
    at_most: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """Return how far predicted cells of a condition are from observed ones, as a whole; values (cell, gene) are log(1 + count).

    - ``energy``: the Euclidean E-distance 2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖, unbiased; in natural-log units.
    - ``mmd``: squared maximum mean discrepancy of the Gaussian kernel exp(−‖x − y‖² / (2 h²)), unbiased; h is the median distance between
      two observed cells that differ (``default_bandwidth``).
    - ``sinkhorn``: entropic transport at the cost ‖x − y‖² / 2 between halves of either set; in squared natural-log units. With
      blur² a tenth of the standard deviation of the cost over pairs of observed cells (``default_blur``), it is

          mean over i, j of OT(x_i, y_j) − OT(x_1, x_2) / 2 − OT(y_1, y_2) / 2,    halves x_1, x_2 and y_1, y_2 of equal number.

    Equations and sources stand at ``perturbprob.measurement.distances``. The Sinkhorn divergence itself compares each set with itself,
    at no cost where the blur is small; of hundreds of cells and genes it then measures mostly how few the cells are, and prefers a
    prediction without any spread to other cells of the same condition. Between halves there is no such gain.

    All three are 0 on average for independent cells of one law, and may be negative; cells that were predicted from the observed ones
    are not independent, and far below 0. Bandwidth and blur come from the observed cells alone, so that all predictions of a condition
    are measured by one yardstick. Of more than ``at_most`` cells, as many are drawn by ``seed``, which also splits the halves: the same
    observed ones whatever is predicted. NaN with fewer than two cells on either side.

    Raises ValueError for ``at_most`` below 2, a seed that is none, different numbers of genes, NaN and infinity.

    >>> rng = np.random.default_rng(0)
    >>> found = cell_distances(rng.normal(1, 1, (60, 3)), rng.normal(0, 1, (80, 3)))
    >>> {name: round(value, 1) for name, value in found.items()}
    {'energy': 1.3, 'mmd': 0.3, 'sinkhorn': 1.8}
    """
    check_whole(2, at_most=at_most)
    check_seed(seed)
    if min(len(predicted_cells), len(observed_cells)) < 2:
        return dict.fromkeys(("energy", "mmd", "sinkhorn"), float("nan"))
    x, y = (_shuffled(cells, at_most, [seed, side]) for side, cells in enumerate((predicted_cells, observed_cells)))
    return {
        "energy": float(energy(x, y, unbiased=True)),
        "mmd": float(mmd(x, y, bandwidth=default_bandwidth(y, y), unbiased=True)),
        "sinkhorn": _sinkhorn_between_halves(x, y, default_blur(y, y)),
    }


def _shuffled(cells: Float[np.ndarray, "cell gene"], at_most: int, seed: list[int]) -> Float[Tensor, "some gene"]:
    """Return at most so many of the cells, in random order and float64."""
    order = np.random.default_rng(seed).permutation(len(cells))[:at_most]
    return torch.from_numpy(cells[order].astype(np.float64))


def _sinkhorn_between_halves(x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"], blur: float) -> float:
    """Return the mean divergence of a half of x from a half of y, less that within each: OT of a half with itself cancels."""
    m = min(len(x), len(y)) // 2
    # of costs, a thousandth of the mass in the wrong place is far below what a draw of cells moves
    divergence = partial(sinkhorn, blur=blur, tolerance=1e-3)
    (a, b), (c, d) = ((cells[:m], cells[m : 2 * m]) for cells in (x, y))
    between = [divergence(here, there) for here in (a, b) for there in (c, d)]
    return float(sum(between) / 4 - (divergence(a, b) + divergence(c, d)) / 2)
