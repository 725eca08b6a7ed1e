"""Let edited cells escape in simulated screens, and ask how often the 90 % interval of π holds the probability with which they were hit.

    python benchmarks/penetrance.py --screens 10

An escaped cell has the counts of a control cell of its time and batch. How far hit and escaped cells differ is what Fisher's discriminant
of log(1 + count / size factor) sees, told which are which and cross-validated: d′ = √2 Φ⁻¹(area under its curve), in standard deviations.
"""

import argparse
import time
import warnings

import numpy as np
import scipy.stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation


def with_escapers(simulation: Simulation, seed: int) -> tuple[pb.Screen, np.ndarray, dict[str, float]]:
    """Return a screen in which each perturbation misses cells with a probability from 0.05 to 0.7, which cells escaped, and each π."""
    chance, adata = np.random.default_rng(seed), simulation.adata.copy()
    obs = adata.obs.astype({"perturbation": str, "batch": str, "time": float})
    missed = {name: chance.uniform(0.05, 0.7) for name in sorted(set(obs["perturbation"]))} | {"control": 0.0}
    escaped = chance.random(len(obs)) < obs["perturbation"].map(missed).to_numpy()
    source, control = np.arange(len(obs)), obs[obs["perturbation"] == "control"].groupby(["time", "batch"]).indices
    place = np.flatnonzero(obs["perturbation"] == "control")
    for cell in np.flatnonzero(escaped):
        source[cell] = place[chance.choice(control[obs["time"].iloc[cell], obs["batch"].iloc[cell]])]
    adata.X = adata.X[source]
    return (
        pb.Screen.from_anndata(adata, media="media", time="time", batch="batch"),
        escaped,
        {name: 1 - part for name, part in missed.items()},
    )


def distance(screen: pb.Screen, cells: np.ndarray, escaped: np.ndarray) -> float:
    """Return how many standard deviations lie between hit and escaped cells of one perturbation."""
    values = np.log1p(screen.counts.toarray()[cells] / screen.size_factor[cells, None])
    score = cross_val_predict(
        LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), values, escaped[cells], method="decision_function"
    )
    return float(np.sqrt(2) * scipy.stats.norm.ppf(np.clip(roc_auc_score(escaped[cells], score), 0.5, 1 - 1e-6)))


def main() -> None:
    """Run over screens; print each π and the coverage by how far hit and escaped cells differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=10)
    parser.add_argument("--cells", type=int, default=1500)
    parser.add_argument("--genes", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=60)
    options, start, rows = parser.parse_args(), time.perf_counter(), []
    warnings.simplefilter("ignore")
    for seed in range(options.screens):
        simulation = pb.simulate(
            n_cells=options.cells, n_genes=options.genes, n_perturbations=4, n_batches=2, effect_scale=2.0, depth=500, seed=seed
        )
        screen, escaped, hits = with_escapers(simulation, seed)
        fit = pb.fit(pb.node(screen, 4, penetrance=True), screen, epochs=options.epochs, seed=seed, progress=False)
        share = pb.posterior(fit, 400).posterior["penetrance"].isel(chain=0)
        hit = pb.hit_probability(fit, screen, n_draws=5, progress=False)
        false = pb.false_hits(fit, screen, n_draws=5, progress=False)["control"]
        for gene in share.perturbation.values:
            cells, own = screen.cells_of(gene), share.sel(perturbation=gene)
            low, high = np.quantile(own, [0.05, 0.95])
            true, apart = hits[gene], distance(screen, cells, escaped)
            told = roc_auc_score(~escaped[cells], hit.sel(perturbation=gene)[cells])
            rows.append((apart, low <= true <= high, float(own.mean()) - true, float(own.std())))
            print(
                f"{seed} {gene}: d' {apart:.2f}, true {true:.2f}, found {low:.2f}-{high:.2f}, area under the curve of hits {told:.2f}, "
                f"controls said to be hit {float(false.sel(perturbation=gene)):.2f}",
                flush=True,
            )
    apart, inside, error, width = map(np.array, zip(*rows, strict=True))
    for low, high in ((0.0, 1.0), (1.0, 2.0), (2.0, np.inf)):
        part = (apart >= low) & (apart < high)
        if part.any():
            print(
                f"d' {low:g} to {high:g}: {part.sum()} perturbations, covered {inside[part].mean():.2f}, "
                f"mean error {error[part].mean():+.3f}, "
                f"root mean square error {np.sqrt(np.mean(error[part] ** 2)):.3f}, mean posterior sd {width[part].mean():.3f}"
            )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
