"""Pairs of eq 5: as many as the paper counts, each on its path, observed or missing."""

import anndata
import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment import Screen, datasets
from perturbprob.experiment.paths import Pair, eq5


@pytest.fixture
def screen() -> Screen:
    """Three perturbations and two media beside the baseline, of which two combinations were not made."""
    made = [(p, m) for p in ("control", "A", "B", "C") for m in ("rest", "BMP4", "TGFB1") if (p, m) not in {("A", "BMP4"), ("C", "rest")}]
    labels = {"perturbation": [p for p, _ in made], "media": [m for _, m in made], "day": [1.0, 2.0] * 5}
    adata = anndata.AnnData(np.ones((10, 2)), obs=labels)
    adata.var_names = ["A", "B"]
    return Screen.from_anndata(adata, perturbation_type="knockout", media="media", baseline="rest", time="day")


@pytest.mark.filterwarnings("ignore:.*not in adata.var_names")
def test_there_are_as_many_pairs_as_the_paper_counts(screen):
    table = screen.layout.paths()
    assert len(table) == (3 + 1) * (2 + 1) == 12
    assert table.groupby("path").size().to_dict() == {1: 3 * 2, 2: 3, 3: 2, 4: 1}
    assert table.path.is_monotonic_increasing


@pytest.mark.filterwarnings("ignore:.*not in adata.var_names")
def test_pairs_are_observed_where_there_are_cells(screen):
    table = screen.layout.paths().set_index(["perturbation", "media"])
    assert list(table.index[~table.observed]) == [("A", "BMP4"), ("C", "rest")]
    assert table.cells.sum() == 10
    assert table.loc[("control", "rest"), "times"] == (1.0,)
    assert table.loc[("B", "TGFB1"), ["start", "done", "end"]].tolist() == ["X", "(B, TGFB1, t)", "X[TGFB1, t; B]"]
    assert table.loc[("control", "rest"), ["start", "done", "end"]].tolist() == ["X", "(·, ·, t)", "X[t]"]


@pytest.mark.filterwarnings("ignore:.*not in adata.var_names")
def test_pairs_of_assumptions_stand_behind(screen):
    more = Pair("SteadyState", 2, "A", "rest", "X[t; A]", "(·, ·, s)", "X[t; A]")
    table = screen.layout.paths([more])
    assert len(table) == 13
    assert table.iloc[-1].source == "SteadyState"
    assert table.iloc[-1].observed
    assert set(table.source[:-1]) == {"eq 5"}


def test_without_media_there_are_paths_2_and_4():
    assert {pair.path for pair in eq5(datasets.ishikawa2023())} == {2, 4}


def test_assumptions_themselves_may_be_given():
    screen = pb.simulate(n_cells=90, n_genes=8, n_perturbations=2, media=("rest", "drug"), seed=1).screen
    assumption = pb.SteadyState()
    assert screen.layout.paths([assumption]).equals(screen.layout.paths(assumption.pairs(screen)))
