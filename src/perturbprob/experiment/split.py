"""Parts of a screen to train on and to test on, with proof that nothing leaks from one to the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.reading import some
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_seed, is_within
from perturbprob.experiment.vocabulary import nearest


@final
@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Two parts of one screen: ``train, test = split``.

    - ``held_out``: the conditions that only the test part may show; empty where cells, not conditions, were held out.
    - ``kind``: what was held out, in a word: "time" or "cells".

    What makes a split honest is checked here, so that no `Split` exists that leaks: no cell is in both parts, both parts measure the same
    genes, no held-out condition has a cell to train on, and each has cells to test on. `proof` says so in words. Raises ValueError
    that names what leaks.

    >>> from perturbprob.experiment import datasets
    >>> split = hold_out_time(datasets.ishikawa2023(), 5, ["NANOG", "SOX2"])
    >>> train, test = split
    >>> split
    Split by time: 14,566 cells to train on, 379 to test on, 2 conditions held out
    """

    train: Screen
    test: Screen
    held_out: tuple[Protocol, ...]
    kind: str

    def __post_init__(self) -> None:
        """Refuse a split that leaks."""
        if shared := sorted(set(self.train.cells) & set(self.test.cells)):
            raise ValueError(f"{some(shared, 'cell')} in both parts of the split: a cell is trained on or tested on, not both.")
        if self.train.genes != self.test.genes:
            raise ValueError("The two parts of the split have other genes, or in another order: cut both from one screen.")
        if leaked := [p for p in self.held_out if p in self.train.conditions]:
            raise ValueError(f"{some(leaked, 'held-out condition')} among the training cells: take all its cells out of training.")
        if untested := [p for p in self.held_out if p not in self.test.conditions]:
            raise ValueError(f"{some(untested, 'held-out condition')} without a cell to test on: leave it out of held_out=.")

    def __iter__(self) -> Iterator[Screen]:
        """Yield the part to train on, then the part to test on."""
        return iter((self.train, self.test))

    def __repr__(self) -> str:
        """Return the size of both parts in a line."""
        held = f", {len(self.held_out)} conditions held out" if self.held_out else ""
        return f"Split by {self.kind}: {self.train.n_cells:,} cells to train on, {self.test.n_cells:,} to test on{held}"

    def proof(self) -> str:
        """Say in words what was checked, with the numbers found.

        >>> from perturbprob.experiment import datasets
        >>> print(hold_out_time(datasets.ishikawa2023(), 5, ["NANOG"]).proof())
        Of 14,661 cells to train on and 284 to test on, 0 are in both parts.
        Both parts measure the same 103 genes in the same order.
        Of 1 held-out condition, 0 have a cell to train on and 1 has cells to test on: Knockout('NANOG') >> Wait(5).
        """
        shared = len(set(self.train.cells) & set(self.test.cells))
        cells = f"Of {self.train.n_cells:,} cells to train on and {self.test.n_cells:,} to test on, {shared} are in both parts."
        genes = f"Both parts measure the same {self.train.n_genes:,} genes in the same order."
        return "\n".join([cells, genes, self._proof_of_conditions() if self.held_out else self._shown_conditions()])

    def _proof_of_conditions(self) -> str:
        """Say how many held-out conditions have cells in either part, and name them."""
        trained, tested = (sum(p in part.conditions for p in self.held_out) for part in self)
        what = f"{len(self.held_out)} held-out condition{'s' if len(self.held_out) > 1 else ''}"
        has = "has" if tested == 1 else "have"
        return f"Of {what}, {trained} have a cell to train on and {tested} {has} cells to test on: {', '.join(map(str, self.held_out))}."

    def _shown_conditions(self) -> str:
        """Say how many of the tested conditions training shows too."""
        shown = len(set(self.test.conditions) & set(self.train.conditions))
        return f"No condition is held out: {shown} of the {len(self.test.conditions)} tested conditions have cells to train on."


def hold_out_time(screen: Screen, time: float, perturbations: str | Sequence[str] | None = None) -> Split:
    """Hide one time of some perturbations (names, several genes joined with ``+``; None: of all), in every media.

    Control stays, and so do the other times of these perturbations: the question is whether a model sees where a cell goes, from where
    it was. ``time`` is in the unit of the screen. Raises ValueError for a time or perturbation that the screen does not have, and for
    a perturbation without that time, or without another time to learn it from.

    >>> from perturbprob.experiment import datasets
    >>> split = hold_out_time(datasets.ishikawa2023(), 5)
    >>> len(split.held_out), split.train.times
    (23, (2.0, 3.0, 4.0, 5.0))
    """
    require_screen(screen, partial=True)
    names = screen.perturbations if perturbations is None else _named(screen, perturbations)
    if isinstance(time, str):
        raise TypeError(f"time is a number in the unit of the screen; got {time!r}.")
    if time not in screen.times:
        raise ValueError(f"No cell of this screen has the time {time:g}. {_nearest_time(screen, time)}")
    if not names:
        raise ValueError("No perturbation to hide: the split would test nothing. Name perturbations of the screen.")
    held = tuple(p for p in screen.conditions if p.perturbations and p.perturbation in names and p.time == time)
    for name in sorted(names if perturbations is not None else {p.perturbation for p in held}):
        _check_times(screen, name, time)
    return _cut(screen, np.isin(screen.condition, [screen.conditions.index(p) for p in held]), held, "time")


def hold_out_cells(screen: Screen, share: float = 0.1, seed: int = 0) -> Split:
    """Hide about this share of all cells, each by a draw of its own: cell k is tested if the k-th uniform number is below ``share``.

    For log densities of cells under conditions that training shows. Raises ValueError for a share that is not between 0 and 1, or that
    leaves one of the parts empty.

    >>> from perturbprob.experiment import datasets
    >>> hold_out_cells(datasets.ishikawa2023())
    Split by cells: 13,403 cells to train on, 1,542 to test on
    """
    require_screen(screen, partial=True)
    check_seed(seed)
    if not is_within(share, 0, 1):
        raise ValueError(f"share is the share of cells to test on, between 0 and 1; got {share!r}.")
    return _cut(screen, np.random.default_rng(seed).random(screen.n_cells) < share, (), "cells")


def _cut(screen: Screen, hidden: Bool[np.ndarray, " cell"], held_out: tuple[Protocol, ...], kind: str) -> Split:
    """Return the two parts of a screen, neither of them empty."""
    if not hidden.any():
        raise ValueError(f"None of the {screen.n_cells:,} cells is held out, so the split tests nothing. Hold out more.")
    if hidden.all():
        raise ValueError(f"All {screen.n_cells:,} cells are held out, so nothing is left to train on. Hold out fewer.")
    return Split(screen[~hidden], screen[hidden], held_out, kind)


def _named(screen: Screen, perturbations: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names as the screen writes them; refuse control and names that it does not have."""
    names = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    for name in names:
        if name in ("control", screen.control):
            raise ValueError(f"{name!r} cannot be held out: control stays in training, as what perturbations are compared with.")
    sorted_names = ["+".join(sorted(name.split("+"))) for name in names]
    for name in sorted_names:
        if name not in screen.perturbations:
            raise ValueError(f"No cell of this screen has the perturbation {name!r}. {nearest(name, screen.perturbations)}")
    return tuple(sorted_names)


def _nearest_time(screen: Screen, time: float) -> str:
    """Say which times the screen has, nearest first where there are many."""
    near = sorted(sorted(screen.times, key=lambda known: abs(known - time))[:8])
    more = f" and {len(screen.times) - len(near)} more" if len(screen.times) > len(near) else ""
    return f"Known: {', '.join(f'{t:g}' for t in near)}{more} {screen.time_unit or '(no unit)'}."


def _check_times(screen: Screen, name: str, time: float) -> None:
    """Refuse a perturbation without the time to hide, or without another to learn it from."""
    times = sorted({p.time for p in screen.conditions if p.perturbation == name})
    if time not in times:
        seen = ", ".join(f"{t:g}" for t in times)
        raise ValueError(f"{name} has no cell at time {time:g}, so hiding it tests nothing. It was seen at {seen}.")
    if len(times) == 1:
        raise ValueError(
            f"{name} was seen at time {time:g} only, so hiding that leaves nothing of it to train on. "
            "Leave it out of perturbations=, which names those whose time is hidden."
        )
