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


def gradient_constant(flow: Flow, z0: Float[Tensor, "cell latent"], *, n_rounds: int = 5) -> Float[Tensor, " cell"]:
    """Return max over unit u of ‖D²F(z₀)[u, ·]‖₂ for each cell: how fast ∂z(t)/∂z₀ turns.

    D²F is symmetric, so the direction v that D²F[u, ·] stretches most serves as the next u, and the norm cannot fall; ``n_rounds`` such
    steps from a fixed random u reach a maximum that is local, as a rule the largest.

    >>> gradient_constant(lambda z: z.square(), torch.tensor([[1.0, -3.0]]))
    tensor([2.])
    """
    start = torch.randn(z0.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = (start / start.norm()).to(z0).expand_as(z0)
    for _ in range(n_rounds):
        turning = torch.func.jvp(lambda z: jacobian(flow, z)[1], (z0,), (direction,))[1]
        _, size, right = torch.linalg.svd(turning)
        direction = right[..., 0, :]
    return size[..., 0]
