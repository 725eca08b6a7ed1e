"""Whether the support of control grows (eq 24): known truths, noise, and bad input."""

import importlib.util
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest

import perturbprob as pb
from perturbprob.experiment.growing_support import outside


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The simulator and counts of benchmarks/pseudotime.py."""
    spec = importlib.util.spec_from_file_location("pseudotime_study", Path(__file__).parents[2] / "benchmarks/pseudotime.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def screen(study):
    """Stem cells on day 0, and cells of all progress on day 2."""
    early, late = study.branching(0, each=0, controls=200, early=0.3), study.branching(1, each=0, controls=300)
    adata = anndata.concat({"0": early, "2": late}, label="day", index_unique="-")
    return pb.Screen.from_anndata(adata, time="day", time_unit="day")


@pytest.fixture(scope="module")
def growth(screen):
    return pb.pseudotime.growing_support(screen)


def test_a_cell_is_outside_where_no_ball_holds_it():
    rng = np.random.default_rng(0)
    known, cells = rng.normal(size=(60, 3)), rng.normal(size=(80, 3)) * 2
    apart = np.linalg.norm(known[:, None] - known, axis=2)
    radius = np.sort(apart, axis=1)[:, 4]  # itself is the nearest
    expected = (np.linalg.norm(cells[:, None] - known, axis=2) > radius).all(axis=1).mean()
    assert outside(known, cells, 4) == pytest.approx(expected)
    assert outside(known, known, 4) == 0


@pytest.mark.parametrize("seed", range(3))
def test_growth_and_loss_are_told_apart(study, seed):
    found = {name: (grows, keeps) for name, grows, keeps in study.growth(seed)}
    assert found == {"same": (False, True), "spread": (True, True), "left": (True, False)}


def test_noise_is_that_of_as_many_cells(growth):
    row = growth.table.loc[2.0]
    assert row["cells"] == 100
    assert row["gain"] == pytest.approx(row["gained"] - row["gained_by_noise"])
    assert row["loss"] == pytest.approx(row["lost"] - row["lost_by_noise"])
    assert row["gain_lower"] < row["gain"] < row["gain_upper"]
    assert growth.table[["gained", "gained_by_noise", "lost", "lost_by_noise"]].stack().between(0, 1).all()


def test_the_report_says_it_in_words(growth):
    assert growth.report().startswith("From 0 to 2 day: ")
    assert "late cells lie outside the early ones" in growth.report()
    assert "the support does grow and does keep the early states." in repr(growth)
    assert growth.notes == ()


def test_one_seed_is_one_answer(screen, growth):
    again = pb.pseudotime.growing_support(screen)
    assert again.table.equals(growth.table)
    assert not pb.pseudotime.growing_support(screen, seed=1).table.equals(growth.table)


@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_perturbed_cells_have_no_part(study):
    adata = study.branching(0)
    adata.obs["day"] = np.arange(adata.n_obs) % 2
    screen = pb.Screen.from_anndata(adata, time="day")
    alone = screen[screen.cells_of("control")]
    tables = [pb.pseudotime.growing_support(part, n_splits=20).table for part in (screen, alone)]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_what_the_layout_leaves_open_is_said(study):
    adata = study.branching(0)
    adata.obs["day"] = np.arange(adata.n_obs) % 2
    adata.obs["lane"] = adata.obs["day"].map({0: "lane1", 1: "lane2"})
    screen = pb.Screen.from_anndata(adata, time="day", batch="lane")
    assert "a batch effect, too" in pb.pseudotime.growing_support(screen, n_splits=20).report()
    timed = pb.pseudotime.order(screen, "SLOW", n_bootstraps=0).screen(n_times=3)
    found = pb.pseudotime.growing_support(timed, n_splits=20)
    assert len(found.table) == 2
    assert "Times are pseudotimes" in found.report()


def test_what_cannot_be_asked(study, screen, unchecked):
    with pytest.raises(ValueError, match=r"single time, 1; growth shows between two.*pseudotime"):
        pb.pseudotime.growing_support(pb.Screen.from_anndata(study.branching(0)))
    with pytest.raises(ValueError, match="Only 30 control cells at day 0: at least 40"):
        pb.pseudotime.growing_support(screen[170:])
    with pytest.raises(ValueError, match="continuous values"):
        pb.pseudotime.growing_support(screen.pseudobulk())
    with pytest.raises(TypeError, match="A Screen is needed"):
        pb.pseudotime.growing_support(screen.counts)
    for settings in ({"k": 0}, {"k": 30}, {"n_splits": 5}, {"n_splits": True}, {"n_components": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a whole number"):
            pb.pseudotime.growing_support(screen, **settings)
    for level in (1.0, "0.9", np.nan):
        with pytest.raises(ValueError, match="level is a probability"):
            pb.pseudotime.growing_support(screen, level=level)


@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_a_screen_without_control_cells(study):
    adata = study.branching(0)
    adata.obs["day"] = np.arange(adata.n_obs) % 2
    screen = pb.Screen.from_anndata(adata, time="day")
    with pytest.raises(ValueError, match="no control cells"):
        pb.pseudotime.growing_support(screen[screen.cells_of("BLOCK")])
