"""Find the network of simulated screens with `causal_context`, beside simple baselines, and see what an edge's probability is worth.

    python benchmarks/network.py --screens 1

Each screen has 20 genes, every one knocked out, five times and 200 cells a condition. Scored are the edges between different genes: the
area under the precision-recall curve of each score (at random it is the share of edges), and how often edges of a probability are there. An
edge's probability is the share of posterior draws in which its gate is more than half open. ``change`` is the mean absolute change of a
gene when the other is knocked out, ``correlation`` that of genes over control cells, ``ridge`` the weights of a ridge regression of each
gene's change on those of the others (and −1 for the one that is knocked out), its strength by leave-one-out. With
``--renge 30`` also RENGE (``pip install renge==0.0.5``) as its README calls it, by absolute coefficients, its settings found by its own
cross-validation in 30 trials (its default); ``--epochs 0`` leaves our own fit out.
"""

import argparse
import json
import time
import warnings

import joblib
import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.metrics import average_precision_score

import perturbprob as pb


def changes(screen: pb.Screen) -> tuple[np.ndarray, np.ndarray]:
    """Return the knocked-out gene of each condition and the change of every gene against control of the same time, log1p means."""
    values = np.log1p(screen.counts.toarray() / screen.size_factor[:, None])
    mean = {c: values[screen.condition == k].mean(0) for k, c in enumerate(screen.conditions)}
    control = {c.time: m for c, m in mean.items() if not c.perturbations}
    edited = [c for c in mean if c.perturbations]
    lost = np.array([list(screen.genes).index(c.perturbations[0].gene) for c in edited])
    return lost, np.stack([mean[c] - control[c.time] for c in edited])


def baselines(screen: pb.Screen) -> dict[str, np.ndarray]:
    """Score each edge (gene, regulator) without a model of ours."""
    lost, change = changes(screen)
    n_genes = screen.n_genes
    by_knockout = np.stack([np.abs(change[lost == k]).mean(0) for k in range(n_genes)], axis=1)
    product = change.copy()
    product[np.arange(len(lost)), lost] = -1.0
    ridge = np.zeros((n_genes, n_genes))
    for gene in range(n_genes):
        others = np.delete(np.arange(n_genes), gene)
        kept = lost != gene  # what is done to the gene itself says nothing of its regulators
        ridge[gene, others] = np.abs(RidgeCV(np.logspace(-3, 2, 16)).fit(product[kept][:, others], change[kept, gene]).coef_)
    control = np.array([not c.perturbations for c in screen.conditions])[screen.condition]
    cells = np.log1p(screen.counts[control].toarray() / screen.size_factor[control, None])
    return {"change": by_knockout, "correlation": np.abs(np.corrcoef(cells.T)), "ridge": ridge}


def renge(screen: pb.Screen, seed: int, trials: int) -> np.ndarray:
    """Score each edge by RENGE, its settings found by its own cross-validation in so many trials."""
    from renge import Renge

    genes, cells = list(screen.genes), list(screen.cells)
    expression = pd.DataFrame(np.log1p(screen.counts.toarray() / screen.size_factor[:, None]), cells, genes)
    done = [screen.conditions[c] for c in screen.condition]
    lost = np.array([[float(any(p.gene == g for p in protocol.perturbations)) for g in genes] for protocol in done])
    design = pd.DataFrame(lost, cells, genes).assign(t=[protocol.time for protocol in done])
    np.random.seed(seed)  # noqa: NPY002  # the generator that RENGE draws from
    with joblib.parallel_config(backend="sequential"):
        return Renge().estimate_hyperparams_and_fit(design, expression, n_trials=trials).loc[genes, genes].abs().to_numpy()


def network(screen: pb.Screen, seed: int, *, epochs: int, draws: int) -> tuple[dict[str, np.ndarray], str]:
    """Score each edge by its probability and its weight in a fit of ours; return the verdict on the training too."""
    fit = pb.fit(pb.causal_context(screen, n_latent=3), screen, epochs=epochs, seed=seed, progress=False)
    found = pb.posterior(fit, draws, seed=seed).posterior
    scores = {"probability": (found["edge_gate"].values[0] > 0.5).mean(0), "weight": np.abs(found["network"].values[0].mean(0))}
    return scores, fit.report().split("Verdict: ")[1].split(":")[0]


def score(seed: int, *, cells: int, genes: int, epochs: int, draws: int, trials: int) -> dict[str, object]:
    """Fit one screen; return the areas and the edges by probability."""
    times = (0.5, 1.0, 1.5, 2.0, 3.0)
    n_cells = cells * len(times) * (genes + 1)
    simulation = pb.simulate(n_cells=n_cells, n_genes=genes, n_perturbations=genes, times=times, n_batches=2, seed=seed)
    screen, edge = simulation.screen, ~np.eye(genes, dtype=bool)
    there = (simulation.truth["network"].values != 0)[edge]
    scores, clock, seconds = baselines(screen), time.perf_counter(), dict[str, int]()
    verdict, probability = "", np.zeros(0)
    if epochs:
        found, verdict = network(screen, seed, epochs=epochs, draws=draws)
        scores, probability = found | scores, found["probability"][edge]
        seconds["causal_context"], clock = round(time.perf_counter() - clock), time.perf_counter()
    if trials:
        scores["renge"] = renge(screen, seed, trials)
        seconds["renge"] = round(time.perf_counter() - clock)
    area = {name: round(float(average_precision_score(there, value[edge])), 3) for name, value in scores.items()}
    return {
        "seed": seed, "random": round(float(there.mean()), 3), "auprc": area, "seconds": seconds, "verdict": verdict,
        "probability": probability.tolist(), "there": there[: len(probability)].tolist(),
    }  # fmt: skip


def main() -> None:
    """Run over screens; print areas, and how often edges of a probability are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("screens", 1), ("first", 0), ("cells", 200), ("genes", 20), ("epochs", 100), ("draws", 200), ("renge", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    probability, there = np.array([]), np.array([], dtype=bool)
    for seed in range(options.first, options.first + options.screens):
        settings = {name: getattr(options, name) for name in ("cells", "genes", "epochs", "draws")}
        row = score(seed, **settings, trials=options.renge)
        probability, there = np.append(probability, row.pop("probability")), np.append(there, row.pop("there"))
        print(json.dumps(row), flush=True)
    for low, high in zip(np.arange(0, 1, 0.2), np.arange(0.2, 1.2, 0.2), strict=True):
        part = (probability >= low) & ((probability < high) | (high > 0.99))
        if part.any():
            print(f"{low:.1f}-{high:.1f}: {part.sum()} edges, said {probability[part].mean():.2f}, there {there[part].mean():.2f}")


if __name__ == "__main__":
    main()
