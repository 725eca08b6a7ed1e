"""Screens of continuous values: read, sliced, summed up from counts, and refused where they cannot be fitted."""

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest

from perturbprob.experiment import Knockout, Screen, Wait, datasets
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.experiment.simulate import simulate


def make(**layers: np.ndarray) -> anndata.AnnData:
    """Six rows of three values."""
    values = np.arange(18, dtype=float).reshape(6, 3) / 7 - 1
    adata = anndata.AnnData(values, obs={"perturbation": ["control", "A", "B"] * 2, "day": [1.0] * 3 + [2.0] * 3})
    adata.var_names = ["A", "B", "C"]
    for name, layer in layers.items():
        adata.layers[name] = layer
    return adata


def read(adata: anndata.AnnData, **how: object) -> Screen:
    return Screen.from_anndata(adata, perturbation_type="knockout", time="day", **({"values": "continuous"} | how))


def test_values_and_standard_errors_are_read_as_they_are():
    error = np.full((6, 3), 0.1)
    error[0, 0] = np.nan
    adata = make(se=error)
    screen = read(adata, standard_error="se")
    np.testing.assert_allclose(screen.counts.toarray(), adata.X, rtol=1e-6)
    np.testing.assert_allclose(screen.standard_error, error, rtol=1e-6)
    assert (screen.size_factor == 1).all()
    assert screen.depth == 1
    part = screen[screen.cells_of("A")]
    np.testing.assert_allclose(part.standard_error, error[[1, 4]], rtol=1e-6)
    assert part.values == "continuous"


def test_pseudobulk_holds_the_means_of_counts_with_their_errors():
    screen = datasets.ishikawa2023()
    bulk, means = screen.pseudobulk(), pseudobulk(screen)
    assert bulk.values == "continuous"
    assert set(bulk.conditions) == set(screen.conditions)
    row = [str(bulk.conditions[c]) for c in bulk.condition]
    np.testing.assert_allclose(bulk.counts.toarray(), means["mean"].sel(condition=row), rtol=1e-5)
    np.testing.assert_allclose(bulk.standard_error**2, (means["variance"] / means["n_cells"]).sel(condition=row), rtol=1e-4)
    assert bulk.cells_behind.tolist() == means["n_cells"].sel(condition=row).values.tolist()
    assert bulk[bulk.cells_of("NANOG")].cells_behind.tolist() == [
        len(screen.cells_of(p)) for p in screen[screen.cells_of("NANOG")].conditions
    ]
    assert [bulk.batches[b] for b in bulk.batch[bulk.cells_of(Knockout("NANOG") >> Wait(5))]] == ["d5_4"]


def test_pseudobulk_has_a_row_for_each_condition_in_each_batch():
    screen = simulate(n_cells=400, n_genes=6, n_perturbations=2, n_batches=2, seed=0).screen
    bulk = screen.pseudobulk()
    assert bulk.n_cells == int((screen.summary() > 0).to_numpy().sum())
    with pytest.raises(ValueError, match="holds continuous values"):
        bulk.pseudobulk()


def test_the_jurkat_screen_has_all_four_paths(data_path: Callable[[str], Path]):
    adata = anndata.read_h5ad(data_path("datlinger2017_jurkat_summary.h5ad"))[:, :50].copy()
    with pytest.warns(UserWarning, match="not in adata.var_names"):
        screen = Screen.from_anndata(
            adata, media="media", baseline="unstimulated", time="time", values="continuous", standard_error="uncertainty_se"
        )
    assert screen.layout.paths().groupby("path")["observed"].sum().to_dict() == {1: 32, 2: 32, 3: 1, 4: 1}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"values": "protein"}, "values='protein' is neither 'counts' nor 'continuous'"),
        ({"values": "counts", "standard_error": "se"}, "standard_error= goes with values='continuous'"),
        ({"standard_error": "error"}, r"layer='error' is not a layer of adata\."),
        ({"size_factor": np.ones(6)}, "size_factor= goes with counts"),
        ({"layer": "text"}, "holds values of type"),
        ({"layer": "holes"}, "1 values of .* are NaN or infinite, first in 1 cell .*gene 'B'"),
        ({"standard_error": "below"}, "holds negative or infinite values"),
        ({"values": "counts", "cells_behind": "words"}, "cells_behind= goes with values='continuous'"),
        ({"cells_behind": "wordz"}, r"cells_behind='wordz' is not a column of adata.obs. Did you mean 'words'"),
        ({"cells_behind": "none"}, r"must hold the number of cells behind each row, above 0 .*: 1 row \(0\) with another, such as 0\."),
        ({"cells_behind": "owed"}, r"1 row \(1\) with another, such as -3"),
        ({"cells_behind": "gap"}, r"1 row \(1\) with another, such as nan"),
        ({"cells_behind": "words"}, r"1 row \(1\) with another, such as 'few'"),
    ],
)
def test_what_is_refused(how, message):
    obs = {
        "none": [0, 3, 4, 5, 6, 7],
        "owed": [9, -3, 4, 5, 6, 7],
        "gap": [9, np.nan, 4, 5, 6, 7],
        "words": ["9", "few", "4", "5", "6", "7"],
    }
    holes = np.zeros((6, 3))
    holes[2, 1] = np.nan
    adata = make(se=np.ones((6, 3)), text=np.full((6, 3), "a"), holes=holes, below=-np.ones((6, 3)))
    for name, column in obs.items():
        adata.obs[name] = column
    with pytest.raises(ValueError, match=message):
        read(adata, **how)


def test_numbers_of_cells_are_read_and_may_be_unknown_for_control():
    adata = make()
    adata.obs["n"] = [np.nan, 10, 20, 30, 40, 50]
    np.testing.assert_array_equal(read(adata, cells_behind="n").cells_behind, adata.obs["n"])
    assert read(adata).cells_behind is None
