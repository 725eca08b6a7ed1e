"""Draw screens from the prior of each structure, fit all structures to them, and ask whether the one that made them predicts best.

    python benchmarks/identification.py --screens 20

Each screen has five times, and at the fourth some perturbations are hidden, which structures have to carry there. Truths are prior draws
(`perturbprob.prior_screen`); the conditions, batches and size factors are those of a simulated screen. The answer is right where the true
structure has the largest held-out log density, or is within one standard error of the paired difference from it (`perturbprob.compare`,
conditions drawn at random).
"""

import argparse
import time
import warnings
from collections.abc import Callable

import perturbprob as pb

STRUCTURES: dict[str, Callable[..., pb.CellModel]] = {
    "node": pb.node,
    "vae": lambda screen, n_latent, seed: pb.vae(screen, n_latent, shift="network", seed=seed),
    "neural_sde": pb.neural_sde,
    "causal_context": pb.causal_context,
}


def score(truth: str, seed: int, *, cells: int, genes: int, epochs: int, n_latent: int) -> tuple[bool, str]:
    """Fit every structure to one screen; say whether the true one is best or near it, and by how much each falls behind."""
    times = (0.25, 0.5, 1.0, 2.0, 3.0)
    simulation = pb.simulate(n_cells=cells, n_genes=genes, n_perturbations=8, times=times, n_batches=2, depth=500, seed=seed)
    screen = pb.prior_screen(STRUCTURES[truth](simulation.screen, n_latent, seed=seed), simulation.screen, seed)
    split = pb.split.hold_out_time(screen, 2.0, list(screen.perturbations[::2]))
    fits = {
        name: pb.fit(make(split.train, n_latent, seed=0), split.train, epochs=epochs, progress=False) for name, make in STRUCTURES.items()
    }
    table = pb.compare(fits, split.test, particles=50, n_draws=10, progress=False)
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
    parser.add_argument("--cells", type=int, default=1200)
    parser.add_argument("--genes", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--latent", type=int, default=2)
    options, start = parser.parse_args(), time.perf_counter()
    warnings.simplefilter("ignore")
    right: dict[str, list[bool]] = {truth: [] for truth in options.truths}
    for seed in range(options.first, options.first + options.screens):
        for truth in options.truths:
            ok, told = score(truth, seed, cells=options.cells, genes=options.genes, epochs=options.epochs, n_latent=options.latent)
            right[truth].append(ok)
            print(f"{seed} {truth}: {'right' if ok else 'wrong'}; nats per cell behind the best (standard error): {told}", flush=True)
    for truth, found in right.items():
        print(f"{truth}: right in {sum(found)} of {len(found)}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
