"""The kernel deviation from stationarity: its formula, its zero, and whether its minimum is the network behind knock-outs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.func import grad, jacrev, vmap

from perturbprob.measurement import stationarity_deviation


def by_derivatives(x: Tensor, drift: Callable[[Tensor], Tensor], noise: Tensor, bandwidth: float) -> Tensor:
    """The same by applying the generator twice, with the derivatives of automatic differentiation."""

    def generator(h: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda at: grad(h)(at) @ drift(at) + 0.5 * (noise.square() * jacrev(grad(h))(at).diagonal()).sum()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a - b).square().sum() / (2 * bandwidth**2))

    def twice(a: Tensor, b: Tensor) -> Tensor:
        return generator(lambda of: generator(lambda to: kernel(of, to))(b))(a)

    pairs = vmap(vmap(twice, (None, 0)), (0, None))(x, x)
    return (pairs.sum() - pairs.diagonal().sum()) / (len(x) * (len(x) - 1))


def at_rest(matrix: np.ndarray, noise: np.ndarray, n_cells: int, rng: np.random.Generator) -> Tensor:
    """Cells of the Ornstein-Uhlenbeck process dx = M x ds + σ dB at rest, whose covariance C has M C + C Mᵀ = −σσᵀ."""
    covariance = solve_continuous_lyapunov(matrix, -np.diag(noise**2))
    return torch.from_numpy(rng.multivariate_normal(np.zeros(len(matrix)), covariance, n_cells))


@pytest.fixture
def matrix() -> np.ndarray:
    """A stable network of three genes with a cycle."""
    return np.array([[-1.0, 0.6, 0.0], [-0.8, -1.0, 0.0], [0.0, 0.9, -1.0]])


def test_it_is_the_generator_applied_twice_to_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights, noise = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (4, 4), (4,)))

    def drift(z: Tensor) -> Tensor:
        return torch.tanh(z) @ weights.T - z

    found = stationarity_deviation(x, drift(x), noise.exp(), 1.7)
    torch.testing.assert_close(found, by_derivatives(x, drift, noise.exp(), 1.7), rtol=1e-9, atol=1e-12)


def test_it_is_zero_on_average_at_rest_and_nowhere_else(matrix: np.ndarray) -> None:
    rng, noise = np.random.default_rng(1), np.array([1.0, 0.5, 1.5])
    wrong = {"transposed": matrix.T, "no cycle": matrix * (matrix > -0.7), "faster decay": matrix - np.eye(3)}
    found: dict[str, list[float]] = {}
    for _ in range(60):
        x = at_rest(matrix, noise, 100, rng)
        for name, used in {"true": matrix, **wrong}.items():
            found.setdefault(name, []).append(float(stationarity_deviation(x, x @ torch.from_numpy(used).T, torch.from_numpy(noise), 2.0)))
    mean = {name: np.mean(values) / (np.std(values) / len(values) ** 0.5) for name, values in found.items()}
    assert abs(mean["true"]) < 3
    assert all(mean[name] > 10 for name in wrong)


def test_it_grows_with_the_square_of_speed(matrix: np.ndarray) -> None:
    x, noise = at_rest(matrix, np.ones(3), 20, np.random.default_rng(2)), torch.ones(3, dtype=torch.float64)
    once, fast = (stationarity_deviation(x, c * x @ torch.from_numpy(matrix), c**0.5 * noise, 1.0) for c in (1.0, 3.0))
    torch.testing.assert_close(fast, 9 * once)


def test_its_gradient_is_finite_where_cells_coincide() -> None:
    x = torch.ones(5, 3)
    drift, noise = torch.ones(5, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    stationarity_deviation(x, drift * x, noise, 1.0).backward()
    assert drift.grad is not None
    assert noise.grad is not None
    assert torch.isfinite(drift.grad).all()
    assert torch.isfinite(noise.grad).all()


def test_its_minimum_is_the_network_behind_knockouts() -> None:
    """Seven genes; a knock-out sets the input from its gene to −1, as control has mean 0, and all cells are taken at rest."""
    rng, n = np.random.default_rng(3), 7
    truth = np.where(rng.random((n, n)) < 0.25, rng.choice([-1, 1], (n, n)) * rng.uniform(0.3, 0.7, (n, n)), 0.0) * (1 - np.eye(n))
    assert np.linalg.eigvals(truth - np.eye(n)).real.max() < -0.2
    kept = np.ones((n + 1, n)) - np.eye(n + 1, n, -1)
    conditions = []
    for row in kept:
        used = truth * row
        shift = np.linalg.solve(np.eye(n) - used, -(truth @ (1 - row)))
        conditions.append(at_rest(used - np.eye(n), np.ones(n), 150, rng) + torch.from_numpy(shift))
    gates, eye = torch.from_numpy(kept), torch.eye(n, dtype=torch.float64)
    weights, bias = torch.zeros(n, n, dtype=torch.float64, requires_grad=True), torch.zeros(n, dtype=torch.float64, requires_grad=True)
    log_noise = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weights, bias, log_noise], lr=0.03)
    for _ in range(250):
        optimiser.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for x, gate in zip(conditions, gates, strict=True):
            drift = ((gate * x - (1 - gate)) @ (weights * (1 - eye)).T) + bias - x
            loss = loss + stationarity_deviation(x, drift, log_noise.exp(), 4.0)
        loss.backward()
        optimiser.step()
    found, edge = weights.detach().numpy(), ~np.eye(n, dtype=bool)
    there = (truth != 0)[edge]
    assert average_precision_score(there, np.abs(found[edge])) > 3 * there.mean()
    assert np.corrcoef(found[edge], truth[edge])[0, 1] > 0.9


def test_misuse() -> None:
    with pytest.raises(ValueError, match="there are 1 cells: give two or more"):
        stationarity_deviation(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="bandwidth is a distance between states and must be above 0; got 0"):
        stationarity_deviation(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(2), 0.0)
