"""V for further assays of the same cells: chromatin windows and surface proteins beside RNA (eq 10)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountLaw, sample_dispersion
from perturbprob.measurement.decoder import normal_points
from perturbprob.measurement.log_normal import LogNormal
from perturbprob.measurement.logit_normal import LogitNormal


@dataclass(frozen=True)
class Seen:
    """What one assay saw of a minibatch of cells; rows of cells that are not ``present`` say nothing."""

    counts: Float[Tensor, "cell feature"]
    log_size_factor: Float[Tensor, " cell"]
    present: Bool[Tensor, " cell"]


@final
class OpenLaw(TorchDistribution):
    """Windows that are open (1) where at least one read of a Poisson law falls into them: P(open) = 1 − exp(−exp(log rate)).

    >>> float(OpenLaw(torch.zeros(1)).log_prob(torch.zeros(1)))
    -1.0
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"log_rate": constraints.real}
    support = constraints.boolean

    def __init__(self, log_rate: Float[Tensor, "*plate feature"], *, validate_args: bool | None = None) -> None:
        """Keep the log rate, which gives the shape."""
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "OpenLaw":
        """Return the same law over a larger shape."""
        return OpenLaw(self.log_rate.expand(batch_shape))

    @property
    def mean(self) -> Float[Tensor, "*plate feature"]:
        """P(open)."""
        return -torch.expm1(-self.log_rate.exp())

    def log_prob(self, value: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        """Log-probability of each window."""
        # where the rate is below float32, P(open) is the rate itself
        rare = self.log_rate < -15.0
        log_open = torch.where(rare, self.log_rate, self.mean.clamp(min=1e-30).log())
        return torch.where(value > 0, log_open, -self.log_rate.exp())

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw_plate_feature"]:  # noqa: B008
        """Draw windows."""
        with torch.no_grad():
            return torch.bernoulli(self.mean.expand(self._extended_shape(sample_shape)))


@final
class BackgroundLaw(TorchDistribution):
    """Counts of antibodies: with probability π (``weight``) of what sticks to any cell, else with the cell's own signal on top.

    P(x) = π NB(x | β, θ) + (1 − π) NB(x | β + σ, θ), with background rate β and signal σ.

    >>> law = BackgroundLaw(torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5]))
    >>> round(float(law.mean), 3)
    4.695
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "log_background": constraints.real,
        "log_signal": constraints.real,
        "dispersion": constraints.positive,
        "weight": constraints.unit_interval,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        log_background: Float[Tensor, "*#plate feature"],
        log_signal: Float[Tensor, "*plate feature"],
        dispersion: Float[Tensor, "*#plate feature"],
        weight: Float[Tensor, "*#plate feature"],
        *,
        validate_args: bool | None = None,
    ) -> None:
        """Make the two laws; ``log_signal`` gives the shape."""
        self.log_background, self.log_signal, self.dispersion, self.weight = log_background, log_signal, dispersion, weight
        self.background = CountLaw(log_background.expand_as(log_signal), dispersion)
        self.foreground = CountLaw(torch.logaddexp(log_background, log_signal), dispersion)
        super().__init__(log_signal.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "BackgroundLaw":
        """Return the same law over a larger shape."""
        return BackgroundLaw(self.log_background, self.log_signal.expand(batch_shape), self.dispersion, self.weight)

    @property
    def mean(self) -> Float[Tensor, "*plate feature"]:
        """β + (1 − π) σ."""
        return self.log_background.exp() + (1 - self.weight) * self.log_signal.exp()

    def log_prob(self, value: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        """Log-probability of each count."""
        background, foreground = self.background.log_prob(value), self.foreground.log_prob(value)
        return torch.logaddexp(self.weight.log() + background, torch.log1p(-self.weight) + foreground)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw_plate_feature"]:  # noqa: B008
        """Draw counts."""
        bare = torch.bernoulli(self.weight.detach().expand(self._extended_shape(sample_shape))) > 0
        return torch.where(bare, self.background.sample(sample_shape), self.foreground.sample(sample_shape))


class _Prefixed(Messenger):
    """Put the name of an assay before the names of sites."""

    def __init__(self, prefix: str) -> None:
        """Keep the prefix."""
        super().__init__()
        self.prefix = prefix

    def _pyro_sample(self, msg: Any) -> None:
        """Rename a site before any other handler sees it."""
        msg["name"] = f"{self.prefix}_{msg['name']}"


class AssayHead(nn.Module, ABC):
    """V of a further assay: from the latent state z, which all assays share, to the law of its counts.

        log rate_f = log ℓ + log level_f + network(z)_f + coupling_f · (log share_g − its average) + η^b_f

    Each assay has a size factor ℓ, a network, levels, dispersions and zero-sum batch effects of its own; the names of its sites begin with
    its name. `CellModel` adds what a condition does to single features, a `ConditionEffect` of the assay's own, to η^b. The term with
    ``coupling`` is there for features that name a gene g whose RNA is measured: these share the RNA's coordinates and its map (D.1), so
    what a perturbation does to the RNA of single genes reaches them. Features that name none have the network alone: they are
    tied to RNA by the law of z. What depends on z only can go through either term, so the two
    are not to be told apart there. Rates are not made to sum to one.

    ``level`` is the average count of each feature at size factor 1, ``gene`` the place of its gene among the RNA's or −1, ``log_share`` the
    average log share of each gene's RNA.
    """

    own_sites: ClassVar[tuple[str, ...]] = ()
    binary: ClassVar[bool] = False
    points: Tensor
    level: Tensor
    gene: Tensor
    average: Tensor
    place: Tensor

    def __init__(
        self,
        name: str,
        features: Sequence[str],
        level: Float[Tensor, " feature"],
        gene: Sequence[int],
        log_share: Float[Tensor, " gene"],
        batch_effect: BatchEffect,
        *,
        n_latent: int,
        n_hidden: int = 128,
    ) -> None:
        """Make the network; its last layer has no bias, which is the level."""
        super().__init__()
        self.name, self.features = name, tuple(features)
        linked = [f for f, g in enumerate(gene) if g >= 0]
        self.linked = tuple(self.features[f] for f in linked)
        self.batch_effect = batch_effect
        self.network = nn.Sequential(nn.Linear(n_latent, n_hidden), nn.ReLU(), nn.Linear(n_hidden, len(features), bias=False))
        self.register_buffer("points", normal_points(n_latent), persistent=False)
        self.register_buffer("level", level)
        self.register_buffer("gene", torch.tensor([gene[f] for f in linked], dtype=torch.long))
        self.register_buffer("average", log_share[self.gene])
        self.register_buffer("place", torch.eye(len(features))[linked])

    def globals(self) -> dict[str, Tensor]:
        """Sample what all cells share, above the plate: batch effects, levels, couplings, and what the kind of assay needs."""
        with _Prefixed(self.name):
            sites = self.batch_effect() | self.own()
            if len(self.gene):
                law = LogNormal(torch.full_like(self.average, -0.7), 0.7)
                sites["coupling"] = pyro.sample("coupling", law.to_event(1))
        return {f"{self.name}_{site}": value for site, value in sites.items()}

    def forward(
        self,
        sites: dict[str, Tensor],
        z: Float[Tensor, "*plate cell latent"],
        log_share: Float[Tensor, "*plate cell gene"],
        log_size_factor: Float[Tensor, "*#plate cell"],
        eta: Float[Tensor, "*eta cell feature"],
    ) -> TorchDistribution:
        """Return the law of the counts of cells in state z whose RNA has these expected log shares."""
        own = self.of(sites)
        log_rate = own["level"].log() + self.network(z) + eta
        if len(self.gene):
            log_rate = log_rate + (own["coupling"] * (log_share[..., self.gene] - self.average)) @ self.place
        return self.law(log_rate, log_size_factor[..., None], **{site: own[site] for site in self.own_sites})

    def of(self, sites: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sites of this assay by their names without its own."""
        start = f"{self.name}_"
        return {name.removeprefix(start): value for name, value in sites.items() if name.startswith(start)}

    def eta(
        self,
        sites: dict[str, Tensor],
        batch: Int[Tensor, " cell"],
        z: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "cell media"],
    ) -> Float[Tensor, "*eta cell feature"]:
        """Return η^b of this assay in each cell; 0 in batches that it has never seen, as one that a fit was adapted to by its RNA."""
        own = self.of(sites)
        known = torch.where(batch < len(own["batch_effect"]), batch, -1)
        return self.batch_effect.at(own, known, z, media)

    @abstractmethod
    def own(self) -> dict[str, Tensor]:
        """Sample the level, and the sites of this kind of assay."""

    @abstractmethod
    def law(self, log_rate: Float[Tensor, "*plate feature"], log_depth: Float[Tensor, "*#plate 1"], **own: Tensor) -> TorchDistribution:
        """Return the law of the counts of features at these log rates, which ``log_depth`` adds to."""

    def _level(self, share: float = 1.0) -> Float[Tensor, " feature"]:
        """Sample the level of each feature around a share of its average count."""
        return pyro.sample("level", LogNormal((share * self.level).log(), 1.0).to_event(1))


@final
class ProteinHead(AssayHead):
    """Surface proteins: `BackgroundLaw`, the rate above being the signal σ.

    The background β_f ~ LogNormal, and so the level of the signal, each around half of the average count before anything is seen; a cell
    shows background alone with probability π_f, logit π_f ~ Normal(0, 1.5). Both depend on the size factor alike.
    """

    own_sites: ClassVar[tuple[str, ...]] = ("dispersion", "background", "background_weight")

    def own(self) -> dict[str, Tensor]:
        """Sample level, dispersion, background and its weight."""
        background = pyro.sample("background", LogNormal((0.5 * self.level).log(), 1.0).to_event(1))
        weight = LogitNormal(torch.zeros_like(self.level), 1.5)
        sites = {"background": background, "background_weight": pyro.sample("background_weight", weight.to_event(1))}
        return sites | {"level": self._level(0.5)} | {"dispersion": sample_dispersion(torch.zeros_like(self.level))}

    def law(self, log_rate: Float[Tensor, "*plate feature"], log_depth: Float[Tensor, "*#plate 1"], **own: Tensor) -> BackgroundLaw:
        """Return background, and signal on top of it."""
        return BackgroundLaw(log_depth + own["background"].log(), log_depth + log_rate, own["dispersion"], own["background_weight"])


@final
class WindowHead(AssayHead):
    """Reads in chromatin windows, negative binomial with a dispersion for each window."""

    own_sites: ClassVar[tuple[str, ...]] = ("dispersion",)

    def own(self) -> dict[str, Tensor]:
        """Sample level and dispersion."""
        return {"level": self._level()} | {"dispersion": sample_dispersion(torch.zeros_like(self.level))}

    def law(self, log_rate: Float[Tensor, "*plate feature"], log_depth: Float[Tensor, "*#plate 1"], **own: Tensor) -> CountLaw:
        """Return the law of reads."""
        return CountLaw(log_depth + log_rate, own["dispersion"])


@final
class OpenWindowHead(AssayHead):
    """Chromatin windows that are open or closed, `OpenLaw`."""

    binary: ClassVar[bool] = True

    def own(self) -> dict[str, Tensor]:
        """Sample the level: the rate behind an open window."""
        return {"level": self._level()}

    def law(self, log_rate: Float[Tensor, "*plate feature"], log_depth: Float[Tensor, "*#plate 1"], **own: Tensor) -> OpenLaw:
        """Return the law of open windows."""
        return OpenLaw(log_depth + log_rate)
