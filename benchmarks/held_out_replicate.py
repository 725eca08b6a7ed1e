"""Hide one replicate of a screen, learn its batch effects from its control cells alone, and predict the means of its conditions.

    python benchmarks/held_out_replicate.py papalexi2021_thp1_eccite.h5ad --batch replicate

A fit of the other replicates is adapted to the hidden one by its control cells (`adapt`). Predicted is E[log(1 + count)] of every
perturbed condition at the depths of its own cells; the error is the mean square over genes against the mean of log(1 + count) over
those cells. Beside it stand

- ``none``: the fit at η = 0, and ``average``: its mean over the fitted replicates;
- ``shift``: ``average``, and on top of it what is left of the control cells of the hidden replicate;
- ``adapt_shift``: the same on top of ``adapt``;
- ``data_shift``: no model: the mean of the condition over the cells of the other replicates, and on top the difference of controls;
- ``floor``: the part of the error that is due to sampling the hidden cells, their variance over their number.

Differences to ``adapt`` are paired over conditions, with a 90 % interval by bootstrap of conditions; one below 0 says that ``adapt`` is
better. The replicates share their conditions, so the three rows are not independent.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence

import anndata
import numpy as np
import torch

import perturbprob as pb
from perturbprob.experiment.action import Protocol
from perturbprob.inference.draws import global_draws, seeded
from perturbprob.inference.expectation import Expectation


def read(path: str, batch: str, cells: int, genes: int, seed: int) -> pb.Screen:
    """Read some cells at random and the most abundant genes; size factors are those of all genes."""
    adata = anndata.read_h5ad(path)
    rng = np.random.default_rng(seed)
    adata = adata[np.sort(rng.choice(adata.n_obs, min(cells, adata.n_obs), replace=False))]
    total, depth = (np.asarray(adata.X.sum(axis)).ravel() for axis in (0, 1))
    keep = np.sort(np.argsort(-total)[:genes])
    return pb.Screen.from_anndata(adata[:, keep].copy(), batch=batch, size_factor=depth / np.median(depth))


def predicted(fit: pb.Fit, cells: pb.Screen, batches: Sequence[str | None], n_draws: int) -> np.ndarray:
    """Return E[log(1 + count)] of each condition at the depths of its own cells, averaged over batches and draws: (condition, gene)."""
    protocols: list[Protocol] = list(cells.conditions)
    means = []
    for batch in batches:
        expectation = Expectation(fit, protocols, [batch] * len(protocols))
        rank = (np.arange(len(expectation.z)) + 0.5) / len(expectation.z)
        order = np.random.default_rng(0).permutation(len(rank))  # depths are not in the order of the rest states
        relative = np.log(cells.size_factor) + np.log(cells.depth)
        own = [np.quantile(relative[cells.condition == c], rank)[order] for c in range(len(protocols))]
        expectation.log_depth = torch.as_tensor(np.stack(own), dtype=torch.float32)
        for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws)):
            with seeded(k):
                sites = expectation.complete(draw)
            means.append(torch.cat([expectation.means(sites, part, "log1p", None) for part in expectation.parts]))
    return torch.stack(means).mean(0).numpy()


def moments(cells: pb.Screen) -> tuple[np.ndarray, np.ndarray]:
    """Return mean of log(1 + count) of each condition and its sampling variance, (condition, gene)."""
    values = np.log1p(cells.counts.toarray())
    groups = [values[cells.condition == c] for c in range(len(cells.conditions))]
    spread = [group.var(0, ddof=1) / len(group) if len(group) > 1 else np.full(cells.n_genes, np.nan) for group in groups]
    return np.stack([group.mean(0) for group in groups]), np.stack(spread)


def held_out(screen: pb.Screen, name: str, *, epochs: int, n_draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return each predictor's error of every perturbed condition of the replicate ``name``."""
    hidden, others = screen.batch == screen.batches.index(name), tuple(b for b in screen.batches if b != name)
    train, new = screen[~hidden], screen[hidden]
    controls = new[new.cells_of("control")]
    fit = pb.fit(pb.node(train, assumptions=[pb.UneditedStable()], seed=seed), train, epochs=epochs, seed=seed, progress=False)
    adapted = pb.adapt(fit, controls, name, n_draws=n_draws, progress=False)
    known = [c for c, p in enumerate(new.conditions) if p.perturbations and p in train.conditions]
    new = new[np.isin(new.condition, known)]
    observed, variance = moments(new)
    average = predicted(fit, new, others, n_draws)
    seen_in_controls = moments(controls)[0]
    seen, order = moments(train)[0], [train.conditions.index(p) for p in new.conditions]
    control = next(c for c, p in enumerate(train.conditions) if not p.perturbations)
    guesses = {
        "adapt": predicted(adapted, new, [name], n_draws),
        "none": predicted(fit, new, [None], n_draws),
        "average": average,
        "shift": average + seen_in_controls - predicted(fit, controls, others, n_draws),
        "data_shift": seen[order] + seen_in_controls - seen[control],
    }
    guesses["adapt_shift"] = guesses["adapt"] + seen_in_controls - predicted(adapted, controls, [name], n_draws)
    errors = {guess: ((value - observed) ** 2).mean(1) for guess, value in guesses.items()}
    return errors | {"floor": variance.mean(1), "cells": np.bincount(new.condition)}


def compared(errors: dict[str, np.ndarray], seed: int = 0) -> dict[str, object]:
    """Return mean errors, and differences of ``adapt`` to the others, paired over conditions."""
    resampled = np.random.default_rng(seed).integers(0, len(errors["adapt"]), (4000, len(errors["adapt"])))
    found: dict[str, object] = {name: round(float(np.nanmean(value)), 5) for name, value in errors.items() if name != "cells"}
    for name in ("none", "average", "shift", "adapt_shift", "data_shift"):
        difference = errors["adapt"] - errors[name]
        low, high = np.quantile(difference[resampled].mean(1), (0.05, 0.95))
        better = f"better in {(difference < 0).sum()} of {len(difference)} conditions"
        found[f"adapt − {name}"] = f"{difference.mean():.5f} [{low:.5f}, {high:.5f}], {better}"
    return found


def main() -> None:
    """Hide each replicate in turn and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an h5ad file with raw counts and the common obs columns")
    parser.add_argument("--batch", default="batch", help="the obs column of replicates")
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    screen, start = read(options.data, options.batch, options.cells, options.genes, options.seed), time.perf_counter()
    every = []
    for name in screen.batches:
        every.append(held_out(screen, name, epochs=options.epochs, n_draws=options.draws, seed=options.seed))
        print(json.dumps({"held_out": name} | compared(every[-1]), indent=1, ensure_ascii=False), flush=True)
    whole = {name: np.concatenate([errors[name] for errors in every]) for name in every[0]}
    print(json.dumps({"held_out": "each"} | compared(whole), indent=1, ensure_ascii=False))
    print(f"{round(time.perf_counter() - start)} s")


if __name__ == "__main__":
    main()
