"""How fast a flow parts neighbours (B.2): Lipschitz constants at given rest states, from Jacobian-vector products."""

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


def gradient_constant(flow: Flow, z0: Float[Tensor, "cell latent"], *, n_rounds: int = 10) -> Float[Tensor, " cell"]:
    """Return max over unit u of ‖D²F(z₀)[u, ·]‖₂ for each cell: how fast ∂z(t)/∂z₀ turns, from latent² Jacobian-vector products.

    The search starts from the u of the largest Frobenius norm. D²F is symmetric, so the direction that D²F[u, ·] stretches most serves as
    the next u, and the norm cannot fall; the maximum reached in ``n_rounds`` is local, as a rule the largest.

    >>> gradient_constant(lambda z: z.square(), torch.tensor([[1.0, -3.0]]))
    tensor([2.])
    """
    turning = jacobian(lambda z: jacobian(flow, z)[1].flatten(1), z0)[1]
    direction = torch.linalg.svd(turning, full_matrices=False).Vh[:, 0]
    turning = turning.unflatten(1, (z0.shape[-1], z0.shape[-1]))
    for _ in range(n_rounds):
        _, size, right = torch.linalg.svd(torch.einsum("cijk,ck->cij", turning, direction))
        direction = right[:, 0]
    return size[:, 0]
