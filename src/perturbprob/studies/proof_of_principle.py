"""Section 4, Figure 4: does the steady-state term of eq 9 help a neural ODE to predict a hidden time? With the controls a claim needs."""

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from perturbprob.dynamics.neural_ode import NeuralODE
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.transition import CellState, Effects
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.split import hold_out_time
from perturbprob.inference.draws import bar
from perturbprob.studies.baselines import MEAN_BASELINES, noise_floor
from perturbprob.studies.time_course import TimeCourse

MOVING = ("JARID2", "ZNF649", "ZNF90", "POU5F1", "RUNX1T1", "ZNF398", "SOX2", "PRDM14", "MYC", "VENTX", "ZIC2")
"""The eleven perturbations whose last day section 4 hides."""
STARTS = ("control", "own")
RATE, ENOUGH = 3e-3, 20
LOSSES = ("eq5", "eq5+eq9", "eq5+eq9, mark off", "eq5+eq9, wrong set", "eq5, weight decay")


@final
class PushOfSeeds(nn.Module):
    """The default field `Push`, one set of weights for each seed: the first axis of every state is the seed."""

    def __init__(self, n_seeds: int, n_latent: int, n_hidden: int = 64) -> None:
        """Start every seed's weights as torch starts a linear layer's."""
        super().__init__()
        layers = [[nn.Linear(3 * n_latent, n_hidden), nn.Linear(n_hidden, n_latent)] for _ in range(n_seeds)]
        self.weight = nn.ParameterList([torch.stack([pair[k].weight.detach().T for pair in layers]) for k in range(2)])
        self.bias = nn.ParameterList([torch.stack([pair[k].bias.detach()[None] for pair in layers]) for k in range(2)])

    def forward(
        self,
        z: Float[Tensor, "seed cell latent"],
        perturbation: Float[Tensor, "seed cell latent"],
        media: Float[Tensor, "seed cell latent"],
        clock: Float[Tensor, "seed cell 1"],
    ) -> Float[Tensor, "seed cell latent"]:
        """Return the push of each seed."""
        hidden = torch.tanh(torch.baddbmm(self.bias[0], torch.cat([z, perturbation, media], -1), self.weight[0]))
        return torch.baddbmm(self.bias[1], hidden, self.weight[1])


@final
@dataclass(frozen=True, eq=False)
class ProofOfPrinciple:
    """Test error of neural ODEs with and without the term of eq 9.

    ``curve`` is a DataArray over (start, loss, step, seed): the mean squared error on the hidden time; ``validation`` the same on visible
    conditions kept for choosing the step; ``baselines`` and ``floor`` the errors of predictors that know no dynamics, and of the
    noise. ``table`` has a row for each start, loss and step: mse_mean, mse_sd and win_rate, the share of seeds that do better than the
    same seed without the term at the same step. Seeds share one data set: their spread is not the uncertainty of the data.
    """

    curve: xr.DataArray
    validation: xr.DataArray
    baselines: dict[str, float]
    floor: float
    seconds: float

    @property
    def table(self) -> pd.DataFrame:
        """Return one row for each start, loss and step."""
        better = (self.curve < self.curve.sel(loss="eq5")).mean("seed")
        data = {"mse_mean": self.curve.mean("seed"), "mse_sd": self.curve.std("seed"), "win_rate": better}
        return xr.Dataset(data).to_dataframe().reset_index()

    @property
    def chosen(self) -> pd.DataFrame:
        """Return the same at the step that each seed's validation conditions choose: no hidden value is used to stop."""
        step = self.validation.argmin("step")
        picked = self.curve.isel(step=step)
        data = {"mse_mean": picked.mean("seed"), "mse_sd": picked.std("seed"), "win_rate": (picked < picked.sel(loss="eq5")).mean("seed")}
        return xr.Dataset(data).to_dataframe().reset_index().drop(columns="step", errors="ignore")

    def report(self) -> str:
        """Say what the term gains, and what else gains as much."""
        field = "decay and field" if self.curve.attrs["decays"] else "field of eq 25"
        lines = [f"{len(self.curve.seed)} seeds, {field}, {self.seconds:.0f} s. Mean squared error on the hidden time, at validated steps:"]
        for start in self.curve.start.values:
            for row in self.chosen[self.chosen.start == start].itertuples():
                better = "" if row.loss == "eq5" else f", better than eq 5 in {row.win_rate:.0%} of seeds"
                lines.append(f"  from {start}, {row.loss}: {row.mse_mean:.4f} ± {row.mse_sd:.4f}{better}")
        if len(self.curve.seed) < ENOUGH:
            lines.append(f"  ({len(self.curve.seed)} seeds are too few to compare losses: ask for {ENOUGH} or more.)")
        lines += [f"  {name}: {value:.4f}" for name, value in sorted(self.baselines.items(), key=lambda item: item[1])]
        return "\n".join([*lines, f"  noise floor: {self.floor:.4f}"])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


def proof_of_principle(
    screen: Screen,
    *,
    perturbations: str | Sequence[str] = MOVING,
    seeds: int = 100,
    steps: int = 400,
    every: int = 20,
    starts: Sequence[str] = STARTS,
    losses: Sequence[str] = LOSSES,
    decays: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> ProofOfPrinciple:
    """Hide the last time of some perturbations, fit neural ODEs in gene space to the rest, and score them on it (section 4).

    The state is the mean of log(1 + count) of each gene. ``starts``: "control", every perturbation starts from control at its first
    time; "own", from its own first time. ``losses``: "eq5", the mean squared error over the visible (p, t); "eq5+eq9" adds the
    same of the change over one more time step of the perturbations not hidden, from their measured last state; "mark off" reads eq 9 as
    it is written, with the perturbation's mark taken off; "wrong set" puts the term on the hidden perturbations' last visible time, where
    it is wrong; "weight decay" has none, and decay of all weights instead. The field is that of eq 25; with ``decays`` the deviation from
    the start decays beside it, as in `node`. All seeds are trained at once, each perturbation is integrated once through all times. A
    quarter of the visible perturbations of the hidden time is kept for choosing the step.
    """
    require_screen(screen)
    if screen.values == "continuous":
        raise ValueError("proof_of_principle takes means itself: give it the counts, not their pseudobulk().")
    if perturbations == MOVING and not set(MOVING) <= set(screen.perturbations):
        raise ValueError(
            "Name the perturbations whose last time is to be hidden: perturbations=[...]; the default is for the embedded screen."
        )
    for asked, known, what in ((starts, STARTS, "start"), (losses, LOSSES, "loss")):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"Unknown {what} {unknown[0]!r}. Use one of {', '.join(map(repr, known))}.")
    if "eq5" not in losses:
        raise ValueError("losses needs 'eq5': the others are compared with it, seed by seed.")
    if seeds < 2 or steps < every or every < 1:
        raise ValueError(f"proof_of_principle needs at least 2 seeds and steps >= every >= 1; got {seeds}, {steps} and {every}.")
    started = clock.perf_counter()
    if len(screen.media) > 1 or len(screen.times) < 2:
        raise ValueError(
            f"proof_of_principle hides the last of several times of a screen in one media; got {len(screen.times)} and media "
            f"{', '.join(screen.media)}. Choose the cells of one media first: screen[cells]."
        )
    train, test = hold_out_time(screen, max(screen.times), perturbations)
    problem = _Problem.of(train, test, seed)
    curves = {}
    for start in starts:
        for loss in losses:
            how = _Training(seeds, steps, every, decays, seed)
            curves[start, loss] = _train(problem, start, loss, how, f"{start}, {loss}" if progress else None)
    at = np.arange(0, steps + 1, every)
    coords = {"start": list(starts), "loss": list(losses), "step": at, "seed": np.arange(seeds)}
    stacked = [np.stack([[curves[s, one][k] for one in losses] for s in starts]) for k in range(2)]
    dims = ("start", "loss", "step", "seed")
    scores, validation = (xr.DataArray(values, coords, dims, attrs={"decays": int(decays)}) for values in stacked)
    errors = {name: _error(predictor(train, test.conditions).values, problem.hidden) for name, predictor in MEAN_BASELINES.items()}
    return ProofOfPrinciple(scores, validation, errors, noise_floor(test), clock.perf_counter() - started)


@final
@dataclass(frozen=True, eq=False)
class _Problem:
    """Means of every perturbation and time, which are visible, which choose the step, and what is hidden."""

    mean: Float[Tensor, "perturbation time gene"]
    visible: Float[Tensor, "perturbation time"]
    validation: Float[Tensor, "perturbation time"]
    scored: Int[Tensor, " row"]
    hidden: Float[np.ndarray, "row gene"]
    times: tuple[float, ...]

    @classmethod
    def of(cls, train: Screen, test: Screen, seed: int) -> "_Problem":
        """Read the visible means; a quarter of the perturbations that are seen to the end choose the step."""
        course, ends = TimeCourse.of(train, None), TimeCourse.of(test, None)
        visible = torch.as_tensor(course.cells > 0).float()
        names = ["+".join(a.gene for a in p) for p in course.perturbations]
        last = np.flatnonzero((course.cells[:, -1] > 0) & (np.arange(len(names)) > 0))
        chosen = np.random.default_rng(seed).permutation(last)[: max(1, len(last) // 4)]
        validation = torch.zeros_like(visible)
        validation[chosen, -1] = 1
        seen = np.flatnonzero(ends.cells[:, ends.times.index(course.times[-1])])
        asked = [names.index("+".join(a.gene for a in ends.perturbations[k])) for k in seen]
        hidden = ends.mean[seen, ends.times.index(course.times[-1])]
        mean = torch.as_tensor(np.nan_to_num(course.mean), dtype=torch.float32)
        return cls(mean, visible - validation, validation, torch.tensor(asked), hidden, course.times)


@final
@dataclass(frozen=True)
class _Training:
    """How networks are trained."""

    seeds: int
    steps: int
    every: int
    decays: bool
    seed: int


def _train(problem: _Problem, start: str, loss: str, how: _Training, bar_name: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Train all seeds at once; return the test and validation errors (step, seed)."""
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        n_perturbations, _, n_genes = problem.mean.shape
        solver = Solver(n_steps=1, check_every=100)
        transition = NeuralODE(n_genes, field=PushOfSeeds(how.seeds, n_genes), solver=solver, decays=how.decays)
        if how.decays:
            transition.decay_unconstrained = nn.Parameter(torch.zeros(how.seeds, 1, n_genes))
        marks = nn.Parameter(0.1 * torch.randn(how.seeds, n_perturbations - 1, n_genes))
        weights = [*transition.parameters(), marks]
        optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.3 if "decay" in loss else 0.0)
        scores = []
        for step in bar(range(how.steps + 1), bar_name or "", "step", progress=bar_name is not None):
            path = _path(problem, transition, marks, start)
            if step % how.every == 0:
                scores.append(_scores(problem, path.detach()))
            total = _squares(path - problem.mean, problem.visible if start == "control" else _later(problem.visible))
            if "eq9" in loss:
                total = total + _rest(problem, transition, marks, start, loss)
            optimiser.zero_grad()
            total.sum().backward()
            optimiser.step()
    test, validation = (np.stack(values) for values in zip(*scores, strict=True))
    return test, validation


def _path(problem: _Problem, transition: NeuralODE, marks: Tensor, start: str) -> Float[Tensor, "seed perturbation time gene"]:
    """Integrate every perturbation once through all times."""
    first = problem.mean[:1, 0].expand(len(problem.mean), -1) if start == "control" else problem.mean[:, 0]
    state = _state(first.expand(len(marks), -1, -1))
    waits = np.diff((0.0, *problem.times) if start == "control" else problem.times)
    scale, found = float(np.median(problem.times)), [] if start == "control" else [state.z]
    for wait in waits:
        state = transition.wait(state, torch.full((len(problem.mean),), float(wait) / scale), Effects(marks, marks[:, :0]))
        found.append(state.z)
    return torch.stack(found, 2)


def _state(z0: Float[Tensor, "seed perturbation gene"]) -> CellState:
    """Return perturbed cells at their start, each with its own mark; control has none."""
    n = z0.shape[1]
    marks = torch.cat([torch.zeros(1, n - 1), torch.eye(n - 1)])
    return CellState(z0, torch.zeros_like(z0), torch.zeros(n), marks, torch.zeros(n, 0))


def _rest(problem: _Problem, transition: NeuralODE, marks: Tensor, start: str, loss: str) -> Float[Tensor, " seed"]:
    """Return the mean squared change over one more step of conditions said to be at rest, from their measured last state (eq 9)."""
    wrong = "wrong" in loss
    rows = problem.scored if wrong else torch.where(problem.visible[:, -1] > 0)[0]
    last = problem.mean[:, -2 if wrong else -1]
    origin = (problem.mean[:1, 0] if start == "control" else problem.mean[:, 0]).expand_as(last)
    state = _state(origin.expand(len(marks), -1, -1))
    # δ is what has become of the start, so that the same decay and push act on the measured state
    mark = torch.zeros_like(state.perturbation) if "mark off" in loss else state.perturbation
    state = replace(state, delta=(last - origin).expand_as(state.z0), perturbation=mark)
    wait = (problem.times[-1] - problem.times[-2]) / float(np.median(problem.times))
    later = transition.wait(state, torch.full((len(last),), wait), Effects(marks, marks[:, :0]))
    return (later.z - last)[:, rows].square().mean((1, 2))


def _squares(error: Float[Tensor, "seed perturbation time gene"], weight: Float[Tensor, "perturbation time"]) -> Float[Tensor, " seed"]:
    """Return the mean square over the entries of weight 1."""
    return (error.square().mean(-1) * weight).sum((1, 2)) / weight.sum()


def _later(visible: Float[Tensor, "perturbation time"]) -> Float[Tensor, "perturbation time"]:
    """Leave out the first time, which is given."""
    return torch.cat([torch.zeros_like(visible[:, :1]), visible[:, 1:]], 1)


def _scores(problem: _Problem, path: Float[Tensor, "seed perturbation time gene"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the error of each seed on the hidden time, and on the validation conditions."""
    hidden = torch.as_tensor(problem.hidden, dtype=path.dtype)
    test = (path[:, problem.scored, -1] - hidden).square().mean((1, 2))
    return test.numpy(), _squares(path - problem.mean, problem.validation).numpy()


def _error(prediction: np.ndarray, hidden: np.ndarray) -> float:
    """Return the mean squared error over conditions and genes."""
    return float(np.mean((prediction - hidden) ** 2))
