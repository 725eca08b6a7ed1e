"""Which input-output pairs a screen gives for learning F (eq 5, Figure 1B), and which assumptions add."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.vocabulary import labels

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


@final
@dataclass(frozen=True)
class Pair:
    """One input-output pair for F: what is done to the cells ``start``, and the state ``end`` that they should reach.

    ``path`` is the path of Figure 1B that the end lies on: 1, perturbed cells in other media; 2, perturbed cells in baseline
    media; 3, control cells in other media; 4, control cells in baseline media. ``source`` is "eq 5" or the assumption that adds the pair.
    """

    source: str
    path: int
    perturbation: str
    media: str
    start: str
    done: str
    end: str


def path_of(perturbed: bool, in_baseline: bool) -> int:
    """Return the path of Figure 1B.

    >>> path_of(True, False), path_of(True, True), path_of(False, False), path_of(False, True)
    (1, 2, 3, 4)
    """
    return (2 if in_baseline else 1) if perturbed else (4 if in_baseline else 3)


def paths(screen: "Screen", extra: Iterable[Any] = ()) -> pd.DataFrame:
    """Return every pair of eq 5, (n_p + 1)(n_m + 1) of them with n_m media beside the baseline, and the ``extra`` ones of assumptions.

    One row each, with the fields of `Pair`, and of its end: whether it was ``observed``, in how many ``cells`` and at which ``times``.
    """
    if isinstance(extra, str) or not all(isinstance(one, Pair) or hasattr(one, "pairs") for one in extra):
        raise TypeError(f"extra holds assumptions, or the pairs that they return; got {extra!r}. Write paths([SteadyState()]).")
    added = [pair for one in extra for pair in (one.pairs(screen) if hasattr(one, "pairs") else [one])]
    where = [(label, p.media or screen.baseline or "baseline", p.time) for label, p in _labelled(screen)]
    seen = pd.Series(np.bincount(screen.condition, minlength=len(where)), pd.MultiIndex.from_tuples(where)).groupby(level=[0, 1, 2]).sum()
    rows = [asdict(pair) | _observed(seen, pair) for pair in (*eq5(screen), *added)]
    return pd.DataFrame(rows)


def eq5(screen: "Screen") -> list[Pair]:
    """Return the pairs of eq 5: untouched cells X carried to every perturbation and media, path 1 first."""
    baseline = screen.baseline or "baseline"
    media = (baseline, *(m for m in screen.media if m != baseline))
    pairs = [
        Pair("eq 5", path_of(p != "control", m == baseline), p, m, "X", done(p, m, baseline), state(p, m, baseline))
        for p in ("control", *sorted({label for label, p in _labelled(screen) if p.perturbations}))
        for m in media
    ]
    return sorted(pairs, key=lambda pair: pair.path)


def _labelled(screen: "Screen") -> list[tuple[str, Protocol]]:
    """Return each condition behind the label of its perturbation."""
    return list(zip(labels(screen.conditions), screen.conditions, strict=True))


def done(perturbation: str, media: str, baseline: str) -> str:
    """Say what is done to cells: (p, m, t), a dot being nothing."""
    return f"({_dot(perturbation, 'control')}, {_dot(media, baseline)}, t)"


def state(perturbation: str, media: str, baseline: str) -> str:
    """Return the symbol of a state, as the paper writes it.

    >>> state("SOX2", "BMP4", "mTeSR"), state("control", "mTeSR", "mTeSR")
    ('X[BMP4, t; SOX2]', 'X[t]')
    """
    what = "t" if media == baseline else f"{media}, t"
    return f"X[{what}]" if perturbation == "control" else f"X[{what}; {perturbation}]"


def _dot(name: str, nothing: str) -> str:
    """Return a name, or the dot that stands for nothing done."""
    return "·" if name == nothing else name


def _observed(seen: pd.Series, pair: Pair) -> dict[str, object]:
    """Return where the end of a pair was observed."""
    at = seen[(seen.index.get_level_values(0) == pair.perturbation) & (seen.index.get_level_values(1) == pair.media)]
    at = at[at > 0]
    return {"observed": bool(len(at)), "cells": int(at.sum()), "times": tuple(at.index.get_level_values(2))}
