"""All pairs of cells of two weighted sets, block by block: memory grows with the cells, not with the pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

HELD = 2**22
"""Up to this many pairs are held, 34 MB for each intermediate value; of more, only a block at a time."""

BLOCK = 2**20
"""About how many pairs a block has."""

COINCIDENT = 1e-13
"""Cells are at one point where their squared distance is below this share of their squared lengths: there it is rounding."""


OfRows = Callable[..., Float[Tensor, " row"]]
"""(squared distances (row, column), ...) to a value for each row."""


@final
@dataclass(frozen=True)
class CellSet:
    """Cells in float64 and their weights, which sum to 1."""

    values: Float[Tensor, "cell gene"]
    weights: Float[Tensor, " cell"]

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.values)

    def mean(self) -> Float[Tensor, " gene"]:
        """Return the weighted mean of each gene."""
        return self.weights @ self.values

    def variance(self) -> Float[Tensor, " gene"]:
        """Return the weighted mean square about the mean of each gene."""
        return self.weights @ self.centred().values.square()

    def centred(self) -> "CellSet":
        """Return the cells about their mean."""
        return CellSet(self.values - self.mean(), self.weights)

    def repeated(self) -> Float[Tensor, ""]:
        """Return Σ w², the chance that two independent picks are the same cell."""
        return self.weights.square().sum()


@final
class Pairs:
    """Squared distances of the cells of x (rows) to those of y (columns).

    Up to ``HELD`` pairs are computed once; beyond, each use computes them again block by block, and so does the backward pass.
    """

    def __init__(self, x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"]) -> None:
        """Take both sets about a common centre, against cancellation."""
        centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
        self.x, self.y = x - centre, y - centre
        self.held = squared_distances(self.x, self.y) if len(x) * len(y) <= HELD else None

    def rows(self, function: OfRows, *more: Tensor) -> Float[Tensor, " cell"]:
        """Return function(squared distances, *more) of each cell to all of the other set; gradients reach ``more``, not a closure."""
        return _Blocks.apply(function, self.x, self.y, *more) if self.held is None else function(self.held, *more)

    def columns(self, function: OfRows, *more: Tensor) -> Float[Tensor, " other_cell"]:
        """Return the same for the cells of the other set."""
        return _Blocks.apply(function, self.y, self.x, *more) if self.held is None else function(self.held.T, *more)


@final
class _Blocks(torch.autograd.Function):
    """A function of rows of squared distances, block by block.

    Nothing that outlives a block is allocated within one, which torch.utils.checkpoint does: that alone fragments the heap to many
    times the size of a block.
    """

    @staticmethod
    def forward(ctx: Any, function: OfRows, x: Tensor, *shared: Tensor) -> Float[Tensor, " cell"]:
        """Fill in the value of each row."""
        ctx.function = function
        ctx.save_for_backward(x, *shared)
        values = x.new_empty(len(x))
        for rows in _blocks(x, shared[0]):
            values[rows] = function(squared_distances(x[rows], shared[0]), *shared[1:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Float[Tensor, " cell"]) -> tuple[Tensor | None, ...]:
        """Compute each block again and add up its gradients."""
        x, *shared = ctx.saved_tensors
        gradient, *others = (torch.zeros_like(t) for t in (x, *shared))
        for rows in _blocks(x, shared[0]):
            with torch.enable_grad():
                given = [t.detach().requires_grad_() for t in (x[rows], *shared)]
                value = ctx.function(squared_distances(*given[:2]), *given[2:])
            gradient[rows], *found = torch.autograd.grad(value, given, slope[rows])
            for total, part in zip(others, found, strict=True):
                total += part
        return None, gradient, *others


def _blocks(x: Tensor, y: Tensor) -> list[slice]:
    """Cut x into blocks of rows."""
    n_rows = max(1, BLOCK // len(y))
    return [slice(start, start + n_rows) for start in range(0, len(x), n_rows)]


def squared_distances(x: Float[Tensor, "cell gene"], y: Float[Tensor, "other_cell gene"]) -> Float[Tensor, "cell other_cell"]:
    """Squared Euclidean distances, exactly zero where two cells coincide; both sets near 0."""
    # one matrix product, several times faster than differences over many genes
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = lengths - 2 * x @ y.T
    return torch.where(squares > COINCIDENT * lengths, squares, 0.0)


def mean_over_pairs(function: Callable[[Tensor], Tensor], x: CellSet, y: CellSet) -> Float[Tensor, ""]:
    """Return Σ_ij w_i v_j function(‖x_i − y_j‖²)."""
    return x.weights @ Pairs(x.values, y.values).rows(lambda squares, weights: function(squares) @ weights, y.weights)


def checked(x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None) -> tuple[CellSet, CellSet]:
    """Both sets in float64, if they can be compared."""
    _check("x", x)
    _check("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} genes and y has {y.shape[1]}: give both the same genes in the same order.")
    return CellSet(x.double(), _shares("x", x, x_weights)), CellSet(y.double(), _shares("y", y, y_weights))


def _check(name: str, cells: Tensor) -> None:
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


def _shares(name: str, cells: Tensor, weights: Tensor | None) -> Float[Tensor, " cell"]:
    """Return weights that sum to 1, alike where none are given."""
    if weights is None:
        return torch.full((len(cells),), 1 / len(cells), dtype=torch.double, device=cells.device)
    if weights.shape != cells.shape[:1]:
        raise ValueError(f"{name}_weights has shape {tuple(weights.shape)} and {name} has {len(cells)} cells: give one weight for each.")
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"{name}_weights is {float(weights[first]):g} for cell {first} (counted from 0): give finite weights from 0.")
    if not (weights > 0).any():
        raise ValueError(f"{name}_weights are all 0: give at least one cell a positive weight.")
    return weights.double() / weights.double().sum()
