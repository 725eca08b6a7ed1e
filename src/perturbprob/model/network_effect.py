"""A sparse signed network over genes with a posterior, and what perturbations do to the product of their own gene."""

from dataclasses import replace
from typing import final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.dynamics.causal_context import NetworkEffects
from perturbprob.experiment.vocabulary import Vocabulary
from perturbprob.measurement.log_normal import LogNormal
from perturbprob.model.mark_effect import MarkEffect, sample_gate


@final
class GatedNetwork(nn.Module):
    """W = gate · slab for each regulator of each gene but itself, a relaxed spike and slab.

    slab ~ Normal(0, s²), log s ~ Normal(−0.7, 0.7); gate = sigmoid(u / λ), u ~ Logistic(logit π, 1), λ = 0.2; π ~ Beta(1, 9) is the
    share of edges.
    """

    zero: Tensor
    others: Float[Tensor, "gene gene"]

    def __init__(self, n_genes: int) -> None:
        """Leave the diagonal out."""
        super().__init__()
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        self.register_buffer("others", 1 - torch.eye(n_genes), persistent=False)

    def forward(self) -> dict[str, Tensor]:
        """Sample gates, slabs and their product."""
        share = pyro.sample("edge_inclusion", dist.Beta(self.zero + 1.0, self.zero + 9.0))
        gate = sample_gate("edge_gate_logit", share, self.others.shape)
        scale = pyro.sample("edge_scale", LogNormal(self.zero - 0.7, 0.7))
        slab = pyro.sample("edge_slab", dist.Normal(torch.zeros_like(self.others), scale).to_event(2))
        found = {"edge_gate": gate * self.others, "network": gate * slab * self.others}
        return {name: pyro.deterministic(name, value, event_dim=2) for name, value in found.items()}


@final
class LaplaceNetwork(nn.Module):
    """W ~ Laplace(0, ``scale``) for each regulator of each gene but itself: at the mode of its law weights are as by the lasso."""

    others: Float[Tensor, "gene gene"]

    def __init__(self, n_genes: int, scale: float) -> None:
        """Leave the diagonal out."""
        super().__init__()
        self.scale = scale
        self.register_buffer("others", 1 - torch.eye(n_genes), persistent=False)

    def forward(self) -> dict[str, Tensor]:
        """Sample the weights."""
        weight = pyro.sample("edge_weight", dist.Laplace(torch.zeros_like(self.others), self.scale).to_event(2))
        return {"network": pyro.deterministic("network", weight * self.others, event_dim=2)}


@final
class NetworkEffect(MarkEffect):
    """A network W over genes, and each perturbation on its own gene alone.

    ``network`` samples W, by default as `GatedNetwork`. × takes all product of its gene away; ↓ a share ~ Beta(2, 2) (site
    ``interference_strength``), ↑ adds ~ LogNormal(0, 0.7) of the product at rest (``activation_strength``). What a perturbation adds to
    the transcript of its own gene is ``perturbation_own`` ~ Normal(0, s_p²); media act on every gene. What a gene does to itself is
    not told apart from its decay, and left out.
    """

    own: Float[Tensor, "perturbation gene"]

    def __init__(self, vocabulary: Vocabulary, network: GatedNetwork | LaplaceNetwork | None = None) -> None:
        """Place each perturbation on its gene; raises ValueError where a perturbed gene is no gene of the state."""
        super().__init__(vocabulary, len(vocabulary.genes))
        self.vocabulary = vocabulary
        place = {gene: k for k, gene in enumerate(vocabulary.genes)}
        if outside := sorted({p.gene for p in vocabulary.perturbations if p.gene not in place}):
            raise ValueError(
                f"{len(outside)} perturbed genes are not among the {len(place):,} genes of the screen: {', '.join(outside[:5])}. A network "
                "over genes needs them in its state: keep these genes when selecting, or use node, which does not."
            )
        own = torch.zeros(len(vocabulary.perturbations), len(place))
        for row, p in enumerate(vocabulary.perturbations):
            own[row, place[p.gene]] = 1
        self.register_buffer("own", own, persistent=False)
        self.network = GatedNetwork(len(place)) if network is None else network
        self.rows = {s: [k for k, p in enumerate(vocabulary.perturbations) if p.symbol == s] for s in "×↓↑"}

    def forward(self) -> dict[str, Tensor]:
        """Sample the network beside the effects of media and perturbations."""
        return self.network() | super().forward()

    def effects(self, kind: str, scale: Tensor) -> dict[str, Tensor]:
        """Sample what media add to each gene; or what perturbations add to their own, and how strong they are."""
        if kind == "media":
            return {"media_effect": pyro.sample("media_effect", dist.Normal(torch.zeros_like(scale), scale).to_event(2))}
        found = {"perturbation_own": pyro.sample("perturbation_own", dist.Normal(torch.zeros_like(scale[:, 0]), scale[:, 0]).to_event(1))}
        two = self.zero + 2.0
        laws = {"interference": ("↓", dist.Beta(two, two)), "activation": ("↑", LogNormal(self.zero, 0.7))}
        for name, (symbol, law) in laws.items():
            if n := len(self.rows[symbol]):
                site = f"{name}_strength"
                found[site] = pyro.sample(site, law.expand([n]).to_event(1))
        return found

    def completed(self, sites: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one draw of the global sites with what perturbations behind those of the sites do: nothing to their own transcript.

        How strong ↓ and ↑ are is drawn from the prior. What is done to the transcript has 0 for the centre of its prior; a draw would
        move the shares of all genes, and set a perturbation back that was never done for that alone.
        """
        asked = self.vocabulary.perturbations[len(sites.get("perturbation_own", ())) :]
        if not asked:
            return sites
        drawn = MarkEffect.forward(NetworkEffect(replace(self.vocabulary, perturbations=asked, media=())))
        drawn["perturbation_own"] = torch.zeros(len(asked))
        return sites | {name: torch.cat([sites.get(name, value[:0]), value.to(self.own)]) for name, value in drawn.items()}

    def pushes(self, sites: dict[str, Tensor]) -> NetworkEffects:
        """Return the network and what the marks do."""
        network = sites["network"]
        shape = (*network.shape[:-2], len(self.own))
        lost, gained = network.new_zeros(shape), network.new_zeros(shape)
        lost[..., self.rows["×"]] = 1.0
        if self.rows["↓"]:
            lost[..., self.rows["↓"]] = sites["interference_strength"]
        if self.rows["↑"]:
            gained[..., self.rows["↑"]] = sites["activation_strength"]
        transcript = sites.get("perturbation_own", network.new_zeros(0))
        media = sites.get("media_effect", network.new_zeros(0, self.n_latent))
        own = (part[..., None] * self.own for part in (transcript, lost, gained))
        at_own, lost, gained = own
        return NetworkEffects(at_own, media, network, lost, gained)
