"""Fits of several assays: real ones, and a latent state that a second assay shows better."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from jaxtyping import Bool, Float

import perturbprob as pb
from perturbprob.inference.latent import latent

without_pulling = partial(mudata.set_options, pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext
"""Columns of the parts stay with them; from mudata 0.4 they do by themselves."""

N_CELLS = 400


def counted(z: Float[np.ndarray, "cell latent"], rng: np.random.Generator) -> AnnData:
    """RNA, proteins with a background, and open windows of cells in states z, by rates that are log-linear in z."""

    def rate(level: float, spread: float, n: int) -> Float[np.ndarray, "cell feature"]:
        return np.exp(level + z @ (spread * rng.normal(size=(z.shape[1], n))))

    share = rate(0.0, 0.4, 20)
    adata = AnnData(rng.poisson(1 + 50 * share / share.sum(1, keepdims=True)).astype(np.float32))
    adata.var_names = [f"G{k}" for k in range(20)]
    signal = rate(1.5, 0.8, 15)
    adata.obsm["surface"] = rng.poisson((2 + signal) * rng.gamma(5, 1 / 5, signal.shape))
    adata.obsm["windows"] = rng.binomial(1, -np.expm1(-rate(-1.0, 0.6, 40)))
    return adata


@pytest.fixture(scope="module")
def truth() -> Float[np.ndarray, "cell latent"]:
    """States at the end: at rest Normal(0, I), and moved by two perturbations."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(N_CELLS, 2)) + np.array([[0, 0], [1.5, 0], [0, -1.5]])[np.arange(N_CELLS) % 3]


@pytest.fixture(scope="module")
def adata(truth: Float[np.ndarray, "cell latent"]) -> AnnData:
    """The cells as they are measured."""
    adata = counted(truth, np.random.default_rng(1))
    words = np.array(["control", "G1", "G2"])[np.arange(N_CELLS) % 3]
    adata.obs = pd.DataFrame({"perturbation": words, "perturbation_type": "knockout"}, index=[f"c{k}" for k in range(N_CELLS)])
    return adata


@pytest.fixture(scope="module")
def has() -> dict[str, Bool[np.ndarray, " cell"]]:
    """Which half of the cells has which assay."""
    rng = np.random.default_rng(2)
    return {"protein": rng.random(N_CELLS) < 0.5, "atac": rng.random(N_CELLS) < 0.5}


@pytest.fixture(scope="module")
def screen(adata: AnnData, has: dict[str, Bool[np.ndarray, " cell"]]) -> pb.Screen:
    """RNA of every cell, proteins and windows of half of them each."""
    ones = np.ones(N_CELLS)
    assays = {
        "protein": pb.Assay.from_anndata(adata, kind="protein", obsm="surface", present=has["protein"], size_factor=ones),
        "atac": pb.Assay.from_anndata(adata, kind="chromatin", obsm="windows", present=has["atac"], size_factor=ones, binary=True),
    }
    return pb.Screen.from_anndata(adata).with_assays(assays)


def fitted(screen: pb.Screen, epochs: int = 40) -> pb.Fit:
    """A fit of one batch."""
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(screen, 2, n_hidden=32, assumptions=[pb.UneditedStable()])
    return pb.fit(model, screen, epochs=epochs, minibatch=64, progress=False, learning_rate=0.01)


@pytest.fixture(scope="module")
def fit(screen: pb.Screen) -> pb.Fit:
    """A fit of all three assays."""
    return fitted(screen)


def explained(truth: Float[np.ndarray, "cell latent"], found: Float[np.ndarray, "cell latent"], cells: Bool[np.ndarray, " cell"]) -> float:
    """R² of the true states of some cells, by linear regression on the states found, over all cells."""
    design = np.column_stack([np.ones(len(found)), found])
    rest = truth - design @ np.linalg.lstsq(design, truth, rcond=None)[0]
    return float(1 - rest[cells].var() / truth[cells].var())


# Recovery.


@pytest.mark.slow
def test_a_second_assay_shows_the_latent_state_better(
    truth: Float[np.ndarray, "cell latent"], screen: pb.Screen, fit: pb.Fit, has: dict[str, Bool[np.ndarray, " cell"]]
) -> None:
    bare = screen.with_assays({})
    alone, together = latent(fitted(bare), bare)["state"], latent(fit, screen)["state"]
    masked = latent(fit, bare)["state"]
    for cells in has.values():
        assert explained(truth, together, cells) > explained(truth, alone, cells) + 0.03
        assert explained(truth, together, cells) > explained(truth, masked, cells) + 0.03  # the same fit, shown the RNA alone
    neither = ~(has["protein"] | has["atac"])
    assert explained(truth, together, neither) > explained(truth, alone, neither) - 0.05


@pytest.mark.slow
def test_a_cell_without_rna_is_seen_through_its_other_assays(
    truth: Float[np.ndarray, "cell latent"], adata: AnnData, fit: pb.Fit, has: dict[str, Bool[np.ndarray, " cell"]]
) -> None:
    def part(key: str, cells: Bool[np.ndarray, " cell"]) -> AnnData:
        names = pd.DataFrame(index=[f"{key}{k + 1}" for k in range(adata.obsm[key].shape[1])])
        return AnnData(adata.obsm[key][cells].astype(np.float32), obs=adata.obs[cells].assign(one=1.0), var=names)

    lacking = has["protein"] & has["atac"]
    with without_pulling():
        parts = {"rna": adata[~lacking].copy(), "adt": part("surface", lacking), "atac": part("windows", lacking)}
        del parts["rna"].obsm
        whole = mudata.MuData(parts)
    screen = pb.Screen.from_mudata(whole, protein="adt", atac="atac", binary=True, missing="mask")
    assert screen.present is not None
    assert (~screen.present).sum() == lacking.sum()
    again = fitted(screen)
    order = [adata.obs_names.get_loc(cell) for cell in screen.cells]
    found, cells = latent(again, screen)["state"], ~screen.present
    design = np.column_stack([np.ones(cells.sum()), found[cells]])
    goal = truth[order][cells]
    rest = goal - design @ np.linalg.lstsq(design, goal, rcond=None)[0]
    assert 1 - rest.var() / goal.var() > 0.5
    assert np.isfinite(pb.log_density(again, screen, 3, n_draws=2, progress=False)).all()


def test_features_that_a_perturbation_moves_by_themselves_are_found() -> None:
    """A knock-out moves five proteins and no RNA at all: the latent state and the RNA of genes cannot carry that."""
    rng, n, moved = np.random.default_rng(0), 400, np.where(np.arange(12) < 5, [0.8, -0.8] * 6, 0.0)
    knocked, rna = np.arange(n) % 2, rng.poisson(5, (n, 6)).astype(np.float32)
    adata = AnnData(rna, obs=pd.DataFrame({"perturbation": np.array(["control", "A"])[knocked]}, index=[f"c{k}" for k in range(n)]))
    adata.var_names = ["A", *(f"g{k}" for k in range(5))]
    level = np.linspace(3, 30, 12)
    adata.obsm["surface"] = rng.poisson(level * np.exp(np.outer(knocked, moved)))
    protein = pb.Assay.from_anndata(adata, kind="protein", obsm="surface", size_factor=np.ones(n))
    screen = pb.Screen.from_anndata(adata, perturbation_type="knockout").with_assays({"protein": protein})
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(screen, 1, n_hidden=8, assumptions=[pb.UneditedStable()])
    fit = pb.fit(model, screen, epochs=300, learning_rate=0.03, minibatch=400, validation=0.0, progress=False)
    predicted = np.log(pb.predict_assay(fit, assay="protein", n_draws=20)["mean"].values)
    assert np.corrcoef(predicted[1] - predicted[0], moved)[0, 1] > 0.99
    assert np.polyfit(moved, predicted[1] - predicted[0], 1)[0] > 0.9
    for k in (0, 1):  # levels too, of control and of the knock-out
        np.testing.assert_allclose(predicted[k], np.log(level) + k * moved, atol=0.25)


# Everything a fit can do.


def test_a_fit_of_three_assays_is_saved_and_asked(fit: pb.Fit, screen: pb.Screen, tmp_path: Path) -> None:
    fit.save(tmp_path)
    again = pb.load(tmp_path)
    assert pb.log_density(fit, screen[:40], 3, n_draws=2).identical(pb.log_density(again, screen[:40], 3, n_draws=2))
    for name in screen.assays:
        assert pb.predict_assay(fit, assay=name, n_draws=3).identical(pb.predict_assay(again, assay=name, n_draws=3))
    assert pb.predict(fit, n_draws=3).sizes == {"condition": 3, "gene": 20}
    draws = pb.posterior(fit, 3).posterior
    assert draws["protein_background"].dims == ("chain", "draw", "protein_feature")
    assert list(draws["atac_feature"].values) == list(screen.assays["atac"].features)
    assert draws["atac_condition_effect"].dims == ("chain", "draw", "node", "atac_feature")
    assert set(draws["protein_batch_effect"].dims) == {"chain", "draw", "batch", "protein_feature"}


def test_predicted_differences_go_the_way_of_the_cells(fit: pb.Fit, screen: pb.Screen) -> None:
    for name, assay in screen.assays.items():
        predicted = pb.predict_assay(fit, assay=name, n_draws=20)
        assert (predicted["lower"] <= predicted["mean"]).all()
        seen = [assay.counts[assay.present & (screen.condition == k)].toarray().mean(0) + 0.05 for k in (1, 2)]
        mean = [predicted["mean"].sel(condition=str(screen.conditions[k])).values for k in (1, 2)]
        assert np.corrcoef(np.log(seen[0] / seen[1]), np.log(mean[0] / mean[1]))[0, 1] > 0.8


def test_misuse(fit: pb.Fit, screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match=r"The fit has no assay 'proteins'\. .*'protein'"):
        pb.predict_assay(fit, assay="proteins")
    with pytest.raises(ValueError, match="Batch 'lane9' is none whose protein was fitted"):
        pb.predict_assay(fit, assay="protein", batch="lane9")
    with pytest.raises(
        ValueError, match=r"adapt estimates η of the RNA alone; what batch 'batch9' does to the assay 'protein' would stay 0"
    ):
        pb.adapt(fit, screen, "batch9")
    with pytest.raises(ValueError, match=r"𝓕 is from RNA to RNA, .* fit the RNA alone, node\(screen.with_assays"):
        pb.projected(fit, screen.conditions[-1])
    with pytest.raises(ValueError, match=r"joins RNA, and 'here' has other assays: leave them out with screen.with_assays"):
        pb.Screen.concat({"here": screen, "there": screen})
    with pytest.raises(ValueError, match="compares RNA only, and the model has the assay 'protein' too"):
        pb.fit(fit.model, screen, objective="paths", epochs=1)


# The study data: screens of one condition.


def test_proteins_beside_rna_of_real_cells(data_path: Callable[[str], Path]) -> None:
    whole = anndata.read_h5ad(data_path("citefuse_citeseq_pbmc.h5ad"))
    names = list(whole.uns["protein_names"])
    depth = np.asarray(whole.X.sum(0)).ravel()
    adata = whole[:, (depth >= np.sort(depth)[-200]) | whole.var_names.isin(names)].copy()
    protein = pb.Assay.from_anndata(adata, kind="protein", obsm="protein", features=names)
    screen = pb.Screen.from_anndata(adata, perturbation_type=None).with_assays({"protein": protein})
    _finite(screen)


def test_chromatin_windows_beside_gene_activity_of_real_cells(data_path: Callable[[str], Path]) -> None:
    adata = anndata.read_h5ad(data_path("signac_atac_small.h5ad"))
    for binary in (False, True):
        windows = pb.Assay.from_anndata(adata, kind="chromatin", obsm="atac_peaks", features=adata.uns["peak_names"], binary=binary)
        _finite(pb.Screen.from_anndata(adata, perturbation_type=None).with_assays({"atac": windows}))


def _finite(screen: pb.Screen) -> None:
    """Fit a screen of one condition for a few epochs; everything is finite and the loss falls below where it starts."""
    with pytest.warns(UserWarning, match="one batch"):
        model = pb.node(screen, 3, n_hidden=16, assumptions=[pb.UneditedStable()])
    with pytest.warns(UserWarning, match="one condition"):
        fit = pb.fit(model, screen, epochs=6, progress=False)
    assert np.isfinite(fit.losses["train"]).all()
    assert min(fit.losses["validation"][1:]) < fit.losses["validation"][0]
    assert np.isfinite(pb.log_density(fit, screen[:50], 3, n_draws=2)).all()
    predicted = pb.predict_assay(fit, assay=next(iter(screen.assays)), n_draws=4)
    assert np.isfinite(predicted["mean"]).all()
    assert (predicted["mean"] > 0).all()
