"""How far perturbations move: against plain loops, against known truth, and in data where nothing moves."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import perturbprob as pb
from perturbprob.experiment import rest
from perturbprob.experiment.rest import Course


def screen_of(counts, perturbation, time):
    """A screen of cells of equal depth."""
    table = pd.DataFrame({"perturbation": perturbation, "time": time, "perturbation_type": "knockout"})
    table.index = [f"c{i:06d}" for i in range(len(table))]
    adata = AnnData(np.asarray(counts, dtype=np.float32), obs=table)
    adata.var_names = [f"G{g}" for g in range(adata.n_vars)]
    with pytest.warns(pb.ScreenWarning):
        return pb.Screen.from_anndata(adata, time="time", size_factor=np.ones(adata.n_obs))


@pytest.fixture(scope="module")
def small():
    return pb.simulate(n_cells=400, n_genes=12, n_perturbations=3, times=(1.0, 2.0, 4.0), seed=2).screen


@pytest.fixture(scope="module")
def ishikawa():
    return Course.of(pb.datasets.ishikawa2023())


def level(screen, cells):
    return np.log2((screen.counts[cells].toarray().sum(0) + 0.5) / screen.size_factor[cells].sum())


def test_steps_are_differences_of_log_ratios_of_sums(small):
    moved = rest.steps(Course.of(small))
    names = ("control", *small.perturbations)
    for k, name in enumerate(names):
        cells = [[c for c in small.cells_of(name) if small.conditions[small.condition[c]].time == t] for t in small.times]
        levels = np.array([level(small, c) for c in cells])
        np.testing.assert_allclose(moved[k], np.diff(levels, axis=0), rtol=1e-12)


def test_the_drift_taken_out_is_the_weighted_mean_of_all_others():
    rng = np.random.default_rng(0)
    change, precision = rng.normal(size=(4, 2, 5)), rng.uniform(1, 9, (4, 2))
    beyond = rest.beyond_drift(change, precision)
    for k in range(4):
        others = [j for j in range(4) if j != k]
        for s in range(2):
            drift = np.average(change[others, s], axis=0, weights=precision[others, s])
            np.testing.assert_allclose(beyond[k, s], change[k, s] - drift)


def test_a_shift_of_all_is_no_movement_beyond_drift():
    rng = np.random.default_rng(1)
    change, precision = rng.normal(size=(4, 2, 5)), rng.uniform(1, 9, (4, 2))
    shifted = rest.beyond_drift(change + rng.normal(size=(1, 2, 5)), precision)
    np.testing.assert_allclose(shifted, rest.beyond_drift(change, precision))


def test_halves_have_the_moments_of_halves_split_one_by_one(small):
    course, rng = Course.of(small), np.random.default_rng(5)
    halves = rest.split_halves(course, 3000, seed=1)
    counts, size = course.controls(1)
    slow = []
    for _ in range(2000):
        order = rng.permutation(len(size))
        parts = order[: len(size) // 2], order[len(size) // 2 :]
        first, second = (np.log2((counts[p].sum(0) + 0.5) / size[p].sum()) for p in parts)
        slow.append(np.abs(first - second).mean())
    for statistic in (np.mean, np.std, lambda x: np.quantile(x, 0.95)):
        assert statistic(halves[:, 1]) == pytest.approx(statistic(slow), rel=0.08)


def test_matched_noise_has_the_moments_of_screens_drawn_one_by_one(small):
    course, rng = Course.of(small), np.random.default_rng(6)
    noise = rest.matched_steps(course, 2000, seed=1)
    known = [course.controls(t) for t in range(3)]
    slow = []
    for _ in range(600):
        levels = np.empty((4, 3, 12))
        for k, t in np.ndindex(4, 3):
            counts, size = known[t]
            cells = rng.integers(len(size), size=course.n_cells[k, t])
            levels[k, t] = np.log2((counts[cells].sum(0) + 0.5) / size[cells].sum()) - np.log2((counts.sum(0) + 0.5) / size.sum())
        slow.append(np.abs(rest.beyond_drift(np.diff(levels, axis=1), rest.drift_weights(course))).mean(-1))
    np.testing.assert_allclose(noise.mean(0), np.mean(slow, axis=0), rtol=0.06)
    np.testing.assert_allclose(noise.std(0), np.std(slow, axis=0), rtol=0.25)


def test_blocks_of_draws_cover_all(small, monkeypatch):
    course = Course.of(small)
    monkeypatch.setattr(rest, "_BLOCK", 700)
    assert np.isfinite(rest.split_halves(course, 50)).all()
    assert np.isfinite(rest.matched_steps(course, 50)).all()


def test_noise_exceeds_the_matched_bounds_in_any_perturbation_as_often_as_asked(ishikawa):
    draws = rest.matched_steps(ishikawa, 2000)
    bound = rest.matched_bound(draws[:1000], 0.05)
    assert 0.02 < (draws[1000:] > bound).any(axis=1)[:, 2].mean() < 0.09


def test_the_order_of_cells_does_not_matter_and_a_seed_repeats(small):
    shuffled = small[np.random.default_rng(0).permutation(small.n_cells)]
    for f in (rest.split_halves, rest.matched_steps):
        first, again, other = f(Course.of(small), 40, 3), f(Course.of(shuffled), 40, 3), f(Course.of(small), 40, 4)
        np.testing.assert_allclose(first, again)
        assert not np.allclose(first, other)
    probability = [rest.probability_of_rest(Course.of(s), 0.1) for s in (small, shuffled)]
    np.testing.assert_allclose(*probability)


def test_effective_genes_by_matrix_and_by_probes(small, monkeypatch):
    rng = np.random.default_rng(3)
    shared = rng.gamma(2, 0.5, (500, 1))
    counts = rng.poisson(4 * np.where(np.arange(40) < 25, shared, 1))
    course = Course.of(screen_of(counts, np.tile(["control", "A"], 250), np.repeat([1, 2], 250)))
    values = course.counts.copy()
    values.data = np.log2(1 + values.data)
    dense, group = values.toarray(), course._group
    rho = np.corrcoef(dense - course.moments(values).mean[group], rowvar=False)
    expected = 40**2 / ((rho**2).sum() - 40**2 / 500)
    assert 2 < expected < 12
    assert rest._effective_genes(course, values) == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(rest, "_PROBES", 30)
    assert rest._effective_genes(course, values) == pytest.approx(expected, rel=0.4)


def moved_screen(sd, n_cells, n_genes, rng):
    """Poisson counts at two times; mean log₂(1 + x) of perturbation k moves by N(0, sd_k²) beyond a drift, control does not."""
    grid = np.linspace(0.05, 60, 3000)
    counts = np.arange(160)[:, None]
    from scipy.stats import poisson

    y = (poisson.pmf(counts, grid) * np.log2(1 + counts)).sum(0)
    base, drift = rng.uniform(1.5, 4, n_genes), rng.normal(0, 0.1, n_genes)
    after = base + drift + np.r_[0, sd][:, None] * rng.normal(size=(len(sd) + 1, n_genes))
    means = np.stack([np.tile(base, (len(sd) + 1, 1)), after], 1)
    rate = np.interp(means, y, grid)
    data = rng.poisson(np.repeat(rate.reshape(-1, n_genes), n_cells, 0))
    names = np.repeat(["control", *(f"P{k:03d}" for k in range(len(sd)))], 2 * n_cells)
    return screen_of(data, names, np.tile(np.repeat([1.0, 2.0], n_cells), len(sd) + 1))


def test_probabilities_of_rest_hold_as_often_as_they_say():
    rng = np.random.default_rng(7)
    sd = np.minimum(0.1 * np.abs(rng.standard_cauchy(150)), 0.6)
    probability = rest.probability_of_rest(Course.of(moved_screen(sd, 60, 40, rng)), 0.1)[1:, 0]
    still = sd <= 0.1
    assert ((probability - still) ** 2).mean() < 0.12  # 0.25 is a coin
    for low, high in ((0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        part = (probability >= low) & (probability < high)
        assert part.sum() >= 10
        assert abs(still[part].mean() - probability[part].mean()) < 0.15


def test_a_perturbation_that_moves_is_not_at_rest_and_one_that_drifts_with_all_is():
    rng = np.random.default_rng(8)
    probability = rest.probability_of_rest(Course.of(moved_screen(np.array([0, 0, 0, 0, 0.5]), 200, 40, rng)), 0.1)[:, 0]
    assert probability[:5].min() > 0.9
    assert probability[5] < 0.01


def test_change_is_per_unit_of_time():
    rng = np.random.default_rng(9)
    screen = moved_screen(np.array([0, 0, 0, 0.2]), 200, 40, rng)
    codes = Course.of(screen)
    slow = Course(codes.counts, codes.size_factor, codes.perturbations, codes.perturbation, (1.0, 11.0), codes.time)
    assert rest.probability_of_rest(codes, 0.1)[4, 0] < 0.05
    assert rest.probability_of_rest(slow, 0.1)[4, 0] > 0.95


def test_parts_of_control_are_at_rest():
    """Control cells of the study, parted at random into control and three shams, are not called moving."""
    screen = pb.datasets.ishikawa2023()
    cells = screen.cells_of("control")
    time = np.array([p.time for p in screen.conditions])[screen.condition[cells]]
    names = np.random.default_rng(0).choice(["control", "A", "B", "C"], len(cells))
    course = Course.of(screen_of(screen.counts[cells].toarray(), names, time))
    assert rest.probability_of_rest(course, 0.1).min() > 0.7
    beyond = np.abs(rest.beyond_drift(rest.steps(course), rest.drift_weights(course))).mean(-1)
    assert (beyond < rest.matched_bound(rest.matched_steps(course, 500), 0.05)).all()


def test_steps_that_were_not_seen_are_nan():
    rng = np.random.default_rng(2)
    time, names = np.tile([1, 2, 3], 60), np.repeat(["control", "A", "B"], 60)
    seen = ~((names == "A") & (time == 2))
    course = Course.of(screen_of(rng.poisson(5, (180, 6))[seen], names[seen], time[seen]))
    for values in (rest.steps(course)[..., 0], rest.matched_steps(course, 30)[0], rest.probability_of_rest(course, 0.1)):
        assert np.isnan(values).tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_kinds_of_perturbation_of_one_gene_are_kept_apart():
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"perturbation": np.tile(["control", "A", "A"], 40), "time": np.repeat([1, 2], 60)}, index=map(str, range(120)))
    table["perturbation_type"] = np.tile(["knockout", "knockout", "interference"], 40)
    adata = AnnData(rng.poisson(5.0, (120, 3)).astype(np.float32), obs=table, var=pd.DataFrame(index=["A", "B", "C"]))
    course = Course.of(pb.Screen.from_anndata(adata, time="time"))
    assert course.perturbations == ("control", "Interference('A')", "Knockout('A')")


def test_screens_in_which_nothing_can_be_followed_are_refused(small):
    with pytest.raises(ValueError, match=r"single time, 1; .*time="):
        Course.of(small[[p.time == 1 for p in np.array(small.conditions, dtype=object)[small.condition]]])
    control = np.isin(np.arange(small.n_cells), small.cells_of("control"))
    with pytest.raises(ValueError, match=r"no control cells.*control="):
        Course.of(small[~control])
    with pytest.raises(ValueError, match="control cells only"):
        Course.of(small[control])
    few = small[np.r_[small.cells_of("control")[:20], np.flatnonzero(~control)]]
    with pytest.raises(ValueError, match=r"Only \d control cells in media 'baseline' at time 1: at least 10"):
        Course.of(few)
