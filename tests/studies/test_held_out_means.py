"""What predicted means are scored against: control, reference, weights and noise, each from its definition."""

from dataclasses import replace

import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment.split import Split, hold_out_time
from perturbprob.studies.held_out_means import Means
from perturbprob.studies.mean_scores import score_means
from perturbprob.studies.metrics import rest_weights


@pytest.fixture(scope="module", params=[1, 2])
def part(request: pytest.FixtureRequest) -> Split:
    """A screen of one batch, and one of two."""
    screen = pb.simulate(n_cells=1500, n_genes=9, n_perturbations=5, times=(1.0, 2.0), n_batches=request.param, seed=2).screen
    return hold_out_time(screen, 2, screen.perturbations[:3])


@pytest.fixture(scope="module")
def means(part: Split) -> Means:
    return Means.of(part.test, [part.train])


def log_counts(screen: pb.Screen, condition: pb.Protocol) -> np.ndarray:
    return np.log1p(screen.counts[screen.cells_of(condition)].toarray().astype(float))


def pooled(parts: list[np.ndarray]) -> np.ndarray:
    """Return the variance between the rows of each part, pooled."""
    return sum(((x - x.mean(0)) ** 2).sum(0) for x in parts) / sum(len(x) - 1 for x in parts)


def by_batch(screen: pb.Screen, condition: pb.Protocol) -> list[np.ndarray]:
    """Return log counts of a condition, batch by batch: batches differ, and that is no noise of sampling."""
    cells = screen.cells_of(condition)
    batches = [cells[screen.batch[cells] == b] for b in range(len(screen.batches))]
    return [np.log1p(screen.counts[rows].toarray().astype(float)) for rows in batches if len(rows)]


def test_the_variance_within_conditions_is_that_of_training_cells(part: Split, means: Means) -> None:
    parts = [x for p in part.train.conditions for x in by_batch(part.train, p)]
    assert means.within == pytest.approx(pooled(parts))


def test_the_noise_of_a_mean_is_what_cells_of_one_batch_differ_by(part: Split, means: Means) -> None:
    for k, p in enumerate(part.test.conditions):
        assert means.noise[k] == pytest.approx(pooled(by_batch(part.test, p)) / len(log_counts(part.test, p)))


@pytest.mark.parametrize("part", [1], indirect=True)
def test_the_reference_is_the_mean_of_the_other_perturbations(part: Split, means: Means) -> None:
    others = {p: log_counts(part.train, p).mean(0) for p in part.train.conditions if p.perturbations and p.time == 2}
    others |= {p: log_counts(part.test, p).mean(0) for p in part.test.conditions}
    for k, condition in enumerate(part.test.conditions):
        expected = np.mean([mean for p, mean in others.items() if p != condition], 0)
        assert means.reference[k] == pytest.approx(expected)


def test_the_reference_moves_with_the_batches_of_a_condition(part: Split, means: Means) -> None:
    shifted = replace(means, control=means.control + 1, observed=means.observed + 1)
    assert shifted.reference == pytest.approx(means.reference + 1)


def test_weights_are_against_all_perturbations_of_the_same_time(part: Split, means: Means) -> None:
    change = np.concatenate([means.observed - means.control, means.others.change])
    noise = np.concatenate([means.noise, means.others.variance_of_mean])
    expected = rest_weights(change, noise, [*means.edited, *[[]] * len(means.others.n)])[: len(means.n)]
    assert means.weights == pytest.approx(expected)
    assert all((means.weights[k, genes] == 0).all() for k, genes in enumerate(means.edited))
    assert {p.time for p in means.others.conditions} == {2}


def test_control_has_the_noise_of_its_cells_in_the_batches_of_the_condition(part: Split, means: Means) -> None:
    beside = part.test.conditions[0].unperturbed()
    cells = part.train.cells_of(beside)
    n = np.bincount(part.train.batch[cells], minlength=len(part.train.batches))
    share = means.cells[0] / means.cells[0].sum()
    assert means.control_n[0] == pytest.approx(1 / (share**2 / n).sum())
    assert means.control_variance[0] == pytest.approx(log_counts(part.train, beside).var(0, ddof=1))


def test_halves_are_two_estimates_of_one_mean(part: Split, means: Means) -> None:
    half, other, rows = means.halved(3)
    for k, (own, rest) in enumerate(rows):
        assert sorted([*own, *rest]) == part.test.cells_of(part.test.conditions[k]).tolist()
        assert half.n[k] == len(own) >= len(rest) >= len(own) - 1
        assert (len(own) * half.observed[k] + len(rest) * other[k]) / means.n[k] == pytest.approx(means.observed[k])


def test_the_truth_ranks_genes_as_the_test_does_and_control_predicts_no_direction(means: Means) -> None:
    differential = means.differential[0].any(1)
    assert score_means(means, means.observed)["de_overlap"][differential] == pytest.approx(1)
    still = score_means(means, means.control)
    assert np.isnan(still["direction_control"]).all()
    assert still["de_sign"][differential] == pytest.approx(0.5)


def test_other_genes_and_continuous_values_tell_nothing(part: Split) -> None:
    other = pb.simulate(n_cells=100, n_genes=5, n_perturbations=2, seed=1).screen
    alone = Means.of(part.test, [other, part.train.pseudobulk()])
    assert np.isnan(alone.control).all()
    assert np.isnan(alone.within).all()
    assert np.isnan(Means.of(part.test.pseudobulk()).observed).all()
