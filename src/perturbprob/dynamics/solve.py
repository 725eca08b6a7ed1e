"""Solve the state forward in time: batched fixed-step Runge-Kutta with an error check, and torchdiffeq behind the same call."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Slope = Callable[[Float[Tensor, ""], Float[Tensor, "*plate state"]], Float[Tensor, "*plate state"]]

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


class SolverError(RuntimeError):
    """The state could not be solved to the tolerance. ``cell`` is the row of the worst cell, ``error`` its error."""

    def __init__(self, message: str, cell: int = -1, error: float = float("nan")) -> None:
        """Keep the worst cell beside the message; Pyro raises it again with the message alone."""
        super().__init__(message)
        self.cell, self.error = cell, error


def runge_kutta(slope: Slope, state: Float[Tensor, "*plate state"], n_steps: int) -> Float[Tensor, "*plate state"]:
    """Integrate dy/ds = slope(s, y) over s from 0 to 1 by the classical fourth-order method in equal steps.

    >>> decay = lambda s, y: -y
    >>> float(runge_kutta(decay, torch.ones(1, 1), 8)).__round__(4)
    0.3679
    """
    h = 1.0 / n_steps
    for k in range(n_steps):
        s = torch.as_tensor(k * h, dtype=state.dtype, device=state.device)
        k1 = slope(s, state)
        k2 = slope(s + h / 2, torch.add(state, k1, alpha=h / 2))
        k3 = slope(s + h / 2, torch.add(state, k2, alpha=h / 2))
        k4 = slope(s + h, torch.add(state, k3, alpha=h))
        state = torch.add(state, (k1 + k4) + 2 * (k2 + k3), alpha=h / 6)
    return state


class OwnSteps(ABC):
    """A slope that takes the steps of `runge_kutta` by itself, in less time: a `Solver` asks it to."""

    @abstractmethod
    def __call__(self, s: Float[Tensor, ""], state: Float[Tensor, "*plate state"]) -> Float[Tensor, "*plate state"]:
        """Return dy/ds."""

    @abstractmethod
    def steps(self, state: Float[Tensor, "*plate state"], n_steps: int) -> Float[Tensor, "*plate state"]:
        """Return what `runge_kutta` returns of this slope, up to the last digits, with the same gradients."""


def _steps(slope: Slope, state: Float[Tensor, "*plate state"], n_steps: int) -> Float[Tensor, "*plate state"]:
    """Take the steps as the slope takes them."""
    return slope.steps(state, n_steps) if isinstance(slope, OwnSteps) else runge_kutta(slope, state, n_steps)


@final
class Solver:
    """How a `Transition` solves its waits.

    ``method`` is "rk4", our own fixed steps, or an adaptive method of torchdiffeq: "dopri5", "dopri8", "bosh3", "adaptive_heun".
    With "rk4" every ``check_every``-th solve of a training run, and every solve without gradients, is repeated with doubled
    steps: where the two differ by more than ``tolerance`` times (1 + abs(state)), the number of steps is doubled, up to
    ``max_steps``, and beyond that `SolverError` names the worst cell. In training the doubled number stays; without gradients
    the finer answer is returned and nothing stays, so that an answer does not depend on what was asked before.
    """

    def __init__(
        self, method: str = "rk4", *, n_steps: int = 2, max_steps: int = 128, tolerance: float = 1e-2, check_every: int = 50
    ) -> None:
        """Choose the method and its accuracy."""
        if method not in ("rk4", *ADAPTIVE):
            raise ValueError(f"Unknown solver {method!r}. Use one of {', '.join(map(repr, ('rk4', *ADAPTIVE)))}.")
        if n_steps < 1 or max_steps < n_steps or tolerance <= 0 or check_every < 1:
            raise ValueError("A solver needs 1 <= n_steps <= max_steps, a tolerance above 0 and check_every of at least 1.")
        self.method, self.n_steps, self.max_steps = method, n_steps, max_steps
        self.tolerance, self.check_every = tolerance, check_every
        self.n_solves = 0

    def __call__(self, slope: Slope, state: Float[Tensor, "*plate state"]) -> Float[Tensor, "*plate state"]:
        """Return y(1) of dy/ds = slope(s, y), y(0) = state."""
        if self.method != "rk4":
            return self._reference(slope, state)
        if not torch.is_grad_enabled():
            return self._doubled(slope, state)[1]
        if self.n_solves % self.check_every == 0:
            with torch.no_grad():
                self.n_steps = self._doubled(slope, state.detach())[0]
        self.n_solves += 1
        return _steps(slope, state, self.n_steps)

    def _doubled(self, slope: Slope, state: Float[Tensor, "*plate state"]) -> tuple[int, Float[Tensor, "*plate state"]]:
        """Double the number of steps until doubling it once more changes nothing that matters; return it, and the finer answer."""
        n_steps, coarse = self.n_steps, _steps(slope, state, self.n_steps)
        while True:
            fine = _steps(slope, state, 2 * n_steps)
            worst = ((fine - coarse).abs() / (1 + fine.abs())).amax(-1)
            if (worst <= self.tolerance).all():
                return n_steps, fine
            if 2 * n_steps > self.max_steps:
                by_cell = torch.nan_to_num(worst, nan=torch.inf).reshape(-1, worst.shape[-1]).amax(0)
                cell, error = int(by_cell.argmax()), float(by_cell.max())
                raise SolverError(f"The wait could not be solved with {n_steps} steps: relative error {error:.2g}.", cell, error)
            n_steps, coarse = 2 * n_steps, fine

    def _reference(self, slope: Slope, state: Float[Tensor, "*plate state"]) -> Float[Tensor, "*plate state"]:
        """Solve with torchdiffeq."""
        from torchdiffeq import odeint

        span = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
        try:
            return odeint(slope, state, span, method=self.method, rtol=self.tolerance * 1e-2, atol=self.tolerance * 1e-3)[-1]
        except AssertionError as error:  # torchdiffeq's "underflow in dt"
            raise SolverError(f"The wait could not be solved with {self.method}: {error}.") from error
