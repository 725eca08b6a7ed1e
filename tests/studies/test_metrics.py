"""Metrics of means of conditions, against scipy and by hand."""

import numpy as np
import pytest
import scipy.stats

from perturbprob.studies.metrics import direction, discrimination, mean_square_error


@pytest.fixture
def means() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted, observed and control means of five conditions and seven genes."""
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(5, 7))
    return observed + 0.8 * rng.normal(size=(5, 7)), observed, rng.normal(size=(5, 7))


def test_the_direction_is_the_correlation_of_changes(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, control = means
    expected = [scipy.stats.pearsonr(p - c, o - c).statistic for p, o, c in zip(predicted, observed, control, strict=True)]
    np.testing.assert_allclose(direction(predicted, observed, control), expected)


def test_no_change_has_no_direction(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, observed, control = means
    assert np.isnan(direction(control, observed, control)).all()
    assert np.isnan(direction(observed, observed, np.full_like(control, np.nan))).all()


def test_discrimination_counts_the_others_that_are_further(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, _ = means
    targets = [[k] for k in range(5)]
    expected = []
    for k in range(5):
        genes = [g for g in range(7) if g != k]
        distance = [np.abs(predicted[k, genes] - o[genes]).sum() for o in observed]
        expected.append(np.mean([distance[j] > distance[k] for j in range(5) if j != k]))
    np.testing.assert_allclose(discrimination(predicted, observed, targets), expected)


def test_a_prediction_that_is_the_same_for_all_discriminates_by_chance(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, observed, control = means
    assert discrimination(np.repeat(control[:1], 5, 0), observed).mean() == pytest.approx(0.5)
    assert np.isnan(discrimination(control[:1], observed[:1])).all()


def test_the_target_alone_is_not_enough() -> None:
    """Two conditions that differ in their targets only: nothing else tells them apart."""
    observed = np.array([[-3.0, 0.0, 1.0], [0.0, -3.0, 1.0]])
    np.testing.assert_array_equal(discrimination(observed, observed, [[0], [1]]), [1.0, 1.0])
    np.testing.assert_array_equal(discrimination(observed, observed, [[0, 1], [0, 1]]), [0.5, 0.5])


def test_the_error_is_a_mean_of_squares(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, _ = means
    np.testing.assert_allclose(mean_square_error(predicted, observed), ((predicted - observed) ** 2).mean(1))
