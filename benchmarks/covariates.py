"""Simulate plates of 24 wells, regress batch effects on edge and composition (eq 19, C.2), and count coefficients inside intervals.

    python benchmarks/covariates.py --plates 10

Each well holds control cells and a knock-out. Its batch effect is a sum of an edge term, a composition summary and noise of its own.
"""

import argparse
import json
import time

import numpy as np
import pandas as pd
from anndata import AnnData

import perturbprob as pb
from perturbprob.experiment.plate import read_wells

WELLS = [f"{row}{column}" for row in "ABCD" for column in range(1, 7)]


def plate(seed: int, *, edge: str, genes: int, cells: int, noise: float) -> tuple[pb.Screen, pd.DataFrame, np.ndarray]:
    """Return a screen, the covariates of its wells, and the true coefficients (covariate, gene) of the standardised covariates."""
    rng = np.random.default_rng(seed)
    composition = pd.Series(rng.uniform(0, 1, len(WELLS)), index=WELLS)
    table = read_wells(WELLS, plate=24).covariates(edge).assign(composition=composition)
    level, slope = np.log(np.linspace(3, 15, genes)), rng.normal(0, 0.2, (2, genes))
    slope -= (slope * np.exp(level)).sum(1, keepdims=True) / np.exp(level).sum()
    eta = ((table - table.mean()) / table.std()).to_numpy() @ slope + rng.normal(0, noise, (len(table), genes))
    names = ["well", "perturbation", "cell"]
    obs = pd.MultiIndex.from_product([table.index, ["control", "A"], range(cells)], names=names).to_frame(index=False)
    changed = np.outer(obs["perturbation"] == "A", np.arange(genes) == 0)
    log_rate = level + eta[table.index.get_indexer(obs["well"])] - np.log(2) * changed
    counts = rng.poisson(np.exp(log_rate) * rng.gamma(20, 1 / 20, (len(obs), 1))).astype(np.float32)
    adata = AnnData(counts, obs=obs[["well", "perturbation"]].set_index(obs.index.astype(str)))
    adata.var_names = ["A", *(f"g{k}" for k in range(1, genes))]
    return pb.Screen.from_anndata(adata, perturbation_type="knockout", batch="well"), table, slope


def covered(screen: pb.Screen, table: pd.DataFrame, slope: np.ndarray, *, epochs: int, seed: int) -> dict[str, float]:
    """Fit one plate; return the share of coefficients inside their 90 % intervals, and their root-mean-square error."""
    model = pb.node(screen, 1, n_hidden=8, batch_effect=table, assumptions=[pb.UneditedStable()], seed=seed)
    fit = pb.fit(model, screen, epochs=epochs, learning_rate=0.05, minibatch=1000, validation=0.0, progress=False, seed=seed)
    found = pb.posterior(fit, 300).posterior["batch_covariate_effect"].squeeze("chain").values
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    error = float(np.sqrt(((found.mean(0) - slope) ** 2).mean()))
    return {"covered": float(((low <= slope) & (slope <= high)).mean()), "rmse": error, "sd": float(found.std(0).mean())}


def main() -> None:
    """Run over plates and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plates", type=int, default=10)
    parser.add_argument("--edge", default="indicator")
    parser.add_argument("--genes", type=int, default=10)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=150)
    options, rows, start = parser.parse_args(), [], time.perf_counter()
    for seed in range(options.plates):
        made = plate(seed, edge=options.edge, genes=options.genes, cells=options.cells, noise=options.noise)
        rows.append(covered(*made, epochs=options.epochs, seed=seed))
    mean = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
    print(json.dumps({"mean": mean, "plates": rows, "seconds": round(time.perf_counter() - start)}, indent=1))


if __name__ == "__main__":
    main()
