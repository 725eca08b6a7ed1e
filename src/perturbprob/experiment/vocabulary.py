"""The names a model knows, and protocols written in them as tensors."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from perturbprob.experiment.action import Action, Media, Perturbation, Protocol

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


@dataclass(frozen=True)
class Segment:
    """What is done to each cell at one instant, and the wait behind it.

    ``perturbation`` has a one for every perturbation done, ``media`` a one for the new media (all zero: baseline), which
    counts only where ``changed``; ``wait`` is in units of the vocabulary's time scale.
    """

    perturbation: Float[Tensor, "cell perturbation"]
    media: Float[Tensor, "cell media"]
    changed: Bool[Tensor, " cell"]
    wait: Float[Tensor, " cell"]

    def __getitem__(self, cells: Tensor) -> Self:
        """Return the segment of these cells."""
        return type(self)(self.perturbation[cells], self.media[cells], self.changed[cells], self.wait[cells])

    def waiting(self, wait: float) -> Self:
        """Return a segment in which nothing is done to these cells, and then this wait."""
        nothing = torch.zeros_like
        return type(self)(nothing(self.perturbation), nothing(self.media), nothing(self.changed), torch.full_like(self.wait, wait))

    def to(self, device: torch.device) -> Self:
        """Return the segment on another device."""
        return type(self)(*(part.to(device) for part in (self.perturbation, self.media, self.changed, self.wait)))


@dataclass(frozen=True)
class Vocabulary:
    """Every name a model knows: genes, perturbations, media, batches, and the unit of its times.

    ``time_scale`` is the median wait of the screen: the model works in this unit, whatever the unit of the user.
    """

    genes: tuple[str, ...]
    perturbations: tuple[Perturbation, ...]
    media: tuple[str, ...]
    batches: tuple[str, ...]
    baseline: str | None = None
    time_unit: str | None = None
    time_scale: float = 1.0

    @classmethod
    def of(cls, screen: "Screen") -> Self:
        """Collect the names of a screen."""
        protocols = screen.conditions
        waits = np.array([p.time for p in protocols])[screen.condition]
        return cls(
            genes=tuple(screen.genes),
            perturbations=tuple(sorted({a for p in protocols for a in p.perturbations}, key=lambda a: (a.gene, a.symbol))),
            media=tuple(sorted({a.name for p in protocols for a in p if isinstance(a, Media) and a.name is not None})),
            batches=tuple(screen.batches),
            baseline=screen.baseline,
            time_unit=screen.time_unit,
            time_scale=float(np.median(waits[waits > 0])) if (waits > 0).any() else 1.0,
        )

    def protocol(self, protocol: Protocol | Action) -> Protocol:
        """Return the protocol with this screen's baseline media understood; refuse names the model has never seen."""
        protocol = (Protocol() >> protocol).with_baseline(self.baseline)
        known = {p.gene for p in self.perturbations}
        for action in protocol:
            if isinstance(action, Perturbation) and action not in self.perturbations:
                kinds = [p for p in self.perturbations if p.gene == action.gene]
                hint = f"It has seen {', '.join(map(repr, kinds))}." if kinds else nearest(action.gene, known)
                raise ValueError(f"{action!r} was never seen by this model, so nothing is known of its effect. {hint}")
            if isinstance(action, Media) and action.name is not None and action.name not in self.media:
                named = (*self.media, self.baseline) if self.baseline else self.media
                raise ValueError(f"Media {action.name!r} was never seen by this model. {nearest(action.name, named)}")
        return protocol

    def batch_code(self, batch: str) -> int:
        """Return the number of a batch; refuse a batch the model has never seen."""
        if batch not in self.batches:
            raise ValueError(f"Batch {batch!r} was never seen by this model. {nearest(batch, self.batches)}")
        return self.batches.index(batch)

    def encode(self, protocols: Sequence[Protocol]) -> list[Segment]:
        """Write protocols as tensors, one segment for each wait of the longest; shorter ones wait zero at their end."""
        cut = [self.protocol(p).segments() for p in protocols]
        n_segments = max((len(c) for c in cut), default=1)
        return [self._segment([c[k] if k < len(c) else ((), 0.0) for c in cut]) for k in range(n_segments)]

    def _segment(self, steps: Sequence[tuple[tuple[Action, ...], float]]) -> Segment:
        """Write one segment of every protocol."""
        perturbation = torch.zeros(len(steps), len(self.perturbations))
        media = torch.zeros(len(steps), len(self.media))
        changed = torch.zeros(len(steps), dtype=torch.bool)
        for row, (actions, _) in enumerate(steps):
            for action in actions:
                if isinstance(action, Perturbation):
                    perturbation[row, self.perturbations.index(action)] = 1.0
                elif isinstance(action, Media):
                    changed[row], media[row] = True, 0.0
                    if action.name is not None:
                        media[row, self.media.index(action.name)] = 1.0
        wait = torch.tensor([wait / self.time_scale for _, wait in steps], dtype=torch.float32)
        return Segment(perturbation, media, changed, wait)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self) | {"perturbations": [repr(p) for p in self.perturbations]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read back what `to_json` wrote."""
        texts = values["perturbations"]
        perturbations = tuple(p for text in texts for p in Protocol.parse(f"Protocol([{text}])").perturbations)
        names = {key: tuple(values[key]) for key in ("genes", "media", "batches")}
        return cls(**(values | names | {"perturbations": perturbations}))


def labels(conditions: Sequence[Protocol]) -> list[str]:
    """Name the perturbation of each condition; where one name stands for several kinds, as the actions are written.

    >>> from perturbprob.experiment.action import Activation, Interference, Knockout, Wait
    >>> labels([Knockout("A") >> Wait(1), Activation("B") >> Wait(1), Interference("B") >> Wait(1)])
    ['A', "Activation('B')", "Interference('B')"]
    """
    kinds: dict[str, set[tuple[Perturbation, ...]]] = {}
    for p in conditions:
        kinds.setdefault(p.perturbation, set()).add(p.perturbations)
    return [p.perturbation if len(kinds[p.perturbation]) == 1 else " >> ".join(map(repr, p.perturbations)) for p in conditions]


def meant(name: str, conditions: Sequence[Protocol]) -> list[str]:
    """Return the labels that a name means: its own, or those of every kind of perturbation of these genes.

    >>> from perturbprob.experiment.action import Activation, Interference, Wait
    >>> meant("B", [Activation("B") >> Wait(1), Interference("B") >> Wait(1)])
    ["Activation('B')", "Interference('B')"]
    """
    return list(dict.fromkeys(label for label, p in zip(labels(conditions), conditions, strict=True) if name in (label, p.perturbation)))


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which known names are nearest to a misspelt one."""
    names = sorted(set(known))
    same = [known for known in names if known.casefold() == str(name).casefold()]
    close = same or difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"Known: {shown}." if names else "There is none."
