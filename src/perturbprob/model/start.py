"""Where the training of batch effects starts: a regression of the log means of cells of one condition in one batch."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 20_000_000
N_STEPS = 10


def batch_start(
    design: Float[Tensor, "group free"],
    condition: Int[Tensor, " group"],
    log_mean: Float[Tensor, "group gene"],
    information: Float[Tensor, "group gene"],
    sizes: Mapping[str, int],
) -> tuple[Float[Tensor, "gene free"], dict[str, float]]:
    """Return the most probable batch coordinates of each gene, and the standard deviation τ of each kind of them.

    For group k of cells of condition c in one batch, with known ``design`` d and w = ``information`` on the log rate of gene g,

        log_mean_kg = r_cg + d_k · β_g + noise of variance 1 / w_kg,    β ~ Normal(0, τ²),

    whatever the condition effects r are: they are swept out, so where batches coincide with conditions β starts at 0. τ starts at 0.1
    and is found by expectation-maximisation. ``sizes`` are the numbers of columns of each kind, such as η and η by media.

    >>> design, condition = torch.tensor([[0.7], [-0.7]]), torch.tensor([0, 0])
    >>> batch_start(design, condition, torch.tensor([[0.7], [-0.7]]), torch.full((2, 1), 1e4), {"batch": 1})[0]
    tensor([[0.9999]])
    """
    size = max(1, CHUNK // design.numel())
    parts = [_normal_equations(design, condition, y, w) for y, w in zip(log_mean.split(size, 1), information.split(size, 1), strict=True)]
    normal, moment = (torch.cat(part) for part in zip(*parts, strict=True))
    variance = dict.fromkeys(sizes, 0.01)
    for _ in range(N_STEPS):
        precision = torch.cat([torch.full((n,), 1 / variance[kind]) for kind, n in sizes.items()])
        covariance = torch.linalg.inv(normal + torch.diag(precision))
        coordinate = (covariance @ moment[:, :, None])[:, :, 0]
        square = coordinate.square() + covariance.diagonal(dim1=-2, dim2=-1)
        variance = {kind: float(part.mean()) for kind, part in zip(sizes, square.split(list(sizes.values()), 1), strict=True)}
    return coordinate, {kind: v**0.5 for kind, v in variance.items()}


def _normal_equations(
    design: Float[Tensor, "group free"], condition: Int[Tensor, " group"], y: Float[Tensor, "group gene"], w: Float[Tensor, "group gene"]
) -> tuple[Float[Tensor, "gene free free"], Float[Tensor, "gene free"]]:
    """Return both sides of the normal equations of each gene, condition means swept out."""
    member = torch.nn.functional.one_hot(condition).to(w).T
    total = (member @ w).clamp(min=1e-9)
    sums = torch.stack([member @ (w * column[:, None]) for column in design.T], 2)  # condition, gene, free
    swept = y - ((member @ (w * y)) / total)[condition]
    products = (design[:, :, None] * design[:, None]).flatten(1)
    normal = (w.T @ products).unflatten(1, (design.shape[1], -1))
    return normal - torch.einsum("cgp,cgq->gpq", sums / total[..., None], sums), (w * swept).T @ design
