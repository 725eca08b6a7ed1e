"""What an evaluation says in words."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from perturbprob.studies.evaluation import Evaluation

WORDS = {
    "control mean": "the mean of control",
    "perturbation mean": "the mean of the training perturbations",
    "low-rank linear": "the low-rank linear model",
    "last time": "the last time",
    "control + offset": "control + offset",
    "linear ODE": "the linear ODE",
    "last time + drift": "the last time + drift",
    "shrunk offset": "the shrunk offset",
    "denoised offset": "the denoised offset",
    "hierarchical Gaussian": "the hierarchical Gaussian model",
}
"""Baselines as a sentence calls them."""


def report(found: "Evaluation") -> str:
    """Return the sentences of an evaluation, a line each."""
    return "\n".join(_lines(found))


def _lines(found: "Evaluation") -> Iterator[str]:
    """Yield the lines of the report."""
    who, rows = _subject(found), found.conditions.loc[found.model]
    few = rows.index[rows["few"]].tolist()
    yield f"{len(rows) - len(few)} held-out conditions of {int(rows['n_cells'].sum()):,} cells, {found.n_genes} genes."
    error, over = found.overall.loc[found.model, ["error", "error_over_floor"]]
    yield f"Error {error:.4f}, {over:.2f} times the noise floor of {found.overall.loc['noise floor', 'error']:.4f}."
    yield from _beaten(found, who)
    yield from _unbeaten(found, who)
    yield from _how_sure(found)
    if few:
        yield f"Fewer than 10 cells, scored apart and in no number above: {', '.join(few)}."
    for why in dict.fromkeys(found.left_out.values()):
        yield f"Left out, {', '.join(name for name, one in found.left_out.items() if one == why)}: {why}"


def _subject(found: "Evaluation") -> str:
    """Return what the model is called at the start of a sentence."""
    return "The model" if found.model == "model" else found.model


def _called(names: Sequence[str]) -> str:
    """Return names in a row, as a sentence calls them."""
    words = [WORDS.get(name, name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _sorted(found: "Evaluation", *, beats: bool) -> list[str]:
    """Return what the model beats, or does not, the best first."""
    names = found.paired.index[found.paired["beats"] == beats]
    return sorted(names, key=lambda name: found.overall.loc[name, "error"])


def _beaten(found: "Evaluation", who: str) -> Iterator[str]:
    """Say what the model beats."""
    if names := _sorted(found, beats=True):
        rule = "better on average and in most conditions, Wilcoxon's signed-rank p < 0.05"
        yield f"{who} beats {len(names)} of {len(found.paired)}: {_called(names)} ({rule})."


def _unbeaten(found: "Evaluation", who: str) -> Iterator[str]:
    """Say plainly what the model does not beat, each by how much."""
    for name in _sorted(found, beats=False):
        difference, lower, upper, share, p = found.paired.loc[name, ["difference", "lower", "upper", "share_better", "p"]]
        told = "too few conditions to tell" if np.isnan(lower) else f"95 % interval {lower:+.4f} to {upper:+.4f}"
        how = f"difference in error {difference:+.4f}, {told}; better in {100 * share:.0f} % of conditions, p {p:.2g}"
        yield f"{who} does not beat {_called([name])}.\n  ({how})"


def _how_sure(found: "Evaluation") -> Iterator[str]:
    """Say how often intervals held what was observed."""
    row = found.overall.loc[found.model]
    if np.isnan(row["crps"]):
        yield "No training condition has two cells, so that intervals of observed means cannot be told."
        return
    told = [level for level in (50, 80, 90) if not np.isnan(row[f"coverage{level}"])]
    levels = ", ".join(f"{100 * row[f'coverage{level}']:.0f} % by those of {level} %" for level in told)
    more = "" if len(told) == 3 else " Wider intervals need more draws: raise n_draws."
    yield f"Observed means covered: {levels or 'not told'}; CRPS {row['crps']:.4f}.{more}"
