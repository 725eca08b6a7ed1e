"""simulate: what it says about a screen is what the counts show."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.simulate import simulate


def dense(simulation):
    """The counts as float64."""
    return simulation.adata.X.toarray().astype(float)


def members(simulation, condition):
    """Which cells belong to a condition of the truth."""
    at, obs = simulation.truth.sel(condition=condition), simulation.adata.obs
    same = [(obs[name] == at[name].item()).to_numpy() for name in ("perturbation", "media", "time")]
    return np.logical_and.reduce(same)


def log_share(counts):
    """The log of the pooled share per gene, and the variance of its error (delta method over cells)."""
    gene, total = counts.mean(axis=0), counts.sum(axis=1)
    residual = counts / gene - (total / total.mean())[:, None]
    return np.log(gene / gene.sum()), residual.var(axis=0) / len(counts)


def active_changes(truth):
    """The log fold changes of the perturbations that do something, (condition, gene)."""
    active = truth["target"].values[truth["active"].values]
    return truth["log_fold_change"].isel(condition=truth["perturbation"].isin(active).values).to_numpy()


def composition(simulation):
    """The share of each batch in each condition."""
    obs = simulation.adata.obs
    return pd.crosstab([obs.perturbation, obs.media, obs.time], obs.batch, normalize="index").to_numpy()


# Laws.


def test_a_seed_gives_the_same_bytes_and_another_seed_other_counts():
    first, again, other = simulate(seed=3), simulate(seed=3), simulate(seed=4)
    assert first.adata.X.data.tobytes() == again.adata.X.data.tobytes()
    assert first.adata.X.indices.tobytes() == again.adata.X.indices.tobytes()
    pd.testing.assert_frame_equal(first.adata.obs, again.adata.obs)
    assert first.truth.identical(again.truth)
    assert (first.adata.X != other.adata.X).nnz > 0
    assert not first.truth["log_fold_change"].broadcast_equals(other.truth["log_fold_change"])


def test_more_cells_and_batches_leave_the_truth_about_conditions_alone():
    few, many = simulate(n_cells=500, n_batches=1), simulate(n_cells=900, n_batches=4)
    for name in ("rate_share", "log_fold_change", "dispersion", "network", "active"):
        assert few.truth[name].identical(many.truth[name])


@settings(max_examples=15, deadline=None)
@given(n_batches=st.integers(1, 6), n_genes=st.integers(5, 40), batch_scale=st.just(0.0) | st.floats(1e-3, 2), seed=st.integers(0, 2**32))
def test_batch_effects_are_zero_sum_over_batches_and_centred_over_genes_by_rate(n_batches, n_genes, batch_scale, seed):
    truth = simulate(n_cells=300, n_genes=n_genes, n_perturbations=2, n_batches=n_batches, batch_scale=batch_scale, seed=seed).truth
    eta, control = truth["batch_effect"], truth["rate_share"].sel(condition="Protocol([Wait(1)])")
    assert abs(eta.sum("batch")).max() < 1e-13
    assert abs((eta * control).sum("gene")).max() < 1e-13
    assert (float(eta.std()) > 0) == (n_batches > 1 and batch_scale > 0)


def test_control_in_baseline_media_rests_and_every_other_media_moves_it():
    truth = simulate(media=("mTeSR", "BMP4"), times=(0.5, 2.0, 40.0), n_perturbations=3).truth
    control = truth["rate_share"].isel(condition=(truth["perturbation"] == "control").values)
    baseline, other = (control.isel(condition=(control["media"] == name).values).to_numpy() for name in ("mTeSR", "BMP4"))
    np.testing.assert_array_equal(baseline, np.broadcast_to(baseline[:1], baseline.shape))
    assert np.abs(np.log(other / baseline)).max(axis=1).min() > 0.2
    np.testing.assert_allclose(truth["rate_share"].sum("gene"), 1, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_control_and_inactive_perturbations_change_nothing_and_active_ones_something(seed):
    truth = simulate(n_perturbations=8, inactive=0.5, media=("a", "b"), seed=seed).truth
    assert int(truth["active"].sum()) == 4
    for name, changes in truth["log_fold_change"].groupby("perturbation"):
        active = name != "control" and bool(truth["active"].sel(target=name))
        assert bool((changes == 0).all()) != active
        assert bool((truth["network"].sel(regulator=name) != 0).any()) == active if name != "control" else not active


def test_effects_are_sparse_and_of_realistic_size():
    size = np.concatenate([np.abs(active_changes(simulate(seed=seed).truth)) for seed in range(10)])
    assert np.mean(size < 0.1) > 0.6
    assert 0.05 < np.mean(size > 0.3) < 0.2
    assert np.mean(size > 1.5) < 0.01


def test_no_effect_scale_means_no_active_perturbation():
    truth = simulate(effect_scale=0.0, inactive=0.0).truth
    assert not truth["active"].any()
    assert (truth["log_fold_change"] == 0).all()


def test_the_transcript_of_a_knocked_out_gene_stays():
    truth = simulate(n_genes=30, n_perturbations=1, inactive=0.0).truth
    gene = truth["target"].item()
    knocked = truth.isel(condition=(truth["perturbation"] == gene).values)
    own = np.exp(knocked["log_fold_change"].sel(gene=gene))
    assert truth["network"].sel(gene=gene, regulator=gene) == 0
    assert (own > 0.5).all()


def test_conditions_are_labelled_by_their_protocols():
    truth = simulate(media=("baseline", "BMP4"), times=(0.0, 1.5), n_perturbations=1).truth
    protocols = [Protocol.parse(text) for text in truth["condition"].values]
    assert len(set(protocols)) == 8
    assert [p.perturbation for p in protocols] == list(truth["perturbation"].values)
    assert [p.media or "baseline" for p in protocols] == list(truth["media"].values)
    assert [p.time for p in protocols] == list(truth["time"].values)


def test_even_batches_have_the_same_composition_and_unequal_ones_do_not():
    assert np.abs(composition(simulate(n_cells=18 * 100)) - 1 / 3).max() < 0.01  # one cell in a hundred
    half, full = (np.median(composition(simulate(unequal=u)).max(axis=1)) for u in (0.5, 1.0))
    assert 0.45 < half < full
    assert full > 0.7


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_the_map_of_the_truth_rests_at_control_and_has_the_identity_for_its_gradient_without_coupling(coupling):
    simulation = simulate(
        n_cells=60, n_genes=12, n_perturbations=2, media=("a", "b"), times=(1.0,), inactive=0.0, coupling=coupling, seed=3
    )
    rest, rng = np.log(simulation.truth["rate_share"].values[:1]), np.random.default_rng(0)
    x = rest + rng.normal(0, 0.5, (4, 12))
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    same, moved = (simulation.outcome(x, simulation.truth["condition"].values[k]) for k in (0, -1))
    np.testing.assert_allclose(same, x, atol=1e-7)
    np.testing.assert_allclose(simulation.outcome(x + 3.0, simulation.truth["condition"].values[-1]), moved, atol=1e-7)  # depth
    change = (moved - x) - (moved - x)[:, :1]  # what normalisation adds is the same for all genes
    assert np.abs(change).max() > 0.1
    assert (change.std(axis=0).max() > 1e-3) == bool(coupling)


def test_without_coupling_each_cell_changes_as_the_median_cell_and_with_it_by_its_own_regulators():
    for coupling in (0.0, 1.0):
        simulation = simulate(n_cells=90, n_genes=12, n_perturbations=2, times=(1.0,), inactive=0.0, coupling=coupling, seed=3)
        truth, rate = simulation.truth, simulation.log_rate(simulation.truth["condition"].values[1])
        rest = simulation.log_rate("Protocol([Wait(1)])")
        change = (rate - rest).values - (rate - rest).values[:, :1]
        assert (change.std(0).max() > 0.02) == bool(coupling)
        np.testing.assert_allclose(np.exp(truth["median_log_rate"].values[0]), np.exp(simulation.network.base), rtol=1e-9)


# Measured again, in other batches.


def test_a_layout_is_measured_as_it_is_written_and_only_cells_and_batches_change():
    simulation = simulate(n_cells=90, n_genes=10, n_perturbations=2, media=("a", "b"), times=(1.0,), seed=3)
    layout = simulation.screen.summary().iloc[::-1] * [1, 2, 0]
    layout.insert(0, "lane", range(1, 7))
    layout = layout.drop(columns="batch3")
    again = simulation.remeasured(layout, seed=1)
    pd.testing.assert_frame_equal(again.screen.summary()[list(layout)], layout.iloc[::-1], check_dtype=False, check_names=False)
    for name in ("rate_share", "log_fold_change", "dispersion", "network"):
        assert again.truth[name].identical(simulation.truth[name])
    assert again.adata.X.toarray().tobytes() == simulation.remeasured(layout, seed=1).adata.X.toarray().tobytes()


def test_batch_effects_of_layouts_are_independent_draws_and_a_seed_keeps_those_of_the_first_batches():
    simulation = simulate(n_cells=600, n_genes=300, n_perturbations=1, times=(1.0,), depth=3000.0, seed=3)
    table = pd.DataFrame(5, simulation.screen.summary().index, [f"lane{b}" for b in range(6)])
    eta = simulation.remeasured(table, batch_scale=0.3, seed=1).truth["batch_effect"]
    assert abs(float(eta.std()) - 0.3) < 4 * 0.3 / np.sqrt(2 * eta.size)
    assert abs(float(eta.mean("batch").var()) / (0.09 / 6) - 1) < 4 * np.sqrt(2 / 300)
    assert np.abs(np.corrcoef(eta)[np.triu_indices(6, 1)]).max() < 4 / np.sqrt(300)
    assert np.abs(eta.values @ simulation.truth["rate_share"].values[0]).max() < 1e-12
    fewer = simulation.remeasured(table.iloc[:, :2], batch_scale=0.3, seed=1).truth["batch_effect"]
    np.testing.assert_allclose(fewer, eta[:2], atol=1e-12)


# Recovery.


def test_counts_have_the_mean_and_variance_of_the_negative_binomial():
    simulation = simulate(n_cells=40_000, n_genes=20, n_perturbations=1, times=(1.0,), n_batches=2, heterogeneity=0.0, depth=150.0)
    truth = simulation.truth
    z_mean, z_variance = [], []
    for condition in truth["condition"].values:
        for batch in truth["batch"].values:
            chosen = members(simulation, condition) & (simulation.adata.obs["batch"] == batch).to_numpy()
            rate = truth["rate_share"].sel(condition=condition) * np.exp(truth["batch_effect"].sel(batch=batch))
            mean = 150 * truth["size_factor"].values[chosen][:, None] * rate.to_numpy()
            variance = mean + mean**2 / truth["dispersion"].to_numpy()
            deviation = dense(simulation)[chosen] - mean
            z_mean.append(deviation.sum(axis=0) / np.sqrt(variance.sum(axis=0)))
            excess = deviation**2 / variance - 1
            z_variance.append(excess.mean(axis=0) / (excess.std(axis=0) / np.sqrt(len(excess))))
    for z in (np.ravel(z_mean), np.ravel(z_variance)):
        assert 0.8 < z.std() < 1.25
        assert abs(z.mean()) < 4 / np.sqrt(z.size)


def test_pooled_counts_show_the_log_fold_changes():
    simulation = simulate(n_cells=60_000, n_genes=40, n_perturbations=5, media=("a", "b"), n_batches=1, heterogeneity=0.5)
    truth, counts, z = simulation.truth, dense(simulation), []
    pooled = {condition: log_share(counts[members(simulation, condition)]) for condition in truth["condition"].values}
    for condition in truth["condition"].values:
        at = truth.sel(condition=condition)
        if at["perturbation"] == "control":
            continue
        same = (truth["perturbation"] == "control") & (truth["media"] == at["media"]) & (truth["time"] == at["time"])
        (value, error), (reference, reference_error) = pooled[condition], pooled[truth["condition"].values[same.values][0]]
        z.append((value - reference - at["log_fold_change"].to_numpy()) / np.sqrt(error + reference_error))
    assert 0.85 < np.std(z) < 1.15
    assert np.max(np.abs(z)) < 4.5


def test_pooled_counts_show_the_shares_under_strong_heterogeneity():
    simulation = simulate(n_cells=60_000, n_genes=30, n_perturbations=0, times=(1.0,), n_batches=1, heterogeneity=1.0)
    value, error = log_share(dense(simulation))
    z = (value - np.log(simulation.truth["rate_share"].to_numpy()[0])) / np.sqrt(error)
    assert 0.6 < np.std(z) < 1.4
    assert np.max(np.abs(z)) < 4


def test_pooled_counts_show_the_batch_effects():
    simulation = simulate(n_cells=30_000, n_genes=30, n_perturbations=0, times=(1.0,), n_batches=4)
    counts, obs, eta = dense(simulation), simulation.adata.obs, simulation.truth["batch_effect"]
    assert 0.15 < float(eta.std()) < 0.25
    for batch in eta["batch"].values:
        chosen = (obs["batch"] == batch).to_numpy()
        mean = counts[chosen].mean(axis=0) / np.exp(eta.sel(batch=batch).to_numpy())
        share = simulation.truth["rate_share"].to_numpy()[0]
        relative = np.log(mean / share)
        assert np.std(relative) < 0.03  # the constant is depth, which differs by chance only
        assert abs(np.mean(relative) - np.log(200 * np.exp(0.3**2 / 2))) < 0.03


def test_cells_differ_in_programmes_shared_by_genes():
    def correlation(heterogeneity):
        simulation = simulate(
            n_cells=4000, n_perturbations=0, times=(1.0,), n_batches=1, heterogeneity=heterogeneity, dispersion=100.0, depth=1000.0
        )
        counts = dense(simulation)
        logs = np.log((counts + 0.5) / counts.sum(axis=1, keepdims=True))[:, counts.mean(axis=0) > 10]
        return np.abs(np.corrcoef(logs.T)[np.triu_indices(logs.shape[1], 1)]).mean()

    assert correlation(0.0) < 0.05
    assert correlation(0.6) > 0.3


def test_depth_does_not_depend_on_the_batch_and_no_cell_or_gene_is_empty():
    simulation = simulate(depth=2.0, n_cells=3000, n_genes=30)
    assert dense(simulation).sum(axis=1).min() > 0
    simulation = simulate()
    counts = dense(simulation)
    assert counts.sum(axis=0).min() > 0
    assert 0.1 < np.mean(counts == 0) < 0.6
    depth = np.log(pd.Series(simulation.truth["size_factor"].values)).groupby(simulation.adata.obs["batch"].to_numpy()).mean()
    assert depth.abs().max() < 4 * 0.3 / np.sqrt(2000 / 3)


# Every form of screen is a Screen.


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"n_perturbations": 0},
        {"n_perturbations": 0, "times": (1.0,), "media": ("baseline", "BMP4", "WNT")},
        {"n_perturbations": 0, "times": (0.0, 1.0, 2.0, 5.0), "n_batches": 1},
        {"times": (3.0,), "n_batches": 1},
        {"times": [2.0, 1.0], "media": ["E8", "BMP4"], "unequal": 0.7},
        {"n_perturbations": 20, "n_genes": 20, "times": [1.0]},
    ],
)
def test_every_form_of_screen_converts(form):
    simulation = simulate(n_cells=400, **form)
    adata, truth, screen = simulation.adata, simulation.truth, simulation.screen
    assert adata.X.dtype == np.float32
    assert set(adata.obs) == {"perturbation", "perturbation_type", "media", "time", "batch"}
    assert {str(condition) for condition in screen.conditions} == set(truth["condition"].values)
    assert simulation.screen is screen


# Misuse.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_cells": 17}, r"18 conditions .* need as many cells; got n_cells=17"),
        ({"n_cells": 0}, r"n_cells must be a whole number of at least 1; got 0"),
        ({"n_genes": 1}, r"n_genes must be a whole number of at least 2; got 1"),
        ({"n_genes": 5}, r"8 perturbations need as many genes; got n_genes=5"),
        ({"n_perturbations": -1}, r"n_perturbations must be a whole number of at least 0; got -1"),
        ({"n_batches": 0}, r"n_batches must be a whole number of at least 1; got 0"),
        ({"n_batches": True}, r"n_batches must be a whole number of at least 1; got True"),
        ({"n_cells": 18, "n_batches": 40}, r"18 cells leave some of the 40 batches empty: raise n_cells"),
        ({"seed": -1}, r"seed must be a whole number of at least 0; got -1"),
        ({"batch_scale": -0.1}, r"batch_scale must be a number from 0 to 5; got -0\.1"),
        ({"effect_scale": -1.0}, r"effect_scale must be a number from 0 to 5; got -1\.0"),
        ({"heterogeneity": float("nan")}, r"heterogeneity must be a number from 0 to 1\.5; got nan"),
        ({"inactive": 1.5}, r"inactive must be a number from 0 to 1; got 1\.5"),
        ({"unequal": -0.2}, r"unequal must be a number from 0 to 1; got -0\.2"),
        ({"coupling": 1.1}, r"coupling must be a number from 0 to 1; got 1\.1"),
        ({"unequal": 2.0}, r"unequal must be a number from 0 to 1; got 2\.0"),
        ({"dispersion": 0.0}, r"dispersion must be a number from 0\.01 to 1e\+06; got 0\.0"),
        ({"depth": 0.5}, r"depth must be a number from 1 to 1e\+06; got 0\.5"),
        ({"media": ("a", "b", "a")}, r"media must hold at least one level and none twice; got \('a', 'b', 'a'\)"),
        ({"media": ()}, r"media must hold at least one level"),
        ({"media": "baseline"}, r"media must be a sequence of names .*; got 'baseline'"),
        ({"media": ("a", "")}, r"media must be a sequence of names"),
        ({"times": ()}, r"times must hold at least one level"),
        ({"times": (1.0, 1.0)}, r"times must hold at least one level and none twice; got \(1\.0, 1\.0\)"),
        ({"times": (1.0, -2.0)}, r"times\[1\] must be a number from 0 to 1e\+06; got -2\.0"),
        ({"times": (float("inf"),)}, r"times\[0\] must be a number from 0 to 1e\+06; got inf"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        simulate(**setting)


@pytest.mark.usefixtures("unchecked")
def test_a_single_time_or_media_is_no_list():
    with pytest.raises(TypeError, match=r"times must be a sequence of numbers such as \(1.0, 2.0\); got 2.0"):
        simulate(times=2.0)
    with pytest.raises(TypeError, match=r"media must be a sequence of names .*; got None"):
        simulate(media=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.rename(index={"control": "contrl"}), r"The truth holds no condition \('contrl', 'baseline', 1\.0\)"),
        (lambda table: -table, "whole numbers of cells of at least 0"),
        (lambda table: table / 2, "whole numbers of cells of at least 0"),
        (lambda table: table * [1, 1, 0], "some in every batch"),
    ],
)
def test_a_table_that_is_no_layout_is_refused(change, message):
    simulation = simulate(n_cells=60, n_genes=8, n_perturbations=1, seed=1)
    with pytest.raises(ValueError, match=message):
        simulation.remeasured(change(simulation.screen.summary()))
