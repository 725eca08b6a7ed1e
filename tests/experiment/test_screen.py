"""Screens: however counts and columns are written, the same screen is read, and the AnnData stays as it was."""

import subprocess
import sys
import warnings
from itertools import product

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import perturbprob as pb
from perturbprob.experiment import Activation, Interference, Knockout, Media, Protocol, Screen, Wait, datasets

COUNTS = np.array([[3, 0, 1], [0, 2, 0], [5, 1, 0], [1, 1, 1], [0, 0, 7], [2, 2, 2]])
OBS = {
    "perturbation": ["control", "A", "A+B", "control", "B", "B+A"],
    "perturbation_type": ["none", "KO", "KO", np.nan, "CRISPRi", "KO"],
    "media": ["rest", "stim", "rest", "stim", "rest", "rest"],
    "day": [2.0, 2.0, 5.0, 5.0, 2.0, 5.0],
    "lane": ["L2", "L1", "L1", "L1", "L2", "L2"],
    "spacer": ["s0", "s1", "s2", "s0", "s3", "s2"],
    "empty": [np.nan] * 6,
}
COLUMNS = {"media": "media", "baseline": "rest", "time": "day", "time_unit": "day", "batch": "lane", "sgrna": "spacer"}


def make(counts=COUNTS, **columns):
    """An AnnData of six cells and three genes."""
    cells, genes = [f"cell{i}" for i in range(counts.shape[0])], ["A", "B", "C"]
    return anndata.AnnData(counts, obs=pd.DataFrame(OBS | columns, index=cells), var=pd.DataFrame(index=genes))


def dense(screen):
    """The counts as an array."""
    return screen.counts.toarray()


def labelled(labels, **arguments):
    """The conditions of six cells with these labels."""
    screen = Screen.from_anndata(make(perturbation=labels), **({"perturbation_type": "knockout"} | arguments))
    return [screen.conditions[i] for i in screen.condition]


def untimed(*actions):
    """The protocol of a cell in a screen without times."""
    return Protocol([*actions, Wait(1)])


# What is read.


def test_a_cell_has_its_protocol_batch_sgrna_and_size_factor():
    screen = Screen.from_anndata(make(), **COLUMNS)
    assert [screen.conditions[i] for i in screen.condition] == [
        Protocol([Wait(2)]),
        Knockout("A") >> Media("stim") >> Wait(2),
        Knockout("A") >> Knockout("B") >> Wait(5),
        Media("stim") >> Wait(5),
        Interference("B") >> Wait(2),
        Knockout("A") >> Knockout("B") >> Wait(5),
    ]
    assert [screen.batches[i] for i in screen.batch] == OBS["lane"]
    assert (screen.batches, list(screen.sgrna), screen.time_unit, screen.baseline) == (("L1", "L2"), OBS["spacer"], "day", "rest")
    np.testing.assert_allclose(screen.size_factor, COUNTS.sum(1) / np.median(COUNTS.sum(1)))
    assert (screen.genes, list(screen.cells)) == (("A", "B", "C"), [f"cell{i}" for i in range(6)])
    assert (screen.perturbations, screen.media, screen.times) == (("A", "A+B", "B"), ("rest", "stim"), (2.0, 5.0))


def test_conditions_stand_control_first_then_by_perturbation_media_and_time():
    screen = Screen.from_anndata(make(), **COLUMNS)
    keys = [(p.perturbation != "control", p.perturbation, p.media or "", p.time) for p in screen.conditions]
    assert keys == sorted(keys)
    assert keys[0][0] is False
    assert sorted(set(screen.condition)) == list(range(len(screen.conditions)))


def test_without_columns_all_cells_share_one_media_wait_and_batch():
    screen = Screen.from_anndata(make(), perturbation_type="KO")
    assert (screen.media, screen.times, screen.batches) == (("baseline",), (1.0,), ("batch",))
    assert (screen.time_unit, screen.baseline, screen.sgrna) == (None, None, None)


def test_a_column_of_nothing_but_nan_is_absent():
    gaps = dict.fromkeys(("media", "time", "batch", "sgrna", "size_factor"), "empty")
    screen, plain = Screen.from_anndata(make(), **gaps), Screen.from_anndata(make())
    assert screen.conditions == plain.conditions
    assert (screen.batches, screen.sgrna) == (("batch",), None)
    np.testing.assert_array_equal(screen.size_factor, plain.size_factor)


@pytest.mark.parametrize("perturbation", [None, "empty"])
def test_a_screen_of_media_or_time_only_needs_no_perturbation_type(perturbation):
    adata = make()
    del adata.obs["perturbation_type"]
    media = Screen.from_anndata(adata, perturbation=perturbation, media="media", baseline="rest")
    assert media.conditions == (untimed(), untimed(Media("stim")))
    time = Screen.from_anndata(adata, perturbation=perturbation, time="day")
    assert time.conditions == (Protocol([Wait(2)]), Protocol([Wait(5)]))
    assert (time.perturbations, time.layout.batches_without_control()) == ((), ())


def test_one_condition_is_a_screen():
    screen = Screen.from_anndata(make(perturbation=["control"] * 6, perturbation_type=["-"] * 6))
    assert screen.conditions == (untimed(),)


# Conventions of labels.


@pytest.mark.parametrize(
    "word", ["control", "Control", "CTRL", "non-targeting", "non_targeting", "Non Targeting", "NT", "ntc", "", " ", "ctrl+ctrl"]
)
def test_usual_words_for_control(word):
    assert labelled([word, "A", "A", "B", "B", "B"])[0] == untimed()


@pytest.mark.parametrize("control", ["AAVS1", ["AAVS1", "safe"], ["SAFE", "aavs1"]])
def test_the_users_words_for_control(control):
    found = labelled(["AAVS1", "AAVS1+A", "B", "NT", "AAVS1+NT", "safe" if len(control) == 2 else "NT"], control=control)
    assert found == [untimed(), untimed(Knockout("A")), untimed(Knockout("B")), untimed(), untimed(), untimed()]


def test_combinations_of_any_number_and_order():
    found = labelled(["A+ctrl", "ctrl+A", "A + B", "B+A", "A+A", "ctrl"])
    both = untimed(Knockout("A"), Knockout("B"))
    assert found == [untimed(Knockout("A")), untimed(Knockout("A")), both, both, untimed(Knockout("A")), untimed()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # D and E are not measured
        three = labelled(["A+D+E", "E+A+D", "NT", "NT", "NT", "HLA_A"])
    assert three[0] == three[1] == untimed(Knockout("A"), Knockout("D"), Knockout("E"))
    assert three[5] == untimed(Knockout("HLA_A"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Knockout, ["knockout", "CRISPR_knockout", "CRISPR-cas9", "crisprn", "KO", "Cas9"]),
        (Interference, ["interference", "CRISPRi", "CRISPR interference", "knockdown"]),
        (Activation, ["activation", "CRISPRa", "CRISPR-activation", "overexpression"]),
    ],
)
def test_synonyms_of_perturbation_types(kind, words):
    for word in words:
        constant = labelled(["NT", "A", "A", "A", "A", "A"], perturbation_type=word)
        column = Screen.from_anndata(make(perturbation=["NT", *"AAAAA"], how=["-", *[word] * 5]), perturbation_type="how")
        assert constant[1] == untimed(kind("A")) == column.conditions[1]


def test_a_type_may_list_one_word_for_each_gene():
    found = labelled(["NT", "A+B", "A+B", "A+B", "A+B", "A+B"], perturbation_type="CRISPRi+CRISPRa")
    assert found[1] == untimed(Interference("A"), Activation("B"))
    adata = make(perturbation=["NT", *["A+ctrl"] * 5], perturbation_type=["NT", *["CRISPRa+control"] * 5])
    assert Screen.from_anndata(adata).conditions[1] == untimed(Activation("A"))


@given(st.lists(st.sampled_from(["NT", "A", "B", "C", "A+B", "B+A", "C+ctrl"]), min_size=5, max_size=5))
def test_cells_are_equal_in_protocol_when_they_are_in_genes(labels):
    found = labelled(["NT", *labels])
    expected = [frozenset(label.split("+")) - {"NT", "ctrl"} for label in ["NT", *labels]]
    assert [frozenset(a.gene for a in p.perturbations) for p in found] == expected


# Conventions of media, time and batch.


def test_a_single_media_is_the_baseline():
    screen = Screen.from_anndata(make(media=["mTeSR"] * 6), media="media")
    assert (screen.baseline, screen.media) == ("mTeSR", ("mTeSR",))
    assert all(p.media is None for p in screen.conditions)


def test_media_stand_baseline_first():
    assert Screen.from_anndata(make(), media="media", baseline="stim").media == ("stim", "rest")


@pytest.mark.parametrize("days", [[0, 1, 1, 2, 2, 2], ["0", "1", "1.0", " 2", "2", "2e0"], pd.Categorical([0, 1, 1, 2, 2, 2])])
def test_numbers_are_times_whatever_their_type(days):
    screen = Screen.from_anndata(make(day=days), time="day")
    assert [screen.conditions[i].time for i in screen.condition] == [0, 1, 1, 2, 2, 2]


def test_single_precision_times_keep_their_decimals():
    assert Screen.from_anndata(make(day=np.float32([0.1, 0.1, 0.3, 0.3, 7.7, 7.7])), time="day").times == (0.1, 0.3, 7.7)


def test_batches_that_are_numbers_stand_in_their_order():
    screen = Screen.from_anndata(make(lane=[10, 9, 9, 9, 10, 10]), batch="lane")
    assert screen.batches == ("9", "10")
    assert screen.batch.tolist() == [1, 0, 0, 0, 1, 1]


def test_a_constant_batch_column_is_one_batch():
    assert Screen.from_anndata(make(lane=["x"] * 6), batch="lane").batches == ("x",)


@pytest.mark.parametrize("given_as", ["column", "array", "shuffled series"])
def test_size_factors_of_the_user(given_as):
    factor = np.array([0.5, 1, 1, 1, 2, 3])
    adata = make(depth=factor)
    source = {"column": "depth", "array": factor, "shuffled series": adata.obs["depth"].sample(frac=1, random_state=1)}[given_as]
    np.testing.assert_array_equal(Screen.from_anndata(adata, size_factor=source).size_factor, factor)


# Counts.


TYPES = ["bool", "uint8", "int8", "uint16", "int32", "int64", "uint64", "float32", "float64"]
FORMS = [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array]


@pytest.mark.parametrize(("dtype", "form"), [*product(TYPES, FORMS), ("float16", np.asarray)])
def test_counts_of_any_type_and_form(dtype, form):
    expected = COUNTS.astype(dtype)
    screen = Screen.from_anndata(make(form(expected)))
    assert isinstance(screen.counts, sp.csr_array)
    assert screen.counts.dtype == np.float32
    assert screen.counts.has_canonical_format
    assert screen.counts.nnz == np.count_nonzero(expected)
    np.testing.assert_array_equal(dense(screen), expected.astype(np.float32))


def test_counts_from_a_layer():
    adata = make(np.log1p(COUNTS))
    adata.layers["raw"] = COUNTS
    np.testing.assert_array_equal(dense(Screen.from_anndata(adata, layer="raw")), COUNTS)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_counts_of_a_backed_file(tmp_path, form):
    make(form(COUNTS.astype(np.float32))).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    np.testing.assert_array_equal(dense(Screen.from_anndata(backed)), COUNTS)
    np.testing.assert_array_equal(dense(Screen.from_anndata(backed[[0, 2, 5]])), COUNTS[[0, 2, 5]])
    assert backed.isbacked


def test_duplicate_entries_add_up_beyond_their_type():
    rows, columns = np.arange(6), [0, 1, 2, 0, 1, 2]
    twice = sp.coo_matrix((np.full(12, 200, dtype=np.uint8), ([*rows, *rows], [*columns, *columns])), shape=(6, 3))
    adata = make()
    adata.layers["twice"] = sp.csr_matrix((np.full(12, 200, dtype=np.uint8), np.repeat(columns, 2), np.arange(0, 13, 2)), shape=(6, 3))
    np.testing.assert_array_equal(dense(Screen.from_anndata(adata, layer="twice")), twice.astype(float).toarray())


def test_counts_are_a_copy():
    adata = make(sp.csr_matrix(COUNTS.astype(np.float32)))
    screen = Screen.from_anndata(adata)
    adata.X.data[:] = -1
    adata.X.indices[:] = 0
    np.testing.assert_array_equal(dense(screen), COUNTS)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("view", [False, True])
def test_the_anndata_stays_as_it_was(form, view):
    adata = make(form(COUNTS.astype(np.float64)), media=pd.Categorical(OBS["media"], categories=["stim", "rest", "unused"]))
    adata = adata[:-1] if view else adata
    before = adata.copy()
    Screen.from_anndata(adata, **COLUMNS)
    assert adata.is_view == view
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert (type(adata.X), adata.X.dtype) == (type(adata.X if view else before.X), before.X.dtype)
    np.testing.assert_array_equal(np.asarray(sp.csr_matrix(adata.X).todense()), np.asarray(sp.csr_matrix(before.X).todense()))
    assert (list(adata.uns), list(adata.layers)) == ([], list(before.layers))


# Parts of a screen.


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_a_part_keeps_what_each_cell_is(index):
    screen = Screen.from_anndata(make(), **COLUMNS)
    part = screen[index]
    np.testing.assert_array_equal(dense(part), COUNTS[index])
    assert [part.conditions[i] for i in part.condition] == [screen.conditions[screen.condition[i]] for i in index]
    assert [part.batches[i] for i in part.batch] == [screen.batches[screen.batch[i]] for i in index]
    assert (list(part.cells), list(part.sgrna)) == (list(screen.cells[index]), list(screen.sgrna[index]))
    np.testing.assert_array_equal(part.size_factor, screen.size_factor[index])
    assert (part.genes, part.baseline, part.time_unit) == (screen.genes, screen.baseline, screen.time_unit)
    assert set(part.condition) == set(range(len(part.conditions)))
    assert list(part.conditions) == [c for c in screen.conditions if c in part.conditions]


def test_a_part_by_mask_indices_slice_or_names_is_the_same():
    screen = Screen.from_anndata(make(), **COLUMNS)
    mask = np.array([False, True, False, True, False, False])
    for cells in (
        mask,
        pd.Series(mask),
        list(mask),
        [1, 3],
        np.array([1, -3]),
        slice(1, 4, 2),
        ["cell1", "cell3"],
        pd.Index(["cell1", "cell3"]),
    ):
        assert list(screen[cells].cells) == ["cell1", "cell3"]
    assert screen[4].n_cells == 1


def test_a_mask_with_names_of_cells_is_taken_by_these():
    screen = Screen.from_anndata(make(), **COLUMNS)
    mask = pd.Series([False, True, False, True, False, False], screen.cells)
    assert list(screen[mask.iloc[::-1]].cells) == ["cell1", "cell3"]
    with pytest.raises(ValueError, match=r"The mask is a Series with names of cells, and needs one value for each cell of the .*; 2 cells"):
        screen[mask.iloc[:4]]
    with pytest.raises(ValueError, match="some cells have two"):
        screen[pd.concat([mask, mask])]


def test_cells_of_a_condition_or_a_perturbation():
    screen = Screen.from_anndata(make(), **COLUMNS)
    for condition, cells in {
        "control": [0, 3],
        "NT": [0, 3],
        "A": [1],
        "A+B": [2, 5],
        "B+A": [2, 5],
        Knockout("B") >> Knockout("A") >> Wait(5): [2, 5],
        Knockout("A") >> Knockout("B") >> Media("rest") >> Wait(5): [2, 5],
        Protocol([Wait(2)]): [0],
        Media("stim") >> Wait(5): [3],
    }.items():
        assert screen.cells_of(condition).tolist() == cells


def test_the_summary_counts_every_cell_once():
    screen = Screen.from_anndata(make(), **COLUMNS)
    table = screen.summary()
    assert table.index.names == ["perturbation", "media", "time"]
    assert (table.columns.tolist(), table.columns.name) == (["L1", "L2"], "batch")
    assert table.loc[("A+B", "rest", 5.0)].tolist() == [1, 1]
    assert table.loc[("control", "rest", 2.0)].tolist() == [0, 1]
    assert table.to_numpy().sum() == 6
    np.testing.assert_array_equal(table.sum(axis=1), np.bincount(screen.condition))


def test_repr_names_what_there_is():
    screen = Screen.from_anndata(make(), **COLUMNS)
    assert repr(screen).splitlines() == [
        "Screen: 6 cells × 3 genes, 5 conditions",
        "  perturbations: A, A+B, B, control",
        "  media: rest, stim",
        "  times: 2, 5 day",
        "  batches: L1, L2",
    ]
    assert "no control" in repr(screen[[1, 2]])


def test_html_has_the_cell_table_and_escapes_names():
    page = Screen.from_anndata(make(lane=["<b>"] * 6), batch="lane")._repr_html_()
    assert "<table" in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_a_screen_cannot_be_changed():
    screen = Screen.from_anndata(make())
    with pytest.raises(AttributeError, match="cannot assign"):
        screen.genes = ()


def test_a_large_screen_is_read_by_combination_not_by_cell(monkeypatch):
    made = []
    init = Protocol.__init__
    monkeypatch.setattr(Protocol, "__init__", lambda self, actions=(): (made.append(1), init(self, actions))[1])
    datasets.ishikawa2023()
    assert len(made) < 1000


def test_reading_a_screen_needs_neither_scanpy_nor_matplotlib():
    code = "import sys, perturbprob.experiment.screen; print(*[m for m in ('scanpy', 'matplotlib', 'mudata') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_nontargeting_cells_may_be_a_perturbation_of_their_own():
    adata = anndata.AnnData(np.array([[3, 1], [0, 2], [5, 1], [1, 1]]), obs={"gene": ["unedited", "NT", "A", "A+NT"]})
    adata.var_names = ["A", "B"]
    how = {"perturbation": "gene", "perturbation_type": "knockout", "control": "unedited"}
    usual, own = (Screen.from_anndata(adata, **how, nontargeting=word) for word in ("control", "perturbation"))
    assert usual.perturbations == ("A",)
    assert own.perturbations == ("A", "A+NT", "NT")
    assert own.cells_of("NT").tolist() == [1]
    assert own.cells_of("control").tolist() == [0]
    with pytest.raises(ValueError, match=r"nontargeting='stress': .* 'control' or as a 'perturbation'"):
        Screen.from_anndata(adata, **how, nontargeting="stress")


@pytest.mark.filterwarnings("ignore:The screen has one batch")
def test_a_cell_without_counts_in_a_panel_stays_where_its_depth_is_known():
    adata = anndata.AnnData(np.array([[0, 0], [2, 1], [0, 3]], np.float32), obs={"perturbation": ["control", "A", "A"]})
    adata.var_names = ["A", "B"]
    with pytest.raises(ValueError, match=r"stay where their depth is known .* 1 cell .* without any count in adata.X"):
        Screen.from_anndata(adata, perturbation_type="knockout")
    screen = Screen.from_anndata(adata, perturbation_type="knockout", size_factor=np.array([1.0, 1.2, 0.8]))
    assert screen.n_cells == 3
    fit = pb.fit(pb.node(screen, 1), screen, epochs=1, progress=False)
    assert np.isfinite(pb.log_density(fit, screen, particles=3, n_draws=2, progress=False)).all()
