"""Several screens, of several laboratories, as one."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped
from scipy.sparse import csr_array, vstack

from perturbprob.experiment import reading

if TYPE_CHECKING:
    from perturbprob.experiment.action import Protocol
    from perturbprob.experiment.screen import Screen


def concat(screens: Mapping[str, "Screen"]) -> dict[str, Any]:
    """Return the fields of the joint screen of named screens; `Screen.concat` says how they are made.

    >>> from perturbprob.experiment import Screen, datasets
    >>> screen = datasets.ishikawa2023()
    >>> concat({"here": screen[:50], "there": screen[50:100]})["batches"]
    ('here/d2_1', 'there/d2_1')
    """
    _check(screens)
    parts = [part.in_memory() for part in screens.values()]
    genes, columns = _common_genes(screens)
    counts = [cast("csr_array", part.counts)[:, k] for part, k in zip(parts, columns, strict=True)]
    total = np.concatenate([_expected_total(part, kept) for part, kept in zip(parts, counts, strict=True)])
    depth = float(np.median(total))
    conditions = tuple(sorted({p for part in parts for p in part.conditions}, key=reading.order))
    first = np.cumsum([0, *(len(part.batches) for part in parts)])
    return {
        "counts": csr_array(vstack(counts, format="csr")),
        "genes": genes,
        "cells": _cells(screens),
        "conditions": conditions,
        "condition": np.concatenate([_places(part, conditions)[part.condition] for part in parts]),
        "batches": tuple(f"{name}/{batch}" for name, part in screens.items() for batch in part.batches),
        "batch": np.concatenate([part.batch + start for part, start in zip(parts, first, strict=False)]),
        "screen_of_batch": tuple(name for name, part in screens.items() for _ in part.batches),
        "size_factor": total / depth,
        "depth": depth,
        "control": parts[0].control,
        "baseline": parts[0].baseline,
        "time_unit": parts[0].time_unit,
        "values": parts[0].values,
        "sgrna": np.concatenate([part.sgrna for part in parts]) if all(part.sgrna is not None for part in parts) else None,
        "standard_error": _standard_errors(parts, columns),
        "cells_behind": np.concatenate([p.cells_behind for p in parts]) if all(p.cells_behind is not None for p in parts) else None,
    }


def _check(screens: Mapping[str, "Screen"]) -> None:
    """Refuse what cannot be joined: fewer than two screens, or screens that do not mean the same by time, media, values or control."""
    from perturbprob.experiment.screen import require_screen

    if not isinstance(screens, Mapping):
        raise TypeError(f"Screen.concat joins named screens, as in {{'lab1': screen1, 'lab2': screen2}}; got {type(screens).__name__}.")
    for name, screen in screens.items():
        require_screen(screen)
        if screen.assays:
            raise ValueError(f"Screen.concat joins RNA, and {name!r} has other assays: leave them out with screen.with_assays({{}}).")
        if not isinstance(name, str) or not name:
            raise ValueError(f"Name each screen by a text, which its batches are named after; got {name!r}.")
    if len(screens) < 2:
        raise ValueError(f"Screen.concat joins two screens or more; got {len(screens)}.")
    _check_same(screens, "values", "Read them the same way: values='counts' or values='continuous', or join their pseudobulk().")
    _check_same(screens, "time_unit", "Bring the times to one unit before Screen.from_anndata, and pass the same time_unit=.")
    _check_same(
        screens,
        "baseline",
        "All cells must start in one media: read each screen with a media= column and the same baseline=, written alike.",
    )
    _warn_of_copies(screens)
    meanings = {name: _nontargeting(screen) for name, screen in screens.items()}
    if len(set(meanings.values())) > 1:
        raise ValueError(
            f"The screens do not mean the same by control: non-targeting sgRNAs are {_each(meanings)}. "
            "Read each with the same nontargeting= in Screen.from_anndata."
        )


def _warn_of_copies(screens: Mapping[str, "Screen"]) -> None:
    """Warn of two screens that hold the same cells: they would count twice."""
    from perturbprob.experiment.screen import ScreenWarning

    for (one, a), (other, b) in itertools.combinations(screens.items(), 2):
        if np.array_equal(a.cells, b.cells) and a.counts.shape == b.counts.shape and np.array_equal(a.counts.data, b.counts.data):
            message = f"{one!r} and {other!r} hold the same cells with the same values, which will count twice: leave one out."
            warnings.warn(message, ScreenWarning, stacklevel=5)


def _check_same(screens: Mapping[str, "Screen"], field: str, fix: str) -> None:
    """Refuse screens that differ in a field."""
    found = {name: getattr(screen, field) for name, screen in screens.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"The screens differ in {field}: {_each(found)}. {fix}")


def _each(found: Mapping[str, object]) -> str:
    """Say what each screen has."""
    return ", ".join(f"{value!r} in {name}" for name, value in found.items())


def _nontargeting(screen: "Screen") -> str:
    """Return what cells with a non-targeting sgRNA were read as; a perturbation of such a name decides, as no gene has it."""
    if any(not reading.genes_of(action.gene) for protocol in screen.conditions for action in protocol.perturbations):
        return "perturbation"
    return str(screen.columns.get("nontargeting", "control"))


def _common_genes(screens: Mapping[str, "Screen"]) -> tuple[tuple[str, ...], list[Int64[np.ndarray, " common"]]]:
    """Return the genes that all screens measure, in the order of the first, and where each has them; warn of those that are dropped."""
    from perturbprob.experiment.screen import ScreenWarning

    first, *others = screens.values()
    common = set(first.genes).intersection(*(screen.genes for screen in others))
    genes = tuple(gene for gene in first.genes if gene in common)
    if not genes:
        examples = ", ".join(f"{screen.genes[0]!r} in {name}" for name, screen in screens.items())
        raise ValueError(f"No gene is measured by all screens; genes are called {examples}. Bring var_names to one kind of name.")
    dropped = {name: screen.n_genes - len(genes) for name, screen in screens.items()}
    if any(dropped.values()):
        numbers = ", ".join(f"{n:,} of {screens[name].n_genes:,} in {name}" for name, n in dropped.items())
        message = f"{len(genes):,} genes are measured by all screens and kept; dropped: {numbers}."
        warnings.warn(message, ScreenWarning, stacklevel=4)
    places = [{gene: k for k, gene in enumerate(screen.genes)} for screen in screens.values()]
    return genes, [np.array([place[gene] for gene in genes], dtype=np.int64) for place in places]


def _expected_total(screen: "Screen", kept: csr_array) -> Float64[np.ndarray, " cell"]:
    """Return the expected counts of each cell over the genes kept: size factor × depth, times their share of the screen's counts."""
    share = 1.0 if kept.shape[1] == screen.n_genes or screen.values == "continuous" else float(kept.sum() / screen.counts.sum())
    if not share:
        raise ValueError("A screen has no count in the genes that all screens measure, so it says nothing of them. Leave it out.")
    return screen.size_factor * (screen.depth * share)


def _cells(screens: Mapping[str, "Screen"]) -> Shaped[np.ndarray, " cell"]:
    """Return the names of all cells, each after its screen's where one occurs in two screens."""
    cells = np.concatenate([screen.cells for screen in screens.values()])
    if len(set(cells)) == len(cells):
        return cells
    return np.array([f"{name}/{cell}" for name, screen in screens.items() for cell in screen.cells], dtype=object)


def _places(screen: "Screen", conditions: Sequence["Protocol"]) -> Int64[np.ndarray, " condition"]:
    """Return where the conditions of one screen stand among all."""
    place = {protocol: k for k, protocol in enumerate(conditions)}
    return np.array([place[protocol] for protocol in screen.conditions], dtype=np.int64)


def _standard_errors(parts: Sequence["Screen"], columns: Sequence[Int64[np.ndarray, " common"]]) -> Float32[np.ndarray, "cell gene"] | None:
    """Return the standard errors of all screens, NaN where a screen has none; None where no screen has any."""
    if all(part.standard_error is None for part in parts):
        return None
    none = [np.full((part.n_cells, len(k)), np.nan, np.float32) for part, k in zip(parts, columns, strict=True)]
    known = [part.standard_error for part in parts]
    return np.concatenate([n if e is None else e[:, k] for n, e, k in zip(none, known, columns, strict=True)])
