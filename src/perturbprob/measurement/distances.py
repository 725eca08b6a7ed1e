"""Distances between two sets of cells of different size, eq 23: what training on paths minimises.

===================  ========================  =================  ==================================================
name                 sees                      cost               choose it for
===================  ========================  =================  ==================================================
``moment``           means and variances       cells × genes      a start
``energy``           the whole law             cells² × genes     training: nothing to tune
``mmd``              what the bandwidth sees   cells² × genes     a bounded kernel, which stray cells move little
``sinkhorn``         the whole law, geometry   cells² × rounds    how far the mass moves; needs a ``blur``
``random_matching``  means; rewards no spread  cells × genes      comparison with models trained on it, nothing else
===================  ========================  =================  ==================================================

All are computed in float64, returned in the precision of the cells, and differentiable once, in cells and positive weights.
``x_weights`` and ``y_weights`` weigh the cells of either set, by default all alike; they need not sum to 1, and a cell of weight 0
counts for nothing. Pairs of cells are taken in blocks, forward and backward, so that memory grows with the cells and not with the
pairs.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.measurement.pairs import CellSet, Pairs, checked, mean_over_pairs, squared_distances

Distance = Callable[[Float[Tensor, "cell gene"], Float[Tensor, "other_cell gene"]], Float[Tensor, ""]]
"""Two sets of cells to a number, zero where the sets are equal."""

BLUR_SHARE = 0.1
"""blur² of ``sinkhorn`` without a ``blur``, as a share of the standard deviation of the cost over pairs of cells."""

MEDIAN_CELLS = 1000
"""How many cells of each set, evenly spaced in their order, the median of ``default_bandwidth`` is taken over at most."""


def moment(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
) -> Float[Tensor, ""]:
    """Squared Euclidean distance between the means plus that between the variances of the genes.

    ‖mean(x) − mean(y)‖² + ‖var(x) − var(y)‖², with sums over genes and var = mean of squares about the mean (divided by the number
    of cells), after "low order moments" in appendix B.3. Blind to covariances and to all moments above the second. Raises a
    ValueError for different numbers of genes, an empty set, NaN and infinity, and for weights that are negative, not finite, all 0
    or not one for each cell.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> moment(x, x + torch.tensor([3.0, 0.0])), moment(x, torch.ones(3, 2))
    (tensor(9.), tensor(1.))
    """
    left, right = checked(x, y, x_weights, y_weights)
    means, variances = left.mean() - right.mean(), left.variance() - right.variance()
    return (means.square().sum() + variances.square().sum()).to(x.dtype)


def energy(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
    exponent: float = 1.0,
    unbiased: bool = False,
) -> Float[Tensor, ""]:
    """Energy distance 2 E‖X − Y‖^a − E‖X − X'‖^a − E‖Y − Y'‖^a, with the Euclidean norm and a = ``exponent``.

    Székely and Rizzo (2013). For 0 < a < 2 it is zero only where both laws are equal. The default a = 1 is the Euclidean E-distance.
    The squared-Euclidean E-distance, a = 2, as of Peidli et al. (2024), is twice the squared
    distance between means and sees nothing else: do not train on it. By default the mean runs over all pairs, a cell with itself too
    (V-statistic: never negative, zero for identical sets); ``unbiased=True`` leaves a cell's pair with itself out (U-statistic: right
    on average at any number of cells, may be negative). Where two cells coincide, the gradient of their distance is zero.

    Errors as for ``moment``; also a ValueError for an exponent outside (0, 2], and for
    fewer than two cells of positive weight with ``unbiased=True``.

    >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    >>> energy(x, y), energy(x, y, exponent=2.0), energy(x, y, x_weights=torch.tensor([1.0, 0.0]))
    (tensor(1.), tensor(0.), tensor(2.))
    """
    if not 0 < exponent <= 2:
        raise ValueError(f"exponent must be above 0 and at most 2, and is {exponent}: pass 1.0, the Euclidean energy distance.")
    left, right = checked(x, y, x_weights, y_weights)
    return _discrepancy(lambda squares: -_power(squares, exponent), left, right, 0.0, unbiased).to(x.dtype)


def mmd(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
    bandwidth: float | None = None,
    unbiased: bool = False,
) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy E k(X, X') + E k(Y, Y') − 2 E k(X, Y) of the Gaussian kernel.

    k(x, y) = exp(−‖x − y‖² / (2 ``bandwidth``²)), Gretton et al. (2012); it lies between 0 and 2, and is zero only where both laws are
    equal. ``bandwidth`` is a length in the unit of x: differences much finer or much coarser than that are hardly seen. Without it,
    ``default_bandwidth(x, y)`` is taken anew at each call and held constant in the gradient; fix it to compare.
    By default the mean runs over all pairs, a cell with itself too (the biased V-statistic MMD_b²: never negative, zero for identical
    sets); ``unbiased=True`` leaves a cell's pair with itself out (the U-statistic MMD_u²: right on average, may be negative).

    Errors as for ``moment``; also a ValueError for a bandwidth that is not positive, and for
    fewer than two cells of positive weight with ``unbiased=True``.

    >>> x, y = torch.zeros(3, 1), torch.full((2, 1), 2.0)
    >>> mmd(x, y, bandwidth=2.0), mmd(x, x)
    (tensor(0.7869), tensor(0.))
    """
    left, right = checked(x, y, x_weights, y_weights)
    width = _median_distance(left, right) if bandwidth is None else bandwidth
    if not 0 < width < math.inf:
        raise ValueError(f"bandwidth must be a positive length, and is {width}: leave it out, or start from default_bandwidth(x, y).")
    return _discrepancy(lambda squares: torch.exp(-squares / (2 * width**2)), left, right, 1.0, unbiased).to(x.dtype)


def default_bandwidth(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
) -> float:
    """Return the ``bandwidth`` that ``mmd`` takes by itself: the median heuristic.

    The (weighted, lower) median of ‖x_i − y_j‖ over the pairs of a cell of x with a cell of y that do not coincide; 1 where all do.
    Pairs within a set are left out, so that it depends on the two laws and not on how many cells each has. Of sets of more than 1,000
    cells, 1,000 evenly spaced ones are taken. Errors as for ``moment``.

    >>> default_bandwidth(torch.zeros(2, 1), torch.tensor([[1.0], [3.0], [4.0]]))
    3.0
    """
    return _median_distance(*checked(x, y, x_weights, y_weights))


def random_matching(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Mean squared Euclidean distance of pairs matched at random, the heuristic of Roohani et al. (2022): for comparison.

    There are as many pairs as cells in the larger set, each of which is in one pair; the cells of the smaller set are in as many pairs as
    each other, or one more. With weights w_i a cell is in ⌊n w_i⌋ or ⌈n w_i⌉ of the n pairs, n w_i on average. The same ``seed``
    gives the same pairs; the user's own random state is left alone. On average over seeds it is
    Σ_ij w_i v_j ‖x_i − y_j‖² = ‖mean(x) − mean(y)‖² + total variance of x + total variance of y. So it is not zero for identical
    sets, and least where x has no spread at all: it is no objective to train on, and not among ``DISTANCES``. Errors as for ``moment``.

    >>> random_matching(torch.tensor([[1.0], [1.0]]), torch.tensor([[4.0]]))
    tensor(9.)
    """
    left, right = checked(x, y, x_weights, y_weights)
    generator, n_pairs = torch.Generator().manual_seed(seed), max(len(x), len(y))
    here, there = (_dealt(cells, n_pairs, generator) for cells in (left, right))
    return (left.values[here] - right.values[there]).square().sum(1).mean().to(x.dtype)


def sinkhorn(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
    blur: float | None = None,
    n_iterations: int = 2000,
    tolerance: float = 1e-6,
) -> Float[Tensor, ""]:
    """Debiased Sinkhorn divergence, OT(x, y) − OT(x, x) / 2 − OT(y, y) / 2, of the cost ‖x − y‖² / 2.

    OT(x, y) = min over P of Σ P_ij ‖x_i − y_j‖² / 2 + ε KL(P ‖ w vᵀ), where ε = ``blur``² and the rows and columns of P sum to the
    weights w and v of the cells (Feydy et al. 2019). As ``blur`` → 0 it becomes half the squared Wasserstein distance, as ``blur`` → ∞ half
    the squared distance between means. ``blur`` is a length in the unit of x: what is nearer than that counts as one place. Without
    it, ``default_blur(x, y)`` is taken anew at each call and held constant in the gradient; fix it to compare or to train.

    ``tolerance`` bounds the mass in the wrong place, as a share, at which the iteration stops; it warns where ``n_iterations`` do not
    suffice, as happens where each cell of x lies beside its own partner in y. The gradient follows from the envelope theorem; second
    derivatives are not those of the divergence. Costs of sets too large for one block are computed again in each round.

    Errors as for ``moment``; also a ValueError for a blur that is not positive.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> sinkhorn(x, x + torch.tensor([0.0, 2.0]), blur=0.1)
    tensor(2.)
    """
    left, right = checked(x, y, x_weights, y_weights)
    blur = _cost_scale(left, right) if blur is None else blur
    if not 0 < blur < math.inf:
        raise ValueError(f"blur must be a positive length, and is {blur}: leave it out, or start from default_blur(x, y).")

    # a shift of a set changes OT by the distance between means alone, so each set is centred: faster, and exact in the shift
    shift = (left.mean() - right.mean()).square().sum() / 2
    left, right = left.centred(), right.centred()
    solver = _Solver(blur**2, n_iterations, tolerance)
    within, _ = solver.transport(left, left)
    other_within, potential = solver.transport(right, right)
    # sets that are nearly alike, as late in training, have nearly this potential between them too
    between, _ = solver.transport(left, right, potential)
    return (shift + between - (within + other_within) / 2).to(x.dtype)


def default_blur(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    x_weights: Float[Tensor, " cell"] | None = None,
    y_weights: Float[Tensor, " other_cell"] | None = None,
) -> float:
    """Return the ``blur`` that ``sinkhorn`` takes by itself, from the scale of the data.

    √(0.1 sd(‖x_i − y_j‖² / 2)), with the standard deviation over all pairs of cells after each set is centred. It scales with the
    data, does not depend on how far apart the sets are, and, unlike a share of the mean cost, stays below the
    differences between pairs when there are many genes, where all distances are nearly alike. Errors as for ``moment``.

    >>> round(default_blur(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [7.0]])), 4)
    0.3162
    """
    return _cost_scale(*checked(x, y, x_weights, y_weights))


DISTANCES: dict[str, Distance] = {"moment": moment, "energy": energy, "sinkhorn": sinkhorn, "mmd": mmd}
"""The distances by name that a model can be trained on."""


def _discrepancy(kernel: Callable[[Tensor], Tensor], x: CellSet, y: CellSet, of_coincident: float, unbiased: bool) -> Float[Tensor, ""]:
    """E k(X, X') + E k(Y, Y') − 2 E k(X, Y) of a kernel of squared distances; ``unbiased`` leaves a cell's pair with itself out."""
    for name, cells in (("x", x), ("y", y)) if unbiased else ():
        if (n := int((cells.weights > 0).sum())) < 2:
            found = f"{name} has {n} cell{'s' if n != 1 else ''}"
            raise ValueError(f"{found} of positive weight, and unbiased=True needs two: pass unbiased=False.")

    def within(cells: CellSet) -> Tensor:
        mean, itself = mean_over_pairs(kernel, cells, cells), cells.repeated()
        return (mean - of_coincident * itself) / (1 - itself) if unbiased else mean

    return within(x) + within(y) - 2 * mean_over_pairs(kernel, x, y)


def _power(squares: Float[Tensor, "cell other_cell"], exponent: float) -> Float[Tensor, "cell other_cell"]:
    """Euclidean distances to a power, of gradient zero where two cells coincide."""
    apart = squares > 0
    # the inner choice keeps the infinite slope of a root at zero out of the gradient, where it would become NaN
    return torch.where(apart, torch.where(apart, squares, 1.0) ** (exponent / 2), 0.0)


@torch.no_grad()
def _median_distance(x: CellSet, y: CellSet) -> float:
    """Median distance over pairs that do not coincide; see ``default_bandwidth``."""
    there = [cells.weights.nonzero().ravel() for cells in (x, y)]
    left, right = (index[torch.linspace(0, len(index) - 1, min(len(index), MEDIAN_CELLS)).long()] for index in there)
    pairs = Pairs(x.values[left], y.values[right])
    squares = squared_distances(pairs.x, pairs.y).ravel()
    weights = torch.where(squares > 0, torch.outer(x.weights[left], y.weights[right]).ravel(), 0.0)
    if not weights.any():
        return 1.0
    squares, order = squares.sort()
    total = weights[order].cumsum(0)
    # rounding must not decide between the two middle ones
    return math.sqrt(float(squares[torch.searchsorted(total, 0.5 * (1 - 1e-9) * total[-1])]))


def _dealt(cells: CellSet, n_pairs: int, generator: torch.Generator) -> Tensor:
    """Deal cells to pairs by their weights: systematic resampling, in random order."""
    ends = cells.weights.detach().cpu().cumsum(0)
    ticks = (torch.arange(n_pairs) + torch.rand((), dtype=torch.double, generator=generator)) / n_pairs
    dealt = torch.searchsorted(ends / ends[-1], ticks, right=True).clamp(max=len(cells) - 1)
    return dealt[torch.randperm(n_pairs, generator=generator)].to(cells.values.device)


@torch.no_grad()
def _cost_scale(x: CellSet, y: CellSet) -> float:
    """Blur from the spread of the cost over pairs; see ``default_blur``."""
    left, right = x.centred(), y.centred()
    mean = mean_over_pairs(lambda squares: squares / 2, left, right)
    deviation = float(mean_over_pairs(lambda squares: (squares / 2 - mean).square(), left, right).sqrt())
    largest = float(x.values.square().sum(1).max() + y.values.square().sum(1).max())
    return math.sqrt(max(BLUR_SHARE * deviation, torch.finfo(torch.double).eps * largest, torch.finfo(torch.double).tiny))


@final
@dataclass(frozen=True)
class _Solver:
    """Entropic optimal transport at one ε."""

    epsilon: float
    n_iterations: int
    tolerance: float

    def transport(
        self, x: CellSet, y: CellSet, start: Float[Tensor, " other_cell"] | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " other_cell"]]:
        """Cost, as the semi-dual Σ_i w_i softmin_j(C_ij − g_j) + Σ_j v_j g_j at its maximum in g, and the potential g.

        There its slope in g is zero, so with g held constant the gradient in C is the plan: the envelope theorem.
        """
        pairs = Pairs(x.values, y.values)
        step = partial(self.symmetric_round if x is y else self.round, pairs, x.weights, y.weights)
        potential = self.fixed_point(step, y.values.new_zeros(len(y)) if start is None else start, y.weights)
        return x.weights @ pairs.rows(self.soft_min, potential, y.weights) + y.weights @ potential, potential

    @torch.no_grad()
    def fixed_point(
        self, step: Callable[[Tensor], Tensor], potential: Float[Tensor, " other_cell"], weights: Float[Tensor, " other_cell"]
    ) -> Float[Tensor, " other_cell"]:
        """Iterate the potential of the columns until a step moves less than ``tolerance`` of the mass."""
        for _ in range(self.n_iterations):
            previous, potential = potential, step(potential)
            if weights @ torch.expm1((previous - potential) / self.epsilon).abs() < self.tolerance:
                return potential
        # no number that changes from call to call, so that Python shows it once
        warnings.warn(
            f"The Sinkhorn iteration did not reach tolerance={self.tolerance:g} in n_iterations={self.n_iterations}, so the distance and "
            "its gradient are approximate: pass a larger blur, or more n_iterations.",
            stacklevel=5,
        )
        return potential

    def round(self, pairs: Pairs, x_weights: Tensor, y_weights: Tensor, potential: Tensor) -> Float[Tensor, " other_cell"]:
        """One round of Sinkhorn: rows, then columns."""
        return pairs.columns(self.soft_min, pairs.rows(self.soft_min, potential, y_weights), x_weights)

    def symmetric_round(self, pairs: Pairs, _: Tensor, weights: Tensor, potential: Tensor) -> Float[Tensor, " cell"]:
        """Half a round for a set against itself, averaged: rows and columns share one potential, and the error at least halves."""
        return (potential + pairs.rows(self.soft_min, potential, weights)) / 2

    def soft_min(
        self, squares: Float[Tensor, "row column"], potential: Float[Tensor, " column"], weights: Float[Tensor, " column"]
    ) -> Float[Tensor, " row"]:
        """−ε log Σ_j v_j exp((g_j − C_ij) / ε), with C half the squared distances."""
        there = weights > 0  # log 0 has no slope, and its NaN would spread
        shift = potential / self.epsilon + torch.where(there, torch.where(there, weights, 1.0).log(), -math.inf)
        return -self.epsilon * torch.logsumexp(shift - squares / (2 * self.epsilon), 1)
