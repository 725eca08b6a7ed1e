"""Error analysis: the directional derivative is that of the map, the bound bounds, and what cannot be worked out is said."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.inference.draws import centre

SHORT = {"n_draws": 4, "n_points": 4, "progress": False}


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Three batches, two media."""
    return pb.simulate(n_cells=400, n_genes=12, n_perturbations=2, media=("rest", "drug"), times=(1.0,), n_batches=3, seed=4).screen


@pytest.fixture(scope="module")
def fit(screen: pb.Screen) -> pb.Fit:
    """A short fit."""
    return pb.fit(pb.node(screen, 3, assumptions=[pb.UneditedStable()]), screen, epochs=8, warmup=2, progress=False)


def test_the_slope_is_that_of_finite_differences_on_a_map_that_is_not_symmetric(fit: pb.Fit, screen: pb.Screen) -> None:
    """In float64; the Jacobian itself is made here, and here only."""
    torch.manual_seed(0)
    model, guide = (part.double() for part in (copy.deepcopy(fit.model), copy.deepcopy(fit.guide)))
    twin = replace(fit, model=model, guide=guide)
    sites = {name: value.double() for name, value in centre(model, guide).items()}
    f = pb.projected(twin, list(screen.conditions[-2:]), sites=sites, batch_from="batch1", batch_to="batch3")
    for part in (f.segments, f.origin):
        part[:] = [type(s)(s.perturbation.double(), s.media.double(), s.changed, s.wait.double()) for s in part]
    x = model.log_share + 0.1 * torch.randn(3, 2, 12, dtype=torch.float64)
    direction = 0.2 * torch.randn(3, 2, 12, dtype=torch.float64)
    with torch.no_grad():
        value, slope = f.slope(x, direction)
        step = 1e-4
        expected = (f(x + step * direction) - f(x - step * direction)) / (2 * step)
        torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(lambda one: f(one[None, None].expand(1, 2, -1))[0, 0], x[0, 0])
    assert (jacobian - jacobian.T).abs().max() > 0.05 * jacobian.abs().max()
    with torch.no_grad():
        along = f.slope(x[:1, :1].expand(1, 2, -1), direction[:1, :1].expand(1, 2, -1))[1][0, 0]
    torch.testing.assert_close(along, jacobian @ direction[0, 0], rtol=0.02, atol=1e-4)  # coarser steps with gradients


def test_the_bound_is_never_below_the_square_of_the_average(fit: pb.Fit, screen: pb.Screen) -> None:
    found = pb.batch_error(fit, screen, **SHORT)
    table = found.table
    assert dict(table["pair"].sizes) == {"draw": 4, "condition": 6, "batch": 3, "batch_from": 3}
    assert bool((table["bound"] >= table["tight"] - 1e-9).all())
    np.testing.assert_allclose(table["bound"], table["pair"].mean(("batch", "batch_from")), rtol=1e-5)
    (tight, low, high), (bound, _, _) = found.total(), found.total("bound")
    assert low <= tight <= high
    assert tight <= bound
    assert "no layout of these batches removes" in found.report()
    with pytest.raises(ValueError, match=r"Unknown form 'loose' of eq 22. Use 'tight', or 'bound'"):
        found.total("loose")


def test_the_effect_is_that_of_the_posterior_and_zero_sum_effects_leave_only_what_is_carried(fit: pb.Fit, screen: pb.Screen) -> None:
    table = pb.batch_error(fit, screen, **SHORT).table
    eta = pb.posterior(fit, n_draws=4, seed=0).posterior["batch_effect"].squeeze("chain")
    np.testing.assert_allclose(table["effect"].isel(condition=0), (eta**2).mean("gene"), rtol=1e-4)
    assert float(table["tight"].mean()) < 0.3 * float(table["effect"].mean())  # every batch holds control and every condition


def test_a_batch_without_control_is_no_source(fit: pb.Fit, screen: pb.Screen) -> None:
    lacking = screen[~((screen.batch == 1) & np.array([not p.perturbations for p in screen.conditions])[screen.condition])]
    table = pb.batch_error(fit, lacking, **SHORT).table
    assert list(table["batch_from"].values) == ["batch1", "batch3"]
    none = screen[np.array([bool(p.perturbations) for p in screen.conditions])[screen.condition]]
    with pytest.raises(ValueError, match="No fitted batch holds control cells in baseline media"):
        pb.batch_error(fit, none, **SHORT)


def test_effects_by_state_have_an_error_too(screen: pb.Screen) -> None:
    fit = pb.fit(pb.node(screen, 2, batch_effect="state", assumptions=[pb.UneditedStable()]), screen, epochs=2, progress=False)
    assert np.isfinite(pb.batch_error(fit, screen, **SHORT).table["pair"]).all()


def test_one_batch_and_a_fit_without_an_encoder_are_refused(screen: pb.Screen) -> None:
    one = screen[screen.batch == 0]
    with pytest.warns(UserWarning, match="one batch"):
        alone = pb.fit(pb.node(one, 2), one, epochs=1, progress=False)
    with pytest.raises(ValueError, match="has one batch: how far batches differ was never seen"):
        pb.batch_error(alone, one, **SHORT)
    paths = pb.fit(pb.node(screen, 2), screen, epochs=1, objective="paths", progress=False)
    with pytest.raises(ValueError, match="has no V⁻¹ from counts to states"):
        pb.projected(paths, screen.conditions[-1])
