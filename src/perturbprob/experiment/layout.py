"""How cells are spread over conditions and batches, and what that leaves unknowable."""

import html
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from perturbprob.experiment.aliasing import Alias, Design
from perturbprob.experiment.paths import paths
from perturbprob.experiment.reading import Levels, some

if TYPE_CHECKING:
    import networkx

    import perturbprob.experiment.screen

_FEW = 30  # below this many cells a condition is named in the report
_SENTENCES = 5  # more aliases are counted in the report, not written out
_EFFECT = {
    "perturbation": "the effect of a perturbation",
    "media": "the effect of a media",
    "time": "a change over time",
    "batch": "a batch effect",
}


@final
class Layout:
    """The layout of a screen: which conditions were seen in which batches, and by how many cells.

    - ``cells`` is `Screen.summary`: conditions × batches.
    - `valid_set` is V of eq 16, `graph()` the same as a graph, `components()` its parts. As in eq 16, time is no part of them: a
      perturbation in a media counts as seen in a batch at whatever time. What times cost is in the design:
    - `design()`, additive in perturbation, media, time and batch, with its `rank`; `aliases()` says what it cannot tell apart.

    >>> from perturbprob.experiment import datasets
    >>> layout = datasets.ishikawa2023().layout
    >>> layout.confounded(), layout.connected, (layout.rank, layout.deficiency)
    ([('time', 'batch')], True, (27, 3))
    >>> print(layout.aliases()[0])
    time 3 day appears only in batch d3_2, which holds no other time: its effect cannot be told from that of batch d3_2.
    >>> print(layout.report())
    cells: 14,945; conditions: 96 (perturbations: 23 and control; media: 1; times: 4); batches: 4
    ...
    """

    def __init__(self, screen: "perturbprob.experiment.screen.Screen") -> None:
        """Take the table of cells from a screen."""
        self.cells, self._screen = screen.summary(), screen
        self._is_control = np.array([not p.perturbations for p in screen.conditions])
        self._time_unit, self._baseline = screen.time_unit, screen.baseline or "baseline"

    def batches_without_control(self) -> tuple[str, ...]:
        """Return the batches in which no cell is control."""
        return tuple(self.cells.columns[self.cells[self._is_control].sum() == 0])

    @cached_property
    def valid_set(self) -> frozenset[tuple[str, str, str]]:
        """V of eq 16: the (perturbation, media, batch) that hold at least one cell, at whatever time.

        >>> from perturbprob.experiment import datasets
        >>> ("NANOG", "hiPSC_maintenance", "d5_4") in datasets.ishikawa2023().layout.valid_set
        True
        """
        return frozenset(self._pairs.index.to_flat_index())

    @property
    def batches_with_control(self) -> tuple[str, ...]:
        """V_00 of eqs 16-17: the batches that hold control in baseline media, untouched cells X."""
        return tuple(b for b in self.cells.columns if ("control", self._baseline, b) in self.valid_set)

    @property
    def connected(self) -> bool:
        """Whether a walk over shared conditions leads from each batch to each other one."""
        return len(self.components()) == 1

    def components(self) -> tuple[tuple[str, ...], ...]:
        """Return the batches in parts that share no condition (perturbation in a media) with each other, the largest part first.

        Differences between parts are differences of batches or of conditions: the cells do not say which.
        """
        condition, _ = pd.factorize(self._pairs.index.droplevel("batch"))
        batch = self.cells.columns.get_indexer(self._pairs.index.get_level_values("batch"))
        seen = csr_array((np.ones(len(batch)), (batch, condition)), shape=(self.cells.shape[1], condition.max() + 1))
        _, part = connected_components(seen @ seen.T, directed=False)
        parts = [tuple(self.cells.columns[part == k]) for k in range(part.max() + 1)]
        return tuple(sorted(parts, key=len, reverse=True))

    def graph(self) -> "networkx.Graph":
        """Return V as a bipartite graph of conditions and batches (Figure 6).

        Nodes are ``(perturbation, media)`` with ``bipartite=0`` and names of batches with ``bipartite=1``; an edge joins a condition to
        each batch that holds it, with the number of its ``cells`` there.

        >>> from perturbprob.experiment import datasets
        >>> graph = datasets.ishikawa2023().layout.graph()
        >>> graph.number_of_nodes(), graph.number_of_edges(), graph.edges[("NANOG", "hiPSC_maintenance"), "d5_4"]["cells"]
        (28, 96, 284)
        """
        import networkx

        graph = networkx.Graph()
        graph.add_nodes_from(self._pairs.index.droplevel("batch").unique(), bipartite=0)
        graph.add_nodes_from(self.cells.columns, bipartite=1)
        graph.add_edges_from(((p, m), b, {"cells": int(n)}) for (p, m, b), n in self._pairs.items())
        return graph

    def design(self, interactions: Sequence[str] = ()) -> Design:
        """Return the design additive in perturbation, media, time and batch, with interactions such as ``"perturbation:media"``.

        Effects are against control, baseline media, the first time and the first batch.

        >>> from perturbprob.experiment import datasets
        >>> datasets.ishikawa2023().layout.design(["perturbation:time"]).rank
        96
        """
        return Design(self._factors, interactions)

    @property
    def rank(self) -> int:
        """How many effects of the additive design, its mean included, can be told apart."""
        return self._additive.rank

    @property
    def deficiency(self) -> int:
        """How many effects of the additive design cannot be told from the others."""
        return self._additive.deficiency

    def aliases(self, interactions: Sequence[str] = ()) -> tuple[Alias, ...]:
        """Return what the additive design, with declared interactions, cannot tell apart, batches named last; `str` says each in words."""
        return self.design(interactions).aliases if interactions else self._additive.aliases

    def confounded(self) -> list[tuple[str, str]]:
        """Return the pairs among perturbation, media, time and batch in which each level of one goes with one level of the other.

        What such factors do cannot be told apart. Factors with a single level are left out.
        """
        return [(a, b) for a, b in combinations(self._varied, 2) if self._determines(a, b) and self._determines(b, a)]

    def nested(self) -> list[tuple[str, str]]:
        """Return the pairs (inner, outer) in which each level of inner lies in one level of outer, but not the reverse."""
        return [(a, b) for a, b in permutations(self._varied, 2) if self._determines(a, b) and not self._determines(b, a)]

    def paths(self, extra: Iterable[Any] = ()) -> pd.DataFrame:
        """Return the input-output pairs of eq 5 on paths 1-4 of Figure 1B, observed or missing, and the ``extra`` pairs of assumptions.

        One row for each pair, (n_p + 1)(n_m + 1) of eq 5 with n_p perturbations and n_m media beside the baseline; ``extra`` holds
        assumptions, or what their ``pairs(screen)`` returns. Columns: source, path, perturbation, media, start, done, end, observed,
        cells, times.

        >>> from perturbprob.experiment import datasets
        >>> table = datasets.ishikawa2023().layout.paths()
        >>> table.groupby("path")["observed"].sum().to_dict()
        {2: 23, 4: 1}
        """
        return paths(self._screen, extra)

    def report(self, *, few: int = _FEW) -> str:
        """Say in words how many cells conditions and batches have, where controls are lacking, and what cannot be told apart.

        Conditions with fewer than ``few`` cells are named.
        """
        lines = [self._size(), _spread("cells per condition", self.cells.sum(axis=1)), _spread("cells per batch", self.cells.sum())]
        lines.append(self._thin(few))
        lines.append(f"batches without control cells: {_list(self.batches_without_control()) or 'none'}")
        lines.append(f"batches with control in baseline media: {len(self.batches_with_control)} of {self.cells.shape[1]}")
        lines += [_fully(a, b) for a, b in self.confounded()] or ["fully confounded factors: none"]
        lines += [_within(a, b) for a, b in self.nested()]
        lines += [*self._hidden(), *self._named_aliases()]
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
    def _pairs(self) -> pd.Series:
        """The cells of each perturbation in each media and batch, where there are any."""
        return self._levels.groupby(["perturbation", "media", "batch"], sort=False)["cells"].sum()

    @cached_property
    def _factors(self) -> dict[str, Levels]:
        """The levels of each factor in the rows that differ, what effects are measured against first."""
        rows = self._levels.drop(columns="cells").drop_duplicates()
        known = {"perturbation": ["control", *self._screen.perturbations], "media": self._screen.media, "time": self._screen.times}
        return {factor: self._coded(rows[factor], known.get(factor, self.cells.columns)) for factor in _EFFECT}

    def _coded(self, column: pd.Series, known: Iterable[object]) -> Levels:
        """Return the levels of a factor that occur, in their order, as text."""
        codes, names = pd.factorize(pd.Categorical(column, list(known), ordered=True), sort=True)
        text = [self._moment(float(name)) if column.name == "time" else str(name) for name in names]
        return Levels(codes, text)

    @cached_property
    def _additive(self) -> Design:
        """The design without interactions."""
        return self.design()

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

    def _hidden(self) -> Iterator[str]:
        """Say what cannot be learnt at all of a single condition, a single cell, or parts that share nothing."""
        if len(self.cells) == 1:
            yield self._only_condition()
        single = self.cells.columns[self.cells.sum() == 1]
        if len(single) and len(self.cells.columns) > 1:
            yield f"{some(single, 'batch', 'batches')} with one cell: there, a batch effect cannot be told from how that cell differs."
        if not self.connected:
            parts = [f"[{_list(part)}]" for part in self.components()]
            yield (
                f"batches fall into {some(parts, 'part')} that share no condition: how the parts differ cannot be told "
                "from how their conditions differ."
            )

    def _only_condition(self) -> str:
        """Say what a screen of one condition cannot teach."""
        perturbation, media, time = self.cells.index[0]
        batches, also = ("how batches differ", "") if self.cells.shape[1] > 1 else ("", ", nor of batch effects, with one batch")
        return (
            f"one condition only ({perturbation}, {media}, {self._moment(time)}): nothing can be learnt of the effects of perturbations, "
            f"media and time{also}; only how cells of this condition differ{' and ' + batches if batches else ''}."
        )

    def _named_aliases(self) -> Iterator[str]:
        """Say what else cannot be told apart: aliases of factors that are not fully confounded, which was said."""
        said = set(self.confounded())
        left = [alias for alias in self.aliases() if tuple(alias.levels) not in said]
        yield from map(str, left[:_SENTENCES])
        if len(left) > _SENTENCES:
            yield f"and {len(left) - _SENTENCES:,} more that cannot be told apart: layout.aliases() has them all."


def _spread(what: str, cells: pd.Series) -> str:
    """Say the range of numbers of cells."""
    return f"{what}: {cells.min():,} to {cells.max():,}, median {cells.median():,.0f}"


def _list(names: Sequence[str]) -> str:
    """Name the first few and count the others."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


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
