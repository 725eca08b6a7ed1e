"""Counts that stay on disk: the same screen as in memory, and what is said of files that cannot be read."""

import os
import pickle
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_array, csr_array

import perturbprob as pb
from perturbprob.experiment import spans, store
from perturbprob.experiment.store import StoredCounts, StoreError, blocks

HOW = {"media": "media", "time": "time", "batch": "batch"}
KINDS = ["h5ad", "zarr"]


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    """A small screen as users have it."""
    return pb.simulate(n_cells=300, n_genes=12, n_perturbations=3, n_batches=2, seed=0).adata


@pytest.fixture(scope="module")
def in_memory(adata) -> pb.Screen:
    return pb.Screen.from_anndata(adata, **HOW)


def written(adata, folder, kind, name="screen"):
    """Write a screen; return where."""
    if kind == "zarr":
        pytest.importorskip("zarr")
    path = folder / f"{name}.{kind}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2")
        adata.write_h5ad(path) if kind == "h5ad" else adata.write_zarr(path)
    return path


@pytest.fixture(params=KINDS)
def path(request, adata, tmp_path):
    return written(adata, tmp_path, request.param)


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(store, "ROWS", 70)


def assert_equal(a, b):
    np.testing.assert_array_equal(a.toarray(), b.toarray())


@pytest.mark.usefixtures("_small_blocks")
def test_a_screen_on_disk_is_the_screen_in_memory(path, in_memory):
    screen = pb.Screen.from_store(path, **HOW)
    assert isinstance(screen.counts, StoredCounts)
    assert screen.counts.shape == in_memory.counts.shape
    for name in ("genes", "conditions", "batches", "depth", "baseline"):
        assert getattr(screen, name) == getattr(in_memory, name)
    for name in ("cells", "condition", "batch", "size_factor"):
        np.testing.assert_array_equal(getattr(screen, name), getattr(in_memory, name))
    assert_equal(screen.in_memory().counts, in_memory.counts)
    assert in_memory.in_memory() is in_memory


def test_rows_are_read_in_the_order_and_as_often_as_asked_for(path, in_memory):
    counts = pb.Screen.from_store(path, **HOW).counts
    random = np.random.default_rng(0)
    asks = [random.permutation(300)[:50], np.array([7, 7, 3, 299]), np.array([], int), slice(10, 20), np.arange(300) % 50 == 0]
    for ask in asks:
        found = counts[ask]
        assert isinstance(found, csr_array)
        assert found.has_canonical_format
        assert_equal(found, in_memory.counts[ask])


@pytest.mark.usefixtures("_small_blocks")
def test_sums_and_products_go_block_by_block(path, in_memory):
    counts, member = pb.Screen.from_store(path, **HOW).counts, csr_array(np.random.default_rng(0).random((3, 300)))
    assert len(list(blocks(counts))) == 5
    assert len(list(blocks(in_memory.counts))) == 1
    assert counts.sum() == in_memory.counts.sum()
    for axis in (0, 1):
        np.testing.assert_array_equal(np.ravel(counts.sum(axis=axis)), np.ravel(in_memory.counts.sum(axis=axis)))
    np.testing.assert_allclose((member @ counts).toarray(), (member @ in_memory.counts).toarray())
    np.testing.assert_allclose(np.arange(300.0) @ counts, np.arange(300.0) @ in_memory.counts)


def in_small_chunks(matrix, path):
    """Write X of a zarr store in chunks of a few rows and genes, or of a few values."""
    import zarr
    from anndata.io import write_elem

    chunks = (7, 5) if isinstance(matrix, np.ndarray) else 50
    write_elem(zarr.open_group(str(path), mode="w"), "X", matrix, dataset_kwargs={"chunks": chunks})
    return path


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("annbatch", [False, True])
def test_zarr_stores_are_read_with_and_without_annbatch(adata, tmp_path, in_memory, monkeypatch, dense, annbatch):
    """The same rows, single and in runs, in any order, and from several threads at once; of annbatch dense rows are not asked."""
    pytest.importorskip("annbatch" if annbatch else "zarr")
    monkeypatch.setattr(spans, "_has_annbatch", lambda: annbatch)
    counts = StoredCounts.of(in_small_chunks(adata.X.toarray() if dense else adata.X, tmp_path / "screen.zarr"))
    for rows in ([299, 3, 4, 5, 250, 3, 120], [5], [0, 40, 299]):
        assert_equal(counts[np.array(rows)], in_memory.counts[np.array(rows)])
    assert isinstance(counts._reader, spans._WithAnnbatch) == (annbatch and not dense)
    with ThreadPoolExecutor(4) as pool:
        for k, read in enumerate(pool.map(lambda k: counts[k : k + 60], range(40))):
            assert_equal(read, in_memory.counts[k : k + 60])


@pytest.mark.parametrize(("place", "wrong"), [(3, 10**7), (0, 3), (-1, 7), (5, -1)])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_of_rows_that_do_not_rise_are_one_error(adata, tmp_path, kind, place, wrong):
    import h5py

    path = written(adata, tmp_path, kind)
    if kind == "zarr":
        import zarr

        zarr.open_group(str(path), mode="a")["X/indptr"][place] = wrong
    else:
        with h5py.File(path, "a") as file:
            file["X/indptr"][place] = wrong
    with pytest.raises(StoreError, match=r"X/indptr of .* is damaged: it does not rise from 0 to [\d,]+\. Copy or write it again"):
        pb.Screen.from_store(path, **HOW)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["indices", "indptr"])
def test_a_part_of_the_counts_that_is_gone_is_one_error(adata, tmp_path, kind, part):
    import h5py

    path = written(adata, tmp_path, kind)
    if kind == "h5ad":
        with h5py.File(path, "a") as file:
            del file[f"X/{part}"]
    else:
        shutil.rmtree(path / "X" / part)
    with pytest.raises(StoreError, match=r"Copy or write it again"):
        pb.Screen.from_store(path, **HOW)


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding")
@pytest.mark.parametrize("part", ["data", "indices", "indptr", None])
def test_any_part_of_a_zarr_store_that_is_written_over_in_use_is_noticed(adata, tmp_path, part):
    """Also a single chunk of dense counts, which lies in a folder of its row."""
    zarr = pytest.importorskip("zarr")
    path = in_small_chunks(adata.X.toarray() if part is None else adata.X, tmp_path / "screen.zarr")
    counts = StoredCounts.of(path)
    counts[:5]
    array = zarr.open_group(str(path), mode="a")["X" if part is None else f"X/{part}"]
    if part is None:
        array[20, 3] = 99
    else:
        array[3] = array[3] + 1
    with pytest.raises(StoreError, match=r"changed while it was in use"):
        counts[:5]


def test_an_annbatch_that_is_asked_otherwise_is_left_alone(monkeypatch):
    class LoadRequest:
        chunks: list[slice]

    monkeypatch.setitem(sys.modules, "annbatch", ModuleType("annbatch"))
    monkeypatch.setitem(sys.modules, "annbatch.types", types := ModuleType("annbatch.types"))
    assert not spans._has_annbatch.__wrapped__()
    types.LoadRequest = LoadRequest
    assert not spans._has_annbatch.__wrapped__()


def test_parts_stay_on_disk_and_processes_open_files_themselves(path, in_memory):
    part = pb.Screen.from_store(path, **HOW)[np.arange(0, 300, 3)]
    assert isinstance(part.counts, StoredCounts)
    part.counts[:2]
    copied = pickle.loads(pickle.dumps(part))
    assert_equal(copied.counts[np.array([5, 1])], in_memory[::3].counts[np.array([5, 1])])
    assert_equal(copied[20:40].in_memory().counts, in_memory[60:120:3].counts)


def test_dense_counts_and_layers_can_be_read(adata, tmp_path, in_memory):
    other = adata.copy()
    other.layers["counts"] = other.X.toarray().astype(np.int32)
    other.X = other.X * 0.5
    for kind in KINDS:
        screen = pb.Screen.from_store(written(other, tmp_path, kind), layer="counts", **HOW)
        assert_equal(screen.counts[10:50], in_memory.counts[10:50])


def test_a_zarr_store_that_lost_a_chunk_or_is_written_over_or_gone(adata, tmp_path):
    """zarr reads a chunk that is not there as zeros."""
    for name in ("data", "indices", "indptr"):
        path = written(adata, tmp_path, "zarr", name)
        kept = [file for file in (path / "X" / name).rglob("*") if file.is_file() and file.name not in ("zarr.json", ".zarray", ".zattrs")]
        kept[0].unlink()
        with pytest.raises(StoreError, match=rf"lacks 1 of the \d+ chunks of X/{name}"):
            pb.Screen.from_store(path, **HOW)
    import zarr

    path = written(adata, tmp_path, "zarr")
    counts = pb.Screen.from_store(path, **HOW).counts
    zarr.open_group(str(path), mode="a")["X/data"][10] = 77
    with pytest.raises(StoreError, match="changed while it was in use"):
        counts[:5]
    shutil.rmtree(path)
    with pytest.raises(StoreError, match="is gone"):
        counts[:5]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [None, 5])
def test_what_is_no_path_is_refused(wrong):
    with pytest.raises(TypeError, match=r"from_store reads the path of an h5ad file or a zarr store; got (NoneType|int)"):
        store.open_store(wrong)


def test_what_needs_all_counts_says_so(path):
    screen = pb.Screen.from_store(path, **HOW)
    with pytest.raises(AttributeError, match=r"have no 'toarray': take screen.in_memory\(\)"):
        screen.counts.toarray()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = screen.counts.no_such_thing
    assert pb.Screen.concat({"a": screen[:100], "b": screen[100:]}).n_cells == 300


# Bad input.


def test_a_file_that_is_not_there_or_not_whole(tmp_path, adata):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.h5ad"):
        pb.Screen.from_store(tmp_path / "nowhere.h5ad")
    whole = written(adata, tmp_path, "h5ad")
    for size in (100, 0.5):
        short = tmp_path / f"short{size}.h5ad"
        short.write_bytes(whole.read_bytes()[: int(size if size > 1 else size * whole.stat().st_size)])
        with pytest.raises(StoreError, match=r"short.*cannot be opened as an h5ad file or a zarr store \(truncated\?\)"):
            pb.Screen.from_store(short, **HOW)
    empty = tmp_path / "folder.zarr"
    empty.mkdir()
    with pytest.raises(StoreError, match=r"folder.zarr"):
        pb.Screen.from_store(empty, **HOW)


def test_a_truncated_zarr_chunk_is_one_error(adata, tmp_path):
    path = written(adata, tmp_path, "zarr")
    chunks = [file for file in (path / "X" / "data").rglob("*") if file.is_file() and file.name not in ("zarr.json", ".zarray", ".zattrs")]
    chunks[0].write_bytes(chunks[0].read_bytes()[:7])
    with pytest.raises(StoreError, match=r"cannot be read at rows 0 to 299 of X"):
        pb.Screen.from_store(path, **HOW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_changes_in_use(adata, tmp_path, kind):
    path = written(adata, tmp_path, kind)
    counts = pb.Screen.from_store(path, **HOW).counts
    counts[:5]
    if kind == "h5ad":
        os.truncate(path, path.stat().st_size - 8)
    else:
        import zarr
        from anndata.io import sparse_dataset

        sparse_dataset(zarr.open_group(str(path), mode="a")["X"]).append(adata.X[:5])
    with pytest.raises(StoreError, match=r"changed while it was in use"):
        counts[:5]


def test_columns_first_values_that_are_no_counts_and_other_misuse(adata, tmp_path):
    by_column = adata.copy()
    by_column.X = csc_array(by_column.X)
    with pytest.raises(ValueError, match=r"stored by columns \(CSC\).*tocsr"):
        pb.Screen.from_store(written(by_column, tmp_path, "h5ad", "csc"), **HOW)
    halved = adata.copy()
    halved.X = halved.X * 0.5
    with pytest.raises(ValueError, match=r"adata.X holds non-integer values .*read_h5ad\(.*halved.h5ad.*layers there: none.*another name"):
        pb.Screen.from_store(written(halved, tmp_path, "h5ad", "halved"), **HOW)
    path = written(adata, tmp_path, "h5ad")
    with pytest.raises(ValueError, match=r"layer='count' is not a layer of .*screen.h5ad"):
        pb.Screen.from_store(path, layer="count", **HOW)
    with pytest.raises(ValueError, match=r"values='continuous' is read into memory"):
        pb.Screen.from_store(path, values="continuous", **HOW)
    with pytest.raises(ValueError, match=r"batch='lane' is not a column"):
        pb.Screen.from_store(path, batch="lane")
    silent = adata.copy()
    silent.X = csr_array(silent.X.toarray() * (np.arange(300) != 4)[:, None])
    with pytest.raises(ValueError, match=r"1 cell .* without any count in adata.X"):
        pb.Screen.from_store(written(silent, tmp_path, "h5ad", "silent"), **HOW)
    with pytest.raises(TypeError, match=r"Screen.from_store has no argument 'perturbations'. Did you mean 'perturbation'"):
        pb.Screen.from_store(path, perturbations="gene")


@pytest.mark.parametrize("wrong", [5_000_000, -1])
def test_a_gene_that_is_not_there_is_one_error_on_disk_and_in_memory(adata, tmp_path, wrong):
    """scipy would read, or write, wherever the index points, and end the process."""
    import h5py

    path = written(adata, tmp_path, "h5ad")
    with h5py.File(path, "a") as file:
        file["X/indices"][3] = wrong
    with pytest.raises(StoreError, match=r"cannot be read at rows 0 to 299 of X: ValueError: X is damaged"):
        pb.Screen.from_store(path, **HOW)
    spoilt = adata.copy()
    spoilt.X.indices[3] = wrong
    with pytest.raises(ValueError, match=r"adata.X is damaged: of its sparse form, .*ind"):
        pb.Screen.from_anndata(spoilt, **HOW)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (2**24 + 1, np.float64, r"a count of 16,777,217"),
        (100_000.001, np.float64, r"non-integer values such as 100000"),
        (1e-60, np.float64, r"non-integer values such as 1e-60"),
        (-5, np.int16, r"negative counts such as -5, .* Type int16 ends at 32,767"),
    ],
)
def test_counts_are_refused_on_disk_as_in_memory(adata, tmp_path, value, dtype, message):
    dense = adata.X.toarray().astype(dtype)
    dense[3, 2] = value
    for form, matrix in (("sparse", csr_array(dense)), ("dense", dense)):
        other = anndata.AnnData(matrix, obs=adata.obs, var=adata.var)
        with pytest.raises(ValueError, match=message):
            pb.Screen.from_anndata(other, **HOW)
        with pytest.raises(ValueError, match=message):
            pb.Screen.from_store(written(other, tmp_path, "h5ad", form), **HOW)


def test_half_precision_and_a_file_as_written_before_2020_are_read(adata, tmp_path, in_memory):
    import h5py

    half = anndata.AnnData(adata.X.toarray().astype(np.float16), obs=adata.obs, var=adata.var)
    assert_equal(pb.Screen.from_store(written(half, tmp_path, "h5ad", "half"), **HOW).counts[:], in_memory.counts)
    old, none = (written(adata, tmp_path, "h5ad", name) for name in ("old", "none"))
    for path in (old, none):
        with h5py.File(path, "a") as file:
            attributes = file["X"].attrs
            if path == old:
                attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", attributes["shape"]
            for name in ("encoding-type", "encoding-version", "shape"):
                del attributes[name]
    assert_equal(pb.Screen.from_store(old, **HOW).counts[:], in_memory.counts)
    with pytest.raises(StoreError, match=r"X of .* is no matrix of cells and genes that anndata writes today. Write it again"):
        pb.Screen.from_store(none, **HOW)


def test_a_file_without_cells(tmp_path):
    import h5py

    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file["X"] = np.ones((2, 2))
    with pytest.raises(StoreError, match=r"no obs and var that can be read"):
        pb.Screen.from_store(tmp_path / "x.h5ad")
    table = anndata.AnnData(np.ones((2, 2)), obs=pd.DataFrame(index=["a", "b"]))
    table.write_h5ad(tmp_path / "y.h5ad")
    with h5py.File(tmp_path / "y.h5ad", "a") as file:
        del file["X"]
        file["X"] = np.ones((3, 2))
    with pytest.raises(StoreError, match=r"names 2 cells and 2 genes, and X is \(3, 2\)"):
        pb.Screen.from_store(tmp_path / "y.h5ad", perturbation=None)
