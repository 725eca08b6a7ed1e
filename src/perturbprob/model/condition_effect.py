"""What a condition does to single genes beyond what the latent state can carry: shrunken, and a smooth function of time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from perturbprob.experiment.action import Action, Media, Protocol, Wait
from perturbprob.measurement.density import OnLine
from perturbprob.measurement.log_normal import LogNormal

Term = tuple[str, ...]
"""The part of a condition that an effect belongs to: a perturbation, a media, or several of them together."""

_FAR = 1e6  # median waits, beyond any memory: finite, as gradients through infinity are not


@dataclass(frozen=True, order=True)
class Node:
    """One term at one time since it was done, in units of the median wait."""

    term: Term
    time: float


def nodes(protocol: Protocol, time_scale: float = 1.0) -> list[Node]:
    """Return what acts on single genes at the end of a protocol, and since when: each perturbation, the media it ends in, and all together.

    What has just been done, and has not been waited for, has no effect yet and is left out.

    >>> from perturbprob.experiment.action import Knockout, Wait
    >>> for node in nodes(Knockout("A") >> Wait(1) >> Media("TGFB1") >> Wait(2)):
    ...     print(node)
    Node(term=("Knockout('A')",), time=3.0)
    Node(term=("Media('TGFB1')",), time=2.0)
    Node(term=("Knockout('A')", "Media('TGFB1')"), time=2.0)
    """
    since: dict[Action, float] = {}
    for action in protocol:
        if isinstance(action, Wait):
            since = {done: time + action.time for done, time in since.items()}
        else:
            since = {d: t for d, t in since.items() if not (isinstance(d, Media) and isinstance(action, Media))} | {action: 0.0}
    acting = sorted((d for d in since if d != Media()), key=lambda d: (isinstance(d, Media), getattr(d, "gene", "")))
    at = {d: round(since[d] / time_scale, 12) for d in acting}  # sums of waits differ in their last digits
    found = [Node((repr(d),), at[d]) for d in acting]
    if len(acting) > 1:
        found.append(Node(tuple(map(repr, acting)), min(at.values())))
    return [node for node in found if node.time > 0]


def alike(rows: Int[Tensor, "row part"]) -> tuple[Int[Tensor, " kind"], Int[Tensor, " row"]]:
    """Return one row of each kind, and the kind of each row. Column by column: torch's unique of rows takes fifty times as long.

    >>> alike(torch.tensor([[2, 7], [1, 7], [1, 7]]))[1]
    tensor([1, 0, 0])
    """
    kinds = place = rows.new_zeros(len(rows))
    for part in rows.unbind(-1):
        kinds, place = (place * (1 + part.max()) + part).unique(return_inverse=True)
    return torch.zeros_like(kinds).scatter_(0, place, torch.arange(len(rows), device=rows.device)), place


@final
class FromRest(TorchDistribution):
    """An Ornstein-Uhlenbeck path that leaves 0 at time 0, at irregular nodes, for many terms and genes at once.

    x_j = a_j x_{prev(j)} + scale_j √(1 − a_j²) ε, a_j = e^(−gap_j / memory): variance scale² (1 − e^(−2 t / memory)). ``scale`` has shape
    (node, gene); ``previous`` names the node before (the number of nodes where there is none); ``depth`` is how many nodes come
    before it in its own path.
    """

    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        scale: Float[Tensor, "node gene"],
        gap: Float[Tensor, " node"],
        memory: Tensor,
        previous: Int[Tensor, " node"],
        depth: Int[Tensor, " node"],
    ) -> None:
        """Keep the nodes."""
        self.scale, self.previous, self.depth = scale, previous, depth
        self.keep = torch.exp(-gap / memory)[:, None]
        self.innovation = scale * torch.sqrt(-torch.expm1(-2 * gap / memory))[:, None]
        super().__init__(torch.Size(), scale.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "FromRest":
        """Return the law itself: it has no batch shape."""
        return self

    def log_prob(self, value: Float[Tensor, "*draw node gene"]) -> Float[Tensor, "*draw"]:
        """Log-density of whole paths."""
        return dist.Normal(self.expected(value), self.innovation).log_prob(value).sum((-1, -2))

    def on_line(self, value: Float[Tensor, "node gene"]) -> OnLine:
        """Return the normal law of each node given the node before it."""
        return OnLine("itself", value, self.expected(value), self.innovation)

    def expected(self, value: Float[Tensor, "*draw node gene"]) -> Float[Tensor, "*draw node gene"]:
        """Return the mean of each node given the node before it."""
        return self.keep * torch.nn.functional.pad(value, (0, 0, 0, 1))[..., self.previous, :]

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw node gene"]:  # noqa: B008
        """Draw whole paths, node after node."""
        noise = torch.randn(*sample_shape, *self.event_shape, dtype=self.scale.dtype, device=self.scale.device) * self.innovation
        path = torch.nn.functional.pad(torch.zeros_like(noise), (0, 0, 0, 1))
        for level in range(int(self.depth.max()) + 1 if len(self.depth) else 0):
            here = (self.depth == level)[:, None]
            step = self.keep * path[..., self.previous, :] + noise
            path = torch.where(torch.nn.functional.pad(here, (0, 0, 0, 1)), torch.nn.functional.pad(step, (0, 0, 0, 1)), path)
        return path[..., :-1, :]


@final
class ConditionEffect(nn.Module):
    """The effect r of each condition on each gene's log rate that the low-dimensional dynamics does not carry.

    The effect of a condition is the sum over its `nodes`; each term is a path in time that starts at rest,
    r_term(t) ~ OU(0 at t = 0, scale_term · scale_gene · local_term,gene, memory), log scale_term ~ Normal(log 0.05, 1),
    log scale_gene ~ Normal(0, 0.5), log local ~ Normal(0, 1), log memory ~ Normal(0, 0.5) in median waits, or Normal(log ``memory``, 0.1)
    where that is given. Left to itself the memory comes out too short: the guide draws the times of a path independently, and takes
    the spread of each for a step of the path. What is not needed shrinks to 0,
    and the local scale lets the few genes that a perturbation really moves go free; at a time between or beyond those
    measured the path is conditioned on its neighbours, so intervals widen by themselves. The features of a further assay have
    effects of their own in the same way; ``assay`` then comes before the names of the sites.
    """

    gap: Float[Tensor, " node"]
    previous: Int[Tensor, " node"]
    depth: Int[Tensor, " node"]
    term: Int[Tensor, " node"]

    def __init__(self, nodes: Sequence[Node], n_genes: int, assay: str = "", *, memory: float | None = None) -> None:
        """Order the nodes into paths."""
        super().__init__()
        self.given_memory = memory
        self.prefix = f"{assay}_condition" if assay else "condition"
        self.nodes = tuple(sorted(nodes, key=lambda n: (n.term, n.time)))
        self.n_genes = n_genes
        self.terms = tuple(dict.fromkeys(n.term for n in self.nodes))
        self._number = {node: k for k, node in enumerate(self.nodes)}
        self._paths: dict[Term, list[tuple[float, int]]] = {}
        for k, node in enumerate(self.nodes):
            self._paths.setdefault(node.term, []).append((node.time, k))
        follows = [k > 0 and self.nodes[k - 1].term == n.term for k, n in enumerate(self.nodes)]
        depth: list[int] = []
        for chained in follows:
            depth.append(depth[-1] + 1 if chained else 0)
        gap = [n.time - (self.nodes[k - 1].time if follows[k] else 0.0) for k, n in enumerate(self.nodes)]
        self.register_buffer("gap", torch.tensor(gap, dtype=torch.float32).clamp(min=1e-6), persistent=False)
        self.register_buffer(
            "previous", torch.tensor([k - 1 if c else len(gap) for k, c in enumerate(follows)], dtype=torch.long), persistent=False
        )
        self.register_buffer("depth", torch.tensor(depth, dtype=torch.long), persistent=False)
        self.register_buffer("term", torch.tensor([self.terms.index(n.term) for n in self.nodes], dtype=torch.long), persistent=False)

    def forward(self) -> dict[str, Tensor]:
        """Sample the paths, one row per node, with their scales and memory, above the cell plate."""
        if not self.nodes:
            return {f"{self.prefix}_effect": self.gap.new_zeros(0, self.n_genes)}
        zero, genes = self.gap.new_zeros(len(self.terms)), self.gap.new_zeros(self.n_genes)
        laws = {
            "scale": LogNormal(zero - 3.0, 1.0).to_event(1),
            "gene_scale": LogNormal(genes, 0.5).to_event(1),
            "memory": self._memory(),
            "local_scale": LogNormal(zero[:, None] + genes, 1.0).to_event(2),
        }
        sites = {(name := f"{self.prefix}_{part}"): pyro.sample(name, law) for part, law in laws.items()}
        return sites | {(name := f"{self.prefix}_effect"): pyro.sample(name, self.law(sites))}

    def _memory(self) -> LogNormal:
        """Return the prior of the memory: wide around a median wait, or narrow around what was given."""
        known = self.given_memory
        return LogNormal(self.gap.new_tensor(0.0 if known is None else math.log(known)), 0.5 if known is None else 0.1)

    def law(self, sites: dict[str, Tensor]) -> FromRest:
        """Return the prior of all paths given their scales and memory."""
        of_term, of_gene, local = (sites[f"{self.prefix}_{part}"] for part in ("scale", "gene_scale", "local_scale"))
        scale = of_term[:, None] * of_gene * local
        return FromRest(scale[self.term], self.gap, sites[f"{self.prefix}_memory"], self.previous, self.depth)

    def parts(self, protocol: Protocol, time_scale: float) -> list[Node]:
        """Return the nodes that add up in a condition; none where the model has no condition effects at all."""
        return nodes(protocol, time_scale) if self.nodes else []

    def rows(self, conditions: Sequence[Sequence[Node]], extra: Sequence[Node] = ()) -> Int[Tensor, "condition part"]:
        """Return the numbers of each condition's nodes, ``extra`` nodes behind the model's own; padded with the number of all."""
        number = self._number | {node: len(self.nodes) + k for k, node in enumerate(extra)}
        width = max(map(len, conditions), default=0)
        rows = [[number[node] for node in part] + [len(number)] * (width - len(part)) for part in conditions]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)

    def unknown(self, conditions: Sequence[Sequence[Node]]) -> list[Node]:
        """Return the nodes of conditions that were not measured."""
        return [node for node in dict.fromkeys(n for part in conditions for n in part) if node not in self._number]

    def total(
        self, effect: Float[Tensor, "node gene"], rows: Int[Tensor, "condition part"], bias: Float[Tensor, " gene"] | None = None
    ) -> Float[Tensor, "condition gene"]:
        """Add up the effects of each condition's nodes, and a bias, once for rows that are alike."""
        bias = effect.new_zeros(effect.shape[-1]) if bias is None else bias
        if not rows.numel():
            return bias.expand(len(rows), -1)
        one, place = alike(rows)
        return (bias + torch.nn.functional.pad(effect, (0, 0, 0, 1))[rows[one]].sum(-2)).index_select(0, place)

    def completed(self, sites: dict[str, Tensor], extra: Sequence[Node]) -> dict[str, Tensor]:
        """Return one draw of the global sites with a draw of the effects of ``extra`` nodes behind the others."""
        if not extra:
            return sites
        name = f"{self.prefix}_effect"
        return sites | {name: torch.cat([sites[name], self.extended(sites, extra)])}

    def expected(self, sites: dict[str, Tensor], nodes: Sequence[Node]) -> Float[Tensor, "extra gene"]:
        """Return the mean of nodes given one draw of those that were measured, without a random draw; of a measured node, its value.

        Between two nodes the OU bridge, (x₁ sinh((t₂ − t) / memory) + x₂ sinh((t − t₁) / memory)) / sinh((t₂ − t₁) / memory), with 0 at
        time 0 for the first; behind the last node e^(−gap / memory) times it; of a term never seen, 0.
        """
        if not nodes:
            return self.gap.new_zeros(0, self.n_genes)
        found = [self._neighbours(node) for node in nodes]
        before, after = (torch.tensor(rows, device=self.gap.device) for rows in zip(*(rows for rows, _ in found), strict=True))
        ahead, behind = self.gap.new_tensor([gaps for _, gaps in found]).T / sites[f"{self.prefix}_memory"]
        width = torch.expm1(-2 * (ahead + behind))
        share_behind = torch.exp(-behind) * torch.expm1(-2 * ahead) / width
        share_ahead = torch.exp(-ahead) * torch.expm1(-2 * behind) / width
        effect = torch.nn.functional.pad(sites[f"{self.prefix}_effect"], (0, 0, 0, 1))
        return share_behind[:, None] * effect[before] + share_ahead[:, None] * effect[after]

    def _neighbours(self, node: Node) -> tuple[tuple[int, int], tuple[float, float]]:
        """Return the last node up to this one and the first behind it, the number of all where there is none, and the gaps to both."""
        own = self._paths.get(node.term, [])
        earlier = max((pair for pair in own if pair[0] <= node.time), default=(0.0, len(self.nodes)))
        later = min((pair for pair in own if pair[0] > node.time), default=(node.time + _FAR, len(self.nodes)))
        return (earlier[1], later[1]), (later[0] - node.time, node.time - earlier[0])

    def extended(self, sites: dict[str, Tensor], nodes: Sequence[Node]) -> Float[Tensor, "extra gene"]:
        """Draw the effect of nodes that were not measured, given one draw of those that were.

        A term seen at other times is an OU bridge, or the free path behind its last node; a term never seen is drawn from the
        prior with the median scale over terms.
        """
        rows = [self._draw(sites, term, [n.time for n in nodes if n.term == term]) for term in dict.fromkeys(n.term for n in nodes)]
        drawn = dict(zip((n for t in dict.fromkeys(n.term for n in nodes) for n in nodes if n.term == t), torch.cat(rows), strict=True))
        return torch.stack([drawn[n] for n in nodes])

    def _draw(self, sites: dict[str, Tensor], term: Term, times: Sequence[float]) -> Float[Tensor, "extra gene"]:
        """Draw one term's path at new times from the Gaussian law conditioned on its own nodes."""
        own = [k for k, n in enumerate(self.nodes) if n.term == term]
        if f"{self.prefix}_scale" not in sites:
            return self.gap.new_zeros(len(times), self.n_genes)
        scales = sites[f"{self.prefix}_scale"]
        number = self.terms.index(term) if own else -1
        local = sites[f"{self.prefix}_local_scale"][number] if own else torch.randn(self.n_genes).to(scales).exp()
        scale = (scales[number] if own else scales.median()) * sites[f"{self.prefix}_gene_scale"] * local
        at = torch.tensor([*(self.nodes[k].time for k in own), *times], dtype=torch.float64)
        memory, n = sites[f"{self.prefix}_memory"].double().cpu(), len(own)
        kernel = torch.exp(-(at[:, None] - at).abs() / memory) - torch.exp(-(at[:, None] + at) / memory)
        gain = torch.linalg.solve(kernel[:n, :n] + 1e-9 * torch.eye(n, dtype=at.dtype), kernel[:n, n:]).T
        spread = kernel[n:, n:] - gain @ kernel[:n, n:]
        values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
        root = (vectors * values.clamp(min=0).sqrt()).to(scale)
        known = sites[f"{self.prefix}_effect"][own] if own else scale.new_zeros(0, self.n_genes)
        return gain.to(scale) @ known + (root @ torch.randn(len(times), self.n_genes).to(scale)) * scale
