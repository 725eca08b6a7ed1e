"""The embedded screen, the script that builds it, and readers of files."""

import importlib.util
from contextlib import nullcontext
from functools import partial
from importlib import resources

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from perturbprob.experiment import Knockout, Protocol, Wait, datasets

without_pulling = partial(mudata.set_options, pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext
"""Columns of the parts stay with them; from mudata 0.4 they do by themselves."""

DATA = resources.files("perturbprob.experiment") / "data"


@pytest.fixture(scope="module")
def script(root):
    """The build script as a module."""
    spec = importlib.util.spec_from_file_location("build_ishikawa2023", root / "scripts" / "build_ishikawa2023.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adata():
    """A small screen as AnnData."""
    obs = pd.DataFrame({"perturbation": ["control", "A", "A"], "perturbation_type": "knockout"}, index=["c0", "c1", "c2"])
    return anndata.AnnData(sp.csr_matrix(np.array([[1, 2], [0, 3], [4, 0]], dtype=np.float32)), obs=obs, var=pd.DataFrame(index=["A", "B"]))


# Ishikawa 2023.


def test_ishikawa_is_the_published_screen():
    screen = datasets.ishikawa2023()
    assert (screen.n_cells, screen.n_genes, len(screen.perturbations), len(screen.conditions)) == (14_945, 103, 23, 96)
    assert (screen.times, screen.time_unit, screen.batches) == ((2, 3, 4, 5), "day", ("d2_1", "d3_2", "d4_3", "d5_4"))
    assert len(screen.cells_of("control")) == 1182
    assert screen.conditions[0] == Protocol([Wait(2)])
    assert Knockout("POU5F1") >> Wait(5) in screen.conditions
    assert set(screen.perturbations) < set(screen.genes)
    assert (screen.counts.nnz, screen.counts.max()) == (1_058_409, 138)
    assert np.median(screen.size_factor) == 1


def test_ishikawa_is_small_and_carries_its_licence():
    assert len((DATA / "ishikawa2023_hipsc.h5ad").read_bytes()) <= 2 * 1024**2
    note = (DATA / "ishikawa2023_hipsc.LICENSE.txt").read_text(encoding="utf-8")
    for words in (
        "MIT License",
        "Copyright (c) 2022 masastat",
        "10.1038/s42003-023-05594-4",
        "renge 0.0.5",
        "scripts/build_ishikawa2023.py",
    ):
        assert words in note


def test_ishikawa_is_the_file_of_the_studies(data_path):
    theirs, ours = anndata.read_h5ad(data_path("ishikawa2023_hipsc.h5ad")), anndata.read_h5ad(str(DATA / "ishikawa2023_hipsc.h5ad"))
    assert (theirs.X != ours.X).nnz == 0
    pd.testing.assert_frame_equal(theirs.obs, ours.obs)
    pd.testing.assert_frame_equal(theirs.var, ours.var)


def test_the_script_rebuilds_counts_and_labels(script, tmp_path):
    counts = np.array([[1, 0], [7, 138], [0, 2]])
    cells = ["1_a", "2_b", "4_c"]
    expression = pd.DataFrame(np.log1p(counts), index=cells, columns=["SOX2", "MYC"])
    design = pd.DataFrame([[0.0, 0.0, 2.0], [1.0, 0.0, 3.0], [0.0, 1.0, 5.0]], index=cells, columns=["MYC", "SOX2", "t"])
    built = script.build(expression, design)
    np.testing.assert_array_equal(built.X.toarray(), counts)
    assert built.obs["perturbation"].tolist() == ["control", "MYC", "SOX2"]
    assert built.obs["perturbation_type"].tolist() == ["control", "CRISPR_knockout", "CRISPR_knockout"]
    assert built.obs["batch"].tolist() == ["d2_1", "d3_2", "d5_4"]
    built.write_h5ad(tmp_path / "x.h5ad")
    assert datasets.load(tmp_path / "x.h5ad", time="time").times == (2.0, 3.0, 5.0)


def test_the_script_refuses_other_tables(script):
    table = pd.DataFrame([[0.5, 1.0]], index=["1_a"], columns=["MYC", "t"])
    with pytest.raises(ValueError, match="not log1p of whole numbers"):
        script.build(table[["MYC"]], table)
    with pytest.raises(ValueError, match="do not list the same cells"):
        script.build(table, table.rename(index={"1_a": "1_b"}))


# Files.


def check(screen):
    """The small screen was read."""
    assert screen.conditions == (Protocol([Wait(1)]), Knockout("A") >> Wait(1))
    assert screen.condition.tolist() == [0, 1, 1]
    assert screen.counts.toarray().tolist() == [[1, 2], [0, 3], [4, 0]]


def write_mudata(path, adata):
    """Write RNA and protein, with a lane in the obs of the whole and one protein cell more."""
    protein = anndata.AnnData(np.ones((4, 1), dtype=np.float32), obs=pd.DataFrame(index=["c2", "c9", "c1", "c0"]))
    with without_pulling():
        whole = mudata.MuData({"rna": adata, "protein": protein})
        whole.obs["lane"] = [f"lane_{cell}" for cell in whole.obs_names]
        (whole.write_zarr if path.suffix == ".zarr" else whole.write_h5mu)(path)


@pytest.mark.parametrize("as_text", [False, True])
def test_h5ad_files(adata, tmp_path, as_text):
    path = tmp_path / "screen.h5ad"
    adata.write_h5ad(path)
    check(datasets.load(str(path) if as_text else path))
    assert datasets.load(path, perturbation=None).perturbations == ()


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_zarr_folders(adata, tmp_path):
    adata.write_zarr(tmp_path / "screen.zarr")
    check(datasets.load(tmp_path / "screen.zarr"))


@pytest.mark.parametrize("suffix", [".h5mu", ".zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_mudata_has_the_columns_of_the_whole(adata, tmp_path, suffix):
    path = tmp_path / f"screen{suffix}"
    write_mudata(path, adata)
    screen = datasets.load(path, sgrna="lane")
    check(screen)
    assert list(screen.sgrna) == ["lane_c0", "lane_c1", "lane_c2"]
    with pytest.raises(ValueError, match=r"modality='rnaa' is not in the file. Did you mean 'rna'"):
        datasets.load(path, modality="rnaa")


def test_files_that_cannot_be_read(adata, tmp_path):
    with pytest.raises(ValueError, match=r"is no .h5ad, .h5mu or .zarr. Read it with anndata or scanpy, then Screen.from_anndata"):
        datasets.load(tmp_path / "screen.csv")
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*scren.h5ad'"):
        datasets.load(tmp_path / "nowhere" / "scren.h5ad")
    adata.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'screen.h5ad'\?"):
        datasets.load(tmp_path / "scren.h5ad")


def test_what_the_screen_refuses_is_refused_on_load(adata, tmp_path):
    adata.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(ValueError, match="batch='lane' is not a column"):
        datasets.load(tmp_path / "screen.h5ad", batch="lane")
