"""The error that a layout leaves under a normal model of condition means and batch effects (B.2), and what is expected before any fit."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Law = tuple[Tensor, Tensor, Tensor]
"""s² of one cell (condition, gene), τ² (gene), and v (gene), the variance of conditions around their common level."""


@final
@dataclass(frozen=True)
class BatchPrior:
    """What is expected of a screen that nobody has made yet, for `plan_batches`: of a typical gene, scales in natural logs.

    ``batch_scale`` is τ, the standard deviation of η^b; ``effect_scale`` √v, that of conditions around their common level. The noise of
    one cell is s² = 1 / ``mean_count`` + 1 / ``dispersion`` + ``heterogeneity``²: of the count, of its overdispersion, and of the cells'
    own differences. ``uncertainty`` is the standard deviation of the log of τ, √v and s, which makes the intervals of a plan.

    Raises ValueError for numbers below 0, or 0 where they divide.

    >>> round(BatchPrior(mean_count=2.0, dispersion=5.0, heterogeneity=0.3).cell_noise, 2)
    0.79
    """

    batch_scale: float = 0.2
    effect_scale: float = 0.2
    mean_count: float = 1.0
    dispersion: float = 5.0
    heterogeneity: float = 0.3
    uncertainty: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in fields(self):
            value, may_be_zero = getattr(self, field.name), field.name in ("heterogeneity", "uncertainty")
            if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"BatchPrior({field.name}={value!r}): use a finite number {'of at least' if may_be_zero else 'above'} 0.")

    @property
    def cell_noise(self) -> float:
        """The variance s² of one cell."""
        return 1 / self.mean_count + 1 / self.dispersion + self.heterogeneity**2

    def law(self, n_conditions: int, factors: Sequence[float] = (1.0, 1.0, 1.0)) -> Law:
        """Return s², τ² and v of one gene, their roots multiplied by factors."""
        noise, spread, effect = (value * factor**2 for value, factor in zip(self._squares, factors, strict=True))
        one = torch.ones(1, dtype=torch.float64)
        return noise * one.expand(n_conditions, 1), spread * one, effect * one

    def draws(self, n_draws: int, seed: int) -> list[list[float]]:
        """Return factors for s, τ and √v, log-normal around 1."""
        return np.exp(self.uncertainty * np.random.default_rng(seed).standard_normal((n_draws, 3))).tolist()

    @property
    def _squares(self) -> tuple[float, float, float]:
        return self.cell_noise, self.batch_scale**2, self.effect_scale**2


def covariance(
    cells: Float[Tensor, "condition batch"],
    noise: Float[Tensor, "condition gene"],
    spread: Float[Tensor, " gene"],
    effect: Float[Tensor, " gene"],
) -> Float[Tensor, "gene condition condition"]:
    """Return the posterior covariance C of condition means whose batches have effects of variance ``spread`` (see `plan_batches`).

    ``noise`` is s² of one cell, ``effect`` the variance v of conditions around their common level, which is free.

    >>> one = covariance(torch.tensor([[4.0]]), torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([1.0]))
    >>> round(float(one), 4)  # s²/n + τ²
    1.5
    """
    weight = cells[None] / noise.T[:, :, None]  # gene, condition, batch
    batch = weight.sum(1) + 1 / spread[:, None]
    n = len(cells)
    around = (torch.eye(n, dtype=cells.dtype) - 1 / n) / effect[:, None, None]
    precision = torch.diag_embed(weight.sum(2)) + around - (weight / batch[:, None]) @ weight.mT
    return torch.linalg.inv(precision)


def error_of_changes(cells: Float[Tensor, "condition batch"], law: Law, control: Sequence[int]) -> float:
    """Return the mean of (δ_c − δ_0)² over conditions and genes, δ ~ Normal(0, C), with the control of each condition."""
    c = covariance(cells, *law)
    own, origin = torch.diagonal(c, dim1=1, dim2=2), torch.tensor(control)
    return float((own + own[:, origin] - 2 * c[:, torch.arange(len(cells)), origin]).mean())
