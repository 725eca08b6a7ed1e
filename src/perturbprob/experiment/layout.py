"""How cells are spread over conditions and batches, and what that leaves unknowable."""

import html
from collections.abc import Iterable
from functools import cached_property
from itertools import combinations, permutations
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd

from perturbprob.experiment.paths import Pair, paths

if TYPE_CHECKING:
    import perturbprob.experiment.screen

_FEW = 30  # below this many cells a condition is named in the report
_EFFECT = {
    "perturbation": "the effect of a perturbation",
    "media": "the effect of a media",
    "time": "a change over time",
    "batch": "a batch effect",
}


@final
class Layout:
    """The layout of a screen: which conditions were seen in which batches, and by how many cells.

    ``cells`` is `Screen.summary`: conditions × batches.

    >>> from perturbprob.experiment import datasets
    >>> layout = datasets.ishikawa2023().layout
    >>> layout.confounded()
    [('time', 'batch')]
    >>> print(layout.report())
    cells: 14,945; conditions: 96 (perturbations: 23 and control; media: 1; times: 4); batches: 4
    ...
    """

    def __init__(self, screen: "perturbprob.experiment.screen.Screen") -> None:
        """Take the table of cells from a screen."""
        self.cells, self._screen = screen.summary(), screen
        self._is_control = np.array([not p.perturbations for p in screen.conditions])
        self._time_unit = screen.time_unit

    def batches_without_control(self) -> tuple[str, ...]:
        """Return the batches in which no cell is control."""
        return tuple(self.cells.columns[self.cells[self._is_control].sum() == 0])

    def confounded(self) -> list[tuple[str, str]]:
        """Return the pairs among perturbation, media, time and batch in which each level of one goes with one level of the other.

        What such factors do cannot be told apart. Factors with a single level are left out.
        """
        return [(a, b) for a, b in combinations(self._varied, 2) if self._determines(a, b) and self._determines(b, a)]

    def nested(self) -> list[tuple[str, str]]:
        """Return the pairs (inner, outer) in which each level of inner lies in one level of outer, but not the reverse."""
        return [(a, b) for a, b in permutations(self._varied, 2) if self._determines(a, b) and not self._determines(b, a)]

    def paths(self, extra: Iterable[Pair] = ()) -> pd.DataFrame:
        """Return the input-output pairs of eq 5 on paths 1-4 of Figure 1B, observed or missing, and the ``extra`` pairs of assumptions.

        One row for each pair, (n_p + 1)(n_m + 1) of eq 5 with n_p perturbations and n_m media beside the baseline; ``extra`` is what
        an assumption's ``pairs(screen)`` returns. Columns: source, path, perturbation, media, start, done, end, observed, cells, times.

        >>> from perturbprob.experiment import datasets
        >>> table = datasets.ishikawa2023().layout.paths()
        >>> table.groupby("path")["observed"].sum().to_dict()
        {2: 23, 4: 1}
        """
        return paths(self._screen, extra)

    def report(self, *, few: int = _FEW) -> str:
        """Say in words how many cells conditions and batches have, where controls are lacking, and what is confounded.

        Conditions with fewer than ``few`` cells are named.
        """
        lines = [self._size(), _spread("cells per condition", self.cells.sum(axis=1)), _spread("cells per batch", self.cells.sum())]
        lines.append(self._thin(few))
        lacking = self.batches_without_control()
        lines.append(f"batches without control cells: {', '.join(lacking) or 'none'}")
        lines += [_fully(a, b) for a, b in self.confounded()] or ["fully confounded factors: none"]
        lines += [_within(a, b) for a, b in self.nested()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()

    def _repr_html_(self) -> str:
        """Return the report and the table of cells for a notebook."""
        return f"<pre>{html.escape(self.report())}</pre>{self.cells.to_html(max_rows=30)}"

    @cached_property
    def _levels(self) -> pd.DataFrame:
        """The levels that occur together: one row for each condition in each batch."""
        return self.cells.melt(ignore_index=False, value_name="cells").reset_index().query("cells > 0")

    @cached_property
    def _varied(self) -> list[str]:
        """The factors with more than one level."""
        return [factor for factor in _EFFECT if self._levels[factor].nunique() > 1]

    def _determines(self, inner: str, outer: str) -> bool:
        """Tell whether each level of the first factor goes with one level of the second."""
        return bool((self._levels.groupby(inner)[outer].nunique() == 1).all())

    def _size(self) -> str:
        """Count cells, conditions and levels."""
        n = self._levels.nunique()
        control = int(self._is_control.any())
        perturbations = f"{n['perturbation'] - control:,} {'and' if control else 'without'} control"
        return (
            f"cells: {self.cells.to_numpy().sum():,}; conditions: {len(self.cells):,} (perturbations: {perturbations}; "
            f"media: {n['media']:,}; times: {n['time']:,}); batches: {n['batch']:,}"
        )

    def _moment(self, time: float) -> str:
        """Return a time with its unit."""
        return f"{time:g} {self._time_unit}" if self._time_unit else f"time {time:g}"

    def _thin(self, few: int) -> str:
        """Name the conditions with few cells, fewest first."""
        total = self.cells.sum(axis=1)
        thin = total[total < few].sort_values(kind="stable")
        named = [f"{p}, {m}, {self._moment(t)}: {n}" for (p, m, t), n in thin.head(8).items()]
        return f"conditions with fewer than {few} cells: {len(thin) or 'none'}{'; fewest: ' if named else ''}{'; '.join(named)}"


def _spread(what: str, cells: pd.Series) -> str:
    """Say the range of numbers of cells."""
    return f"{what}: {cells.min():,} to {cells.max():,}, median {cells.median():,.0f}"


def _fully(first: str, second: str) -> str:
    """Say what full confounding of two factors hides."""
    return (
        f"{first} and {second} are fully confounded: every {second} holds one {first} and every {first} one {second}, "
        f"so {_EFFECT[first]} cannot be told from {_EFFECT[second]}."
    )


def _within(inner: str, outer: str) -> str:
    """Say what nesting of one factor in another leaves to learn from."""
    return (
        f"{inner} is nested in {outer}: every {inner} holds one {outer}, so {_EFFECT[outer]} is told from {_EFFECT[inner]} "
        f"only by how alike the levels of {inner} in one {outer} are."
    )
