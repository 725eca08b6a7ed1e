"""Does the model make data like the data? Observed statistics beside those of replicated screens."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from perturbprob.experiment.screen import require_screen
from perturbprob.inference.draws import check_draws, global_draws, require_fit, seeded, warn_if_large
from perturbprob.inference.escape import gone
from perturbprob.model.cells import Cells, CellTable

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.draws import Sites
from perturbprob.inference.fit import Fit

ENOUGH = 20
"""Fewer replicates say nothing of the central 90 %."""
STATISTICS = ("mean", "variance", "zero_fraction")


@final
@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """Observed against replicated, for all cells (``gene``), per condition and per batch.

    Each Dataset holds ``observed``, ``replicated`` (mean over draws), ``replicated_sd`` and ``tail_probability`` over (statistic,
    [group,] gene), and the
    same with the suffix ``_depth`` over (depth_statistic, [group]) for the mean and standard deviation of the cells' depth.
    ``tail_probability`` is the share of
    draws whose replicate is above the observed value, ties half: near 0 or 1 the model does not make such data.

    ``interaction`` asks whether batches act alike on all conditions. It holds the same four over (gene), and with the suffix
    ``_overall`` summed over genes, of the weighted sum of squares Σ n r² that is left of the mean log(1 + count / size factor) of the n
    cells of each condition in each batch (of continuous values, of their mean) beside what is additive in condition and batch;
    ``total`` and ``total_overall`` are the sums of squares of these means about their own mean. ``attrs["freedom"]`` counts
    what condition and batch leave free: with 0 it cannot be asked.
    """

    gene: xr.Dataset
    condition: xr.Dataset
    batch: xr.Dataset
    interaction: xr.Dataset
    n_draws: int

    def summary(self) -> str:
        """Say in a few lines where replicates and data differ."""
        lines = [f"Posterior predictive check, {self.n_draws} replicated screens."]
        for statistic in STATISTICS:
            part = self.gene.sel(statistic=statistic)
            lines.append(
                f"  {statistic:13s} over genes: observed {float(part.observed.mean()):.4g}, replicated {float(part.replicated.mean()):.4g}"
            )
        if self.n_draws < ENOUGH:
            return "\n".join([*lines, f"  {self.n_draws} replicates are too few for tail probabilities: ask for n_draws={ENOUGH} or more."])
        for name, table in (("condition", self.condition), ("batch", self.batch)):
            outside = ((table.tail_probability.sel(statistic="mean") < 0.05) | (table.tail_probability.sel(statistic="mean") > 0.95)).mean()
            lines.append(
                f"  means per {name} and gene outside the central 90 % of replicates: {100 * float(outside):.0f} % (10 % expected)"
            )
        return "\n".join([*lines, f"  {self._batches_act()}"])

    def _batches_act(self) -> str:
        """Say whether batches act on conditions as the model lets them."""
        part = self.interaction
        if not part.attrs["freedom"]:
            return "too few conditions are seen in several batches to ask whether batches act alike on them"
        observed, replicated = (100 * float(part[name] / part["total_overall"]) for name in ("observed_overall", "replicated_overall"))
        tail, beyond = float(part["tail_probability_overall"]), int((part["tail_probability"] < 0.05).sum())
        numbers = (
            f"beside additive effects {observed:.2g} % of the squares between means of conditions in batches, replicated "
            f"{replicated:.2g} % (tail probability {tail:.2g}; beyond 95 % of replicates in {beyond} of {part.sizes['gene']} genes)"
        )
        if tail >= 0.05:
            return f"batches act on conditions as replicated: {numbers}"
        return f"batches act differently on conditions: {numbers}; {part.attrs['advice']}"

    def __repr__(self) -> str:
        """Return the summary."""
        return self.summary()


@torch.no_grad()
def predictive_check(
    fit: "Fit", screen: "Screen", *, n_draws: int = 50, minibatch: int = 1024, seed: int = 0, progress: bool = True
) -> PredictiveCheck:
    """Replicate a screen from the posterior and compare statistics, without ever holding cells × genes × draws.

    Every cell is replicated from rest: z₀ is drawn from its prior, so what is checked is the model's own story of the cell's
    condition, batch and size factor, not its memory of the cell. Means, variances and zero fractions per gene, and the depth of
    cells, are compared over all cells, per condition and per batch; and whether batches act differently on conditions, as additive
    batch effects cannot, is asked of the means of log(1 + count / size factor).
    """
    require_fit(fit)
    check_draws(n_draws)
    require_screen(screen)
    table, groups = CellTable(fit.model, screen), _Groups(screen)
    statistics = 32 * groups.n_pairs * screen.n_genes  # sixteen of them, in double precision
    warn_if_large(statistics, f"statistics of {groups.n_pairs} condition-batch pairs", "Check fewer genes.")
    seen = _sum(groups.sums(cells.counts, start) for start, cells in _numbered(table, minibatch))
    running = {level: _Running(value) for level, value in groups.levels(seen).items()}
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="check" if progress else None)):
        with seeded(seed, k, 3):
            sites = table.sites(draw)
            parts = torch.arange(screen.n_cells).split(minibatch)
            total = _sum(groups.sums(_replicate(fit, sites, gone(fit, table, sites, part, seen=False)), int(part[0])) for part in parts)
        for level, value in groups.levels(total).items():
            running[level].add(value)
    named = {level: running[level].dataset(screen, level) for level in groups.of}
    whole = groups.squares(seen, groups.spread)
    interaction = running["interaction"].interaction(screen, whole, {"freedom": groups.freedom, "advice": _advice(fit)})
    return PredictiveCheck(gene=named["all"], condition=named["condition"], batch=named["batch"], interaction=interaction, n_draws=n_draws)


def _advice(fit: "Fit") -> str:
    """Say what to do about batches that act differently on conditions."""
    if fit.model.batch_effect.n_media or fit.model.batch_effect.n_latent:
        return "the batch effects of this fit depend on the state already, and miss it"
    return "fit with batch_effect='state'"


def _numbered(table: CellTable, minibatch: int) -> Iterator[tuple[int, Cells]]:
    """Iterate over minibatches and the number of their first cell."""
    return ((start * minibatch, cells) for start, cells in enumerate(table.minibatches(minibatch)))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """Add up tensors, holding two at a time."""
    return functools.reduce(torch.add, parts)


@torch.no_grad()
def replicate(
    fit: "Fit", table: CellTable, draw: "Sites", rows: Int[Tensor, " cell"], *, seed: tuple[int, ...]
) -> Float[np.ndarray, "cell gene"]:
    """Draw new counts for some cells of a table, from rest, given one draw of the globals."""
    with seeded(*seed):
        sites = table.sites(draw)
        return _replicate(fit, sites, gone(fit, table, sites, rows, seen=False)).cpu().numpy()


def _replicate(fit: "Fit", sites: "Sites", cells: Cells) -> Float[Tensor, "cell gene"]:
    """Draw new counts for cells, from rest."""
    z = fit.model.at_rest(len(cells)).sample()
    return fit.model.measured(sites, fit.model.moved(sites, z, cells.protocol), cells).sample()


class _Groups:
    """Sums of counts over the cells of each condition in each batch."""

    def __init__(self, screen: "Screen") -> None:
        """Number the condition-batch pairs that occur."""
        pairs, code = np.unique(screen.condition * len(screen.batches) + screen.batch, return_inverse=True)
        self.n_pairs, self.code = len(pairs), torch.as_tensor(code)
        self.of = {"all": np.zeros(len(pairs), int), "condition": pairs // len(screen.batches), "batch": pairs % len(screen.batches)}
        self.cells, self.counted = torch.bincount(self.code).double(), screen.values == "counts"
        self.size = torch.as_tensor(screen.size_factor)[:, None]
        condition, batch = (torch.as_tensor(self.of[level]) for level in ("condition", "batch"))
        self.spread = _Additive(self.cells, torch.zeros_like(condition), batch.new_zeros(len(pairs)))
        self.additive = _Additive(self.cells, condition, batch)
        self.freedom = len(pairs) - self.additive.rank

    def sums(self, counts: Float[Tensor, "cell gene"], start: int) -> Float[Tensor, "pair column"]:
        """Return, per pair, the sums of x, x², [x = 0] and log(1 + x/ℓ) of every gene, then of depth and depth²."""
        x = counts.double().cpu()
        scaled = (x / self.size[start : start + len(x)]).log1p() if self.counted else x
        depth = x.sum(1, keepdim=True)
        values = torch.cat([x, x.square(), (x == 0).double(), scaled, depth, depth.square()], 1)
        return values.new_zeros(self.n_pairs, values.shape[1]).index_add_(0, self.code[start : start + len(x)], values)

    def levels(self, sums: Float[Tensor, "pair column"]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return statistics (statistic, group, gene) and of depth (statistic, group), over all cells, per condition and per batch.

        And what is left beside additive effects of condition and batch, of each gene and over genes.
        """
        return {level: self._statistics(sums, torch.as_tensor(of)) for level, of in self.of.items()} | {
            "interaction": self.squares(sums, self.additive)
        }

    def squares(self, sums: Float[Tensor, "pair column"], design: "_Additive") -> tuple[Tensor, Tensor]:
        """Return the squares that a design leaves of the pairs' mean log(1 + x/ℓ), of each gene and over genes."""
        left = self.cells @ design.left(sums[:, :-2].chunk(4, 1)[3] / self.cells[:, None]).square()
        return left, left.sum()

    def _statistics(self, sums: Float[Tensor, "pair column"], of: Int[Tensor, " pair"]) -> tuple[Tensor, Tensor]:
        """Add pairs up to groups and turn sums into statistics."""
        n_groups = int(of.max()) + 1
        cells = torch.zeros(n_groups, dtype=torch.double).index_add_(0, of, self.cells)[:, None]
        mean = sums.new_zeros(n_groups, sums.shape[1]).index_add_(0, of, sums) / cells
        first, second, zero, _ = mean[:, :-2].chunk(4, 1)
        depth_sd = (mean[:, -1] - mean[:, -2].square()).clamp(min=0).sqrt()
        return torch.stack([first, second - first.square(), zero]), torch.stack([mean[:, -2], depth_sd])


class _Additive:
    """What weighted least squares on two factors leaves of values of pairs: the rows are swept out, the columns regressed."""

    def __init__(self, weight: Float[Tensor, " pair"], row: Int[Tensor, " pair"], column: Int[Tensor, " pair"]) -> None:
        """Solve the normal equations of the columns, beside the rows."""
        self.weight, self.row = weight[:, None], row
        self.total = weight.new_zeros(int(row.max()) + 1).index_add_(0, row, weight)[:, None]
        self.columns = self._swept(torch.nn.functional.one_hot(column).double())
        normal = self.columns.T @ (self.weight * self.columns)
        self.solve = torch.linalg.pinv(normal, hermitian=True, rtol=1e-9) @ (self.weight * self.columns).T
        self.rank = len(row.unique()) + int(torch.linalg.matrix_rank(normal / weight.mean(), hermitian=True, rtol=1e-9, atol=1e-9))

    def left(self, value: Float[Tensor, "pair gene"]) -> Float[Tensor, "pair gene"]:
        """Return the residuals."""
        value = self._swept(value)
        return value - self.columns @ (self.solve @ value)

    def _swept(self, value: Float[Tensor, "pair column"]) -> Float[Tensor, "pair column"]:
        """Take the weighted mean of its row from each value."""
        mean = value.new_zeros(len(self.total), value.shape[1]).index_add_(0, self.row, self.weight * value) / self.total
        return value - mean[self.row]


class _Running:
    """Mean, variance and tail of replicated statistics, draw by draw."""

    def __init__(self, observed: tuple[Tensor, Tensor]) -> None:
        """Start from the observed statistics."""
        self.observed, self.n = observed, 0
        self.mean, self.squares, self.above = ([torch.zeros_like(o) for o in observed] for _ in range(3))

    def add(self, values: tuple[Tensor, Tensor]) -> None:
        """Take in one draw (Welford's update)."""
        self.n += 1
        for k, (value, observed) in enumerate(zip(values, self.observed, strict=True)):
            step = value - self.mean[k]
            self.mean[k] += step / self.n
            self.squares[k] += step * (value - self.mean[k])
            self.above[k] += (value > observed).double() + 0.5 * (value == observed)

    def dataset(self, screen: "Screen", level: str) -> xr.Dataset:
        """Name the result; the group axis of all cells together is dropped."""
        group = {"all": ["all"], "condition": [str(p) for p in screen.conditions], "batch": list(screen.batches)}[level]
        coords = {"statistic": list(STATISTICS), "depth_statistic": ["mean", "sd"], "gene": list(screen.genes), level: group}
        result = xr.Dataset(self._named({"": ("statistic", level, "gene"), "_depth": ("depth_statistic", level)}), coords)
        return result.sel(all="all", drop=True) if level == "all" else result

    def interaction(self, screen: "Screen", total: tuple[Tensor, Tensor], attrs: dict[str, object]) -> xr.Dataset:
        """Name what is left beside additive effects, with the squares of the same means about their own mean."""
        whole = {"total": ("gene", total[0].numpy()), "total_overall": ((), float(total[1]))}
        return xr.Dataset(self._named({"": ("gene",), "_overall": ()}) | whole, {"gene": list(screen.genes)}, attrs)

    def _named(self, dims_of: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """Return observed and replicated values by name, with a suffix and dims for each of the two."""
        arrays: dict[str, Any] = {}
        for k, (suffix, dims) in enumerate(dims_of.items()):
            sd = (self.squares[k] / max(1, self.n - 1)).sqrt()
            values = {
                "observed": self.observed[k],
                "replicated": self.mean[k],
                "replicated_sd": sd,
                "tail_probability": self.above[k] / self.n,
            }
            arrays |= {f"{name}{suffix}": (dims, value.numpy()) for name, value in values.items()}
        return arrays
