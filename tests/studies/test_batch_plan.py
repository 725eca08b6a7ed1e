"""Plans: the covariance is that of a normal model, and layouts are ranked as the paper's conclusions say."""

import numpy as np
import pandas as pd
import pytest
import torch

import perturbprob as pb
from perturbprob.studies.batch_plan import covariance

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


def test_controls_in_every_batch_are_better_than_in_one_and_hashed_media_than_split(fit: pb.Fit, screen: pb.Screen) -> None:
    layouts = pb.propose_layouts(screen, 4, 1600)
    assert {name: int(table.to_numpy().sum()) for name, table in layouts.items()} == dict.fromkeys(layouts, 1600)
    plan = pb.plan_batches(fit, layouts, **SHORT)
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
