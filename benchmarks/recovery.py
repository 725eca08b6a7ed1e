"""Simulate screens, fit them, and count how often the truth lies inside the posterior's 90 % intervals.

    python benchmarks/recovery.py --screens 10 --json
    python benchmarks/recovery.py --screens 3 --batches 2 3 4 5 6 7 8 --unequal 0.3 0.6 0.9 --cells 2000 --genes 60

``--screens`` are simulated for each number of batches; the degrees of unequal composition take turns among them.

What is scored is identified: batch effects centred over genes by rate, log fold changes per condition and gene, and dispersion. The size
factor is the simulated one, as from all genes of a cell; ``--own-depth`` takes it from the measured genes instead, which
takes part of the abundant genes' variance away and with it the dispersion's coverage. ``--torch`` leaves the compiled count model out.
"""

import argparse
import itertools
import json
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.measurement import fused

LEVEL = 0.9


def coverage(draws: xr.DataArray, truth: xr.DataArray) -> float:
    """Return the share of entries whose truth lies inside the central interval of the draws."""
    lower, upper = (draws.quantile(q, ("chain", "draw")) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(((lower <= truth) & (truth <= upper)).mean())


def recover(
    simulation: Simulation,
    *,
    epochs: int = 60,
    n_latent: int = 5,
    n_draws: int = 200,
    own_depth: bool = False,
    seed: int = 0,
    **training: Any,
) -> dict[str, float]:
    """Fit one simulated screen and return the coverage of each kind of truth, and the share of right calls of hits."""
    truth = simulation.truth
    size_factor = None if own_depth else truth["size_factor"].values
    screen = pb.Screen.from_anndata(
        simulation.adata, media="media", baseline=str(truth["media"].values[0]), time="time", batch="batch", size_factor=size_factor
    )
    fit = pb.fit(pb.node(screen, n_latent), screen, epochs=epochs, seed=seed, progress=False, **training)
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
    parser.add_argument("--batches", type=int, nargs="+", default=[3])
    parser.add_argument("--unequal", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--own-depth", action="store_true")
    parser.add_argument("--torch", action="store_true", help="leave the compiled count model out")
    parser.add_argument("--json", action="store_true")
    options, rows, start = parser.parse_args(), [], time.perf_counter()
    warnings.simplefilter("ignore")
    if options.torch:
        fused.kernel = lambda: None
    for seed, (n_batches, screen) in enumerate(itertools.product(options.batches, range(options.screens))):
        label = {"seed": seed, "batches": n_batches, "unequal": options.unequal[screen % len(options.unequal)]}
        how = {"n_cells": options.cells, "n_genes": options.genes, "n_batches": n_batches, "unequal": label["unequal"], "seed": seed}
        rows.append(label | recover(pb.simulate(**how), epochs=options.epochs, own_depth=options.own_depth))
        if not options.json:
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    by_batches = table.groupby("batches")["batch_effect"].agg(["mean", "min", "max"]).round(3)
    setting = {name: getattr(options, name) for name in ("cells", "genes", "epochs", "own_depth", "torch")}
    answer = {
        "mean": table.drop(columns=["seed", "batches", "unequal"]).mean().round(3).to_dict(),
        "batch_effect_by_number_of_batches": by_batches.to_dict("index"),
        "setting": setting | {"seconds": round(time.perf_counter() - start)},
        "screens": rows,
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
