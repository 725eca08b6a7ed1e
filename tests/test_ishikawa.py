"""What the package must show on the embedded screen, with half of its cells and a short fit."""

import numpy as np
import pytest

import perturbprob as pb

# that its times are its batches is the screen's, not the package's
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::perturbprob.UndeclaredWarning")]


@pytest.fixture(scope="module")
def parts() -> tuple[pb.Screen, pb.Screen]:
    """Half of the cells for fitting, and the held-out cells that no fit sees."""
    screen = pb.datasets.ishikawa2023()
    held = np.random.default_rng(0).random(screen.n_cells) < 0.1
    return screen[~held][::2], screen[held]


@pytest.fixture(scope="module")
def fit(parts: tuple[pb.Screen, pb.Screen]) -> pb.Fit:
    """A short fit."""
    return pb.fit(pb.node(parts[0]), parts[0], epochs=30, minibatch=256, learning_rate=1e-2, warmup=10, progress=False)


def test_held_out_cells_are_more_probable_than_under_the_baselines(fit: pb.Fit, parts: tuple[pb.Screen, pb.Screen]) -> None:
    train, test = parts
    ours = pb.log_density(fit, test[::3], 50, n_draws=5)
    for baseline in (pb.baselines.negative_binomial, pb.baselines.condition_negative_binomial):
        gain = (ours - baseline(train, test)[::3]) / test.n_genes
        # paired over cells: above 0 by more than two standard errors
        assert float(gain.mean()) > 2 * float(gain.std()) / len(gain) ** 0.5


def test_strong_perturbations_are_hits(fit: pb.Fit) -> None:
    hits = pb.effects(fit, n_draws=60)
    for name in ("POU5F1", "PRDM14", "SOX2"):
        assert bool(hits["hit"].sel(tested_perturbation=name)), name


def test_log1p_means_of_seen_conditions_are_reproduced_within_sampling_noise(fit: pb.Fit, parts: tuple[pb.Screen, pb.Screen]) -> None:
    train = parts[0]
    lanes = [train.batches[train.batch[train.condition == c][0]] for c in range(len(train.conditions))]
    predicted = pb.predict(fit, train.conditions, scale="log1p", batch=lanes, n_draws=20)["mean"].values
    log_counts = np.log1p(train.counts.toarray())
    groups = [log_counts[train.condition == c] for c in range(len(train.conditions))]
    error = np.mean([(g.mean(0) - p) ** 2 for g, p in zip(groups, predicted, strict=True)])
    floor = np.mean([g.var(0, ddof=1) / len(g) for g in groups])
    assert error < 1.5 * floor


def test_an_unseen_time_is_less_certain_and_time_is_aliased_with_batch(fit: pb.Fit) -> None:
    named = pb.predict(fit, [pb.Knockout("NANOG") >> pb.Wait(t) for t in (5.0, 7.0)], batch="d5_4", n_draws=100, scale="log1p")
    width = (named["upper"] - named["lower"]).mean("gene").values
    assert width[1] > width[0]
    with pytest.warns(pb.AliasedWarning, match="time and batch are aliased"):
        pb.predict(fit, pb.Knockout("NANOG") >> pb.Wait(5), n_draws=2)
