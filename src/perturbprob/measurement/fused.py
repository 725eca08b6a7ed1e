"""The law of a cell's counts on a CPU: one compiled pass over a minibatch gives log densities and their gradients."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast, final

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable

from perturbprob.compiled import in_threads, load
from perturbprob.measurement.kernel_arguments import Counts, Law, Rates, Sums

if TYPE_CHECKING:
    from perturbprob.measurement.counts import CountLaw

LARGEST_TABLE = 32
"""Of counts up to it, at most, the terms with Γ are read from tables."""
WORTH_A_THREAD = 100_000
"""So many counts are worth a thread of their own."""


class NoCount(ArithmeticError):
    """A value is no count; the message says where. Not a ValueError, which Pyro would raise again with its own trace behind the message."""


@final
class FusedCountLaw(TorchDistribution):
    """A `CountLaw` over the genes of each cell whose log density and gradients come from one compiled pass.

    It is what ``CountLaw(...).to_event(1)`` returns where the pass can be taken (`fits`), and the same law: only `log_prob` differs, by
    the rounding of single precision, and that counts that are none (NaN, negative, not whole, 2^31 or more) raise `NoCount`, if they
    are in single precision and of the law's own shape; else the pass is not taken, and what is no count is not looked for.

    >>> from perturbprob.measurement.counts import CountLaw
    >>> law = CountLaw(torch.zeros(2, 3), torch.ones(3)).to_event(1)
    >>> type(law).__name__, law.log_prob(torch.zeros(2, 3)).shape
    ('FusedCountLaw', torch.Size([2]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, base_dist: "CountLaw") -> None:
        """Keep the law of single counts."""
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape[:-1], base_dist.batch_shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> dist.Distribution:
        """Return the same law over a larger shape; itself, and one pass, where the shape is its own, as in a plate."""
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        return self.base_dist.expand(torch.Size(batch_shape) + self.event_shape).to_event(1)

    @property
    def mean(self) -> Float[Tensor, "cell gene"]:
        """Of each count."""
        return self.base_dist.mean

    @property
    def variance(self) -> Float[Tensor, "cell gene"]:
        """Of each count."""
        return self.base_dist.variance

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw cell gene"]:  # noqa: B008
        """Draw counts."""
        return self.base_dist.sample(sample_shape)

    def log_prob(self, value: Float[Tensor, "... cell gene"]) -> Float[Tensor, "... cell"]:
        """Log-probability of the counts of each cell; counts may be a sparse tensor, which in CSR is not made dense."""
        if value.layout != torch.sparse_csr:
            value = value.to_dense()
        if value.shape != self.base_dist.batch_shape or value.dtype != torch.float32 or value.requires_grad:
            return self.base_dist.log_prob(value.to_dense()).sum(-1)
        rate, law = self.base_dist.rate, self.base_dist
        eta, row = rate.eta, rate.row
        if row is None and eta is not None:
            row = torch.arange(len(eta))
        return _Pass.apply(rate.logits, rate.log_depth, eta, law.dispersion, law.gate, row, rate.softmax, value)


def fits(law: "CountLaw") -> bool:
    """Say whether the compiled pass can be taken: counts of (cell, gene), a θ and a π for each gene, single precision, a CPU, numba."""
    rate, shape = law.rate, law.batch_shape
    if len(shape) != 2 or 0 in shape or rate.logits.shape != shape or rate.log_depth.shape != shape[:1]:
        return False
    if rate.eta is not None and (rate.eta.ndim != 2 or (rate.row is None and rate.eta.shape != shape)):
        return False
    of_genes = [value for value in (law.dispersion, law.gate) if value is not None]
    parts = [part for part in (rate.logits, rate.log_depth, rate.eta) if part is not None] + of_genes
    alike = all(part.is_cpu and part.dtype == torch.float32 for part in parts)
    return alike and all(value.shape == shape[1:] for value in of_genes) and kernel() is not None


def kernel() -> ModuleType | None:
    """Return the compiled pass, None where numba cannot be had."""
    return load("perturbprob.measurement.kernel", "fused", "its count model")


class _Given(NamedTuple):
    """What the pass is given."""

    logits: Float[Tensor, "cell gene"]
    log_depth: Float[Tensor, " cell"]
    eta: Float[Tensor, "row gene"] | None
    theta: Float[Tensor, " gene"] | None
    gate: Float[Tensor, " gene"] | None
    row: Tensor | None
    softmax: bool
    counts: Float[Tensor, "cell gene"]


class _Pass(torch.autograd.Function):
    """Log densities of cells, and the gradients that were computed beside them.

    These are those of the sum over cells. If a later step weighs cells differently, the pass is taken once more with these weights.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Float[Tensor, " cell"]:
        """Take the pass; keep the gradients if any is wanted."""
        ctx.given, wanted = _Given(*given), ctx.needs_input_grad[:5]
        log_prob, ctx.gradients = taken(ctx.given, np.ones(len(given[0]), np.float32), wanted)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Float[Tensor, " cell"]) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weighted sum."""
        gradients, ctx.gradients = ctx.gradients, None  # given away: a second call computes them again
        first = float(weight[0])
        alike = weight.stride(0) == 0 or bool((weight == first).all())  # of a sum over cells each has the same, kept once
        if gradients is None or not alike:
            gradients = taken(ctx.given, _array(weight), ctx.needs_input_grad[:5])[1]
        elif first != 1.0:
            gradients = [None if part is None else part.mul_(first) for part in gradients]
        return (*gradients, None, None, None)


def taken(given: _Given, weight: np.ndarray, wanted: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """Take the pass, in as many threads as torch has; return log densities, and the gradients wanted of their weighted sum."""
    compiled = cast("ModuleType", kernel())
    n_cells, n_genes = given.logits.shape
    rates = _rates(compiled, given)
    law = _law(compiled, given, min(LARGEST_TABLE, max(8, n_cells // 8)))
    counts = _counts(compiled, given.counts)
    n_threads = max(1, min(torch.get_num_threads(), n_cells * n_genes // WORTH_A_THREAD))
    cut = [k * n_cells // n_threads for k in range(n_threads + 1)]
    log_prob, by_depth = np.empty(n_cells, np.float32), np.empty(n_cells, np.float32)
    by_logits = np.empty((n_cells if any(wanted) else 0, n_genes), np.float32)
    by_eta = np.zeros((n_threads, len(given.eta) if wanted[2] and given.eta is not None else 0, n_genes), np.float32)
    by_gene = np.zeros((n_threads, 2, *law.inverse.shape))

    def part(k: int) -> None:
        sums = Sums(weight, log_prob, by_logits, by_depth, by_eta[k], *by_gene[k])
        compiled.fused(cut[k], cut[k + 1], rates, law, counts, sums)

    in_threads(part, n_threads)
    if np.isnan(log_prob).any():
        refuse_what_is_no_count(given.counts)
    of_genes, of_rows = (sums[0] if n_threads == 1 else sums.sum(0) for sums in (by_gene, by_eta))
    gradients = (by_logits, by_depth, of_rows, *of_genes.reshape(2, -1)[:, :n_genes].astype(np.float32))
    return torch.from_numpy(log_prob), [torch.from_numpy(part) if want else None for part, want in zip(gradients, wanted, strict=True)]


def _counts(compiled: ModuleType, counts: Float[Tensor, "cell gene"]) -> Counts:
    """Return counts as the pass takes them: in rows, or sparse where each row has its genes in order, which torch does not ask for."""
    n_genes = counts.shape[1]
    if counts.layout == torch.sparse_csr:
        start, gene = (part.to(torch.int32).numpy() for part in (counts.crow_indices(), counts.col_indices()))
        if compiled.in_order(start, gene, n_genes):
            return Counts(np.empty((0, n_genes), np.float32), start, gene, counts.values().numpy())
    return Counts(_array(counts.to_dense()), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def no_count(values: Float[Tensor, "*plate"]) -> Bool[Tensor, "*plate"]:
    """Say which values are no counts: NaN, negative, not whole, or 2^31 or more."""
    return ~((values >= 0) & (values < 2.0**31) & (values == values.floor()))


def refuse_what_is_no_count(counts: Float[Tensor, "cell gene"]) -> None:
    """Raise `NoCount` if any value is none."""
    counts = counts.to_dense()
    wrong = no_count(counts)
    if wrong.any():
        cell, gene = wrong.nonzero()[0].tolist()
        raise NoCount(
            f"Counts must be whole numbers from 0 to 2^31 - 1; that of cell {cell}, gene {gene} is {float(counts[cell, gene]):g} "
            f"({int(wrong.sum())} of {wrong.numel()} are none). Take raw counts, or model these values as continuous."
        )


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array, contiguous."""
    return tensor.detach().contiguous().numpy()


def _rates(compiled: ModuleType, given: _Given) -> Rates:
    """Return the parts of the log rate as arrays."""
    n_genes = given.logits.shape[1]
    shape = _chunks(compiled, n_genes)
    logits, log_depth, eta, row = _array(given.logits), _array(given.log_depth), np.empty((0, n_genes), np.float32), np.empty(0, np.int64)
    factor = np.empty((0, *shape), np.float32)
    if given.eta is not None and given.row is not None:
        eta, row = _array(given.eta), _array(given.row)
        factor = np.ones((len(eta), shape[0] * shape[1]), np.float32)
        np.exp(eta, out=factor[:, :n_genes])
    return Rates(logits, log_depth, eta, factor.reshape(-1, *shape), row, given.softmax)


def _law(compiled: ModuleType, given: _Given, largest: int) -> Law:
    """Return θ and π as arrays, with the tables up to a count."""
    # θ, 1/θ, π, log(1 − π) and −1/(1 − π), then the two tables
    room = np.empty((2 * largest + 7, *_chunks(compiled, given.logits.shape[1])), np.float32)
    theta, gate = (np.empty(0, np.float32) if value is None else _array(value) for value in (given.theta, given.gate))
    of_theta, of_gate = (part if len(value) else part[:0] for part, value in ((room[0], theta), (room[2], gate)))
    law = Law(of_theta, room[1], of_gate, room[3], room[4], room[5 : 6 + largest], room[6 + largest :])
    compiled.fill(theta, gate, law)
    return law


def _chunks(compiled: ModuleType, n_genes: int) -> tuple[int, int]:
    """Return how many chunks of how many lanes hold the genes."""
    n_chunks = -(-n_genes // compiled.CHUNK)
    return n_chunks, -(-n_genes // (n_chunks * compiled.LANES)) * compiled.LANES
