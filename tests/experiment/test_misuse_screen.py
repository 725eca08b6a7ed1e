"""What is not a screen: every error and warning says what was found and what to do."""

import re
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from perturbprob.experiment import Screen, ScreenWarning

COUNTS = np.array([[3, 0, 1], [0, 2, 0], [5, 1, 0], [1, 4, 1]])
OBS = {
    "perturbation": ["control", "A", "A+B", "control"],
    "perturbation_type": ["control", "knockout", "knockout", "control"],
    "media": ["rest", "stim", "rest", "stim"],
    "time": [2.0, 2.0, 5.0, 5.0],
    "batch": ["L1", "L1", "L2", "L2"],
}
FORMS = pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])


def make(counts=COUNTS, **columns):
    """An AnnData of four cells and three genes."""
    obs = pd.DataFrame(OBS | columns, index=["c0", "c1", "c2", "c3"])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=["A", "B", "C"]))


def with_value(value, dtype=np.float64):
    """Counts whose cell c2 has this value for gene B."""
    counts = COUNTS.astype(dtype)
    counts[2, 1] = value
    return counts


def refuse(match, adata, **columns):
    """Expect an error that says this."""
    with pytest.raises(ValueError, match=match):
        Screen.from_anndata(adata, **columns)


def remarks(adata, **columns):
    """The warnings that reading a screen gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Screen.from_anndata(adata, **columns)
    assert {w.category for w in caught} <= {ScreenWarning}
    return [str(w.message) for w in caught]


# The AnnData.


def test_something_else_than_an_anndata():
    mdata = SimpleNamespace(mod={})
    with pytest.raises(TypeError, match="AnnData"):
        Screen.from_anndata(pd.DataFrame(COUNTS))
    with pytest.raises(TypeError, match="AnnData"):
        Screen.from_anndata(mdata)


@pytest.mark.parametrize("part", [np.s_[:0, :], np.s_[:, :0]])
def test_empty(part):
    refuse(r"adata is empty: \d cells × \d genes", make()[part].copy())


@pytest.mark.filterwarnings("ignore:(Observation|Variable) names are not unique")
def test_names_that_occur_twice():
    cells, genes = make(), make()
    cells.obs_names = ["c0", "c1", "c1", "c0"]
    genes.var_names = ["A", "B", "A"]
    refuse(r"2 cell names \(c1, c0\) occur more than once. Run adata.obs_names_make_unique\(\)", cells)
    refuse(r"1 gene name \(A\) occur more than once. Run adata.var_names_make_unique\(\)", genes)


# Columns.


@pytest.mark.parametrize("role", ["perturbation", "media", "time", "batch", "sgrna", "size_factor"])
def test_a_misspelt_column(role):
    refuse(rf"{role}='bacth' is not a column of adata.obs. Did you mean 'batch'\?", make(), **{role: "bacth"})


def test_a_missing_perturbation_column():
    adata = make()
    adata.obs = adata.obs.drop(columns="perturbation").rename(columns={"time": "day"})
    refuse("For a screen without perturbations pass perturbation=None", adata)


@pytest.mark.parametrize("role", ["perturbation", "media", "time", "batch", "sgrna", "size_factor"])
def test_a_cell_without_a_value(role):
    values = [1.0, np.nan, 2.0, 3.0] if role in ("time", "size_factor") else ["control", None, "A", "B"]
    match = rf"1 cell \(c1\) without a {role}: adata.obs\['x'\] is NaN.*adata = adata\[adata.obs\['x'\].notna\(\)\]"
    refuse(match, make(x=values), **{role: "x"})


def test_a_cell_whose_value_is_nan_as_text():
    refuse(r"1 cell \(c1\) without a batch.*~adata.obs\['x'\].isin\(\['nan'", make(x=["a", "nan", "b", "b"]), batch="x")


# Perturbations.


def test_no_control_cell():
    refuse(r"No control cell: adata.obs\['perturbation'\] holds 2 labels \(A, B\).*control='...'", make(perturbation=["A", "B", "A", "B"]))


@pytest.mark.usefixtures("unchecked")
def test_a_control_word_that_does_not_occur():
    refuse(r"control='contrl' does not occur in adata.obs\['perturbation'\]. Did you mean 'control'\?", make(), control="contrl")
    refuse(r"control= is the label of control cells, or a list of labels, as text; got 0\. Write control='0'", make(), control=0)
    refuse("control='AAVS1' does not occur", make(), control=["control", "AAVS1"])


def test_no_perturbation_type_is_not_taken_for_knockout():
    adata = make()
    del adata.obs["perturbation_type"]
    refuse(r"perturbation_type='perturbation_type' is neither a column .* Pass perturbation_type='knockout'", adata)
    refuse("holds nothing but NaN. .* Pass perturbation_type='knockout'", make(perturbation_type=[np.nan] * 4))
    refuse("Pass perturbation_type='knockout'", make(), perturbation_type=None)


def test_an_unknown_perturbation_type():
    refuse(r"perturbation_type='knokout' is neither.*Did you mean 'knockout'", make(), perturbation_type="knokout")
    adata = make(perturbation_type=["", "drug", "knockout", ""])
    refuse(r"Perturbation 'A': unknown perturbation_type 'drug'.*Knockout: knockout, CRISPR_knockout.*Activation: .*CRISPRa.*media=", adata)
    refuse("unknown perturbation_type 'control'", make(perturbation_type="control"))


def test_a_perturbed_cell_without_type():
    refuse(r"1 cell \(c1\) without a perturbation_type", make(perturbation_type=[np.nan, np.nan, "KO", np.nan]))


def test_types_that_are_not_one_or_one_for_each_gene():
    refuse("'A' names 1 genes, but its perturbation_type 'CRISPRi.CRISPRa' lists 2", make(), perturbation_type="CRISPRi+CRISPRa")


@pytest.mark.parametrize("types", ["CRISPRa+CRISPRi", "CRISPRi", "CRISPRa", "KO+CRISPRi"])
def test_a_gene_perturbed_twice(types):
    adata = make(perturbation=["NT", "A+A", "A+A", "NT"])
    refuse(r"Perturbation 'A\+A': .*\('A'\) and then .*\('A'\): a gene takes one perturbation", adata, perturbation_type=types)


# Media, time, size factor.


def test_media_without_their_baseline():
    refuse(r"Several media need a baseline: adata.obs\['media'\] holds 2 media \(rest, stim\). Pass baseline=", make(), media="media")
    refuse("baseline='resting' is not among the media: .* Did you mean 'rest'", make(), media="media", baseline="resting")
    refuse("baseline='rest' needs the column that it is in: pass media=", make(), baseline="rest")


def test_a_time_unit_without_time():
    refuse("time_unit='day' needs the column that it measures: pass time=", make(), time_unit="day")


def test_times_as_text_with_the_line_that_makes_them_numbers():
    adata = make(time=["day 2", "day 2", "day 5.5", "day 5.5"])
    with pytest.raises(ValueError, match="holds values such as 'day 2', not numbers of time units") as error:
        Screen.from_anndata(adata, time="time")
    fix = re.search(r"Make them numbers: (.*)\.$", str(error.value)).group(1)
    exec(fix, {"adata": adata})
    assert Screen.from_anndata(adata, time="time").times == (2.0, 5.5)


@pytest.mark.parametrize("kind", ["date", "duration"])
def test_dates_and_durations_with_the_line_that_makes_them_numbers(kind):
    days = pd.to_timedelta([0, 0, 3, 3], unit="D")
    adata = make(time=days if kind == "duration" else pd.Timestamp("2024-01-01") + days)
    with pytest.raises(ValueError, match="not numbers of time units") as error:
        Screen.from_anndata(adata, time="time")
    exec(re.search(r"Make them numbers: (.*)\.$", str(error.value)).group(1), {"adata": adata, "pd": pd})
    assert Screen.from_anndata(adata, time="time").times == (0.0, 3.0)


def test_truth_values_are_no_times():
    refuse("not numbers of time units", make(time=[True, False, True, True]), time="time")


@pytest.mark.parametrize("time", [-1.0, np.inf])
def test_times_below_0_or_infinite(time):
    refuse(r"holds 1 time \(.*\) below 0 or infinite, in 2 cells", make(time=[time, 2.0, 2.0, time]), time="time")


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_size_factors_that_are_not_positive_and_finite(value):
    refuse(r"size_factor must be positive and finite: 1 cell \(c1\)", make(depth=[1.0, value, 1.0, 1.0]), size_factor="depth")
    refuse(r"size_factor must be positive and finite: 1 cell \(c1\)", make(), size_factor=[1.0, value, 1.0, 1.0])


def test_size_factors_that_are_no_numbers():
    refuse("size_factor must be positive and finite: 4 cells .* such as nan", make(), size_factor="media")


def test_size_factors_of_other_cells():
    refuse(r"shape \(2,\); it needs one number for each of the 4 cells", make(), size_factor=[1.0, 2.0])
    refuse("positive and finite: 2 cells", make(), size_factor=pd.Series(1.0, index=["c0", "c1", "d2", "d3"]))


def test_size_factors_without_a_single_count():
    refuse("adata.X holds no count at all", make(np.zeros_like(COUNTS)), size_factor=np.ones(4))


# Counts.


@FORMS
def test_log_normalised_counts_with_the_line_that_restores_them(form):
    adata = make(form(np.log1p(COUNTS)))
    with pytest.raises(ValueError, match=r"adata.X holds non-integer values such as 0.6931, 1.\d+, 1.\d+ \(log-normalised\?\)") as error:
        Screen.from_anndata(adata)
    exec(re.search(r"restore them with (.*)\.$", str(error.value)).group(1), {"adata": adata, "np": np})
    np.testing.assert_array_equal(Screen.from_anndata(adata).counts.toarray(), COUNTS)


@FORMS
def test_log_normalised_counts_name_the_place_of_raw_ones(form):
    adata = make(form(np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)))
    refuse(r"\(log-normalised\?\).*pass layer= with the layer that holds them", adata)
    adata.raw = make(form(COUNTS))
    refuse(r"pass adata.raw.to_adata\(\)", adata)
    assert Screen.from_anndata(adata.raw.to_adata()).n_cells == 4
    adata.layers["scaled"], adata.layers["umi"] = form(adata.X * 1.0), form(COUNTS)
    refuse("Screen needs raw counts: pass layer='umi'", adata)


def test_a_layer_that_is_not_counts_where_x_is():
    adata = make()
    adata.layers["log"] = np.log1p(COUNTS)
    refuse(r"adata.layers\['log'\] holds non-integer values.*adata.X holds whole numbers: leave layer= out", adata, layer="log")


@FORMS
def test_scaled_counts(form):
    scaled = (COUNTS - COUNTS.mean(0)) / COUNTS.std(0)
    refuse(r"non-integer and negative values such as -\d.* \(scaled\?\). Screen needs raw counts", make(form(scaled)))


@FORMS
def test_counts_of_a_common_depth(form):
    refuse(r"\(normalised to a common depth\?\)", make(form(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)))


@FORMS
def test_counts_with_rounding_errors(form):
    refuse(r"such as 2.00\d+ \(rounding errors\?\). Round them: adata.X = np.rint\(adata.X\)", make(form(COUNTS + 1e-4 * (COUNTS == 2))))


@FORMS
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_counts_that_are_nan_or_infinite(form, value, what):
    refuse(f"adata.X holds 1 {what} counts, first in cell 'c2', gene 'B'", make(form(with_value(value))))


@FORMS
def test_negative_counts(form):
    refuse("adata.X holds 1 negative counts such as -3, first in cell 'c2', gene 'B'", make(form(with_value(-3))))


def test_negative_counts_of_a_small_type():
    refuse("Type int8 ends at 127: did larger counts overflow", make(with_value(-56, np.int8)))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32, np.float64])
def test_counts_beyond_single_precision(dtype):
    refuse("holds a count of 16,777,217, in cell 'c2', gene 'B'. Above 2.*24 = 16,777,216", make(with_value(2**24 + 1, dtype)))
    assert Screen.from_anndata(make(with_value(2**24, dtype))).counts.max() == 2**24
    two = with_value(2**25, dtype)
    two[0, 0] = 2**24 + 1
    refuse("holds a count of 33,554,432, in cell 'c2', gene 'B'", make(two))


def test_counts_of_no_numeric_type():
    adata = make()
    adata.layers["text"] = COUNTS.astype(str).astype(object)
    refuse(r"adata.layers\['text'\] holds values of type object, not counts", adata, layer="text")


def test_a_misspelt_layer():
    adata = make()
    adata.layers["counts"] = COUNTS
    refuse(r"layer='count' is not a layer of adata. Did you mean 'counts'\?", adata, layer="count")
    adata.X = None
    refuse(r"adata.X is empty. Pass layer= .* Did you mean 'counts'\?", adata)


@FORMS
def test_a_cell_without_counts_with_the_line_that_removes_it(form):
    adata = make(form(COUNTS * np.array([[1], [1], [0], [1]])))
    with pytest.raises(ValueError, match=r"1 cell \(c2\) without any count in adata.X: remove them") as error:
        Screen.from_anndata(adata)
    left = {"adata": adata, "np": np}
    exec(re.search(r"remove them: (.*)\.$", str(error.value)).group(1), left)
    assert Screen.from_anndata(left["adata"]).n_cells == 3


# Warnings: the screen is valid.


def test_a_gene_without_counts_is_kept_and_said_once():
    adata = make(COUNTS * np.array([1, 1, 0]))
    [said] = remarks(adata)
    assert re.match(r"1 gene \(C\) without any count. Kept", said)
    left = {"adata": adata, "np": np}
    exec(re.search(r"drop them: (.*)\.$", said).group(1), left)
    assert remarks(left["adata"]) == []


def test_a_perturbed_gene_that_is_not_measured_is_allowed_and_said_once():
    [said] = remarks(make(perturbation=["NT", "A+GATA1", "GATA1", "NT"]))
    assert re.match(r"1 perturbed gene \(GATA1\) not in adata.var_names. Allowed", said)


def test_a_batch_without_control_is_said():
    [said] = remarks(make(perturbation=["NT", "A", "B", "A+B"]), perturbation_type="KO", batch="batch")
    assert re.match(r"1 batch \(L2\) without control cells", said)


def test_a_baseline_that_no_cell_is_in_is_said():
    [said] = remarks(make(media=["stim"] * 4), media="media", baseline="rest")
    assert re.match("No cell is in the baseline media 'rest'; all are in 'stim'", said)


def test_a_clean_screen_gives_no_warning():
    assert remarks(make(), media="media", baseline="rest", time="time", batch="batch") == []


# Parts.


def test_cells_that_are_not_there():
    screen = Screen.from_anndata(make())
    for cells, error, match in (
        ([], ValueError, "No cell is left"),
        (np.zeros(4, dtype=bool), ValueError, "No cell is left"),
        (np.array([True, False]), ValueError, r"mask has shape \(2,\); it needs one value for each of the 4 cells"),
        ([4], IndexError, "out of bounds"),
        ([0.5], TypeError, "Choose cells by a mask, indices, a slice or names"),
        (["c0", "c9"], ValueError, r"1 name \(c9\) of no cell of this screen. Did you mean 'c"),
    ):
        with pytest.raises(error, match=match):
            screen[cells]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("index", [(slice(None), ["A", "B"]), (slice(None), slice(2)), (slice(None), "A"), ([0, 1], [0])])
def test_genes_are_not_chosen_in_a_screen(index):
    with pytest.raises(TypeError, match=r"indexed by cells alone.*got a tuple of 2\. Select genes in the AnnData first"):
        Screen.from_anndata(make())[index]


@pytest.mark.usefixtures("unchecked")
def test_a_tuple_of_names_or_numbers_means_cells():
    screen = Screen.from_anndata(make())
    assert screen["c0", "c3"].cells.tolist() == screen[0, 3].cells.tolist() == ["c0", "c3"]


def test_conditions_that_are_not_there():
    screen = Screen.from_anndata(make())
    with pytest.raises(ValueError, match=r"No cell of this screen has the perturbation 'A\+C'. Did you mean 'A\+B'"):
        screen.cells_of("A+C")
    condition = screen.conditions[1] >> screen.conditions[1].actions[-1]
    with pytest.raises(ValueError, match=r"has the condition \"Knockout\('A'\) >> Wait\(2\)\". Did you mean"):
        screen.cells_of(condition)
