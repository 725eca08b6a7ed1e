"""Several assays of the same cells: read, matched by name, masked where declared, refused where not."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csc_matrix, csr_matrix

from perturbprob.experiment.assays import Assay
from perturbprob.experiment.screen import Screen

without_pulling = partial(mudata.set_options, pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext
"""Columns of the parts stay with them; from mudata 0.4 they do by themselves."""

CELLS = ["a", "b", "c", "d", "e", "f"]
GENES = ["KLF1", "CD4", "CD8A"]
RNA = np.array([[3, 1, 0], [0, 2, 1], [5, 1, 1], [1, 1, 1], [2, 0, 4], [1, 0, 1]], float)
SURFACE = np.array([[9, 1], [4, 0], [0, 7], [2, 2]], float)
COLUMNS = {"perturbation": "gene", "perturbation_type": "knockout"}


def modality(values: np.ndarray, cells: list[str], names: list[str], **obs: list[str]) -> AnnData:
    """A modality of a MuData."""
    return AnnData(values, obs=pd.DataFrame(obs, index=cells), var=pd.DataFrame(index=names))


@pytest.fixture
def rna() -> AnnData:
    """RNA of five of six cells."""
    return modality(RNA[:5], CELLS[:5], GENES, gene=["NT", "KLF1", "KLF1", "NT", "KLF1"])


@pytest.fixture
def surface() -> AnnData:
    """Proteins of four cells in another order, of which the last has no RNA."""
    return modality(SURFACE, ["d", "b", "a", "f"], ["CD4", "CD71"], gene=["NT", "KLF1", "NT", "NT"])


def together(**modalities: AnnData) -> mudata.MuData:
    """A MuData."""
    with without_pulling(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a protein may be called like its gene
        return mudata.MuData(modalities)


def screen_of(rna: AnnData, **arguments: Any) -> Screen:
    """The RNA as a screen."""
    return Screen.from_anndata(rna, **COLUMNS, **arguments)


# Laws.


def test_the_union_of_cells_is_matched_by_name_and_masked(rna: AnnData, surface: AnnData) -> None:
    screen = Screen.from_mudata(together(rna=rna, adt=surface), protein="adt", missing="mask", **COLUMNS)
    assay = screen.assays["protein"]
    assert list(screen.cells) == CELLS == list(assay.cells)
    assert screen.present is not None
    assert screen.present.tolist() == [True] * 5 + [False]
    assert assay.present.tolist() == [True, True, False, True, False, True]
    np.testing.assert_array_equal(assay.counts.toarray(), [[0, 7], [4, 0], [0, 0], [9, 1], [0, 0], [2, 2]])
    np.testing.assert_array_equal(screen.counts.toarray(), [*RNA[:5], [0, 0, 0]])
    assert assay.genes == ("CD4", None)
    assert [str(screen.conditions[k]) for k in screen.condition] == [str(screen.conditions[k]) for k in [0, 1, 1, 0, 1, 0]]
    assert "protein: Assay(protein: 2 features, 1 of a gene, in 4 of 6 cells)" in repr(screen)


def test_masked_cells_leave_depth_and_size_factors_alone(rna: AnnData, surface: AnnData) -> None:
    screen, alone = Screen.from_mudata(together(rna=rna, adt=surface), protein="adt", missing="mask", **COLUMNS), screen_of(rna)
    np.testing.assert_array_equal(screen.size_factor, [*alone.size_factor, 1.0])
    assert screen.depth == alone.depth
    total = SURFACE.sum(1)
    np.testing.assert_allclose(
        screen.assays["protein"].size_factor, np.array([7, 4, 0, 10, 0, 4, 1])[:6] / np.median(total) + [0, 0, 1, 0, 1, 0]
    )
    part = screen.with_rna
    assert part.present is None
    assert list(part.cells) == CELLS[:5]
    np.testing.assert_array_equal(part.counts.toarray(), alone.counts.toarray())


def test_a_part_of_a_screen_keeps_the_rows_of_its_assays(rna: AnnData, surface: AnnData) -> None:
    screen = Screen.from_mudata(together(rna=rna, adt=surface), protein="adt", missing="mask", **COLUMNS)
    chosen = np.array([5, 1, 3])
    part = screen[chosen]
    np.testing.assert_array_equal(part.assays["protein"].counts.toarray(), screen.assays["protein"].counts.toarray()[chosen])
    assert list(part.assays["protein"].cells) == list(part.cells) == ["f", "b", "d"]
    np.testing.assert_array_equal(part.assays["protein"].size_factor, screen.assays["protein"].size_factor[chosen])
    assert part.present is not None
    assert part.present.tolist() == [False, True, True]


def test_both_ways_of_reading_agree(rna: AnnData, surface: AnnData) -> None:
    both = surface[:3]
    first = Screen.from_mudata(together(rna=rna, adt=both), protein="adt", missing="mask", **COLUMNS)
    second = screen_of(rna).with_assays({"protein": Assay.from_anndata(both, kind="protein")}, missing="mask")
    assert first.present is None
    assert second.present is None
    np.testing.assert_array_equal(first.assays["protein"].counts.toarray(), second.assays["protein"].counts.toarray())
    np.testing.assert_array_equal(first.assays["protein"].size_factor, second.assays["protein"].size_factor)
    assert first.conditions == second.conditions


@pytest.mark.parametrize("convert", [np.asarray, csr_matrix, csc_matrix, lambda v: v.astype(np.int32), lambda v: v.astype(np.float16)])
def test_matrices_of_every_type_are_read_alike(convert: Callable[[np.ndarray], Any]) -> None:
    adata = modality(np.ones((4, 1)), list("abcd"), ["G"])
    adata.obsm["x"] = convert(SURFACE)
    assay = Assay.from_anndata(adata, kind="protein", obsm="x", features=["p", "q"])
    np.testing.assert_array_equal(assay.counts.toarray(), SURFACE)
    assert assay.counts.dtype == np.float32
    assert assay.features == ("p", "q")


def test_a_frame_in_obsm_names_its_features_and_a_column_of_var_their_genes() -> None:
    adata = modality(SURFACE, list("abcd"), ["chr1-1-9", "chr1-10-19"])
    adata.var["gene"] = ["KLF1", np.nan]
    assert Assay.from_anndata(adata, kind="chromatin").genes == ("KLF1", None)
    adata.obsm["frame"] = pd.DataFrame(SURFACE, index=list("abcd"), columns=["p", "q"])
    assert Assay.from_anndata(adata, kind="protein", obsm="frame").genes == ("p", "q")
    assert Assay.from_anndata(adata, kind="protein", obsm="frame", features=["r", "s"]).features == ("r", "s")


def test_binary_windows_are_open_or_closed() -> None:
    assay = Assay.from_anndata(modality(SURFACE, list("abcd"), ["p", "q"]), kind="chromatin", binary=True)
    np.testing.assert_array_equal(assay.counts.toarray(), SURFACE > 0)
    np.testing.assert_allclose(assay.level, -np.log1p(-np.array([3.5, 3.5]) / 5))
    assert "open or closed" in repr(assay)


def test_nothing_is_written_into_the_users_data(rna: AnnData, surface: AnnData) -> None:
    surface.X = csr_matrix(surface.X)
    before = surface.X.copy()
    whole = together(rna=rna, adt=surface)
    Screen.from_mudata(whole, protein="adt", missing="mask", **COLUMNS)
    Assay.from_anndata(surface, kind="chromatin", binary=True)
    assert (before != surface.X).nnz == 0
    assert list(whole.obs.columns) == []


def test_values_of_cells_that_are_not_present_are_left_out() -> None:
    adata, present = modality(SURFACE, list("abcd"), ["p", "q"]), np.array([True, True, False, True])
    other = adata.copy()
    other.X[2] = 1000.0
    for one in (adata, other):
        assay = Assay.from_anndata(one, kind="protein", present=present)
        assert assay.counts[[2]].nnz == 0
        np.testing.assert_allclose(assay.level, (SURFACE[present].sum(0) + 0.5) / assay.size_factor[present].sum())


def test_columns_of_the_whole_are_read(rna: AnnData, surface: AnnData) -> None:
    words = rna.obs["gene"].tolist()
    rna.obs, surface.obs = rna.obs[[]], surface.obs[[]]
    whole = together(rna=rna, adt=surface)
    whole.obs["gene"] = pd.Series([*words, "NT"], index=CELLS).reindex(whole.obs_names)
    screen = Screen.from_mudata(whole, protein="adt", missing="mask", **COLUMNS)
    assert screen.perturbations == ("KLF1",)
    assert len(screen.cells_of("control")) == 3


# The study data.


def test_the_assays_of_real_cells_are_read(data_path: Callable[[str], Path]) -> None:
    cite = anndata.read_h5ad(data_path("citefuse_citeseq_pbmc.h5ad"))
    screen = Screen.from_anndata(cite, perturbation_type=None).with_assays(
        {"protein": Assay.from_anndata(cite, kind="protein", obsm="protein", features=cite.uns["protein_names"])}
    )
    assert "49 features, 10 of a gene, in 500 of 500 cells" in repr(screen.assays["protein"])
    assert screen.assays["protein"].counts.sum() == cite.obsm["protein"].sum()
    small = anndata.read_h5ad(data_path("signac_atac_small.h5ad"))
    screen = Screen.from_anndata(small, perturbation_type=None)
    screen = screen.with_assays({"atac": Assay.from_anndata(small, kind="chromatin", obsm="atac_peaks", features=small.uns["peak_names"])})
    assert "323 features, 0 of a gene, in 100 of 100 cells" in repr(screen.assays["atac"])


# Misuse.


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (SURFACE - 3, r"adata\.obsm\['x'\] holds 3 negative counts|negative counts such as -3, first in cell 'a', feature 'q'|negative"),
        (SURFACE / 3, r"adata\.obsm\['x'\] holds non-integer values such as .* raw counts"),
        (np.where(SURFACE == 7, np.nan, SURFACE), r"holds 1 NaN counts, first in cell 'c', feature 'q'"),
        (SURFACE * 0, r"4 cells \(a, b, c, d\) without any count in adata\.obsm\['x'\]"),
    ],
)
def test_values_that_are_not_counts_are_refused(values: np.ndarray, match: str) -> None:
    adata = modality(np.ones((4, 1)), list("abcd"), ["G"])
    adata.obsm["x"] = values
    with pytest.raises(ValueError, match=match):
        Assay.from_anndata(adata, kind="protein", obsm="x", features=["p", "q"])


def test_misuse_of_an_assay() -> None:
    adata = modality(SURFACE, list("abcd"), ["p", "q"])
    adata.obsm["x"], adata.obsm["none"] = SURFACE, np.zeros((4, 0))
    for match, arguments in (
        (r"Unknown kind of assay 'methylation'. Use one of 'protein', 'chromatin'", {"kind": "methylation"}),
        ("binary=True reads chromatin", {"kind": "protein", "binary": True}),
        (r"obsm='y' is not in adata.obsm. Known: none, x", {"kind": "protein", "obsm": "y"}),
        ("features= names 1 columns; adata.obsm.* has 2", {"kind": "protein", "obsm": "x", "features": ["p"]}),
        (r"obsm\['none'\] has no feature", {"kind": "protein", "obsm": "none"}),
        (r"obsm\['x'\] must have different names; 1 feature \(p\)", {"kind": "protein", "obsm": "x", "features": ["p", "p"]}),
        ("layer='raw' is not a layer", {"kind": "protein", "layer": "raw"}),
        ("present= needs one value for each of the 4 cells", {"kind": "protein", "present": np.ones(3, bool)}),
        ("present= needs one value", {"kind": "protein", "present": np.zeros(4, bool)}),
        ("size_factor must be positive", {"kind": "protein", "size_factor": np.zeros(4)}),
    ):
        with pytest.raises(ValueError, match=match):
            Assay.from_anndata(adata, **arguments)


def test_mismatched_cells_are_refused_unless_declared(rna: AnnData, surface: AnnData) -> None:
    with pytest.raises(ValueError, match=r"protein lacks 2 cells \(c, e\)"):
        Screen.from_mudata(together(rna=rna, adt=surface[:3]), protein="adt", **COLUMNS)
    with pytest.raises(ValueError, match=r"rna lacks 1 cell \(f\); protein lacks 2 cells .*missing='mask'"):
        Screen.from_mudata(together(rna=rna, adt=surface), protein="adt", **COLUMNS)
    screen = screen_of(rna)
    with pytest.raises(ValueError, match=r"'protein' lacks 2 cells \(c, e\) of the screen"):
        screen.with_assays({"protein": Assay.from_anndata(surface[:3], kind="protein")})
    with pytest.raises(ValueError, match=r"'protein' has 1 cell \(f\) that the screen does not"):
        screen.with_assays({"protein": Assay.from_anndata(surface, kind="protein")}, missing="mask")


def test_cells_without_any_assay_are_refused(rna: AnnData, surface: AnnData) -> None:
    whole = together(rna=rna, adt=surface)
    with pytest.raises(ValueError, match=r"1 cell \(f\) of mdata without any of the assays rna"):
        Screen.from_mudata(whole, missing="mask", **COLUMNS)
    screen = Screen.from_mudata(whole, protein="adt", missing="mask", **COLUMNS)
    with pytest.raises(ValueError, match=r"1 cell \(f\) without any assay"):
        screen.with_assays({})
    assert screen.with_rna.with_assays({}).assays == {}


def test_misuse_of_a_screen_of_assays(rna: AnnData, surface: AnnData) -> None:
    whole = together(rna=rna, adt=surface)
    for match, arguments in (
        ("protein='surface' is not a modality of mdata. Did you mean", {"protein": "surface"}),
        ("missing='drop' is neither 'error' nor 'mask'", {"protein": "adt", "missing": "drop"}),
        ("reads counts", {"protein": "adt", "values": "continuous"}),
    ):
        with pytest.raises(ValueError, match=match):
            Screen.from_mudata(whole, **arguments, **COLUMNS)
    with pytest.raises(TypeError, match=r"no argument 'perturbations'. .*'perturbation'"):
        Screen.from_mudata(whole, protein="adt", missing="mask", perturbations="gene")
    with pytest.raises(TypeError, match="reads a MuData; got AnnData"):
        Screen.from_mudata(rna)
    surface.obs.loc["b", "gene"] = "CD4"
    with pytest.raises(ValueError, match=r"disagree on gene of 1 cell \(b\)"):
        Screen.from_mudata(together(rna=rna, adt=surface), protein="adt", missing="mask", **COLUMNS)


def test_what_asks_about_rna_refuses_cells_without(rna: AnnData, surface: AnnData) -> None:
    screen = Screen.from_mudata(together(rna=rna, adt=surface), protein="adt", missing="mask", **COLUMNS)
    with pytest.raises(ValueError, match=r"1 of 6 cells have no RNA.*screen\.with_rna"):
        screen.pseudobulk()
    with pytest.raises(ValueError, match=r"Screen\.concat joins RNA"):
        Screen.concat({"x": screen.with_rna, "y": screen.with_rna})
    assert screen.with_rna.pseudobulk().assays == {}
    with pytest.raises(ValueError, match="this one holds continuous values"):
        screen.with_rna.pseudobulk().with_assays({"protein": screen.assays["protein"]})


@pytest.mark.usefixtures("unchecked")
def test_an_assay_is_named_by_a_word_and_read_first(rna: AnnData, surface: AnnData) -> None:
    screen = screen_of(rna)
    with pytest.raises(ValueError, match="one word such as 'protein'; got 'surface protein'"):
        screen.with_assays({"surface protein": Assay.from_anndata(surface[:3], kind="protein")}, missing="mask")
    with pytest.raises(TypeError, match=r"of type AnnData. Read it with pb\.Assay\.from_anndata"):
        screen.with_assays({"protein": surface})


def test_names_that_no_two_assays_share_are_noticed(rna: AnnData, surface: AnnData) -> None:
    other = surface.copy()
    other.obs_names = [f"{name}-1" for name in other.obs_names]
    other.obs["gene"] = ["NT", "KLF1", "NT", "NT"]
    with pytest.warns(UserWarning, match="No cell has two of the assays; cells are called 'a' in rna, 'd-1' in protein"):
        Screen.from_mudata(together(rna=rna, adt=other), protein="adt", missing="mask", **COLUMNS)


def test_masks_and_places_that_mean_two_things_are_refused(surface: AnnData) -> None:
    with pytest.raises(ValueError, match="present= is a mask of True and False; got values of type int64"):
        Assay.from_anndata(surface, kind="protein", present=np.arange(4))
    with pytest.raises(ValueError, match="features= names the columns of a matrix in obsm="):
        Assay.from_anndata(surface, kind="protein", features=["a", "b"])
    surface.obsm["x"] = np.ones((4, 2))
    with pytest.raises(ValueError, match="layer= and obsm= name two places"):
        Assay.from_anndata(surface, kind="protein", obsm="x", layer="y")
