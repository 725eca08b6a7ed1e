"""Solvers: order, references, and what happens when the steps are too long."""

import numpy as np
import pytest
import torch

from perturbprob.dynamics.solve import Solver, SolverError, runge_kutta


def rotation(n_cells=4, size=3, seed=0):
    """A linear field that turns and decays, y' = y Aᵀ, with its exact answer."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=random, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)
    state = torch.randn(n_cells, size, generator=random, dtype=torch.float64)
    return lambda s, y: y @ matrix.T, state, state @ torch.matrix_exp(matrix).T


def decays(*rates):
    """One decay rate per cell."""
    rate = torch.tensor(rates, dtype=torch.float64)[:, None]
    return lambda s, y: -rate * y, torch.ones(len(rates), 2, dtype=torch.float64)


# References.


def test_a_linear_field_is_the_matrix_exponential():
    slope, state, exact = rotation()
    torch.testing.assert_close(runge_kutta(slope, state, 400), exact, rtol=1e-8, atol=1e-8)


def test_the_error_falls_with_the_fourth_power_of_the_step():
    state = torch.ones(1, 1, dtype=torch.float64)
    exact = np.exp(np.sin(2.0))  # of y' = 2 cos(2 s) y, which reads the time
    errors = [float(abs(runge_kutta(lambda s, y: 2 * torch.cos(2 * s) * y, state, n) - exact)) for n in (8, 16, 32, 64)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 4, atol=0.25)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_solver_reaches_its_tolerance(method):
    slope, state, exact = rotation()
    torch.testing.assert_close(Solver(method, tolerance=1e-7, max_steps=512)(slope, state), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 3.0, 6.0, 15.0, 40.0])
def test_the_answer_is_within_the_tolerance_of_the_exact_one(rate):
    slope, state = decays(rate)
    exact = 3 * np.exp(-rate)
    error = (Solver(tolerance=1e-3)(slope, 3 * state) - exact).abs().max() / (1 + exact)
    assert error < 1.1e-3


def test_gradients_through_a_solve_are_those_of_the_exact_answer():
    state = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    answer = Solver(n_steps=64)(lambda s, y: -rate * y, state)
    by_state, by_rate = torch.autograd.grad(answer.sum(), (state, rate))
    assert float(by_state) == pytest.approx(np.exp(-0.7), rel=1e-8)
    assert float(by_rate) == pytest.approx(-2 * np.exp(-0.7), rel=1e-8)


# Laws.


def test_cells_do_not_see_each_other():
    slope, state = decays(0.3, 1.0, 2.0)
    together = runge_kutta(slope, state, 8)
    for cell, rate in enumerate((0.3, 1.0, 2.0)):
        alone, one = decays(rate)
        assert torch.equal(together[[cell]], runge_kutta(alone, one, 8))


def test_a_zero_slope_leaves_the_state_alone_to_the_last_bit():
    state = torch.randn(3, 2)
    assert torch.equal(Solver()(lambda s, y: 0 * y, state), state)


def test_a_stiff_field_raises_the_number_of_steps_for_good():
    solver = Solver()
    slope, state = decays(1.0, 40.0)
    solver(slope, state)
    raised = solver.n_steps
    assert raised >= 16
    solver(*decays(1.0, 1.0))
    assert solver.n_steps == raised


def test_a_training_run_checks_one_solve_in_so_many_and_a_run_without_gradients_every_one():
    calls = []

    def slope(s, y):
        calls.append(torch.is_grad_enabled())
        return -0.1 * y

    def evaluations(n_solves):
        calls.clear()
        for _ in range(n_solves):
            solver(slope, torch.ones(1, 1))
        return len(calls)

    solver = Solver(n_steps=1, check_every=5)
    assert evaluations(10) == 10 * 4 + 2 * (4 + 8)
    assert sum(calls) == 40  # the checks carry no gradients
    with torch.no_grad():
        assert evaluations(3) == 3 * (4 + 8)


def test_the_check_is_on_the_worst_cell_of_any_draw():
    rate = torch.tensor([[1.0, 1.0], [1.0, 1e6]], dtype=torch.float64)[..., None]
    with pytest.raises(SolverError) as caught:
        Solver()(lambda s, y: -rate * y, torch.ones(2, 2, 3, dtype=torch.float64))
    assert caught.value.cell == 1


# Misuse.


def test_a_field_that_is_too_stiff_names_the_worst_cell():
    with pytest.raises(SolverError, match=r"could not be solved with 128 steps: relative error") as caught:
        Solver()(*decays(1.0, 1e3, 2.0))
    assert caught.value.cell == 1
    assert caught.value.error > 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_field_that_is_not_finite_names_its_cell(value):
    push = torch.tensor([[0.0], [0.0], [value]])
    with pytest.raises(SolverError, match="could not be solved") as caught:
        Solver()(lambda s, y: push - y, torch.zeros(3, 1))
    assert caught.value.cell == 2


@pytest.mark.parametrize(
    "wrong", [{"n_steps": 0}, {"n_steps": 8, "max_steps": 4}, {"tolerance": 0.0}, {"tolerance": -1.0}, {"check_every": 0}], ids=str
)
def test_a_solver_refuses_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match="1 <= n_steps <= max_steps, a tolerance above 0 and check_every of at least 1"):
        Solver(**wrong)
