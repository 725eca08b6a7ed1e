"""Batch effects: zero-sum over batches, centred over genes, nothing with one batch."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perturbprob.measurement.batch_effect import BatchEffect, nested_basis, zero_sum_basis


def shares(n_genes, seed=0):
    """Shares of genes that differ a hundredfold."""
    return torch.softmax(5 * torch.rand(n_genes, generator=torch.Generator().manual_seed(seed)), 0)


# Laws.


@settings(deadline=None)
@given(st.integers(2, 60))
def test_the_basis_is_orthonormal_and_sums_to_zero(n):
    basis = zero_sum_basis(n)
    torch.testing.assert_close(basis.T @ basis, torch.eye(n - 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis.sum(0), torch.zeros(n - 1), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 40), st.integers(0, 1000))
def test_effects_sum_to_zero_over_batches_and_to_zero_over_genes_by_share(n_batches, n_genes, seed):
    pyro.set_rng_seed(seed)
    share = shares(n_genes, seed)
    eta = BatchEffect(n_batches, share)()["batch_effect"]
    assert eta.shape == (n_batches, n_genes)
    assert eta.sum(0).abs().max() < 1e-6 * (1 + eta.abs().max())
    assert (eta @ share).abs().max() < 1e-6 * (1 + eta.abs().max())


def test_sites_have_their_shapes_and_the_effect_is_a_function_of_the_coordinates():
    block = BatchEffect(4, shares(7))
    trace = pyro.poutine.trace(block).get_trace()
    shapes = {name: tuple(site["value"].shape) for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert shapes == {"batch_scale_overall": (), "batch_scale": (7,), "batch_coordinate": (3, 7), "batch_effect": (4, 7)}
    torch.testing.assert_close(trace.nodes["batch_effect"]["value"], block.effect(trace.nodes["batch_coordinate"]["value"]))


def test_every_batch_has_the_same_law():
    torch.manual_seed(0)
    block, n = BatchEffect(5, torch.full((1000,), 1e-3)), 40
    draws = torch.stack([block.effect(torch.randn(4, 1000)) for _ in range(n)])
    variance = draws.var((0, 2))
    # iid effects of variance 1, made zero-sum, keep 1 - 1/5 of it
    np.testing.assert_allclose(variance, np.full(5, 0.8), atol=5 * 0.8 * (2 / (1000 * n)) ** 0.5)


def test_the_prior_is_hierarchical_over_genes():
    torch.manual_seed(0)
    trace = pyro.poutine.trace(BatchEffect(3, shares(4))).get_trace()
    trace.compute_log_prob()
    overall, scale, coordinate = (
        trace.nodes[name]["value"].double().numpy() for name in ("batch_scale_overall", "batch_scale", "batch_coordinate")
    )
    expected = {
        "batch_scale_overall": stats.lognorm.logpdf(overall, 1.0, scale=0.1),
        "batch_scale": stats.lognorm.logpdf(scale, 0.5, scale=overall).sum(),
        "batch_coordinate": stats.norm.logpdf(coordinate, 0, scale).sum(),
    }
    for name, log_prob in expected.items():
        assert float(trace.nodes[name]["log_prob_sum"]) == pytest.approx(log_prob, rel=1e-4)


def test_a_new_batch_is_a_normal_draw_with_each_genes_scale_centred_by_share():
    torch.manual_seed(0)
    share, scale, n = shares(4), torch.tensor([0.1, 0.5, 1.0, 2.0]), 20_000
    block = BatchEffect(3, share)
    sites = {"batch_scale": scale, "batch_effect": torch.zeros(3, 4)}
    draws = torch.stack([block.with_new(sites)["batch_effect"][-1] for _ in range(n)]).double()
    assert (draws @ share.double()).abs().max() < 1e-6
    centre = torch.eye(4, dtype=torch.float64) - share.double()
    expected = centre @ torch.diag(scale.double() ** 2 * (1 + 1 / 3)) @ centre.T  # its own, and that of the mean of the fitted
    sampling = ((expected**2 + expected.diagonal()[:, None] * expected.diagonal()) / n) ** 0.5
    assert (torch.abs(draws.mean(0)) < 5 * (expected.diagonal() / n) ** 0.5).all()
    assert (torch.abs(torch.cov(draws.T) - expected) < 5 * sampling).all()


def test_what_depends_on_media_and_state_is_new_in_a_new_batch_too():
    torch.manual_seed(0)
    block = BatchEffect(2, shares(4), n_media=1, n_latent=3)
    sites = {"batch_scale": torch.ones(4), "batch_effect": torch.zeros(2, 4)}
    sites |= {"batch_media_scale": torch.ones(4), "batch_media_effect": torch.zeros(1, 2, 4)}
    sites |= {"batch_state_scale": torch.tensor([1.0, 2.0, 3.0]), "batch_state_effect": torch.zeros(3, 2, 4)}
    draws = [block.with_new(sites) for _ in range(4000)]
    media, state = (torch.stack([d[f"batch_{k}_effect"][:, -1] for d in draws]) for k in ("media", "state"))
    centred = float((1 - 2 * shares(4) + 4 * shares(4).square()).mean())
    assert float(media.square().mean()) == pytest.approx(1.5 * centred, rel=0.1)
    torch.testing.assert_close(state.square().mean((0, 2)), 1.5 * centred * torch.tensor([1.0, 4.0, 9.0]), rtol=0.1, atol=0)


def test_the_spread_of_a_new_batch_and_of_the_mean_follow_from_the_law_of_nested_batches():
    """By hand, for 3 screens of 2 batches: a screen's own variance τ² (r² − 1) / 2, a batch's τ², drawn and averaged."""
    ratio, n = 2.5, 400_000
    block = BatchEffect(6, shares(4), groups=[0, 0, 1, 1, 2, 2])
    new, mean = block.spread({"batch_screen_ratio": torch.tensor(ratio)})
    generator = torch.Generator().manual_seed(1)
    screens = torch.randn(n, 4, generator=generator) * ((ratio**2 - 1) / 2) ** 0.5
    batches = screens.repeat_interleave(2, 1) + torch.randn(n, 8, generator=generator)
    assert float(new) == pytest.approx(float(batches[:, 6].var()), rel=0.01)
    assert float(mean) == pytest.approx(float(batches[:, :6].mean(1).var()), rel=0.01)
    between = (block.basis.T @ batches[:, :6].T)[block.between > 0]
    assert float(between.var()) == pytest.approx(ratio**2, rel=0.01)
    assert [float(x) for x in BatchEffect(5, shares(4)).spread({})] == pytest.approx([1, 0.2])


def test_one_batch_has_no_effect_and_says_so_once():
    with pytest.warns(UserWarning, match="one batch: its batch effect is fixed to 0. Name the batch column") as said:
        block = BatchEffect(1, shares(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = pyro.poutine.trace(block).get_trace()
    assert len(said) == 1
    assert not [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert torch.equal(trace.nodes["_RETURN"]["value"]["batch_effect"], torch.zeros(1, 6))


# Forms.


def parts(block, seed=0):
    """The parts of η and the sites behind them, from the prior."""
    pyro.set_rng_seed(seed)
    trace = pyro.poutine.trace(block).get_trace()
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"} | trace.nodes["_RETURN"]["value"]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 4), st.integers(0, 100))
def test_whatever_the_state_and_media_effects_sum_to_zero(n_batches, n_media, n_latent, seed):
    share, n = shares(6, seed), 5
    block = BatchEffect(n_batches, share, n_media=n_media, n_latent=n_latent)
    sites = parts(block, seed)
    z, media = torch.randn(n, n_latent), torch.eye(n, n_media)
    eta = torch.stack([block.at(sites, torch.full((n,), b), z, media) for b in range(n_batches)])
    torch.testing.assert_close(eta.sum(0), torch.zeros(n, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(eta @ share, torch.zeros(n_batches, n), atol=1e-5, rtol=0)
    assert torch.equal(block.at(sites, torch.full((n,), -1), z, media), torch.zeros(n, 6))


def test_effects_by_state_and_media_are_linear_in_both():
    block = BatchEffect(3, shares(4), n_media=2, n_latent=2)
    sites = parts(block)
    batch, z, media = torch.tensor([0, 2]), torch.randn(7, 2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    found = block.at(sites, batch, z, media)
    for draw in range(7):
        for cell, b in enumerate(batch.tolist()):
            expected = sites["batch_effect"][b] + media[cell] @ sites["batch_media_effect"][:, b]
            torch.testing.assert_close(found[draw, cell], expected + z[draw, cell] @ sites["batch_state_effect"][:, b])


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_a_nested_basis_is_orthonormal_zero_sum_and_within_or_between(groups):
    groups = [sorted(set(groups)).index(g) for g in groups]
    basis, between = nested_basis(groups)
    n = len(groups)
    torch.testing.assert_close(basis.T @ basis, torch.eye(n - 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.sum(0), torch.zeros(n - 1), atol=1e-5, rtol=0)
    assert int(between.sum()) == len(set(groups)) - 1
    for g in set(groups):
        own = basis[torch.tensor(groups) == g]
        torch.testing.assert_close(own[:, between == 0].sum(0), torch.zeros(int((between == 0).sum())), atol=1e-5, rtol=0)
        assert ((own - own.mean(0))[:, between == 1].abs() < 1e-5).all()


def test_batches_in_one_screen_are_as_before_and_screens_have_a_scale_of_their_own():
    assert torch.equal(nested_basis([0, 0, 0])[0], zero_sum_basis(3))
    alone, nested = BatchEffect(4, shares(5), groups=[0, 0, 0, 0]), BatchEffect(4, shares(5), groups=[0, 0, 1, 1])
    assert "batch_screen_ratio" not in parts(alone)
    sites = parts(nested)
    trace = pyro.poutine.trace(nested)
    pyro.set_rng_seed(0)
    law = trace.get_trace().nodes["batch_coordinate"]["fn"].base_dist
    torch.testing.assert_close(law.scale[0], sites["batch_screen_ratio"] * sites["batch_scale"])
    torch.testing.assert_close(law.scale[1:], sites["batch_scale"].expand(2, 5))


def test_the_regression_moves_the_mean_of_batches_by_their_covariates():
    covariates = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
    block = BatchEffect(10, shares(5), covariates=covariates)
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(block).get_trace()
    slope, mean = trace.nodes["batch_covariate_effect"]["value"], trace.nodes["batch_coordinate"]["fn"].base_dist.loc
    centred = (covariates - covariates.mean(0)) / covariates.std(0)
    torch.testing.assert_close(block.effect(mean), centred @ slope, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("n", "covariates", "message"),
    [
        (7, torch.randn(7, 1), "learnt across batches only, and 7 are too few: at least 8 are needed"),
        (8, torch.randn(7, 1), r"Covariates need one finite row for each of the 8 batches; got \(7, 1\)"),
        (8, torch.full((8, 1), torch.nan), "one finite row"),
        (8, torch.ones(8, 1), "the same in every batch"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_covariates_from_which_nothing_can_be_learnt_are_refused(n, covariates, message):
    with pytest.raises(ValueError, match=message):
        BatchEffect(n, shares(3), covariates=covariates)
