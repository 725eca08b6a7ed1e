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
    predicted, observed, _ = means
    expected = [scipy.stats.pearsonr(p, o).statistic for p, o in zip(predicted, observed, strict=True)]
    np.testing.assert_allclose(direction(predicted, observed), expected)


def test_no_change_has_no_direction(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, observed, _ = means
    assert np.isnan(direction(np.full_like(observed, 0.1), observed)).all()
    assert np.isnan(direction(observed, np.full_like(observed, np.nan))).all()


def test_discrimination_counts_the_others_that_are_further(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, _ = means
    expected = []
    for k in range(5):
        further = []
        for j in set(range(5)) - {k}:
            genes = [g for g in range(7) if g not in (k, j)]
            own, other = (np.abs(predicted[k, genes] - observed[i, genes]).sum() for i in (k, j))
            further.append(other > own)
        expected.append(np.mean(further))
    np.testing.assert_allclose(discrimination(predicted, observed, [[k] for k in range(5)]), expected)


def test_a_prediction_that_is_the_same_for_all_discriminates_by_chance() -> None:
    """Also where each condition differs from it in its own target, which is left out."""
    rng = np.random.default_rng(0)
    observed = 0.03 * rng.normal(size=(20, 40))
    observed[np.arange(20), np.arange(20)] -= 1
    same = np.zeros((20, 40))
    assert discrimination(same, observed, [[k] for k in range(20)]).mean() == pytest.approx(0.5, abs=1e-9)
    assert np.isnan(discrimination(same[:1], observed[:1])).all()


def test_the_target_alone_is_not_enough() -> None:
    """Two conditions that differ in their targets only: nothing else tells them apart."""
    observed = np.array([[-3.0, 0.0, 1.0], [0.0, -3.0, 1.0]])
    np.testing.assert_array_equal(discrimination(observed, observed, [[0], [1]]), [0.5, 0.5])
    np.testing.assert_array_equal(discrimination(observed, observed), [1.0, 1.0])


def test_the_error_is_a_mean_of_squares(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, _ = means
    np.testing.assert_allclose(mean_square_error(predicted, observed), ((predicted - observed) ** 2).mean(1))
