"""A part of a screen to train on and a part to test on, with proof that nothing leaks from one to the other."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, final

import numpy as np

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.reading import some
from perturbprob.experiment.screen import Screen

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=Hashable)


class _Unit(NamedTuple):
    """What of a condition may not be seen in training, where that is more than the condition: how it is found, and called."""

    of: Callable[[Protocol], Hashable]
    one: str
    many: str
    where: str


_UNITS = {
    "perturbations": _Unit(lambda p: p.perturbations, "perturbation", "perturbations", "in any media at any time"),
    "combinations": _Unit(lambda p: p.perturbations, "combination", "combinations", "in any media at any time"),
    "media": _Unit(
        lambda p: (p.perturbations, p.media), "pair of perturbation and media", "pairs of perturbation and media", "at any time"
    ),
}


@final
@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Two parts of one screen: ``train, test = split``.

    - ``held_out``: the conditions that only the test part may show; empty where cells, or conditions in some batches, were held out.
    - ``kind``: what was held out, in a word: "time", "perturbations", "media", "combinations", "batches" or "cells".
    - ``batches``: the batches of which no perturbed cell is in training; empty if none was held out.

    What makes a split honest is checked here, so that no `Split` exists that leaks: no cell is in both parts, both parts measure the same
    genes, no held-out condition has a cell to train on, and each has cells to test on. Where perturbations (or combinations, or
    perturbations in media) are held out, no training cell has them in any media at any time (at any time). Of a held-out batch, training
    shows control at most, and none that is tested on. `proof` says so in words. Raises ValueError that names what leaks.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG", "SOX2"])
    >>> train, test = part
    >>> part
    Split by time: 14,566 cells to train on, 379 to test on, 2 conditions held out
    """

    train: Screen
    test: Screen
    held_out: tuple[Protocol, ...]
    kind: str
    batches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a split that leaks."""
        if shared := sorted(set(self.train.cells) & set(self.test.cells)):
            raise ValueError(f"{some(shared, 'cell')} in both parts of the split: a cell is trained on or tested on, not both.")
        if self.train.genes != self.test.genes:
            raise ValueError("The two parts of the split have other genes, or in another order: cut both from one screen.")
        trained, tested = (set(part.conditions) for part in self)
        if leaked := [p for p in self.held_out if p in trained]:
            raise ValueError(f"{some(leaked, 'held-out condition')} among the training cells: take all its cells out of training.")
        if untested := [p for p in self.held_out if p not in tested]:
            raise ValueError(f"{some(untested, 'held-out condition')} without a cell to test on: leave it out of held_out=.")
        self._check_units()
        self._check_batches()

    def _check_units(self) -> None:
        """Refuse a held-out perturbation that training shows at another time, or in other media."""
        unit = _UNITS.get(self.kind)
        shown = {unit.of(p) for p in self.train.conditions} if unit else set()
        if unit and (leaked := [p for p in self.held_out if unit.of(p) in shown]):
            raise ValueError(
                f"{some(leaked, 'held-out condition')} of a {unit.one} that training shows elsewhere. In a split of kind {self.kind!r} "
                f"no training cell may have it, {unit.where}: take those out of training, or say what else the split is by."
            )

    def _check_batches(self) -> None:
        """Refuse a held-out batch with perturbed cells to train on, with control in both parts, or without cells to test on."""
        trained, tested = (self._held_out_pairs(part) for part in self)
        if leaked := sorted({batch for p, batch in trained if p.perturbations or (p, batch) in tested}):
            raise ValueError(
                f"{some(leaked, 'held-out batch', 'held-out batches')} among the training cells: only control may stay, where it is not "
                "tested on. Take the other cells out of training."
            )
        if untested := [b for b in self.batches if b not in {batch for _, batch in tested}]:
            raise ValueError(f"{some(untested, 'held-out batch', 'held-out batches')} without a cell to test on: leave it out of batches=.")

    def _held_out_pairs(self, part: Screen) -> set[tuple[Protocol, str]]:
        """Return the conditions that one part shows in each held-out batch."""
        return {(p, batch) for p, batch in pairs(part) if batch in self.batches} if self.batches else set()

    def __iter__(self) -> Iterator[Screen]:
        """Yield the part to train on, then the part to test on."""
        return iter((self.train, self.test))

    def __repr__(self) -> str:
        """Return the size of both parts in a line."""
        counts = [(len(self.held_out), "condition", "conditions"), (len(self.batches), "batch", "batches")]
        held = " and ".join(_count(n, one, many) for n, one, many in counts if n)
        sizes = f"Split by {self.kind}: {self.train.n_cells:,} cells to train on, {self.test.n_cells:,} to test on"
        return f"{sizes}, {held} held out" if held else sizes

    def proof(self) -> str:
        """Say in words what was checked, with the numbers found, and what training shows of what was held out.

        >>> from perturbprob.experiment import datasets, split
        >>> print(split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"]).proof())
        Of 14,661 cells to train on and 284 to test on, 0 are in both parts.
        Both parts measure the same 103 genes in the same order.
        Of 1 held-out condition, 0 have a cell to train on and 1 has cells to test on: Knockout('NANOG') >> Wait(5).
        Extrapolated, past the last time of the perturbation in training: Knockout('NANOG') >> Wait(5).
        """
        return "\n".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        """Yield the sentences of the proof."""
        shared = len(set(self.train.cells) & set(self.test.cells))
        yield f"Of {self.train.n_cells:,} cells to train on and {self.test.n_cells:,} to test on, {shared} are in both parts."
        yield f"Both parts measure the same {self.train.n_genes:,} genes in the same order."
        if self.held_out:
            yield self._proof_of_conditions()
        if self.held_out and self.kind in _UNITS:
            yield self._proof_of_units(_UNITS[self.kind])
        if self.held_out and self.kind in _SHOWN:
            yield from _SHOWN[self.kind](self)
        if self.batches:
            yield from self._proof_of_batches()
        if not self.held_out and not self.batches:
            yield f"No condition is held out: {self._shown_conditions()} have cells to train on."

    def _proof_of_conditions(self) -> str:
        """Say how many held-out conditions have cells in either part, and name them."""
        trained, tested = (len(set(self.held_out) & set(part.conditions)) for part in self)
        what, has = _count(len(self.held_out), "held-out condition", "held-out conditions"), "has" if tested == 1 else "have"
        return f"Of {what}, {trained} have a cell to train on and {tested} {has} cells to test on: {', '.join(map(str, self.held_out))}."

    def _proof_of_units(self, unit: _Unit) -> str:
        """Say how many held-out perturbations, or perturbations in media, training shows anywhere."""
        held = {unit.of(p) for p in self.held_out}
        trained = len(held & {unit.of(p) for p in self.train.conditions})
        what = _count(len(held), f"held-out {unit.one}", f"held-out {unit.many}")
        return f"Of {what}, {trained} have a cell to train on {unit.where}."

    def _proof_of_batches(self) -> Iterator[str]:
        """Say how many conditions in held-out batches are trained on, and what training shows of these batches and conditions."""
        trained, tested = (self._held_out_pairs(part) for part in self)
        perturbed = {batch for p, batch in trained if p.perturbations}
        what = _count(len(tested), "held-out pair of condition and batch", "held-out pairs of condition and batch")
        batches = _count(len(self.batches), "held-out batch", "held-out batches")
        yield f"Of {what}, {len(tested & trained)} have a cell to train on."
        yield f"Of {batches}, {len(perturbed)} have a perturbed cell to train on: {', '.join(self.batches)}."
        control = [sum(n for (p, b), n in pairs(part).items() if not p.perturbations and b in self.batches) for part in self]
        yield f"Of the control cells of held-out batches, {control[0]:,} are trained on and {control[1]:,} tested on."
        yield f"In other batches, {self._shown_conditions()} have cells to train on."

    def _shown_conditions(self) -> str:
        """Say how many of the tested conditions training shows too."""
        return f"{len(set(self.test.conditions) & set(self.train.conditions))} of the {len(self.test.conditions)} tested conditions"


def pairs(screen: Screen) -> dict[tuple[Protocol, str], int]:
    """Return the number of cells of each condition in each batch, where there are any.

    >>> from perturbprob.experiment import datasets
    >>> len(pairs(datasets.ishikawa2023()))
    96
    """
    n_batches = len(screen.batches)
    found, cells = np.unique(screen.condition * n_batches + screen.batch, return_counts=True)
    return {(screen.conditions[k // n_batches], screen.batches[k % n_batches]): int(n) for k, n in zip(found, cells, strict=True)}


_TIMES = {  # whether training shows the perturbation earlier, and later, in the same media
    (True, True): "Interpolated, between an earlier and a later time of the perturbation in training",
    (True, False): "Extrapolated, past the last time of the perturbation in training",
    (False, True): "Extrapolated, before the first time of the perturbation in training",
    (False, False): "At no other time of the perturbation in these media in training",
}


def _shown_times(split: Split) -> Iterator[str]:
    """Say which held-out times lie between, past or before those that training shows of the same perturbation in the same media."""
    times = grouped(((p.perturbations, p.media), p.time) for p in split.train.conditions)
    seen = {p: times.get((p.perturbations, p.media), []) for p in split.held_out}
    where = grouped(((any(t < p.time for t in seen[p]), any(t > p.time for t in seen[p])), str(p)) for p in split.held_out)
    yield from (f"{_TIMES[side]}: {', '.join(where[side])}." for side in _TIMES if side in where)


def _shown_genes(split: Split) -> Iterator[str]:
    """Say which genes of held-out perturbations are perturbed in training, and in which perturbations."""
    genes = {a.gene for p in split.held_out for a in p.perturbations}
    shown = grouped((a.gene, p.perturbation) for p in split.train.conditions for a in p.perturbations if a.gene in genes)
    what, which = _count(len(genes), "gene", "genes"), "; ".join(f"{gene} in {', '.join(shown[gene])}" for gene in sorted(shown))
    yield f"Of their {what}, {len(shown)} {'is' if len(shown) == 1 else 'are'} perturbed in training{': ' if which else ''}{which}."


def _shown_media(split: Split) -> Iterator[str]:
    """Say in which media training shows the held-out perturbations, and how many control cells it shows in the held-out media."""
    baseline = split.train.baseline or "baseline"
    held = {p.perturbations: p.perturbation for p in split.held_out}
    media = grouped((p.perturbations, p.media or baseline) for p in split.train.conditions if p.perturbations in held)
    shown = grouped((tuple(media.get(what, ["no media"])), name) for what, name in held.items())
    yield f"Training shows {'; '.join(', '.join(names) + ' in ' + ', '.join(where) for where, names in shown.items())}."
    for m in dict.fromkeys(p.media for p in split.held_out):
        control = sum(n for (p, _), n in pairs(split.train).items() if not p.perturbations and p.media == m)
        yield f"Control in {m or baseline} has {_count(control, 'cell', 'cells')} to train on."


def _shown_parts(split: Split) -> Iterator[str]:
    """Say how many genes of each held-out combination training shows alone."""
    alone = {p.perturbations[0] for p in split.train.conditions if len(p.perturbations) == 1}
    combinations = {p.perturbations: p.perturbation for p in split.held_out}
    unseen = {actions: [a.gene for a in actions if a not in alone] for actions in combinations}
    names = {actions: name + (f" (not {', '.join(unseen[actions])})" if unseen[actions] else "") for actions, name in combinations.items()}
    counts = grouped(((len(actions) - len(unseen[actions]), len(actions)), names[actions]) for actions in combinations)
    parts = [f"{seen} of {n} genes of {', '.join(counts[seen, n])}" for seen, n in sorted(counts, reverse=True)]
    yield f"Seen alone in training: {'; '.join(parts)}."


_SHOWN: dict[str, Callable[[Split], Iterator[str]]] = {
    "time": _shown_times,
    "perturbations": _shown_genes,
    "media": _shown_media,
    "combinations": _shown_parts,
}


def grouped(items: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Collect the values of each key once, in order.

    >>> grouped([("A", 1), ("B", 1), ("A", 2), ("A", 1)])
    {'A': [1, 2], 'B': [1]}
    """
    groups: dict[Key, dict[Value, None]] = {}
    for key, value in items:
        groups.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in groups.items()}


def _count(n: int, one: str, many: str) -> str:
    """Say a number of things.

    >>> _count(1, "batch", "batches"), _count(1200, "batch", "batches")
    ('1 batch', '1,200 batches')
    """
    return f"{n:,} {one if n == 1 else many}"
