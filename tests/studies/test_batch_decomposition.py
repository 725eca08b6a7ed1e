"""The decomposition of variance: it is the balanced analysis of variance of what the fit predicts, and near the truth of a simulation."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.inference.draws import centre, global_draws
from perturbprob.inference.expectation import Expectation
from perturbprob.studies.reference_grid import ReferenceGrid


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Two media, two times and two batches."""
    return pb.simulate(n_cells=400, n_genes=10, n_perturbations=2, media=("rest", "drug"), n_batches=2, batch_scale=0.5, seed=2).screen


@pytest.fixture(scope="module")
def fit(screen: pb.Screen) -> pb.Fit:
    """A short fit with batch effects that depend on the state."""
    return pb.fit(pb.node(screen, 2, batch_effect="state"), screen, epochs=6, warmup=2, progress=False)


@pytest.fixture(scope="module")
def aliased(screen: pb.Screen) -> pb.Fit:
    """A fit of a screen in which each time is one batch."""
    part = screen[screen.batch == np.array([p.time == 2 for p in screen.conditions])[screen.condition]]
    return pb.fit(pb.node(part, 2), part, epochs=2, progress=False)


def test_shares_sum_to_one_in_every_draw_and_are_not_negative(fit: pb.Fit) -> None:
    table = pb.decompose_batches(fit, n_draws=6, n_states=8, progress=False).table
    for name in ("share_draws", "overall_draws"):
        assert np.allclose(table[name].sum("source"), 1, atol=1e-5)
        assert float(table[name].min()) >= 0
    assert bool((table["share_lower"] <= table["share_upper"]).all())
    assert np.allclose(table["loading"].sum("batch"), 0, atol=1e-5)


def test_variances_are_those_of_a_dense_analysis_of_variance(fit: pb.Fit) -> None:
    """Every mean over axes of the whole grid, in float64."""
    parts = pb.decompose_batches(fit, n_draws=1, n_states=8, interactions=["batch:media"], seed=5, progress=False)
    grid = ReferenceGrid.of(fit)
    assert grid.axes == ("perturbation", "media", "time", "batch")
    expectation = Expectation(fit, grid.protocols, grid.batch_of_cell, n_rest=8, seed=5)
    sites = expectation.complete(next(iter(global_draws(fit.model, fit.guide, 1, 5))))
    value = torch.cat([expectation.log_rates(sites, part) for part in expectation.parts], 1).double().numpy().reshape(8, 3, 2, 2, 2, 10)
    mean = value.mean(0)

    def effect(*kept: int) -> np.ndarray:
        return mean.mean(tuple(k for k in range(4) if k not in kept), keepdims=True)

    main = [effect(k) - effect() for k in range(4)]
    both = effect(1, 3) - effect(1) - effect(3) + effect()
    rest = mean - effect() - sum(main) - both
    wanted = [
        value.var(0).mean((0, 1, 2, 3)),
        *(part.var((0, 1, 2, 3)) for part in main),
        both.var((0, 1, 2, 3)),
        (rest**2).mean((0, 1, 2, 3)),
    ]
    found = parts.table["variance"].values[:-1]
    assert parts.table["source"].values.tolist()[-3:] == ["media:batch", "rest", "noise"]
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-6)
    loading = (effect(3) - effect())[0, 0, 0]
    assert np.allclose(parts.table["loading"].values, loading, atol=1e-5)


def test_a_grid_in_parts_gives_the_same(fit: pb.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pb.decompose_batches(fit, n_draws=2, n_states=8, progress=False).table
    monkeypatch.setattr(sys.modules["perturbprob.inference.expectation"], "CHUNK", 400)
    parts = pb.decompose_batches(fit, n_draws=2, n_states=8, progress=False).table
    assert np.allclose(whole["share_draws"], parts["share_draws"], atol=2e-3)  # the table of the noise is laid over other rates


def test_an_additive_fit_has_no_interaction_of_batches(screen: pb.Screen) -> None:
    fit = pb.fit(pb.node(screen, 2), screen, epochs=2, progress=False)
    table = pb.decompose_batches(fit, n_draws=3, n_states=8, progress=False).table
    assert float(table["overall"].sel(source=["media:batch", "perturbation:batch"]).max()) < 1e-6
    eta = centre(fit.model, fit.guide)["batch_effect"]
    drawn = torch.stack([sites["batch_effect"] for sites in global_draws(fit.model, fit.guide, 3, 0)]).mean(0)
    assert eta.shape == drawn.shape
    assert np.allclose(table["loading"], drawn, atol=1e-5)


def test_aliased_factors_are_one_source(aliased: pb.Fit) -> None:
    parts = pb.decompose_batches(aliased, n_draws=2, n_states=4, progress=False)
    assert parts.batch_source == "time/batch"
    assert parts.table["source"].values.tolist() == [
        "state", "perturbation", "media", "time/batch", "media:time/batch", "perturbation:time/batch", "rest", "noise",
    ]  # fmt: skip
    assert parts.table["batch"].values.tolist() == ["batch1", "batch2"]
    assert "time and batch are aliased in this layout" in parts.report()
    with pytest.raises(ValueError, match="joins factors that are aliased in this layout"):
        pb.decompose_batches(aliased, interactions=["time:batch"])


def test_batches_nested_in_a_factor_are_one_source_with_it(screen: pb.Screen) -> None:
    media = np.array([p.media == "drug" for p in screen.conditions])[screen.condition]
    batch = screen.batch + 2 * media
    nested = replace(screen, batches=("a", "b", "c", "d"), batch=batch)
    fit = pb.fit(pb.node(nested, 2, assumptions=[pb.ExchangeableBatches()]), nested, epochs=1, progress=False)
    parts = pb.decompose_batches(fit, n_draws=2, n_states=4, progress=False)
    assert parts.batch_source == "media/batch"
    assert parts.table["batch"].values.tolist() == ["a", "b", "c", "d"]


def test_combinations_never_seen_are_counted(screen: pb.Screen) -> None:
    part = screen[(screen.condition != len(screen.conditions) - 1) | (screen.batch == 0)]
    fit = pb.fit(pb.node(part, 2), part, epochs=1, progress=False)
    assert "1 of 24 combinations were never observed" in pb.decompose_batches(fit, n_draws=2, n_states=4, progress=False).report()


def test_batch_genes_are_those_with_a_large_share(fit: pb.Fit) -> None:
    parts = pb.decompose_batches(fit, n_draws=6, n_states=8, threshold=0.02, progress=False)
    share = parts.table["share"].sel(source="batch")
    genes = parts.batch_genes(0.5)
    assert genes
    assert list(genes) == sorted(genes, key=lambda gene: -float(share.sel(gene=gene)))
    assert set(genes) == set(parts.table["gene"].values[parts.table["batch_gene_probability"].values >= 0.5])
    assert "Batch genes (share of batch above 2 %" in parts.summary()


def test_gene_space_is_taken_apart_too() -> None:
    rng = np.random.default_rng(0)
    obs = {"perturbation": ["control", "A"] * 8, "batch": ["x"] * 8 + ["y"] * 8}
    adata = AnnData(rng.normal(size=(16, 3)).astype(np.float32) + np.repeat([0.0, 2.0], 8)[:, None].astype(np.float32), obs=obs)
    adata.var_names = ["A", "B", "C"]
    screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", batch="batch", values="continuous")
    fit = pb.fit(pb.node(screen), screen, epochs=30, progress=False)
    shares = pb.decompose_batches(fit, n_draws=4, n_states=2, progress=False).table["overall"]
    assert float(shares.sel(source="state")) < 1e-6
    assert float(shares.sel(source="batch")) > float(shares.sel(source="perturbation"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interactions": ["batch:medium"]}, "'medium', which is not a factor. Did you mean 'media'"),
        ({"interactions": [("batch", "batch")]}, "joins two different factors"),
        ({"threshold": 1.0}, "threshold is a number between 0 and 1"),
        ({"level": 0.0}, "level is a number between 0 and 1"),
        ({"n_states": 0}, "n_states must be a whole number"),
        ({"n_draws": 0}, "n_draws must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused(fit: pb.Fit, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.decompose_batches(fit, **arguments)


def test_one_batch_cannot_be_taken_apart() -> None:
    screen = pb.simulate(n_cells=60, n_genes=6, n_perturbations=1, n_batches=1, seed=1).screen
    with pytest.warns(UserWarning, match="one batch"):
        fit = pb.fit(pb.node(screen, 1), screen, epochs=1, progress=False)
    with pytest.raises(ValueError, match="no batch effect to take apart"):
        pb.decompose_batches(fit)


def test_a_large_decomposition_says_how_much_memory(fit: pb.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["perturbprob.inference.draws"], "LARGE", 1.0)
    with pytest.warns(UserWarning, match="GB of shares and loadings"):
        pb.decompose_batches(fit, n_draws=1, n_states=2, progress=False)


def test_the_order_of_factors_in_an_interaction_does_not_matter(fit: pb.Fit) -> None:
    grid = ReferenceGrid.of(fit)
    assert grid.terms(["batch:media", ("media", "batch")]) == [("media", "batch")]
    assert grid.terms(["batch:media:time"]) == [("media", "time", "batch")]


@pytest.fixture(scope="module")
def true_variance(root: Path) -> Callable[[Simulation], np.ndarray]:
    """The variance of each source and gene, worked out from what was simulated by benchmarks/decomposition.py."""
    spec = importlib.util.spec_from_file_location("decomposition", root / "benchmarks/decomposition.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.true_variance


@pytest.mark.slow
def test_shares_are_near_those_of_the_simulation(true_variance: Callable[[Simulation], np.ndarray]) -> None:
    simulation = pb.simulate(n_cells=3000, n_genes=40, n_perturbations=4, n_batches=3, batch_scale=0.4, seed=6)
    screen = pb.Screen.from_anndata(
        simulation.adata, media="media", time="time", batch="batch", size_factor=simulation.truth["size_factor"].values
    )
    fit = pb.fit(pb.node(screen, 4), screen, epochs=50, minibatch=256, learning_rate=1e-2, progress=False)
    table = pb.decompose_batches(fit, n_draws=20, n_states=64, interactions=[], progress=False).table
    truth = true_variance(simulation).sum(1)
    assert np.allclose(table["overall"], truth / truth.sum(), atol=0.03)
    loading = simulation.truth["batch_effect"].values
    assert float(np.corrcoef(table["loading"].values.ravel(), loading.ravel())[0, 1]) > 0.95


@pytest.mark.slow
def test_spare_latent_dimensions_do_not_take_the_noise_of_single_genes(true_variance: Callable[[Simulation], np.ndarray]) -> None:
    """Three programmes, five latent dimensions, noisy genes. With the dispersion free from the start, state had 0.55 instead of 0.40."""
    simulation = pb.simulate(
        n_cells=1200, n_genes=20, n_perturbations=2, n_batches=2, times=(1.0,), heterogeneity=0.5, dispersion=2.0, seed=1
    )
    fit = pb.fit(pb.node(simulation.screen, 5), simulation.screen, epochs=40, minibatch=64, learning_rate=1e-2, progress=False)
    table = pb.decompose_batches(fit, n_draws=20, n_states=64, interactions=[], progress=False).table
    truth = true_variance(simulation).sum(1)
    assert float(table["overall"].sel(source="state")) == pytest.approx(truth[0] / truth.sum(), abs=0.03)
