"""How the time of an epoch grows: with cells, genes, counts that are not 0, conditions and solver steps.

    python benchmarks/scaling.py --figure docs/images/scaling.png --json benchmarks/results/scaling.json

One thing grows, the others stay: 20,000 cells, 1,000 genes, about a tenth of the values not 0, 5 conditions, 2 solver steps, minibatches
of 512. Each point is the second epoch of a fit, the better of two, in microseconds per cell. The slope is that of a straight line through
the logarithms: 0 where the time per cell stays the same, 1 where it grows as fast. Cells beyond those that are simulated are drawn from
them once more. ``on disk`` reads its counts from an h5ad file (`Screen.from_store`).
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from interleaved import versions
from scipy.sparse import csr_array
from speed_vae import screen_of, simulated

import perturbprob as pb

CELLS, GENES, DEPTH = 20_000, 1_000, 180.0


def microseconds(screen: pb.Screen, make: Callable[[pb.Screen], pb.CellModel]) -> float:
    """Return the time of an epoch per cell."""

    def second() -> float:
        ends: list[float] = []
        told = {"each_epoch": lambda _: ends.append(time.perf_counter()), "validation": 0.0, "progress": False}
        pb.fit(make(screen), screen, epochs=2, minibatch=512, **told)
        return ends[1] - ends[0]

    return 1e6 * min(second() for _ in range(2)) / screen.n_cells


def vae(screen: pb.Screen) -> pb.CellModel:
    """Return the model of all lines but one."""
    return pb.vae(screen, n_latent=10)


def again(adata: anndata.AnnData, n_cells: int) -> anndata.AnnData:
    """Return so many cells, drawn once more where there are not as many."""
    if n_cells <= adata.n_obs:
        return adata[:n_cells].copy()
    cells = np.random.default_rng(0).integers(0, adata.n_obs, n_cells)
    obs = pd.DataFrame({"perturbation": adata.obs["perturbation"].to_numpy()[cells]}, index=[f"c{k}" for k in range(n_cells)])
    return anndata.AnnData(csr_array(adata.X)[cells], obs=obs, var=adata.var.copy())


def by_cells(largest: int) -> dict[int, float]:
    """Grow the cells, in memory."""
    adata = simulated(CELLS, GENES, DEPTH)
    return {n: microseconds(screen_of(again(adata, n)), vae) for n in sizes(1_000, min(largest, 100_000))}


def on_disk(largest: int) -> dict[int, float]:
    """Grow the cells, on disk."""
    found, adata = {}, simulated(CELLS, GENES, DEPTH)
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes(10_000, largest):
            path = Path(folder) / f"{n}.h5ad"
            again(adata, n).write_h5ad(path)
            found[n] = microseconds(pb.Screen.from_store(path, perturbation_type="knockout"), vae)
            path.unlink()
    return found


def by_genes(largest: int) -> dict[int, float]:
    """Grow the genes, and the depth with them."""
    return {g: microseconds(screen_of(simulated(5_000, g, DEPTH * g / GENES)), vae) for g in (100, 300, 1_000, 3_000, 10_000, 20_000)}


def by_counts(largest: int) -> dict[int, float]:
    """Grow the depth; the key is how many counts of a cell are not 0."""
    found = {}
    for depth in (30, 100, 300, 1_000, 3_000):
        screen = screen_of(simulated(5_000, GENES, depth))
        found[round(screen.counts.nnz / screen.n_cells)] = microseconds(screen, vae)
    return found


def by_conditions(largest: int) -> dict[int, float]:
    """Grow the perturbations."""
    adata, found = simulated(CELLS, GENES, DEPTH), {}
    for n in (3, 10, 30, 100, 300):
        which = np.arange(adata.n_obs) % (n + 1)
        adata.obs["perturbation"] = np.array(["control", *adata.var_names[:n]])[which]
        found[n + 1] = microseconds(screen_of(adata), vae)
    return found


def by_steps(largest: int) -> dict[int, float]:
    """Grow the steps of a neural ODE's solver."""
    screen = screen_of(simulated(5_000, GENES, DEPTH))

    def node(n_steps: int) -> Callable[[pb.Screen], pb.CellModel]:
        def make(screen: pb.Screen) -> pb.CellModel:
            model = pb.node(screen, n_latent=10)
            model.transition.solver.n_steps, model.transition.solver.check_every = n_steps, 10**9
            return model

        return make

    return {n: microseconds(screen, node(n)) for n in (1, 2, 4, 8, 16, 32)}


LINES: dict[str, Callable[[int], dict[int, float]]] = {
    "cells": by_cells,
    "cells, on disk": on_disk,
    "genes": by_genes,
    "counts that are not 0": by_counts,
    "conditions": by_conditions,
    "solver steps": by_steps,
}


def sizes(first: int, last: int) -> list[int]:
    """Return sizes three to a decade, roughly."""
    return [n for n in (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000) if first <= n <= last]


def slope(points: dict[int, float]) -> float:
    """Return the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def draw(lines: dict[str, dict[int, float]], path: Path) -> None:
    """Draw each line with its slope."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 3, sharey=True).flat, lines.items(), strict=False):
        axes.loglog(list(points), list(points.values()), "o-")
        axes.set(xlabel=name, title=f"slope {slope(points):.2f}")
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.supylabel("time of an epoch per cell (µs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES))
    parser.add_argument("--largest", type=int, default=1_000_000, help="the largest number of cells")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines: dict[str, dict[int, float]] = {}
    for name in options.lines:
        lines[name] = LINES[name](options.largest)
        print(name, f"slope {slope(lines[name]):.2f}", {n: round(t, 1) for n, t in lines[name].items()}, flush=True)
    if options.figure is not None:
        draw(lines, options.figure)
    if options.json is not None:
        found: dict[str, Any] = {name: {"slope": round(slope(points), 3), "microseconds": points} for name, points in lines.items()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found | {"versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
