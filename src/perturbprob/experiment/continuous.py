"""The border for continuous values: means, intensities and their standard errors, checked."""

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Float32, Float64
from scipy.sparse import csr_array, issparse

from perturbprob.experiment.raw_counts import layer_names
from perturbprob.experiment.reading import some
from perturbprob.experiment.vocabulary import nearest


def read_values(adata: AnnData, layer: str | None) -> csr_array:
    """Return the values of X or a layer as float32 (cell, gene); NaN and infinite ones are refused."""
    name, values = _dense(adata, layer)
    wrong = ~np.isfinite(values)
    if wrong.any():
        cell, gene = np.argwhere(wrong)[0]
        found = f"{wrong.sum():,} values of {name} are NaN or infinite, first in {some(adata.obs_names[[cell]], 'cell')}"
        raise ValueError(f"{found}, gene {adata.var_names[gene]!r}. Drop these cells or genes: a missing value cannot be fitted.")
    return csr_array(values)


def read_standard_errors(adata: AnnData, layer: str | None) -> Float32[np.ndarray, "cell gene"] | None:
    """Return the standard errors of the values from a layer, NaN where one is not known; negative and infinite ones are refused."""
    if layer is None:
        return None
    name, values = _dense(adata, layer)
    if (values < 0).any() or np.isinf(values).any():
        raise ValueError(f"{name} holds negative or infinite values; a standard error is at least 0, or NaN where it is not known.")
    return values


def read_cells_behind(adata: AnnData, name: str | None, perturbed: Bool[np.ndarray, " cell"]) -> Float64[np.ndarray, " cell"] | None:
    """Return how many cells stand behind each row from a column; NaN, not known, is allowed for control only."""
    if name is None:
        return None
    if name not in adata.obs:
        raise ValueError(f"cells_behind={name!r} is not a column of adata.obs. {nearest(name, map(str, adata.obs.columns))}")
    column = adata.obs[name].astype(object)
    number = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    wrong = ~(np.isfinite(number) & (number > 0)) & ~(column.isna().to_numpy() & ~perturbed)
    if wrong.any():
        found = f"{some(adata.obs_names[wrong], 'row')} with another, such as {column[wrong].iloc[0]!r}"
        raise ValueError(
            f"adata.obs[{name!r}] must hold the number of cells behind each row, above 0 (of control it may be NaN, not known): {found}. "
            "Correct it, or drop these rows."
        )
    return number


def _dense(adata: AnnData, layer: str | None) -> tuple[str, Float32[np.ndarray, "cell gene"]]:
    """Return a matrix of an AnnData as a new array, and its name."""
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"layer={layer!r} is not a layer of adata. {nearest(layer, layer_names(adata))}")
    name, values = ("adata.X", adata.X) if layer is None else (f"adata.layers[{layer!r}]", adata.layers[layer])
    if values is None:
        raise ValueError("adata.X is empty. Pass layer= with the layer that holds the values.")
    values = values.to_memory() if hasattr(values, "to_memory") else values
    dense = values.toarray() if issparse(values) else np.asarray(values[...])
    if dense.dtype.kind not in "buif":
        raise ValueError(f"{name} holds values of type {dense.dtype}, not numbers.")
    return name, np.array(dense, dtype=np.float32)
