"""Simulate screens of a branching system (C.1), order their cells, and count what is found: by truth, and where there is nothing.

    python benchmarks/pseudotime.py --screens 40

A stem state leads to two lineages, A and B. BLOCK keeps cells out of A, in the stem; SLOW makes cells earlier; NONE does nothing.
With ``--file`` an AnnData with the labels of slingshot (pseudotime_lineage1, weight_lineage1, ..., cell_type) is ordered too, and random
parts of its cells are called perturbed.
"""

import argparse
import json
from collections.abc import Iterator

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import spearmanr

import perturbprob as pb

PERTURBATIONS = ("BLOCK", "NONE", "SLOW")


def branching(seed: int, *, controls: int = 800, each: int = 150, genes: int = 60, early: float = 1.0) -> AnnData:
    """Return counts of control cells and three knock-outs; obs holds the true progress, 0 to 1, and whether a cell leads to A.

    The genes are the same for all seeds. Control cells have progress up to ``early``.
    """
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    base = fixed.normal(0, 0.7, genes)
    stem, to_a, to_b = fixed.normal(0, 1, (3, genes)) * (fixed.random((3, genes)) < 0.4)
    name = np.repeat(["control", *PERTURBATIONS], [controls, *[each] * 3])
    progress, leads_to_a = rng.random(len(name)) * np.where(name == "control", early, 1.0), rng.random(len(name)) < 0.5
    progress = np.where((name == "BLOCK") & leads_to_a, 0.35 * progress, np.where(name == "SLOW", progress**2, progress))
    along = np.clip(progress - 0.3, 0, None) / 0.7
    log_rate = base + np.outer(1 - np.minimum(progress / 0.5, 1), 1.5 * stem) + 2 * np.outer(along * leads_to_a, to_a)
    rate = np.exp(log_rate + 2 * np.outer(along * ~leads_to_a, to_b))
    depth = 600 * np.exp(0.3 * rng.standard_normal(len(name)))
    mean = depth[:, None] * rate / rate.sum(axis=1, keepdims=True)
    counts = rng.poisson(mean * rng.gamma(5, 1 / 5, mean.shape)).astype(np.float32)
    obs = {"perturbation": name, "perturbation_type": "knockout", "progress": progress, "leads_to_a": leads_to_a}
    adata = AnnData(counts, obs=pd.DataFrame(obs, index=[f"cell{k}" for k in range(len(name))]))
    adata.var_names = [*PERTURBATIONS, *(f"g{k}" for k in range(3, genes))]
    return adata


def ordered(adata: AnnData, n_bootstraps: int = 0) -> pb.pseudotime.Pseudotime:
    """Order a simulated screen from its control cells of least progress."""
    first = (adata.obs["perturbation"] == "control") & (adata.obs["progress"] < 0.05)
    return pb.pseudotime.order(pb.Screen.from_anndata(adata), first, n_bootstraps=n_bootstraps)


def blocked(adata: AnnData) -> dict[str, bool | float]:
    """Say whether the two lineages are found, and for which perturbation and lineage fewer cells."""
    found = ordered(adata)
    truth = {name: adata.obs["leads_to_a"][list(cells)].mean() for name, cells in found.ends.items()}
    names = {name: "A" if share > 0.5 else "B" for name, share in truth.items()}
    fewer = pb.pseudotime.along(found)["fewer"].assign_coords(lineage=list(names.values()))
    result: dict[str, bool | float] = {"two_pure_ends": sorted(names.values()) == ["A", "B"] and all(s in (0, 1) for s in truth.values())}
    result["rank_correlation"] = float(spearmanr(found.cells["pseudotime"], adata.obs["progress"])[0])
    if result["two_pure_ends"]:
        result |= {f"{p} {lineage}": bool(fewer.sel(perturbation=p, lineage=lineage)) for p in PERTURBATIONS for lineage in "AB"}
    return result


def nothing_done(adata: AnnData, first: np.ndarray, seed: int, share: float = 0.2) -> pd.Series:
    """Call two random parts of cells perturbed, and return the p-values of pseudotime (numbered) and of lineages."""
    rng = np.random.default_rng(seed)
    part = int(share * len(adata))
    names = rng.permutation(np.repeat(["control", "P1", "P2"], [len(adata) - 2 * part, part, part]))
    screen = pb.Screen.from_anndata(AnnData(adata.X, obs=adata.obs.assign(perturbation=names, perturbation_type="knockout"), var=adata.var))
    table = pb.pseudotime.along(pb.pseudotime.order(screen, first, n_bootstraps=0)).drop_sel(perturbation="control")
    return pd.Series({"pseudotime": table["pseudotime_p_value"].values, "share": table["share_p_value"].values.ravel()})


def spreads(seed: int) -> np.ndarray:
    """Order the same perturbed cells by two sets of control cells; return their differences over the standard deviations given."""
    first, second = (branching(2 * seed + k) for k in range(2))
    same = first[first.obs["perturbation"] != "control"]
    parts = []
    for adata in (first, second):
        joined = anndata.concat([adata[adata.obs["perturbation"] == "control"], same])
        parts.append(ordered(joined, n_bootstraps=20).cells.isel(cell=slice(800, None)))
    one, two = parts
    return ((one["pseudotime"] - two["pseudotime"]) / np.hypot(one["pseudotime_sd"], two["pseudotime_sd"])).values


def growth(seed: int) -> Iterator[tuple[str, bool, bool]]:
    """Yield, for late cells that spread like the early, that spread further, and that have left, whether support grows and keeps."""
    early, late = branching(3 * seed, each=0, controls=300, early=0.4), branching(3 * seed + 1, each=0, controls=600)
    alike = branching(3 * seed + 2, each=0, controls=300, early=0.4)
    for name, other in (("same", alike), ("spread", late), ("left", late[late.obs["progress"] > 0.5])):
        adata = anndata.concat({"0": early, "1": other}, label="day", index_unique="-")
        screen = pb.Screen.from_anndata(adata[:, 3:].copy(), time="day")
        row = pb.pseudotime.growing_support(screen).table.iloc[0]
        yield name, bool(row["grows"]), bool(row["keeps"])


def ends(seed: int, n_cells: int) -> dict[str, int]:
    """Return how many ends are found in as many cells of two lineages, of one, and in a cloud that leads nowhere."""
    both = branching(seed, each=0, controls=2 * n_cells)
    cloud = pb.simulate(n_cells=n_cells, n_perturbations=0, times=(1.0,), seed=seed).screen
    found = {"two": ordered(both[:n_cells].copy()), "one": ordered(both[both.obs["leads_to_a"].to_numpy()][:n_cells].copy())}
    return {name: len(o.ends) for name, o in found.items()} | {"cloud": len(pb.pseudotime.order(cloud, [0], n_bootstraps=0).ends)}


def rates(p_values: list[pd.Series]) -> dict[str, float]:
    """Return how often p-values are at most 0.05 where nothing was done."""
    return {name: float((np.concatenate([p[name] for p in p_values]) <= 0.05).mean()) for name in ("pseudotime", "share")}


def of_file(path: str, screens: int) -> dict[str, object]:
    """Return the rank correlation with slingshot's pseudotime in each of its lineages, and error rates where nothing was done."""
    adata = anndata.read_h5ad(path)
    first = (adata.obs["cell_type"] == "Multipotent progenitors").to_numpy()
    found = pb.pseudotime.order(pb.Screen.from_anndata(adata), first)
    result: dict[str, object] = {"ends": {name: len(cells) for name, cells in found.ends.items()}}
    for k in (1, 2):
        on = (adata.obs[f"weight_lineage{k}"] > 0).to_numpy()
        result[f"lineage {k}"] = float(spearmanr(found.cells["pseudotime"].values[on], adata.obs[f"pseudotime_lineage{k}"][on])[0])
    return result | {"p <= 0.05 where nothing was done": rates([nothing_done(adata, first, seed) for seed in range(screens)])}


def main() -> None:
    """Run every count and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", type=int, default=40)
    parser.add_argument("--each", type=int, nargs="+", default=[50, 150])
    parser.add_argument("--cells", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--file")
    options = parser.parse_args()
    for each in options.each:
        table = pd.DataFrame([blocked(branching(seed, each=each)) for seed in range(options.screens)])
        print(json.dumps({"cells of each perturbation": each} | table.astype(float).mean().round(3).to_dict()))
    for n_cells in options.cells:
        counts = pd.DataFrame([ends(seed, n_cells) for seed in range(options.screens)]).apply(pd.Series.value_counts).T
        print(json.dumps({"control cells": n_cells, "numbers of ends": counts.fillna(0).astype(int).to_dict("index")}))
    nothing = [branching(seed, controls=1100, each=0) for seed in range(options.screens)]
    p_values = [nothing_done(adata, (adata.obs["progress"] < 0.05).to_numpy(), seed) for seed, adata in enumerate(nothing)]
    print(json.dumps({"p <= 0.05 where nothing was done": rates(p_values)}))
    z = np.concatenate([spreads(seed) for seed in range(max(1, options.screens // 8))])
    print(json.dumps({"same cells, other control cells": {"sd of z": float(z.std()), "within 1.645": float((np.abs(z) < 1.645).mean())}}))
    support = pd.DataFrame([row for seed in range(options.screens) for row in growth(seed)], columns=["late cells", "grows", "keeps"])
    print(json.dumps(support.groupby("late cells").mean().round(3).to_dict("index")))
    if options.file:
        print(json.dumps(of_file(options.file, options.screens)))


if __name__ == "__main__":
    main()
