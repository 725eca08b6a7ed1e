"""Sparse counts as an encoder reads them: only what is not 0 is multiplied."""

import math
import warnings
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor, nn

from perturbprob.compiled import in_threads, load

SPARSE = 0.25
"""Up to this share of genes with a count a sparse minibatch is faster than a dense one."""


def kernel() -> ModuleType | None:
    """Return the compiled products, None where numba cannot be had."""
    return load("perturbprob.model.sparse_kernel", "scatter", "its encoder")


def stays_sparse(counts: csr_array, device: torch.device) -> bool:
    """Say whether a minibatch is better left as it is stored: few counts, a CPU, and compiled products of them."""
    return counts.nnz <= SPARSE * math.prod(counts.shape) and device.type == "cpu" and kernel() is not None


def as_tensor(counts: csr_array) -> Float[Tensor, "cell gene"]:
    """Return counts as a sparse tensor, which shares their memory where genes are in order."""
    counts = counts if counts.has_sorted_indices else counts.sorted_indices()
    start, gene = (torch.from_numpy(part.astype(np.int32, copy=False)) for part in (counts.indptr, counts.indices))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # of which nothing but the three arrays is used
        return torch.sparse_csr_tensor(start, gene, torch.from_numpy(counts.data), counts.shape, check_invariants=False)


def log_relative(counts: Float[Tensor, "cell gene"], log_size_factor: Float[Tensor, " cell"]) -> Float[Tensor, "cell gene"]:
    """Return log(1 + count / size factor), as sparse as the counts."""
    if counts.layout != torch.sparse_csr:
        return torch.log1p(counts * torch.exp(-log_size_factor)[:, None])
    start = counts.crow_indices()
    values = torch.log1p(counts.values() * torch.exp(-log_size_factor).repeat_interleave(start.diff()))
    return torch.sparse_csr_tensor(start, counts.col_indices(), values, counts.shape, check_invariants=False)


def first_layer(layer: nn.Linear, values: Float[Tensor, "cell gene"], context: Float[Tensor, "cell context"]) -> Float[Tensor, "cell unit"]:
    """Return what a layer makes of sparse values of genes, followed by a context."""
    return _FirstLayer.apply(layer.weight, layer.bias, context, values)


class _FirstLayer(torch.autograd.Function):
    """values Wᵍᵀ + context Wᶜᵀ + b, in as many threads as torch has."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Float[Tensor, "cell unit"]:
        """Multiply the values by the weights of their genes."""
        weight, bias, context, values = given
        n_genes = values.shape[1]
        ctx.save_for_backward(weight, context)
        ctx.values = tuple(part.numpy() for part in (values.crow_indices(), values.col_indices(), values.values()))
        out = torch.addmm(bias, context, weight[:, n_genes:].mT)
        _in_threads("gather", len(out), *ctx.values, weight.detach()[:, :n_genes].numpy(), out=out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, outward: Float[Tensor, "cell unit"]) -> tuple[Tensor | None, ...]:
        """Carry the gradient back to weights, bias and context."""
        weight, context = ctx.saved_tensors
        n_genes, outward = weight.shape[1] - context.shape[1], outward.contiguous()
        by_weight = torch.empty_like(weight)
        _in_threads("scatter", n_genes, *ctx.values, outward.numpy(), out=by_weight[:, :n_genes].numpy())
        torch.mm(outward.mT, context, out=by_weight[:, n_genes:])
        by_context = outward @ weight[:, n_genes:] if ctx.needs_input_grad[2] else None
        return by_weight, outward.sum(0), by_context, None


def _in_threads(name: str, size: int, *arguments: np.ndarray, out: np.ndarray) -> None:
    """Call a compiled product, cut along its output."""
    product, n = getattr(cast("ModuleType", kernel()), name), max(1, min(torch.get_num_threads(), size // 32))
    cut = [k * size // n for k in range(n + 1)]
    in_threads(lambda k: product(*arguments, cut[k], cut[k + 1], out), n)
