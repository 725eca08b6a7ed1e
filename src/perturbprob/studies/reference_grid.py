"""The balanced grid of conditions and batches over which a fit is taken apart; aliased factors are one axis of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from perturbprob.experiment.action import Media, Perturbation, Protocol, Wait
from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

FACTORS = ("perturbation", "media", "time", "batch")
Level = tuple[Any, ...]


@final
@dataclass(frozen=True, eq=False)
class ReferenceGrid:
    """Every combination of the levels of the axes, each once.

    An axis is a factor with several levels, or several that are aliased, named like ``"time/batch"``, over their observed combinations.
    ``levels`` holds each axis' levels as values of its factors, ``fixed`` the single level of every other factor, ``seen`` the observed
    combinations of all factors.
    """

    levels: dict[str, list[Level]]
    fixed: dict[str, Any]
    seen: frozenset[Level]

    @classmethod
    def of(cls, fit: "Fit") -> Self:
        """Take the levels that a fit has seen; raises ValueError where it has seen one batch, or another order than P, M, W."""
        conditions = {Protocol.parse(text): batches for text, batches in fit.trained_on["conditions"].items()}
        for p in conditions:
            if p != _usual(p.perturbations, p.media, p.time):
                raise ValueError(f"The grid is over perturbation, then media, then a wait, and {p} has another order. Leave it out.")
        seen = [(p.perturbations, p.media, p.time, batch) for p, batches in conditions.items() for batch in batches]
        of_factor = {name: sorted({row[k] for row in seen}, key=_order) for k, name in enumerate(FACTORS)}
        if len(of_factor["batch"]) < 2:
            raise ValueError(
                "The fit has one batch, so there is no batch effect to take apart. Name the batch column when reading the screen."
            )
        levels = {}
        aliased = [*fit.trained_on["confounded"], *fit.trained_on["aliased"]]
        for group in _groups([name for name in FACTORS if len(of_factor[name]) > 1], aliased):
            places = [FACTORS.index(name) for name in group]
            levels["/".join(group)] = sorted({tuple(row[k] for k in places) for row in seen}, key=lambda level: [_order(v) for v in level])
        fixed = {name: values[0] for name, values in of_factor.items() if len(values) == 1}
        return cls(levels, fixed, frozenset(seen))

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(self.levels)

    @property
    def batch_axis(self) -> str:
        """The name of the axis that holds the batches."""
        return self._axis("batch")

    @property
    def n_cells(self) -> int:
        """How many combinations there are."""
        return prod(map(len, self.levels.values()))

    @property
    def batches(self) -> tuple[str, ...]:
        """The batches, as levels of their axis; what is aliased with batch has one level in each."""
        place = self.batch_axis.split("/").index("batch")
        return tuple(str(level[place]) for level in self.levels[self.batch_axis])

    def n_levels(self, axes: Sequence[str]) -> int:
        """Return how many combinations of some axes there are."""
        return prod(len(self.levels[name]) for name in axes)

    def codes(self, axes: Sequence[str]) -> Int[Tensor, " cell"]:
        """Return the number of each cell's combination of some axes."""
        place = np.indices([len(levels) for levels in self.levels.values()]).reshape(len(self.levels), -1)
        chosen = [place[self.axes.index(name)] for name in axes]
        return torch.as_tensor(np.ravel_multi_index(chosen, [len(self.levels[name]) for name in axes]))

    @property
    def rows(self) -> list[Level]:
        """The levels of every factor in each cell, in the order of the factors."""
        codes = [self.codes([axis]).tolist() for axis in self.axes]
        columns = {name: [value] * self.n_cells for name, value in self.fixed.items()}
        for axis, code in zip(self.axes, codes, strict=True):
            for k, name in enumerate(axis.split("/")):
                columns[name] = [self.levels[axis][c][k] for c in code]
        return list(zip(*(columns[name] for name in FACTORS), strict=True))

    @property
    def protocols(self) -> list[Protocol]:
        """What is done to each cell of the grid."""
        return [_usual(p, m, t) for p, m, t, _ in self.rows]

    @property
    def batch_of_cell(self) -> list[str]:
        """The batch of each cell of the grid."""
        return [str(row[3]) for row in self.rows]

    def terms(self, interactions: Sequence[str | Sequence[str]] | None) -> list[tuple[str, ...]]:
        """Return interactions of factors as interactions of axes, each once; those with a factor of one level are left out.

        None stands for batch with media and with perturbation, where they are not aliased.
        """
        if interactions is None:
            interactions = [(name, "batch") for name in ("media", "perturbation") if name not in self.batch_axis.split("/")]
        found = dict[tuple[str, ...], None]()
        for one in interactions:
            names = [name.strip() for name in one.split(":")] if isinstance(one, str) else list(one)
            for name in names:
                if name not in FACTORS:
                    raise ValueError(f"The interaction {':'.join(names)!r} names {name!r}, which is not a factor. {nearest(name, FACTORS)}")
            if len(set(names)) < 2 or len(set(names)) < len(names):
                raise ValueError(f"An interaction joins two different factors or more, such as ('media', 'batch'); got {one!r}.")
            if not set(names) & set(self.fixed):
                found[self._joined(names)] = None
        return list(found)

    def notes(self, n_states: int) -> tuple[str, ...]:
        """Say what the grid is and what it leaves open."""
        size = " × ".join(f"{len(levels)} {axis}" for axis, levels in self.levels.items())
        unseen = self.n_cells - len(self.seen)
        notes = [f"Grid: {size}, each combination once, with the same {n_states} rest states in each; noise is that of log(1 + count)."]
        if unseen > 0:
            notes.append(
                f"{unseen} of {self.n_cells} combinations were never observed; what the fit predicts of them counts like the others."
            )
        for axis in self.axes:
            if "/" in axis:
                words = " and ".join(axis.split("/"))
                notes.append(
                    f"{words} are aliased in this layout: their share is given together, as {axis}; no cell tells what is due to which."
                )
        return tuple(notes)

    def _axis(self, factor: str) -> str:
        """Return the axis that a factor is part of."""
        return next(axis for axis in self.axes if factor in axis.split("/"))

    def _joined(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the axes of an interaction in the order of the grid."""
        axes = {self._axis(name) for name in names}
        if len(axes) < len(names):
            raise ValueError(
                f"The interaction {':'.join(names)!r} joins factors that are aliased in this layout ({', '.join(self.axes)} are its "
                "axes), so no cell shows it. Leave it out."
            )
        return tuple(axis for axis in self.axes if axis in axes)


def _usual(perturbations: tuple[Perturbation, ...], media: str | None, time: float) -> Protocol:
    """Return P, then M, then W."""
    return Protocol([*perturbations, *([] if media is None else [Media(media)]), Wait(time)])


def _order(value: object) -> tuple[int, float, str]:
    """Sort none (control, baseline media) to the front, then numbers, then by name."""
    if isinstance(value, float):
        return (1, value, "")
    return (int(bool(value)), 0.0, repr(value))


def _groups(factors: list[str], aliased: Sequence[Sequence[str]]) -> list[list[str]]:
    """Join the factors that are aliased with each other, in the order of the factors."""
    of = {name: name for name in factors}
    for first, *others in aliased:
        for second in others:
            if first in of and second in of:
                old, new = of[second], of[first]
                of = {name: new if group == old else group for name, group in of.items()}
    return [[name for name in factors if of[name] == group] for group in dict.fromkeys(of.values())]
