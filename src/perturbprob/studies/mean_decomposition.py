"""Batches taken apart without a model: a two-way split of the means of conditions and batches, beside what sampling of cells explains."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from perturbprob.experiment.moments import Moments, relative_counts
from perturbprob.experiment.screen import require_screen
from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

FACTORS = ("condition", "perturbation", "media", "time", "batch")


def decompose_means(screen: "Screen", factor: str = "perturbation", batch: str = "batch") -> xr.Dataset:
    """Split the mean log(1 + x) of factor × batch cells into factor, batch and rest; x is the count over the cell's size factor.

    With ȳ_ab the mean over the cells of level a in batch b, of each gene, every level and batch counting alike:

        ȳ_ab − ȳ = (ȳ_a − ȳ) + (ȳ_b − ȳ) + rest_ab,     sums of squares over a and b add up,

    and the rest expected if batches act alike on all levels is that of sampling cells, (1 − 1/A)(1 − 1/B) Σ_ab s²_ab / n_ab with s² the
    variance over cells (that of all cells within their means where a mean is of one cell). A rest far above it says that additive batch
    effects fail. ``factor`` and ``batch`` are any two of condition, perturbation, media, time and batch; what else differs between cells
    is averaged over. Levels that are not seen in every batch are left out, and named in ``attrs["left_out"]``.

    A Dataset: ``share`` (source), of sums of squares over genes, and ``gene_share`` (source, gene), sources the factor, the batch, "rest";
    ``sampling`` and ``gene_sampling`` (gene), the share that sampling of cells adds to the rest; ``n_cells`` (level, batch).

    Raises ValueError for continuous values, factors that do not exist or are the same, and fewer than two levels or batches.

    >>> import perturbprob as pb
    >>> found = decompose_means(pb.simulate(n_cells=600, n_genes=20, n_perturbations=4, seed=1).screen)
    >>> found["share"].round(2).to_series().to_dict()
    {'perturbation': 0.3, 'batch': 0.48, 'rest': 0.22}
    """
    require_screen(screen)
    if screen.values != "counts":
        raise ValueError("This screen holds continuous values; the split is of means of log(1 + count) over cells. Read the counts.")
    (rows, levels), (columns, batches) = _levels(screen, factor), _levels(screen, batch)
    if factor == batch:
        raise ValueError(f"factor and batch are both {factor!r}. Name two different ones of {', '.join(FACTORS)}.")
    values = relative_counts(screen.counts, screen.size_factor).log1p()
    moments = Moments.of(values, rows * len(batches) + columns, len(levels) * len(batches))
    shape = (len(levels), len(batches))
    n = moments.n_cells.reshape(shape)
    whole = np.asarray((n > 0).all(axis=1))
    if min(whole.sum(), len(batches)) < 2:
        raise ValueError(
            f"{int(whole.sum())} of {len(levels)} levels of {factor} are seen in all of {len(batches)} {batch}: a two-way split needs at "
            "least two of each. Take a part of the screen in which they are, screen[cells]."
        )
    pooled = np.nansum(moments.squares, axis=0) / max(1, (n - 1).clip(0).sum())
    variance = np.where(moments.n_cells[:, None] > 1, moments.unbiased_variance, pooled) / np.maximum(moments.n_cells, 1)[:, None]
    mean, variance = (part.reshape(*shape, -1)[whole] for part in (moments.mean, variance))
    squares, sampling = _two_way(mean), (1 - 1 / len(mean)) * (1 - 1 / len(batches)) * variance.sum(axis=(0, 1))
    total = squares.sum(axis=0)
    data = {
        "share": ("source", squares.sum(axis=1) / total.sum()),
        "gene_share": (("source", "gene"), squares / np.where(total > 0, total, np.nan)),
        "sampling": ((), float(sampling.sum() / total.sum())),
        "gene_sampling": ("gene", sampling / np.where(total > 0, total, np.nan)),
        "n_cells": (("level", "in_batch"), n[whole]),
    }
    kept = [name for name, there in zip(levels, whole, strict=True) if there]
    coords = {"source": [factor, batch, "rest"], "gene": list(screen.genes), "level": kept, "in_batch": batches}
    left = ", ".join(name for name, there in zip(levels, whole, strict=True) if not there)
    return xr.Dataset(data, coords, {"factor": factor, "batch": batch, "left_out": left, "scale": "log1p of counts over size factors"})


def _two_way(mean: Float[np.ndarray, "level batch gene"]) -> Float[np.ndarray, "source gene"]:
    """Return the sums of squares of rows, columns and the rest, of each gene."""
    whole = mean.mean(axis=(0, 1), keepdims=True)
    row, column = mean.mean(axis=1, keepdims=True) - whole, mean.mean(axis=0, keepdims=True) - whole
    parts = np.broadcast_arrays(row, column, mean - whole - row - column)
    return np.stack([(part**2).sum(axis=(0, 1)) for part in parts])


def _levels(screen: "Screen", factor: str) -> tuple[Int[np.ndarray, " cell"], list[str]]:
    """Return each cell's level of a factor, and the names of the levels."""
    if factor not in FACTORS:
        raise ValueError(f"{factor!r} is not a factor. {nearest(factor, FACTORS)}")
    if factor == "batch":
        return screen.batch, list(screen.batches)
    of_condition = {
        "condition": lambda p: str(p),
        "perturbation": lambda p: p.perturbation,
        "media": lambda p: p.media or screen.baseline or "baseline",
        "time": lambda p: f"{p.time:g}",
    }[factor]
    code, names = pd.factorize(np.array([of_condition(p) for p in screen.conditions], dtype=object))
    return code[screen.condition], list(map(str, names))
