"""How near predicted means of conditions are to observed ones: error, direction, discrimination. Units are conditions, never cells."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def mean_square_error(
    predicted: Float[np.ndarray, "condition gene"], observed: Float[np.ndarray, "condition gene"]
) -> Float[np.ndarray, " condition"]:
    """Return the mean over genes of the square of predicted minus observed.

    >>> mean_square_error(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
    array([2.])
    """
    return np.square(predicted - observed).mean(1)


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
    kept = np.ones(observed.shape, dtype=bool)
    for row, genes in zip(kept, edited or [()] * n, strict=True):
        row[list(genes)] = False
    found = np.full(n, np.nan)
    for k in range(n if n > 1 else 0):
        both = kept & kept[k]
        gain = (both * (np.abs(predicted[k] - observed) - np.abs(predicted[k] - observed[k]))).sum(1)
        found[k] = np.delete((gain > 0) + 0.5 * (gain == 0), k).mean()
    return found
