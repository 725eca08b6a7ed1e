"""From an AnnData to the fields of a screen: every column read and checked."""

from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from jaxtyping import Bool, Float64
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from perturbprob.experiment import reading
from perturbprob.experiment.continuous import read_cells_behind, read_standard_errors, read_values
from perturbprob.experiment.raw_counts import read_counts
from perturbprob.experiment.store import StoredCounts, checked_totals


def read_fields(
    adata: AnnData, columns: dict[str, Any], present: Bool[np.ndarray, " cell"] | None = None, stored: str | Path | None = None
) -> dict[str, Any]:
    """Return the fields of the screen in an AnnData; ``columns`` are the arguments of `Screen.from_anndata`, which explains them.

    ``present`` says in which cells RNA was measured; the others have a size factor of 1. ``stored`` is the file whose counts stay there.
    """
    asked = dict(columns)
    values, size_factor, control = asked["values"], asked["size_factor"], asked["control"]
    _check_values(values, asked["standard_error"], asked["cells_behind"], size_factor)
    reading.check_names(adata)
    obs, words = adata.obs, reading.control_words(control)
    counts, total = _read_matrix(adata, asked, present, stored)
    kind, nontargeting = asked["perturbation_type"], asked["nontargeting"]
    perturbed = reading.read_perturbations(obs, asked["perturbation"], control=words, kind=kind, nontargeting=nontargeting)
    placed, baseline = reading.read_media(obs, asked["media"], asked["baseline"])
    waited, time_unit = reading.read_times(obs, asked["time"], asked["time_unit"])
    conditions, condition = reading.combine(perturbed, placed, waited)
    column = reading.read_column(obs, "batch", asked["batch"])
    batches = reading.Levels.constant(adata.n_obs, "batch") if column is None else reading.Levels.of(column)
    if taken := sorted({"average", "new"}.intersection(batches.values)):
        raise ValueError(f"A batch is named {taken[0]!r}, which predict(batch={taken[0]!r}) means otherwise. Give that batch another name.")
    spacers = reading.read_column(obs, "sgrna", asked["sgrna"])
    factor = np.ones(adata.n_obs) if values == "continuous" else reading.read_size_factor(adata, size_factor, total, present)
    edited = np.array([bool(p.perturbations) for p in conditions])[condition]
    return {
        "counts": counts,
        "genes": tuple(map(str, adata.var_names)),
        "cells": text(adata.obs_names),
        "conditions": conditions,
        "condition": condition,
        "batches": tuple(batches.values),
        "batch": batches.codes,
        "size_factor": factor,
        "depth": float(values == "continuous") if stored is None else float(total.sum() / factor.sum()),
        "values": values,
        "standard_error": read_standard_errors(adata, asked["standard_error"]),
        "cells_behind": read_cells_behind(adata, asked["cells_behind"], edited),
        "control": next(iter(words), "control"),
        "baseline": baseline,
        "time_unit": time_unit,
        "sgrna": None if spacers is None else text(spacers),
        "columns": {} if size_factor is not None and not isinstance(size_factor, str) else asked | {"control": list(words)},
        "present": present,
    }


def _read_matrix(
    adata: AnnData, asked: dict[str, Any], present: Bool[np.ndarray, " cell"] | None, stored: str | Path | None
) -> tuple[csr_array | StoredCounts, Float64[np.ndarray, " cell"]]:
    """Return the counts, or continuous values, and the sum of each cell; check them."""
    may_be_empty = asked["size_factor"] is not None
    if stored is not None:
        if asked["values"] == "continuous":
            raise ValueError("values='continuous' is read into memory: Screen.from_anndata(anndata.read_h5ad(path), ...).")
        counts = StoredCounts.of(stored, asked["layer"])
        return counts, checked_totals(counts, adata, may_be_empty=may_be_empty)
    if asked["values"] == "continuous":
        matrix = read_values(adata, asked["layer"])
    else:
        matrix = read_counts(adata, asked["layer"], present, may_be_empty=may_be_empty)
    return matrix, np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()


def _check_values(values: str, standard_error: str | None, cells_behind: str | None, size_factor: object) -> None:
    """Refuse kinds of values that do not exist, and what does not go with them."""
    if values not in ("counts", "continuous"):
        raise ValueError(f"values={values!r} is neither 'counts' nor 'continuous'.")
    if values == "counts" and standard_error is not None:
        raise ValueError("standard_error= goes with values='continuous': counts carry their own noise.")
    if values == "counts" and cells_behind is not None:
        raise ValueError("cells_behind= goes with values='continuous': a row of counts is one cell.")
    if values == "continuous" and size_factor is not None:
        raise ValueError("size_factor= goes with counts: bring continuous values to one scale before they are read.")


def text(names: ArrayLike) -> np.ndarray:
    """Return names as an array of str objects."""
    return np.asarray(names).astype(str).astype(object)
