"""Running a flow backward: exact where it can be done, and honest about where it cannot."""

import pytest
import torch

from perturbprob.dynamics.inverse import invert, jacobian


def linear(matrix):
    return lambda z: z @ matrix.T + 0.3


def test_a_linear_flow_is_solved_in_one_step_and_its_condition_is_that_of_the_matrix():
    torch.manual_seed(0)
    matrix, z0 = torch.randn(3, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    back = invert(linear(matrix), linear(matrix)(z0), start=torch.zeros_like(z0))
    torch.testing.assert_close(back.z0, z0)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(back.condition_number, (values[0].clamp(min=1) / values[-1]).expand(5))
    assert (back.residual < 1e-8).all()


def test_the_jacobian_is_that_of_autograd_for_each_cell():
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    z = torch.randn(4, 3, dtype=torch.float64)
    slope = jacobian(network, z)[1]
    for cell in range(4):
        torch.testing.assert_close(slope[cell], torch.autograd.functional.jacobian(network, z[cell]))


def test_a_bent_flow_is_inverted_by_damped_steps():
    flow = lambda z: z + 0.9 * torch.sin(3 * z) / 3  # noqa: E731
    z0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(invert(flow, flow(z0), start=torch.zeros_like(z0), tolerance=1e-10).z0, z0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_contraction_looks_perfect_forward_and_backward_and_its_condition_says_it_is_not(gamma):
    """exp(−γ t) around a fixed point at t = 5: at γ = 2 an error of a thousandth is a whole standard deviation of rest states."""
    shrink, z0 = torch.exp(torch.tensor(-gamma * 5, dtype=torch.float64)), torch.randn(20, 2, dtype=torch.float64)
    flow = lambda z: 1 + shrink * (z - 1)  # noqa: E731
    back = invert(flow, flow(z0), start=torch.zeros_like(z0), tolerance=1e-14)
    assert (back.z0 - z0).abs().max() < 1e-6
    torch.testing.assert_close(back.condition_number, (1 / shrink).expand(20))
    noisy = invert(flow, flow(z0) + 1e-3, start=torch.zeros_like(z0), tolerance=1e-14)
    torch.testing.assert_close((noisy.z0 - z0).mean(), 1e-3 / shrink)
    assert (noisy.condition_number[0] > 100) == (gamma == 2.0)
