"""How fast a flow parts neighbours (B.2): Lipschitz constants at given rest states, from Jacobian-vector products."""

import warnings
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.dynamics.inverse import Flow, jacobian


def map_constant(flow: Flow, z0: Float[Tensor, "cell latent"]) -> Float[Tensor, " cell"]:
    """Return ‖∂z(t)/∂z₀‖₂ of each cell: neighbours at rest part by at most so much for each unit between them.

    >>> map_constant(lambda z: z.square(), torch.tensor([[1.0, -3.0]]))
    tensor([6.])
    """
    return torch.linalg.matrix_norm(jacobian(flow, z0)[1], 2)


def near_map_constant(
    flow: Flow, z0: Float[Tensor, "*plate cell latent"], direction: Float[Tensor, "*plate cell latent"], *, n_rounds: int = 4
) -> Float[Tensor, "*plate cell"]:
    """Return ‖∂z(t)/∂z₀ u‖ with u from power iterations on JᵀJ from a ``direction``: from below, and near `map_constant` in few rounds.

    A round is one Jacobian-vector and one vector-Jacobian product, whatever the number of latent dimensions. The result carries
    gradients; u does not, as to first order the norm does not change with its maximiser.

    >>> near_map_constant(lambda z: z.square(), torch.tensor([[1.0, -3.0]]), torch.ones(1, 2), n_rounds=8)
    tensor([6.])
    """
    return _along(flow, z0, _steepest(flow, z0, direction, n_rounds)).norm(dim=-1)


def near_gradient_constant(
    flow: Flow, z0: Float[Tensor, "*plate cell latent"], direction: Float[Tensor, "*plate cell latent"], *, n_rounds: int = 4
) -> Float[Tensor, "*plate cell"]:
    """Return ‖D²F(z₀)[u, v]‖, u and v in turn found by power iterations from a ``direction``: from below, near `gradient_constant`.

    >>> near_gradient_constant(lambda z: z.square(), torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, 0.1]]), n_rounds=8)
    tensor([2.])
    """
    first = second = direction
    for _ in range(n_rounds):
        first, second = second, _steepest(partial(_along, flow, direction=first), z0, second, 1)
    return _along(partial(_along, flow, direction=first), z0, second).norm(dim=-1)


def _along(flow: Flow, z0: Float[Tensor, "*plate cell latent"], direction: Float[Tensor, "*plate cell latent"]) -> Tensor:
    """Return the derivative of a flow along a direction, a Jacobian-vector product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch compiles its own rules for jvp at first use
        return torch.func.jvp(flow, (z0.contiguous(),), (direction.contiguous(),))[1]


def _steepest(flow: Flow, z0: Float[Tensor, "*plate cell latent"], direction: Tensor, n_rounds: int) -> Tensor:
    """Turn a direction towards the one that a flow stretches most."""
    back = torch.func.vjp(flow, z0.contiguous())[1]
    for _ in range(n_rounds):
        direction = torch.nn.functional.normalize(back(_along(flow, z0, direction))[0].detach(), dim=-1)
    return direction


def gradient_constant(flow: Flow, z0: Float[Tensor, "cell latent"], *, n_rounds: int = 10) -> Float[Tensor, " cell"]:
    """Return max over unit u of ‖D²F(z₀)[u, ·]‖₂ for each cell: how fast ∂z(t)/∂z₀ turns, from latent² Jacobian-vector products.

    The search starts from the u of the largest Frobenius norm. D²F is symmetric, so the direction that D²F[u, ·] stretches most serves as
    the next u, and the norm cannot fall; the maximum reached in ``n_rounds`` is local, as a rule the largest.

    >>> gradient_constant(lambda z: z.square(), torch.tensor([[1.0, -3.0]]))
    tensor([2.])
    """
    turning = jacobian(lambda z: jacobian(flow, z)[1].flatten(-2), z0)[1]
    direction = torch.linalg.svd(turning, full_matrices=False).Vh[:, 0]
    turning = turning.unflatten(1, (z0.shape[-1], z0.shape[-1]))
    for _ in range(n_rounds):
        _, size, right = torch.linalg.svd(torch.einsum("cijk,ck->cij", turning, direction))
        direction = right[:, 0]
    return size[:, 0]
