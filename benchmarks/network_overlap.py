"""Compare the network that `causal_context` finds in the Ishikawa screen with the matrix that RENGE's authors publish.

    python benchmarks/network_overlap.py A_renge.csv A_renge_qval.csv --epochs 80

The two files are in the source distribution of renge 0.0.5 (PyPI), examples/data; element (i, j) is the coefficient from gene j to gene
i, as the README there says, which is (gene, regulator) here. Edges of RENGE are those with q below ``--q``. As many of ours, by
probability and then by absolute weight, are compared with them: the share that both have (``overlap``), the share of those with the same
sign (``sign``), the area under the precision-recall curve of our order for their edges (``auprc``), and the rank correlation of absolute
weights (``rank``) and of signed ones (``signed``). ``all`` takes every pair of different genes, ``perturbed`` those whose regulator was
knocked out.

Nulls permute RENGE's matrix: ``labels`` all genes, rows and columns together; ``classes`` the same, knocked-out genes among themselves and
others among themselves; ``targets`` the targets of each regulator. A p-value is the share of permutations that reach the value,
one-sided, the matrix itself among them. ``change`` is what the mean change of a gene on a knock-out reaches, no model behind it.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from network import changes
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

import perturbprob as pb

Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def agreement(score: np.ndarray, weight: np.ndarray, pairs: np.ndarray) -> Measure:
    """Return what compares our order ``score`` and signed ``weight`` of the ``pairs`` with RENGE's weights and edges."""
    own, order = weight[pairs], score[pairs]
    ranks = {"rank": rankdata(np.abs(own)), "signed": rankdata(own)}
    best = np.argsort(-order, kind="stable")

    def compare(theirs: np.ndarray, edge: np.ndarray) -> dict[str, float]:
        theirs, edge = theirs[pairs], edge[pairs]
        both = best[: edge.sum()][edge[best[: edge.sum()]]]
        other = {"rank": rankdata(np.abs(theirs)), "signed": rankdata(theirs)}
        return {
            "overlap": len(both) / max(1, edge.sum()),
            "sign": float((np.sign(own) == np.sign(theirs))[both].mean()) if len(both) else np.nan,
            "auprc": float(average_precision_score(edge, order)),
            **{name: float(np.corrcoef(ranks[name], other[name])[0, 1]) for name in ranks},
        }

    return compare


def permuted(null: str, perturbed: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the places, rows and columns, that a permuted matrix is read from; the diagonal stays on the diagonal."""
    n = len(perturbed)
    if null == "targets":
        rows = np.tile(np.arange(n)[:, None], n)
        for regulator in range(n):
            others = np.delete(np.arange(n), regulator)
            rows[others, regulator] = rng.permutation(others)
        return rows, np.tile(np.arange(n), (n, 1))
    place = np.arange(n)
    for part in (place,) if null == "labels" else (np.flatnonzero(perturbed), np.flatnonzero(~perturbed)):
        place[part] = rng.permutation(part)
    return np.ix_(place, place)


def tested(measure: Measure, theirs: np.ndarray, edge: np.ndarray, perturbed: np.ndarray, n: int) -> dict[str, dict[str, float]]:
    """Return each value with its mean and p-value under each null."""
    rng, found = np.random.default_rng(0), measure(theirs, edge)
    table = {name: {"value": value} for name, value in found.items()}
    for null in ("labels", "classes", "targets"):
        places = (permuted(null, perturbed, rng) for _ in range(n))
        drawn = pd.DataFrame([measure(theirs[place], edge[place]) for place in places])
        for name, value in found.items():
            table[name] |= {f"{null}_mean": drawn[name].mean(), f"{null}_p": (1 + (drawn[name] >= value).sum()) / (1 + n)}
    return {name: {k: round(float(v), 4) for k, v in row.items()} for name, row in table.items()}


def main() -> None:
    """Fit, compare, print one line for each set of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix")
    parser.add_argument("q_values")
    parser.add_argument("--q", type=float, default=0.05)
    for name, value in (("epochs", 80), ("latent", 10), ("draws", 200), ("permutations", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    screen = pb.datasets.ishikawa2023()
    theirs, q = (pd.read_csv(file, index_col=0) for file in (options.matrix, options.q_values))
    genes = [g for g in screen.genes if g in theirs.index]
    theirs, q = (table.loc[genes, genes].to_numpy() for table in (theirs, q))
    off = ~np.eye(len(genes), dtype=bool)
    edge = (q < options.q) & off

    start = time.process_time()
    model = pb.causal_context(screen, n_latent=options.latent, seed=options.seed)
    fit = pb.fit(model, screen, epochs=options.epochs, seed=options.seed, progress=False)
    found = pb.edges(fit, n_draws=options.draws).sel(gene=genes, regulator=genes)
    weight, probability, perturbed = (found[name].values for name in ("weight", "probability", "perturbed"))
    settings = {name: fit.settings[name] for name in ("epochs", "minibatch")}
    settings["steps"] = len(fit.losses["train"]) * int(
        np.ceil((1 - fit.settings["validation"]) * screen.n_cells / fit.settings["minibatch"])
    )
    print(json.dumps(settings | {"cpu_seconds": round(time.process_time() - start), "report": fit.report()}))

    change, lost = np.zeros_like(weight), changes(screen)
    for gene in np.unique(lost[0]):
        change[:, genes.index(screen.genes[gene])] = -lost[1][lost[0] == gene].mean(0)[[list(screen.genes).index(g) for g in genes]]
    ours = np.nan_to_num(probability + 1e-3 * rankdata(np.abs(np.nan_to_num(weight))).reshape(weight.shape) / weight.size)
    for name, pairs in (("all", off), ("perturbed", off & perturbed)):
        counted = {"pairs": int(pairs.sum()), "renge_edges": int(edge[pairs].sum()), "likely": int((probability[pairs] > 0.5).sum())}
        print(json.dumps({"of": name, "score": "causal_context", "genes": len(genes)} | counted))
        for what, row in tested(agreement(ours, np.nan_to_num(weight), pairs), theirs, edge, perturbed, options.permutations).items():
            print(json.dumps({"of": name, "score": "causal_context", "measure": what} | row), flush=True)
    for what, row in tested(agreement(np.abs(change), change, pairs), theirs, edge, perturbed, options.permutations).items():
        print(json.dumps({"of": name, "score": "change", "measure": what} | row), flush=True)


if __name__ == "__main__":
    main()
