"""Sparse minibatches: the same products, laws and trainings as dense ones."""

import importlib

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array, random_array
from torch import nn

import perturbprob as pb
from perturbprob.measurement.counts import CountLaw
from perturbprob.measurement.fused import NoCount
from perturbprob.measurement.rate import Rate
from perturbprob.model import sparse_input
from perturbprob.model.cells import CellTable
from perturbprob.model.sparse_input import as_tensor, first_layer, log_relative, stays_sparse

pytest.importorskip("numba")


def counts_of(n_cells=70, n_genes=90, density=0.1, seed=0) -> csr_array:
    random = np.random.default_rng(seed)
    found = random_array((n_cells, n_genes), density=density, format="csr", dtype=np.float32, rng=random)
    found.data[:] = 1 + random.poisson(2.0, len(found.data))
    return csr_array(found)


def test_a_sparse_tensor_shares_the_memory_of_the_counts():
    counts = counts_of()
    tensor = as_tensor(counts)
    np.testing.assert_array_equal(tensor.to_dense().numpy(), counts.toarray())
    assert tensor.values().data_ptr() == counts.data.ctypes.data


def test_genes_out_of_order_are_put_in_order():
    counts = counts_of()
    mixed = csr_array((counts.data[::-1], counts.indices[::-1], counts.nnz - counts.indptr[::-1]), shape=counts.shape)
    assert not mixed.has_sorted_indices
    counts = csr_array(counts.toarray()[::-1])
    assert (as_tensor(mixed).col_indices() == as_tensor(counts).col_indices()).all()
    assert (as_tensor(mixed).values() == as_tensor(counts).values()).all()


def test_log_relative_counts_are_those_of_the_dense_matrix():
    counts, log_size_factor = counts_of(), torch.randn(70)
    dense = torch.log1p(torch.from_numpy(counts.toarray()) / log_size_factor.exp()[:, None])
    torch.testing.assert_close(log_relative(as_tensor(counts), log_size_factor).to_dense(), dense)
    torch.testing.assert_close(log_relative(torch.from_numpy(counts.toarray()), log_size_factor), dense)


@pytest.mark.parametrize("n_genes", [90, 700])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_first_layer_has_the_values_and_gradients_of_a_dense_one(n_threads, n_genes):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        counts, layer, context = counts_of(n_genes=n_genes), nn.Linear(n_genes + 7, 64), torch.randn(70, 7, requires_grad=True)
        inputs = [layer.weight, layer.bias, context]
        weigh = torch.randn(70, 64)
        sparse = first_layer(layer, as_tensor(counts), context)
        dense = layer(torch.cat([torch.from_numpy(counts.toarray()), context], -1))
        found, expected = (torch.autograd.grad((weigh * end.sin()).sum(), inputs) for end in (sparse, dense))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_the_law_of_sparse_counts_is_that_of_dense_ones(density):
    counts, logits = counts_of(density=density), torch.randn(70, 90)
    theta, gate, depth = torch.rand(90) + 0.5, torch.full((90,), 0.05), torch.full((70,), 5.0)

    def found(value):
        leaves = [logits.clone().requires_grad_(), theta.clone().requires_grad_(), gate.clone().requires_grad_()]
        log_prob = CountLaw(Rate(leaves[0], depth), *leaves[1:]).to_event(1).log_prob(value)
        return [log_prob, *torch.autograd.grad(log_prob.sum(), leaves)]

    for own, other in zip(found(as_tensor(counts)), found(torch.from_numpy(counts.toarray())), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_a_sparse_value_that_is_no_count_is_refused():
    counts = counts_of()
    counts.data[5] = 1.5
    law = CountLaw(Rate(torch.zeros(70, 90), torch.zeros(70)), torch.ones(90)).to_event(1)
    with pytest.raises(NoCount, match=r"whole numbers"):
        law.log_prob(as_tensor(counts))


def test_minibatches_stay_sparse_where_that_is_faster(monkeypatch):
    few, many, cpu = counts_of(density=0.1), counts_of(density=0.5), torch.device("cpu")
    assert stays_sparse(few, cpu)
    assert not stays_sparse(many, cpu)
    assert not stays_sparse(few, torch.device("meta"))
    monkeypatch.setattr(sparse_input, "kernel", lambda: None)
    assert not stays_sparse(few, cpu)


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """A screen in which one value in eight is a count."""
    return pb.simulate(n_cells=900, n_genes=60, n_perturbations=2, n_batches=2, depth=10, seed=0).screen


@pytest.mark.slow
@pytest.mark.parametrize("structure", [pb.vae, pb.node])
@pytest.mark.parametrize("measurement", ["zero_inflated_negative_binomial", "poisson"])
def test_a_fit_of_sparse_minibatches_goes_as_one_of_dense(monkeypatch, screen, structure, measurement):
    fit_module, seen = importlib.import_module("perturbprob.inference.fit"), []
    cells = CellTable.cells

    def told(self, *arguments, sparse=False, **others):
        seen.append(sparse)
        return cells(self, *arguments, sparse=sparse, **others)

    monkeypatch.setattr(CellTable, "cells", told)

    def losses():
        seen.clear()
        return pb.fit(structure(screen, n_latent=2, measurement=measurement), screen, epochs=2, seed=0, progress=False).losses

    sparse = losses()
    assert any(seen)
    monkeypatch.setattr(fit_module, "stays_sparse", lambda *_: False)
    dense = losses()
    assert not any(seen)
    for name in ("train", "validation"):
        assert sparse[name] == pytest.approx(dense[name], rel=1e-4)


@pytest.mark.slow
def test_what_cannot_be_sparse_is_dense(screen):
    for other in ({"penetrance": True}, {}):
        model = pb.node(screen, n_latent=1, **other)
        fit = pb.fit(model, screen, epochs=1, progress=False, objective=None if other else "paths")
        assert np.isfinite(fit.losses["train"]).all()
