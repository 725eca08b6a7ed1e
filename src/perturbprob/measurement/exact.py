"""No V at all: counts are what the state says, for structures without a law of measuring."""

from typing import Any, ClassVar, NoReturn, final

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn


@final
class ExactLaw(TorchDistribution):
    """A count that equals its rate, and need not be a whole number. It has no density.

    >>> law = ExactLaw(torch.tensor([3.0]).log())
    >>> law.mean, law.variance, law.mean_log1p().expm1()
    (tensor([3.]), tensor([0.]), tensor([3.]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"log_rate": constraints.real}
    support = constraints.nonnegative

    def __init__(self, log_rate: Float[Tensor, "*plate gene"], *, validate_args: bool | None = None) -> None:
        """Keep the log rate."""
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "ExactLaw":
        """Return the same law over a larger shape."""
        return ExactLaw(self.log_rate.expand(batch_shape))

    @property
    def mean(self) -> Float[Tensor, "*plate gene"]:
        """The rate."""
        return self.log_rate.exp()

    @property
    def variance(self) -> Float[Tensor, "*plate gene"]:
        """None."""
        return torch.zeros_like(self.log_rate)

    def mean_log1p(self) -> Float[Tensor, "*plate gene"]:
        """log(1 + rate)."""
        return self.mean.log1p()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw_plate_gene"]:  # noqa: B008
        """Return the rate."""
        return self.mean.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Float[Tensor, "... gene"]) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(
            "A stationary diffusion has no likelihood of counts: it is fitted by objective='kds'. Ask predict, predictive_check or "
            "edges; or take causal_context, which has the same network, a law of counts and a posterior."
        )


@final
class Exact(nn.Module):
    """The head of `ExactLaw`: nothing is sampled."""

    sites: ClassVar[tuple[str, ...]] = ()

    def __init__(self, n_genes: int) -> None:
        """Keep the number of genes."""
        super().__init__()
        self.n_genes = n_genes

    def globals(self) -> dict[str, Tensor]:
        """Sample nothing."""
        return {}

    def forward(self, log_rate: Float[Tensor, "*plate gene"]) -> ExactLaw:
        """Return the law of the counts."""
        return ExactLaw(log_rate)
