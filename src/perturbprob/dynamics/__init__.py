"""F: how the state moves."""

from perturbprob.dynamics.neural_ode import NeuralODE, Stable
from perturbprob.dynamics.solve import Solver, SolverError
from perturbprob.dynamics.transition import CellState, Effects, Transition

__all__ = ["CellState", "Effects", "NeuralODE", "Solver", "SolverError", "Stable", "Transition"]
