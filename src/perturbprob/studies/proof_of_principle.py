"""Section 4, Figure 4: does the steady-state term of eq 9 help a neural ODE to predict a hidden time? With the controls a claim needs."""

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import pandas as pd
import torch
import xarray as xr

from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.split import hold_out_time
from perturbprob.inference.draws import bar
from perturbprob.studies.baselines import MEAN_BASELINES, noise_floor
from perturbprob.studies.networks import Arm, Course, Networks

MOVING = ("JARID2", "ZNF649", "ZNF90", "POU5F1", "RUNX1T1", "ZNF398", "SOX2", "PRDM14", "MYC", "VENTX", "ZIC2")
"""The eleven perturbations whose last day section 4 hides."""
STARTS = ("control", "own")
RATE, ENOUGH = 3e-3, 20
ARMS = {
    "eq5": Arm(),
    "eq5+eq9": Arm(reading="own"),
    "eq5+eq9, control_input": Arm(reading="control_input"),
    "eq5+eq9, wrong set": Arm(reading="own", wrong_set=True),
    "eq5, weight decay": Arm(weight_decay=0.3),
    "eq5, known errors": Arm(known_errors=True),
    "eq5, decay": Arm(decays=True),
    "eq5+eq9, decay": Arm(reading="own", decays=True, against="eq5, decay"),
}
LOSSES = tuple(ARMS)


@final
@dataclass(frozen=True, eq=False)
class ProofOfPrinciple:
    """Test error of neural ODEs with and without the term of eq 9.

    ``curve`` is a DataArray over (start, loss, step, seed): the mean squared error on the hidden time; ``validation`` the same on visible
    conditions kept for choosing the step; ``baselines`` and ``floor`` the errors of predictors that know no dynamics, and of the
    noise. ``table`` has a row for each start, loss and step: mse_mean, mse_sd and win_rate, the share of seeds that do better at
    that step than the same seed by "eq5" ("eq5+eq9, decay": than by "eq5, decay"). Seeds share one data set: their spread is not the
    uncertainty of the data.
    """

    curve: xr.DataArray
    validation: xr.DataArray
    baselines: dict[str, float]
    floor: float
    seconds: float

    @property
    def table(self) -> pd.DataFrame:
        """Return one row for each start, loss and step."""
        return _summary(self.curve)

    @property
    def chosen(self) -> pd.DataFrame:
        """Return the same at the step that each seed's validation conditions choose: no hidden value is used to stop."""
        step = self.validation.argmin("step")
        return _summary(self.curve.isel(step=step)).drop(columns="step", errors="ignore")

    def report(self) -> str:
        """Say what the term gains, and what else gains as much."""
        lines = [f"{len(self.curve.seed)} seeds, {self.seconds:.0f} s. Mean squared error on the hidden time, at validated steps:"]
        for start in self.curve.start.values:
            for row in self.chosen[self.chosen.start == start].itertuples():
                better = "" if row.loss == "eq5" else f", better than {ARMS[row.loss].against} in {row.win_rate:.0%} of seeds"
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
    starts: Sequence[str] = STARTS,
    losses: Sequence[str] = LOSSES,
    seed: int = 0,
    progress: bool = True,
) -> ProofOfPrinciple:
    """Hide the last time of some perturbations, fit neural ODEs in gene space to the rest, and score them on it (section 4).

    The networks are the `CellModel` that `node` makes of the means of log(1 + count): the start is known, there is no decoder, and the
    errors of the means are known; its field is that of eq 25. ``starts``: "control", every perturbation starts at time 0 from the mean of
    control at its first time; "own", at its first time from its own mean. ``losses``:

    - "eq5": the mean squared error over the visible (p, t);
    - "eq5+eq9": the same and that of the pairs of `SteadyState`: the change over one more time step of control and the perturbations not
      hidden, from their measured last state, their mark left on; with "control_input" it is taken off, as eq 9 is written;
    - "eq5+eq9, wrong set": the pairs are those of the hidden perturbations at their last visible time, where they are wrong;
    - "eq5, weight decay": no pairs, and decay of all weights instead;
    - "eq5, known errors": squared errors in units of each mean's standard error;
    - "eq5, decay" and "eq5+eq9, decay": the deviation from the start decays beside the field, as `node` has it.

    All seeds are trained at once, each perturbation is integrated once through all times, and twenty points of the training are scored.
    A quarter of the visible perturbations of the hidden time is kept for choosing the step.
    """
    _check(screen, perturbations, seeds, steps)
    for asked, known, what in ((starts, STARTS, "start"), (losses, LOSSES, "loss")):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"Unknown {what} {unknown[0]!r}. Use one of {', '.join(map(repr, known))}.")
    if missing := [name for name in ("eq5", *(ARMS[loss].against for loss in losses)) if name not in losses]:
        raise ValueError(f"losses needs {missing[0]!r}: others are compared with it, seed by seed.")
    started = clock.perf_counter()
    train, test = hold_out_time(screen, max(screen.times), perturbations)
    course = Course.of(train, test, seed)
    predictions = {name: predictor(train, test.conditions).values for name, predictor in MEAN_BASELINES.items()}
    errors = {name: float(np.mean((predicted - course.hidden.numpy()) ** 2)) for name, predicted in predictions.items()}
    at = np.unique(np.linspace(0, steps, 21).round().astype(int))
    scores = []
    for start in starts:
        for loss in losses:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                scores.append(_train(Networks(course, seeds, start, ARMS[loss]), at, f"{start}, {loss}" if progress else None))
    dims = ("start", "loss", "step", "seed")
    coords: dict[str, Sequence[object] | np.ndarray] = {"start": list(starts), "loss": list(losses), "step": at, "seed": np.arange(seeds)}
    shape = [len(coords[dim]) for dim in dims]
    curve, validation = (xr.DataArray(np.stack(part).reshape(shape), coords, dims) for part in zip(*scores, strict=True))
    return ProofOfPrinciple(curve, validation, errors, noise_floor(test), clock.perf_counter() - started)


def _summary(scores: xr.DataArray) -> pd.DataFrame:
    """Return mean and spread of the scores over seeds, and the share of seeds that do better than the arm each is compared with."""
    against = scores.sel(loss=[ARMS[loss].against for loss in scores["loss"].values]).assign_coords(loss=scores["loss"])
    data = {"mse_mean": scores.mean("seed"), "mse_sd": scores.std("seed"), "win_rate": (scores < against).mean("seed")}
    return xr.Dataset(data).to_dataframe().reset_index()


def _train(networks: Networks, at: np.ndarray, name: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Train all seeds at once; return the errors on the hidden time and on the validation conditions (step, seed)."""
    optimiser = torch.optim.AdamW(networks.parameters(), lr=RATE, weight_decay=networks.arm.weight_decay)
    scores = []
    for step in bar(range(at[-1] + 1), name or "", "step", progress=name is not None):
        path = networks.path()
        if step in at:
            scores.append([score.numpy() for score in networks.scores(path.detach())])
        optimiser.zero_grad()
        networks.loss(path).sum().backward()
        optimiser.step()
    hidden, validation = (np.stack(part) for part in zip(*scores, strict=True))
    return hidden, validation


def _check(screen: Screen, perturbations: str | Sequence[str], seeds: int, steps: int) -> None:
    """Refuse what the study cannot be made of."""
    require_screen(screen)
    if screen.values == "continuous":
        raise ValueError("proof_of_principle takes means itself: give it the counts, not their pseudobulk().")
    if perturbations == MOVING and not set(MOVING) <= set(screen.perturbations):
        raise ValueError(
            "Name the perturbations whose last time is to be hidden: perturbations=[...]; the default is for the embedded screen."
        )
    if seeds < 2 or steps < 1:
        raise ValueError(f"proof_of_principle needs at least 2 seeds and 1 step; got {seeds} and {steps}.")
    if len(screen.media) > 1 or len(screen.times) < 2:
        raise ValueError(
            f"proof_of_principle hides the last of several times of a screen in one media; got {len(screen.times)} and media "
            f"{', '.join(screen.media)}. Choose the cells of one media first: screen[cells]."
        )
