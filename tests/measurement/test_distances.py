"""Distances between sets of cells: laws, references by formula, scipy and POT, gradients by finite differences, errors."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from perturbprob.measurement import DISTANCES, Distance, default_blur, energy, moment, sinkhorn

every_distance = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)


def cells(n_cells: int, n_genes: int = 3, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal cells in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n_cells, n_genes, dtype=torch.float64, generator=generator) + shift


X, Y = cells(12), cells(17, seed=1, scale=1.5, shift=0.5)


def gradient(distance: Distance, x: Tensor, y: Tensor, **settings: float) -> Tensor:
    """Gradient of a distance in its first set."""
    x = x.clone().requires_grad_()
    distance(x, y, **settings).backward()
    return x.grad


# laws


@every_distance
def test_identical_sets_are_at_distance_zero_in_any_order(distance: Distance) -> None:
    assert distance(X, X).item() == pytest.approx(0, abs=1e-12)
    assert distance(X, X.flip(0)).item() == pytest.approx(0, abs=1e-12)


@every_distance
def test_identical_sets_have_no_gradient(distance: Distance) -> None:
    torch.testing.assert_close(gradient(distance, X, X.clone()), torch.zeros_like(X), rtol=0, atol=1e-7)


@every_distance
def test_it_is_symmetric_and_positive(distance: Distance) -> None:
    assert distance(X, Y) > 0
    torch.testing.assert_close(distance(X, Y), distance(Y, X), rtol=1e-9, atol=0)


@every_distance
@pytest.mark.parametrize("seed", range(5))
def test_it_is_not_negative_for_sets_of_one_law(distance: Distance, seed: int) -> None:
    assert distance(cells(9, seed=seed), cells(14, seed=seed + 100)) >= 0


@every_distance
def test_order_and_copies_of_all_cells_do_not_count(distance: Distance) -> None:
    expected = distance(X, Y)
    torch.testing.assert_close(distance(X.flip(0), Y.roll(3, 0)), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(distance(X.repeat(2, 1), Y.repeat(3, 1)), expected, rtol=1e-9, atol=0)


@every_distance
def test_a_common_shift_does_not_count(distance: Distance) -> None:
    torch.testing.assert_close(distance(X + 1e3, Y + 1e3), distance(X, Y), rtol=1e-7, atol=0)


@every_distance
def test_it_keeps_the_precision_of_the_cells_and_is_accurate_in_float32(distance: Distance) -> None:
    single = distance(X.float() + 100, Y.float() + 100)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), distance(X, Y), rtol=1e-4, atol=0)


@every_distance
@pytest.mark.parametrize("n_cells", [1, 2])
def test_coinciding_cells_and_sets_of_one_have_a_finite_gradient(distance: Distance, n_cells: int) -> None:
    x = torch.full((n_cells, 3), 0.1)
    for y in (x.clone(), x[:1] + 1, torch.cat([x, x + 1])):
        assert distance(x, y).isfinite()
        assert gradient(distance, x, y).isfinite().all()


@every_distance
def test_descending_its_gradient_moves_one_set_onto_the_other(distance: Distance) -> None:
    x = X.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        distance(x, Y).backward()
        optimiser.step()
    assert distance(x.detach(), Y) < 0.2 * distance(X, Y)


# moment


def test_moment_adds_squared_differences_of_means_and_variances() -> None:
    x, y = X.numpy(), Y.numpy()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + ((x.var(0) - y.var(0)) ** 2).sum()
    assert moment(X, Y).item() == pytest.approx(expected, rel=1e-12)


def test_moment_is_blind_to_covariance_and_energy_is_not() -> None:
    line = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    other = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    assert moment(line, other) == 0
    assert energy(line, other) > 0.5


# energy


def powers(x: np.ndarray, y: np.ndarray, exponent: float) -> np.ndarray:
    """Distances of all pairs to a power, by the formula."""
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)) ** exponent


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_energy_is_its_formula(exponent: float, unbiased: bool) -> None:
    x, y = X.numpy(), Y.numpy()
    n_x, n_y = len(x), len(y)
    within_x = powers(x, x, exponent).sum() / (n_x * (n_x - unbiased))
    within_y = powers(y, y, exponent).sum() / (n_y * (n_y - unbiased))
    expected = 2 * powers(x, y, exponent).mean() - within_x - within_y
    assert energy(X, Y, exponent=exponent, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-10)


def test_energy_in_one_gene_is_the_square_of_scipys() -> None:
    x, y = X[:, :1], Y[:, :1]
    # scipy returns √(2 ∫ (F − G)²), and 2 ∫ (F − G)² = 2 E|X − Y| − E|X − X'| − E|Y − Y'|
    expected = stats.energy_distance(x.ravel().numpy(), y.ravel().numpy()) ** 2
    assert energy(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_squared_energy_sees_means_only() -> None:
    wider = X.mean(0) + 3 * (X - X.mean(0))
    assert energy(X, wider, exponent=2.0).item() == pytest.approx(0, abs=1e-10)
    assert energy(X, wider) > 0.1
    twice = 2 * (X.mean(0) - Y.mean(0)).square().sum()
    torch.testing.assert_close(energy(X, Y, exponent=2.0), twice, rtol=1e-10, atol=0)


def test_unbiased_energy_is_zero_on_average_for_one_law() -> None:
    values = torch.stack([energy(cells(6, seed=i), cells(5, seed=i + 1000), unbiased=True) for i in range(400)])
    assert values.min() < 0
    assert abs(values.mean()) < 4 * values.std() / 20


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradient_of_energy_is_that_of_finite_differences(exponent: float, unbiased: bool) -> None:
    x, y = X[:4].clone().requires_grad_(), Y[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: energy(a, b, exponent=exponent, unbiased=unbiased), (x, y))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_gradient_of_energy_is_finite_and_exact_beside_coinciding_cells(exponent: float) -> None:
    # one cell of y lies on a cell of x: the pair itself pulls nowhere, all others as before
    y = torch.cat([Y, X[:1]])
    expected = np.zeros(3)
    for other, weight in [(Y, 2 / (12 * 18)), (X[1:], -2 / 144)]:
        away = (X[0] - other).numpy()
        expected += weight * exponent * (np.linalg.norm(away, axis=1, keepdims=True) ** (exponent - 2) * away).sum(0)
    np.testing.assert_allclose(gradient(energy, X, y, exponent=exponent)[0].numpy(), expected, rtol=1e-8)


# sinkhorn


def by_pot(x: Tensor, y: Tensor, blur: float) -> tuple[float, np.ndarray]:
    """Divergence and its gradient in x, by POT."""
    ot = pytest.importorskip("ot")

    def solve(a: Tensor, b: Tensor) -> tuple[float, np.ndarray]:
        """Value and plan."""
        solution = ot.solve(ot.dist(a.numpy(), b.numpy()) / 2, reg=blur**2, reg_type="KL", max_iter=20_000, tol=1e-9)
        return solution.value, solution.plan

    (value, plan), (value_x, plan_x), (value_y, _) = solve(x, y), solve(x, x), solve(y, y)
    return value - value_x / 2 - value_y / 2, plan_x @ x.numpy() - plan @ y.numpy()


def relative_error(found: Tensor, expected: np.ndarray) -> float:
    """Length of the difference as a share of what was expected."""
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("blur", [0.8, 1.5, 3.0])
def test_sinkhorn_and_its_gradient_are_those_of_pot(blur: float) -> None:
    value, expected = by_pot(X, Y, blur)
    assert sinkhorn(X, Y, blur=blur).item() == pytest.approx(value, rel=1e-7)
    assert relative_error(gradient(sinkhorn, X, Y, blur=blur), expected) < 1e-5


def test_gradient_of_sinkhorn_is_pots_where_sets_are_alike_and_genes_are_many() -> None:
    x, y = cells(40, 50), cells(50, 50, seed=1, scale=1.02)
    value, expected = by_pot(x, y, default_blur(x, y))
    assert sinkhorn(x, y).item() == pytest.approx(value, rel=1e-7)
    assert relative_error(gradient(sinkhorn, x, y), expected) < 1e-5
    assert relative_error(gradient(sinkhorn, x.float(), y.float()), expected) < 1e-5


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
    exact = gradient(sinkhorn, X, partners, blur=0.8, tolerance=1e-9)
    assert relative_error(gradient(sinkhorn, X, partners, blur=0.8), exact.numpy()) < 1e-4


def test_sinkhorn_of_a_shift_is_half_its_square() -> None:
    shift = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    assert sinkhorn(X, X + shift).item() == pytest.approx(12.5, rel=1e-10)
    torch.testing.assert_close(gradient(sinkhorn, X, X + shift), (-shift / 12).expand(12, 3))


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


# misuse


@every_distance
@pytest.mark.usefixtures("unchecked")
def test_sets_of_other_genes_are_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match="x has 3 genes and y has 2: give both the same genes"):
        distance(X, Y[:, :2])


@every_distance
def test_an_empty_set_is_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match=r"y is empty, with shape \(0, 3\): give at least one cell"):
        distance(X, Y[:0])


@every_distance
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted_and_placed(distance: Distance, value: float) -> None:
    x = X.clone()
    x[2, 1] = x[3, 0] = value
    with pytest.raises(ValueError, match="x holds NaN or infinity in 2 places, the first in cell 2, gene 1"):
        distance(x, Y)


@every_distance
@pytest.mark.usefixtures("unchecked")
def test_a_tensor_that_is_no_set_of_cells_is_named(distance: Distance) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3,\): give a set of cells"):
        distance(X[0], Y)


@pytest.mark.parametrize("exponent", [0.0, -1.0, 2.5, float("nan")])
def test_an_exponent_that_gives_no_distance_is_named(exponent: float) -> None:
    with pytest.raises(ValueError, match=f"exponent must be above 0 and at most 2, and is {exponent}"):
        energy(X, Y, exponent=exponent)


def test_unbiased_energy_needs_two_cells() -> None:
    with pytest.raises(ValueError, match="x has 1 and y 17 cells, and unbiased=True needs two"):
        energy(X[:1], Y, unbiased=True)


@pytest.mark.parametrize("blur", [0.0, -1.0, float("nan"), float("inf")])
def test_a_blur_that_is_no_length_is_named(blur: float) -> None:
    with pytest.raises(ValueError, match=f"blur must be a positive length, and is {blur}"):
        sinkhorn(X, Y, blur=blur)
