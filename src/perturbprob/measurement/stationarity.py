"""How far cells are from being at rest under a diffusion: the kernel deviation from stationarity."""

import torch
from jaxtyping import Float
from torch import Tensor


def stationarity_deviation(
    x: Float[Tensor, "cell gene"], drift: Float[Tensor, "cell gene"], noise: Float[Tensor, " gene"], bandwidth: float
) -> Float[Tensor, ""]:
    """Kernel deviation of cells from stationarity under dx = f(x) ds + σ ⊙ dB (Lorch, Krause and Schölkopf, 2024).

    If cells x follow the law μ that the diffusion leaves as it is, E_μ[A h(x)] = 0 for its generator A = f·∇ + ½ Σ_g σ_g² ∂²_g and any
    smooth h. The square of the largest E_μ[A h] over functions h of norm 1 in the space of a kernel k is

        KDS = E A_x A_x' k(x, x'),    k(x, x') = exp(−‖x − x'‖² / 2ℓ²),

    x and x' independent. This is its mean over all pairs of two different cells: unbiased, hence below 0 now and then. It is 0 on
    average where cells are at rest under the diffusion, and larger elsewhere. A diffusion c times as fast (f by c, σ by √c) has c²
    times the deviation and the same law at rest, so something must hold the speed when this is minimised.

    Main arguments: states ``x`` and the ``drift`` f at each, (cell, gene); ``noise`` σ, (gene,); ``bandwidth`` ℓ > 0. Raises ValueError
    for fewer than two cells and for a bandwidth that is not above 0.

    >>> x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))  # at rest under dx = −x ds + √2 dB
    >>> [round(abs(float(stationarity_deviation(x, pull * x, torch.tensor([2.0]).sqrt(), 1.0))), 2) for pull in (-1.0, -2.0)]
    [0.0, 0.17]
    """
    if len(x) < 2:
        raise ValueError(f"Deviations from stationarity are means over pairs of cells, and there are {len(x)} cells: give two or more.")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is a distance between states and must be above 0; got {bandwidth}.")
    # everything in units of ℓ, in which k = exp(−‖r‖² / 2), r = x − x'
    x, f, d = x / bandwidth, drift / bandwidth, 0.5 * (noise / bandwidth).square()
    along, crossed = (_along(x, part) for part in (f, f * d))  # f(x) · r and f(x) · (d ⊙ r), by pairs
    curved = _squares(x, d) - d.sum()  # ½ Σ σ² ∂² k, over k
    value = (curved - along) * (curved - along.T) + f @ f.T + 2 * (crossed + crossed.T) - 4 * _squares(x, d.square()) + 2 * d.square().sum()
    value = value * torch.exp(-0.5 * _squares(x, torch.ones_like(d)))
    return (value.sum() - value.diagonal().sum()) / (len(x) * (len(x) - 1))


def _along(x: Float[Tensor, "cell gene"], f: Float[Tensor, "cell gene"]) -> Float[Tensor, "cell cell"]:
    """Return f(x_i) · (x_i − x_j)."""
    return (f * x).sum(1, keepdim=True) - f @ x.T


def _squares(x: Float[Tensor, "cell gene"], weight: Float[Tensor, " gene"]) -> Float[Tensor, "cell cell"]:
    """Return Σ_g w_g (x_ig − x_jg)²."""
    half = _along(x, weight * x)
    return half + half.T
