"""Predicted against true errors that batches leave (eqs 20-22), on simulated layouts whose field is not linear.

    python benchmarks/batch_error.py --pairs 20

The truth is `simulate(coupling=1)`: 𝓕, known, takes the log shares x of cells at rest to those of a condition, and is not linear in x.
Batches are those of `Simulation.remeasured`: independent draws from Normal(0, τ²). All errors are mean squares, over conditions and genes,
of a difference of log shares, from which the mean over genes by rate, which is depth, is taken out; x is control in baseline media.

- *map known*: who learnt 𝓕_L(x, b′ → b) = 𝓕(x − η^b′) + η^b, so that eq 18 holds, and averages by eq 17. Predicted: eq 22 in its tight
  form, with the gradient of 𝓕 and other draws of the population of η, or with the very η. True: the finite difference, by solving the
  field again from x − η^b′.
- *means of counts*: condition and batch estimated from the counts of a layout by a normal two-way model with random batches (`two_way`).
  Predicted: `plan_batches`, from the fit of another screen of the same cells in three even batches (``pilot``) or from a
  `BatchPrior` (``prior``); neither sees the layout's counts. True: the estimated change of each condition against control, x plus which is
  the map with ∇𝓕 = 1; and its level, the map with ∇𝓕 = 0.
- *map fitted* (``--fits``, slow): `node` is fitted to the counts of the two layouts of controls. True: the fitted 𝓕_* of eq 17 at x against
  𝓕 (``map``), and its change against its own control.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.studies.layout_error import covariance

TAU, N_CELLS, STEP = 0.3, 2000, 1e-3
EFFECT = 2.0  # perturbations then move genes about as far as batches do
SCREEN = {"n_genes": 24, "n_perturbations": 4, "media": ("rest", "drug"), "times": (1.0,), "n_cells": 200, "inactive": 0.0}
PRIOR = pb.BatchPrior(batch_scale=TAU, effect_scale=0.3, mean_count=5.0)
SHORT, LONG = {"epochs": 40, "minibatch": 400, "learning_rate": 1e-2}, {"epochs": 100, "minibatch": 200, "learning_rate": 1e-2}


def centred(error: np.ndarray, simulation: Simulation) -> np.ndarray:
    """Take the mean over genes by rate out."""
    return error - (error * simulation.truth["rate_share"].values[0]).sum(-1, keepdims=True)


def outcomes(simulation: Simulation, x: np.ndarray) -> np.ndarray:
    """Return 𝓕 of every condition, (point, condition, gene)."""
    return np.stack([simulation.outcome(x, c) for c in simulation.truth["condition"].values], 1)


def gradient(simulation: Simulation) -> np.ndarray:
    """Return ∇𝓕 at control in baseline media, (condition, from, to), by central differences."""
    x = np.log(simulation.truth["rate_share"].values[:1])
    step = STEP * np.eye(x.shape[1])
    up, down = np.split(outcomes(simulation, np.concatenate([x + step, x - step])), 2)
    return ((up - down) / (2 * STEP)).swapaxes(0, 1)


def known_map(
    simulation: Simulation, slope: np.ndarray, eta: np.ndarray, sources: list[int], smooth: float = 1.0, shrink: float = 1.0
) -> dict[str, float]:
    """Return the true error of a known map, that of eq 22, and how far the gradient, ``slope``, is from the identity along η.

    ``smooth`` below 1 makes the map less curved and leaves its gradient at x alone, F(x) + [F(x + s v) − F(x)] / s; ``shrink``
    multiplies the gradient and leaves the curvature alone, F(x + v) + (s − 1) v·∇F.
    """
    x, among, own = np.log(simulation.truth["rate_share"].values[:1]), eta[sources], eta.mean(0)
    found = outcomes(simulation, np.concatenate([x, x - smooth * among]))
    along = np.einsum("bg,cgh->bch", among, slope)
    moved = (found[1:] - found[:1]) / smooth + (1 - shrink) * along
    return {
        "true": float(np.square(centred(own + moved.mean(0), simulation)).mean()),
        "predicted": float(np.square(centred(own - shrink * along.mean(0), simulation)).mean()),
        "from_identity": float(np.square(centred(shrink * along - among[:, None], simulation)).mean() / np.square(among).mean()),
    }


def expected(simulation: Simulation, slope: np.ndarray, n_batches: int, sources: list[int], n_draws: int = 200) -> float:
    """Return eq 22 over draws of the population of η that no layout was measured with."""
    eta = centred(np.random.default_rng(12345).normal(0, TAU, (n_draws, n_batches, slope.shape[1])), simulation)
    carried = np.einsum("dg,cgh->dch", eta[:, sources].mean(1), slope)
    return float(np.square(centred(carried - eta.mean(1)[:, None], simulation)).mean())


def layouts_of(simulation: Simulation, n_batches: int, seed: int) -> dict[str, pd.DataFrame]:
    """Return controls in one and in every batch, and a layout in which each condition has its own shares of the batches."""
    found = pb.propose_layouts(simulation.screen, n_batches, N_CELLS)
    every = found["controls in every batch"]
    share = np.random.default_rng([seed, 9]).dirichlet(np.full(n_batches, 0.4), len(every))
    cells = np.rint(every.sum(axis=1).to_numpy()[:, None] * share).astype(int)
    cells[0] = np.maximum(cells[0], 1)
    return {name: found[name] for name in ("controls in one batch", "controls in every batch")} | {
        "own shares": pd.DataFrame(cells, every.index, every.columns)
    }


def even(simulation: Simulation, n_batches: int) -> pd.DataFrame:
    """Return a layout of all conditions in every batch."""
    index = simulation.screen.summary().index
    return pd.DataFrame(N_CELLS // (len(index) * n_batches), index, [f"batch{b + 1}" for b in range(n_batches)])


def fitted(simulation: Simulation, training: dict[str, float] = LONG) -> pb.Fit:
    """Fit a screen."""
    model = pb.node(simulation.screen, 3, assumptions=[pb.UneditedStable(), pb.ExchangeableBatches()])
    return pb.fit(model, simulation.screen, warmup=10, progress=False, **training)


def two_way(simulation: Simulation) -> dict[str, float]:
    """Return the errors of changes and levels that a normal model of log means, with random batches, finds in the counts."""
    screen, share = simulation.screen, np.log(simulation.truth["rate_share"].values)
    order = [str(p) for p in screen.conditions]
    counts, share = screen.counts.toarray().astype(float), share[simulation.truth.get_index("condition").get_indexer(order)]
    counts *= (counts.sum() / len(counts)) / counts.sum(1, keepdims=True)  # equal depth, so that a mean over cells is a share
    group, shape = screen.condition * len(screen.batches) + screen.batch, (len(order), len(screen.batches), counts.shape[1])
    table = pd.DataFrame(counts).groupby(group)
    mean, noise = (
        np.zeros((np.prod(shape[:2]), shape[2])),
        np.square(table.transform("mean").to_numpy() - counts).mean(0) / counts.mean(0) ** 2,
    )
    mean[list(table.groups)] = np.log(table.mean().to_numpy() + 0.5 / table.size().to_numpy()[:, None])
    cells, mean = torch.as_tensor(screen.summary().to_numpy() * 1.0), torch.as_tensor(mean.reshape(shape)).permute(2, 0, 1)
    noise = torch.as_tensor(noise)[None].expand(len(order), -1)
    spread, effect = torch.full((2, shape[2]), TAU**2, dtype=torch.float64)  # perturbations as large as batches
    law, weight = covariance(cells, noise, spread, effect), cells / noise.T[:, :, None]
    shift = (weight * mean).sum(1) / (weight.sum(1) + 1 / spread[:, None])  # gene, batch
    found = (law @ ((weight * mean).sum(2) - (weight @ shift[:, :, None])[..., 0])[..., None])[..., 0].T.numpy()
    origin = order.index("Protocol([Wait(1)])")
    wrong = centred(found - np.log(np.exp(found).sum(1, keepdims=True)) - share, simulation)
    return {"change": float(np.square(wrong - wrong[origin]).mean()), "level": float(np.square(wrong).mean())}


@torch.no_grad()
def learnt_error(fit: pb.Fit, simulation: Simulation) -> dict[str, float]:
    """Return the true errors of a fitted map, and along the true η what its gradient carries, bends and leaves of the identity."""
    conditions = [pb.Protocol.parse(c) for c in simulation.truth["condition"].values]
    x = np.log(simulation.truth["rate_share"].values[:1])
    start = torch.as_tensor(x).float()[:, None].expand(1, len(conditions), -1)
    error, parts = [], []
    for b in simulation.screen.layout.batches_with_control:
        f = pb.projected(fit, conditions, batch_from=b)  # to the average batch, eq 17
        eta = torch.as_tensor(simulation.truth["batch_effect"].sel(batch=b).values).float()
        here, slope = f.slope(start, eta.expand_as(start))
        bend = f(start + eta) - here - slope
        error.append(here.double().numpy()[0])
        parts.append([float(p.square().mean() / eta.square().mean()) for p in (slope, bend, slope - eta)])
    wrong = centred(np.mean(error, 0) - outcomes(simulation, x)[0], simulation)
    carried, bent, from_identity = np.mean(parts, 0)
    change = float(np.square(wrong - wrong[0]).mean())
    return {"map": float(np.square(wrong).mean()), "change": change, "carried": carried, "bent": bent, "from_identity": from_identity}


def compared(seed: int) -> list[dict[str, object]]:
    """Return what was predicted and what came out for three layouts of one truth."""
    simulation = pb.simulate(**SCREEN, coupling=1.0, effect_scale=EFFECT, seed=seed)
    n_batches, slope = (2, 3, 4, 6)[seed % 4], gradient(simulation)
    layouts = layouts_of(simulation, n_batches, seed)
    pilot = fitted(simulation.remeasured(even(simulation, 3), batch_scale=TAU, seed=1000 + seed), SHORT)
    plans = {"plan_pilot": pb.plan_batches(pilot, layouts, n_draws=5, progress=False), "plan_prior": pb.plan_batches(PRIOR, layouts)}
    rows = []
    for name, table in layouts.items():
        measured = simulation.remeasured(table, batch_scale=TAU, seed=seed)
        sources = [list(table).index(b) for b in measured.screen.layout.batches_with_control]
        known = known_map(simulation, slope, measured.truth["batch_effect"].values, sources)
        row = {"seed": seed, "layout": name, "batches": n_batches, "expected": expected(simulation, slope, n_batches, sources)}
        row |= {f"known_{k}": v for k, v in known.items()} | two_way(measured)
        rows.append(row | {k: float(plan.error.mean("draw").sel(layout=name)) for k, plan in plans.items()})
    return rows


def one_batch(seed: int) -> list[dict[str, float]]:
    """Return errors, over the mean square of η, of one batch for everything: 𝓕 with its gradient, and with less of it."""
    rows = []
    for coupling, shrink in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9), (1.0, 0.75), (1.0, 0.5), (1.0, 0.0)):
        simulation = pb.simulate(**SCREEN, coupling=coupling, effect_scale=EFFECT, seed=seed)
        measured = simulation.remeasured(even(simulation, 1), batch_scale=TAU, seed=seed)
        eta = measured.truth["batch_effect"].values
        row = known_map(simulation, gradient(simulation), eta, [0], shrink=shrink)
        over = {name: row[name] / np.square(eta).mean() for name in ("true", "predicted")}
        rows.append({"coupling": coupling, "gradient": shrink} | row | over)
    return rows


def smoother(seed: int) -> list[dict[str, object]]:
    """Return errors of a known map whose curvature alone, or whose gradient alone, is made smaller."""
    simulation = pb.simulate(**SCREEN, coupling=1.0, effect_scale=EFFECT, seed=seed)
    eta = simulation.remeasured(even(simulation, 3), batch_scale=TAU, seed=seed).truth["batch_effect"].values
    slope, rows = gradient(simulation), []
    for sources in ([0], [0, 1, 2]):
        forms = {"as it is": (1.0, 1.0), "half the curvature": (0.5, 1.0), "no curvature": (0.01, 1.0), "half the gradient": (1.0, 0.5)}
        errors = {name: known_map(simulation, slope, eta, sources, *form)["true"] for name, form in forms.items()}
        rows.append({"controls in": f"{len(sources)} of 3", "seed": seed} | errors)
    return rows


def fits(seed: int) -> list[dict[str, object]]:
    """Return the errors of fitted maps: all in one batch, controls in one of several, and in every one."""
    simulation = pb.simulate(**SCREEN, coupling=1.0, effect_scale=EFFECT, seed=seed)
    layouts = layouts_of(simulation, (2, 3, 4, 6)[seed % 4], seed) | {"one batch": even(simulation, 1)}
    rows = []
    for name in ("one batch", "controls in one batch", "controls in every batch"):
        measured = simulation.remeasured(layouts[name], batch_scale=TAU, seed=seed)
        rows.append({"seed": seed, "layout": name} | learnt_error(fitted(measured), measured))
        rows[-1]["eta"] = float(np.square(measured.truth["batch_effect"].values).mean())
    return rows


def with_interval(values: Callable[[np.ndarray], float], seeds: np.ndarray, n: int = 2000) -> list[float]:
    """Return a figure, and its central 90 % interval when seeds are drawn again with replacement."""
    rng = np.random.default_rng(0)
    again = [values(rng.choice(seeds, len(seeds))) for _ in range(n)]
    return [round(float(v), 4) for v in (values(seeds), *np.nanquantile(again, [0.05, 0.95]))]


def spearman(table: pd.DataFrame, one: str, other: str) -> list[float]:
    """Return the rank correlation over layouts, with its interval over truths."""
    by_seed = {seed: rows[[one, other]].to_numpy() for seed, rows in table.groupby("seed")}

    def value(seeds: np.ndarray) -> float:
        return pd.DataFrame(np.concatenate([by_seed[s] for s in seeds])).corr("spearman").iloc[0, 1]

    return with_interval(value, np.array(list(by_seed)))


def ratio(numerator: pd.Series, denominator: pd.Series) -> list[float]:
    """Return the geometric mean of paired ratios, with its interval over pairs."""
    logs = np.log(numerator.to_numpy() / denominator.to_numpy())
    return with_interval(lambda k: np.exp(logs[k].mean()), np.arange(len(logs)))


def over(table: pd.DataFrame, names: list[str]) -> dict[str, dict[str, object]]:
    """Return how the error changes from controls in one batch to controls in every batch, over pairs of one truth."""
    few, every = (table[table["layout"] == f"controls in {how} batch"].set_index("seed") for how in ("one", "every"))
    return {n: {"share of pairs lower": float((every[n] < few[n]).mean()), "ratio": ratio(every[n], few[n])} for n in names}


def main() -> None:
    """Run the study and print the figures, each with its 90 % interval over truths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--fits", type=int, default=6, help="truths for the fitted maps")
    parser.add_argument("--save", help="a CSV of all layouts")
    options, start = parser.parse_args(), time.process_time()
    warnings.simplefilter("ignore")
    table = pd.DataFrame([row for seed in range(options.pairs) for row in compared(seed)])
    if options.save:
        table.to_csv(options.save)
    pairs = (("known_predicted", "known_true"), ("expected", "known_true"), ("plan_pilot", "change"), ("plan_prior", "change"))
    rank = {f"{one} ~ {other}": spearman(table, one, other) for one, other in pairs}
    controls = over(table, ["known_true", "change", "level", "expected", "plan_pilot", "plan_prior"])
    kinds = {kind: spearman(part, "plan_pilot", "change") for kind, part in table.groupby("layout")}
    size = {plan: ratio(table["change"], table[plan]) for plan in ("plan_pilot", "plan_prior")}
    answer = {"layouts": len(table), "spearman": rank, "spearman of plan_pilot ~ change within a kind": kinds, "true over predicted": size}
    print(json.dumps(answer | {"controls in every batch over in one": controls}, indent=1), flush=True)
    alone = pd.DataFrame([row for seed in range(options.pairs) for row in one_batch(seed)])
    print("one batch for everything, errors over the mean square of η:")
    quantiles = alone.groupby(["coupling", "gradient"])[["from_identity", "predicted", "true"]].quantile([0.05, 0.5, 0.95])
    print(quantiles.unstack().round(4).to_string(), flush=True)
    smooth = pd.DataFrame([row for seed in range(options.pairs) for row in smoother(seed)])
    names = ("half the curvature", "no curvature", "half the gradient")
    found = {k: {n: ratio(part[n], part["as it is"]) for n in names} for k, part in smooth.groupby("controls in")}
    print(json.dumps({"smoother maps over the map as it is, controls in": found, "seconds": round(time.process_time() - start)}, indent=1))
    if options.fits:
        fitting = pd.DataFrame([row for seed in range(options.fits) for row in fits(seed)])
        print(fitting.drop(columns="seed").groupby("layout").agg(["mean", "sem"]).round(4).T.to_string())
        print(json.dumps({"fitted": over(fitting, ["map", "change"]), "seconds": round(time.process_time() - start)}, indent=1))


if __name__ == "__main__":
    main()
