"""The prior of shares: between 0 and 1, its logit normal."""

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
class LogitNormal(TorchDistribution):
    """0 < x < 1 with logit x ~ Normal(loc, scale): log p(x) = −((logit x − loc) / scale)² / 2 − log(x (1 − x) scale √(2π)).

    >>> round(float(LogitNormal(torch.tensor(0.0), 1.0).log_prob(torch.tensor(0.5))), 4)
    0.4674
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, loc: Float[Tensor, "*site"], scale: float | Float[Tensor, "*#site"], validate_args: bool | None = None) -> None:
        """Keep mean and standard deviation of logit x."""
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "LogitNormal":
        """Return the same law over a larger shape."""
        return LogitNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    @property
    def median(self) -> Float[Tensor, "*site"]:
        """Half of all x are below it."""
        return torch.sigmoid(self.loc)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Float[Tensor, "*draw_site"]:
        """Draw."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        return _inside(torch.sigmoid(torch.addcmul(self.loc, self.scale, noise)))

    def log_prob(self, value: Float[Tensor, "*draw_site"]) -> Float[Tensor, "*draw_site"]:
        """Return the log density of each x."""
        value = _inside(value)
        to_one, to_zero = value.log(), torch.log1p(-value)
        away = (to_one - to_zero - self.loc) / self.scale
        return -0.5 * away.square() - to_one - to_zero - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def cdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the probability of no more than x."""
        return torch.special.ndtr((torch.logit(value) - self.loc) / self.scale)

    def icdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the x that is not passed with a probability."""
        return torch.sigmoid(self.loc + self.scale * torch.special.ndtri(value))

    def on_line(self, value: Float[Tensor, "*site"]) -> OnLine:
        """Return the normal law of logit x."""
        return OnLine("logit", _inside(value), self.loc, self.scale)


def _inside(x: Tensor) -> Tensor:
    """Return x between the least number above 0 and the largest below 1."""
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.tiny, 1 - limits.eps)
