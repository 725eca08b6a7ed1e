"""Log densities of all that one site holds, in one step of the gradient's way back."""

import math
from typing import Any, final

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from perturbprob.measurement.log_normal import LogNormal


@final
class _Normal(torch.autograd.Function):
    """Σ −((x − loc) / scale)² / 2 − log(scale √(2π)), or the same of log x, − log x: of torch's own law each term would be a step."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*x"], loc: Float[Tensor, "*loc"], scale: Float[Tensor, "*scale"], of_log: bool
    ) -> Float[Tensor, ""]:
        """Return the sum over all that the shapes broadcast to."""
        line = x.log() if of_log else x
        away = (line - loc) / scale
        ctx.save_for_backward(x, away, scale)
        ctx.of_log, ctx.shape = of_log, loc.shape
        flat = away.flatten()
        total = -0.5 * flat.dot(flat) - scale.log().sum() * (len(flat) / max(1, scale.numel())) - 0.5 * math.log(2 * math.pi) * len(flat)
        return total - line.sum() * (len(flat) / max(1, line.numel())) if of_log else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        """Return the gradients in x, loc and scale."""
        x, away, scale = ctx.saved_tensors
        slope = away / scale * grad[0]
        wanted, of_x, of_loc, of_scale = ctx.needs_input_grad, None, None, None
        if wanted[0]:
            of_x = ((slope + grad[0]) / -x if ctx.of_log else -slope).sum_to_size(x.shape)
        if wanted[1]:
            of_loc = slope.sum_to_size(ctx.shape)
        if wanted[2]:
            of_scale = (slope * away - grad[0] / scale).sum_to_size(scale.shape)
        return of_x, of_loc, of_scale, None


def normal(x: Float[Tensor, "*x"], loc: Float[Tensor, "*loc"], scale: Float[Tensor, "*scale"]) -> Float[Tensor, ""]:
    """Return the log density of all x ~ Normal(loc, scale) together; the shapes broadcast.

    >>> x = torch.tensor([0.5, 2.0])
    >>> exact = torch.distributions.Normal(1.0, 2.0).log_prob(x).sum()
    >>> bool(torch.isclose(normal(x, torch.tensor(1.0), torch.tensor(2.0)), exact))
    True
    """
    return _Normal.apply(x, loc, scale, False)


def log_density(law: dist.Distribution, value: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the log density of all that a site holds, added up."""
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    if isinstance(law, LogNormal):
        return _Normal.apply(value, law.loc, law.scale, True)
    if type(law) is dist.Normal:
        return normal(value, law.loc, law.scale)
    return law.log_prob(value).sum()
