"""The predictive check: observed statistics are the data's own, and data of the model pass."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import perturbprob as pb
from perturbprob.inference.draws import centre
from perturbprob.model.cells import CellTable
from perturbprob.studies.predictive_check import PredictiveCheck


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """A small screen."""
    return pb.simulate(n_cells=500, n_genes=10, n_perturbations=2, n_batches=2, seed=4).screen


@pytest.fixture(scope="module")
def fit(screen: pb.Screen) -> pb.Fit:
    """A short fit of it."""
    return pb.fit(pb.node(screen, 2), screen, epochs=12, warmup=3, progress=False)


@pytest.fixture(scope="module")
def check(fit: pb.Fit, screen: pb.Screen) -> PredictiveCheck:
    """Its check."""
    return pb.predictive_check(fit, screen, n_draws=30, progress=False)


def test_observed_statistics_are_those_of_the_counts(check: object, screen: pb.Screen) -> None:
    counts = screen.counts.toarray()
    observed = check.gene["observed"]
    assert np.allclose(observed.sel(statistic="mean"), counts.mean(0), rtol=1e-5)
    assert np.allclose(observed.sel(statistic="variance"), counts.var(0), rtol=1e-4)
    assert np.allclose(observed.sel(statistic="zero_fraction"), (counts == 0).mean(0))
    rows = counts[screen.condition == 1]
    one = check.condition.isel(condition=1)
    assert np.allclose(one["observed"].sel(statistic="mean"), rows.mean(0), rtol=1e-5)
    assert np.allclose(one["observed_depth"].values, [rows.sum(1).mean(), rows.sum(1).std()], rtol=1e-5)
    lane = counts[screen.batch == 0]
    assert np.allclose(check.batch["observed"].sel(statistic="zero_fraction", batch=screen.batches[0]), (lane == 0).mean(0))


def test_it_does_not_depend_on_the_minibatch_beyond_noise(fit: pb.Fit, screen: pb.Screen, check: object) -> None:
    again = pb.predictive_check(fit, screen, n_draws=30, minibatch=77, progress=False)
    assert np.allclose(again.gene["observed"], check.gene["observed"])
    error = (again.gene["replicated"] - check.gene["replicated"]) / check.gene["replicated_sd"]
    assert float(abs(error).max()) < 5 * (2 / 30) ** 0.5  # thirty values, each over a deviation that is itself estimated


def test_data_of_the_model_pass_and_other_data_do_not(fit: pb.Fit, screen: pb.Screen) -> None:
    table = CellTable(fit.model, screen)
    cells = table.cells(torch.arange(screen.n_cells))
    torch.manual_seed(0)
    sites = centre(fit.model, fit.guide)
    z = fit.model.at_rest(len(cells)).sample()
    own = fit.model.measured(sites, fit.model.moved(sites, z, cells.protocol), cells).sample().numpy()
    good = pb.predictive_check(fit, replace(screen, counts=csr_array(own)), n_draws=40, progress=False)
    outside = ((good.condition["tail_probability"] < 0.025) | (good.condition["tail_probability"] > 0.975)).mean()
    assert float(outside) < 0.12
    bad = pb.predictive_check(
        fit, replace(screen, counts=csr_array(own[::-1] * (np.random.default_rng(0).random(own.shape) > 0.5))), n_draws=10, progress=False
    )
    assert float((bad.gene["tail_probability"].sel(statistic="zero_fraction") < 0.05).mean()) > 0.9


def test_the_summary_says_what_was_compared(check: object) -> None:
    assert "30 replicated screens" in check.summary()
    assert "zero_fraction" in repr(check)


def test_no_draws_is_refused(fit: pb.Fit, screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="n_draws must be"):
        pb.predictive_check(fit, screen, n_draws=0)


def test_a_large_check_says_how_much_memory(fit: pb.Fit, screen: pb.Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["perturbprob.inference.draws"], "LARGE", 1.0)
    with pytest.warns(UserWarning, match="will hold .* GB of statistics"):
        pb.predictive_check(fit, screen, n_draws=1, progress=False)


def test_few_replicates_say_nothing_of_tails(fit: pb.Fit, screen: pb.Screen, check: PredictiveCheck) -> None:
    few = pb.predictive_check(fit, screen, n_draws=2, progress=False).summary()
    assert "too few for tail probabilities" in few
    assert "outside the central" not in few
    assert "outside the central" in check.summary()


def test_what_is_left_beside_additive_effects_is_that_of_a_regression(screen: pb.Screen, check: PredictiveCheck) -> None:
    values = np.log1p(screen.counts.toarray() / screen.size_factor[:, None])
    pairs, code = np.unique(screen.condition * 2 + screen.batch, return_inverse=True)
    n = np.bincount(code)
    mean = np.stack([values[code == k].mean(0) for k in range(len(pairs))])
    design = np.concatenate([np.eye(len(screen.conditions))[pairs // 2], np.eye(2)[pairs % 2]], 1)
    root = np.sqrt(n)[:, None]
    left = root * mean - root * design @ np.linalg.lstsq(root * design, root * mean, rcond=None)[0]
    assert np.allclose(check.interaction["observed"], (left**2).sum(0), rtol=1e-4)
    assert float(check.interaction["observed_overall"]) == pytest.approx((left**2).sum(), rel=1e-4)
    assert check.interaction.attrs["freedom"] == len(pairs) - np.linalg.matrix_rank(design)
    whole = mean - n @ mean / n.sum()
    assert float(check.interaction["total_overall"]) == pytest.approx((n @ whole**2).sum(), rel=1e-4)


def test_batches_that_act_differently_on_conditions_are_called_so(fit: pb.Fit, screen: pb.Screen) -> None:
    """A batch that turns half of the genes up in one condition alone, by more than sampling does."""
    counts = screen.counts.toarray()
    moved = (screen.condition % 2 == 0) & (screen.batch == 0)
    counts[np.ix_(moved, range(5))] = 4 * counts[np.ix_(moved, range(5))] + 1
    bad = pb.predictive_check(fit, replace(screen, counts=csr_array(counts)), n_draws=20, progress=False)
    assert "batches act differently on conditions" in bad.summary()
    assert "fit with batch_effect='state'" in bad.summary()
    state = pb.fit(pb.node(screen, 2, batch_effect="state"), screen, epochs=1, progress=False)
    again = pb.predictive_check(state, replace(screen, counts=csr_array(counts)), n_draws=20, progress=False)
    assert "depend on the state already" in again.summary()


def test_where_no_condition_is_in_two_batches_it_is_not_asked(screen: pb.Screen) -> None:
    part = screen[screen.batch == np.array([p.time == 2 for p in screen.conditions])[screen.condition]]
    aliased = pb.fit(pb.node(part, 1), part, epochs=1, progress=False)
    check = pb.predictive_check(aliased, part, n_draws=20, progress=False)
    assert check.interaction.attrs["freedom"] == 0
    assert "too few conditions are seen in several batches" in check.summary()
