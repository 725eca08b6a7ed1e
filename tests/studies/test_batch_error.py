"""Error analysis: the directional derivative is that of the map, the bound bounds, and what cannot be worked out is said."""

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.quasirandom import SobolEngine

import perturbprob as pb
from perturbprob.inference.draws import centre, global_draws

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
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        pb.batch_error(fit, screen, seed=True, **SHORT)


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


def by_hand(fit: pb.Fit, screen: pb.Screen, n_points: int) -> dict[str, np.ndarray]:
    """Eq 22 at the first posterior draw, from 𝓕 by finite differences and η alone."""
    model, step = fit.model, 1e-2
    batches, conditions = screen.batches, list(screen.conditions)
    sites = next(iter(global_draws(model, fit.guide, 1, 0)))
    uniform = SobolEngine(model.rest_size, scramble=True, seed=0).draw(n_points).clamp(1e-6, 1 - 1e-6)
    z = model.rest_points(uniform)[:, None].expand(-1, len(conditions), -1)
    control = pb.projected(fit, [pb.Protocol([pb.Wait(p.time)]) for p in conditions], sites=sites)
    ends = {b: pb.projected(fit, conditions, sites=sites, batch_to=b) for b in batches}
    untouched = model.moved(control.sites, z, control.segments)
    x = model.log_shares(control.sites, untouched, control.rows)
    pair = np.zeros((3, len(conditions), 3))
    for i, source in enumerate(batches):
        here = torch.full((len(conditions),), i)
        eta = model.batch_effect.at(sites, here, untouched.z, untouched.media).expand_as(x)
        for k, (target, end) in enumerate(ends.items()):
            f = pb.projected(fit, conditions, sites=sites, batch_from=source, batch_to=target)
            slope = (f(x + eta + step * eta) - f(x + eta - step * eta)) / (2 * step)
            state = model.moved(end.sites, z, end.segments)
            own = model.batch_effect.at(sites, torch.full((len(conditions),), k), state.z, state.media).expand_as(x)
            pair[k, :, i] = (slope - own).square().mean((0, 2)).numpy()
    return {"pair": pair.transpose(1, 0, 2)}


@pytest.mark.parametrize("form", ["constant", "state"])
def test_both_terms_are_those_of_finite_differences_and_of_the_very_batches(form: str, screen: pb.Screen) -> None:
    model = pb.node(screen, 3, batch_effect=form, assumptions=[pb.UneditedStable()])
    fit = pb.fit(model, screen, epochs=8, warmup=2, progress=False)
    table = pb.batch_error(fit, screen, n_draws=1, n_points=3, progress=False).table.isel(draw=0)
    with torch.no_grad():
        expected = by_hand(fit, screen, 3)
    np.testing.assert_allclose(table["pair"], expected["pair"], rtol=0.05, atol=1e-5)
    assert float(table["pair"].std("batch_from").max()) > 1e-6
    assert (table["irreducible"] > 0).all()
    assert (table["carried"] > 0).all()


def test_what_the_mean_of_all_batches_adds_has_its_variance_and_its_slope(fit: pb.Fit, screen: pb.Screen) -> None:
    """Where 𝓕 forgets the cell it is the variance of η̄ itself, τ²/B, after centring; with a slope it is another number."""
    flat = replace(fit, guide=copy.deepcopy(fit.guide))
    with torch.no_grad():
        flat.guide.encoder.network[0].weight.zero_()
    how = {"n_draws": 20, "n_points": 1, "progress": False}
    found = pb.batch_error(flat, screen, **how).table
    scale = pb.posterior(flat, 20).posterior["batch_scale"].squeeze("chain").values
    share = fit.model.log_share.exp().numpy()
    centred = scale**2 * (1 - 2 * share) + (share**2 * scale**2).sum(-1, keepdims=True)
    assert float(found["irreducible"].mean()) == pytest.approx(float(centred.mean()) / 3, rel=0.3)
    assert float(found["carried"].max()) < 1e-9
    sloped = pb.batch_error(fit, screen, **how).table["irreducible"]
    assert float(abs(sloped - found["irreducible"]).max()) > 1e-4


@pytest.mark.slow
def test_five_thousand_genes_need_less_than_2_gb() -> None:
    """In a process of its own, whose largest memory is its own."""
    code = """
import resource, warnings, numpy as np, perturbprob as pb
from anndata import AnnData
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
obs = {"perturbation": np.resize(["control", "g1", "g2", "g3"], 200), "batch": np.repeat(["a", "b"], 100)}
adata = AnnData(rng.poisson(0.5, (200, 5000)).astype(np.float32), obs=obs)
adata.var_names = [f"g{k}" for k in range(5000)]
screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", batch="batch")
fit = pb.fit(pb.node(screen, 5), screen, epochs=1, progress=False)
pb.batch_error(fit, screen, n_draws=2, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 2e6  # kB
