"""Find networks with `stationary` from cells at rest, beside simple baselines.

    python benchmarks/stationary.py --screens 3 --genes 8
    python benchmarks/stationary.py --screens 3 --genes 8 --counts

Every gene is knocked out, 200 cells a condition, one time. The truth is the diffusion of the structure itself, simulated in numpy by small
steps and read as high counts; with ``--counts`` it is `pb.simulate`, which shares nothing with it but a network: cells that differ at
rest, negative binomial counts, three batches. Scored are the edges between different genes: the area under the precision-recall curve of
each score (at random it is the share of edges), and the correlation of fitted with true signed weights. ``change`` is the absolute change
of a gene when the other is knocked out, in standard deviations of control cells; ``correlation`` that of genes over control cells.
``error`` is the mean square error of the predicted mean log1p of all conditions, ``moved`` what predicting control costs.
"""

import argparse
import json
import time
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.metrics import average_precision_score

import perturbprob as pb


def at_rest(weights: np.ndarray, lost: int | None, n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return states of cells at rest, after 10 decay times in steps of 0.02."""
    kept, step = np.ones(len(weights)), 0.02
    if lost is not None:
        kept[lost] = 0.0
    x = np.zeros((n_cells, len(weights)))
    for _ in range(500):
        x = x + step * ((kept * 2 / (1 + np.exp(-x)) - 1) @ weights.T - x) + np.sqrt(2 * step) * rng.standard_normal(x.shape)
    return x


def own(seed: int, n_genes: int, n_cells: int) -> tuple[pb.Screen, np.ndarray]:
    """Return a screen of the structure's own diffusion, about two regulators for each gene, and its weights."""
    rng = np.random.default_rng(seed)
    there = (rng.random((n_genes, n_genes)) < 2 / n_genes) & ~np.eye(n_genes, dtype=bool)
    weights = np.where(there, rng.choice([-1.0, 1.0], there.shape) * rng.uniform(0.5, 1.5, there.shape), 0.0)
    genes = [f"G{k}" for k in range(n_genes)]
    states = np.concatenate([at_rest(weights, lost, n_cells, rng) for lost in (None, *range(n_genes))])
    obs = pd.DataFrame({"perturbation": np.repeat(["control", *genes], n_cells), "size": 1.0}, index=[f"c{k}" for k in range(len(states))])
    counts = np.round(np.expm1((5 + 0.3 * states).clip(0))).astype(np.float32)
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))
    return pb.Screen.from_anndata(adata, perturbation_type="knockout", size_factor="size"), weights


def other(seed: int, n_genes: int, n_cells: int) -> tuple[pb.Screen, np.ndarray]:
    """Return a screen of `pb.simulate`, late, and its weights."""
    simulation = pb.simulate(n_cells=n_cells * (n_genes + 1), n_genes=n_genes, n_perturbations=n_genes, times=(4.0,), seed=seed)
    return simulation.screen, simulation.truth["network"].values


def means(values: np.ndarray, screen: pb.Screen) -> np.ndarray:
    """Return the mean of each condition, control first."""
    return np.stack([values[screen.condition == k].mean(0) for k in range(len(screen.conditions))])


def score(screen: pb.Screen, weights: np.ndarray, **settings: float) -> dict[str, object]:
    """Fit one screen and score it."""
    edge = ~np.eye(screen.n_genes, dtype=bool)
    there = (weights != 0)[edge]
    start = time.perf_counter()
    fit = pb.fit(pb.stationary(screen), screen, progress=False, **settings)
    seconds = time.perf_counter() - start
    found = pb.edges(fit)["weight"].values
    values = np.log1p(screen.counts.toarray() / screen.size_factor[:, None])
    control, mean = values[screen.condition == 0], means(values, screen)
    change = np.stack([np.abs(mean[[c.perturbation for c in screen.conditions].index(g)] - mean[0]) for g in screen.genes], 1)
    scores = {"weight": np.abs(found), "change": change / control.std(0)[:, None], "correlation": np.abs(np.corrcoef(control.T))}
    batch = "average" if len(screen.batches) > 1 else None
    predicted = pb.predict(fit, list(screen.conditions), n_draws=1, scale="log1p", batch=batch, progress=False)["mean"].values
    observed = means(np.log1p(screen.counts.toarray()), screen)
    return {
        "random": round(float(there.mean()), 3),
        "auprc": {name: round(float(average_precision_score(there, value[edge])), 3) for name, value in scores.items()},
        "signed": round(float(np.corrcoef(found[edge], weights[edge])[0, 1]), 3),
        "error": round(float(np.square(predicted - observed).mean()), 5),
        "moved": round(float(np.square(observed - observed[0]).mean()), 5),
        "seconds": round(seconds),
    }


def main() -> None:
    """Run over screens and print their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("screens", 3), ("genes", 8), ("cells", 200), ("epochs", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--counts", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for seed in range(options.screens):
        made = (other if options.counts else own)(seed, options.genes, options.cells)
        print(json.dumps({"seed": seed, **score(*made, epochs=options.epochs)}), flush=True)


if __name__ == "__main__":
    main()
