"""The objective of eqs 5 and 23 on counts: sets of predicted cells against sets of measured ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.inference import objective
from perturbprob.inference.draws import sites_at
from perturbprob.inference.latent import latent
from perturbprob.inference.objective import PathLoss
from perturbprob.measurement import DISTANCES
from perturbprob.model import Guide
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import node_design

SHORT = {"objective": "paths", "learning_rate": 1e-2, "validation": 0.0, "progress": False}


@pytest.fixture(scope="module")
def counts() -> pb.Screen:
    """A screen of counts with effects, two batches, and depth that differs between cells."""
    return pb.simulate(n_cells=500, n_genes=12, n_perturbations=3, times=(2.0,), n_batches=2, seed=5).screen


@pytest.fixture(scope="module")
def fit(counts: pb.Screen) -> pb.Fit:
    """A fit by the energy distance."""
    return pb.fit(pb.node(counts, 3, assumptions=[pb.UneditedStable()]), counts, distance="energy", epochs=40, minibatch=125, **SHORT)


def pseudobulk(screen: pb.Screen) -> np.ndarray:
    """The measured mean of log1p of every condition."""
    return np.stack([np.log1p(screen.counts[screen.condition == k].toarray()).mean(0) for k in range(len(screen.conditions))])


def predicted(fit: pb.Fit, screen: pb.Screen) -> np.ndarray:
    """The same, predicted."""
    answer = pb.predict(fit, n_draws=1, scale="log1p", progress=False)
    return answer["mean"].sel(condition=[str(p) for p in screen.conditions]).values


@pytest.mark.slow
def test_sets_of_counts_teach_the_means_of_conditions(fit: pb.Fit, counts: pb.Screen) -> None:
    assert fit.losses["train"][-1] < 0.2 * fit.losses["train"][0]
    control = [p.perturbation for p in counts.conditions].index("control")
    found, expected = predicted(fit, counts), pseudobulk(counts)
    changes = [np.delete(values - values[control], control, 0) for values in (found, expected)]
    assert np.corrcoef(changes[0].ravel(), changes[1].ravel())[0, 1] > 0.95
    of_control = np.delete(expected[[control]] - expected, control, 0)
    assert ((found - expected) ** 2).mean() < 0.1 * (of_control**2).mean()


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["mse", *DISTANCES])
def test_every_distance_lowers_its_loss_on_counts(counts: pb.Screen, distance: str) -> None:
    fit = pb.fit(pb.node(counts, 2), counts, distance=distance, epochs=4, minibatch=170, **SHORT)
    assert fit.losses["train"][-1] < fit.losses["train"][0]
    assert f"{distance} {fit.losses['train'][-1]:.4g}" in repr(fit)


def test_mse_compares_the_means_of_log1p_of_each_condition(counts: pb.Screen) -> None:
    model = pb.node(counts, 2)
    loss = PathLoss(model, Guide(model, node_design(model, counts), encodes=False), "mse")
    cells = CellTable(model, counts).cells(torch.arange(200))
    torch.manual_seed(0)
    value = loss(cells)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    torch.manual_seed(0)
    sites = sites_at(model, loss.guide)
    law = model.measured(sites, model.moved(sites, model.at_rest(200).sample(), cells.protocol), cells)
    gaps = law.mean_log1p() - cells.counts.log1p()
    expected = torch.stack([gaps[cells.condition == k].mean(0).square().mean() for k in cells.condition.unique()]).mean()
    torch.testing.assert_close(value, expected)


def test_energy_of_few_cells_rewards_no_smaller_spread(counts: pb.Screen) -> None:
    model = pb.node(counts, 2)
    loss = PathLoss(model, Guide(model, node_design(model, counts), encodes=False), "energy")
    generator = torch.Generator().manual_seed(0)
    values = {
        scale: torch.stack(
            [loss.between(scale * torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)) for _ in range(400)]
        ).mean()
        for scale in (0.6, 1.0)
    }
    assert values[1.0] < values[0.6]
    assert loss.between(torch.zeros(1, 2), torch.ones(1, 2)) == pytest.approx(2 * 2**0.5)


def test_questions_of_conditions_are_answered(fit: pb.Fit, counts: pb.Screen, tmp_path: Path) -> None:
    assert np.isnan(pb.predict(fit, n_draws=2, batch="average", progress=False)["lower"]).all()
    with pytest.raises(ValueError, match="judges fold changes by their posterior, and objective='paths' has none"):
        pb.effects(fit, n_draws=2, progress=False)
    assert "replicated" in pb.predictive_check(fit, counts, n_draws=2, progress=False).gene
    assert "F on eq 5" in fit.report()
    fit.save(tmp_path / "fit")
    loaded = pb.load(tmp_path / "fit")
    np.testing.assert_array_equal(predicted(loaded, counts), predicted(fit, counts))
    with pytest.raises(ValueError, match="no q"):
        pb.log_density(loaded, counts, progress=False)


@pytest.mark.parametrize(
    "question",
    [
        lambda fit, screen: pb.log_density(fit, screen, 2, progress=False),
        lambda fit, screen: pb.counterfactual(fit, screen, screen.conditions[-1], progress=False),
        lambda fit, screen: latent(fit, screen),
        lambda fit, screen: fit.guide(CellTable(fit.model, screen).cells(torch.arange(5))),
    ],
)
def test_questions_of_given_cells_are_refused(fit: pb.Fit, counts: pb.Screen, question: Callable[[pb.Fit, pb.Screen], object]) -> None:
    with pytest.raises(ValueError, match=r"no q\(z0 \| x\).*compares sets of cells: ask predict or predictive_check, or fit with"):
        question(fit, counts)


def test_a_loss_that_is_not_finite_is_blamed_without_an_encoder(counts: pb.Screen) -> None:
    model = pb.node(counts, 2)
    with torch.no_grad():
        model.log_depth.fill_(float("nan"))
    with pytest.raises(pb.NonFiniteLoss, match="not finite at step 0"):
        pb.fit(model, counts, epochs=1, distance="mse", **SHORT)


def test_a_learnt_noise_has_no_place_in_a_distance(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match=r"SteadyState\(scale='learnt'\) learns a noise.*take scale='fixed'"):
        pb.fit(pb.node(screen, 2, assumptions=[pb.SteadyState(scale="learnt")]), screen, objective="paths", epochs=1)
    stable = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, objective="paths", epochs=1, progress=False)
    assert stable.settings["objective"] == "paths"


@pytest.fixture(scope="module")
def course() -> pb.Screen:
    """Counts at two times in two media."""
    return pb.simulate(n_cells=400, n_genes=10, n_perturbations=2, media=("rest", "drug"), times=(1.0, 2.0), seed=6).screen


ASSUMED = [
    pb.SteadyState(wait=1.0),
    pb.SteadyState(wait=1.0, reading="control_input", relative_to_control=True),
    pb.SilentInBaseline(),
]


@pytest.mark.parametrize("assumption", ASSUMED)
def test_an_assumption_adds_the_mean_square_of_the_change_it_denies(
    course: pb.Screen, assumption: pb.SteadyState | pb.SilentInBaseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the scale compared: E[log(1 + count)] at size factor 1, here from draws of counts."""
    model = pb.node(course, 2, assumptions=[assumption])
    loss = PathLoss(model, Guide(model, node_design(model, course), encodes=False), "mse")
    bound = model.assumptions[0]
    with torch.no_grad():
        sites = sites_at(model, loss.guide)
        sites["condition_effect"] = torch.randn(sites["condition_effect"].shape)
        monkeypatch.setattr(objective, "sites_at", lambda *_: sites)

        def drawn(log_share: torch.Tensor) -> torch.Tensor:
            return torch.log1p(model.law(sites, model.log_depth + log_share).sample(torch.Size((4000,)))).mean(0)

        change, weight = bound.assumption.change(model, sites, bound.protocols, drawn), np.array(bound.weight)
        expected = (weight * change.square().mean(-1).numpy()).sum() / weight.sum()
        cells = CellTable(model, course).cells(torch.arange(50))
        torch.manual_seed(0)
        whole = loss(cells)
        torch.manual_seed(0)
        assert float(whole - loss.of_cells(sites, cells)) == pytest.approx(expected, rel=0.1)
        assert expected > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("assumption", [ASSUMED[0], pb.Lipschitz(bound=0.5, weight=5.0)])
def test_paths_fitted_under_an_assumption_obey_it_more(course: pb.Screen, assumption: pb.SteadyState | pb.Lipschitz) -> None:
    def denied(*assumptions: pb.SteadyState | pb.Lipschitz) -> float:
        fit = pb.fit(pb.node(course, 2, assumptions=assumptions), course, epochs=12, minibatch=200, **SHORT)
        bound = assumption.bind(course)
        with torch.no_grad():
            return float(bound.loss(fit.model, sites_at(fit.model, fit.guide), lambda share: share))

    assert denied(assumption) < 0.7 * denied()


@pytest.mark.parametrize("question", [pb.effects, pb.decompose_batches, lambda fit: pb.plan_batches(fit, {"now": fit.screen})])
def test_what_speaks_of_a_posterior_needs_one(fit: pb.Fit, question: Callable[[pb.Fit], object]) -> None:
    with pytest.raises(ValueError, match="by their posterior, and objective='paths' has none"):
        question(fit)
