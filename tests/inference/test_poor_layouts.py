"""Layouts that teach little: they are fitted, finite, and it is said what they leave unknown."""

from dataclasses import replace

import numpy as np
import pytest

import perturbprob as pb


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Two media, three batches."""
    return pb.simulate(n_cells=360, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0,), n_batches=3, seed=1).screen


def fitted(screen: pb.Screen) -> pb.Fit:
    """A short fit."""
    model = pb.node(screen, 1, n_hidden=8, assumptions=[pb.UneditedStable()])
    return pb.fit(model, screen, epochs=30, learning_rate=0.03, minibatch=400, progress=False)


def test_a_batch_of_one_cell_is_fitted_and_its_effect_is_least_known(screen: pb.Screen) -> None:
    last = np.flatnonzero(screen.batch == 2)
    poor = screen[np.setdiff1d(np.arange(screen.n_cells), last[1:])]
    assert "1 batch (batch3) with one cell" in poor.layout.report()
    fit = fitted(poor)
    assert np.isfinite(fit.losses["train"]).all()
    deviation = pb.posterior(fit, 200).posterior["batch_effect"].std(("chain", "draw")).mean("gene")
    assert deviation.values.argmax() == 2
    predicted = pb.predict(fit, screen.conditions[0], batch="batch3", n_draws=10, progress=False)
    assert np.isfinite(predicted["mean"]).all()


def test_media_nested_in_a_batch_are_fitted_where_batches_share_control_and_named(screen: pb.Screen) -> None:
    drug = np.array([p.media is not None for p in screen.conditions])[screen.condition]
    nested = screen[~drug | (screen.batch == 2)]
    assert nested.layout.connected
    assert nested.layout.cells.loc[(slice(None), "drug"), "batch1"].sum() == 0
    fit = fitted(nested)
    assert np.isfinite(fit.losses["train"]).all()
    effects = pb.effects(fit, n_draws=5, progress=False)
    assert np.isfinite(effects["log_fold_change"]).all()


def test_each_media_in_batches_of_its_own_is_refused(screen: pb.Screen) -> None:
    drug = np.array([p.media is not None for p in screen.conditions])[screen.condition]
    nested = screen[drug == (screen.batch == 2)]
    assert ("batch", "media") in nested.layout.nested()
    assert "batch is nested in media" in nested.layout.report()
    with pytest.raises(ValueError, match=r"2 parts that share no condition .*: \[batch1, batch2\], \[batch3\]"):
        pb.node(nested, 1)
    fit = pb.fit(pb.node(nested, 1, assumptions=[pb.ExchangeableBatches(), pb.UneditedStable()]), nested, epochs=1, progress=False)
    with pytest.warns(pb.AliasedWarning, match="media and batch are aliased"):
        pb.predict(fit, n_draws=2, progress=False)


def test_standard_errors_that_are_unknown_or_zero_leave_the_noise_to_be_learnt(screen: pb.Screen) -> None:
    bulk = screen.pseudobulk()
    error = np.array(bulk.standard_error)
    error[:, 0], error[:, 1] = np.nan, 0.0
    poor = replace(bulk, standard_error=error)
    with pytest.raises(ValueError, match="needs a standard error above 0 for every value"):
        pb.node(poor, measurement="known_noise")
    for zero in (np.where(np.isnan(error), 0.1, error), np.where(error == 0, 0.1, error)):  # either alone, too
        with pytest.raises(ValueError, match="needs a standard error above 0 for every value"):
            pb.node(replace(bulk, standard_error=zero.astype(np.float32)), measurement="known_noise")
    fit = pb.fit(pb.node(poor, assumptions=[pb.UneditedStable()]), poor, epochs=60, learning_rate=0.03, validation=0.0, progress=False)
    assert np.isfinite(fit.losses["train"]).all()
    noise = pb.posterior(fit, 50).posterior["noise"]
    assert float(noise.min()) > 1e-3
    assert np.isfinite(pb.predict(fit, n_draws=5, batch="average", progress=False)["mean"]).all()


def test_an_error_that_is_not_known_is_as_large_as_the_largest_known_of_its_gene() -> None:
    from perturbprob.model.cells import _filled

    error = np.array([[0.1, np.nan, np.nan], [0.3, 0.2, np.nan]], np.float32)
    np.testing.assert_allclose(_filled(error), [[0.1, 0.2, 0.0], [0.3, 0.2, 0.0]])


def test_one_batch_says_nothing_of_a_new_one(screen: pb.Screen) -> None:
    one = screen[screen.batch == 0]
    with pytest.warns(UserWarning, match="one batch"):
        fit = pb.fit(pb.node(one, 1, assumptions=[pb.UneditedStable()]), one, epochs=1, progress=False)
    with pytest.raises(ValueError, match="The fit has one batch, so how far another would be off was never seen"):
        pb.predict(fit, n_draws=2, batch="new", progress=False)


@pytest.mark.parametrize("name", ["new", "average"])
def test_a_batch_may_not_be_called_what_predict_means_otherwise(name: str) -> None:
    adata = pb.simulate(n_cells=60, n_genes=6, n_perturbations=1, n_batches=2, seed=1).adata
    adata.obs["batch"] = [name if b == "batch1" else b for b in adata.obs["batch"]]
    with pytest.raises(ValueError, match=f"A batch is named '{name}', which predict.*means otherwise"):
        pb.Screen.from_anndata(adata, time="time", batch="batch")


def test_depth_of_perturbations_without_control_is_said_to_be_the_priors(screen: pb.Screen) -> None:
    control = np.array([not p.perturbations for p in screen.conditions])[screen.condition]
    names = np.array([p.perturbation for p in screen.conditions])[screen.condition]
    first = screen.perturbations[0]
    apart = screen[((screen.batch == 0) & (control | (names == first))) | ((screen.batch == 1) & ~control & (names != first))]
    with pytest.warns(UserWarning, match="Batches batch2 share no condition with one that holds control"):
        pb.depth_effects(apart)
