"""Take simulated screens apart and count how often the true shares of variance lie inside the 90 % intervals.

    python benchmarks/decomposition.py --screens 3 --batches 2 3 4 5 6 7 8

The truth is worked out by the same formula from what was simulated: the variance over the balanced grid of conditions and batches of the
log rate, state within it, and noise as the variance of log(1 + count) under its law at the median depth. Scored are the shares over
all genes (``overall``), of which a point is called near within 0.03, and those of single genes (``share``).
"""

import argparse
import json
import time
import warnings

import numpy as np
import scipy.stats

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation

SOURCES = ("state", "perturbation", "time", "batch", "rest", "noise")


def true_variance(simulation: Simulation) -> np.ndarray:
    """Return the variance of each source and gene, (source, gene)."""
    truth = simulation.truth
    logits = truth["median_log_rate"].values[None] + truth["programme"].values[:, None]
    log_share = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    value = log_share[:, :, None] + truth["batch_effect"].values  # state, condition, batch, gene
    shape = (len(dict.fromkeys(truth["perturbation"].values)), len(dict.fromkeys(truth["time"].values)), value.shape[2])
    mean = value.mean(0).reshape(*shape, -1)
    main = [mean.mean(tuple(k for k in range(3) if k != axis)).var(0) for axis in range(3)]
    log_rate = np.linspace(value.min(), value.max(), 80) + np.log(truth.attrs["depth"])
    count, theta = np.arange(2000)[:, None, None], truth["dispersion"].values
    weight = scipy.stats.nbinom.pmf(count, theta, theta / (theta + np.exp(log_rate)[:, None]))
    first, second = ((weight * np.log1p(count) ** k).sum(0) for k in (1, 2))
    depth = np.log(truth.attrs["depth"])
    noise = [np.interp(value[..., g] + depth, log_rate, (second - first**2)[:, g]).mean() for g in range(value.shape[-1])]
    return np.array([value.var(0).mean((0, 1)), *main, mean.var((0, 1, 2)) - sum(main), noise])


def score(seed: int, *, cells: int, genes: int, epochs: int, n_batches: int, n_draws: int) -> dict[str, dict[str, float]]:
    """Fit one screen; return for each source the true and found share, its interval's reach, and the coverage over genes."""
    simulation = pb.simulate(
        n_cells=cells, n_genes=genes, n_perturbations=4, n_batches=n_batches, batch_scale=0.3, unequal=0.5 * (seed % 2), seed=seed
    )
    screen = pb.Screen.from_anndata(
        simulation.adata, media="media", time="time", batch="batch", size_factor=simulation.truth["size_factor"].values
    )
    fit = pb.fit(pb.node(screen, 4), screen, epochs=epochs, seed=seed, progress=False)
    table = pb.decompose_batches(fit, n_draws=n_draws, n_states=64, interactions=[], progress=False).table
    variance = true_variance(simulation)
    overall, share = variance.sum(1) / variance.sum(), variance / variance.sum(0)
    found = {}
    for k, source in enumerate(SOURCES):
        own = table.sel(source=source)
        low, high, point = (float(own[f"overall{end}"]) for end in ("_lower", "_upper", ""))
        inside = (own["share_lower"].values <= share[k]) & (share[k] <= own["share_upper"].values)
        found[source] = {
            "true": overall[k], "found": point, "width": high - low, "covered": float(low <= overall[k] <= high),
            "near": float(abs(point - overall[k]) <= 0.03), "genes": float(inside.mean()),
        }  # fmt: skip
    return found


def main() -> None:
    """Run over screens and print coverage per source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=3, help="screens for each number of batches")
    parser.add_argument("--first", type=int, default=0, help="seed of the first screen")
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="+", default=[3])
    parser.add_argument("--draws", type=int, default=50)
    options, start, rows = parser.parse_args(), time.perf_counter(), []
    warnings.simplefilter("ignore")
    for seed, n_batches in enumerate(options.batches * options.screens, options.first):
        rows.append(
            score(seed, cells=options.cells, genes=options.genes, epochs=options.epochs, n_batches=n_batches, n_draws=options.draws)
        )
        found = {s: [round(v[k], 3) for k in ("true", "found", "width", "covered", "genes")] for s, v in rows[-1].items()}
        print(seed, n_batches, found, flush=True)
    of = {source: {name: np.mean([row[source][name] for row in rows]) for name in rows[0][source]} for source in SOURCES}
    error = {s: np.sqrt(np.mean([(row[s]["found"] - row[s]["true"]) ** 2 for row in rows])) for s in SOURCES}
    farthest = max(abs(v["found"] - v["true"]) for row in rows for v in row.values())
    print(f"{sum(v['near'] for row in rows for v in row.values()):.0f} of {len(rows) * len(SOURCES)} points within 0.03; {farthest=:.3f}")
    print(json.dumps({s: {k: round(float(v), 3) for k, v in (of[s] | {"rmse": error[s]}).items()} for s in SOURCES}, indent=1))
    print(f"{round(time.perf_counter() - start)} s")


if __name__ == "__main__":
    main()
