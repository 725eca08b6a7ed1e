"""Baselines: densities against scipy, the numbers measured on the embedded screen, what shrinkage must do at its ends."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import nbinom

from perturbprob.experiment import datasets
from perturbprob.experiment.screen import Screen
from perturbprob.experiment.simulate import simulate
from perturbprob.studies.baselines import _log_density, condition_negative_binomial, negative_binomial


@pytest.fixture(scope="module")
def halves() -> tuple[Screen, Screen]:
    screen = simulate(n_cells=1200, n_genes=12, n_perturbations=3, effect_scale=1.5, inactive=0.0, seed=4).screen
    chosen = np.random.default_rng(1).random(screen.n_cells) < 0.5
    return screen[chosen], screen[~chosen]


@pytest.mark.parametrize("theta", [0.05, 1.0, 30.0, 1e5])
def test_the_density_is_that_of_scipy(theta: float) -> None:
    counts, mean = np.arange(200.0), np.geomspace(1e-3, 300, 200)
    assert _log_density(counts, mean, theta) == pytest.approx(nbinom.logpmf(counts, theta, theta / (theta + mean)), rel=1e-8, abs=1e-8)


def test_baselines_of_the_embedded_screen_are_those_measured_elsewhere() -> None:
    screen = datasets.ishikawa2023()
    held = np.random.default_rng(0).random(screen.n_cells) < 0.1
    train, test = screen[~held], screen[held]
    density = [float(baseline(train, test).mean()) / screen.n_genes for baseline in (negative_binomial, condition_negative_binomial)]
    assert density == pytest.approx([-1.5803, -1.5684], abs=5e-4)


def test_rates_and_dispersions_of_simulated_counts_are_found() -> None:
    rng = np.random.default_rng(0)
    screen = simulate(n_cells=4000, n_genes=5, n_perturbations=1, seed=0).screen
    mean = screen.size_factor[:, None] * np.array([0.2, 1.0, 3.0, 8.0, 20.0])
    drawn = rng.negative_binomial(2.0, 2.0 / (2.0 + mean))
    drawn_screen = replace(screen, counts=type(screen.counts)(drawn.astype(np.float32)))
    truth = nbinom.logpmf(drawn, 2.0, 2.0 / (2.0 + mean)).sum(1)
    found = negative_binomial(drawn_screen, drawn_screen)
    assert list(found.cell.values) == list(screen.cells)
    # ten fitted numbers gain half a nat each, give or take; were a rate or dispersion wrong the loss would be in the hundreds
    assert 0 < float(found.sum()) - truth.sum() < 20


def test_conditions_count_where_perturbations_act_and_not_where_labels_are_shuffled(halves: tuple[Screen, Screen]) -> None:
    train, test = halves
    assert float((condition_negative_binomial(train, test) - negative_binomial(train, test)).mean()) > 0.05
    shuffled = replace(train, condition=np.random.default_rng(0).permutation(train.condition))
    assert abs(float((condition_negative_binomial(shuffled, test) - negative_binomial(shuffled, test)).mean())) < 0.01


def test_a_condition_without_training_cells_has_the_rate_of_all(halves: tuple[Screen, Screen]) -> None:
    train, test = halves
    name = train.perturbations[0]
    without = train[np.setdiff1d(np.arange(train.n_cells), train.cells_of(name))]
    hidden = test[test.cells_of(name)]
    assert condition_negative_binomial(without, hidden).values == pytest.approx(negative_binomial(without, hidden).values)


def test_a_gene_silent_in_training_is_not_impossible(halves: tuple[Screen, Screen]) -> None:
    train, test = halves
    silent = replace(train, counts=type(train.counts)(train.counts.toarray() * (np.arange(train.n_genes) > 0)))
    for baseline in (negative_binomial, condition_negative_binomial):
        assert np.isfinite(baseline(silent, test)).all()


@pytest.mark.parametrize("baseline", [negative_binomial, condition_negative_binomial])
def test_other_genes_are_refused(halves: tuple[Screen, Screen], baseline: object) -> None:
    train, test = halves
    with pytest.raises(ValueError, match="same genes in the same order; 2 genes are in one of the two only"):
        baseline(train, replace(test, genes=("other", *test.genes[1:])))
