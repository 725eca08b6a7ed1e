"""The border: a matrix as users have it -> raw counts, checked, or an error that shows the values and the line that fixes them."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from anndata import AnnData
from scipy.sparse import csr_array, issparse

from perturbprob.experiment.reading import some
from perturbprob.experiment.vocabulary import nearest

Matrix: TypeAlias = Any  # numpy, scipy.sparse, and what anndata has for backed and lazy files
_LARGEST = 2**24  # beyond, float32 skips integers


def read_counts(
    adata: AnnData, layer: str | None, present: np.ndarray | None = None, *, name: str = "", what: str = "gene", may_be_empty: bool = False
) -> csr_array:
    """Return the raw counts (cell, gene) of X or a layer as a new float32 matrix in canonical CSR form.

    Sparse, dense and backed matrices of any integer or float type are read. Raises ValueError for values that are not
    counts (NaN, infinite, negative, non-integer, above 2²⁴) and for cells without any count, but for those that are not ``present`` and
    where cells ``may_be_empty``, their depth being known from elsewhere.
    Errors call the matrix ``name`` and a column ``what``.
    """
    name = name or ("adata.X" if layer is None else f"adata.layers[{layer!r}]")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"layer={layer!r} is not a layer of adata. {nearest(layer, layer_names(adata))}")
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        raise ValueError(f"adata.X is empty. Pass layer= with the layer that holds raw counts. {nearest('counts', layer_names(adata))}")
    matrix = as_csr(values, name)
    check_counts(adata, matrix, name, what)
    counts = canonical(matrix)
    empty = (np.diff(counts.indptr) == 0) & (True if present is None else present)
    if not may_be_empty:
        refuse_empty(adata, empty, name)
    elif len(empty) and empty.all():
        raise ValueError(f"{name} holds no count at all. Name the layer that holds raw counts. {nearest('counts', layer_names(adata))}")
    return counts


def refuse_empty(adata: AnnData, empty: np.ndarray, name: str) -> None:
    """Refuse cells without counts."""
    if empty.any():
        keep = f"adata = adata[np.asarray({name}.sum(axis=1)).ravel() > 0]"
        raise ValueError(
            "Cells without counts stay where their depth is known from elsewhere, as for a panel of few genes, and passed as size_factor=. "
            f"{some(adata.obs_names[empty], 'cell')} without any count in {name}: remove them: {keep}."
        )


def layer_names(adata: AnnData) -> list[str]:
    """Return the names of the layers; from anndata 0.13 X is among these, as None."""
    return [name for name in adata.layers if name is not None]


def as_csr(values: Matrix, name: str) -> csr_array:
    """Read a matrix of numbers into memory as CSR without duplicate entries; nothing of the given matrix is changed."""
    for method in ("to_memory", "compute"):
        if hasattr(values, method):
            values = getattr(values, method)()
    if not issparse(values):
        values = np.asarray(values[...])
    if values.dtype.kind not in "buif":
        raise ValueError(f"{name} holds values of type {values.dtype}, not counts. If they are numbers: {name} = {name}.astype('float32').")
    if values.dtype == np.float16:  # scipy.sparse has no such type
        values = values.astype(np.float32)
    if issparse(values) and values.format not in ("csr", "csc"):
        values = values.astype(np.float64)  # tocsr adds duplicate entries up, in a small type they would overflow
    elif issparse(values):
        values = type(values)((values.data, values.indices, values.indptr), shape=values.shape)
        try:
            values.check_format(full_check=True)  # scipy itself reads wherever indices point
        except ValueError as error:
            raise ValueError(f"{name} is damaged: of its sparse form, {error}. Read or make it again.") from error
    matrix = csr_array(values)
    if not matrix.has_canonical_format:
        matrix = matrix.astype(np.float64)
        matrix.sum_duplicates()
    return matrix


def canonical(matrix: csr_array) -> csr_array:
    """Return a copy in single precision, in canonical form and without zeros: what becomes of the user's matrix later is no matter."""
    if not matrix.has_canonical_format:
        matrix = matrix.astype(np.float64)
        matrix.sum_duplicates()
    counts = matrix.astype(np.float32)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def check_counts(adata: AnnData, matrix: csr_array, name: str, what: str) -> None:
    """Refuse values that are not raw counts."""
    data = matrix.data
    if data.dtype.kind == "f":
        for wrong, found in ((np.isnan(data), "NaN"), (np.isinf(data), "infinite")):
            if wrong.any():
                place = _where(adata, matrix, wrong, what)
                raise ValueError(f"{name} holds {wrong.sum():,} {found} counts, first in {place}. {_REPLACE[found]}")
        fractions = data != np.rint(data)
        if fractions.any():
            raise ValueError(_not_counts(adata, data, fractions, name))
    if (data < 0).any():
        overflow = f" Type {data.dtype} ends at {np.iinfo(data.dtype).max:,}: did larger counts overflow?" if data.dtype.kind == "i" else ""
        place = _where(adata, matrix, data < 0, what)
        raise ValueError(
            f"{name} holds {(data < 0).sum():,} negative counts such as {data[data < 0][0]:g}, first in {place}."
            f"{overflow} Screen needs raw counts: {_remedy(adata)}."
        )
    if (data > _LARGEST).any():
        place = _where(adata, matrix, data == data.max(), what)
        raise ValueError(
            f"{name} holds a count of {data.max():,.0f}, in {place}. Above 2**24 = {_LARGEST:,} single precision skips integers, and "
            "no cell has that many molecules of a gene: is this matrix raw counts, or is this an overflow of an unsigned type?"
        )


_REPLACE = {
    "NaN": "If these genes were not measured, drop them or these cells; if no molecule was seen, set them to 0.",
    "infinite": "Load the raw counts again: a 16-bit float ends at 65,504.",
}


def _where(adata: AnnData, matrix: csr_array, wrong: np.ndarray, what: str) -> str:
    """Name the cell and gene (or other feature) of the first wrong entry."""
    entry = int(wrong.argmax())
    cell = int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
    return f"cell {adata.obs_names[cell]!r}, {what} {adata.var_names[matrix.indices[entry]]!r}"


def _not_counts(adata: AnnData, data: np.ndarray, fractions: np.ndarray, name: str) -> str:
    """Say what non-integer values look like, with examples and the line that restores counts."""
    found = data[fractions][:1000].astype(np.float64)
    shown = ", ".join(f"{value:.4g}" for value in np.unique(found)[:3])
    if (data < 0).any():
        return f"{name} holds non-integer and negative values such as {shown} (scaled?). Screen needs raw counts: {_remedy(adata)}."
    if np.allclose(found, np.rint(found), rtol=0, atol=0.01):
        return f"{name} holds non-integer values such as {found[0]:.8g} (rounding errors?). Round them: {name} = np.rint({name})."
    fix = _remedy(adata)
    if data.max() < 20 and np.allclose(np.expm1(found), np.rint(np.expm1(found)), rtol=1e-3, atol=0.01):
        fix += f", or restore them with {name} = np.rint(np.expm1({name}))"
    return f"{name} holds non-integer values such as {shown} ({_guess(data)}?). Screen needs raw counts: {fix}."


def _guess(data: np.ndarray) -> str:
    """Guess what was done to counts that are non-negative and not whole."""
    return "log-normalised" if data.max() < 20 else "normalised to a common depth"


def _remedy(adata: AnnData) -> str:
    """Say where raw counts are, as far as that can be seen."""
    return next(_raw_places(adata), "pass layer= with the layer that holds them, or load them again")


def _raw_places(adata: AnnData) -> Iterator[str]:
    """Find layers, X or raw, that hold whole non-negative numbers."""
    for layer in layer_names(adata):
        if _whole(adata.layers[layer]):
            yield f"pass layer={layer!r}"
    if adata.X is not None and _whole(adata.X):
        yield "adata.X holds whole numbers: leave layer= out"
    if adata.raw is not None and _whole(adata.raw.X):
        yield "adata.raw holds whole numbers: pass adata.raw.to_adata()"


def _whole(values: Matrix) -> bool:
    """Tell whether a matrix looks like counts."""
    if values.dtype.kind not in "buif":
        return False
    data = as_csr(values, "").data
    return bool((data >= 0).all() and np.equal(data, np.rint(data)).all())
