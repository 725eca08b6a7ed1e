"""Simulate screens, fit them, and count how often the truth lies inside the posterior's 90 % intervals.

    python benchmarks/recovery.py --screens 10 --json

What is scored is identified: batch effects centred over genes by rate, log fold changes per condition and gene, and dispersion. The size
factor is the simulated one, as from all genes of a cell; ``--own-depth`` takes it from the measured genes instead, which
takes part of the abundant genes' variance away and with it the dispersion's coverage.
"""

import argparse
import json
import time
import warnings

import numpy as np
import xarray as xr

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation

LEVEL = 0.9


def coverage(draws: xr.DataArray, truth: xr.DataArray) -> float:
    """Return the share of entries whose truth lies inside the central interval of the draws."""
    lower, upper = (draws.quantile(q, ("chain", "draw")) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(((lower <= truth) & (truth <= upper)).mean())


def recover(
    simulation: Simulation, *, epochs: int = 60, n_latent: int = 5, n_draws: int = 200, own_depth: bool = False, seed: int = 0
) -> dict[str, float]:
    """Fit one simulated screen and return the coverage of each kind of truth, and the share of right calls of hits."""
    truth = simulation.truth
    size_factor = None if own_depth else truth["size_factor"].values
    screen = pb.Screen.from_anndata(
        simulation.adata, media="media", baseline=str(truth["media"].values[0]), time="time", batch="batch", size_factor=size_factor
    )
    fit = pb.fit(pb.node(screen, n_latent), screen, epochs=epochs, seed=seed, progress=False)
    draws = pb.posterior(fit, n_draws).posterior
    found = pb.effects(fit, n_draws=n_draws, level=LEVEL)
    change = truth["log_fold_change"].sel(condition=found["condition"].values)
    inside = (found["lower"].values <= change.values) & (change.values <= found["upper"].values)
    active = truth["active"].sel(target=found["tested_perturbation"].values).values
    hit = found["hit"].values
    return {
        "batch_effect": coverage(draws["batch_effect"], truth["batch_effect"]),
        "log_fold_change": float(inside.mean()),
        "log_fold_change_above_0.2": float(inside[np.abs(change.values) > 0.2].mean()),
        "dispersion": coverage(draws["dispersion"], truth["dispersion"]),
        "hits_found": float(hit[active].mean()),
        "false_hits": int((hit & ~active).sum()),
    }


def main() -> None:
    """Run over screens and degrees of unequal composition, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", type=int, default=10)
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--unequal", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--own-depth", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, rows, start = parser.parse_args(), [], time.perf_counter()
    warnings.simplefilter("ignore")
    for seed in range(options.screens):
        unequal = options.unequal[seed % len(options.unequal)]
        simulation = pb.simulate(n_cells=options.cells, n_genes=options.genes, n_batches=options.batches, unequal=unequal, seed=seed)
        rows.append({"seed": seed, "unequal": unequal} | recover(simulation, epochs=options.epochs, own_depth=options.own_depth))
        if not options.json:
            print(rows[-1], flush=True)
    mean = {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0] if name not in ("seed", "unequal")}
    setting = {
        "cells": options.cells,
        "genes": options.genes,
        "batches": options.batches,
        "own_depth": options.own_depth,
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps({"mean": mean, "setting": setting, "screens": rows}, indent=1))


if __name__ == "__main__":
    main()
