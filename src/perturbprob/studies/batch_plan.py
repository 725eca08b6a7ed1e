"""Which conditions to put into which batches: the error that each layout would leave (B.2, experimental recommendations)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.screen import Screen
from perturbprob.inference.draws import Sites, check_draws, global_draws, seeded
from perturbprob.inference.predict import Expectation
from perturbprob.inference.projected import projected

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
            more = float((own / best).mean()) - 1
            lines.append(f"  {name}: {np.sqrt(float(own.mean())):.3f} ({low:.3f} to {high:.3f})" + (f", {more:+.0%}" if more > 0 else ""))
        return "\n".join([*lines, f"Advice: {self.best}."])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


def propose_layouts(screen: Screen, n_batches: int, n_cells: int) -> dict[str, pd.DataFrame]:
    """Return layouts of the conditions of a screen over ``n_batches`` batches of ``n_cells`` cells in all, conditions equally large.

    Each is a table of cells as `Screen.summary`: conditions (perturbation, media, time) × batches. Perturbed conditions are spread over
    batches in turn; control is in the first batch or in all; each media has batches of its own, or all are in every batch
    (hashed, where a barcode tells them apart).

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0,), seed=1).screen
    >>> layouts = propose_layouts(screen, 4, 1200)
    >>> {name: int(table.to_numpy().sum()) for name, table in layouts.items()}["controls in every batch"]
    1200
    """
    if n_batches < 2 or n_cells < len(screen.conditions) * n_batches:
        raise ValueError(f"A layout needs at least 2 batches and a cell of each condition in each; got {n_batches} and {n_cells} cells.")
    index, each = screen.summary().index, n_cells // len(screen.conditions)
    control = np.array([not p.perturbations for p in screen.conditions])
    media = np.array([screen.media.index(m) for m in index.get_level_values("media")])
    turn = np.arange(len(index)) % n_batches
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
    return {name: pd.DataFrame(np.rint(each * share).astype(int), index=index, columns=columns) for name, share in tables}


@torch.no_grad()
def plan_batches(
    fit: "Fit",
    layouts: Mapping[str, "pd.DataFrame | Screen"],
    *,
    n_draws: int = 20,
    n_points: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> BatchPlan:
    """Return the error that each layout would leave, as far as a fit of a similar screen can tell.

    In a layout the mean log rate f_c of condition c is seen in batch b with n_cb cells as f_c + η^b + noise, noise of variance s²_c / n_cb,
    η^b ~ Normal(0, τ²) independently. Given τ, s² and the size v of effects, f has a normal posterior of covariance C for each gene,
    whatever comes out. What is learnt, evaluated at untouched cells, is then wrong by

        ε_c = δ_c − δ_0·∇𝓕(x, c),    δ ~ Normal(0, C),

    δ_0 being the error of control in baseline media at the time of c: eq 22 with the batch effects estimated as well as the layout
    allows, and the sampling of cells beside them. τ, s², v and 𝓕 are those of the fit, draw by draw. ``layouts`` maps names to tables of
    cells as `Screen.summary` or `propose_layouts` give, or to screens. Raises ValueError for a condition without its control in
    the table, or one that the fit does not know.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    >>> fit = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, epochs=2, progress=False)
    >>> plan = pb.plan_batches(fit, pb.propose_layouts(screen, 3, 300), n_draws=3, progress=False)
    >>> plan.error.sizes["layout"]
    3
    """
    check_draws(n_draws)
    if fit.model.batch_effect.n_batches == 1:
        raise ValueError("The fit has one batch: how far batches differ was never seen. Plan with a fit of several batches.")
    tables = {name: one.summary() if isinstance(one, Screen) else one for name, one in layouts.items()}
    plans = {name: _Table(fit, table) for name, table in tables.items()}
    uniform = SobolEngine(fit.model.n_latent, scramble=True, seed=seed).draw(n_points).clamp(1e-6, 1 - 1e-6)
    values = []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="plan" if progress else None)):
        row = []
        for plan in plans.values():
            with seeded(seed, k, 9):  # the same noise for every layout
                row.append(plan.error(sites, fit.model.rest_points(uniform.to(fit.model.log_share))))
        values.append(row)
    coords = {"draw": np.arange(n_draws), "layout": list(plans)}
    return BatchPlan(xr.DataArray(np.array(values), coords, ("draw", "layout")).transpose("layout", "draw"), tables)


def improve_layout(fit: "Fit", layout: pd.DataFrame, *, n_moves: int = 20, seed: int = 0) -> pd.DataFrame:
    """Return a layout after greedy moves: each takes half a condition's cells of one batch to another where that lowers the error most.

    The error is that of `plan_batches` for one gene of median τ, s² and v with ∇𝓕 = 1; moves stop where none helps.
    """
    plan = _Table(fit, layout)
    sites = next(iter(global_draws(fit.model, fit.guide, 1, seed)))
    noise, spread, effect = (values.median(-1, keepdim=True).values for values in plan.law(sites))
    cells = plan.cells.clone()
    for _ in range(n_moves):
        trials = list(_moves(cells))
        errors = torch.stack([_expected(trial, noise, spread, effect, plan.control) for trial in trials])
        if errors.min() >= _expected(cells, noise, spread, effect, plan.control) * (1 - 1e-6):
            break
        cells = trials[int(errors.argmin())]
    return pd.DataFrame(cells.numpy().astype(int), index=layout.index, columns=layout.columns)


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


def _expected(
    cells: Float[Tensor, "condition batch"], noise: Tensor, spread: Tensor, effect: Tensor, control: list[int]
) -> Float[Tensor, ""]:
    """Return the mean of (δ_c − δ_0)² over conditions and genes."""
    c = covariance(cells, noise, spread, effect)
    own, origin = torch.diagonal(c, dim1=1, dim2=2), torch.tensor(control)
    return (own + own[:, origin] - 2 * c[:, torch.arange(len(cells)), origin]).mean()


@final
class _Table:
    """One layout in the words of a fit."""

    def __init__(self, fit: "Fit", table: pd.DataFrame) -> None:
        """Read the conditions, and find the control of each."""
        self.fit, names = fit, fit.model.vocabulary
        known = {
            (p.perturbation, p.media or names.baseline or "baseline", p.time): p for p in map(Protocol.parse, fit.trained_on["conditions"])
        }
        keys = [(str(p), str(m), float(t)) for p, m, t in table.index]
        if missing := [key for key in keys if key not in known]:
            raise ValueError(f"The fit does not know the condition {missing[0]}. A layout holds conditions that were fitted.")
        baseline = names.baseline or "baseline"
        if lacking := [key for key in keys if ("control", baseline, key[2]) not in keys]:
            raise ValueError(
                f"The layout has no row for control in {baseline!r} at time {lacking[0][2]:g}, which {lacking[0]} needs; 0 cells will do."
            )
        self.control = [keys.index(("control", baseline, key[2])) for key in keys]
        self.conditions = [known[key] for key in keys]
        self.cells = torch.as_tensor(table.to_numpy(dtype=float))
        self.expectation = Expectation(fit, self.conditions, [None] * len(keys))

    def law(self, sites: Sites) -> tuple[Float[Tensor, "condition gene"], Float[Tensor, " gene"], Float[Tensor, " gene"]]:
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
        factor = torch.linalg.cholesky(covariance(self.cells, *self.law(sites)))
        noise = torch.randn(NOISES, *factor.shape[:2], 1, dtype=factor.dtype)
        delta = (factor @ noise)[..., 0].mT.to(self.fit.model.log_share)  # noise, condition, gene
        origin = [self.conditions[k] for k in self.control]
        f = projected(self.fit, self.conditions, sites=sites)
        start = projected(self.fit, origin, sites=sites)
        state = self.fit.model.moved(start.sites, z0[:, None].expand(-1, len(origin), -1), start.segments)
        x = self.fit.model.log_shares(start.sites, state, start.rows)
        slopes = [f.slope(x, d[self.control].expand_as(x))[1] - d for d in delta]
        return float(torch.stack(slopes).square().mean())
