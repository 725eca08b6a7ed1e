"""Gene space: the same CellModel with a known start, no decoder and normal noise; and the deterministic objective of eq 5."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import perturbprob as pb
from perturbprob.inference.counterfactual import ROUTES
from perturbprob.inference.draws import centre
from perturbprob.measurement.decoder import Identity
from perturbprob.model.cells import CellTable

SHORT = {"validation": 0.0, "progress": False}


@pytest.fixture(scope="module")
def bulk() -> pb.Screen:
    """Pseudobulks of a simulated screen with effects."""
    return pb.simulate(n_cells=3000, n_genes=12, n_perturbations=4, times=(1.0, 2.0), n_batches=1, seed=5).screen.pseudobulk()


@pytest.fixture(scope="module")
def fit(bulk: pb.Screen) -> pb.Fit:
    """A short fit by the ELBO."""
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(bulk)
    return pb.fit(model, bulk, epochs=250, learning_rate=1e-2, **SHORT)


def means(screen: pb.Screen) -> np.ndarray:
    """The measured mean of every condition."""
    return np.stack([screen.counts[screen.condition == k].mean(0) for k in range(len(screen.conditions))])


def test_the_slots_of_gene_space(fit: pb.Fit, bulk: pb.Screen) -> None:
    assert isinstance(fit.model.decoder, Identity)
    assert fit.model.n_latent == bulk.n_genes
    control = bulk.counts[bulk.cells_of(pb.Protocol([pb.Wait(1)]))].mean(0)
    np.testing.assert_allclose(fit.model.start, control, rtol=1e-5)


def test_the_fit_comes_near_the_means_and_says_how_near(fit: pb.Fit, bulk: pb.Screen) -> None:
    answer = pb.predict(fit, n_draws=50, progress=False)
    assert answer.attrs["scale"] == "value"
    error = ((answer["mean"].values - means(bulk)) ** 2).mean()
    assert error < 0.35 * means(bulk).var(0).mean()
    wide = pb.predict(fit, n_draws=50, interval="observed", n_cells=1, progress=False)
    assert float((wide["upper"] - wide["lower"]).mean()) > float((answer["upper"] - answer["lower"]).mean())


def test_every_question_can_be_asked(fit: pb.Fit, bulk: pb.Screen, tmp_path: Path) -> None:
    found = pb.effects(fit, n_draws=20, progress=False)
    assert found.attrs["units"] == "difference of values"
    assert np.isfinite(pb.log_density(fit, bulk, 2, progress=False)).all()
    pb.predictive_check(fit, bulk, n_draws=3, progress=False)
    assert set(pb.posterior(fit, n_draws=3).posterior) >= {"noise", "perturbation_effect"}
    what = pb.counterfactual(fit, bulk, bulk.conditions[-1], n_draws=3, progress=False)
    assert what["mean"].shape == bulk.counts.shape
    fit.save(tmp_path / "fit")
    one, two = (pb.predict(f, n_draws=3, progress=False)["mean"] for f in (fit, pb.load(tmp_path / "fit")))
    assert one.identical(two)


@pytest.mark.filterwarnings("ignore:The screen has one batch")
@pytest.mark.parametrize("distance", ["mse", "energy", "moment"])
def test_paths_train_the_deterministic_f(bulk: pb.Screen, distance: str) -> None:
    cells = bulk[np.repeat(np.arange(bulk.n_cells), 3)] if distance != "mse" else bulk
    fit = pb.fit(pb.node(cells), cells, objective="paths", distance=distance, epochs=60, learning_rate=1e-2, **SHORT)
    assert fit.losses["train"][-1] < 0.6 * fit.losses["train"][0]
    draws = pb.posterior(fit, n_draws=4).posterior["perturbation_effect"]
    assert float(draws.std("draw").max()) < 1e-6
    assert "F on eq 5" in fit.report()


@pytest.mark.filterwarnings("ignore:The screen has one batch")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"objective": "path"}, "Unknown objective 'path'. Use one of 'elbo', 'paths'"),
        (
            {"objective": "paths", "distance": "euclid"},
            "Unknown distance 'euclid'. Use one of 'mse', 'moment', 'energy', .*'mmd'",
        ),
    ],
)
def test_objectives_that_do_not_exist(bulk: pb.Screen, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.fit(pb.node(bulk), bulk, epochs=1, **how)


def test_objectives_and_measurements_that_do_not_fit(screen: pb.Screen, bulk: pb.Screen) -> None:
    with pytest.raises(ValueError, match=r"measurement='negative_binomial' does not fit continuous\. Use one of 'normal', 'known_noise'"):
        pb.node(bulk, measurement="negative_binomial")
    with pytest.raises(ValueError, match=r"one latent axis for each gene: leave n_latent=3 out"):
        pb.node(bulk, n_latent=3)
    with pytest.raises(ValueError, match="distance='energy' goes with objective='paths'"):
        pb.fit(pb.node(screen, 2), screen, epochs=1, distance="energy")
    with pytest.raises(ValueError, match="measurement='normal' does not fit counts"):
        pb.node(screen, measurement="normal")
    with pytest.raises(ValueError, match="made for other values than this screen's continuous"):
        pb.log_density(pb.fit(pb.node(screen, 2), screen, epochs=1, progress=False), bulk[:3], progress=False)


@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_known_noise_needs_every_standard_error(bulk: pb.Screen) -> None:
    assert pb.node(bulk, measurement="known_noise").measurement.learnt is False
    from dataclasses import replace

    fit = pb.fit(pb.node(bulk, measurement="known_noise"), bulk, epochs=2, **SHORT)
    assert np.isfinite(pb.predict(fit, n_draws=2, progress=False)["mean"]).all()
    with pytest.raises(ValueError, match="standard errors for all the noise there is, and this screen lacks some"):
        pb.log_density(fit, replace(bulk, standard_error=None), progress=False)
    with pytest.raises(ValueError, match="needs a standard error above 0 for every value"):
        pb.node(replace(bulk, standard_error=np.full(bulk.counts.shape, np.nan, np.float32)), measurement="known_noise")


def test_scales_of_values(fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match=r"Unknown scale 'log1p'\. Use one of 'value'"):
        pb.predict(fit, scale="log1p", progress=False)
    assert torch.isfinite(fit.model.start).all()


def rows_from(fit: pb.Fit, bulk: pb.Screen, spread: float, noise: float) -> tuple[pb.Screen, np.ndarray]:
    """Rows that came from rest states ``spread`` around the start, measured with ``noise`` standard errors; and their last condition."""
    rng = torch.Generator().manual_seed(0)
    table, new = CellTable(fit.model, bulk), bulk.conditions[-1]
    cells, sites = table.cells(torch.arange(bulk.n_cells)), table.sites(centre(fit.model, fit.guide))
    z0 = fit.model.start + spread * torch.randn(bulk.n_cells, bulk.n_genes, generator=rng)
    segments = [s[torch.zeros(len(z0), dtype=torch.long)] for s in fit.model.vocabulary.encode([new])]
    with torch.no_grad():
        seen, truth = (fit.model.moved(sites, z0, p).z.numpy() for p in (cells.protocol, segments))
    error = noise * np.nan_to_num(bulk.standard_error) * torch.randn(seen.shape, generator=rng).numpy()
    return replace(bulk, counts=csr_array((seen + error).astype(np.float32))), truth


def test_the_measured_state_is_run_backward(fit: pb.Fit, bulk: pb.Screen) -> None:
    """Rows that came from rest states of their own: only the inverse flow finds what each would have shown under another protocol."""
    rows, truth = rows_from(fit, bulk, spread=0.5, noise=0.0)
    back, population = (pb.counterfactual(fit, rows, bulk.conditions[-1], route=r, n_draws=8, progress=False) for r in ROUTES[::-1])
    assert float(abs(back["mean"] - truth).mean()) < 0.3 * float(abs(population["mean"] - truth).mean())
    assert float(back["round_trip"].max()) < 1e-2
    assert float(((back["lower"] <= truth) & (truth <= back["upper"])).mean()) > 0.85


def test_the_routes_agree_within_their_intervals_where_the_start_is_known(fit: pb.Fit, bulk: pb.Screen) -> None:
    """Rows from the known start, measured with their noise: one route knows the start, the other finds it; both hold the truth."""
    rows, truth = rows_from(fit, bulk, spread=0.0, noise=1.0)
    known, found = (pb.counterfactual(fit, rows, bulk.conditions[-1], route=r, n_draws=12, progress=False) for r in ROUTES)
    assert float(found["condition_number"].max()) < 100
    apart, width = abs(known["mean"] - found["mean"]), np.hypot(known["sd"], found["sd"])
    assert float((apart < 1.645 * width).mean()) > 0.85
    assert float(apart.max()) > 1e-4, "the routes are one"
    for answer in (known, found):
        assert float(((answer["lower"] <= truth) & (truth <= answer["upper"])).mean()) > 0.85


def test_a_summary_of_a_screen_is_fitted_with_silence_assumed(data_path: Callable[[str], Path]) -> None:
    """Means with standard errors, control without: the term is finite, the fit improves, and the answer is finite."""
    adata = anndata.read_h5ad(data_path("datlinger2017_jurkat_summary.h5ad"))[:, :25].copy()
    known = {"standard_error": "uncertainty_se", "cells_behind": "n_cells"}
    with pytest.warns(pb.ScreenWarning):
        screen = pb.Screen.from_anndata(adata, media="media", baseline="unstimulated", time="time", values="continuous", **known)
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(screen, assumptions=[pb.SilentInBaseline(), pb.UneditedStable()])
    fit = pb.fit(model, screen, epochs=20, **SHORT)
    bound = fit.model.assumptions[0]
    assert np.isfinite(bound.noise).all()
    assert (bound.noise > 0).all()
    assert np.isfinite(fit.losses["train"]).all()
    assert fit.losses["train"][-1] < fit.losses["train"][0]
    assert np.isfinite(pb.predict(fit, n_draws=5, progress=False)["mean"]).all()


def test_known_noise_is_trained_and_predicts(bulk: pb.Screen) -> None:
    """No noise is learnt, and the prediction of means comes nearer than one mean for all."""
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(bulk, measurement="known_noise")
    fit = pb.fit(model, bulk, epochs=150, learning_rate=1e-2, **SHORT)
    assert np.isfinite(fit.losses["train"]).all()
    assert "noise" not in pb.posterior(fit, n_draws=2).posterior
    error = ((pb.predict(fit, n_draws=20, progress=False)["mean"].values - means(bulk)) ** 2).mean()
    assert error < 0.5 * means(bulk).var(0).mean()
