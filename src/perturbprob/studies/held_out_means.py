"""The means of held-out conditions, and what was observed beside them: what predicted means are scored against."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int, Int64
from scipy.sparse import csr_array, vstack

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.moments import Moments
from perturbprob.studies.metrics import differential_genes, rest_weights

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

FEW = 10
"""Conditions with fewer cells are scored apart: their observed means are mostly noise."""

Cells = dict[tuple[Protocol, str], csr_array]
"""log(1 + count) of the cells of each condition in each batch."""


class Others(NamedTuple):
    """Perturbed conditions that only the other screens show: means as changes from control, squared standard errors, and cells."""

    conditions: tuple[Protocol, ...]
    change: Float[np.ndarray, "other gene"]
    variance_of_mean: Float[np.ndarray, "other gene"]
    n: Int[np.ndarray, " other"]


@dataclass(frozen=True, eq=False)
class Means:
    """Means of log(1 + count) over the cells of each condition of a test screen, ``observed``, and over the ``control`` cells beside it.

    ``cells`` holds how many cells of each condition are in each batch, ``variance`` the variance between them. Control of the same media
    and time is weighted over batches as the condition is; a batch without control cells takes those of all batches. ``control_n`` is how
    many cells of the ``control_variance`` between control cells have the noise of that mean. ``within`` is the variance between training
    cells of one condition and ``others`` what the training screens show of further perturbations. NaN where there are none.
    """

    test: "Screen"
    cells: Int64[np.ndarray, "condition batch"]
    observed: Float[np.ndarray, "condition gene"]
    variance: Float[np.ndarray, "condition gene"]
    control: Float[np.ndarray, "condition gene"]
    control_variance: Float[np.ndarray, "condition gene"]
    control_n: Float[np.ndarray, " condition"]
    within: Float[np.ndarray, " gene"]
    others: Others
    control_cells: Cells = field(repr=False)

    @classmethod
    def of(cls, test: "Screen", others: Sequence["Screen"] = (), *, beside: "Screen | None" = None) -> Self:
        """Take control cells from the test screen (or ``beside``, which holds it) and others, each once; the rest from ``others``.

        Others of other genes, or of values that are no counts, are left out.
        """
        test, others = test.with_rna, [screen for screen in others if screen.values == "counts" and screen.genes == test.genes]
        n, cells = len(test.conditions), np.zeros((len(test.conditions), len(test.batches)), dtype=np.int64)
        np.add.at(cells, (test.condition, test.batch), 1)
        nothing = np.full((n, test.n_genes), np.nan)
        no_others = Others((), nothing[:0], nothing[:0], np.zeros(0, int))
        if test.values != "counts":
            return cls(test, cells, nothing, nothing, nothing, nothing, nothing[:, 0], nothing[0], no_others, {})
        own = Moments.of(test.counts.astype(np.float64).log1p(), test.condition, n)
        seen = set[str]()
        tested = _pairs(beside or test, seen)
        trained = _joined(_pairs(screen, seen) for screen in others)
        known = _joined([tested, trained])
        control = {key: rows for key, rows in known.items() if not key[0].perturbations}
        weights, none = [dict(zip(test.batches, row.tolist(), strict=True)) for row in cells], _Near(nothing[0], nothing[0], np.nan)
        near = [_near(p, weight, control) or none for p, weight in zip(test.conditions, weights, strict=True)]
        mean, variance, control_n = (np.array(part) for part in zip(*near, strict=True))
        within, further = _within(trained, nothing[0]), _others(test, trained, control, no_others)
        return cls(test, cells, own.mean, _variance(test, cells), mean, variance, control_n, within, further, control)

    @cached_property
    def n(self) -> Int64[np.ndarray, " condition"]:
        """How many cells each condition has."""
        return self.cells.sum(1)

    @cached_property
    def perturbed(self) -> Bool[np.ndarray, " condition"]:
        """Which conditions are no control."""
        return np.array([bool(p.perturbations) for p in self.test.conditions])

    @cached_property
    def edited(self) -> list[list[int]]:
        """The numbers of the genes edited in each condition, where they were measured."""
        place = {gene: k for k, gene in enumerate(self.test.genes)}
        return [[place[a.gene] for a in p.perturbations if a.gene in place] for p in self.test.conditions]

    @cached_property
    def groups(self) -> list[tuple[Protocol, list[int]]]:
        """The perturbed conditions of each media and time, by number, and the control that is beside them."""
        conditions = self.test.conditions
        beside = dict.fromkeys(p.unperturbed() for p in conditions)
        groups = ((c, [k for k, p in enumerate(conditions) if p.perturbations and p.unperturbed() == c]) for c in beside)
        return [(c, rows) for c, rows in groups if rows]

    @cached_property
    def noise(self) -> Float[np.ndarray, "condition gene"]:
        """The squared standard error of each observed mean, variance / n."""
        return self.variance / self.n[:, None]

    @cached_property
    def reference(self) -> Float[np.ndarray, "condition gene"]:
        """The mean of the other perturbed conditions of the same media and time with enough cells, as it would be in the same batches.

        Their changes from control are averaged and added to the condition's own control: in one batch, control cancels.
        """
        found = np.full_like(self.observed, np.nan)
        for control, rows in self.groups:
            change, _, n = self._peers(control, rows)
            known = (n >= FEW) & np.isfinite(change).all(1)
            for k, row in enumerate(rows):
                others = change[known & (np.arange(len(n)) != k)]
                found[row] = self.control[row] + (others.mean(0) if len(others) else np.nan)
        return found

    @cached_property
    def weights(self) -> Float[np.ndarray, "condition gene"]:
        """The weights of `rest_weights`, against the other perturbed conditions of the same media and time; edited genes have none."""
        found = np.full_like(self.observed, np.nan)
        for control, rows in self.groups:
            change, noise, _ = self._peers(control, rows)
            edited = [self.edited[k] for k in rows] + [[]] * (len(change) - len(rows))
            found[rows] = rest_weights(change, noise, edited)[: len(rows)]
        return found

    @cached_property
    def differential(self) -> tuple[Bool[np.ndarray, "condition gene"], Float[np.ndarray, "condition gene"]]:
        """Which genes of each perturbed condition differ from control, by cells that were observed, and Welch's t."""
        n = np.nan_to_num(self.control_n).astype(np.int64)
        found, t = differential_genes(self.observed, self.variance, self.n, self.control, self.control_variance, n, edited=self.edited)
        return found & self.perturbed[:, None], t

    def halved(self, seed: int) -> tuple[Self, Float[np.ndarray, "condition gene"], list[tuple[np.ndarray, np.ndarray]]]:
        """Return one half of each condition's cells as what is observed, the means of the other half, and the cells of both.

        Of an odd number the observed half is the larger; of a single cell the other half is empty, and its mean NaN.
        """
        rng, test = np.random.default_rng(seed), self.test
        of = [rng.permutation(np.flatnonzero(test.condition == k)) for k in range(len(self.n))]
        halves = [(rows[len(rows) // 2 :], rows[: len(rows) // 2]) for rows in of]
        values, cells = test.counts.astype(np.float64).log1p(), np.zeros_like(self.cells)
        kept = np.concatenate([rows for rows, _ in halves])
        np.add.at(cells, (test.condition[kept], test.batch[kept]), 1)
        side = np.zeros(test.n_cells, np.int64)
        side[kept] = 1
        both = Moments.of(values, 2 * test.condition + side, 2 * len(self.n))
        half = replace(self, cells=cells, observed=both.mean[1::2], variance=both.unbiased_variance[1::2])
        return half, both.mean[::2], halves

    def _peers(
        self, control: Protocol, rows: list[int]
    ) -> tuple[Float[np.ndarray, "peer gene"], Float[np.ndarray, "peer gene"], Int[np.ndarray, " peer"]]:
        """Return change from control, squared standard error and number of cells of perturbed conditions, those of the rows first."""
        also = [k for k, p in enumerate(self.others.conditions) if p.unperturbed() == control]
        change = np.concatenate([(self.observed - self.control)[rows], self.others.change[also]])
        noise = np.concatenate([self.noise[rows], self.others.variance_of_mean[also]])
        return change, noise, np.concatenate([self.n[rows], self.others.n[also]])


def _pairs(screen: "Screen", seen: set[str]) -> Cells:
    """Return the cells of a screen whose names were not seen, by condition and batch; then they are."""
    screen = screen.with_rna
    new = np.flatnonzero([str(name) not in seen for name in screen.cells])
    seen.update(map(str, screen.cells))
    code = screen.condition[new] * len(screen.batches) + screen.batch[new]
    order = np.argsort(code, kind="stable")
    values, (pairs, start) = screen.counts[new[order]].astype(np.float64).log1p(), np.unique(code[order], return_index=True)
    stop, n_batches = np.append(start, len(new))[1:], len(screen.batches)
    keys = [(screen.conditions[k // n_batches], screen.batches[k % n_batches]) for k in pairs]
    return {key: values[a:b] for key, a, b in zip(keys, start, stop, strict=True)}


def _joined(parts: Iterable[Cells]) -> Cells:
    """Put the cells of several screens together."""
    found: dict[tuple[Protocol, str], list[csr_array]] = {}
    for part in parts:
        for key, rows in part.items():
            found.setdefault(key, []).append(rows)
    return {key: rows[0] if len(rows) == 1 else csr_array(vstack(rows)) for key, rows in found.items()}


class _Near(NamedTuple):
    """Mean and variance of the control cells beside a condition, and how many cells would have the noise of that mean."""

    mean: Float[np.ndarray, " gene"]
    variance: Float[np.ndarray, " gene"]
    n: float


def _near(condition: Protocol, weight: dict[str, int], control: Cells) -> _Near | None:
    """Return what control cells beside a condition show, weighted over batches as it is; None where there are none."""
    rows = {batch: part for (c, batch), part in control.items() if c == condition.unperturbed()}
    if not rows:
        return None
    whole = Moments.of(csr_array(vstack(list(rows.values()))))
    each = {batch: Moments.of(rows[batch]) if batch in rows else whole for batch, n in weight.items() if n}
    share = np.array([weight[batch] for batch in each]) / sum(weight.values())
    mean = share @ np.concatenate([part.mean for part in each.values()])
    n = np.concatenate([part.n_cells for part in each.values()])
    return _Near(mean, whole.unbiased_variance[0], float(1 / (share**2 / n).sum()))


def _variance(test: "Screen", cells: Int64[np.ndarray, "condition batch"]) -> Float[np.ndarray, "condition gene"]:
    """Return the variance between cells of one condition in one batch, pooled over its batches; NaN where each has one cell in each."""
    n, batches = cells.shape
    parts = Moments.of(test.counts.astype(np.float64).log1p(), test.condition * batches + test.batch, n * batches)
    freedom = (np.maximum(cells - 1, 0)).sum(1)[:, None]
    squares = parts.squares.reshape(n, batches, -1)
    return np.where(np.isnan(squares), 0, squares).sum(1) / np.where(freedom > 0, freedom, np.nan)


def _within(trained: Cells, nothing: Float[np.ndarray, " gene"]) -> Float[np.ndarray, " gene"]:
    """Return the variance between training cells of one condition in one batch, pooled; NaN where there are no two such cells."""
    found = [Moments.of(rows) for rows in trained.values()]
    freedom = sum(int(part.n_cells[0]) - 1 for part in found)
    return np.sum([part.squares[0] for part in found], 0) / freedom if freedom else nothing


def _by_condition(cells: Cells) -> dict[Protocol, csr_array]:
    """Put the batches of each condition together."""
    found: dict[Protocol, list[csr_array]] = {}
    for (condition, _), rows in cells.items():
        found.setdefault(condition, []).append(rows)
    return {condition: csr_array(vstack(rows)) for condition, rows in found.items()}


def _others(test: "Screen", trained: Cells, control: Cells, none: Others) -> Others:
    """Return the perturbed training conditions of the media and times of the test, without the tested conditions."""
    places = {p.unperturbed() for p in test.conditions if p.perturbations}
    found = list[tuple[Protocol, Moments, Float[np.ndarray, " gene"]]]()
    for p, rows in _by_condition(trained).items():
        near = None
        if p.perturbations and p.unperturbed() in places and p not in set(test.conditions):
            near = _near(p, {batch: part.shape[0] for (c, batch), part in trained.items() if c == p}, control)
        if near is not None:
            found.append((p, own := Moments.of(rows), own.mean[0] - near.mean))
    if not found:
        return none
    n = np.array([part.n_cells[0] for _, part, _ in found])
    noise = np.array([part.unbiased_variance[0] / part.n_cells[0] for _, part, _ in found])
    return Others(tuple(p for p, _, _ in found), np.array([change for _, _, change in found]), noise, n)
