"""What escaping explains on the Ishikawa screen: the density of held-out edited cells, over that of control cells, with and without z.

    python benchmarks/escapers.py --genes POU5F1 NANOG

For each gene a screen of its cells and of control, a tenth of the cells held out. Gain is the mean over held-out edited cells, in nats, of
their log density under their own condition minus that under control of the same time, and by how much it grows when cells may escape.
As much for controls of which half are said to be edited: what two kinds of cells explain where there is one.
With z: `node` with and without ``penetrance``. Without: a negative binomial for each gene and condition, dispersions by gene, and its
mixture with control of the same time, one share of hits for all times (expectation-maximisation).
"""

import argparse
import time
import warnings
from dataclasses import replace

import numpy as np
from scipy.special import expit, gammaln

import perturbprob as pb


def log_law(counts: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return the log density of each cell under negative binomials, genes independent."""
    part = gammaln(counts + theta) - gammaln(theta) - gammaln(counts + 1) + theta * np.log(theta / (theta + mean))
    return (part + counts * np.log(mean / (theta + mean))).sum(1)


def dispersion(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the dispersion of each gene by moments of the residuals."""
    return np.clip((mean**2).sum(0) / np.maximum(((counts - mean) ** 2 - mean).sum(0), 1e-9), 1e-2, 1e4)


def without_states(train: pb.Screen, test: pb.Screen, n_steps: int = 100) -> tuple[float, float, float]:
    """Return the gain of held-out cells, that of the mixture, and its share of hits."""
    names = {c: k for k, c in enumerate(train.conditions)}
    counts, size = train.counts.toarray().astype(float), train.size_factor[:, None]
    control = np.array([names[c.unperturbed()] for c in train.conditions])[train.condition]
    edited, share, weight = control != train.condition, 0.67, np.ones(train.n_cells)
    weight[edited] = share

    def rates(weight: np.ndarray) -> np.ndarray:
        """Return the rate of each condition and gene, cells weighted; control cells are those of control and those that escaped."""
        total, exposure = np.full((len(names), counts.shape[1]), 0.5), np.ones((len(names), 1))
        for place, w in ((train.condition, weight), (control, 1 - weight)):
            np.add.at(total, place, w[:, None] * counts)
            np.add.at(exposure, place, w[:, None] * size)
        return total / exposure

    whole = rates(np.ones(train.n_cells))
    theta = dispersion(counts, whole[train.condition] * size)
    for _ in range(n_steps):
        rate = rates(weight)
        hit, escaped = (log_law(counts[edited], rate[at[edited]] * size[edited], theta) for at in (train.condition, control))
        weight[edited] = expit(np.log(share / (1 - share)) + hit - escaped)
        share = float(np.clip(weight[edited].mean(), 1e-3, 1 - 1e-3))
    held, factor = test.counts.toarray().astype(float), test.size_factor[:, None]
    own, beside = (
        np.array([names[c] for c in part])[test.condition] for part in (test.conditions, [c.unperturbed() for c in test.conditions])
    )
    plain, base = (log_law(held, whole[at] * factor, theta) for at in (own, beside))
    hit, escaped = (log_law(held, rate[at] * factor, theta) for at in (own, beside))
    mixed = np.logaddexp(np.log(share) + hit, np.log1p(-share) + escaped)
    return float((plain - base).mean()), float((mixed - base).mean()), share


def with_states(train: pb.Screen, test: pb.Screen, epochs: int, latent: int) -> tuple[float, float, float]:
    """Return the gain of held-out cells under `node`, with escapes, and the share of hits."""
    beside = replace(test, conditions=tuple(c.unperturbed() for c in test.conditions), sgrna=None)
    values, share = [], 1.0
    for penetrance in (False, True):
        fit = pb.fit(pb.node(train, latent, penetrance=penetrance), train, epochs=epochs, progress=False)
        own = pb.log_density(fit, test, 200, n_draws=10, progress=False).values
        if not penetrance:
            base = pb.log_density(fit, beside, 200, n_draws=10, progress=False).values
        else:
            share = float(pb.posterior(fit, 400).posterior["penetrance"].mean())
        values.append(float((own - base).mean()))
    return values[0], values[1], share


def half_edited(control: pb.Screen) -> pb.Screen:
    """Return control cells, half of each condition said to be edited at NOTHING."""
    chosen = np.random.default_rng(0).random(control.n_cells) < 0.5
    edited = tuple(pb.Knockout("NOTHING") >> c for c in control.conditions)
    return replace(
        control,
        conditions=(*control.conditions, *edited),
        condition=control.condition + len(edited) * chosen,
        sgrna=None,
    )


def main() -> None:
    """Run over genes; print the gains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", nargs="+", default=["POU5F1", "NANOG"])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent", type=int, default=10)
    options, start = parser.parse_args(), time.perf_counter()
    warnings.simplefilter("ignore")
    whole = pb.datasets.ishikawa2023()
    control = whole[whole.cells_of("control")]
    screens = {gene: whole[np.concatenate([whole.cells_of("control"), whole.cells_of(gene)])] for gene in options.genes}
    for gene, screen in (screens | {"NOTHING": half_edited(control)}).items():
        train, held = pb.split.hold_out_cells(screen, 0.1)
        test = held[held.cells_of(gene)]
        without = without_states(train, test)
        for name, found in (("without z", without), ("with z", with_states(train, test, options.epochs, options.latent))):
            gain, mixed, share = found
            print(
                f"{gene}, {name}: {test.n_cells} held-out cells, {gain:+.2f} nats a cell over control; where cells may escape "
                f"{mixed:+.2f} ({mixed - gain:+.2f}), share of hits {share:.2f}",
                flush=True,
            )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
