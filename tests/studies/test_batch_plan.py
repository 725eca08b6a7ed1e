"""Plans: the covariance is that of a normal model, and layouts are ranked as the paper's conclusions say."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import perturbprob as pb
from perturbprob.inference.draws import centre, global_draws, seeded
from perturbprob.studies.batch_plan import PROPOSED, _FittedTable
from perturbprob.studies.layout_error import covariance

SHORT = {"n_draws": 6, "progress": False}


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Three batches with large effects, two media."""
    how = {"media": ("rest", "drug"), "times": (1.0,), "n_batches": 3, "batch_scale": 0.5}
    return pb.simulate(n_cells=500, n_genes=10, n_perturbations=3, seed=4, **how).screen


@pytest.fixture(scope="module")
def fit(screen: pb.Screen) -> pb.Fit:
    """A short fit."""
    return pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, epochs=10, warmup=2, progress=False)


def test_the_covariance_is_that_of_the_normal_model() -> None:
    """Against the joint posterior of condition means and batch effects, by brute force in float64."""
    rng = np.random.default_rng(0)
    cells, noise = torch.as_tensor(rng.integers(0, 30, (4, 3)) * 1.0), torch.as_tensor(rng.uniform(0.5, 2, (4, 1)))
    found = covariance(cells, noise, torch.tensor([0.3]).double(), torch.tensor([0.7]).double())[0]
    weight = (cells / noise).numpy()
    joint = np.zeros((7, 7))
    joint[:4, :4] = np.diag(weight.sum(1)) + (np.eye(4) - 1 / 4) / 0.7
    joint[:4, 4:], joint[4:, :4] = weight, weight.T
    joint[4:, 4:] = np.diag(weight.sum(0) + 1 / 0.3)
    np.testing.assert_allclose(found, np.linalg.inv(joint)[:4, :4], rtol=1e-6)


def test_estimates_are_as_wrong_as_the_covariance_says() -> None:
    """Draw batches and cells, estimate by the posterior mean, and compare the errors of differences from control."""
    torch.manual_seed(0)
    cells, noise, spread, effect = torch.tensor([[30.0, 0], [0, 30], [10, 10]]).double(), 1.0, 0.4, 1.0
    law = covariance(cells, torch.full((3, 1), noise).double(), torch.tensor([spread]).double(), torch.tensor([effect]).double())[0]
    n, errors = 20_000, []
    f = torch.randn(n, 3).double() * effect**0.5
    eta = torch.randn(n, 2).double() * spread**0.5
    seen = cells > 0
    mean = f[:, :, None] + eta[:, None] + torch.randn(n, 3, 2).double() * torch.where(seen, (noise / cells.clamp(min=1)).sqrt(), 0)
    weight = cells / noise
    batch = weight.sum(0) + 1 / spread
    right = (weight * mean).sum(2) - ((weight * mean).sum(1) / batch) @ weight.T
    errors = right @ law.T - f
    difference = errors[:, 1:] - errors[:, :1]
    expected = law[1:, 1:].diagonal() + law[0, 0] - 2 * law[0, 1:]
    np.testing.assert_allclose(difference.square().mean(0), expected, rtol=0.05)


@pytest.mark.parametrize("of", ["change", "map"])
def test_controls_in_every_batch_are_better_than_in_one_and_hashed_media_than_split(fit: pb.Fit, screen: pb.Screen, of: str) -> None:
    layouts = pb.propose_layouts(screen, 4, 1600)
    assert {name: int(table.to_numpy().sum()) for name, table in layouts.items()} == dict.fromkeys(layouts, 1600)
    plan = pb.plan_batches(fit, layouts, of=of, n_draws=10, n_points=4, progress=False)
    mean = plan.error.mean("draw")
    assert float(mean.sel(layout="controls in every batch")) < float(mean.sel(layout="controls in one batch"))
    assert float(mean.sel(layout="media hashed into every batch")) < float(mean.sel(layout="media split over batches"))
    assert plan.best == "media hashed into every batch"
    assert plan.report().endswith("Advice: media hashed into every batch.")


def test_moves_lower_the_error_and_keep_the_cells(fit: pb.Fit, screen: pb.Screen) -> None:
    start = pb.propose_layouts(screen, 4, 1600)["controls in one batch"]
    better = pb.improve_layout(fit, start, n_moves=8)
    assert (better.sum(axis=1) == start.sum(axis=1)).all()
    mean = pb.plan_batches(fit, {"start": start, "better": better}, **SHORT).error.mean("draw")
    assert float(mean.sel(layout="better")) < float(mean.sel(layout="start"))


def test_a_prior_with_the_numbers_of_a_fit_ranks_layouts_as_the_fit_does(fit: pb.Fit, screen: pb.Screen) -> None:
    layouts = pb.propose_layouts(screen, 4, 1600)
    noise, spread, effect = _FittedTable(fit, layouts[PROPOSED[0]]).law(centre(fit.model, fit.guide))
    rest = float(noise.median()) - 1 / 5.0  # that of the counts, as a Poisson's
    prior = pb.BatchPrior(
        batch_scale=float(spread.median()) ** 0.5, effect_scale=float(effect.median()) ** 0.5, mean_count=1 / rest, heterogeneity=0.0
    )
    fitted, expected = (pb.plan_batches(source, layouts, **SHORT).error.mean("draw") for source in (fit, prior))
    assert list(np.argsort(fitted)) == list(np.argsort(expected))
    assert bool((np.abs(np.log(expected / fitted)) < np.log(3)).all())
    sure = pb.plan_batches(replace(prior, uncertainty=0.0), layouts, **SHORT).error
    assert float(sure.std("draw").max()) < 1e-12
    law = covariance(torch.as_tensor(layouts[PROPOSED[1]].to_numpy() * 1.0), *prior.law(8))[0]
    origin = [0] * 8
    by_hand = (law.diagonal() + law[origin, origin] - 2 * law[range(8), origin]).mean()
    np.testing.assert_allclose(sure.sel(layout=PROPOSED[1])[0], by_hand)


def test_a_prior_alone_proposes_better_layouts(screen: pb.Screen) -> None:
    layouts = pb.propose_layouts(screen, 4, 1600)
    layouts["moved"] = pb.improve_layout(pb.BatchPrior(), layouts["controls in one batch"], n_moves=6)
    plan = pb.plan_batches(pb.BatchPrior(), layouts)
    low, high = (float(plan.error.sel(layout="moved").quantile(q)) for q in (0.05, 0.95))
    assert 0 < low < 0.5 * high  # an interval, and no number out of nowhere
    mean = plan.error.mean("draw")
    assert float(mean.sel(layout="moved")) < float(mean.sel(layout="controls in one batch"))
    larger = pb.plan_batches(pb.BatchPrior(batch_scale=0.4), layouts).error.mean("draw")
    assert bool((larger >= mean * (1 - 1e-9)).all())  # equal where every condition is spread alike


@pytest.mark.usefixtures("unchecked")
def test_what_a_prior_cannot_say_is_refused(screen: pb.Screen) -> None:
    layouts = pb.propose_layouts(screen, 2, 800)
    with pytest.raises(ValueError, match=r"BatchPrior\(batch_scale='a'\): use a finite number above 0"):
        pb.BatchPrior("a")
    with pytest.raises(ValueError, match="BatchPrior has no 𝓕"):
        pb.plan_batches(pb.BatchPrior(), layouts, of="map")
    with pytest.raises(ValueError, match="of='maps': use 'change' or 'map'"):
        pb.plan_batches(pb.BatchPrior(), layouts, of="maps")
    with pytest.raises(ValueError, match="no row for control in 'baseline' at time 1"):
        pb.plan_batches(pb.BatchPrior(), {"x": layouts[PROPOSED[0]].iloc[2:]})
    for setting, message in (
        ({"batch_scale": 0.0}, r"batch_scale=0\.0\): use a finite number above 0"),
        ({"heterogeneity": -1.0}, "heterogeneity=-1.0.*of at least 0"),
        ({"mean_count": float("nan")}, "mean_count=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            pb.BatchPrior(**setting)


def test_a_screen_is_a_layout_and_what_is_no_layout_is_refused(fit: pb.Fit, screen: pb.Screen) -> None:
    assert pb.plan_batches(fit, {"as it was": screen}, **SHORT).error.sizes["layout"] == 1
    table = screen.summary()
    with pytest.raises(ValueError, match="no row for control in 'rest' at time 1"):
        pb.plan_batches(fit, {"x": table.drop(index=("control", "rest", 1.0))}, **SHORT)
    other = pd.concat([table, table.rename(index={"drug": "tea"}).iloc[1:2]])
    with pytest.raises(ValueError, match=r"The fit does not know the condition .*'tea'"):
        pb.plan_batches(fit, {"x": other}, **SHORT)
    with pytest.raises(ValueError, match="at least 2 batches"):
        pb.propose_layouts(screen, 1, 100)


@pytest.mark.usefixtures("unchecked")
def test_layouts_are_tables_of_cells(screen: pb.Screen) -> None:
    table = pb.propose_layouts(screen, 3, 300)["controls in one batch"]
    with pytest.raises(TypeError, match=r"layouts maps names to tables of cells.*got DataFrame"):
        pb.plan_batches(pb.BatchPrior(), table)
    with pytest.raises(TypeError, match=r"'a' is no table of cells.*got int"):
        pb.plan_batches(pb.BatchPrior(), {"a": 3})
    for wrong in (-table, table * np.nan, 0 * table):
        with pytest.raises(ValueError, match="'a' holds numbers of cells that are negative, not finite, not whole, or all 0"):
            pb.plan_batches(pb.BatchPrior(), {"a": wrong})
        with pytest.raises(ValueError, match="'layout' holds numbers of cells"):
            pb.improve_layout(pb.BatchPrior(), wrong)
    with pytest.raises(TypeError, match="A fit is needed here; got Screen"):
        pb.plan_batches(screen, {"a": table})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "question",
    [
        pb.effects, pb.predict, pb.posterior, pb.batch_error, pb.decompose_batches, pb.adapt, pb.translate, pb.counterfactual,
        pb.log_density, pb.lipschitz_constant, pb.predictive_check,
    ],
)  # fmt: skip
def test_a_screen_is_no_fit(screen: pb.Screen, question: Callable[..., object]) -> None:
    more = {pb.adapt: (screen, "new"), pb.counterfactual: (screen, pb.Wait(1)), pb.translate: (screen,), pb.log_density: (screen,),
            pb.batch_error: (screen,), pb.lipschitz_constant: (screen,), pb.predictive_check: (screen,)}  # fmt: skip
    with pytest.raises(TypeError, match=r"A fit is needed here; got Screen. Make one with fit = pb.fit\(model, screen\)"):
        question(screen, *more.get(question, ()), **({"batch_to": "average"} if question is pb.translate else {}))


def test_what_is_taken_from_a_fit_is_what_its_cells_do(fit: pb.Fit, screen: pb.Screen) -> None:
    """s² is the variance of a count over its squared mean, in cells drawn from the model; τ² and v are those of the draw."""
    sites = next(iter(global_draws(fit.model, fit.guide, 1, 3)))
    plan = _FittedTable(fit, screen.summary())
    noise, spread, effect = plan.law(sites)
    torch.testing.assert_close(spread, sites["batch_scale"].double().square())
    with torch.no_grad(), seeded(0):
        segments = fit.model.vocabulary.encode(plan.conditions)
        z = torch.randn(40_000, len(plan.conditions), 2)
        share = fit.model.log_shares(sites, fit.model.moved(sites, z, segments), plan.expectation.rows)
        law = fit.model.law(sites, share + fit.model.log_depth)
        counts = law.sample().double()
    torch.testing.assert_close(noise, counts.var(0) / counts.mean(0).square(), rtol=0.15, atol=0.01)
    torch.testing.assert_close(effect, share.exp().double().mean(0).log().var(0) + 1e-4, rtol=0.05, atol=1e-4)


def test_a_map_that_forgets_the_cell_leaves_the_error_of_the_level_and_one_with_a_slope_another(fit: pb.Fit, screen: pb.Screen) -> None:
    flat = replace(fit, guide=copy.deepcopy(fit.guide))
    with torch.no_grad():
        flat.guide.encoder.network[0].weight.zero_()
        sites = next(iter(global_draws(flat.model, flat.guide, 1, 3)))
        z = torch.randn(60, 2)
        errors = []
        for one in (flat, fit):
            plan = _FittedTable(one, screen.summary())
            with seeded(1):
                errors.append(np.mean([plan.error(sites, z) for _ in range(20)]))
        law = covariance(plan.table.cells, *plan.law(sites))
    assert errors[0] == pytest.approx(float(law.diagonal(dim1=1, dim2=2).mean()), rel=0.25)
    assert abs(errors[1] / errors[0] - 1) > 1e-3


def test_no_batch_outgrows_its_capacity_and_no_cell_is_lost(screen: pb.Screen) -> None:
    layout = pb.propose_layouts(screen, 4, 801)["controls in one batch"]
    for capacity in (None, 300):
        better = pb.improve_layout(pb.BatchPrior(), layout, capacity=capacity, n_moves=5)
        assert (better.sum(axis=1) == layout.sum(axis=1)).all()
        limit = layout.sum().max() if capacity is None else max(300, layout.sum().max())
        assert better.sum().max() <= limit
    proposed = pb.propose_layouts(screen, 4, 801)
    assert len({tuple(table.sum(axis=1)) for table in proposed.values()}) == 1


def test_layouts_of_other_sizes_are_compared_with_a_word(screen: pb.Screen) -> None:
    tables = {name: pb.propose_layouts(screen, 2, n)["controls in every batch"] for name, n in (("few", 400), ("many", 900))}
    assert "They differ in cells, which counts too: few 400, many 896" in pb.plan_batches(pb.BatchPrior(), tables).report()
