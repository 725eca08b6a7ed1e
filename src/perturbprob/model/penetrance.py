"""Edited cells that escape: how probably a perturbation hits a cell, and what a cell is if it does not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perturbprob.experiment.action import Protocol
from perturbprob.measurement.log_normal import LogNormal

MOST_EDITS = 4
"""A cell with so many edited genes may be in 2⁴ states; more are refused."""


def ways(protocol: Protocol) -> list[tuple[Protocol, tuple[bool, ...]]]:
    """Return what a cell may have gone through: the protocol without the perturbations that it escaped, and which of them hit it.

    The whole protocol comes first, that of a cell that escaped all last.

    >>> from perturbprob.experiment.action import Knockout, Wait
    >>> ways(Knockout("A") >> Wait(1))
    [(Knockout('A') >> Wait(1), (True,)), (Protocol([Wait(1)]), (False,))]
    """
    done = protocol.perturbations
    if len(done) > MOST_EDITS:
        raise ValueError(
            f"{protocol} edits {len(done)} genes, and penetrance sums over each being hit or not, for at most {MOST_EDITS}. "
            "Leave penetrance out."
        )
    hits = list(product([True, False], repeat=len(done)))
    return [(protocol.without([p for p, there in zip(done, hit, strict=True) if not there]), hit) for hit in hits]


@dataclass(frozen=True)
class Hits:
    """Which way each row of unfolded cells has gone.

    ``of`` is the cell of each row, ``way`` the place of what it went through in `CellTable.protocols`, ``edits`` the number of the π of
    each edit, ``hit`` is 1 where it hit.
    """

    of: Int[Tensor, " row"]
    way: Int[Tensor, " row"]
    edits: Int[Tensor, "row edit"]
    hit: Float[Tensor, "row edit"]

    def __getitem__(self, row: Int[Tensor, " part"]) -> "Hits":
        """Return some of the rows."""
        return Hits(self.of[row], self.way[row], self.edits[row], self.hit[row])


@final
class Penetrance(nn.Module):
    """An edited cell is hit with probability π_p, π_p ~ Beta(2, 1), and has escaped otherwise: it is then a cell without p.

    With ``sgrnas``, the number of the perturbation behind each sgRNA, every sgRNA has a π of its own within its gene,
    π_s ~ Beta(κ π_p, κ (1 − π_p)), log κ ~ Normal(log 10, 0.7). Each hit of a cell is a site ``hit``, summed out outside z.
    """

    zero: Tensor
    behind: Int[Tensor, " sgrna"]

    def __init__(self, n_perturbations: int, sgrnas: Sequence[int] = ()) -> None:
        """Keep how many there are."""
        super().__init__()
        self.n_perturbations = n_perturbations
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        self.register_buffer("behind", torch.tensor(sgrnas, dtype=torch.long), persistent=False)

    @property
    def n(self) -> int:
        """How many π there are: of sgRNAs, then of perturbations."""
        return len(self.behind) + self.n_perturbations

    def forward(self) -> dict[str, Tensor]:
        """Sample π, above the cell plate."""
        two, one = (self.zero.expand(self.n_perturbations) + k for k in (2.0, 1.0))
        sites = {"penetrance": pyro.sample("penetrance", dist.Beta(two, one).to_event(1))}
        if len(self.behind):
            kappa = pyro.sample("penetrance_concentration", LogNormal(self.zero + math.log(10), 0.7))
            mean = sites["penetrance"].clamp(1e-3, 1 - 1e-3)[self.behind]
            sites["sgrna_penetrance"] = pyro.sample("sgrna_penetrance", dist.Beta(kappa * mean, kappa * (1 - mean)).to_event(1))
        return sites

    def law(self, sites: dict[str, Tensor], hits: Hits) -> dist.Distribution:
        """Return the law of being hit by each edit of each cell; an edit of the number of all π is none."""
        parts = [sites[name] for name in ("sgrna_penetrance", "penetrance") if name in sites]
        share = torch.nn.functional.pad(torch.cat(parts).clamp(1e-6, 1 - 1e-6), (0, 1), value=0.5)
        return dist.Bernoulli(share[hits.edits]).mask(hits.edits < self.n).to_event(1)


def fold(value: Float[Tensor, "*draw row"], of: Int[Tensor, " row"]) -> Float[Tensor, "*draw cell"]:
    """Return the log of the sum over the rows of each cell of the exponential of a value.

    >>> fold(torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0, 0, 1]))
    tensor([0.6931, 3.0000])
    """
    shape = (*value.shape[:-1], int(of[-1]) + 1 if len(of) else 0)
    place = of.expand_as(value)
    top = value.new_full(shape, -torch.inf).scatter_reduce(-1, place, value.detach(), "amax")
    return top + value.new_zeros(shape).scatter_add(-1, place, (value - top.gather(-1, place)).exp()).log()


def padded(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "row part"]:
    """Return rows of different lengths as a table, filled up with a value."""
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long).reshape(len(rows), width)
