"""Draw screens from the prior of each structure, fit all structures to them, and ask whether the one that made them predicts best.

    python benchmarks/identification.py --screens 20

Each screen has five times. The last is hidden of half the perturbations and the last but one of the others: structures have to carry cells
there, beyond what they saw and between. Truths are prior draws (`perturbprob.prior_screen`) in which perturbations push three times as
hard as drawn (the network of a causal context is as drawn): where they hardly move cells all structures say the same. Conditions,
batches and size factors are those of a simulated screen. A neural SDE takes 4 steps a wait, as truth and as fit.
The answer is right where the true structure has the largest held-out log density, or is within one standard error of the paired
difference from it (`perturbprob.compare`, conditions drawn at random).
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np

import perturbprob as pb

STRUCTURES: dict[str, Callable[..., pb.CellModel]] = {
    "node": pb.node,
    "vae": lambda screen, n_latent, seed: pb.vae(screen, n_latent, shift="network", seed=seed),
    "neural_sde": lambda screen, n_latent, seed: pb.neural_sde(screen, n_latent, n_steps=4, seed=seed),
    "causal_context": pb.causal_context,
}


def hidden(screen: pb.Screen) -> pb.split.Split:
    """Hide the last time of every other perturbation, and the last but one of the rest."""
    first, second = (
        pb.split.hold_out_time(screen, time, list(screen.perturbations[k::2])).held_out for k, time in enumerate(screen.times[:-3:-1])
    )
    test = np.isin(screen.condition, [screen.conditions.index(c) for c in (*first, *second)])
    return pb.split.Split(screen[~test], screen[test], (*first, *second), "time")


def score(truth: str, seed: int, *, cells: int, genes: int, epochs: int, n_latent: int, strength: float) -> tuple[bool, str]:
    """Fit every structure to one screen; say whether the true one is best or near it, and by how much each falls behind."""
    times = (0.25, 0.5, 1.0, 2.0, 3.0)
    template = pb.simulate(n_cells=cells, n_genes=genes, n_perturbations=8, times=times, n_batches=2, depth=500, seed=seed).screen
    screen = pb.prior_screen(STRUCTURES[truth](template, n_latent, seed=seed), template, seed, strength=strength)
    split = hidden(screen)
    how = {"epochs": epochs, "minibatch": 256, "learning_rate": 1e-2, "progress": False}
    fits = {name: pb.fit(make(split.train, n_latent, seed=0), split.train, **how) for name, make in STRUCTURES.items()}
    table = pb.compare(fits, split.test, particles=200, n_draws=10, progress=False)
    own = table.loc[truth]
    told = ", ".join(
        f"{name} {row['difference'] * screen.n_genes:.3f} ({row['standard_error'] * screen.n_genes:.3f})" for name, row in table.iterrows()
    )
    return bool(own["difference"] >= -own["standard_error"]), told


def main() -> None:
    """Run over truths and screens; print the share that is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=20, help="screens for each truth")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--truths", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    for name, value in (("cells", 2400), ("genes", 12), ("epochs", 40), ("n_latent", 2)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--strength", type=float, default=3.0)
    options, start = parser.parse_args(), time.perf_counter()
    warnings.simplefilter("ignore")
    settings = {name: getattr(options, name) for name in ("cells", "genes", "epochs", "n_latent", "strength")}
    right: dict[str, list[bool]] = {truth: [] for truth in options.truths}
    for seed in range(options.first, options.first + options.screens):
        for truth in options.truths:
            ok, told = score(truth, seed, **settings)
            right[truth].append(ok)
            print(f"{seed} {truth}: {'right' if ok else 'wrong'}; nats per cell behind the best (standard error): {told}", flush=True)
    for truth, found in right.items():
        print(f"{truth}: right in {sum(found)} of {len(found)}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
