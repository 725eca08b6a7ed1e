"""The Sinkhorn divergence against POT and finite differences, its limits, and its blur; the laws are in test_distances."""

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbprob.measurement import default_blur, sinkhorn


def cells(n_cells: int, n_genes: int = 3, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal cells in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n_cells, n_genes, dtype=torch.float64, generator=generator) + shift


X, Y = cells(12), cells(17, seed=1, scale=1.5, shift=0.5)


def gradient(x: Tensor, y: Tensor, **settings: float | Tensor) -> Tensor:
    """Gradient of the divergence in its first set."""
    x = x.clone().requires_grad_()
    sinkhorn(x, y, **settings).backward()
    return x.grad


def by_pot(x: Tensor, y: Tensor, blur: float, w: np.ndarray | None = None, v: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """Divergence and its gradient in x, by POT."""
    ot = pytest.importorskip("ot")

    def solve(a: Tensor, b: Tensor, w: np.ndarray | None, v: np.ndarray | None) -> tuple[float, np.ndarray]:
        """Value and plan."""
        solution = ot.solve(ot.dist(a.numpy(), b.numpy()) / 2, w, v, reg=blur**2, reg_type="KL", max_iter=20_000, tol=1e-9)
        return solution.value, solution.plan

    (value, plan), (value_x, plan_x), (value_y, _) = solve(x, y, w, v), solve(x, x, w, w), solve(y, y, v, v)
    return value - value_x / 2 - value_y / 2, plan_x @ x.numpy() - plan @ y.numpy()


def relative_error(found: Tensor, expected: np.ndarray) -> float:
    """Length of the difference as a share of what was expected."""
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("blur", [0.8, 1.5, 3.0])
def test_sinkhorn_and_its_gradient_are_those_of_pot(blur: float) -> None:
    value, expected = by_pot(X, Y, blur)
    assert sinkhorn(X, Y, blur=blur).item() == pytest.approx(value, rel=1e-7)
    assert relative_error(gradient(X, Y, blur=blur), expected) < 1e-5


def test_weighted_sinkhorn_and_its_gradient_are_those_of_pot() -> None:
    w, v = torch.arange(1.0, 13).double(), 1 + torch.arange(17.0).double() % 4
    value, expected = by_pot(X, Y, 1.5, (w / w.sum()).numpy(), (v / v.sum()).numpy())
    assert sinkhorn(X, Y, blur=1.5, x_weights=w, y_weights=v).item() == pytest.approx(value, rel=1e-6)
    assert relative_error(gradient(X, Y, blur=1.5, x_weights=w, y_weights=v), expected) < 1e-5


def test_gradient_of_sinkhorn_is_pots_where_sets_are_alike_and_genes_are_many() -> None:
    x, y = cells(40, 50), cells(50, 50, seed=1, scale=1.02)
    value, expected = by_pot(x, y, default_blur(x, y))
    assert sinkhorn(x, y).item() == pytest.approx(value, rel=1e-7)
    assert relative_error(gradient(x, y), expected) < 1e-5
    assert relative_error(gradient(x.float(), y.float()), expected) < 1e-5


@pytest.mark.parametrize("blur", [0.8, 3.0])
def test_gradient_of_sinkhorn_is_that_of_finite_differences(blur: float) -> None:
    def divergence(x: Tensor, y: Tensor) -> Tensor:
        """Iterated until nothing moves."""
        return sinkhorn(x, y, blur=blur, tolerance=1e-11, n_iterations=20_000)

    x, y = X[:3, :2].clone().requires_grad_(), Y[:4, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(divergence, (x, y), rtol=1e-5, atol=1e-8)


def test_sinkhorn_has_an_accurate_gradient_between_partners() -> None:
    # each cell beside its partner: the plan is nearly a permutation, the hardest case for the iteration
    partners = X + 0.3 * cells(12, seed=2)
    exact = gradient(X, partners, blur=0.8, tolerance=1e-9)
    assert relative_error(gradient(X, partners, blur=0.8), exact.numpy()) < 1e-4


def test_sinkhorn_of_a_shift_is_half_its_square() -> None:
    shift = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    assert sinkhorn(X, X + shift).item() == pytest.approx(12.5, rel=1e-10)
    torch.testing.assert_close(gradient(X, X + shift), (-shift / 12).expand(12, 3))


def test_sinkhorn_is_half_the_squared_wasserstein_distance_at_small_blur_and_of_means_at_large() -> None:
    x, y = X[:, :1], Y[:12, :1]
    wasserstein = (x.sort(0).values - y.sort(0).values).square().mean() / 2
    torch.testing.assert_close(sinkhorn(x, y, blur=0.1, tolerance=1e-3), wasserstein, rtol=0.02, atol=0)
    means = (x.mean(0) - y.mean(0)).square().sum() / 2
    torch.testing.assert_close(sinkhorn(x, y, blur=1e3), means, rtol=1e-4, atol=0)


def test_default_blur_scales_with_the_data_and_not_with_a_shift() -> None:
    blur = default_blur(X, Y)
    cost = (((X - X.mean(0))[:, None] - (Y - Y.mean(0))[None]) ** 2).sum(-1) / 2
    assert blur == pytest.approx(float(0.1 * cost.std(correction=0)) ** 0.5)
    assert default_blur(7 * X, 7 * Y + 30) == pytest.approx(7 * blur)
    assert default_blur(Y, X) == pytest.approx(blur)
    assert sinkhorn(X, Y) == sinkhorn(X, Y, blur=blur)


def test_sinkhorn_warns_where_it_did_not_converge() -> None:
    with pytest.warns(UserWarning, match=r"did not reach tolerance=1e-06 in n_iterations=3.*larger blur, or more n_iterations"):
        sinkhorn(X, Y, n_iterations=3)


@pytest.mark.parametrize("blur", [0.0, -1.0, float("nan"), float("inf")])
def test_a_blur_that_is_no_length_is_named(blur: float) -> None:
    with pytest.raises(ValueError, match=f"blur must be a positive length, and is {blur}"):
        sinkhorn(X, Y, blur=blur)
