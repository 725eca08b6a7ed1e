"""Metrics of predicted distributions: against closed forms, brute force, scipy, scikit-learn and POT, and what honest scores must do."""

import numpy as np
import pytest
import scipy.stats
from scipy.integrate import trapezoid
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import rbf_kernel

from perturbprob.experiment import datasets
from perturbprob.studies.distribution_metrics import cell_distances, coverage, crps

# intervals


def test_coverage_counts_what_lies_between_order_statistics() -> None:
    """Of 19 draws the interval of 90 % runs from the least to the greatest, of 39 from the second to the last but one."""
    rng = np.random.default_rng(0)
    observed = 1.5 * rng.normal(size=(4, 50))
    for n, place in ((19, 0), (39, 1)):
        points = rng.normal(size=(n, 4, 50))
        ordered = np.sort(points, 0)
        expected = ((ordered[place] <= observed) & (observed <= ordered[-1 - place])).mean(1)
        np.testing.assert_allclose(coverage(points, observed, 0.9), expected)
        assert (expected < 1).all()


@pytest.mark.parametrize("n", [19, 50, 200])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_one_more_draw_is_covered_at_the_level_whatever_the_number_of_draws(n: int, level: float) -> None:
    draws = np.random.default_rng(0).gamma(2, size=(n + 1, 2, 10_000))
    np.testing.assert_allclose(coverage(draws[1:], draws[0], level), level, atol=0.012)


def test_too_narrow_intervals_cover_too_little() -> None:
    rng = np.random.default_rng(0)
    found = coverage(0.5 * rng.normal(size=(400, 1, 10_000)), rng.normal(size=(1, 10_000)), 0.9)
    assert found[0] == pytest.approx(2 * scipy.stats.norm.cdf(0.5 * 1.645) - 1, abs=0.01)


def test_coverage_is_unknown_with_too_few_draws_or_without_a_value() -> None:
    points, observed = np.random.default_rng(0).normal(size=(19, 2, 5)), np.zeros((2, 5))
    assert np.isnan(coverage(points[:18], observed, 0.9)).all()
    observed[1, 3] = np.nan
    np.testing.assert_array_equal(coverage(points, observed, 0.9), [1, np.nan])
    points[4, 0, 0] = np.nan
    assert np.isnan(coverage(points, observed, 0.9)).all()


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
def test_a_level_is_a_share(level: float) -> None:
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1, and is .*: pass 0\.9"):
        coverage(np.zeros((20, 1, 2)), np.zeros((1, 2)), level)


# the continuous ranked probability score


def normal_score(y: np.ndarray, mean: float, sd: float) -> np.ndarray:
    """Closed form for a normal law, Gneiting and Raftery (2007), eq 21 and above."""
    z = (y - mean) / sd
    return sd * (z * (2 * scipy.stats.norm.cdf(z) - 1) + 2 * scipy.stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def test_crps_is_a_mean_over_pairs() -> None:
    rng = np.random.default_rng(0)
    points, observed = rng.normal(size=(9, 3, 4)), rng.normal(size=(3, 4))
    errors, pairs = np.abs(points - observed).mean(0), np.abs(points[:, None] - points[None]).sum((0, 1)) / (9 * 8)
    np.testing.assert_allclose(crps(points, observed), (errors - pairs / 2).mean(1))


def test_crps_of_many_draws_is_the_integral_of_squared_differences_of_distribution_functions() -> None:
    """Its definition, (F(x) − [x ≥ y])² over x, of the law of the draws themselves: pairs of a draw with itself included."""
    rng = np.random.default_rng(0)
    draws, y = rng.gamma(2, size=200), 1.3
    grid = np.linspace(-1, 20, 400_001)
    below = np.searchsorted(np.sort(draws), grid, side="right") / 200
    expected = trapezoid((below - (grid >= y)) ** 2, grid)
    spread = np.abs(draws[:, None] - draws).sum() / 2
    found = crps(draws.reshape(200, 1, 1), np.array([[y]]))[0]
    assert found + spread / (200 * 199) - spread / 200**2 == pytest.approx(expected, abs=1e-4)


def test_crps_of_normal_draws_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(2, 6))
    points = rng.normal(0.3, 0.7, (40_000, 2, 6))
    np.testing.assert_allclose(crps(points, observed), normal_score(observed, 0.3, 0.7).mean(1), atol=0.01)


def test_crps_of_few_draws_is_that_of_many_on_average() -> None:
    """The fair estimate; with pairs of a draw with itself it would be 0.14 too large."""
    rng = np.random.default_rng(0)
    observed = np.array([[0.4]]).repeat(40_000, 1)
    assert crps(rng.normal(size=(4, 1, 40_000)), observed)[0] == pytest.approx(normal_score(np.array(0.4), 0, 1), abs=0.01)


def test_the_law_of_what_is_observed_scores_best() -> None:
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(1, 20_000))
    scores = {sd: crps(rng.normal(0, sd, (20, 1, 20_000)), observed)[0] for sd in (0.5, 1.0, 2.0)}
    assert scores[1.0] < min(scores[0.5], scores[2.0]) - 0.01


def test_crps_of_a_certain_value_is_the_absolute_error_and_one_draw_has_none() -> None:
    observed = np.array([[1.0, -2.0], [0.0, 3.0]])
    np.testing.assert_allclose(crps(np.zeros((5, 2, 2)), observed), np.abs(observed).mean(1))
    assert np.isnan(crps(np.zeros((1, 2, 2)), observed)).all()


def test_crps_does_not_lose_digits_of_large_values_in_single_precision() -> None:
    rng = np.random.default_rng(0)
    points, observed = (1000 + rng.integers(0, 8, shape).astype(np.float32) / 8 for shape in ((50, 1, 3), (1, 3)))
    np.testing.assert_allclose(crps(points, observed), crps(points.astype(float) - 1000, observed.astype(float) - 1000), rtol=1e-12)


# sets of cells


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Predicted and observed cells of five genes."""
    rng = np.random.default_rng(0)
    return rng.normal(0.4, 1.2, (40, 5)), rng.normal(size=(60, 5))


def test_energy_and_mmd_are_means_over_pairs_of_different_cells(sets: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = sets
    found = cell_distances(x, y)
    assert found["energy"] == pytest.approx(2 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean())
    gamma = 1 / (2 * np.quantile(pdist(y), 0.5, method="inverted_cdf") ** 2)
    within = [(rbf_kernel(part, gamma=gamma).sum() - len(part)) / (len(part) * (len(part) - 1)) for part in sets]
    assert found["mmd"] == pytest.approx(sum(within) - 2 * rbf_kernel(x, y, gamma=gamma).mean())


@pytest.mark.parametrize("spread", [1, 2])
def test_sinkhorn_is_transport_between_halves_by_pot(sets: tuple[np.ndarray, np.ndarray], spread: int) -> None:
    """At the blur of the observed cells, however far apart the predicted ones are."""
    ot, sets = pytest.importorskip("ot"), (spread * sets[0], sets[1])
    centred = sets[1] - sets[1].mean(0)
    regularised = 0.1 * (cdist(centred, centred, "sqeuclidean") / 2).std()

    def transport(a: np.ndarray, b: np.ndarray) -> float:
        """Entropic transport of one half to another."""
        return float(ot.solve(ot.dist(a, b) / 2, reg=regularised, reg_type="KL", max_iter=100_000, tol=1e-5).value)

    x, y = (cells[np.random.default_rng([3, side]).permutation(len(cells))] for side, cells in enumerate(sets))
    (a, b), (c, d) = ((cells[:20], cells[20:40]) for cells in (x, y))
    between = np.mean([transport(here, there) for here in (a, b) for there in (c, d)])
    expected = between - transport(a, b) / 2 - transport(c, d) / 2
    assert cell_distances(*sets, seed=3)["sinkhorn"] == pytest.approx(expected, abs=1e-3)


def test_cells_of_one_law_are_at_distance_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    found = [cell_distances(rng.normal(size=(14, 100)), rng.normal(size=(20, 100))) for _ in range(30)]
    for name in found[0]:
        values = np.array([of[name] for of in found])
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(30), name
        assert (values < 0).any(), name


def test_other_cells_of_a_condition_are_nearer_than_its_mean_its_halved_spread_or_independent_genes() -> None:
    """Else a model is best that predicts no cells but their mean; the Sinkhorn divergence of all cells says so here."""
    screen = datasets.ishikawa2023()
    largest = np.bincount(screen.condition).argsort()[-4:]
    rng = np.random.default_rng(0)
    for condition in largest:
        cells = rng.permutation(screen.counts[screen.condition == condition].log1p().toarray())
        half, observed = cells[::2], cells[1::2]
        own, mean = cell_distances(half, observed), half.mean(0)
        poisson = np.log1p(rng.poisson(np.expm1(half).mean(0), half.shape))
        for worse in (np.tile(mean, (len(half), 1)), mean + 0.5 * (half - mean), poisson):
            assert all(own[name] < value for name, value in cell_distances(worse, observed).items())


def test_one_yardstick_and_one_draw_of_observed_cells_for_all_predictions() -> None:
    """Of three predictions whose cells are one point each, the kernel tells the bandwidth; it must be the same."""
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(50, 2))
    far = np.full((10, 2), 1e4)
    alone = [cell_distances(far + shift, observed, at_most=30)["mmd"] for shift in (0.0, 1e3, 1e5)]
    assert np.ptp(alone) < 1e-12
    assert 1 < alone[0] < 2


def test_more_cells_than_asked_for_are_drawn_by_seed() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, (90, 3)), rng.normal(size=(70, 3))
    found = cell_distances(x, y, at_most=40)
    assert found == cell_distances(x, y, at_most=40)
    assert found != cell_distances(x, y, at_most=40, seed=1)
    rows = [np.random.default_rng([0, side]).permutation(len(cells))[:40] for side, cells in enumerate((x, y))]
    assert found["energy"] == pytest.approx(2 * cdist(x[rows[0]], y[rows[1]]).mean() - pdist(x[rows[0]]).mean() - pdist(y[rows[1]]).mean())


def test_distances_of_a_single_cell_are_unknown() -> None:
    for x, y in ((1, 5), (5, 1), (0, 5)):
        found = cell_distances(np.zeros((x, 2)), np.ones((y, 2)))
        assert np.isnan([*found.values()]).all()
        assert found.keys() == cell_distances(np.zeros((2, 2)), np.ones((2, 2))).keys()


def test_settings_are_checked() -> None:
    cells = np.zeros((3, 2))
    with pytest.raises(ValueError, match="at_most must be a whole number of at least 2; got 1"):
        cell_distances(cells, cells, at_most=1)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        cell_distances(cells, cells, seed=-1)
    with pytest.raises(ValueError, match="NaN"):
        cell_distances(np.full((3, 2), np.nan), cells)
