"""The variational family: an encoder for cells, and one law over what all cells share."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast, final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbprob.experiment.moments import membership
from perturbprob.experiment.store import StoredCounts, blocks
from perturbprob.experiment.vocabulary import Segment
from perturbprob.measurement.log_normal import LogNormal
from perturbprob.measurement.logit_normal import LogitNormal
from perturbprob.model.cell_model import CellModel
from perturbprob.model.cells import Cells
from perturbprob.model.condition_effect import FromRest
from perturbprob.model.overdispersion import Overdispersion
from perturbprob.model.pushed_normal import PushedNormal
from perturbprob.model.sparse_input import first_layer, log_relative
from perturbprob.model.start import batch_start

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

GENE_BLOCK, CONDITIONS = ("gene_bias", "batch_coordinate", "batch_media_coordinate"), "condition_effect"
SPREAD = 0.67
"""About how far, in log, dispersions of genes are from each other before anything is seen."""
LARGEST_BLOCK = 20_000_000
"""Beyond so many numbers the block of each gene is kept without its covariances."""


@final
class Encoder(nn.Module):
    """V⁻¹: the law of a cell's rest state z₀ given its counts, its protocol and its batch."""

    def __init__(self, n_genes: int, n_context: int, rest_size: int, *, n_hidden: int = 128) -> None:
        """Make the network; ``n_context`` is the width of what is known of a cell beside its counts."""
        super().__init__()
        self.network = nn.Sequential(nn.Linear(n_genes + n_context, n_hidden), nn.ReLU(), nn.Linear(n_hidden, 2 * rest_size))

    def forward(self, log_counts: Float[Tensor, "*plate cell gene"], context: Float[Tensor, "*plate cell context"]) -> dist.Distribution:
        """Return a normal law for each cell; ``log_counts`` may be sparse (CSR)."""
        if log_counts.layout == torch.sparse_csr:
            first, squash, last = cast("tuple[nn.Linear, nn.ReLU, nn.Linear]", tuple(self.network))
            hidden = last(squash(first_layer(first, log_counts, context)))
        else:
            hidden = self.network(torch.cat([log_counts, context], -1))
        loc, scale = hidden.chunk(2, -1)
        return dist.Normal(loc, softplus(scale) + 1e-3)


@final
class TiedNormal(dist.Normal):
    """Independent normal laws whose rows of one cell are drawn with the same noise.

    With noise of their own the average over the ways that a cell may have gone would be the better the more ways it averages, and say
    that half of all cells escape where nothing can be told.
    """

    def __init__(self, law: dist.Normal, of: Int[Tensor, " row"]) -> None:
        """Keep the cell of each row."""
        super().__init__(law.loc, law.scale, validate_args=False)
        self.of = of

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "TiedNormal":
        """Return the same law over a larger shape."""
        return TiedNormal(dist.Normal(self.loc.expand(batch_shape), self.scale.expand(batch_shape)), self.of)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Float[Tensor, "*draw row latent"]:
        """Draw all rows."""
        noise = self.loc.new_empty(*sample_shape, int(self.of.max()) + 1, self.loc.shape[-1]).normal_()
        return self.loc + self.scale * noise[..., self.of, :]

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Float[Tensor, "*draw row latent"]:
        """Draw all rows, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)


@final
class Guide(nn.Module):
    """q over everything that a `CellModel` samples.

    Global sites are sampled in three steps, so that what the data tie together stays together:

    1. scales, dispersion, gate, latent effects: independent normal laws on the unconstrained line;
    2. for each gene, its bias and its batch effects (and those by media) together: a normal law with full covariance;
    3. condition effects given these: r = μ − w ⊙ (what the batches of those cells carry − its mean) + σ ε. The counts fix the
       sum of bias, η and r, so where one goes up the other comes down; independent laws are then too narrow (intervals for fold
       changes and η covered 0.55-0.79 instead of 0.9 in a trial with unequal batches).

    The rest state of each cell comes from the `Encoder`, as wide as the model asks; with ``encodes=False`` there is none, and `rest`
    says so. ``node_design`` (node, block) is the mean over the cells of a condition-effect node of `BatchEffect.design`, how bias and
    batch effects of a gene add up in a cell.
    """

    known_start: Float[Tensor, " latent"] | None
    encoder: Encoder
    node_design: Float[Tensor, "node block"]
    block_loc: nn.Parameter
    dispersion_loc: nn.Parameter
    dispersion_log_scale: nn.Parameter

    def __init__(self, model: CellModel, node_design: Float[Tensor, "node block"], *, encodes: bool = True) -> None:
        """Make one set of parameters for each global site that the model samples."""
        super().__init__()
        names = model.vocabulary
        self.n_batches = model.batch_effect.n_batches
        n_context = len(names.perturbations) + len(names.media) + 1 + self.n_batches
        if model.assays:  # each assay's counts, and of each, RNA too, whether it is missing
            n_context += 1 + sum(len(head.features) + 1 for head in model.assays.values())
        self.register_buffer("known_start", model.start)
        self.encodes = encodes and model.start is None
        if self.encodes:
            self.encoder = Encoder(len(names.genes), n_context, model.rest_size, n_hidden=model.n_hidden)
        self.register_buffer("node_design", node_design)
        with torch.random.fork_rng():
            trace = pyro.poutine.trace(model.globals).get_trace()
        sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
        self.blocked = {name: sites[name]["value"].shape[:-1] for name in GENE_BLOCK if name in sites and "gene_bias" in sites}
        self.independent = [name for name in sites if name not in (*self.blocked, CONDITIONS)]
        self.support = {name: _of_one(sites[name]["fn"].support) for name in self.independent}
        self.alike: dict[Any, list[str]] = {}
        for name in self.independent:
            kind = Overdispersion if name.endswith("dispersion") else self.support[name]
            self.alike.setdefault(kind, []).append(name)
        for name in self.independent:
            start, width = self.transform(name).inv(_middle(sites[name])).clone(), -2.3
            if name.endswith("gate_logit"):  # somewhat closed: a gate that starts open leaves it to its slab to close the way
                start, width = torch.full_like(start, -1.0), -1.0
            elif name.endswith("penetrance"):  # the mean and the standard deviation of logit π under Beta(2, 1)
                start, width = torch.ones_like(start), 0.41
            setattr(self, f"{name}_loc", nn.Parameter(start))
            setattr(self, f"{name}_log_scale", nn.Parameter(torch.full_like(start, width)))
        if self.blocked:
            self._start_block(model)
        shape = (len(node_design), len(names.genes))
        self.condition_loc = nn.Parameter(torch.zeros(shape))
        self.condition_log_scale = nn.Parameter(torch.full(shape, -3.0))
        self.condition_weight = nn.Parameter(torch.zeros(shape))

    def transform(self, name: str) -> dist.transforms.Transform:
        """Return how the unconstrained line, on which a site's law is normal, becomes its values, number by number."""
        return Overdispersion(cache_size=1) if name.endswith("dispersion") else dist.transforms.biject_to(self.support[name])

    def _start_block(self, model: CellModel) -> None:
        """Start every gene's block at its log share and no batch effect, nearly sure."""
        n_genes, size = len(model.vocabulary.genes), self.node_design.shape[1]
        start = torch.zeros(n_genes, size)
        start[:, 0] = model.log_share
        self.block_loc = nn.Parameter(start)
        self.block_log_scale = nn.Parameter(torch.full((n_genes, size), -3.5))
        self.block_lower = nn.Parameter(torch.zeros(n_genes, size, size)) if n_genes * size**2 <= LARGEST_BLOCK else None

    @torch.no_grad()
    def start(self, model: CellModel, screen: "Screen") -> None:
        """Start widths, and the dispersion, where the counts will put them, so that a short training need not move them far.

        n cells with S counts of a gene carry about S / (1 + S / n) of information on its log rate at a dispersion of 1, and the prior
        about that of a standard deviation of 0.1; on the log of a dispersion θ they carry about n / 2 (μ / (μ + θ))² at a mean μ.
        """
        screen, prior = screen.with_rna, 100.0
        self._start_batches(model, screen)
        if "dispersion" in self.support:
            mean, theta = _moments(screen)
            self.dispersion_loc.copy_(Overdispersion().inv(theta))
            width = (screen.n_cells / 2 * (mean / (mean + theta)).square() + 0.5).rsqrt()  # of log θ
            width = width / (theta * -torch.expm1(-20 / theta))
            # of genes with hardly a count it would reach far into the Poisson law: six deviations stop at u = −4 (Overdispersion), beyond
            # which exp(20 u) is 0 in single precision and no gradient leads back
            self.dispersion_log_scale.copy_(width.minimum((self.dispersion_loc.cpu() + 4) / 6).log())
        by_condition = _information(screen.counts, screen.condition, len(screen.conditions))
        self.condition_log_scale.copy_(-0.5 * (_members(model, screen) @ by_condition + prior).log())

    def _start_batches(self, model: CellModel, screen: "Screen") -> None:
        """Start bias and batch effects at a regression of the means of cells of each condition in each batch, and their scales with them.

        From 0 the encoder would find large batch effects sooner than they do, and take them for states of the cells.
        """
        design, group, condition = _groups(model, screen)
        information, free = _information(screen.counts, group, len(design)), design[:, 1:]
        kinds = {name: shape.numel() for name, shape in self.blocked.items() if name != "gene_bias"}
        scale = dict.fromkeys(kinds, 0.1)
        if self.block_lower is not None and kinds:
            log_mean = _log_means(screen, group, len(design))
            loc, scale = batch_start(free, torch.as_tensor(condition), log_mean, information, kinds)
            bias = ((information * (log_mean - free @ loc.T)).sum(0) + model.log_share.cpu()) / (information.sum(0) + 1)
            self.block_loc.copy_(torch.cat([bias[:, None], loc], 1))
        for name, value in scale.items():
            for site in (name.replace("coordinate", "scale"), name.replace("coordinate", "scale_overall")):
                self.get_parameter(f"{site}_loc").fill_(math.log(value))
        prior = torch.cat([torch.ones(1), *(torch.full((n,), scale[name] ** -2) for name, n in kinds.items())])
        self.block_log_scale.copy_(-0.5 * (design.square().T @ information + prior[:, None]).T.log())

    @property
    def held(self) -> list[str]:
        """Return the names of the parameters that `hold` keeps."""
        return [name for name, _ in self.named_parameters() if name.startswith("dispersion_l") or "penetrance" in name]

    def hold(self, *, held: bool) -> None:
        """Keep the dispersion where `start` put it and π at its prior, or let both go.

        There all variance beyond Poisson is the genes' own, so a latent dimension is of use only for what genes share. Were it free
        while the KL term has little weight, a spare dimension would take the noise of one gene and keep it. And as long as effects are
        not learnt a cell that was hit is less probable than one that escaped, which would close π before it can be told.
        """
        for name in self.held:
            self.get_parameter(name).requires_grad_(not held)

    @torch.no_grad()
    def sharpen(self) -> None:
        """Draw every global site at its centre from now on: the guide of a deterministic fit."""
        for name, parameter in self.named_parameters():
            if name.endswith("log_scale"):
                parameter.fill_(-20.0)

    def globals(self) -> None:
        """Sample every global site."""
        for names in self.alike.values():
            self._draw(names)
        moved = self._block() if self.blocked else None
        if len(self.node_design):
            carried = 0.0 if moved is None else torch.sigmoid(self.condition_weight) * (self.node_design @ moved)
            pyro.sample(CONDITIONS, PushedNormal(self.condition_loc - carried, self.condition_log_scale))

    def _draw(self, names: list[str]) -> None:
        """Sample sites that have their values by the same transform, all their numbers in one draw: the time is that of a site."""
        loc, log_scale = (torch.cat([getattr(self, f"{name}_{part}").flatten() for name in names]) for part in ("loc", "log_scale"))
        law = PushedNormal(loc, log_scale, self.transform(names[0]))
        drawn = pyro.sample(f"{names[0]}_and_alike", law, infer={"is_auxiliary": True})
        shapes = [getattr(self, f"{name}_loc").shape for name in names]
        for name, shape, part in zip(names, shapes, drawn.split([shape.numel() for shape in shapes]), strict=True):
            pyro.sample(name, dist.Delta(part.view(shape), event_dim=len(shape)))

    def centre(self) -> dict[str, Tensor]:
        """Return the centre of the law of every global site: medians, and means of the normal ones."""
        centre = {name: self.transform(name)(getattr(self, f"{name}_loc")) for name in self.independent}
        if self.blocked:
            centre |= self._unblocked(self.block_loc)
        return centre | ({CONDITIONS: self.condition_loc} if len(self.node_design) else {})

    def _block(self) -> Float[Tensor, "block gene"]:
        """Sample bias and batch effects of each gene together; return how far they are from their means."""
        law = PushedNormal(self.block_loc, self.block_log_scale, lower=self.block_lower)
        block = pyro.sample("gene_block", law, infer={"is_auxiliary": True})
        for name, value in self._unblocked(block).items():
            pyro.sample(name, dist.Delta(value, event_dim=value.ndim))
        return (block - self.block_loc).T

    def _unblocked(self, block: Float[Tensor, "gene block"]) -> dict[str, Tensor]:
        """Cut the block of each gene into its sites."""
        parts = block.T.split([shape.numel() for shape in self.blocked.values()])
        return {name: part.reshape(*shape, -1) for (name, shape), part in zip(self.blocked.items(), parts, strict=True)}

    def forward(self, cells: Cells) -> None:
        """Sample the global sites, and the rest state of each cell of the minibatch."""
        self.globals()
        self.own(cells)

    def own(self, cells: Cells) -> None:
        """Sample the rest state of each cell of the minibatch."""
        with pyro.plate("cell", cells.total, subsample=cells.index), pyro.poutine.scale(scale=cells.warmth):
            pyro.sample("z", self.rest(cells))

    def rest(self, cells: Cells) -> dist.Distribution:
        """Return q(z₀ | x, protocol, batch) for each cell; a known start is returned as it is.

        Raises a ValueError where a fit learnt no such law.
        """
        if self.known_start is not None:
            return dist.Delta(self.known_start.expand(len(cells), -1), event_dim=1)
        if not self.encodes:
            raise ValueError(
                "This fit has no q(z0 | x), the law of a cell's rest state given its counts, since objective='paths' compares sets of "
                "cells: ask predict or predictive_check, or fit with objective='elbo' to ask about given cells."
            )
        log_counts = log_relative(cells.counts, cells.log_size_factor)
        if cells.present is not None:
            log_counts = torch.where(cells.present[:, None], log_counts, 0.0)
        law = self.encoder(log_counts, torch.cat([self.context(cells.protocol, cells.batch), *_seen(cells)], -1))
        return (law if cells.hits is None else TiedNormal(law, cells.hits.of)).to_event(1)

    def context(self, protocol: Sequence[Segment], batch: Int[Tensor, " cell"]) -> Float[Tensor, "cell context"]:
        """Return what the encoder reads beside counts: the marks of the protocol, the time waited, and the batch."""
        # a cell in no known batch, or in one that the fit was adapted to later, reads zeros
        known = torch.where(batch < self.n_batches, batch, -1)
        batches = torch.nn.functional.pad(torch.eye(self.n_batches, device=batch.device), (0, 0, 0, 1))[known]
        perturbation = torch.stack([s.perturbation for s in protocol]).amax(0)
        media = torch.stack([s.media for s in protocol]).amax(0)
        waited = torch.stack([s.wait for s in protocol]).sum(0)
        return torch.cat([perturbation, media, waited[:, None], batches], -1)


def _of_one(support: Any) -> Any:
    """Return where each number of a site may lie."""
    return _of_one(support.base_constraint) if isinstance(support, constraints.independent) else support


def _seen(cells: Cells) -> Iterator[Float[Tensor, "cell part"]]:
    """Yield what each further assay saw, log(1 + count) at size factor 1, zeros where a cell lacks it, and 1 where it does; for RNA too."""
    if cells.assays:
        yield torch.zeros_like(cells.log_size_factor)[:, None] if cells.present is None else (~cells.present).float()[:, None]
    for seen in cells.assays.values():
        present = seen.present[:, None]
        yield torch.where(present, torch.log1p(seen.counts * torch.exp(-seen.log_size_factor)[:, None]), 0.0)
        yield (~present).float()


def node_design(model: CellModel, screen: "Screen") -> Float[Tensor, "node block"]:
    """Return how bias and batch effects of a gene add up, on average, in the cells of each condition-effect node."""
    design, group, condition = _groups(model, screen)
    cells = torch.bincount(torch.as_tensor(group), minlength=len(design)).float()
    member = _members(model, screen)[:, condition] * cells
    return member @ design / member.sum(1, keepdim=True).clamp(min=1)


def _groups(model: CellModel, screen: "Screen") -> tuple[Float[Tensor, "group block"], np.ndarray, np.ndarray]:
    """Return the design of each group of cells of one condition in one batch, each cell's group, and each group's condition."""
    names, n_batches = model.vocabulary, len(screen.batches)
    pairs, group = np.unique(screen.condition * n_batches + screen.batch, return_inverse=True)
    batch = torch.tensor([names.batch_code(screen.batches[k]) for k in pairs % n_batches])
    media = torch.zeros(len(pairs), len(names.media))
    for row, protocol in enumerate(screen.conditions[k] for k in pairs // n_batches):
        if protocol.media is not None:
            media[row, names.media.index(protocol.media)] = 1.0
    effect = model.batch_effect
    return effect.design(batch.to(effect.basis.device), media.to(effect.basis.device)).cpu(), group, pairs // n_batches


def _members(model: CellModel, screen: "Screen") -> Float[Tensor, "node condition"]:
    """Return 1 where a condition-effect node acts in a condition, 0 elsewhere."""
    names, number = model.vocabulary, {node: k for k, node in enumerate(model.condition_effect.nodes)}
    member = torch.zeros(len(number), len(screen.conditions))
    for column, protocol in enumerate(screen.conditions):
        for node in model.condition_effect.parts(names.protocol(protocol), names.time_scale):
            member[number[node], column] = 1
    return member


def _log_means(screen: "Screen", group: np.ndarray, n_groups: int) -> Float[Tensor, "group gene"]:
    """Return the log of each gene's share of the counts of each group of cells, half a count added."""
    total = (membership(group, n_groups) @ screen.counts).toarray() + 0.5
    exposure = screen.depth * np.bincount(group, screen.size_factor, n_groups)
    return torch.as_tensor(np.log(total / exposure[:, None]), dtype=torch.float32)


def _information(counts: csr_array | StoredCounts, group: np.ndarray, n_groups: int) -> Float[Tensor, "group gene"]:
    """Return about how much the counts of each group of cells tell of each gene's log rate."""
    total, cells = (membership(group, n_groups) @ counts).toarray(), np.maximum(np.bincount(group, minlength=n_groups), 1)
    return torch.as_tensor(total / (1 + total / cells[:, None]), dtype=torch.float32)


def _moments(screen: "Screen") -> tuple[Float[Tensor, " gene"], Float[Tensor, " gene"]]:
    """Return mean and dispersion of each gene by the method of moments.

    Of counts x ~ NB(mean s μ, θ) at size factor s, 1/θ = Σ [(x − s μ)² − s μ] / Σ (s μ)²; each is drawn to what genes have in common by
    about as much as the prior does, since of genes with hardly a count it is mostly noise.
    """
    x, s, n = screen.counts, screen.size_factor.astype(np.float64), screen.n_cells
    mean = np.asarray(x.sum(0)).ravel() / s.sum() + 1e-6
    square = mean**2 * np.sum(s**2)
    squares = sum(np.asarray(part.multiply(part).sum(0)).ravel() for _, part in blocks(x))
    excess = (squares - 2 * mean * (s @ x) + square - mean * s.sum()) / square
    information = n / 2 * (mean / (mean + 1)) ** 2
    overall = np.average(excess.clip(0.02, 20), weights=information)
    noise = 2 / n * (1 / mean + overall) ** 2  # the variance of 1/θ of a gene, and that between genes
    between = (SPREAD * overall) ** 2
    excess = (between * excess + noise * overall) / (between + noise)
    return torch.as_tensor(mean, dtype=torch.float32), torch.as_tensor(1 / excess.clip(0.02, 20), dtype=torch.float32)


def _middle(site: dict) -> Tensor:
    """Return the median of a site's prior, the mean of a share, or a draw where it has none."""
    law = site["fn"]
    if isinstance(law, FromRest):
        return torch.zeros_like(site["value"])
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    if isinstance(law, torch.distributions.Beta):
        return law.mean.detach()
    if isinstance(law, LogNormal | LogitNormal):
        return law.median.detach()
    if isinstance(law, torch.distributions.TransformedDistribution):
        value = law.base_dist.mean
        for transform in law.transforms:
            value = transform(value)
        return value.detach()
    return 0.1 * site["value"].detach() / site["value"].detach().abs().max().clamp(min=1e-6)
