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
    predicted: Float[np.ndarray, "condition gene"],
    observed: Float[np.ndarray, "condition gene"],
    reference: Float[np.ndarray, "condition gene"],
) -> Float[np.ndarray, " condition"]:
    """Return Pearson's correlation over genes of predicted and observed change from an observed reference, such as control.

    NaN where the reference is, or where either does not change.

    >>> direction(np.array([[1.0, 2.0, 4.0]]), np.array([[2.0, 4.0, 8.0]]), np.zeros((1, 3))).round(6)
    array([1.])
    """
    a, b = (part - reference for part in (predicted, observed))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)


def discrimination(
    predicted: Float[np.ndarray, "condition gene"],
    observed: Float[np.ndarray, "condition gene"],
    edited: Sequence[Sequence[int]] | None = None,
) -> Float[np.ndarray, " condition"]:
    """Return the share of the other conditions whose observed mean is further from the prediction than the condition's own.

    1 where the prediction is nearest to what it predicts, 0.5 for a prediction that does not know which condition it is for; ties count
    half, and one condition alone has none (NaN). Distances are sums over genes of absolute differences, without the genes that were
    ``edited`` in the condition, whose numbers are given: the name of a target should not be enough.

    >>> observed = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    >>> discrimination(observed + 0.1, observed)
    array([1., 1., 1.])
    """
    n = len(observed)
    found = np.full(n, np.nan)
    for k in range(n if n > 1 else 0):
        apart = np.abs(predicted[k] - observed)
        apart[:, list(edited[k]) if edited is not None else []] = 0
        distance = apart.sum(1)
        others = np.delete(distance, k)
        found[k] = ((others > distance[k]) + 0.5 * (others == distance[k])).mean()
    return found
