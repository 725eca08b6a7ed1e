"""Parts of a screen to train on and to test on: what to hold out, by time, perturbation, media, combination, batch or cell."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real

import numpy as np
from jaxtyping import Bool

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.folds import folds, map_splits
from perturbprob.experiment.held_out import Split, grouped, pairs
from perturbprob.experiment.reading import perturbation_of, some
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_seed, is_within
from perturbprob.experiment.vocabulary import nearest

__all__ = [
    "Split",
    "folds",
    "hold_out_batches",
    "hold_out_cells",
    "hold_out_combinations",
    "hold_out_media",
    "hold_out_perturbations",
    "hold_out_time",
    "map_splits",
]


def hold_out_time(screen: Screen, time: float, perturbations: str | Sequence[str] | None = None) -> Split:
    """Hide one time of some perturbations (names, several genes joined with ``+``; None: of all), in every media.

    Control stays, and so do the other times of these perturbations: the question is whether a model sees where a cell goes, from where
    it was. The proof says whether that time lies between those that stay (interpolated) or not (extrapolated). ``time`` is in the unit
    of the screen. Raises ValueError for a time or perturbation that the screen does not have, and for a perturbation without that time,
    or without another time to learn it from.

    >>> from perturbprob.experiment import datasets
    >>> split = hold_out_time(datasets.ishikawa2023(), 5)
    >>> len(split.held_out), split.train.times
    (23, (2.0, 3.0, 4.0, 5.0))
    """
    require_screen(screen, partial=True)
    if isinstance(time, bool) or not isinstance(time, Real):
        raise TypeError(f"time is a number in the unit of the screen; got {time!r}.")
    if time not in screen.times:
        raise ValueError(f"No cell of this screen has the time {time:g}. {_nearest_time(screen, time)}")
    fix = "Leave {it} out of perturbations=, which names those whose time is hidden."
    at = _at_levels(screen, perturbations, (float(time),), lambda p: p.time, "at time", fix)
    return _hide(screen, at, "time")


def hold_out_media(screen: Screen, media: str | Sequence[str], perturbations: str | Sequence[str] | None = None) -> Split:
    """Hide some perturbations (None: all that are seen there) in some media, at every time: unseen (p, m).

    Control in these media stays, and so do the same perturbations in other media. Raises ValueError for media or a perturbation that the
    screen does not have, and for a perturbation that is not seen in these media, or in no other.

    >>> from perturbprob.experiment.simulate import simulate
    >>> screen = simulate(n_cells=240, n_genes=8, n_perturbations=3, media=("rest", "BMP4"), seed=1).screen
    >>> for sentence in hold_out_media(screen, "BMP4", ["G4", "G7"]).proof().splitlines()[-3:]:
    ...     print(sentence)
    Of 2 held-out pairs of perturbation and media, 0 have a cell to train on at any time.
    Training shows G4, G7 in rest.
    Control in BMP4 has 30 cells to train on.
    """
    require_screen(screen, partial=True)
    if len(screen.media) == 1:
        raise ValueError(f"This screen has one media, {screen.media[0]}: without it nothing is left of a perturbation to train on.")
    hidden = _known(_listed(media, "media", "media"), screen.media, "media")
    fix = "Leave {it} out of perturbations=, which names those that are hidden in these media."
    at = _at_levels(screen, perturbations, hidden, lambda p: p.media or screen.baseline or "baseline", "in media", fix)
    return _hide(screen, at, "media")


def hold_out_perturbations(screen: Screen, perturbations: str | Sequence[str]) -> Split:
    """Hide some perturbations (names, several genes joined with ``+``) in every media at every time: unseen p.

    Control and all other perturbations stay. A gene of a hidden perturbation may be perturbed in one that stays, as ``A`` is in ``A+B``:
    the proof names those. Raises ValueError for a perturbation that the screen does not have, for control, and if none is left to train on.

    >>> from perturbprob.experiment import datasets
    >>> hold_out_perturbations(datasets.ishikawa2023(), ["NANOG", "SOX2"])
    Split by perturbations: 13,792 cells to train on, 1,153 to test on, 8 conditions held out
    """
    require_screen(screen, partial=True)
    names = _named(screen, perturbations)
    return _hide(screen, (p for p in screen.conditions if p.perturbation in names), "perturbations")


def hold_out_combinations(screen: Screen, combinations: str | Sequence[str] | None = None, *, require_parts: bool = True) -> Split:
    """Hide some combinations (names, genes joined with ``+`` in any order; None: all) in every media at every time.

    A combination is a perturbation of two genes or more. Control, single genes and all other combinations stay. The proof says how many
    of the genes of each training shows alone; with ``require_parts`` it must show all. Raises ValueError for a combination that the
    screen does not have, for a single gene, and for a combination with genes that are not seen alone.

    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((4, 2)), obs={"gene": ["NT", "KLF1", "CEBPA", "CEBPA+KLF1"]})
    >>> adata.var_names = ["KLF1", "CEBPA"]
    >>> screen = Screen.from_anndata(adata, perturbation="gene", perturbation_type="CRISPRa")
    >>> hold_out_combinations(screen).proof().splitlines()[-1]
    'Seen alone in training: 2 of 2 genes of CEBPA+KLF1.'
    """
    require_screen(screen, partial=True)
    known = {p.perturbation for p in screen.conditions if len(p.perturbations) > 1}
    if not known:
        raise ValueError("No perturbation of this screen is a combination, of two genes or more, so there is none to hold out.")
    names = known if combinations is None else _named(screen, combinations, "combination")
    if single := [name for name in names if name not in known]:
        raise ValueError(
            f"{some(single, 'perturbation')} of a single gene among the combinations. Hold it out with hold_out_perturbations, "
            f"or name genes joined with '+'. {nearest(single[0], known)}"
        )
    held = [p for p in screen.conditions if p.perturbation in names]
    if require_parts:
        _check_parts(screen, held)
    return _hide(screen, held, "combinations")


def hold_out_batches(screen: Screen, batches: str | Sequence[str], *, keep_control: bool = True) -> Split:
    """Hide all perturbed cells of some batches: unseen (p, batch).

    Their control cells stay in training, so that the effect of each batch can be learnt; with ``keep_control=False`` they are tested too.
    Conditions stay visible in other batches, and those that are in no other are the split's ``held_out``. Raises ValueError for a batch
    that the screen does not have, one without perturbed cells, and perturbations (or control, unless kept) that are in no other batch.

    >>> from perturbprob.experiment.simulate import simulate
    >>> screen = simulate(n_cells=240, n_genes=8, n_perturbations=3, seed=1).screen
    >>> hold_out_batches(screen, "batch2")
    Split by batches: 180 cells to train on, 60 to test on, 1 batch held out
    """
    require_screen(screen, partial=True)
    if len(screen.batches) == 1:
        raise ValueError(f"This screen has one batch, {screen.batches[0]}: without it nothing is left to train on.")
    hidden = _known(_listed(batches, "batch", "batches"), screen.batches, "batch")
    _check_batches(screen, hidden, keep_control=keep_control)
    perturbed = np.array([bool(p.perturbations) for p in screen.conditions])[screen.condition]
    cells = np.array([batch in hidden for batch in screen.batches])[screen.batch] & (perturbed | (not keep_control))
    shown = set(screen.condition[~cells].tolist())
    return _cut(screen, cells, (p for c, p in enumerate(screen.conditions) if c not in shown), "batches", hidden)


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


def _cut(screen: Screen, hidden: Bool[np.ndarray, " cell"], held_out: Iterable[Protocol], kind: str, batches: Iterable[str] = ()) -> Split:
    """Return the two parts of a screen, neither of them empty."""
    if not hidden.any():
        raise ValueError(f"None of the {screen.n_cells:,} cells is held out, so the split tests nothing. Hold out more.")
    if hidden.all():
        raise ValueError(f"All {screen.n_cells:,} cells are held out, so nothing is left to train on. Hold out fewer.")
    return Split(screen[~hidden], screen[hidden], tuple(held_out), kind, tuple(batches))


def _hide(screen: Screen, conditions: Iterable[Protocol], kind: str) -> Split:
    """Hide all cells of some conditions; refuse to leave no perturbation to train on."""
    held = dict.fromkeys(conditions)
    if not any(p.perturbations for p in screen.conditions if p not in held):
        raise ValueError(
            f"Every perturbation of this screen ({len(screen.perturbations)}) is held out, so training shows nothing of what one does. "
            "Hold out fewer."
        )
    return _cut(screen, np.array([p in held for p in screen.conditions])[screen.condition], held, kind)


def _at_levels(
    screen: Screen,
    perturbations: str | Sequence[str] | None,
    hidden: tuple[float, ...] | tuple[str, ...],
    level: Callable[[Protocol], float | str],
    where: str,
    fix: str,
) -> tuple[Protocol, ...]:
    """Return the conditions of some perturbations at some levels of a factor; refuse those that are not seen there, or nowhere else."""
    names = _named(screen, screen.perturbations if perturbations is None else perturbations)
    seen = grouped((p.perturbation, level(p)) for p in screen.conditions)
    here = [name for name in sorted(names) if not set(hidden).isdisjoint(seen[name])]
    if perturbations is not None and (missing := sorted(names.difference(here))):
        elsewhere = f"It was seen {where.split()[0]} {_shown(seen[missing[0]])}."
        raise ValueError(f"{missing[0]} has no cell {where} {_shown(hidden)}, so hiding it tests nothing. {elsewhere}")
    if not here:
        raise ValueError(f"No perturbation has a cell {where} {_shown(hidden)}, so hiding that tests nothing.")
    _check_left({name: seen[name] for name in here}, hidden, where, fix)
    return tuple(p for p in screen.conditions if p.perturbation in names and level(p) in hidden)


def _check_left(seen: Mapping[str, Collection[float | str]], hidden: Collection[float | str], where: str, fix: str) -> None:
    """Refuse perturbations that are seen at hidden levels only."""
    if lost := [name for name, levels in seen.items() if set(levels) <= set(hidden)]:
        who, was, it = (lost[0], "was", "it") if len(lost) == 1 else (some(lost, "perturbation"), "were", "them")
        levels = _shown(seen[lost[0]] if len(lost) == 1 else hidden)
        raise ValueError(f"{who} {was} seen {where} {levels} only, so hiding that leaves nothing of {it} to train on. {fix.format(it=it)}")


def _check_batches(screen: Screen, hidden: tuple[str, ...], *, keep_control: bool) -> None:
    """Refuse batches without a perturbed cell, and what no other batch shows."""
    if len(hidden) == len(screen.batches):
        raise ValueError(f"All {len(hidden)} batches are held out, so nothing is left to train on. Hold out fewer.")
    seen = grouped((p.perturbation, batch) for p, batch in pairs(screen))
    control = seen.pop("control", [])
    if empty := [batch for batch in hidden if not any(batch in levels for levels in seen.values())]:
        raise ValueError(f"No perturbation has a cell in batch {empty[0]}, so holding it out tests nothing. Leave it out of batches=.")
    if not keep_control and control and set(control) <= set(hidden):
        raise ValueError(f"Control was seen in batch {_shown(control)} only. Keep it to train on: keep_control=True.")
    fix = "Hold out other batches, or go on with a screen without {it}: hold_out_perturbations(screen, [...]).train."
    _check_left(seen, hidden, "in batch", fix)


def _check_parts(screen: Screen, held: Iterable[Protocol]) -> None:
    """Refuse combinations with genes that the screen never shows alone."""
    alone = {p.perturbations for p in screen.conditions if len(p.perturbations) == 1}
    unseen = {p.perturbation: [a for a in p.perturbations if (a,) not in alone] for p in held}
    if lost := [name for name, actions in unseen.items() if actions]:
        raise ValueError(
            f"{some(lost, 'combination')} of genes that no cell shows alone, such as {unseen[lost[0]][0]!r}. Leave out of combinations= "
            "what cannot be put together from its parts, or test on it all the same: require_parts=False."
        )


def _named(screen: Screen, perturbations: str | Sequence[str], one: str = "perturbation") -> frozenset[str]:
    """Return perturbations as the screen writes them; refuse control and names that it does not have."""
    names = {name: perturbation_of(name, screen.perturbations, screen.control) for name in _listed(perturbations, one, f"{one}s")}
    for name, meant in names.items():
        if meant == "control":
            raise ValueError(f"{name!r} cannot be held out: control stays in training, as what perturbations are compared with.")
    return frozenset(_known(names.values(), screen.perturbations, one))


def _listed(names: str | Sequence[str], one: str, many: str) -> tuple[str, ...]:
    """Return one name or several as a tuple, each once; refuse what is no name, and none."""
    listed = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{many} are given as a name or a list of names, in quotes; got {names!r}.")
    if not listed:
        raise ValueError(f"No {one} to hide: the split would test nothing. Name {many} that the screen shows.")
    return tuple(dict.fromkeys(listed))


def _known(names: Iterable[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """Return names; refuse one that the screen does not have."""
    found, names = set(known), tuple(names)
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"No cell of this screen has the {what} {unknown[0]!r}. {nearest(unknown[0], known)}")
    return names


def _shown(levels: Iterable[float | str]) -> str:
    """Write times, media or batches in a row, in order."""
    return ", ".join(level if isinstance(level, str) else f"{level:g}" for level in sorted(levels))


def _nearest_time(screen: Screen, time: float) -> str:
    """Say which times the screen has, nearest first where there are many."""
    near = sorted(sorted(screen.times, key=lambda known: abs(known - time))[:8])
    more = f" and {len(screen.times) - len(near)} more" if len(screen.times) > len(near) else ""
    return f"Known: {', '.join(f'{t:g}' for t in near)}{more} {screen.time_unit or '(no unit)'}."
