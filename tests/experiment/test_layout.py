"""The layout of a screen: what is seen how often, and what cannot be told apart."""

from itertools import product

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbprob.experiment import Layout, Screen, ScreenWarning, datasets

COLUMNS = {"perturbation_type": "knockout", "media": "media", "baseline": "rest", "time": "time", "batch": "batch"}


def screen_of(rows, **columns):
    """A screen with one cell for each (perturbation, media, time, batch)."""
    obs = pd.DataFrame(rows, columns=["perturbation", "media", "time", "batch"], index=[f"cell{i}" for i in range(len(rows))])
    adata = anndata.AnnData(np.ones((len(rows), 2), dtype=np.float32), obs=obs, var=pd.DataFrame(index=["A", "B"]))
    return Screen.from_anndata(adata, **(COLUMNS | columns))


def crossed(batch_of=lambda p, m, t: ("L1", "L2")):
    """Every condition of two perturbations, media and times, in the batches that the function names."""
    conditions = product(["control", "A"], ["rest", "stim"], [1.0, 2.0])
    return [(*condition, batch) for condition in conditions for batch in batch_of(*condition)]


def test_ishikawa_has_one_library_a_day():
    layout = datasets.ishikawa2023().layout
    assert layout.confounded() == [("time", "batch")]
    assert layout.nested() == []
    assert layout.batches_without_control() == ()
    report = layout.report()
    assert "cells: 14,945; conditions: 96 (perturbations: 23 and control; media: 1; times: 4); batches: 4" in report
    assert "time and batch are fully confounded: every batch holds one time and every time one batch" in report
    assert "a change over time cannot be told from a batch effect" in report
    assert "cells per condition: 21 to 480, median 122" in report
    assert "fewer than 30 cells: 2; fewest: VENTX, hiPSC_maintenance, 2 day: 21" in report


def test_papalexi_is_crossed(data_path):
    columns = {"media": "media", "time": "time", "batch": "batch"}
    with pytest.warns(ScreenWarning, match="16 perturbed genes .* not in adata.var_names"):
        screen = datasets.load(data_path("papalexi2021_thp1_eccite.h5ad"), **columns)
    assert (screen.layout.confounded(), screen.layout.nested()) == ([], [])
    assert "fully confounded factors: none" in screen.layout.report()


def test_a_crossed_screen_confounds_nothing():
    layout = screen_of(crossed()).layout
    assert (layout.confounded(), layout.nested(), layout.batches_without_control()) == ([], [], ())


def test_each_factor_may_be_confounded_with_batch():
    for factor, batch_of in {
        "media": lambda p, m, t: [f"lane_{m}"],
        "time": lambda p, m, t: [f"lane_{t}"],
    }.items():
        layout = screen_of(crossed(batch_of)).layout
        assert layout.confounded() == [(factor, "batch")]
        assert f"{factor} and batch are fully confounded" in layout.report()


def test_perturbation_confounded_with_batch_lacks_controls():
    with pytest.warns(ScreenWarning, match="1 batch .lane_A. without control cells"):
        layout = screen_of(crossed(lambda p, m, t: [f"lane_{p}"])).layout
    assert layout.confounded() == [("perturbation", "batch")]
    assert layout.batches_without_control() == ("lane_A",)
    assert "batches without control cells: lane_A" in layout.report()


def test_two_batches_a_time_are_nested_not_confounded():
    layout = screen_of(crossed(lambda p, m, t: [f"{t}a", f"{t}b"])).layout
    assert (layout.confounded(), layout.nested()) == ([], [("batch", "time")])
    assert (
        "batch is nested in time: every batch holds one time, so a change over time is told from a batch effect only by" in layout.report()
    )


def test_a_factor_with_one_level_is_confounded_with_nothing():
    layout = screen_of([row for row in crossed() if row[2] == 1.0 and row[3] == "L1"]).layout
    assert (layout.confounded(), layout.nested()) == ([], [])


def test_a_part_of_a_screen_has_its_own_layout():
    screen = screen_of(crossed())
    diagonal = [screen.times.index(screen.conditions[c].time) == b for c, b in zip(screen.condition, screen.batch, strict=True)]
    assert screen[diagonal].layout.confounded() == [("time", "batch")]


cells = st.tuples(
    st.sampled_from(["control", "A", "B"]), st.sampled_from(["rest", "stim"]), st.sampled_from([1.0, 2.0]), st.sampled_from("xyz")
)


@given(st.lists(cells, min_size=1, max_size=12))
@pytest.mark.filterwarnings("ignore::perturbprob.experiment.screen.ScreenWarning")
def test_confounded_factors_are_one_to_one_in_the_cells(rows):
    rows = [("control", "rest", 1.0, "x"), *rows]
    layout = screen_of(rows).layout
    levels = dict(zip(["perturbation", "media", "time", "batch"], zip(*rows, strict=True), strict=True))
    for a, b in layout.confounded():
        assert len(set(levels[a])) == len(set(levels[b])) == len(set(zip(levels[a], levels[b], strict=True))) > 1
    for inner, outer in layout.nested():
        assert len(set(zip(levels[inner], levels[outer], strict=True))) == len(set(levels[inner])) > len(set(levels[outer])) > 1
    assert layout.cells.to_numpy().sum() == len(rows)


def test_the_report_names_conditions_with_few_cells():
    layout = screen_of([("control", "rest", 1.0, "x")] * 5 + [("A", "rest", 1.0, "x")] * 2, time_unit="h").layout
    assert "conditions with fewer than 3 cells: 1; fewest: A, rest, 1 h: 2" in layout.report(few=3)
    assert "conditions with fewer than 2 cells: none" in layout.report(few=2)
    assert "perturbations: 1 and control" in layout.report()


def test_repr_is_the_report_and_html_has_the_table():
    screen = screen_of(crossed())
    layout = Layout(screen)
    assert repr(layout) == layout.report() == screen.layout.report()
    assert "<table" in layout._repr_html_()
    pd.testing.assert_frame_equal(layout.cells, screen.summary())
