"""Run a flow backward (eq 6): from the state that was measured to the state at rest, and how well that can be done."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

AT_ONCE = 200_000
"""How many numbers a Jacobian-vector product carries at once."""
Flow = Callable[[Float[Tensor, "*plate cell latent"]], Float[Tensor, "*plate cell latent"]]


@final
@dataclass(frozen=True)
class Inverse:
    """Rest states found by running backward.

    ``condition_number`` is max(1, σ_max) / σ_min of ∂z(t)/∂z₀ for each cell, 1 being the scale of rest states: by how much an error of z(t)
    may grow in z₀. An even contraction counts too, which the plain ratio of singular values would miss. ``residual`` is how far the found
    z₀ lands from z(t); it is small even where the condition number is large, and proves nothing there.
    """

    z0: Float[Tensor, "cell latent"]
    condition_number: Float[Tensor, " cell"]
    residual: Float[Tensor, " cell"]


def jacobian(
    flow: Flow, z0: Float[Tensor, "*plate cell latent"]
) -> tuple[Float[Tensor, "*plate cell state"], Float[Tensor, "*plate cell state latent"]]:
    """Return z(t) and ∂z(t)/∂z₀ of each cell, by Jacobian-vector products along many latent axes at once.

    The flow takes leading axes before (cell, latent); cells do not see each other.

    >>> z, slope = jacobian(lambda z: z.square(), torch.tensor([[1.0, 3.0]]))
    >>> slope
    tensor([[[2., 0.],
             [0., 6.]]])
    """
    axes, columns = torch.eye(z0.shape[-1], dtype=z0.dtype, device=z0.device), []
    for some in axes.split(max(1, AT_ONCE // z0.numel())):
        repeated = z0.expand(len(some), *z0.shape).contiguous()  # jvp refuses rows that share memory
        along = some.reshape(-1, *[1] * (z0.ndim - 1), z0.shape[-1]).expand_as(repeated).contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch compiles its own rules for jvp at first use
            there, moved = torch.func.jvp(flow, (repeated,), (along,))
        columns.append(moved)
    return there[0], torch.cat(columns).movedim(0, -1)


def invert(
    flow: Flow, z: Float[Tensor, "cell latent"], *, start: Float[Tensor, "cell latent"], n_steps: int = 30, tolerance: float = 1e-5
) -> Inverse:
    """Find z₀ with flow(z₀) = z by damped Newton steps from ``start``, each cell by itself.

    A step that does not bring a cell nearer is halved. Stops where every cell is within ``tolerance`` times (1 + |z|), or after
    ``n_steps``; the residual says what was reached.

    >>> invert(torch.tanh, torch.tensor([[0.5]]), start=torch.zeros(1, 1)).z0
    tensor([[0.5493]])
    """
    z0, size = start.clone(), 1 + z.norm(dim=-1)
    damping = torch.ones_like(size)
    there, slope = jacobian(flow, z0)
    for _ in range(n_steps):
        miss = (there - z).norm(dim=-1)
        if (miss <= tolerance * size).all():
            break
        step = torch.linalg.lstsq(slope, (z - there)[..., None]).solution[..., 0]
        trial = z0 + damping[:, None] * step
        moved, turned = jacobian(flow, trial)
        nearer = (moved - z).norm(dim=-1) < miss
        z0, there = torch.where(nearer[:, None], trial, z0), torch.where(nearer[:, None], moved, there)
        slope = torch.where(nearer[:, None, None], turned, slope)
        damping = torch.where(nearer, (2 * damping).clamp(max=1.0), damping / 2)
    singular = torch.linalg.svdvals(slope)
    return Inverse(z0, singular[..., 0].clamp(min=1) / singular[..., -1], (there - z).norm(dim=-1))
