"""Which perturbations have come to rest? Steps between times, beside the noise of control cells (appendix E)."""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import xarray as xr

from perturbprob.experiment import rest
from perturbprob.experiment.screen import require_screen

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

_OVER_STEPS = ("perturbation", "media", "step")


@final
@dataclass(frozen=True, eq=False, repr=False)
class SteadyStates:
    """How far each perturbation moved in each step between sequential times, and what noise alone would move it.

    ``table`` is a Dataset over (perturbation, media, step), control first, steps named like ``"4 → 5"``; levels and steps as in
    `perturbprob.experiment.rest`. A step that was not seen is NaN, and steady by no rule.

    - ``lfc``: mean over genes of the absolute change, log₂; ``lfc_beyond_drift``: the same after the drift of all others is taken out.
    - ``steady_by_control``: ``lfc`` is below ``control_bound`` (media), the 95 % quantile of halves of control at its worst time; these
      quantiles are ``control_quantile`` (media, time).
    - ``steady_by_matched``: ``lfc_beyond_drift`` is below ``matched_bound``, which noise exceeds in any perturbation of that step with 5 %;
      ``matched_quantile`` is the 95 % quantile of that step's own noise.
    - ``probability_of_rest``: that the root-mean-square change beyond drift is at most ``change`` log₂ per unit of time.
    - ``n_cells`` (perturbation, media, time), and ``precision``, 1 / (1 / n(earlier) + 1 / n(later)) cells.

    ``last`` holds the last step that was seen of each perturbation and media: by it one is called steady. ``notes`` says what the
    layout of the screen leaves open.
    """

    table: xr.Dataset
    notes: tuple[str, ...]

    @property
    def last(self) -> xr.Dataset:
        """The table at the last step seen, over (perturbation, media); ``step`` names it."""
        seen = self.table["lfc"].notnull().isel(step=slice(None, None, -1))
        return self.table.isel(step=self.table.sizes["step"] - 1 - seen.argmax("step"))

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation between the last ``|LFC|`` and the number of cells it is known from."""
        pairs = pd.DataFrame({name: self.last[name].values.ravel() for name in ("lfc", "precision")})
        return float(pairs.corr("spearman").iloc[0, 1])

    def report(self) -> str:
        """Say in words who rests by which rule, and what these rules cannot tell."""
        set_by, last, rho = self.table.attrs, self.last, self.rank_correlation
        within, unit = f"{100 * (1 - set_by['tolerance']):g} %", set_by["time_unit"] or "unit of time"
        limit = f"{set_by['change']:g} log2 per {unit}"
        lines = [
            f"Steps of {int(last['lfc'].notnull().sum())} perturbations (control among them); the last one decides.",
            f"|LFC| within {within} of halves of control at their worst time: {_moving(last, 'steady_by_control')}",
            f"|LFC| beyond the shared drift within {within} of noise in the same numbers of cells: {_moving(last, 'steady_by_matched')}",
            f"Change beyond the shared drift probably at most {limit}: {_moving(last, 'probability_of_rest')}",
            f"|LFC| and the number of cells behind it have Spearman correlation {rho:.2f}."
            if np.isfinite(rho)
            else "All steps are known from equally many cells.",
        ]
        if rho < -0.5:
            lines[-1] += " The first rule ranks mostly cell number: few cells make |LFC| large by noise alone."
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


def steady_states(screen: "Screen", *, n_splits: int = 4000, tolerance: float = 0.05, change: float = 0.05, seed: int = 0) -> SteadyStates:
    """Ask of each perturbation, in each media, whether it still moves between sequential times (eqs 7-9 assume that it does not).

    Three answers, the last step of each counting:

    1. by control (the paper's, appendix E): ``|LFC|`` = mean over genes of abs(log₂ level(later) / level(earlier)) is below the quantile
       1 − ``tolerance`` of ``|LFC|`` between random halves of the control cells of one time, at the time where that is largest. Few cells
       alone fail it, and the drift that all share counts. The paper leaves the bound open; nothing is added to the quantile here, as
       then 14 of the 24 of Ishikawa et al. are steady, near the paper's 14 of 25 (with 0.05 log₂ added, 21 would be).
    2. matched: ``|LFC|`` beyond the shared drift is below what control cells in the same numbers show; where nothing moves, any
       perturbation at all is called moving with probability ``tolerance``.
    3. probability of rest: of a root-mean-square change of at most ``change`` log₂ per unit of time beyond the drift, under a normal
       model with known sampling noise (`perturbprob.experiment.rest.probability_of_rest`).

    ``n_splits`` halves and draws are made, from ``seed``. Where each time is one batch, what all share may be a batch effect: the
    report says so.

    Raises ValueError for a screen with a single time, without control, with control only, or with fewer than 10 control cells at a
    time, and for settings out of range.

    >>> import perturbprob as pb
    >>> result = pb.steady_states(pb.datasets.ishikawa2023(), n_splits=400)
    >>> moving = ~result.last["steady_by_matched"].sel(media="hiPSC_maintenance")
    >>> result.table["perturbation"].values[moving].tolist()
    ['POU5F1', 'PRDM14', 'RUNX1T1']
    """
    require_screen(screen)
    _check(n_splits, tolerance, change, seed)
    parts = [_of_media(rest.Course.of(screen, media), n_splits, tolerance, change, seed) for media in screen.media]
    table = xr.concat(parts, pd.Index(screen.media, name="media")).transpose("perturbation", "media", "time", "step")
    settings = {"n_splits": n_splits, "tolerance": tolerance, "change": change, "seed": seed, "time_unit": screen.time_unit or ""}
    return SteadyStates(table.assign_attrs(settings), _notes(screen))


def _of_media(course: rest.Course, n_splits: int, tolerance: float, change: float, seed: int) -> xr.Dataset:
    """Return the table of one media."""
    moved = rest.steps(course)
    lfc, beyond = (np.abs(part).mean(axis=-1) for part in (moved, rest.beyond_drift(moved, rest.drift_weights(course))))
    halves = np.quantile(rest.split_halves(course, n_splits, seed), 1 - tolerance, axis=0)
    noise = rest.matched_steps(course, n_splits, seed)
    matched = rest.matched_bound(noise, tolerance)
    over_steps = {
        "lfc": lfc,
        "lfc_beyond_drift": beyond,
        "matched_quantile": np.quantile(noise, 1 - tolerance, axis=0),
        "matched_bound": matched,
        "steady_by_control": lfc < np.nanmax(halves),
        "steady_by_matched": beyond < matched,
        "probability_of_rest": rest.probability_of_rest(course, change),
        "precision": course.precision,
    }
    variables: dict[str, object] = {name: (("perturbation", "step"), values) for name, values in over_steps.items()}
    variables |= {"n_cells": (("perturbation", "time"), course.n_cells), "control_quantile": ("time", halves)}
    names = [f"{a:g} → {b:g}" for a, b in zip(course.times[:-1], course.times[1:], strict=True)]
    coords = {"perturbation": list(course.perturbations), "time": list(course.times), "step": names}
    return xr.Dataset(variables | {"control_bound": np.nanmax(halves)}, coords)


def _moving(last: xr.Dataset, name: str) -> str:
    """Say how many of those seen are steady, and name the others."""
    seen = last["lfc_beyond_drift" if name != "steady_by_control" else "lfc"].notnull().values
    steady = (last[name] > 0.5).values  # of a truth, or of a probability
    several = last.sizes["media"] > 1
    names = [f"{last['perturbation'].values[p]}{f' in {last.media.values[m]}' if several else ''}" for p, m in np.argwhere(seen & ~steady)]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"{int((seen & steady).sum())} of {int(seen.sum())} steady; moving: {shown or 'none'}."


def _notes(screen: "Screen") -> tuple[str, ...]:
    """Say whether times and batches can be told apart."""
    if ("time", "batch") in screen.layout.confounded():
        return ("Each time is one batch (library): times and batches coincide, so a shared drift cannot be told from a batch effect.",)
    if ("batch", "time") in screen.layout.nested():
        return ("Each batch holds one time: a shared drift is told from batch effects only by how alike the batches of a time are.",)
    return ()


def _check(n_splits: int, tolerance: float, change: float, seed: int) -> None:
    """Refuse settings out of range."""
    for name, value, least in (("n_splits", n_splits, 20), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1: the share of noise above a bound; got {tolerance!r}. Usual is 0.05.")
    if not 0 < change < np.inf:
        raise ValueError(f"change must be a positive number of log2 units per unit of time; got {change!r}. Usual is 0.05.")
