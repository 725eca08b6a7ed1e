"""The log density of many sites together, most of them normal on some line."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor


class OnLine(NamedTuple):
    """x, and the normal law of x itself, of log x or of logit x; the shapes broadcast."""

    line: Literal["itself", "log", "logit"]
    x: Float[Tensor, "*#x"]
    loc: Float[Tensor, "*#x"]
    scale: Float[Tensor, "*#x"]


def log_density(laws: Sequence[dist.Distribution], values: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the log density of all values together, each by its law.

    What is normal on some line, which a law says of itself by ``on_line(value)``, is dealt with as one long vector y,
    −Σ ((y − loc) / scale)² / 2 − log(scale √(2π)) + log |dy/dx|: of small sites the time is that of the calls, not of the numbers.

    >>> x = torch.tensor([0.5, 2.0])
    >>> laws = [dist.Normal(1.0, torch.tensor(2.0)).expand([2]).to_event(1), dist.Exponential(torch.ones(2)).to_event(1)]
    >>> bool(torch.isclose(log_density(laws, [x, x]), laws[0].log_prob(x) + laws[1].log_prob(x)))
    True
    """
    normal, others = list[OnLine](), list[Tensor]()
    for law, value in zip(laws, values, strict=True):
        while isinstance(law, torch.distributions.Independent):
            law = law.base_dist
        if hasattr(law, "on_line"):
            normal.append(law.on_line(value))
        elif type(law) is dist.Normal:
            normal.append(OnLine("itself", value, law.loc, law.scale))
        else:
            others.append(law.log_prob(value).sum())
    if normal:
        others.append(_normal(sorted(normal, key=lambda site: site.line)))
    return torch.stack(others).sum() if others else torch.zeros(())


def _normal(sites: Sequence[OnLine]) -> Float[Tensor, ""]:
    """Return the log density of sites that are normal on some line, those of one line one behind the other."""
    parts = [[part.flatten() for part in torch.broadcast_tensors(*site[1:])] for site in sites]
    lines, total = list[Tensor](), sites[0].x.new_zeros(())
    for line in dict.fromkeys(site.line for site in sites):
        x = torch.cat([own for site, (own, _, _) in zip(sites, parts, strict=True) if site.line == line])
        if line == "log":
            x = x.log()
            total = total - x.sum()
        elif line == "logit":
            to_one, to_zero = x.log(), torch.log1p(-x)
            x, total = to_one - to_zero, total - to_one.sum() - to_zero.sum()
        lines.append(x)
    loc, scale = (torch.cat([part[k] for part in parts]) for k in (1, 2))
    away = (torch.cat(lines) - loc) / scale
    return total - 0.5 * away.dot(away) - (scale.log().sum() + 0.5 * math.log(2 * math.pi) * len(away))
