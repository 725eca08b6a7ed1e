"""What makes cells differ? The variance of the expected log rate, split between state, conditions, batches and measurement noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, final

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from perturbprob.inference.draws import Sites, check_draws, global_draws, require_posterior, seeded, warn_if_large
from perturbprob.inference.expectation import Expectation, interpolated_log1p
from perturbprob.measurement.counts import CountLaw
from perturbprob.studies.reference_grid import ReferenceGrid

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

SURE = 0.9
"""A batch gene is named in the report where its probability is at least this."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class BatchDecomposition:
    """Shares of variance by source, per gene and over genes, and what each batch does to each gene.

    ``table`` is a Dataset over (source, gene, batch, draw):

    - ``share`` (source, gene), with ``share_lower`` and ``share_upper``: posterior mean and central interval of probability ``level``;
      ``overall`` (source), with ``overall_lower`` and ``overall_upper``: the same of variances summed over genes;
    - ``share_draws`` (draw, source, gene) and ``overall_draws`` (draw, source): every draw sums to one over sources;
    - ``variance`` (source, gene): posterior mean of the variances themselves, in squared natural logs;
    - ``loading`` (batch, gene), with ``loading_lower`` and ``loading_upper``: how far a batch lies from the mean over batches, in the
      log rate, averaged over the grid;
    - ``batch_gene_probability`` (gene): that the share of batch exceeds ``threshold``.

    ``notes`` says what the grid is and what it leaves open.
    """

    table: xr.Dataset
    notes: tuple[str, ...]

    @property
    def batch_source(self) -> str:
        """The name of the source that holds the batches, such as ``"batch"`` or ``"time/batch"``."""
        return str(self.table.attrs["batch_source"])

    def batch_genes(self, probability: float = SURE) -> tuple[str, ...]:
        """Return the genes that are batch genes with at least this probability, the largest share first."""
        part = self.table.isel(gene=self.table["batch_gene_probability"].values >= probability)
        order = np.argsort(-part["share"].sel(source=self.batch_source).values, kind="stable")
        return tuple(map(str, part["gene"].values[order]))

    def summary(self) -> str:
        """Say the shares over genes with their intervals, and which genes are batch genes."""
        set_by, found = self.table.attrs, self.batch_genes()
        lines = [f"Shares of variance over {self.table.sizes['gene']} genes ({100 * set_by['level']:g} % intervals):"]
        for source in self.table["source"].values:
            at = self.table.sel(source=source)
            mean, lower, upper = (100 * float(at[name]) for name in ("overall", "overall_lower", "overall_upper"))
            lines.append(f"  {source:22s} {mean:5.1f} % ({lower:.1f} to {upper:.1f})")
        named = f": {', '.join(found[:8])}{' ...' if len(found) > 8 else ''}" if found else ""
        lines.append(
            f"Batch genes (share of {self.batch_source} above {100 * set_by['threshold']:g} % with probability {SURE:g} or more): "
            f"{len(found)}{named}."
        )
        return "\n".join(lines)

    def report(self) -> str:
        """Return the summary, and what the grid is and leaves open."""
        return "\n".join([self.summary(), *self.notes])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


@torch.no_grad()
def decompose_batches(
    fit: "Fit",
    *,
    n_draws: int = 100,
    n_states: int = 32,
    interactions: Sequence[str | Sequence[str]] | None = None,
    threshold: float = 0.1,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> BatchDecomposition:
    """Split the variance of the expected log rate between state, perturbation, media, time, batch and interactions, and add the noise.

    A functional analysis of variance of f_g(z₀, p, m, t, b), the log of gene g's expected share of the counts of a cell, over a balanced
    reference grid: every combination of the levels of the factors that the fit has seen, each once, and in each the same ``n_states``
    rest states z₀ (Sobol points of their law). With ⟨f⟩ the mean over z₀, in every draw of all global sites:

        state = mean over the grid of Var_z₀ f     (all that differs within a condition and batch, however a batch acts on states)
        factor A = Var_a ⟨f⟩_a     A:B = Var_ab ⟨f⟩_ab − Var_a ⟨f⟩_a − Var_b ⟨f⟩_b     rest = Var ⟨f⟩ − the factors and interactions named

    are exact balanced sums of squares over the number of grid cells, and add up to the variance of f. To them is added

        noise = mean over grid and z₀ of Var(log(1 + x) | f)

    the variance of a count on the log1p scale under its law at the median depth of the screen. A share is a variance over the sum of
    all of them. The grid weighs levels evenly, so shares do not depend on how many cells each has; depth is the same everywhere. Of
    continuous values f is the expected value, and noise the one learnt beside the known standard errors. Of a fit with ``penetrance``
    cells of a perturbation are those that were hit.

    Main arguments: ``interactions`` names the interactions to keep apart, each a pair (or more) of factors such as ``("media", "batch")``
    or ``"media:batch"`` (default: batch with media and with perturbation); one with a factor of a single level adds nothing, and all
    others are the source "rest". ``threshold`` is the share of batch above which a gene is a batch gene. Factors that are aliased in the
    layout, or a factor in which batches are nested, are one factor over their observed combinations, such as "time/batch": no cell tells
    them apart. Combinations that were never observed but can be predicted are part of the grid; the notes count them.

    Raises ValueError for a fit of one batch, an interaction of unknown or aliased factors, and numbers out of range.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, n_batches=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> parts = pb.decompose_batches(fit, n_draws=4, n_states=8, progress=False)
    >>> parts.table["source"].values.tolist()
    ['state', 'perturbation', 'time', 'batch', 'perturbation:batch', 'rest', 'noise']
    >>> bool(abs(parts.table["share_draws"].sum("source") - 1).max() < 1e-5)
    True
    """
    require_posterior(fit, "decompose_batches gives shares")
    check_draws(n_draws)
    check_draws(n_states, "n_states")
    for name, value in (("threshold", threshold), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is a number between 0 and 1; got {value}.")
    grid = ReferenceGrid.of(fit)
    terms = [*((name,) for name in grid.axes), *grid.terms(interactions)]
    n_genes, n_levels = len(fit.model.vocabulary.genes), len(grid.batches)
    size = n_draws * (len(terms) + 3 + n_levels) * n_genes + sum(grid.n_levels(term) for term in terms) * n_genes
    warn_if_large(size, f"shares and loadings of {n_draws} draws", "Lower n_draws, or fit fewer genes.")
    drawn = list(_draws(fit, grid, terms, n_draws=n_draws, n_states=n_states, seed=seed, progress=progress))
    variance, loading = (torch.stack(values).numpy() for values in zip(*drawn, strict=True))
    attrs = {"threshold": threshold, "level": level, "n_draws": n_draws, "n_states": n_states, "batch_source": grid.batch_axis}
    sources = ["state", *(":".join(term) for term in terms), "rest", "noise"]
    return BatchDecomposition(_table(fit, grid, sources, variance, loading, attrs), grid.notes(n_states))


def _draws(
    fit: "Fit", grid: ReferenceGrid, terms: list[tuple[str, ...]], *, n_draws: int, n_states: int, seed: int, progress: bool
) -> Iterator[tuple[Float[Tensor, "source gene"], Float[Tensor, "batch gene"]]]:
    """Yield each draw's variances by source and gene, and the loadings of its batches."""
    expectation = Expectation(fit, grid.protocols, grid.batch_of_cell, n_rest=n_states, seed=seed)
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="decompose_batches" if progress else None)):
        with seeded(seed, k, 11):
            sites = expectation.complete(sites)
        sums = _Sums(grid, terms, len(fit.model.vocabulary.genes))
        for part in expectation.parts:
            sums.add(part, *_moments(fit, expectation, sites, part))
        yield sums.variances().float(), sums.loadings().float()


def _moments(fit: "Fit", expectation: Expectation, sites: Sites, part: Int[Tensor, " part"]) -> tuple[Float[Tensor, "part gene"], ...]:
    """Return mean and variance of the log rate over rest states in some cells of the grid, and the mean variance of what is measured."""
    log_rate = expectation.log_rates(sites, part)
    if fit.model.start is not None:
        noise = fit.model.law(sites, log_rate).variance
    else:
        noise = interpolated_log1p(fit.model.law(sites, log_rate + fit.model.log_depth + fit.depth.median()), CountLaw.variance_log1p)
    return tuple(value.double().cpu() for value in (log_rate.mean(0), log_rate.var(0, correction=0), noise.mean(0)))


class _Sums:
    """One draw's sums over the grid, cell by cell as they come; the grid itself is never held."""

    def __init__(self, grid: ReferenceGrid, terms: list[tuple[str, ...]], n_genes: int) -> None:
        """Start from nothing: a margin for every term and every part of it."""
        self.grid, self.terms = grid, terms
        margins = dict.fromkeys(part for term in terms for k in range(1, len(term) + 1) for part in combinations(term, k))
        self.codes = {part: grid.codes(part) for part in margins}
        self.margins = {part: torch.zeros(grid.n_levels(part), n_genes, dtype=torch.double) for part in margins}
        self.square, self.state, self.noise = (torch.zeros(n_genes, dtype=torch.double) for _ in range(3))

    def add(
        self,
        cells: Int[Tensor, " part"],
        mean: Float[Tensor, "part gene"],
        state: Float[Tensor, "part gene"],
        noise: Float[Tensor, "part gene"],
    ) -> None:
        """Take in some cells of the grid."""
        for part, margin in self.margins.items():
            margin.index_add_(0, self.codes[part][cells], mean)
        self.square, self.state, self.noise = self.square + mean.square().sum(0), self.state + state.sum(0), self.noise + noise.sum(0)

    def variances(self) -> Float[Tensor, "source gene"]:
        """Return the variance of each source: state, the terms, the rest, noise."""
        n = self.grid.n_cells
        of = {part: (margin * len(margin) / n).var(0, correction=0) for part, margin in self.margins.items()}
        pure = [
            sum((-1) ** (len(term) - k) * of[part] for k in range(1, len(term) + 1) for part in combinations(term, k))
            for term in self.terms
        ]
        total = self.square / n - (self.margins[(self.grid.batch_axis,)].sum(0) / n).square()
        known = [torch.as_tensor(value).clamp(min=0) for value in pure]
        return torch.stack([self.state / n, *known, (total - sum(known)).clamp(min=0), self.noise / n])

    def loadings(self) -> Float[Tensor, "batch gene"]:
        """Return how far each batch lies from the mean over batches."""
        margin = self.margins[(self.grid.batch_axis,)] * len(self.grid.batches) / self.grid.n_cells
        return margin - margin.mean(0)


def _table(
    fit: "Fit",
    grid: ReferenceGrid,
    sources: list[str],
    variance: Float[np.ndarray, "draw source gene"],
    loading: Float[np.ndarray, "draw batch gene"],
    attrs: dict[str, object],
) -> xr.Dataset:
    """Name variances and loadings, and turn them into shares with intervals."""
    coords = {"source": sources, "gene": list(fit.model.vocabulary.genes), "batch": list(grid.batches), "draw": np.arange(len(variance))}
    of_draw = xr.DataArray(variance, coords={k: coords[k] for k in ("draw", "source", "gene")}, dims=("draw", "source", "gene"))
    sums = of_draw.astype(float).sum("gene")
    draws = {"share": of_draw / of_draw.sum("source"), "overall": sums / sums.sum("source")}
    values = draws | {"loading": xr.DataArray(loading, dims=("draw", "batch", "gene"))}
    data = {"variance": of_draw.mean("draw")}
    level = float(str(attrs["level"]))
    for name, value in values.items():
        low, high = (value.quantile(q, "draw").drop_vars("quantile") for q in ((1 - level) / 2, (1 + level) / 2))
        data |= {name: value.mean("draw"), f"{name}_lower": low, f"{name}_upper": high}
    above = draws["share"].sel(source=grid.batch_axis, drop=True) > float(str(attrs["threshold"]))
    data["batch_gene_probability"] = above.mean("draw")
    return xr.Dataset(data | {f"{name}_draws": value for name, value in draws.items()}, coords, attrs)
