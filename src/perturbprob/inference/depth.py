"""The law of the size factor in each condition and batch, over which predictions of counts are averaged."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.action import Protocol

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

PRIOR_CELLS = 20.0
"""How many cells the additive forecast of a condition's depth counts for."""
QUANTILES = 32


@dataclass(frozen=True)
class DepthLaw:
    """log ℓ = mean of (condition, batch) + residual, learnt from the cells of a fit.

    Depth moves with the perturbation (stressed cells leak RNA), so a prediction of counts must say at which depth. The mean of a
    condition in a batch is its cells' mean, shrunken with the weight of 20 cells to an additive forecast from perturbation, media,
    time and batch, which also serves conditions never seen. The residual has the quantiles of all cells' residuals, stretched by the
    ``spread`` of a batch: its standard deviation over that of all, shrunken to 1 with the weight of 20 cells.
    """

    factors: dict[str, float]
    means: dict[str, tuple[float, int]]
    residual: tuple[float, ...]
    spread: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, screen: "Screen", log_size: np.ndarray) -> Self:
        """Learn the law from the cells of a screen and their log size factors, which count in the depth of the model."""
        n_batches = len(screen.batches)
        group, code = np.unique(screen.condition * n_batches + screen.batch, return_inverse=True)
        count = np.bincount(code)
        mean = np.bincount(code, log_size) / count
        pairs = [(screen.conditions[g // n_batches], screen.batches[g % n_batches]) for g in group]
        names = sorted({f for p, b in pairs for f in _factors(p, b)})
        design = np.array([[f in _factors(p, b) for f in names] for p, b in pairs], dtype=float)
        weight = count[:, None] * design
        ridge = np.diag([1e-6 if n == "all" else PRIOR_CELLS for n in names])
        solved = np.linalg.solve(design.T @ weight + ridge, weight.T @ mean)
        quantiles = np.quantile(log_size - mean[code], (np.arange(QUANTILES) + 0.5) / QUANTILES)
        means = {_key(p, b): (float(m), int(n)) for (p, b), m, n in zip(pairs, mean, count, strict=True)}
        variance, n = (np.bincount(screen.batch, w, n_batches) for w in ((log_size - mean[code]) ** 2, None))
        overall = max(float(variance.sum() / n.sum()), 1e-12)
        ratio = np.sqrt((variance + PRIOR_CELLS * overall) / ((n + PRIOR_CELLS) * overall))
        spread = dict(zip(screen.batches, map(float, ratio), strict=True))
        return cls(dict(zip(names, map(float, solved), strict=True)), means, tuple(map(float, quantiles)), spread)

    def mean(self, protocol: Protocol, batch: str | None) -> float:
        """Return the mean log size factor of a condition in a batch; over all its batches where none is named."""
        if batch is None:
            own = [v for k, v in self.means.items() if k.startswith(_key(protocol, ""))]
            seen, cells = sum(m * n for m, n in own), sum(n for _, n in own)
        else:
            m, cells = self.means.get(_key(protocol, batch), (0.0, 0))
            seen = m * cells
        forecast = sum(self.factors.get(f, 0.0) for f in _factors(protocol, batch))
        return (seen + PRIOR_CELLS * forecast) / (cells + PRIOR_CELLS)

    def quantiles(self, protocol: Protocol, batch: str | None) -> Float[Tensor, " quantile"]:
        """Return equally likely log size factors of a condition in a batch."""
        return torch.tensor(self.residual) * self.spread.get(batch or "", 1.0) + self.mean(protocol, batch)

    def median(self) -> float:
        """Return the median log size factor of all cells, by the law."""
        means, cells = np.array(list(self.means.values())).T
        value = np.add.outer(means, self.residual).ravel()
        order = np.argsort(value)
        passed = np.cumsum(np.repeat(cells, len(self.residual))[order])
        return float(value[order][np.searchsorted(passed, passed[-1] / 2)])


def _key(protocol: Protocol, batch: str) -> str:
    """Name a condition in a batch."""
    return f"{protocol!r} in {batch}"


def _factors(protocol: Protocol, batch: str | None) -> list[str]:
    """Name the parts that add up in the forecast."""
    parts = ["all", f"perturbation {protocol.perturbation}", f"media {protocol.media}", f"time {protocol.time:.12g}"]
    return parts if batch is None else [*parts, f"batch {batch}"]
