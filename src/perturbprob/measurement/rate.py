"""The log rate of counts in its parts: what a cell's depth, its expected shares, and its batch add up to."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from pyro.ops.indexing import Vindex
from torch import Tensor


@final
@dataclass(frozen=True)
class Rate:
    """log rate = log ℓ_c + log softmax(logits_c) + η_c, not yet added up (eq 15).

    Main arguments: ``logits``, which are log shares themselves without ``softmax``, and ``log_depth``, log ℓ. ``eta`` is η of each cell, or
    with ``row`` a table of which each cell reads one row (−1: none, 0); without it η is 0. The parts broadcast, genes last.

    >>> rate = Rate(torch.zeros(1, 4), torch.tensor([4.0]).log(), torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([0]))
    >>> rate.log
    tensor([[0., 0., 0., 1.]])
    """

    logits: Float[Tensor, "*plate cell gene"]
    log_depth: Float[Tensor, "*#plate cell"]
    eta: Float[Tensor, "... gene"] | None = None
    row: Int[Tensor, " cell"] | None = None
    softmax: bool = True

    @property
    def shape(self) -> torch.Size:
        """The shape of the log rate."""
        if self.logits.shape[:-1] == self.log_depth.shape and (self.eta is None or (self.row is not None and self.eta.ndim == 2)):
            return self.logits.shape  # as in a minibatch; to broadcast shapes takes longer than one would think
        parts = [self.logits.shape, (*self.log_depth.shape, 1)]
        if self.eta is not None:
            parts.append(self.eta.shape if self.row is None else (*self.eta.shape[:-2], *self.row.shape, self.eta.shape[-1]))
        return torch.broadcast_shapes(*parts)

    @cached_property
    def log(self) -> Float[Tensor, "*plate cell gene"]:
        """The log rate."""
        share = torch.log_softmax(self.logits, -1) if self.softmax else self.logits
        if self.eta is None:
            return self.log_depth[..., None] + share
        return self.log_depth[..., None] + share + (self.eta if self.row is None else rows(self.eta, self.row))


def rows(table: Float[Tensor, "*draw row gene"], row: Int[Tensor, " cell"]) -> Float[Tensor, "*eta cell gene"]:
    """Return the row of each cell; −1 reads 0. Draws in front broadcast against the cells (Vindex)."""
    padded = torch.nn.functional.pad(table, (0, 0, 0, 1))
    if table.ndim == 2:  # the backward pass of a selection is many times faster than that of an indexing
        return padded.index_select(0, torch.where(row < 0, len(table), row))
    return Vindex(padded)[..., row, :]
