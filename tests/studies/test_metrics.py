"""Metrics of means of conditions, against scipy and by hand."""

import numpy as np
import pytest
import scipy.stats

from perturbprob.studies.metrics import (
    differential_genes,
    direction,
    discrimination,
    mean_square_error,
    overlap_at_n,
    rest_weights,
    sign_agreement,
    weighted_error,
)


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


# weighted error


def test_the_weighted_error_is_a_weighted_mean_of_squares(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, weight = means[0], means[1], np.abs(means[2])
    expected = [np.average((p - o) ** 2, weights=w) for p, o, w in zip(predicted, observed, weight, strict=True)]
    np.testing.assert_allclose(weighted_error(predicted, observed, weight), expected)
    np.testing.assert_allclose(weighted_error(predicted, observed, 7 * weight), expected)
    np.testing.assert_allclose(weighted_error(predicted, observed, np.ones((5, 7))), mean_square_error(predicted, observed))


def test_a_gene_without_weight_counts_for_nothing() -> None:
    observed, weight = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(weighted_error(np.array([[3.0, np.nan], [3.0, 5.0]]), observed, weight), [4.0, np.nan])


def test_weights_are_squares_of_scaled_scores_against_the_rest(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, observed, _ = means
    variance = np.random.default_rng(1).uniform(0.1, 1, observed.shape)
    for k, found in enumerate(rest_weights(observed, variance)):
        rest, noise = np.delete(observed, k, 0), np.delete(variance, k, 0)
        t = np.abs((observed[k] - rest.mean(0)) / np.sqrt(variance[k] + noise.sum(0) / len(rest) ** 2))
        scaled = ((t - t.min()) / (t.max() - t.min())) ** 2
        np.testing.assert_allclose(found, scaled / scaled.sum())


def test_weights_are_those_of_welchs_test_where_the_rest_is_one_condition() -> None:
    """Then the mean of the rest is that of its cells."""
    rng = np.random.default_rng(0)
    cells, others = rng.normal(size=(30, 6)), rng.normal(size=(50, 6)) + rng.normal(size=6)
    score = np.abs(scipy.stats.ttest_ind(cells, others, equal_var=False).statistic)
    expected = (score - score.min()) ** 2
    mean, variance = np.stack([cells.mean(0), others.mean(0)]), np.stack([cells.var(0, ddof=1) / 30, others.var(0, ddof=1) / 50])
    np.testing.assert_allclose(rest_weights(mean, variance), [expected / expected.sum()] * 2)


def test_the_mean_of_the_others_is_no_good_prediction_by_these_weights() -> None:
    """What they are for: where few genes differ, the plain error calls it nearly as good as the truth."""
    rng = np.random.default_rng(0)
    truth = np.zeros((20, 100))
    truth[np.arange(20), np.arange(20)] = 1
    observed = truth + 0.1 * rng.normal(size=truth.shape)
    weight = rest_weights(observed, np.full(truth.shape, 0.01))
    mean = np.broadcast_to(observed.mean(0), truth.shape)
    plain, weighted = (error(mean).mean() / error(truth).mean() for error in (
        lambda predicted: mean_square_error(predicted, observed), lambda predicted: weighted_error(predicted, observed, weight),
    ))  # fmt: skip
    assert plain < 2.2
    assert weighted > 20


def test_weights_do_not_depend_on_units_on_a_common_shift_or_on_a_common_noise(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, observed, _ = means
    variance = np.random.default_rng(1).uniform(0.1, 1, observed.shape)
    expected = rest_weights(observed, variance)
    np.testing.assert_allclose(expected.sum(1), 1)
    np.testing.assert_allclose(rest_weights(3 * observed + np.arange(7.0), 9 * variance), expected)
    np.testing.assert_allclose(rest_weights(observed, 5 * variance), expected)


def test_edited_and_unexpressed_genes_have_no_weight(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    observed, variance = means[1].copy(), np.full((5, 7), 0.1)
    edited = [[k] for k in range(5)]
    observed[:, 6], variance[:, 6] = 0, 0
    expected = rest_weights(observed, variance, edited)
    assert (expected[np.arange(5), np.arange(5)] == 0).all()
    assert (expected[:, 6] == 0).all()
    observed[0, 0] = np.nan  # seen by the other conditions alone
    np.testing.assert_allclose(rest_weights(observed, variance, edited)[0], expected[0])


def test_weights_are_even_without_differences_and_unknown_without_others() -> None:
    np.testing.assert_allclose(rest_weights(np.full((3, 4), 2.0), np.ones((3, 4))), 0.25)
    assert np.isnan(rest_weights(np.ones((1, 4)), np.ones((1, 4)))).all()


def test_a_condition_of_unknown_noise_leaves_the_others_alone(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, observed, _ = means
    variance = np.full(observed.shape, 0.1)
    variance[2] = np.nan
    found = rest_weights(observed, variance)
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(np.delete(found, 2, 0), rest_weights(np.delete(observed, 2, 0), np.delete(variance, 2, 0)))


# differential expression


def moments(groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and number of the cells of each group."""
    return np.stack([g.mean(0) for g in groups]), np.stack([g.var(0, ddof=1) for g in groups]), np.array([len(g) for g in groups])


@pytest.fixture
def cells() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cells of three conditions, of other sizes and spreads, and of the control of each; 40 genes, of which 10 differ."""
    rng = np.random.default_rng(0)
    shift = np.where(np.arange(40) < 10, 0.5, 0)
    return [rng.normal(shift, 1 + k, (50 + 40 * k, 40)) for k in range(3)], [rng.normal(0, 1.5, (200, 40)) for _ in range(3)]


def test_differential_genes_are_those_of_welch_and_benjamini_and_hochberg(cells: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    found, t = differential_genes(*moments(cells[0]), *moments(cells[1]), level=0.1)
    assert found.any()
    assert not found.all()
    for k, (here, control) in enumerate(zip(*cells, strict=True)):
        expected = scipy.stats.ttest_ind(here, control, equal_var=False)
        np.testing.assert_allclose(t[k], expected.statistic)
        ordered = np.sort(expected.pvalue)
        below = np.flatnonzero(ordered <= 0.1 * np.arange(1, 41) / 40)
        np.testing.assert_array_equal(found[k], expected.pvalue <= (ordered[below[-1]] if len(below) else -1))


def test_false_discoveries_stay_at_their_level() -> None:
    rng = np.random.default_rng(0)
    shift = np.where(np.arange(50) < 10, 1.0, 0)
    here, control = (moments([rng.normal(of, 1, (40, 50)) for _ in range(200)]) for of in (shift, 0))
    found, _ = differential_genes(*here, *control, level=0.2)
    share = found[:, 10:].sum(1) / np.maximum(found.sum(1), 1)
    assert share.mean() == pytest.approx(0.2 * 40 / 50, abs=0.03)
    assert found[:, :10].mean() > 0.9


def test_an_edited_gene_is_not_among_those_tested(cells: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    here, control = moments(cells[0]), moments(cells[1])
    found, t = differential_genes(*here, *control, edited=[[0, 3]] * 3)
    kept = np.delete(np.arange(40), [0, 3])
    parts = [(mean[:, kept], variance[:, kept], n) for mean, variance, n in (here, control)]
    expected, _ = differential_genes(*parts[0], *parts[1])
    assert expected.any()
    np.testing.assert_array_equal(found[:, kept], expected)
    assert not found[:, [0, 3]].any()
    assert np.isfinite(t).all()


def test_genes_without_noise_and_conditions_of_one_cell_are_told_apart() -> None:
    mean, none, many = np.array([[0.0, 1.0], [0.0, 1.0]]), np.zeros((2, 2)), np.array([9, 9])
    variance = np.array([[0.0, 0.0], [np.nan, np.nan]])
    found, t = differential_genes(mean, variance, np.array([9, 1]), np.zeros((2, 2)), none, many)
    np.testing.assert_array_equal(t, [[0, np.inf], [np.nan, np.nan]])
    np.testing.assert_array_equal(found, [[False, True], [False, False]])
    np.testing.assert_array_equal(overlap_at_n(mean, t, found.sum(1)), [1, np.nan])


@pytest.mark.parametrize("level", [0.0, 1.0, 5.0])
def test_a_level_is_a_share(level: float) -> None:
    part, n = np.ones((1, 2)), np.array([5])
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1, and is .*: pass 0\.05"):
        differential_genes(part, part, n, part, part, n, level=level)


def test_the_overlap_is_that_of_sets(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    change, score, _ = means
    n = np.array([1, 2, 3, 5, 7])
    expected = [len({*np.argsort(-np.abs(c))[:m]} & {*np.argsort(-np.abs(t))[:m]}) / m for c, t, m in zip(change, score, n, strict=True)]
    assert len({*expected}) > 2
    np.testing.assert_allclose(overlap_at_n(change, score, n), expected)
    np.testing.assert_allclose(overlap_at_n(-2 * change, score, n), expected)
    np.testing.assert_allclose(overlap_at_n(change, score, 3), overlap_at_n(change, score, np.full(5, 3)))


def test_no_change_overlaps_by_chance_alone(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Also where single precision leaves traces that rank genes by how high they are."""
    _, score, _ = means
    n = np.arange(5)
    expected = np.where(n > 0, n / 7, np.nan)
    np.testing.assert_allclose(overlap_at_n(np.zeros((5, 7)), score, n), expected)
    np.testing.assert_allclose(overlap_at_n(1e-8 * score, score, n), expected)
    np.testing.assert_allclose(overlap_at_n(score, score, n), np.where(n > 0, 1, np.nan))


def test_ties_count_as_if_broken_at_random() -> None:
    rng = np.random.default_rng(0)
    change, score = rng.integers(-3, 4, (4, 12)).astype(float), rng.integers(-4, 5, (4, 12)).astype(float)
    n = np.array([2, 3, 5, 8])
    sizes = np.abs(change), np.abs(score)
    broken = [overlap_at_n(*(size + 1e-3 * rng.random((4, 12)) for size in sizes), n) for _ in range(2000)]
    np.testing.assert_allclose(overlap_at_n(change, score, n), np.mean(broken, 0), atol=0.03)


def test_overlap_and_sign_leave_edited_genes_out(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    change, score, _ = means
    differential = np.abs(score) > 0.3
    kept = np.arange(1, 7)
    edited, large = [[0]] * 5, change.copy()
    large[:, 0] = np.nan
    parts = change[:, kept], score[:, kept]
    np.testing.assert_allclose(overlap_at_n(large, score, 2, edited), overlap_at_n(*parts, 2))
    np.testing.assert_allclose(sign_agreement(large, score, differential, edited), sign_agreement(*parts, differential[:, kept]))
    np.testing.assert_allclose(overlap_at_n(change, score, 9, edited), 1)  # all that are kept
    assert np.isnan(overlap_at_n(large, score, 2)).all()


def test_sign_agreement_is_a_share_of_differential_genes(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, observed, _ = means
    differential = np.abs(observed) > 0.5
    expected = [np.mean(np.sign(p[d]) == np.sign(o[d])) for p, o, d in zip(predicted, observed, differential, strict=True)]
    assert len({*expected}) > 2
    np.testing.assert_allclose(sign_agreement(predicted, observed, differential), expected)
    np.testing.assert_allclose(sign_agreement(-predicted, observed, differential), 1 - np.array(expected))
    np.testing.assert_allclose(sign_agreement(1e-8 * predicted, observed, differential), 0.5)


def test_where_nothing_is_differential_no_sign_is_right() -> None:
    change, differential = np.array([[1.0, -1.0], [1.0, np.nan]]), np.array([[False, False], [False, True]])
    assert np.isnan(sign_agreement(change, np.ones((2, 2)), differential)).all()
    np.testing.assert_array_equal(sign_agreement(change, np.ones((2, 2)), ~differential), [0.5, 1])


def test_each_condition_has_its_list_of_edited_genes(means: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="shorter"):
        overlap_at_n(*means[:2], 2, [[0]] * 4)
