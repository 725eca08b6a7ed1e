"""Simulate RNA, proteins and chromatin windows of one state, and ask how well the levels of the further assays are predicted.

    python benchmarks/assays.py --screens 4

Control and two knock-outs in two batches; each assay is missing in half of the cells. The knock-outs move the latent state, and some
features by themselves. Scored per condition, in log mean count: the correlation with the truth of how far each feature is from its mean
over conditions, the slope of the same, the root-mean-square error beside that of the raw means, and the coverage of 90 % intervals.
"""

import argparse
import json
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData

import perturbprob as pb

SHIFT = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
NAMES = np.array(["control", "G1", "G2"])


def screen_of(seed: int, n: int) -> tuple[pb.Screen, dict[str, np.ndarray]]:
    """Return a screen, and the true mean count of each feature of each assay, (condition, feature)."""
    rng = np.random.default_rng(seed)
    k = np.arange(n) % 3
    z = rng.normal(size=(n, 2)) + SHIFT[k]
    share = np.exp(z @ rng.normal(0, 0.4, (2, 20)))
    adata = AnnData(rng.poisson(1 + 80 * share / share.sum(1, keepdims=True)).astype(np.float32))
    adata.var_names = [f"G{i}" for i in range(20)]
    adata.obs = pd.DataFrame({"perturbation": NAMES[k], "batch": rng.choice(["b1", "b2"], n)}, index=[f"c{i}" for i in range(n)])
    truth, assays = {}, {}
    kinds = (("protein", "protein", 15, 0.35, 1.5, 2.0, 5, 3), ("atac", "chromatin", 30, 0.4, -0.5, 0.0, 6, 0))
    for name, kind, size, spread, level, background, first, second in kinds:
        loading, own = rng.normal(0, spread, (2, size)), np.zeros((3, size))
        own[1, :first], own[2, first : first + second] = rng.choice([-0.6, 0.6], first), rng.choice([-0.6, 0.6], second)
        rate = background + np.exp(level + z @ loading + own[k])
        adata.obsm[name] = rng.poisson(rate * rng.gamma(10, 0.1, rate.shape))
        truth[name] = background + np.exp(level + SHIFT @ loading + own + 0.5 * (loading**2).sum(0))
        known = {"present": rng.random(n) < 0.5, "size_factor": np.ones(n)}
        assays[name] = pb.Assay.from_anndata(adata, kind=kind, obsm=name, **known)
    return pb.Screen.from_anndata(adata, perturbation_type="knockout", batch="batch").with_assays(assays), truth


def scored(screen: pb.Screen, truth: np.ndarray, fit: pb.Fit, name: str) -> list[list[float]]:
    """Return correlation, slope, error, error of raw means, and coverage of each condition."""
    assay, predicted = screen.assays[name], pb.predict_assay(fit, assay=name, n_draws=100, progress=False)
    raw = np.stack([assay.counts[assay.present & (screen.condition == k)].toarray().mean(0) for k in range(3)])
    wanted, found, seen = np.log(truth), np.log(predicted["mean"].values), np.log(raw + 0.01)
    inside = (predicted["lower"].values <= truth) & (truth <= predicted["upper"].values)
    rows = []
    for k in range(3):
        x, y = (wanted - wanted.mean(0))[k], (found - found.mean(0))[k]
        errors = [np.sqrt(((v - wanted)[k] ** 2).mean()) for v in (found, seen)]
        rows.append([np.corrcoef(x, y)[0, 1], np.polyfit(x, y, 1)[0], *errors, inside[k].mean()])
    return rows


def main() -> None:
    """Run over screens and print the table of means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=4)
    parser.add_argument("--cells", type=int, default=900)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, list[list[list[float]]]] = {}
    for seed in range(options.screens):
        screen, truth = screen_of(seed, options.cells)
        model = pb.node(screen, 2, n_hidden=32, assumptions=[pb.UneditedStable()])
        fit = pb.fit(model, screen, epochs=options.epochs, minibatch=128, learning_rate=0.01, progress=False)
        for name, mean in truth.items():
            rows.setdefault(name, []).append(scored(screen, mean, fit, name))
    columns = ("correlation", "slope", "rmse", "rmse_of_raw_means", "covered")
    table = {
        a: {c: dict(zip(columns, map(float, r), strict=True)) for c, r in zip(NAMES, np.mean(v, 0).round(3), strict=True)}
        for a, v in rows.items()
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
