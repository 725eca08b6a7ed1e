"""State to log rate."""

from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

TAIL = 4.0
"""Degrees of freedom of the law of how far genes vary: of a few that vary far more than others hardly anything is taken away."""


def normal_points(n_latent: int, n: int = 64) -> Float[Tensor, "point latent"]:
    """Return the points of Normal(0, I), the same each time, that tell how much a network moves its genes."""
    uniform = SobolEngine(n_latent, scramble=True, seed=0).draw(n).clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(uniform)


def log_prior(network: nn.Sequential, z: Float[Tensor, "point latent"]) -> Float[Tensor, ""]:
    """Return the log density of how far the log rates of a network without a last bias vary over states z, without its constant.

    The standard deviation √V_g of each gene is half-t with ν = 4 around the scale of all, s² = mean V,

        log p = −(ν + 1) / 2 Σ_g log(1 + V_g / (ν s²)).

    It is little, and says something only where the counts do not: of genes with hardly a count, which would else fit the noise of theirs.
    """
    *first, last = network  # linear: of deviations from the mean it makes those of the genes
    hidden = nn.Sequential(*first)(z)
    variance = last(hidden - hidden.mean(0)).square().mean(0)
    share = variance / (TAIL * variance.detach().mean().clamp(min=1e-12))
    return -(TAIL + 1) / 2 * torch.log1p(share).sum()


@final
class Decoder(nn.Module):
    """The expected share of each gene in the counts of a cell, log share = log softmax(network(z) + offset).

    ``offset`` (genes last) holds what acts on genes directly: the bias of each gene, and the condition effects.
    """

    points: Tensor

    def __init__(self, n_latent: int, n_genes: int, *, n_hidden: int = 128) -> None:
        """Make the network; its last layer has no bias of its own."""
        super().__init__()
        self.network = nn.Sequential(nn.Linear(n_latent, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_genes, bias=False))
        self.register_buffer("points", normal_points(n_latent), persistent=False)

    def forward(self, z: Float[Tensor, "*plate latent"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the log share."""
        return torch.log_softmax(self.logits(z, offset), -1)

    def logits(self, z: Float[Tensor, "*plate latent"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return what the shares are a softmax of."""
        if z.ndim == offset.ndim == 2:  # a minibatch: added up by the product itself
            *first, last = self.network
            return torch.addmm(offset, nn.Sequential(*first)(z), cast("nn.Linear", last).weight.mT)
        return self.network(z) + offset


@final
class LogRate(nn.Module):
    """The state is how far log rates are from those of the median cell, as in gene space: log share = log softmax(z + offset)."""

    def forward(self, z: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the log share."""
        return torch.log_softmax(self.logits(z, offset), -1)

    def logits(self, z: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return what the shares are a softmax of."""
        return z + offset


@final
class Identity(nn.Module):
    """The state is the values themselves, as in gene space: location = z + offset."""

    def forward(self, z: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the location of each value."""
        return z + offset


@final
class Log1p(nn.Module):
    """The state is log(1 + count at size factor 1), less its level in control, per standard deviation.

    share = (exp(y) − 1) / depth, y = log(1 + depth · exp(offset)) + scale ⊙ z, not below 0. ``offset`` is the log share of each gene at
    z = 0, ``log_depth`` the log of the depth at size factor 1. Nothing is normalised over genes, so counts become states and states
    counts without loss.
    """

    scale: Tensor

    def __init__(self, n_genes: int, log_depth: float) -> None:
        """Start at a scale of 1; `CellModel`'s fit puts in that of the cells."""
        super().__init__()
        self.log_depth = log_depth
        self.register_buffer("scale", torch.ones(n_genes))

    def forward(self, z: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the log share."""
        return torch.expm1((self._level(offset) + self.scale * z).clamp(min=1e-6)).log() - self.log_depth

    def state(self, counts: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the state of cells from their counts over size factors."""
        return (torch.log1p(counts) - self._level(offset)) / self.scale

    def _level(self, offset: Float[Tensor, "*plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return log(1 + count) at z = 0."""
        return torch.log1p(torch.exp(offset + self.log_depth))
