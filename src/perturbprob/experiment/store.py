"""Counts that stay on disk, in h5ad or zarr: rows are read when they are asked for."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, issparse, vstack

from perturbprob.experiment.raw_counts import canonical, check_counts, refuse_empty
from perturbprob.experiment.spans import Spans, reader
from perturbprob.experiment.vocabulary import nearest

ROWS = 8192
"""So many cells are read at a time where all are needed."""
GAP = 32
"""Rows no further apart are read in one go, with those between."""


class StoreError(OSError):
    """A file of counts cannot be read, or changed while it was in use; the message says which."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class StoredCounts:
    """Raw counts (cell, gene) of an h5ad file or a zarr store that are not in memory; made by `Screen.from_store`.

    ``counts[cells]`` reads rows as csr_array, float32 and canonical; `take` names rows and reads nothing; `blocks` goes through all of
    them. Sums, and products with a matrix from the left, go block by block. For everything else there is `in_memory`. Each process opens
    the file by itself. ``key`` is the place in the store, "X" or "layers/counts"; ``rows`` are the rows of the store that are meant.
    """

    path: Path
    key: str
    shape: tuple[int, int]
    rows: Int64[np.ndarray, " cell"]
    stamp: tuple[int, ...] = field(default=())

    ndim = 2
    dtype = np.dtype(np.float32)
    __array_ufunc__ = None  # numpy then leaves products from the left to `__rmatmul__`

    @classmethod
    def of(cls, path: str | Path, layer: str | None = None) -> Self:
        """Find the counts in a store; read none of them."""
        key = "X" if layer is None else f"layers/{layer}"
        group = open_store(path)
        if key not in group:
            where = f"layer={layer!r} is not a layer of {path}. {nearest(str(layer), list(group.get('layers', ())))}"
            raise ValueError(where if layer is not None else f"{path} has no X. Pass layer= with the layer that holds raw counts.")
        matrix = _rows_of(group, key, path)
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        return cls(Path(path), key, shape, np.arange(shape[0]), _stamp(Path(path), key))

    def __repr__(self) -> str:
        """Say where the counts are."""
        return f"StoredCounts({self.shape[0]:,} cells × {self.shape[1]:,} genes, {self.key} of {self.path.name})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind."""
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __getattr__(self, name: str) -> Any:
        """Say what to do about what only a matrix in memory can do."""
        if name.startswith("_") or not (hasattr(csr_array, name) or name in ("data", "indices", "indptr")):
            raise AttributeError(name)
        raise AttributeError(
            f"These counts stay on disk and have no {name!r}: take screen.in_memory(), or a part, screen[cells].in_memory()."
        )

    @property
    def _reader(self) -> Callable[[Spans], csr_array]:
        """What reads rows of the open store; a process that was split off opens it anew."""
        process, opened = self.__dict__.get("_opened", (None, None))
        if process != os.getpid() or opened is None:
            self._check()
            opened = reader(_rows_of(open_store(self.path), self.key, self.path), self.key)
            self.__dict__["_opened"] = os.getpid(), opened
        return opened

    def _check(self) -> None:
        """Refuse a store that is not what it was."""
        if not self.path.exists():
            raise StoreError(f"{self.path} is gone: it is needed as long as its counts are.")
        if _stamp(self.path, self.key) != self.stamp:
            raise StoreError(f"{self.path} changed while it was in use. Read the screen again, and leave the file alone while it is read.")

    def take(self, index: Int64[np.ndarray, " row"]) -> Self:
        """Return some of these rows, still on disk."""
        rows = self.rows[index]
        return replace(self, rows=rows, shape=(len(rows), self.shape[1]))

    def __getitem__(self, index: slice | ArrayLike) -> csr_array:
        """Read some rows, in any order."""
        return canonical(self.stored(index))

    def stored(self, index: slice | ArrayLike) -> csr_array:
        """Read some rows, in any order, in the type that they are stored in."""
        rows, place = np.unique(self.rows[index if isinstance(index, slice) else np.asarray(index)], return_inverse=True)
        if not len(rows):
            return csr_array((0, self.shape[1]), dtype=np.float32)
        self._check()
        spans = np.split(rows, np.flatnonzero(np.diff(rows) > GAP) + 1)
        try:
            read = self._reader(spans)
        except StoreError:
            raise
        except Exception as error:  # what h5py, zarr and their codecs raise has nothing else in common
            where = f"{'at' if len(spans) == 1 else 'somewhere in'} rows {rows[0]} to {rows[-1]} of {self.key}"
            raise StoreError(f"{self.path} cannot be read {where}: {_first_line(error)}. Copy or write it again.") from error
        return read if np.array_equal(place, np.arange(len(rows))) else read[place]

    def blocks(self) -> Iterator[tuple[slice, csr_array]]:
        """Go through all rows, block by block."""
        return ((block, self[block]) for block in self.cut())

    def cut(self) -> Iterator[slice]:
        """Name the rows of each block."""
        return (slice(first, min(first + ROWS, self.shape[0])) for first in range(0, self.shape[0], ROWS))

    def sum(self, axis: int | None = None, dtype: Any = np.float64) -> Any:
        """Return the sum of all counts, of each gene (axis 0) or of each cell (axis 1)."""
        parts = [block.sum(axis=axis, dtype=dtype) for _, block in self.blocks()]
        return np.concatenate(parts) if axis == 1 else np.sum(parts, axis=0)

    def __rmatmul__(self, left: Any) -> Any:
        """Return the product of a matrix (any, cell), or a vector, with the counts."""
        columns = left.tocsc() if issparse(left) else left
        total = None
        for block, counts in self.blocks():
            part = columns[..., block] @ counts if columns.ndim == 1 else columns[:, block] @ counts
            total = part if total is None else total + part
        return total

    def in_memory(self) -> csr_array:
        """Read all rows."""
        return csr_array(vstack([block for _, block in self.blocks()], format="csr"))


def blocks(counts: csr_array | StoredCounts) -> Iterator[tuple[slice, csr_array]]:
    """Go through counts block by block, or in one go where they are in memory."""
    return counts.blocks() if isinstance(counts, StoredCounts) else iter([(slice(0, counts.shape[0]), counts)])


def open_store(path: str | Path) -> Any:
    """Open an h5ad file or a zarr store for reading."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"from_store reads the path of an h5ad file or a zarr store; got {type(path).__name__}. Data: from_anndata.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.is_dir():
            import zarr

            return zarr.open_group(str(path), mode="r")
        import h5py

        return h5py.File(path, "r")
    except ImportError as error:
        raise ImportError(f"{path} is a zarr store: pip install 'perturbprob[stores]'.") from error
    except Exception as error:
        raise StoreError(f"{path} cannot be opened as an h5ad file or a zarr store (truncated?): {_first_line(error)}") from error


def read_names(path: str | Path) -> AnnData:
    """Read what a store says of its cells and genes, without any counts."""
    group = open_store(path)
    try:
        obs, var = (read_elem(group[name]) for name in ("obs", "var"))
    except Exception as error:
        raise StoreError(f"{path} has no obs and var that can be read: {_first_line(error)}. Write it with adata.write_h5ad.") from error
    return AnnData(obs=pd.DataFrame(obs), var=pd.DataFrame(var))


def checked_totals(counts: StoredCounts, adata: AnnData, *, may_be_empty: bool) -> Float64[np.ndarray, " cell"]:
    """Return the depth of each cell, having read every count once; refuse what `read_counts` refuses."""
    if adata.shape != counts.shape:
        raise StoreError(f"{counts.path} names {adata.n_obs:,} cells and {adata.n_vars:,} genes, and {counts.key} is {counts.shape}.")
    total, name = np.zeros(counts.shape[0]), "adata.X" if counts.key == "X" else f"adata.layers[{counts.key.partition('/')[2]!r}]"
    try:
        for block in counts.cut():
            read = counts.stored(block)
            check_counts(adata[block], read, name, "gene")
            total[block] = np.asarray(read.sum(axis=1, dtype=np.float64)).ravel()
        if not may_be_empty:
            refuse_empty(adata, total == 0, name)
    except ValueError as error:  # in words about the AnnData that the file holds
        raise ValueError(f"{error} ({_where_adata_is(counts.path)})") from None
    return total


def _where_adata_is(path: Path) -> str:
    """Say how a store becomes adata, which layers it has, and where what was mended may go."""
    layers = ", ".join(map(repr, open_store(path).get("layers", ()))) or "none"
    how = "read_zarr" if path.is_dir() else "read_h5ad"
    return f"adata is anndata.{how}({str(path)!r}); layers there: {layers}. Write what you mend to a file of another name."


def _rows_of(group: Any, key: str, path: str | Path) -> Any:
    """Return a matrix that can be cut into rows; refuse one that is stored by columns, or of which parts are gone."""
    try:
        return _cut_by_rows(group, key, path)
    except Exception as error:
        if type(error) in (ValueError, StoreError):  # said here, or what is no less clear
            raise
        raise StoreError(f"{key} of {path} cannot be opened: {_first_line(error)}. Copy or write it again.") from error


def _cut_by_rows(group: Any, key: str, path: str | Path) -> Any:
    """Return the matrix."""
    matrix = group[key]
    form = str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "")))
    form = {"csr": "csr_matrix", "csc": "csc_matrix"}.get(form, form)  # as it was written before 2020
    if form == "csc_matrix":
        raise ValueError(f"{key} of {path} is stored by columns (CSC), and rows are needed: write it as adata.X.tocsr().")
    if form == "csr_matrix":
        _refuse_gaps(matrix, key, path)
        start, n_values = matrix["indptr"][:], matrix["data"].shape[0]
        if not len(start) or start[0] != 0 or start[-1] != n_values or (start[1:] < start[:-1]).any():
            raise StoreError(f"{key}/indptr of {path} is damaged: it does not rise from 0 to {n_values:,}. Copy or write it again.")
        matrix = sparse_dataset(matrix)
    if len(getattr(matrix, "shape", ())) != 2:
        raise StoreError(f"{key} of {path} is no matrix of cells and genes that anndata writes today. Write it again: adata.write_h5ad.")
    return matrix


def _refuse_gaps(group: Any, key: str, path: str | Path) -> None:
    """Refuse a zarr store that lost chunks: zarr reads them as 0."""
    for name in ("data", "indices", "indptr"):
        lost = getattr(group[name], "nchunks", 0) - getattr(group[name], "nchunks_initialized", 0)
        if lost > 0 and not (name == "indices" and group.attrs["shape"][1] == 1):
            raise StoreError(f"{path} lacks {lost} of the {group[name].nchunks} chunks of {key}/{name}. Copy or write it again.")


def _stamp(path: Path, key: str) -> tuple[int, ...]:
    """Return bytes and times of a file; of a folder, those of what holds its chunks and says its shapes, not of every chunk."""
    matrix = path / key
    arrays = (matrix, *(matrix / name for name in ("data", "indices", "indptr")))
    inside = (place / name for place in arrays for name in ("", ".zarray", ".zattrs", "zarr.json", "c"))
    rows = (place for place in sorted((matrix / "c").glob("*")) if place.is_dir()) if matrix.is_dir() else ()
    told = [path] if path.is_file() else [file for file in (*inside, *rows) if file.exists()]
    return tuple(number for file in told for number in (file.stat().st_size, file.stat().st_mtime_ns))


def _first_line(error: Exception) -> str:
    """Return what an error of another library says first."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
