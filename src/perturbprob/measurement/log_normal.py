"""The prior of scales: positive, its logarithm normal."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import broadcast_all

from perturbprob.measurement.density import OnLine


@final
class LogNormal(TorchDistribution):
    """x > 0 with log x ~ Normal(loc, scale): log p(x) = −((log x − loc) / scale)² / 2 − log(x scale √(2π)).

    The law of `torch.distributions.LogNormal`, which is made and asked in each step of a training, for every scale of a model, without
    the general machinery of transformed laws.

    >>> round(float(LogNormal(torch.tensor(0.0), 1.0).log_prob(torch.tensor(1.0))), 4)
    -0.9189
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.positive
    has_rsample = True

    def __init__(self, loc: Float[Tensor, "*site"], scale: float | Float[Tensor, "*#site"], validate_args: bool | None = None) -> None:
        """Keep mean and standard deviation of log x."""
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "LogNormal":
        """Return the same law over a larger shape."""
        return LogNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    @property
    def median(self) -> Float[Tensor, "*site"]:
        """exp(loc)."""
        return self.loc.exp()

    @property
    def mean(self) -> Float[Tensor, "*site"]:
        """exp(loc + scale² / 2)."""
        return (self.loc + 0.5 * self.scale.square()).exp()

    @property
    def variance(self) -> Float[Tensor, "*site"]:
        """(exp(scale²) − 1) times the square of the mean."""
        return torch.expm1(self.scale.square()) * self.mean.square()

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Float[Tensor, "*draw_site"]:
        """Draw."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.scale, noise).exp()

    def log_prob(self, value: Float[Tensor, "*draw_site"]) -> Float[Tensor, "*draw_site"]:
        """Return the log density of each x."""
        log = value.log()
        return -0.5 * ((log - self.loc) / self.scale).square() - log - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def on_line(self, value: Float[Tensor, "*site"]) -> OnLine:
        """Return the normal law of log x."""
        return OnLine("log", value, self.loc, self.scale)

    def cdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the probability of no more than x."""
        return torch.special.ndtr((value.log() - self.loc) / self.scale)

    def icdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the x that is not passed with a probability."""
        return (self.loc + self.scale * torch.special.ndtri(value)).exp()
