"""Arrayed screens (appendix C.2): each well is a batch, with a place on its plate."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import pandas as pd
from jaxtyping import Int64
from numpy.typing import ArrayLike

from perturbprob.experiment.reading import some
from perturbprob.experiment.vocabulary import nearest

PLATES = {6: (2, 3), 12: (3, 4), 24: (4, 6), 48: (6, 8), 96: (8, 12), 384: (16, 24), 1536: (32, 48)}
_LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"A{letter}" for letter in "ABCDEF")]
_WELL = re.compile(r"(?:(?P<plate>.+)[/_:. -])?(?P<row>[A-Za-z]{1,2})(?P<column>[0-9]{1,2})")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Plate:
    """Where the wells of an arrayed screen lie on their plates. Made by `read_wells`.

    - ``wells``: the names of the wells, each once, sorted as `Screen.batches` sorts them; ``well``: each cell's index into them.
    - ``place``: a table with a row for each well: ``plate`` (the text before the well's name, or ""), ``row`` and ``column`` (from 0),
      ``edge`` (whether it lies on the rim), ``distance`` (wells between it and the nearest edge, 0 on the rim) and ``radius``
      (distance from the centre relative to that of a corner, each direction relative to its half width: 0 in the centre, 1 in a corner).
    - ``shape``: the numbers of rows and columns of a plate.

    >>> plate = read_wells(["A1", "B2", "B2", "H12"], plate=96)
    >>> plate.wells, plate.well
    (('A1', 'B2', 'H12'), array([0, 1, 1, 2]))
    >>> plate.place["distance"].tolist(), plate.place["edge"].tolist()
    ([0, 1, 0], [True, False, True])
    """

    wells: tuple[str, ...]
    well: Int64[np.ndarray, " cell"]
    place: pd.DataFrame
    shape: tuple[int, int]

    def covariates(self, edge: str | None = "radial", *, neighbours: bool = False, batches: Sequence[str] | None = None) -> pd.DataFrame:
        """Return what the batch effects of wells may depend on, a row for each: ``node(screen, batch_effect=plate.covariates())``.

        - ``edge``: "radial", a smooth term ``radius_squared``, the square of ``radius``; "indicator", ``edge``, 1 on the rim and 0 inside;
          or None, no such term.
        - ``neighbours``: adds ``neighbours``, how many of the four wells beside it are among the plate's ``wells``.
        - ``batches``: the names of the rows, such as ``screen.batches``, each a well; by default ``wells``.

        Raises ValueError for another word, for no term at all, and for a batch that is no well of this plate map.

        >>> read_wells(["A1", "A2", "D6"], plate=96).covariates("indicator", neighbours=True).to_dict("list")
        {'edge': [1.0, 1.0, 0.0], 'neighbours': [1.0, 1.0, 0.0]}
        """
        terms = {"radial": ("radius_squared", self.place["radius"] ** 2), "indicator": ("edge", self.place["edge"])}
        if edge not in (None, *terms):
            raise ValueError(f"Unknown edge={edge!r}. Use 'radial', 'indicator' or None.")
        if edge is None and not neighbours:
            raise ValueError("edge=None without neighbours leaves no covariate. Leave batch_effect= out instead.")
        table = pd.DataFrame(index=self.place.index) if edge is None else pd.DataFrame(dict([terms[edge]]))
        if neighbours:
            table["neighbours"] = np.bincount(self.neighbours.ravel(), minlength=len(self.wells))
        names = list(self.wells if batches is None else batches)
        if unknown := [name for name in names if name not in table.index]:
            raise ValueError(f"{some(unknown, 'batch', 'batches')} without a well in this plate map. {nearest(unknown[0], self.wells)}")
        return table.loc[names].astype(float)

    @cached_property
    def neighbours(self) -> Int64[np.ndarray, "pair 2"]:
        """The pairs of wells, as indices into ``wells``, that share a side on one plate; each pair once.

        >>> read_wells(["A1", "A2", "B2", "C3"], plate=96).neighbours.tolist()
        [[0, 1], [1, 2]]
        """
        plate, _ = pd.factorize(self.place["plate"])
        row, column = self.place["row"].to_numpy(), self.place["column"].to_numpy()
        wells = pd.MultiIndex.from_arrays([plate, row, column])
        beside = [wells.get_indexer(pd.MultiIndex.from_arrays([plate, row + down, column + right])) for down, right in ((0, 1), (1, 0))]
        pairs = np.concatenate([np.stack([np.arange(len(other)), other], 1)[other >= 0] for other in beside])
        return np.unique(np.sort(pairs, axis=1), axis=0).astype(np.int64)


def read_wells(wells: ArrayLike | Sequence[str], *, plate: int = 96) -> Plate:
    """Read where each cell's well lies, from names such as A1 or A01, on a plate of 96 wells (or 6, 12, 24, 48, 384, 1536).

    ``wells``: one name for each cell, as in ``adata.obs["well"]``, or ``screen.batches`` where wells are batches
    (``Screen.from_anndata(adata, batch="well")``). On several plates the plate's name comes first: ``plate1_A01``, ``lab2/plate1/A01``.

    Raises ValueError for a name that is no well of such a plate, one well written in two ways, and a size of plate that does not exist.

    >>> read_wells(["p1_A1", "p2_P24"], plate=384).place["plate"].tolist()
    ['p1', 'p2']
    """
    if plate not in PLATES:
        raise ValueError(f"plate={plate!r} is no usual size of a plate. Known: {', '.join(map(str, PLATES))}.")
    codes, found = pd.factorize(np.char.strip(np.asarray(wells).astype(str)), sort=True)
    names = list(map(str, found))
    if not names:
        raise ValueError("There is no well to read: the column is empty.")
    places = [_read(name) for name in names]
    if wrong := [name for name, place in zip(names, places, strict=True) if not _fits(place, plate)]:
        raise ValueError(_not_on_plate(wrong, [_read(name) for name in wrong], plate))
    place = pd.DataFrame(places, columns=["plate", "row", "column"], index=pd.Index(names, name="well"))
    if (twice := place.duplicated(keep=False)).any():
        raise ValueError(f"{some(place.index[twice], 'name')} that mean the same wells: write each well in one way, such as A01.")
    rows, columns = PLATES[plate]
    row, column = place["row"].to_numpy(), place["column"].to_numpy()
    place["distance"] = np.minimum.reduce([row, column, rows - 1 - row, columns - 1 - column])
    place["edge"] = place["distance"] == 0
    place["radius"] = np.hypot(2 * row / (rows - 1) - 1, 2 * column / (columns - 1) - 1) / np.sqrt(2)
    return Plate(wells=tuple(names), well=codes.astype(np.int64), place=place, shape=(rows, columns))


def _read(name: str) -> tuple[str, int, int] | None:
    """Return plate, row and column of a well's name, or None."""
    found = _WELL.fullmatch(name)
    if found is None or found["row"].upper() not in _LETTERS:
        return None
    return found["plate"] or "", _LETTERS.index(found["row"].upper()), int(found["column"]) - 1


def _fits(place: tuple[str, int, int] | None, plate: int) -> bool:
    """Tell whether a place exists on a plate of this size."""
    return place is not None and place[1] < PLATES[plate][0] and 0 <= place[2] < PLATES[plate][1]


def _not_on_plate(wrong: Sequence[str], places: Iterable[tuple[str, int, int] | None], plate: int) -> str:
    """Say which wells do not exist, and the nearest that do, or the plate that has them all."""
    rows, columns = PLATES[plate]
    found = f"{some(wrong, 'well')} not on a plate of {plate} wells (A1 to {_LETTERS[rows - 1]}{columns})."
    read = list(places)
    if larger := [size for size in PLATES if size > plate and all(_fits(place, size) for place in read)]:
        found += f" A plate of {larger[0]} wells has {'it' if len(wrong) == 1 else 'them'}: pass plate={larger[0]} if it is one."
    return f"{found} {nearest(wrong[0], [f'{_LETTERS[r]}{c + 1}' for r in range(rows) for c in range(columns)])}"
