"""Distances between two sets of cells of different size, eq 23: what training on paths minimises.

=============  ==========================  ==================  =============================================
name           sees                        cost                choose it for
=============  ==========================  ==================  =============================================
``moment``     means and variances         cells × genes       a start, or sets too large for pairs
``energy``     the whole law               cells² × genes      training: nothing to tune
``sinkhorn``   the whole law, geometry     cells² × rounds     how far the mass moves; needs a ``blur``
=============  ==========================  ==================  =============================================

All are computed in float64, returned in the precision of the cells, and differentiable once.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Distance = Callable[[Float[Tensor, "cell gene"], Float[Tensor, "other_cell gene"]], Float[Tensor, ""]]
"""Two sets of cells to a number, zero where the sets are equal."""

BLUR_SHARE = 0.1
"""blur² of ``sinkhorn`` without a ``blur``, as a share of the standard deviation of the cost over pairs of cells."""

COINCIDENT = 1e-13
"""Cells are at one point where their squared distance is below this share of their squared lengths: there it is rounding."""


def moment(x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"]) -> Float[Tensor, ""]:
    """Squared Euclidean distance between the means plus that between the variances of the genes.

    ‖mean(x) − mean(y)‖² + ‖var(x) − var(y)‖², with sums over genes and var = mean of squares about the mean (divided by the number
    of cells), after "low order moments" in appendix B.3. Blind to covariances and to all moments above the second. Raises a
    ValueError for different numbers of genes, an empty set, NaN and infinity.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> moment(x, x + torch.tensor([3.0, 0.0])), moment(x, torch.ones(3, 2))
    (tensor(9.), tensor(1.))
    """
    left, right = _checked(x, y)
    means = (left.mean(0) - right.mean(0)).square().sum()
    variances = (left.var(0, correction=0) - right.var(0, correction=0)).square().sum()
    return (means + variances).to(x.dtype)


def energy(
    x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"], *, exponent: float = 1.0, unbiased: bool = False
) -> Float[Tensor, ""]:
    """Energy distance 2 E‖X − Y‖^a − E‖X − X'‖^a − E‖Y − Y'‖^a, with the Euclidean norm and a = ``exponent``.

    Székely and Rizzo (2013). For 0 < a < 2 it is zero only where both laws are equal. The squared variant, a = 2, is twice the squared
    distance between means and sees nothing else: do not train on it. By default the mean runs over all pairs, a cell with itself too
    (V-statistic: never negative, zero for identical sets); ``unbiased=True`` leaves a cell's pair with itself out (U-statistic: right
    on average at any number of cells, may be negative). Where two cells coincide, the gradient of their distance is zero.

    Raises a ValueError for different numbers of genes, an empty set, NaN and infinity, an exponent outside (0, 2], and for
    fewer than two cells with ``unbiased=True``.

    >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    >>> energy(x, y), energy(x, y, exponent=2.0)
    (tensor(1.), tensor(0.))
    """
    if not 0 < exponent <= 2:
        raise ValueError(f"exponent must be above 0 and at most 2, and is {exponent}: pass 1.0, the Euclidean energy distance.")
    left, right = _checked(x, y)
    if unbiased and min(len(left), len(right)) < 2:
        raise ValueError(f"x has {len(left)} and y {len(right)} cells, and unbiased=True needs two of each: pass unbiased=False.")
    between = _powers(left, right, exponent).mean()
    within = _within(left, exponent, unbiased) + _within(right, exponent, unbiased)
    return (2 * between - within).to(x.dtype)


def sinkhorn(
    x: Float[Tensor, "cell gene"],
    y: Float[Tensor, "other_cell gene"],
    *,
    blur: float | None = None,
    n_iterations: int = 2000,
    tolerance: float = 1e-6,
) -> Float[Tensor, ""]:
    """Debiased Sinkhorn divergence, OT(x, y) − OT(x, x) / 2 − OT(y, y) / 2, of the cost ‖x − y‖² / 2.

    OT(x, y) = min over P of Σ P_ij ‖x_i − y_j‖² / 2 + ε KL(P ‖ uniform), where ε = ``blur``² and the rows and columns of P weigh all
    cells of a set alike (Feydy et al. 2019). As ``blur`` → 0 it becomes half the squared Wasserstein distance, as ``blur`` → ∞ half
    the squared distance between means. ``blur`` is a length in the unit of x: what is nearer than that counts as one place. Without
    it, ``default_blur(x, y)`` is taken anew at each call and held constant in the gradient; fix it to compare or to train.

    ``tolerance`` bounds the mass in the wrong place, as a share, at which the iteration stops; it warns where ``n_iterations`` do not
    suffice, as happens where each cell of x lies beside its own partner in y. The gradient follows from the envelope theorem; second
    derivatives are not those of the divergence.

    Raises a ValueError for different numbers of genes, an empty set, NaN and infinity, and a blur that is not positive.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> sinkhorn(x, x + torch.tensor([0.0, 2.0]), blur=0.1)
    tensor(2.)
    """
    left, right = _checked(x, y)
    blur = default_blur(x, y) if blur is None else blur
    if not 0 < blur < math.inf:
        raise ValueError(f"blur must be a positive length, and is {blur}: leave it out, or start from default_blur(x, y).")

    # a shift of a set changes OT by the distance between means alone, so each set is centred: faster, and exact in the shift
    shift = (left.mean(0) - right.mean(0)).square().sum() / 2
    left, right = _centred(left), _centred(right)
    solver = _Solver(blur**2, n_iterations, tolerance)
    within, _ = solver.transport(left, left)
    other_within, potential = solver.transport(right, right)
    # sets that are nearly alike, as late in training, have nearly this potential between them too
    between, _ = solver.transport(left, right, potential)
    return (shift + between - (within + other_within) / 2).to(x.dtype)


def default_blur(x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"]) -> float:
    """Return the ``blur`` that ``sinkhorn`` takes by itself, from the scale of the data.

    √(0.1 sd(‖x_i − y_j‖² / 2)), with the standard deviation over all pairs of cells after each set is centred. It scales with the
    data, does not depend on how far apart the sets are, and, unlike a share of the mean cost, stays below the
    differences between pairs when there are many genes, where all distances are nearly alike. Errors as for ``moment``.

    >>> round(default_blur(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [7.0]])), 4)
    0.3162
    """
    left, right = _checked(x.detach(), y.detach())
    deviation = float((_squared_distances(_centred(left), _centred(right)) / 2).std(correction=0))
    rounding = torch.finfo(left.dtype).eps * float(left.square().sum(1).max() + right.square().sum(1).max())
    return math.sqrt(max(BLUR_SHARE * deviation, rounding, torch.finfo(left.dtype).tiny))


DISTANCES: dict[str, Distance] = {"moment": moment, "energy": energy, "sinkhorn": sinkhorn}
"""The distances by name."""


def _checked(
    x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"]
) -> tuple[Float[Tensor, "cell gene"], Float[Tensor, "other_cell gene"]]:
    """Both sets in float64, if they can be compared."""
    _check("x", x)
    _check("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} genes and y has {y.shape[1]}: give both the same genes in the same order.")
    return x.double(), y.double()


def _check(name: str, cells: Float[Tensor, "cell gene"]) -> None:
    """Raise unless this is a set of cells."""
    if cells.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(cells.shape)}: give a set of cells as a tensor (cell, gene).")
    if 0 in cells.shape:
        raise ValueError(f"{name} is empty, with shape {tuple(cells.shape)}: give at least one cell and one gene.")
    bad = (~cells.detach().isfinite()).nonzero()
    if len(bad):
        cell, gene = bad[0].tolist()
        raise ValueError(
            f"{name} holds NaN or infinity in {len(bad)} places, the first in cell {cell}, gene {gene} (counted from 0): "
            "leave these cells or genes out of both sets."
        )


def _centred(cells: Float[Tensor, "cell gene"]) -> Float[Tensor, "cell gene"]:
    """Cells about their mean."""
    return cells - cells.mean(0)


def _squared_distances(x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"]) -> Float[Tensor, "cell other_cell"]:
    """Squared Euclidean distances, exactly zero where two cells coincide."""
    # one matrix product, several times faster than differences over many genes; about a common centre, against cancellation
    centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
    x, y = x - centre, y - centre
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = lengths - 2 * x @ y.T
    return torch.where(squares > COINCIDENT * lengths, squares, 0.0)


def _powers(x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"], exponent: float) -> Float[Tensor, "cell other_cell"]:
    """Euclidean distances to a power, of gradient zero where two cells coincide."""
    squares = _squared_distances(x, y)
    apart = squares > 0
    # the inner choice keeps the infinite slope of a root at zero out of the gradient, where it would become NaN
    return torch.where(apart, torch.where(apart, squares, 1.0) ** (exponent / 2), 0.0)


def _within(x: Float[Tensor, "cell gene"], exponent: float, unbiased: bool) -> Float[Tensor, ""]:
    """Mean distance between the cells of a set, with or without each to itself."""
    return _powers(x, x, exponent).sum() / (len(x) * (len(x) - unbiased))


@final
@dataclass(frozen=True)
class _Solver:
    """Entropic optimal transport at one ε."""

    epsilon: float
    n_iterations: int
    tolerance: float

    def transport(
        self, x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"], start: Float[Tensor, " other_cell"] | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " other_cell"]]:
        """Cost, as the semi-dual mean_i softmin_j(C_ij − g_j) + mean_j g_j at its maximum in g, and the potential g.

        There its slope in g is zero, so with g held constant the gradient in C is the plan: the envelope theorem.
        """
        cost = _squared_distances(x, y) / 2
        start = y.new_zeros(len(y)) if start is None else start
        potential = self.fixed_point(self.symmetric_round if x is y else self.round, cost.detach(), start)
        return self.soft_min(cost - potential, 1).mean() + potential.mean(), potential

    @torch.no_grad()
    def fixed_point(
        self, step: Callable[[Tensor, Tensor], Tensor], cost: Float[Tensor, "cell other_cell"], potential: Float[Tensor, " other_cell"]
    ) -> Float[Tensor, " other_cell"]:
        """Iterate the potential of the columns until a step moves less than ``tolerance`` of the mass."""
        for _ in range(self.n_iterations):
            previous, potential = potential, step(cost, potential)
            if torch.expm1((previous - potential) / self.epsilon).abs().mean() < self.tolerance:
                return potential
        # no number that changes from call to call, so that Python shows it once
        warnings.warn(
            f"The Sinkhorn iteration did not reach tolerance={self.tolerance:g} in n_iterations={self.n_iterations}, so the distance and "
            "its gradient are approximate: pass a larger blur, or more n_iterations.",
            stacklevel=5,
        )
        return potential

    def round(self, cost: Float[Tensor, "cell other_cell"], potential: Float[Tensor, " other_cell"]) -> Float[Tensor, " other_cell"]:
        """One round of Sinkhorn: rows, then columns."""
        rows = self.soft_min(cost - potential, 1)
        return self.soft_min(cost - rows[:, None], 0)

    def symmetric_round(self, cost: Float[Tensor, "cell cell"], potential: Float[Tensor, " cell"]) -> Float[Tensor, " cell"]:
        """Half a round for a set against itself, averaged: rows and columns share one potential, and the error at least halves."""
        return (potential + self.soft_min(cost - potential, 1)) / 2

    def soft_min(self, values: Float[Tensor, "row column"], dim: int) -> Float[Tensor, " kept"]:
        """−ε log mean exp(−values / ε) along a dimension."""
        return self.epsilon * (math.log(values.shape[dim]) - torch.logsumexp(-values / self.epsilon, dim))
