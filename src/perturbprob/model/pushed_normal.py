"""The law of a global site in the guide: normal noise, pushed to where the site has its values."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor


@final
class PushedNormal(TorchDistribution):
    """x = f(μ + σ ⊙ (ε + K ε)), ε ~ Normal(0, I), all of x one event; K is the part of ``lower`` below the diagonal, 0 without it.

    Its log density is that of torch's `TransformedDistribution`, and so is the gradient. But it remembers the ε of its last draw, and
    there log q(x) = −Σ (ε² / 2 + log σ + log √(2π)) − log |det f′| needs no way back from x, which is most of the work: x moves with
    μ, σ and K such that ε stays.

    >>> law = PushedNormal(torch.zeros(3), torch.zeros(3), torch.distributions.ExpTransform())
    >>> x = law.rsample()
    >>> bool(torch.isclose(law.log_prob(x), law.log_prob(x.clone())))
    True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        loc: Float[Tensor, "*event"],
        log_scale: Float[Tensor, "*event"],
        transform: torch.distributions.Transform | None = None,
        *,
        lower: Float[Tensor, "*event last"] | None = None,
    ) -> None:
        """Keep μ, log σ, f (the identity without it) and K; a ``lower`` ties what stands along the last axis."""
        self.loc, self.log_scale, self.transform, self.lower = loc, log_scale, transform, lower
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Where x may lie."""
        codomain = constraints.real if self.transform is None else self.transform.codomain
        return constraints.independent(codomain, len(self.event_shape) - codomain.event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "PushedNormal":
        """Return the law itself: what all cells share has no batch shape."""
        if tuple(batch_shape):
            raise NotImplementedError(f"A global site stands above every plate; got the batch shape {tuple(batch_shape)}.")
        return self

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Float[Tensor, "*draw_event"]:
        """Draw, with gradients in μ, σ and K."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        tied = noise if self.lower is None else noise + (torch.tril(self.lower, -1) @ noise[..., None])[..., 0]
        normal = torch.addcmul(self.loc, self.log_scale.exp(), tied)
        value = normal if self.transform is None else self.transform(normal)
        self._drawn = value, normal, noise
        return value

    def log_prob(self, value: Float[Tensor, "*draw_event"]) -> Float[Tensor, "*draw"]:
        """Return the log density of whole x."""
        if self._drawn is None or self._drawn[0] is not value:
            return self._law().log_prob(value)
        _, normal, noise = self._drawn
        n = len(self.event_shape)
        density = sum_rightmost(-0.5 * noise.square(), n) - self.log_scale.sum() - 0.5 * math.log(2 * math.pi) * self.loc.numel()
        return density if self.transform is None else density - sum_rightmost(self.transform.log_abs_det_jacobian(normal, value), n)

    def _law(self) -> torch.distributions.Distribution:
        """Return the same law as torch has it."""
        scale, n = self.log_scale.exp(), len(self.event_shape)
        if self.lower is not None:
            tril = torch.tril(self.lower, -1) * scale[..., None] + torch.diag_embed(scale)
            return torch.distributions.Independent(torch.distributions.MultivariateNormal(self.loc, scale_tril=tril), n - 1)
        normal: torch.distributions.Distribution = torch.distributions.Normal(self.loc, scale)
        if self.transform is not None:
            normal = torch.distributions.TransformedDistribution(normal, [self.transform])
        return torch.distributions.Independent(normal, n - len(normal.event_shape))
