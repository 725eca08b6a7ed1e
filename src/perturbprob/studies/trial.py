"""What is tested and what was trained on: read from a split or two screens, with every leak refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from perturbprob.experiment.held_out import Split, pairs
from perturbprob.experiment.reading import some
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.inference.fit import Fit
from perturbprob.response import GaussianResponse
from perturbprob.studies.held_out_means import FEW, Means
from perturbprob.studies.predictors import fits_of

if TYPE_CHECKING:
    from perturbprob.studies.predictors import Predictor


@dataclass(frozen=True, eq=False)
class Trial:
    """The means of the perturbed conditions of a test screen, and the screen that was trained on."""

    means: Means
    train: Screen

    @classmethod
    def of(cls, predictors: "Mapping[str, Predictor]", test: Split | Screen, train: Screen | None) -> Self:
        """Check everything: what is given, that nothing tested was trained on, and that each condition has control cells."""
        split, screen = (test, test.test) if isinstance(test, Split) else (None, test)
        require_screen(screen, partial=True)
        fits = [(name, fit) for name, one in predictors.items() for fit in fits_of(one)]
        trained = (split.train if split else _train_of([fit for _, fit in fits])) if train is None else train
        require_screen(trained, partial=True)
        _check_screens(screen, trained)
        for name, fit in fits:
            refuse_trained_cells(name, fit, screen)
        for name, one in predictors.items():
            if isinstance(one, GaussianResponse):
                _refuse_cells(name, set(map(str, one.rows.cells)), screen)
        if split is not None and split.kind == "cells":
            _refuse_means(predictors)
        else:
            for name, known in _trained_conditions(predictors):
                _refuse_trained_conditions(name, known, screen, split)
            _refuse_trained_conditions("train=", _batches_of(trained), screen, split)
        edited = np.array([bool(p.perturbations) for p in screen.conditions])
        means = Means.of(screen[edited[screen.condition]], [trained], beside=screen)
        _check_control(means)
        _check_enough(means)
        return cls(means, trained)


def _refuse_means(predictors: "Mapping[str, Predictor]") -> None:
    """Refuse a model of means where cells are held out: it does not remember whose means they are."""
    for name, one in predictors.items():
        if any(fit.model.start is not None for fit in fits_of(one)) or (isinstance(one, GaussianResponse) and not one.counts):
            raise ValueError(
                f"{name!r} was fitted to means, and does not remember the cells behind them, so whether it saw these cannot be told. "
                "Hold out conditions, or fit gaussian_response to the counts of split.train."
            )


def _trained_conditions(predictors: "Mapping[str, Predictor]") -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Yield the batches of each condition that a predictor was trained on, as far as it says so."""
    for name, one in predictors.items():
        for fit in fits_of(one):
            yield name, {condition: list(batches) for condition, batches in fit.trained_on["conditions"].items()}
        if isinstance(one, GaussianResponse):
            yield name, _batches_of(one.rows.screen)


def _batches_of(screen: Screen) -> dict[str, list[str]]:
    """Return the batches that each condition of a screen is in."""
    known: dict[str, list[str]] = {}
    for condition, batch in pairs(screen):
        known.setdefault(str(condition), []).append(batch)
    return known


def _train_of(fits: list[Fit]) -> Screen:
    """Return the screen of the first fit that still has its own."""
    found = next((fit.screen for fit in fits if fit.screen is not None), None)
    if found is None:
        why = "a fit that was loaded no longer holds the screen it was trained on" if fits else "predictions do not hold it"
        raise ValueError(f"The training screen is needed, for control cells and baselines, and {why}: pass train=, or a split as test.")
    return found


def _check_screens(test: Screen, train: Screen) -> None:
    """Refuse a test screen without a perturbed cell of counts, other genes, and cells that are in both."""
    if test.values != "counts":
        raise ValueError("The test screen holds continuous values; evaluate takes cells with counts, and makes their means itself.")
    if train.values != "counts":
        raise ValueError("The training screen holds continuous values; control cells and baselines need its counts: pass train= with them.")
    if not any(p.perturbations for p in test.conditions):
        raise ValueError("The test screen has no perturbed condition: control is what perturbations are compared with, and is not scored.")
    if test.genes != train.genes:
        differ = len(set(test.genes) ^ set(train.genes))
        raise ValueError(f"Training and test cells need the same genes in the same order; {differ} genes are in one of the two only.")
    if shared := sorted(set(map(str, test.cells)) & set(map(str, train.cells))):
        raise ValueError(f"{some(shared, 'cell')} in both the test and the training screen: a cell is trained on or tested on, not both.")


def refuse_trained_cells(name: str, fit: Fit, test: Screen) -> None:
    """Refuse a fit that was trained on a test cell, or adapted to its batch by it."""
    _refuse_cells(name, set(fit.trained_on["cells"]).union(*fit.trained_on.get("adapted", {}).values()), test)


def _refuse_cells(name: str, known: set[str], test: Screen) -> None:
    """Refuse test cells that are among those trained on."""
    if seen := set(map(str, test.cells)) & known:
        raise ValueError(
            f"{name!r} was trained on {len(seen):,} of the {test.n_cells:,} test cells, such as {min(seen)!r}: give cells that no "
            "fit has seen, as split.hold_out_cells or split.hold_out_time makes them."
        )


def _refuse_trained_conditions(name: str, known: dict[str, list[str]], test: Screen, split: Split | None) -> None:
    """Refuse what was trained on a tested condition in the same batch; on a held-out one of a split, in any."""
    held = set(split.held_out if split else ())
    seen = [
        f"{p} in batch {batch!r}"
        for p, batch in pairs(test)
        if p.perturbations and (batch in known.get(str(p), {}) or (p in held and known.get(str(p))))
    ]
    if seen:
        how = "To score held-out cells of conditions that training showed, give the split that hid them." if split is None else ""
        what = "tested pair of condition and batch"
        raise ValueError(
            f"{name!r} was trained on {some(seen, what, 'tested pairs of condition and batch')}: other cells, but the same answer. "
            f"Fit the train part of a split. {how}".rstrip()
        )


def _check_control(means: Means) -> None:
    """Refuse a condition without control cells of its media and time."""
    if lacking := [p for p, n in zip(means.test.conditions, means.control_n, strict=True) if np.isnan(n)]:
        raise ValueError(
            f"{some(lacking, 'tested condition')} without any control cell in the same media at the same time, in the test screen or in "
            "training: changes cannot be told. Keep control cells there, or leave the condition out of the test."
        )


def _check_enough(means: Means) -> None:
    """Refuse a test of conditions that all have few cells."""
    if (means.n < FEW).all():
        raise ValueError(
            f"All {len(means.n)} tested conditions have fewer than {FEW} cells: their means are noise, and nothing can be said overall. "
            "Test on more cells."
        )
