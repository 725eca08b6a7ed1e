"""η^b: additive batch effects on the log rate that sum to zero over batches (eq 15)."""

import warnings
from typing import final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor


def zero_sum_basis(n: int) -> Float[Tensor, "batch free"]:
    """Return an orthonormal basis of the vectors of length n that sum to zero (Helmert's).

    >>> zero_sum_basis(3).sum(0).abs().max() < 1e-6
    tensor(True)
    """
    basis = torch.zeros(n, n - 1, dtype=torch.float64)
    for k in range(1, n):
        basis[:k, k - 1], basis[k, k - 1] = 1.0, -float(k)
    return (basis / basis.norm(dim=0)).float()


@final
class BatchEffect(PyroModule):
    """η^b per batch and gene: hierarchical over genes, exactly zero-sum over batches, centred over genes by rate.

    log τ_g ~ Normal(log τ, 0.5), log τ ~ Normal(log 0.1, 1), the zero-sum coordinates of η_g ~ Normal(0, τ_g²). The constant over genes
    of a batch is depth, which the size factor holds, so Σ_g share_g η_bg = 0 for every batch. With a single batch η is 0.

    ``share`` is the share of each gene in all counts, shape (gene,).
    """

    def __init__(self, n_batches: int, share: Float[Tensor, " gene"]) -> None:
        """Make the basis; say once that one batch has no batch effect."""
        super().__init__()
        self.n_batches, self.n_genes = n_batches, len(share)
        self.register_buffer("share", share)
        self.register_buffer("basis", zero_sum_basis(n_batches))
        if n_batches == 1:
            warnings.warn(
                "The screen has one batch: its batch effect is fixed to 0. Name the batch column if there are several.", stacklevel=3
            )

    def forward(self) -> Float[Tensor, "batch gene"]:
        """Sample η above the cell plate; the sites are batch_scale_overall, batch_scale, batch_coordinate, batch_effect."""
        if self.n_batches == 1:
            return torch.zeros_like(self.share)[None]
        overall = pyro.sample("batch_scale_overall", dist.LogNormal(torch.tensor(0.1).log().to(self.share), 1.0))
        scale = pyro.sample("batch_scale", dist.LogNormal(overall.log() + torch.zeros_like(self.share), 0.5).to_event(1))
        law = dist.Normal(torch.zeros_like(self.basis[0])[:, None], scale)
        return pyro.deterministic("batch_effect", self.effect(pyro.sample("batch_coordinate", law.to_event(2))), event_dim=2)

    def effect(self, coordinate: Float[Tensor, "free gene"]) -> Float[Tensor, "batch gene"]:
        """Return η from its zero-sum coordinates."""
        return self.centred(self.basis @ coordinate)

    def centred(self, effect: Float[Tensor, "*batch gene"]) -> Float[Tensor, "*batch gene"]:
        """Take out the part that all genes share, which is depth."""
        return effect - (effect * self.share).sum(-1, keepdim=True)

    def new(self, scale: Float[Tensor, " gene"]) -> Float[Tensor, " gene"]:
        """Draw the effect of a batch never seen, Normal(0, τ_g²)."""
        return self.centred(torch.randn_like(scale) * scale)
