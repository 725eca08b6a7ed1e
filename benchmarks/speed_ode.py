"""Rows of `speed.py`: how fast waiting is beside torchdiffeq.

``ode``: value and gradient of a wait of the latent state, 512 cells × 16, beside dopri5 of torchdiffeq at its tolerances of 1e-5 and 1e-6.
Our number of steps is the smallest power of two whose error, against float64 at 1e-10, is not larger. ``plain`` is the same field as a
user's own, which tells nothing of what is constant; ``default`` is the number of steps that a fit starts with; ``torchode`` is dopri5 of
torchode (extra ``bench``), which gives each cell steps of its own, at the same tolerances.

``node_epoch``: the second epoch of `fit` of a neural ODE on the cells of Ishikawa 2023, beside the same model with dopri5 and Pyro's
zero-inflated negative binomial.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from interleaved import interleaved, row
from torch import Tensor, nn
from torchdiffeq import odeint

import perturbprob as pb
from perturbprob.dynamics.neural_ode import NeuralODE
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import Effects
from perturbprob.experiment.vocabulary import Segment
from perturbprob.measurement import Rate
from perturbprob.measurement.counts import ZeroInflatedNegativeBinomial

try:
    import torchode
except ImportError:
    torchode = None

N_CELLS, N_LATENT = 512, 16
WAIT = 2.0
"""In median waits: the last of four days."""


class Own(nn.Module):
    """A field as a user would write it."""

    def __init__(self, field: nn.Module) -> None:
        """Keep the field."""
        super().__init__()
        self.field = field

    def forward(self, z: Tensor, perturbation: Tensor, media: Tensor, clock: Tensor) -> Tensor:
        """Return its push."""
        return self.field(z, perturbation, media, clock)


def waiting() -> tuple[NeuralODE, Tensor, Segment, Effects]:
    """Return a neural ODE with pushes of the size that a fit learns, cells at rest, what is done to them, and the effects of that."""
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        move = NeuralODE(N_LATENT)
    marks = nn.functional.one_hot(torch.arange(N_CELLS) % 20, 20).float()
    segment = Segment(marks, torch.ones(N_CELLS, 1), torch.ones(N_CELLS, dtype=torch.bool), torch.full((N_CELLS,), WAIT))
    effects = Effects(*(torch.randn(size, N_LATENT, generator=random).requires_grad_() for size in (20, 1)))
    return move, torch.randn(N_CELLS, N_LATENT, generator=random).requires_grad_(), segment, effects


def in_double(values: tuple[NeuralODE, Tensor, Segment, Effects]) -> Tensor:
    """Return the end of a wait to ten digits."""
    move, z0, segment, effects = values
    exact = NeuralODE(N_LATENT, solver=Solver("dopri5", tolerance=1e-8)).double()
    exact.load_state_dict(move.state_dict())
    fine = replace(segment, perturbation=segment.perturbation.double(), media=segment.media.double(), wait=segment.wait.double())
    return exact(z0.double(), [fine], Effects(effects.perturbation.double(), effects.media.double())).z.detach()


def ode(repeats: int) -> dict[str, Any]:
    """Time value and gradient of one wait."""
    move, z0, segment, effects = values = waiting()
    own = NeuralODE(N_LATENT, field=Own(move.field))
    own.decay_unconstrained = move.decay_unconstrained
    exact = in_double(values)

    def pushed() -> Callable[[Tensor, Tensor], Tensor]:
        perturbation, media, decay = segment.perturbation @ effects.perturbation, segment.media @ effects.media, move.decay
        return lambda t, z: move.field(z, perturbation, media, t) - decay * (z - z0)

    def theirs() -> Tensor:
        return odeint(pushed(), z0, torch.tensor([0.0, WAIT]), method="dopri5", rtol=1e-5, atol=1e-6)[-1]

    def torchodes() -> Tensor:
        term = torchode.ODETerm(pushed(), with_stats=False)
        adjoint = torchode.AutoDiffAdjoint(torchode.Dopri5(term), torchode.IntegralController(atol=1e-6, rtol=1e-5, term=term))
        wait = torch.tensor([0.0, WAIT]).expand(N_CELLS, 2)
        return adjoint.solve(torchode.InitialValueProblem(y0=z0, t_eval=wait)).ys[:, -1]

    def ours(transition: NeuralODE, n_steps: int) -> Callable[[], Tensor]:
        def end() -> Tensor:
            transition.solver = Solver(n_steps=n_steps, check_every=10**9)
            transition.solver.n_solves = 1  # the check of one solve in fifty is not what is timed
            return transition(z0, [segment], effects).z

        return end

    def back(end: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            move.zero_grad()
            z0.grad = effects.perturbation.grad = effects.media.grad = None
            end().square().mean().backward()

        return step

    bound = error_of(theirs, exact)
    n_steps = next(n for n in (1, 2, 4, 8, 16, 32, 64) if error_of(ours(move, n), exact) <= bound)
    ends = {"perturbprob": ours(move, n_steps), "peer": theirs, "plain": ours(own, n_steps), "default": ours(move, 2)}
    if torchode is not None:
        ends["torchode"] = torchodes
    times = interleaved({name: back(end) for name, end in ends.items()}, repeats)
    return row(times, n_steps=n_steps, error={name: error_of(end, exact) for name, end in ends.items()})


def error_of(end: Callable[[], Tensor], exact: Tensor) -> float:
    """Return the largest error of a state."""
    return float((end().detach().double() - exact).abs().max())


class PyroCounts(ZeroInflatedNegativeBinomial):  # type: ignore[misc]
    """The head with Pyro's own law."""

    def forward(self, log_rate: Tensor | Rate, dispersion: Tensor, gate: Tensor) -> dist.Distribution:  # type: ignore[override]
        """Return the law of the counts."""
        log_rate = log_rate.log if isinstance(log_rate, Rate) else log_rate
        return dist.ZeroInflatedNegativeBinomial(dispersion, logits=log_rate - dispersion.log(), gate=gate)


def node_epoch(repeats: int, minibatch: int = 256) -> dict[str, Any]:
    """Time an epoch of a fit."""
    screen = pb.datasets.ishikawa2023()
    models = {"perturbprob": pb.node(screen), "peer": pb.node(screen, solver="dopri5"), "dopri5 alone": pb.node(screen, solver="dopri5")}
    models["peer"].measurement = PyroCounts(len(screen.genes))
    models["peer"].transition.solver = models["dopri5 alone"].transition.solver = Solver("dopri5", tolerance=1e-3)

    def epoch(model: pb.CellModel) -> Callable[[], float]:
        def second() -> float:
            ends: list[float] = []
            told = {"each_epoch": lambda _: ends.append(time.perf_counter()), "validation": 0.0, "progress": False}
            pb.fit(model, screen, epochs=2, minibatch=minibatch, **told)
            return ends[1] - ends[0]

        return second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = interleaved({name: epoch(model) for name, model in models.items()}, repeats)
    return row(times)
