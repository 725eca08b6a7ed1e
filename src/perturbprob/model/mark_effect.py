"""What each perturbation and each media adds to the push on the latent state: shrunken, or sparse."""

from abc import abstractmethod
from typing import final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from perturbprob.dynamics.transition import Effects
from perturbprob.experiment.vocabulary import Vocabulary
from perturbprob.measurement.log_normal import LogNormal

TEMPERATURE = 0.2
"""How far gates are from being 0 or 1: at 0.2 a gate of even odds is outside 0.2 to 0.8 with probability 0.86."""


def sample_gate(name: str, share: Tensor, shape: torch.Size) -> Tensor:
    """Sample gates of a relaxed Bernoulli(π) at temperature λ: gate = sigmoid(u / λ), u ~ Logistic(logit π, 1), the site ``name``."""
    law = dist.Logistic(torch.logit(share).expand(shape), 1.0)
    return torch.sigmoid(pyro.sample(name, law.to_event(len(shape))) / TEMPERATURE)


class MarkEffect(nn.Module):
    """The effects e_p of perturbations and e_m of media, sites ``perturbation_effect`` and ``media_effect``, (name, latent).

    Each has a scale of its own, log s ~ Normal(−0.7, 0.7). Abstract: `ShrunkEffect` or `SparseEffect` gives the effects of one kind.
    """

    zero: Tensor

    def __init__(self, vocabulary: Vocabulary, n_latent: int) -> None:
        """Count the names of each kind."""
        super().__init__()
        self.numbers = {"perturbation": len(vocabulary.perturbations), "media": len(vocabulary.media)}
        self.n_latent = n_latent
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self) -> dict[str, Tensor]:
        """Sample the effects of each kind, above the cell plate."""
        sites: dict[str, Tensor] = {}
        for kind, n in self.numbers.items():
            if n:
                scale = pyro.sample(f"{kind}_scale", LogNormal(self.zero.expand(n) - 0.7, 0.7).to_event(1))
                sites |= self.effects(kind, scale[:, None].expand(-1, self.n_latent))
        return sites

    def pushes(self, sites: dict[str, Tensor]) -> Effects:
        """Return what one draw of the marks adds to the push, in the words of the transition."""
        none = self.zero.new_zeros(0, self.n_latent)
        return Effects(sites.get("perturbation_effect", none), sites.get("media_effect", none))

    def completed(self, sites: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one draw of the global sites with a draw of whatever marks were not measured; here all were."""
        return sites

    @abstractmethod
    def effects(self, kind: str, scale: Tensor) -> dict[str, Tensor]:
        """Sample the effects of one kind, given their scale (name, latent)."""


@final
class ShrunkEffect(MarkEffect):
    """e ~ Normal(0, s²) on every latent axis."""

    def effects(self, kind: str, scale: Tensor) -> dict[str, Tensor]:
        """Sample them."""
        name = f"{kind}_effect"
        return {name: pyro.sample(name, dist.Normal(torch.zeros_like(scale), scale).to_event(2))}


@final
class SparseEffect(MarkEffect):
    """e = gate · slab: each perturbation shifts few axes (sparse additive mechanism shifts; relaxed spike and slab).

    slab ~ Normal(0, s²); gate = sigmoid(u / λ), u ~ Logistic(logit π, 1), which is a relaxed Bernoulli(π) at temperature λ = 0.2;
    π ~ Beta(1, 4) for each kind. The posterior of a gate says how probably a mark acts on an axis.
    """

    def effects(self, kind: str, scale: Tensor) -> dict[str, Tensor]:
        """Sample gates and slabs, and return their product."""
        share = pyro.sample(f"{kind}_inclusion", dist.Beta(self.zero + 1.0, self.zero + 4.0))
        gate = sample_gate(f"{kind}_gate_logit", share, scale.shape)
        slab = pyro.sample(f"{kind}_slab", dist.Normal(torch.zeros_like(scale), scale).to_event(2))
        found = {f"{kind}_gate": gate, f"{kind}_effect": gate * slab}
        return {name: pyro.deterministic(name, value, event_dim=2) for name, value in found.items()}
