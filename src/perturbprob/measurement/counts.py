"""V for counts: log rate to distribution. Zero-inflated negative binomial, negative binomial and Poisson."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from perturbprob.measurement.log_normal import LogNormal
from perturbprob.measurement.logit_normal import LogitNormal
from perturbprob.measurement.rate import Rate

GATE_PRIOR = 0.01
"""Where the prior of the gate is centred: zero inflation is rarely needed on UMI counts."""
_EULER = 0.5772156649015329


@final
class CountLaw(TorchDistribution):
    """Counts x with mean μ = exp(log rate), variance μ + μ²/θ, and a gate π of extra zeros.

    P(x) = π [x = 0] + (1 − π) NB(x | μ, θ), with NB(x) = Γ(x + θ) / (Γ(θ) x!) (θ / (θ + μ))^θ (μ / (θ + μ))^x. Without ``gate``
    π = 0; without ``dispersion`` θ = ∞, which is the Poisson law. The shapes broadcast, genes last.

    >>> law = CountLaw(torch.tensor([0.0]), torch.tensor([2.0]))
    >>> round(float(law.log_prob(torch.tensor([3.0])).exp()), 4)
    0.0658
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "log_rate": constraints.real,
        "dispersion": constraints.positive,
        "gate": constraints.unit_interval,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        log_rate: Float[Tensor, "*plate gene"] | Rate,
        dispersion: Float[Tensor, "*#plate gene"] | None = None,
        gate: Float[Tensor, "*#plate gene"] | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        """Keep the parameters; ``log_rate``, as it is or in its parts, gives the shape."""
        self._log_rate, self.dispersion, self.gate = log_rate, dispersion, gate
        super().__init__(log_rate.shape, validate_args=False)

    @property
    def log_rate(self) -> Float[Tensor, "*plate gene"]:
        """The log rate, added up from its parts."""
        return self._log_rate.log if isinstance(self._log_rate, Rate) else self._log_rate

    @property
    def rate(self) -> Rate:
        """The log rate in its parts; all in one where it was given as it is."""
        if isinstance(self._log_rate, Rate):
            return self._log_rate
        return Rate(self._log_rate, self._log_rate.new_zeros(self._log_rate.shape[:-1]), softmax=False)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.Distribution:
        """Return the law of all genes of a cell at once, by one compiled pass where there is one (`FusedCountLaw`)."""
        from perturbprob.measurement.fused import FusedCountLaw, fits

        return FusedCountLaw(self) if reinterpreted_batch_ndims == 1 and fits(self) else super().to_event(reinterpreted_batch_ndims)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "CountLaw":
        """Return the same law over a larger shape."""
        return CountLaw(self.log_rate.expand(batch_shape), self.dispersion, self.gate)

    @property
    def mean(self) -> Float[Tensor, "*plate gene"]:
        """(1 − π) μ."""
        mean = self.log_rate.exp()
        return mean if self.gate is None else (1 - self.gate) * mean

    @property
    def variance(self) -> Float[Tensor, "*plate gene"]:
        """(1 − π) (μ + μ²/θ + π μ²)."""
        rate = self.log_rate.exp()
        extra = 0.0 if self.dispersion is None else 1 / self.dispersion
        if self.gate is None:
            return rate + rate.square() * extra
        return (1 - self.gate) * (rate + rate.square() * (extra + self.gate))

    def log_prob(self, value: Float[Tensor, "... gene"]) -> Float[Tensor, "... gene"]:
        """Log-probability of each count."""
        log_prob = self._ungated(value)
        if self.gate is None:
            return log_prob
        log_gate, log_open = self.gate.log(), torch.log1p(-self.gate)
        return torch.where(value == 0, torch.logaddexp(log_gate, log_open + log_prob), log_open + log_prob)

    def _ungated(self, value: Float[Tensor, "... gene"]) -> Float[Tensor, "... gene"]:
        """Log-probability without the gate."""
        if self.dispersion is None:
            return value * self.log_rate - self.log_rate.exp() - torch.lgamma(value + 1)
        theta = self.dispersion
        # softplus forms keep both logs exact where μ ≪ θ or μ ≫ θ
        excess = self.log_rate - theta.log()
        log_not, log_success = -torch.nn.functional.softplus(excess), -torch.nn.functional.softplus(-excess)
        return rising_log_factorial(theta, value) - torch.lgamma(value + 1) + theta * log_not + value * log_success

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw_plate_gene"]:  # noqa: B008
        """Draw counts."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            rate = self.log_rate.exp().expand(shape)
            if self.dispersion is not None:
                theta = self.dispersion.expand(shape)
                rate = torch.distributions.Gamma(theta, theta, validate_args=False).sample() * rate
            counts = torch.poisson(rate)
            return counts if self.gate is None else counts * torch.bernoulli(1 - self.gate.expand(shape))

    def rsample_log1p(self, sample_shape: torch.Size = torch.Size()) -> Float[Tensor, "*draw_plate_gene"]:  # noqa: B008
        """Draw y = log(1 + x), with a derivative that is right on average.

        A count cannot be moved by a little, but for x ~ Poisson(λ) of any f, d/dλ E f(x) = E[f(x + 1) − f(x)]. So y gets
        ∂y/∂λ = log(2 + x) − log(1 + x), and λ is μ itself, or μ times a draw from Gamma(θ, θ) with its own (implicit) derivative. The
        gradient of a mean of y in log μ and θ is then unbiased; that of a distance between sets of cells (eq 23), which is not linear in
        y, is right to first order in these steps. Extra zeros are drawn, and scale the gradient, but the gate has none of its own.

        >>> log_rate = torch.zeros(100_000, requires_grad=True)
        >>> CountLaw(log_rate).rsample_log1p().mean().backward()
        >>> exact = sum((math.log(x + 2) - math.log(x + 1)) * math.exp(-1) / math.factorial(x) for x in range(20))
        >>> abs(float(log_rate.grad.sum()) - exact) < 0.01
        True
        """
        shape = self._extended_shape(sample_shape)
        rate = self.log_rate.exp().expand(shape)
        if self.dispersion is not None:
            theta = self.dispersion.expand(shape)
            rate = torch.distributions.Gamma(theta, theta, validate_args=False).rsample() * rate
        counts = torch.poisson(rate.detach())
        drawn = torch.log1p(counts) + torch.log1p(1 / (1 + counts)) * (rate - rate.detach())
        return drawn if self.gate is None else drawn * torch.bernoulli(1 - self.gate.detach().expand(shape))

    def mean_log1p(self) -> Float[Tensor, "*plate gene"]:
        """E[log(1 + x)], by quadrature.

        From Frullani's integral log(1 + x) = ∫ (1 − e^(−s x)) e^(−s) / s ds the mean is ∫ (1 − E e^(−s x)) e^(−s) d log s, and
        E e^(−s x) of every law here is closed. The integrand is smooth and dies at both ends, where the trapezoid rule
        converges geometrically: absolute error below 1e-5 for means up to 1e6.
        """
        total = torch.zeros_like(self.log_rate)
        step = 0.6
        for log_s in torch.arange(-30.0, 4.0, step).tolist():
            s = math.exp(log_s)
            total = total + step * math.exp(-s) * self._missing_transform(-math.expm1(-s))
        return total if self.gate is None else (1 - self.gate) * total

    def variance_log1p(self) -> Float[Tensor, "*plate gene"]:
        """Var(log(1 + x)), by quadrature.

        As in `mean_log1p`, E log(1 + x) and E log²(1 + x) are the integrals of w(u) (1 − E e^(−s x)) e^(−s) over u = log s, with w = 1
        and w = −2 (u + γ), γ Euler's constant: derivatives at a = 0 of
        ∫ s^(a − 1) (e^(−s) − e^(−s(1 + x))) ds = Γ(a) (1 − (1 + x)^(−a)).
        """
        wide = [None if value is None else value.double() for value in (self.dispersion, self.gate)]
        exact, step = CountLaw(self.log_rate.double(), *wide), 0.6  # double: two nearly equal numbers are subtracted
        first, second = torch.zeros_like(exact.log_rate), torch.zeros_like(exact.log_rate)
        for u in torch.arange(-30.0, 4.0, step).tolist():
            part = step * math.exp(-math.exp(u)) * exact._missing_transform(-math.expm1(-math.exp(u)))
            first, second = first + part, second - 2 * (u + _EULER) * part
        share = 1.0 if exact.gate is None else 1 - exact.gate
        return (share * second - (share * first).square()).clamp(min=0).to(self.log_rate)

    def _missing_transform(self, u: float) -> Float[Tensor, "*plate gene"]:
        """1 − E (1 − u)^x without the gate."""
        rate = self.log_rate.exp() * u
        if self.dispersion is None:
            return -torch.expm1(-rate)
        return -torch.expm1(-self.dispersion * torch.log1p(rate / self.dispersion))


def rising_log_factorial(theta: Float[Tensor, "... gene"], value: Float[Tensor, "... gene"]) -> Float[Tensor, "... gene"]:
    """Return log Γ(x + θ) − log Γ(θ), without the cancellation that large θ brings in float32."""
    large = theta > 30.0
    small_theta = torch.where(large, torch.ones_like(theta), theta)
    exact = torch.lgamma(value + small_theta) - torch.lgamma(small_theta)
    if not large.any():
        return exact
    theta = torch.where(large, theta, torch.full_like(theta, 31.0))
    total = theta + value
    stirling = (theta - 0.5) * torch.log1p(value / theta) + value * (total.log() - 1) + (1 / total - 1 / theta) / 12
    return torch.where(large, stirling, exact)


def sample_dispersion(zero: Float[Tensor, " gene"]) -> Float[Tensor, " gene"]:
    """Sample the dispersion θ of each gene, log θ_g ~ Normal(log θ, s), log θ ~ Normal(1, 1), log s ~ Normal(−0.4, 0.5).

    Counts of a gene with hardly one a cell do not tell overdispersion from a state; what genes have in common does.
    """
    overall = pyro.sample("dispersion_overall", LogNormal(zero.new_tensor(1.0), 1.0))
    spread = pyro.sample("dispersion_spread", LogNormal(zero.new_tensor(-0.4), 0.5))
    return pyro.sample("dispersion", LogNormal(overall.log() + zero, spread).to_event(1))


class CountHead(nn.Module, ABC):
    """A measurement head: draws its global sites above the cell plate, and returns the law of the counts given a log rate.

    A training runs `globals` a few times at its start and then replays what it did (`Elbo.record`), if it decides nothing by the values of
    tensors: what changes in Python later has no say.
    """

    sites: ClassVar[tuple[str, ...]] = ("dispersion", "gate")
    zero: Tensor

    def __init__(self, n_genes: int) -> None:
        """Keep the number of genes."""
        super().__init__()
        self.register_buffer("zero", torch.zeros(n_genes), persistent=False)

    @abstractmethod
    def globals(self) -> dict[str, Float[Tensor, " gene"]]:
        """Sample the sites that all cells share, by name."""

    def forward(
        self, log_rate: Float[Tensor, "*plate gene"] | Rate, dispersion: Tensor | None = None, gate: Tensor | None = None
    ) -> CountLaw:
        """Return the law of the counts."""
        return CountLaw(log_rate, dispersion, gate)


@final
class Poisson(CountHead):
    """Counts with no more variance than their mean."""

    def globals(self) -> dict[str, Float[Tensor, " gene"]]:
        """Sample nothing."""
        return {}


@final
class NegativeBinomial(CountHead):
    """Counts with gene-wise dispersion, those of all genes around one (`sample_dispersion`)."""

    def globals(self) -> dict[str, Float[Tensor, " gene"]]:
        """Sample the dispersion."""
        return {"dispersion": sample_dispersion(self.zero)}


@final
class ZeroInflatedNegativeBinomial(CountHead):
    """Negative binomial counts with a gene-wise gate of extra zeros, logit π_g ~ Normal(logit 0.01, 1)."""

    def globals(self) -> dict[str, Float[Tensor, " gene"]]:
        """Sample the dispersion and the gate."""
        logit = self.zero + math.log(GATE_PRIOR / (1 - GATE_PRIOR))
        return {"dispersion": sample_dispersion(self.zero), "gate": pyro.sample("gate", LogitNormal(logit, 1.0).to_event(1))}
