"""State to log rate."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn


@final
class Decoder(nn.Module):
    """The expected share of each gene in the counts of a cell, log share = log softmax(network(z) + offset).

    ``offset`` (genes last) holds what acts on genes directly: the bias of each gene, and the condition effects.
    """

    def __init__(self, n_latent: int, n_genes: int, *, n_hidden: int = 128) -> None:
        """Make the network; its last layer has no bias of its own."""
        super().__init__()
        self.network = nn.Sequential(nn.Linear(n_latent, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_genes, bias=False))

    def forward(self, z: Float[Tensor, "*plate latent"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the log share."""
        return torch.log_softmax(self.network(z) + offset, -1)


@final
class LogRate(nn.Module):
    """The state is how far log rates are from those of the median cell, as in gene space: log share = log softmax(z + offset)."""

    def forward(self, z: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the log share."""
        return torch.log_softmax(z + offset, -1)


@final
class Identity(nn.Module):
    """The state is the values themselves, as in gene space: location = z + offset."""

    def forward(self, z: Float[Tensor, "*plate gene"], offset: Float[Tensor, "*#plate gene"]) -> Float[Tensor, "*plate gene"]:
        """Return the location of each value."""
        return z + offset
