"""F: how the state moves."""

from perturbprob.dynamics.causal_context import CausalContext, NetworkEffects
from perturbprob.dynamics.latent_shift import LatentShift
from perturbprob.dynamics.neural_ode import NeuralODE, Stable
from perturbprob.dynamics.neural_sde import NeuralSDE
from perturbprob.dynamics.solve import Solver, SolverError
from perturbprob.dynamics.stationary import StationaryDiffusion
from perturbprob.dynamics.transition import CellState, Effects, Transition

__all__ = [
    "CausalContext",
    "CellState",
    "Effects",
    "LatentShift",
    "NetworkEffects",
    "NeuralODE",
    "NeuralSDE",
    "Solver",
    "SolverError",
    "Stable",
    "StationaryDiffusion",
    "Transition",
]
