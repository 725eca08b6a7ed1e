"""Batch effects: zero-sum over batches, centred over genes, nothing with one batch."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perturbprob.measurement.batch_effect import BatchEffect, zero_sum_basis


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
    eta = BatchEffect(n_batches, share)()
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
    draws = torch.stack([block.new(scale) for _ in range(n)]).double()
    assert (draws @ share.double()).abs().max() < 1e-6
    centre = torch.eye(4, dtype=torch.float64) - share.double()
    expected = centre @ torch.diag(scale.double() ** 2) @ centre.T
    sampling = ((expected**2 + expected.diagonal()[:, None] * expected.diagonal()) / n) ** 0.5
    assert (torch.abs(draws.mean(0)) < 5 * (expected.diagonal() / n) ** 0.5).all()
    assert (torch.abs(torch.cov(draws.T) - expected) < 5 * sampling).all()


def test_one_batch_has_no_effect_and_says_so_once():
    with pytest.warns(UserWarning, match="one batch: its batch effect is fixed to 0. Name the batch column") as said:
        block = BatchEffect(1, shares(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = pyro.poutine.trace(block).get_trace()
    assert len(said) == 1
    assert not [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert torch.equal(trace.nodes["_RETURN"]["value"], torch.zeros(1, 6))
