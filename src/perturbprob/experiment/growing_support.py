"""Whether the cells of later times reach states that those of the first do not (eq 24)."""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64

from perturbprob.experiment.diffusion import components, nearest_cells
from perturbprob.experiment.landmarks import control_cells
from perturbprob.experiment.screen import require_screen
from perturbprob.experiment.settings import check_whole, is_within

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

_FEWEST = 40  # cells at a time: twenty in a half, and five neighbours among them
_MOST = 2000  # cells in a set: more take time and memory, and say little more


@final
@dataclass(frozen=True, eq=False, repr=False)
class GrowingSupport:
    """What part of the control cells of each later time lies where no early cell is, and the reverse (eq 24).

    ``table`` has a row for each time after the first:

    - ``gained``: the share of late cells outside the early ones, ``gained_by_noise`` that of other early cells, and ``gain`` the
      difference, with its interval ``gain_lower`` to ``gain_upper``.
    - ``lost``, ``lost_by_noise``, ``loss``, ``loss_lower``, ``loss_upper``: the share of early cells outside the late ones, likewise.
    - ``cells``: how many there are in each of the sets that are compared.
    - ``grows``: the interval of the gain is above 0; ``keeps``: that of the loss is not, so early states are still seen.

    Eq 24, supp(X_0) ⊂ supp(X_t), asks for both. ``notes`` says what the layout of the screen leaves open.
    """

    table: pd.DataFrame
    first: float
    unit: str
    level: float
    notes: tuple[str, ...]

    def report(self) -> str:
        """Say in words, time by time, whether the support grows and whether it keeps what it had."""
        return "\n".join([*(self._line(float(time)) for time in self.table.index), *self.notes])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()

    def _line(self, time: float) -> str:
        """Say what one later time shows."""
        row, sign = self.table.loc[time], {True: "", False: " not"}
        parts = [
            f"{100 * row[change]:.0f} % [{100 * row[f'{change}_lower']:.0f}, {100 * row[f'{change}_upper']:.0f}] more than noise "
            f"({100 * row[f'{share}_by_noise']:.0f} %) of {whose} cells lie outside the {other} ones"
            for change, share, whose, other in (("gain", "gained", "late", "early"), ("loss", "lost", "early", "late"))
        ]
        verdict = f"the support does{sign[bool(row['grows'])]} grow and does{sign[bool(row['keeps'])]} keep the early states"
        return f"From {self.first:g} to {time:g} {self.unit}: {'; '.join(parts)}: {verdict}."


def growing_support(
    screen: "Screen", *, k: int = 5, n_components: int = 50, n_splits: int = 100, level: float = 0.9, seed: int = 0
) -> GrowingSupport:
    """Ask whether states are added over time and none lost, supp(X_0) ⊂ supp(X_t) for t > 0 (eq 24), from control cells.

    A cell is outside a set of cells if it is farther from each of them than that one is from its own ``k``-th nearest neighbour in the
    set, on the first ``n_components`` principal components of all control cells. Noise alone puts some cells outside: so the early cells
    are halved, and one half is asked how much of the other half, and how much of as many late cells, is outside. All three sets
    hold as many cells as half of the smaller time, or 2,000. ``n_splits`` splits, from ``seed``, give the central interval of probability
    ``level``: a half is as far from all cells seen as those are from all there are.

    Times are those of the screen, such as `Pseudotime.screen` gives. Later cells that hold fewer counts are noisier, and may be
    outside for that alone.

    Raises ValueError for a single time, for continuous values, without control, and for fewer than 40 control cells at a time.

    >>> from perturbprob.experiment import datasets
    >>> growing_support(datasets.ishikawa2023(), n_splits=20).table["cells"].tolist()
    [69, 69, 69]
    """
    require_screen(screen)
    _check(k, n_splits, level)
    check_whole(2, n_components=n_components)
    check_whole(0, seed=seed)
    if len(screen.times) < 2:
        raise ValueError(
            f"This screen has a single time, {screen.times[0]:g}; growth shows between two. Name the column of times when reading it: "
            "time='day'; or take pseudotime for time: pb.pseudotime.order(screen, root).screen()."
        )
    control = control_cells(screen)
    place = components(screen, control, n_components)[0][control]
    time = np.array([p.time for p in screen.conditions])[screen.condition[control]]
    _check_times(screen, time)
    early, *later = (place[time == t] for t in np.unique(time))
    rng = np.random.default_rng(seed)
    rows = [_row(early, late, k, n_splits, level, rng) for late in later]
    table = pd.DataFrame(rows, index=pd.Index(np.unique(time)[1:], name="time"))
    table = table.assign(grows=table["gain_lower"] > 0, keeps=table["loss_lower"] <= 0)
    return GrowingSupport(table, float(time.min()), screen.time_unit or "(no unit)", level, _notes(screen))


def outside(known: Float[np.ndarray, "known component"], cells: Float[np.ndarray, "cell component"], k: int) -> float:
    """Return the share of cells that are in no known cell's ball, whose radius is the distance to its k-th neighbour.

    >>> outside(np.array([[0.0], [1.0], [2.0]]), np.array([[0.5], [2.5], [3.5], [9.0]]), 1)
    0.5
    """
    radius = nearest_cells(known, known, k + 1)[0][:, -1]
    squares = (cells**2).sum(axis=1)[:, None] + (known**2).sum(axis=1) - 2 * cells @ known.T
    return float((squares > radius**2).all(axis=1).mean())


def _row(early: np.ndarray, late: np.ndarray, k: int, n_splits: int, level: float, rng: np.random.Generator) -> dict[str, float]:
    """Return what is gained and lost between two times, with intervals over splits."""
    n = min(len(early) // 2, len(late) // 2, _MOST)
    gained, lost = (
        np.array([_split(first, second, k, n, rng) for _ in range(n_splits)]) for first, second in ((early, late), (late, early))
    )
    return {**_summary("gained", "gain", gained, level), **_summary("lost", "loss", lost, level), "cells": n}


def _split(known: np.ndarray, others: np.ndarray, k: int, n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the shares outside n of the known cells: of n others, and of n more of the known."""
    order = rng.permutation(len(known))
    return outside(known[order[:n]], others[rng.permutation(len(others))[:n]], k), outside(known[order[:n]], known[order[n : 2 * n]], k)


def _summary(share: str, change: str, splits: Float64[np.ndarray, "split two"], level: float) -> dict[str, float]:
    """Return means over splits, and the interval of the difference."""
    excess = splits[:, 0] - splits[:, 1]
    lower, upper = np.quantile(excess, [(1 - level) / 2, (1 + level) / 2])
    found = {share: splits[:, 0].mean(), f"{share}_by_noise": splits[:, 1].mean(), change: excess.mean()}
    return found | {f"{change}_lower": lower, f"{change}_upper": upper}


def _notes(screen: "Screen") -> tuple[str, ...]:
    """Say what else could make states appear."""
    notes = []
    if screen.time_unit == "pseudotime":
        notes.append("Times are pseudotimes: late cells are those far from the root, so that they differ says nothing of eq 24 by itself.")
    if ("time", "batch") in screen.layout.confounded() or ("batch", "time") in screen.layout.nested():
        notes.append("Each batch holds one time: a batch effect, too, puts late cells outside the early ones.")
    return tuple(notes)


def _check_times(screen: "Screen", time: Float[np.ndarray, " control"]) -> None:
    """Refuse a time with too few control cells, or none."""
    for t in screen.times:
        if (n := int((time == t).sum())) < _FEWEST:
            raise ValueError(
                f"Only {n} control cells at {screen.time_unit or 'time'} {t:g}: at least {_FEWEST} are needed, as they are halved. "
                "Leave that time out, screen[cells], or take fewer pseudotimes: screen(n_times=2)."
            )


def _check(k: int, n_splits: int, level: float) -> None:
    """Refuse settings out of range."""
    for name, value, least, most in (("k", k, 1, _FEWEST // 2 - 1), ("n_splits", n_splits, 20, 10**6)):
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}; got {value!r}.")
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")
