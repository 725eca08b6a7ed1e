"""The structure `stationary`: whether it finds the diffusion that cells are at rest under, and what it refuses to answer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from sklearn.metrics import average_precision_score

import perturbprob as pb
from perturbprob.inference.at_rest import AtRestLoss
from perturbprob.inference.draws import centre
from perturbprob.inference.latent import latent
from perturbprob.model import Guide
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import node_design

N_GENES, N_CELLS = 7, 250
LEVEL, SPREAD = 5.0, 0.3


def network(rng: np.random.Generator) -> np.ndarray:
    """Signed weights (gene, regulator), about one regulator for each gene."""
    there = rng.random((N_GENES, N_GENES)) < 0.2
    return np.where(there, rng.choice([-1.0, 1.0], there.shape) * rng.uniform(0.8, 1.6, there.shape), 0.0) * (1 - np.eye(N_GENES))


def at_rest(weights: np.ndarray, lost: list[int], rng: np.random.Generator) -> np.ndarray:
    """States of cells at rest, by small Euler-Maruyama steps in numpy."""
    x, kept, step = np.zeros((N_CELLS, N_GENES)), np.ones(N_GENES), 0.02
    kept[lost] = 0.0
    for _ in range(500):
        product = kept * 2 / (1 + np.exp(-x)) - 1
        x = x + step * (product @ weights.T - x) + np.sqrt(2 * step) * rng.standard_normal(x.shape)
    return x


def read(states: dict[str, np.ndarray], batch_effect: float = 0.0) -> pb.Screen:
    """Counts high enough that rounding does not matter, in two batches of which the second shows some genes more."""
    values, label = np.concatenate(list(states.values())), np.repeat(list(states), N_CELLS)
    batch = np.arange(len(values)) % 2
    rate = np.expm1((LEVEL + SPREAD * values).clip(0)) * np.exp(batch_effect * batch[:, None] * np.linspace(-1, 1, N_GENES))
    genes = [f"G{k}" for k in range(N_GENES)]
    obs = pd.DataFrame({"perturbation": label, "size": 1.0, "batch": batch.astype(str)}, index=[f"c{k}" for k in range(len(values))])
    adata = AnnData(np.round(rate).astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
    return pb.Screen.from_anndata(adata, perturbation_type="knockout", size_factor="size", batch="batch")


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """The network behind the screen."""
    return network(np.random.default_rng(2))


@pytest.fixture(scope="module")
def double(truth: np.ndarray) -> np.ndarray:
    """Cells with two genes knocked out, which no fit sees."""
    return at_rest(truth, [0, 3], np.random.default_rng(9))


@pytest.fixture(scope="module")
def screen(truth: np.ndarray) -> pb.Screen:
    """Control and every single knock-out at rest, in two batches."""
    rng = np.random.default_rng(3)
    return read({"control": at_rest(truth, [], rng)} | {f"G{k}": at_rest(truth, [k], rng) for k in range(N_GENES)}, batch_effect=0.4)


@pytest.fixture(scope="module")
def fit(screen: pb.Screen) -> pb.Fit:
    """A fit of it."""
    return pb.fit(pb.stationary(screen), screen, epochs=60, minibatch=500, learning_rate=2e-2, validation=0.0, progress=False)


def test_signed_weights_are_recovered(fit: pb.Fit, truth: np.ndarray) -> None:
    edges = pb.edges(fit)
    found, edge = edges["weight"].values, ~np.eye(N_GENES, dtype=bool)
    there = (truth != 0)[edge]
    assert average_precision_score(there, np.abs(found[edge])) > 3 * there.mean()
    assert np.corrcoef(found[edge], truth[edge])[0, 1] > 0.9
    assert np.isnan(np.diagonal(found)).all()
    for name in ("lower", "upper", "probability", "positive"):
        assert np.isnan(edges[name]).all()


def test_a_combination_never_seen_is_predicted_at_rest(fit: pb.Fit, double: np.ndarray) -> None:
    both = pb.Knockout("G0") >> pb.Knockout("G3") >> pb.Wait(1)
    found = pb.predict(fit, [both, pb.Protocol() >> pb.Wait(1)], n_draws=1, batch="0", scale="log1p", progress=False)
    assert np.isnan(found["lower"]).all()
    observed = np.log1p(np.round(np.expm1(LEVEL + SPREAD * double))).mean(0)
    change = observed - LEVEL
    error = (found["mean"][0] - found["mean"][1]).values - change
    assert np.square(error).sum() < 0.1 * np.square(change).sum()
    counts = pb.predict(fit, both, n_draws=1, batch="0", scale="counts", progress=False)["mean"].values[0]
    np.testing.assert_allclose(counts, np.expm1(LEVEL + SPREAD * double).mean(0), rtol=0.12)
    later = pb.predict(fit, pb.Knockout("G0") >> pb.Knockout("G3") >> pb.Wait(20), n_draws=1, batch="0", scale="counts", progress=False)
    np.testing.assert_array_equal(counts, later["mean"].values[0])


def test_batch_effects_are_taken_out_and_put_back(fit: pb.Fit) -> None:
    eta = centre(fit.model, fit.guide)["batch_effect"]
    torch.testing.assert_close(eta[1] - eta[0], torch.linspace(-0.4, 0.4, N_GENES) - (eta[0] - eta[1]).mean() * -1, atol=0.1, rtol=0)


def test_replicated_screens_are_like_the_data(fit: pb.Fit, screen: pb.Screen) -> None:
    gene = pb.predictive_check(fit, screen, n_draws=3, progress=False).gene
    for statistic in ("mean", "variance"):
        part = gene.sel(statistic=statistic)
        np.testing.assert_allclose(part["replicated"], part["observed"], rtol=0.05 if statistic == "mean" else 0.35)


def test_its_gradients_are_finite_and_its_loss_falls(fit: pb.Fit, screen: pb.Screen) -> None:
    model = pb.stationary(screen)
    guide = Guide(model, node_design(model, screen), encodes=False)
    guide.start(model, screen)
    table, cells = CellTable(model, screen), torch.arange(screen.n_cells)
    loss = AtRestLoss(model, guide, table, cells)
    loss(table.cells(cells)).backward()
    learnt = ("noise_unconstrained", "drift", "edge_weight_loc", "perturbation_own_loc", "perturbation_scale_loc")
    for name, parameter in loss.named_parameters():
        if name.split(".")[-1] in learnt:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
    assert fit.losses["train"][-1] < 0.3 * fit.losses["train"][0]
    with torch.no_grad():
        before, after = (used.between_cells(table.cells(cells)) for used in (loss, AtRestLoss(fit.model, fit.guide, table, cells)))
    assert after < 0.1 * before


def test_it_comes_back_from_disk_bit_for_bit(fit: pb.Fit, screen: pb.Screen, tmp_path: Path) -> None:
    fit.save(tmp_path)
    one, other = (pb.predict(f, screen.conditions[-1], n_draws=1, batch="1", progress=False)["mean"] for f in (fit, pb.load(tmp_path)))
    np.testing.assert_array_equal(one, other)
    assert "deviation from stationarity" in fit.report()
    assert "deviation from stationarity" in repr(fit)


def test_a_report_and_figures_are_drawn_without_a_posterior(fit: pb.Fit, tmp_path: Path) -> None:
    fit.report(tmp_path / "report.html")
    assert "without a posterior" in (tmp_path / "report.html").read_text(encoding="utf-8")
    edges = pb.edges(fit)
    with pytest.raises(ValueError, match="These edges have weights and no probabilities"):
        pb.plots.network(edges)
    assert pb.plots.network(edges.assign(probability=1.0 * (abs(edges.weight) > 0.2))).axes


@pytest.mark.parametrize(
    "question",
    [
        lambda fit, screen: pb.log_density(fit, screen, 2, progress=False),
        lambda fit, _: pb.posterior(fit, 2),
        lambda fit, _: pb.effects(fit, n_draws=2, progress=False),
        lambda fit, _: pb.decompose_batches(fit, n_draws=2, progress=False),
        latent,
        lambda fit, screen: pb.counterfactual(fit, screen, screen.conditions[-1], progress=False),
        lambda fit, screen: pb.batch_error(fit, screen, progress=False),
        lambda fit, screen: pb.projected(fit, screen.conditions[-1], batch_from="0", batch_to="1"),
        lambda fit, screen: fit.model.measurement(torch.zeros(1, N_GENES)).log_prob(torch.zeros(1, N_GENES)),
    ],
)
def test_what_needs_a_likelihood_is_refused(fit: pb.Fit, screen: pb.Screen, question: Callable[[pb.Fit, pb.Screen], object]) -> None:
    with pytest.raises(ValueError, match=r"stationary diffusion has no likelihood.*predict, predictive_check or\s+edges"):
        question(fit, screen)


def test_the_score_sheet_is_filled_as_far_as_it_applies(screen: pb.Screen) -> None:
    train, test = pb.split.hold_out_cells(screen, 0.3)
    fits = {
        "rest": pb.fit(pb.stationary(train), train, epochs=2, progress=False),
        "node": pb.fit(pb.node(train, 2, assumptions=[pb.UneditedStable()]), train, epochs=1, progress=False),
    }
    with pytest.warns(UserWarning, match="'rest' has no likelihood, being fitted by objective='kds'"):
        table = pb.compare(fits, test, particles=3, n_draws=20, progress=False)
    assert table.index.tolist() == ["node", "rest"]
    without = ["log_density", "difference", "standard_error", "conditions_better"]
    assert table.loc["rest", without].isna().all()
    assert table.loc["rest"].drop(without).notna().all()
    assert table.loc["node"].notna().all()


def test_objectives_and_structures_go_together(screen: pb.Screen) -> None:
    for model, objective in ((pb.stationary(screen), "elbo"), (pb.stationary(screen), "paths"), (pb.node(screen, 2), "kds")):
        with pytest.raises(ValueError, match="objective='kds' and the structure stationary go together"):
            pb.fit(model, screen, objective=objective, epochs=1)
    with pytest.raises(ValueError, match="distance='mmd' goes with objective='paths'"):
        pb.fit(pb.stationary(screen), screen, distance="mmd", epochs=1)
    with pytest.raises(ValueError, match="a minibatch of 15 holds hardly two of each of the 8 conditions"):
        pb.fit(pb.stationary(screen), screen, minibatch=15, epochs=1)


def test_interference_activation_and_media_act_as_in_a_causal_context() -> None:
    screen = pb.simulate(n_cells=200, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(3.0,), seed=1).screen
    first, second = screen.perturbations
    swap = {first: pb.Interference(first), second: pb.Activation(second)}
    protocols = tuple(pb.Protocol([swap.get(getattr(a, "gene", None), a) for a in p]) for p in screen.conditions)
    screen = replace(screen, conditions=protocols)
    fit = pb.fit(pb.stationary(screen), screen, epochs=3, progress=False)
    done = fit.model.pushes(centre(fit.model, fit.guide))
    symbols = [p.symbol for p in fit.model.vocabulary.perturbations]
    assert [int(n) for n in (done.lost > 0).sum(1)] == [int(s == "↓") for s in symbols]
    assert [int(n) for n in (done.gained > 0).sum(1)] == [int(s == "↑") for s in symbols]
    assert np.isfinite(pb.predict(fit, n_draws=1, batch="average", progress=False)["mean"]).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("edge_scale", ["0.1", True, float("nan"), float("inf")])
def test_an_edge_scale_is_a_number_above_0(screen: pb.Screen, edge_scale: object) -> None:
    with pytest.raises(ValueError, match=f"edge_scale is how large weights are and must be .*; got {edge_scale!r}"):
        pb.stationary(screen, edge_scale=edge_scale)


def test_what_is_no_screen_at_rest_is_refused(screen: pb.Screen) -> None:
    times = pb.simulate(n_cells=100, n_genes=8, n_perturbations=2, times=(1.0, 2.0), seed=1).screen
    one = pb.stationary(times[np.array([p.time == 1 for p in times.conditions])[times.condition]])
    for refused in (lambda: pb.stationary(times), lambda: pb.fit(one, times, epochs=1)):
        with pytest.raises(ValueError, match="takes all cells to be at rest, and this screen has the times 1, 2"):
            refused()
    at_start = replace(screen, conditions=tuple(pb.Protocol([a for a in p if not isinstance(a, pb.Wait)]) for p in screen.conditions))
    with pytest.raises(ValueError, match="has the times 0"):
        pb.stationary(at_start)
    with pytest.raises(ValueError, match="counts from the mean of control cells, and this screen has none"):
        pb.stationary(screen[screen.condition > 0])
    with pytest.raises(ValueError, match=r"stationary is in gene space, where 20,000 genes .* at most 400"):
        pb.stationary(replace(screen, genes=tuple(f"g{k}" for k in range(20_000))))
    outside = replace(screen, genes=("other", *screen.genes[1:]))
    with pytest.raises(ValueError, match="1 perturbed genes are not among the 7 genes of the screen: G0"):
        pb.stationary(outside)
    with pytest.raises(ValueError, match="counts of RNA in single cells"):
        pb.stationary(screen.pseudobulk())
    with pytest.raises(ValueError, match="edge_scale is how large weights are"):
        pb.stationary(screen, edge_scale=0.0)
