"""The line on which the law of a dispersion is near to normal."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid, softplus

LEAST = 1e-4
"""The least 1/θ. At the Poisson law, 1/θ = 0, there is no gradient, and of a gene with hardly a count much of the law of u is near it."""


@final
class Overdispersion(Transform):
    """θ = 1 / (softplus(20 u) / 20 + 10⁻⁴): counts tell of 1/θ about evenly, and of log θ with a long tail towards the Poisson law.

    Near the Poisson law θ does not tell u in single precision, so a draw keeps the u that it came from (``cache_size`` 1).

    >>> Overdispersion()(torch.tensor([-100.0, 0.0, 2.0]))
    tensor([1.0000e+04, 2.8771e+01, 4.9998e-01])
    """

    domain, codomain = constraints.real, constraints.positive
    bijective, sign = True, -1

    def _call(self, u: Float[Tensor, "*site"]) -> Float[Tensor, "*site"]:
        """Return θ."""
        return 1 / (softplus(20 * u) / 20 + LEAST)

    def _inverse(self, theta: Float[Tensor, "*site"]) -> Float[Tensor, "*site"]:
        """Return u; where 1/θ is the least, that of a 1/θ next to it."""
        y = (20 * (1 / theta - LEAST)).clamp(min=1e-6)
        return (y + torch.log(-torch.expm1(-y))) / 20

    def log_abs_det_jacobian(self, u: Float[Tensor, "*site"], theta: Float[Tensor, "*site"]) -> Float[Tensor, "*site"]:
        """Return the log of −dθ/du = θ² / (1 + exp(−20 u))."""
        return 2 * theta.log() + logsigmoid(20 * u)
