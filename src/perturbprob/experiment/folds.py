"""Repeated splits, and what to work out of each."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from perturbprob.experiment.held_out import Split
from perturbprob.experiment.reading import some
from perturbprob.experiment.settings import check_seed, check_whole

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def folds(make: Callable[[list[Name]], Split], names: Sequence[Name], n_folds: int, *, seed: int | None = None) -> Iterator[Split]:
    """Yield ``n_folds`` splits that hold out each name once: perturbations, media, batches, or whatever ``make`` makes a split of.

    ``make`` takes the names of one fold. Names are dealt in order, number k to fold k modulo ``n_folds``; with a ``seed``, at random, in
    numbers that differ by one at most. Each split is made when it is asked for. Raises ValueError for fewer names than folds.

    >>> from perturbprob.experiment import datasets, split
    >>> screen = datasets.ishikawa2023()
    >>> for part in folds(lambda names: split.hold_out_time(screen, 5, names), screen.perturbations, 2):
    ...     part
    Split by time: 13,082 cells to train on, 1,863 to test on, 12 conditions held out
    Split by time: 12,805 cells to train on, 2,140 to test on, 11 conditions held out
    """
    if not callable(make):
        raise TypeError(f"make takes the names of one fold and returns a split, as in lambda names: ...; got {make!r}.")
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names is a list of what to hold out, such as screen.perturbations; got {names!r}.")
    check_whole(2, n_folds=n_folds)
    dealt = list(dict.fromkeys(names))
    if len(dealt) < n_folds:
        raise ValueError(f"{n_folds} folds hold out a name each, at least; got {some(dealt, 'name')}. Ask for fewer folds.")
    fold = np.arange(len(dealt)) % n_folds
    if seed is not None:
        check_seed(seed)
        fold = np.random.default_rng(seed).permutation(fold)
    return (_made(make, [name for name, k in zip(dealt, fold, strict=True) if k == q]) for q in range(n_folds))


def _made(make: Callable[[list[Name]], Split], names: list[Name]) -> Split:
    """Return the split of one fold; refuse anything else."""
    split = make(names)
    if not isinstance(split, Split):
        raise TypeError(f"make must return a Split, as split.hold_out_time and its like do; of {some(names, 'name')} it made {split!r}.")
    return split


def map_splits(function: Callable[[Split], Result], splits: Iterable[Split]) -> list[Result]:
    """Return what a function works out of each split, in their order; `joblib.parallel_config` says where, and how many at once.

    Without it they run one after the other. To run two at once: ``with joblib.parallel_config(n_jobs=2): map_splits(score, splits)``.

    >>> from perturbprob.experiment import datasets, split
    >>> screen = datasets.ishikawa2023()
    >>> map_splits(lambda part: part.test.n_cells, folds(lambda names: split.hold_out_time(screen, 5, names), ["NANOG", "SOX2"], 2))
    [284, 95]
    """
    from joblib import Parallel, delayed

    if not callable(function):
        raise TypeError(f"map_splits takes a function of a split first, then the splits; got {type(function).__name__} for a function.")
    if isinstance(splits, Split) or not isinstance(splits, Iterable):
        raise TypeError(f"map_splits takes several splits, such as those of folds, or a list of one; got {type(splits).__name__}.")
    results: list[Result] = Parallel()(delayed(function)(split) for split in splits)
    if not results:
        raise ValueError("No split to work on. What folds returns can be gone through once: call it again, or keep list(folds(...)).")
    return results
