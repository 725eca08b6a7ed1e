"""Which conditions to put into which batches: the error that each layout would leave (B.2, experimental recommendations)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.inference.draws import Sites, check_draws, global_draws, require_posterior, seeded
from perturbprob.inference.expectation import Expectation
from perturbprob.inference.projected import projected
from perturbprob.studies.layout_error import BatchPrior, Law, covariance, error_of_changes

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

PROPOSED = ("controls in one batch", "controls in every batch", "media split over batches", "media hashed into every batch")
NOISES = 4
"""How many errors of estimation are drawn for each posterior draw."""


@final
@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The predicted mean squared error in log rate of every layout: ``error``, a DataArray over (layout, draw); ``layouts`` by name."""

    error: xr.DataArray
    layouts: dict[str, pd.DataFrame]

    @property
    def best(self) -> str:
        """The name of the layout with the smallest mean error."""
        mean = self.error.mean("draw")
        return str(mean["layout"].values[int(np.argmin(mean.values))])

    def report(self, level: float = 0.9) -> str:
        """Rank the layouts, each with its error beside that of the best, draw by draw."""
        best, lines = self.error.sel(layout=self.best), ["Predicted error in log rate (root mean square over conditions and genes):"]
        for name in self.error["layout"].values[np.argsort(self.error.mean("draw").values)]:
            own = self.error.sel(layout=name)
            low, high = np.sqrt(own.quantile([(1 - level) / 2, (1 + level) / 2], "draw").values)
            more = float(np.sqrt((own / best).mean())) - 1
            lines.append(f"  {name}: {np.sqrt(float(own.mean())):.3f} ({low:.3f} to {high:.3f})" + (f", {more:+.0%}" if more > 0 else ""))
        cells = {name: int(table.to_numpy().sum()) for name, table in self.layouts.items()}
        if max(cells.values()) > 1.02 * min(cells.values()):
            lines.append(f"  They differ in cells, which counts too: {', '.join(f'{name} {n:,}' for name, n in cells.items())}.")
        return "\n".join([*lines, f"Advice: {self.best}."])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


def propose_layouts(screen: Screen, n_batches: int, n_cells: int) -> dict[str, pd.DataFrame]:
    """Return layouts of the conditions of a screen over ``n_batches`` batches of ``n_cells`` cells in all, conditions equally large.

    Each is a table of cells as `Screen.summary`: conditions (perturbation, media, time) × batches, all layouts of as many cells in each
    condition. Perturbed conditions are spread over batches in turn, those of one perturbation over different ones; control is in the first
    batch or in all; each media has batches of its own, or all are in every batch (hashed, where a barcode tells them apart).

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0,), seed=1).screen
    >>> layouts = propose_layouts(screen, 4, 1200)
    >>> {name: int(table.to_numpy().sum()) for name, table in layouts.items()}["controls in every batch"]
    1200
    """
    require_screen(screen)
    check_draws(n_batches, "n_batches")
    check_draws(n_cells, "n_cells")
    if n_batches < 2 or n_cells < len(screen.conditions) * n_batches:
        raise ValueError(f"A layout needs at least 2 batches and a cell of each condition in each; got {n_batches} and {n_cells} cells.")
    index, each = screen.summary().index, n_cells // len(screen.conditions)
    control = np.array([not p.perturbations for p in screen.conditions])
    media = np.array([screen.media.index(m) for m in index.get_level_values("media")])
    number = pd.factorize(index.droplevel("perturbation"))[0] + pd.factorize(index.get_level_values("perturbation"))[0]
    turn = number % n_batches
    alone = np.eye(n_batches)[turn]
    everywhere = np.full((len(index), n_batches), 1 / n_batches)
    own = (np.arange(n_batches) % len(screen.media))[None] == media[:, None]
    shares = (
        np.where(control[:, None], np.eye(n_batches)[0], alone),
        np.where(control[:, None], everywhere, alone),
        own / np.maximum(own.sum(1, keepdims=True), 1) if n_batches >= len(screen.media) > 1 else None,
        everywhere,
    )
    columns = pd.Index([f"batch{b + 1}" for b in range(n_batches)], name="batch")
    tables = ((name, share) for name, share in zip(PROPOSED, shares, strict=True) if share is not None)
    return {name: pd.DataFrame(_whole(each * share), index=index, columns=columns) for name, share in tables}


@torch.no_grad()
def plan_batches(
    source: "Fit | BatchPrior",
    layouts: Mapping[str, "pd.DataFrame | Screen"],
    *,
    of: str = "change",
    n_draws: int = 20,
    n_points: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> BatchPlan:
    """Return the error that each layout would leave, as far as a fit of a similar screen can tell, or a prior.

    In a layout the mean log rate f_c of condition c is seen in batch b with n_cb cells as f_c + η^b + noise, noise of variance s²_c / n_cb,
    η^b ~ Normal(0, τ²) independently. Given τ, s² and the size v of effects, f has a normal posterior of covariance C for each gene,
    whatever comes out. What is learnt, evaluated at untouched cells, is then wrong by

        ε_c = δ_c − δ_0·∇𝓕(x, c),    δ ~ Normal(0, C),

    δ_0 being the error of control in baseline media at the time of c: eq 22 with the batch effects estimated as well as the layout
    allows, and the sampling of cells beside them. ``of="change"`` plans for changes against control, as `effects` gives them: a map that
    adds a change to the cell has ∇𝓕 = 1. ``of="map"`` takes ∇𝓕 of the fitted 𝓕 at ``n_points`` cells: the log rates themselves, whose
    common level no batch tells of.

    τ, s² and v are those of the fit, draw by draw, or of a `BatchPrior`, which has no 𝓕. ``layouts`` maps names to tables of cells as
    `Screen.summary` or `propose_layouts` give, or to screens; with a prior the media of the first row of control is the baseline.
    Raises ValueError for a condition without its control in the table, or one that the fit does not know.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> layouts = pb.propose_layouts(screen, 3, 300)
    >>> pb.plan_batches(pb.BatchPrior(batch_scale=0.3), layouts).best
    'media hashed into every batch'
    >>> fit = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, epochs=2, progress=False)
    >>> plan = pb.plan_batches(fit, layouts, n_draws=3, progress=False)
    >>> plan.error.sizes["layout"]
    3
    """
    check_draws(n_draws)
    if of not in ("change", "map"):
        raise ValueError(f"of={of!r}: use 'change' or 'map'.")
    if not isinstance(layouts, Mapping) or not layouts:
        raise TypeError(f"layouts maps names to tables of cells, such as propose_layouts(...) returns; got {type(layouts).__name__}.")
    tables = {name: _checked(one.summary() if isinstance(one, Screen) else one, name) for name, one in layouts.items()}
    if isinstance(source, BatchPrior):
        if of == "map":
            raise ValueError("A BatchPrior has no 𝓕 to take the gradient of: use of='change', or plan with a fit.")
        plans = [_Table(table) for table in tables.values()]
        draws = source.draws(n_draws, seed)
        values = [[error_of_changes(plan.cells, source.law(len(plan.cells), draw), plan.control) for plan in plans] for draw in draws]
    else:
        require_posterior(source, "Plans weigh errors")
        values = _from_fit(source, list(tables.values()), of, n_draws, n_points, seed, progress)
    coords = {"draw": np.arange(n_draws), "layout": list(tables)}
    return BatchPlan(xr.DataArray(np.array(values), coords, ("draw", "layout")).transpose("layout", "draw"), tables)


def _from_fit(fit: "Fit", tables: list[pd.DataFrame], of: str, n_draws: int, n_points: int, seed: int, progress: bool) -> list[list[float]]:
    """Return the error of each draw and layout."""
    plans = [_FittedTable(fit, table) for table in tables]
    uniform = SobolEngine(fit.model.rest_size, scramble=True, seed=seed).draw(n_points).clamp(1e-6, 1 - 1e-6)
    values = []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="plan" if progress else None)):
        row = []
        for plan in plans:
            with seeded(seed, k, 9):  # the same noise for every layout
                if of == "change":
                    row.append(error_of_changes(plan.table.cells, plan.law(sites), plan.table.control))
                else:
                    row.append(plan.error(sites, fit.model.rest_points(uniform.to(fit.model.log_share))))
        values.append(row)
    return values


def _whole(cells: Float[np.ndarray, "condition batch"]) -> Int[np.ndarray, "condition batch"]:
    """Round each row to whole numbers of the same sum: the largest remainders are rounded up, ties in turn along the rows."""
    down = np.floor(cells + 1e-9)
    left = np.rint((cells - down).sum(1)).astype(int)
    turn = (np.arange(cells.shape[1]) - np.arange(len(cells))[:, None]) % cells.shape[1]
    rank = np.argsort(np.lexsort((turn, down - cells), axis=1), axis=1)
    return (down + (rank < left[:, None])).astype(int)


def improve_layout(
    source: "Fit | BatchPrior", layout: "pd.DataFrame | Screen", *, capacity: int | None = None, n_moves: int = 20, seed: int = 0
) -> pd.DataFrame:
    """Return a layout after greedy moves: each takes half a condition's cells of one batch to another where that lowers the error most.

    The error is that of `plan_batches` for one gene of median τ, s² and v with ∇𝓕 = 1; moves stop where none helps. No batch grows beyond
    ``capacity`` cells, by default those of the largest: without a limit one batch for everything has no batch effect at all.
    """
    check_draws(n_moves, "n_moves")
    layout = _checked(layout.summary() if isinstance(layout, Screen) else layout, "layout")
    limit = float(layout.to_numpy().sum(0).max()) if capacity is None else float(capacity)
    if isinstance(source, BatchPrior):
        table = _Table(layout)
        law = source.law(len(table.cells))
    else:
        require_posterior(source, "Plans weigh errors")
        plan = _FittedTable(source, layout)
        table, whole = plan.table, plan.law(next(iter(global_draws(source.model, source.guide, 1, seed))))
        noise, spread, effect = (part.median(-1, keepdim=True).values for part in whole)
        law = (noise, spread, effect)
    cells = table.cells.clone()
    for _ in range(n_moves):
        trials = [trial for trial in _moves(cells) if (trial.sum(0) <= torch.maximum(cells.sum(0), cells.new_tensor(limit))).all()]
        errors = [error_of_changes(trial, law, table.control) for trial in trials]
        if min(errors, default=np.inf) >= error_of_changes(cells, law, table.control) * (1 - 1e-6):
            break
        cells = trials[int(np.argmin(errors))]
    return pd.DataFrame(cells.numpy().astype(int), index=layout.index, columns=layout.columns)


def _checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a table of cells; refuse what is none, and numbers of cells that cannot be."""
    if not isinstance(table, pd.DataFrame) or table.index.nlevels != 3 or not all(map(pd.api.types.is_numeric_dtype, table.dtypes)):
        raise TypeError(
            f"{name!r} is no table of cells: a DataFrame of numbers with rows (perturbation, media, time) and a column for each batch, "
            f"such as screen.summary(); got {type(table).__name__}."
        )
    cells = table.to_numpy(dtype=float)
    if not np.isfinite(cells).all() or (cells < 0).any() or not cells.any() or (cells != np.floor(cells)).any():
        raise ValueError(f"{name!r} holds numbers of cells that are negative, not finite, not whole, or all 0. Correct the table.")
    if not table.index.is_unique:
        raise ValueError(f"{name!r} has two rows for {table.index[table.index.duplicated()][0]}. Add them up.")
    return table


def _moves(cells: Float[Tensor, "condition batch"]) -> "list[Float[Tensor, 'condition batch']]":
    """Return every layout that is one move away: half of the cells of a condition from one batch to another."""
    found = []
    for c, b in torch.nonzero(cells > 1).tolist():
        for other in range(cells.shape[1]):
            if other != b:
                trial = cells.clone()
                moved = torch.floor(trial[c, b] / 2)
                trial[c, b] -= moved
                trial[c, other] += moved
                found.append(trial)
    return found


@final
class _Table:
    """A layout: its conditions, their cells in each batch, and the row of the control of each."""

    def __init__(self, table: pd.DataFrame, baseline: str | None = None) -> None:
        """Read the rows, and find the control of each."""
        self.keys = [(str(p), str(m), float(t)) for p, m, t in table.index]
        first = next((m for p, m, _ in self.keys if p == "control"), "baseline")
        baseline = first if baseline is None else baseline
        if lacking := [key for key in self.keys if ("control", baseline, key[2]) not in self.keys]:
            raise ValueError(
                f"The layout has no row for control in {baseline!r} at time {lacking[0][2]:g}, which {lacking[0]} needs; 0 cells will do."
            )
        self.control = [self.keys.index(("control", baseline, key[2])) for key in self.keys]
        self.cells = torch.as_tensor(table.to_numpy(dtype=float))


@final
class _FittedTable:
    """A layout in the words of a fit."""

    def __init__(self, fit: "Fit", table: pd.DataFrame) -> None:
        """Look its conditions up."""
        if fit.model.batch_effect.n_batches == 1:
            raise ValueError(
                "The fit has one batch: how far batches differ was never seen. Plan with a fit of several batches, or a BatchPrior."
            )
        self.fit, names = fit, fit.model.vocabulary
        baseline = names.baseline or "baseline"
        known = {(p.perturbation, p.media or baseline, p.time): p for p in map(Protocol.parse, fit.trained_on["conditions"])}
        if missing := [(str(p), str(m), float(t)) for p, m, t in table.index if (str(p), str(m), float(t)) not in known]:
            raise ValueError(f"The fit does not know the condition {missing[0]}. A layout holds conditions that were fitted.")
        if len(table) < 2:
            raise ValueError("A plan compares conditions, and this layout holds one: there is no change to be wrong about.")
        self.table = _Table(table, baseline)
        self.conditions = [known[key] for key in self.table.keys]
        self.expectation = Expectation(fit, self.conditions, [None] * len(self.conditions))

    def law(self, sites: Sites) -> Law:
        """Return s² of one cell in each condition, τ² and v, given one draw of the globals."""
        model, whole = self.fit.model, self.expectation.complete(sites)
        shares = torch.cat([self.expectation.log_shares(whole, part) for part in self.expectation.parts], 1).double()
        spread = sites["batch_scale"].double().square()
        if model.start is not None:
            unit = model.law(sites, torch.zeros_like(model.log_share)).variance.double()
            return unit + shares.var(0, correction=0), spread, shares.mean(0).var(0) + 1e-4
        unit = model.law(sites, torch.zeros_like(model.log_share))
        extra = ((unit.variance - unit.mean) / unit.mean.square()).double()
        mean = shares.exp().mean(0)
        noise = 1 / (mean * model.log_depth.double().exp() * unit.mean) + extra + shares.exp().var(0, correction=0) / mean.square()
        return noise, spread, mean.log().var(0) + 1e-4

    def error(self, sites: Sites, z0: Float[Tensor, "point latent"]) -> float:
        """Return the mean of ε² over conditions, points and genes, for errors δ drawn from their law."""
        factor = torch.linalg.cholesky(covariance(self.table.cells, *self.law(sites)))
        noise = torch.randn(NOISES, *factor.shape[:2], 1, dtype=factor.dtype)
        delta = (factor @ noise)[..., 0].mT.to(self.fit.model.log_share)  # noise, condition, gene
        origin = [self.conditions[k] for k in self.table.control]
        f = projected(self.fit, self.conditions, sites=sites)
        start = projected(self.fit, origin, sites=sites)
        state = self.fit.model.moved(start.sites, z0[:, None].expand(-1, len(origin), -1), start.segments)
        x = self.fit.model.log_shares(start.sites, state, start.rows)
        slopes = [f.slope(x, d[self.table.control].expand_as(x))[1] - d for d in delta]
        return float(torch.stack(slopes).square().mean())
