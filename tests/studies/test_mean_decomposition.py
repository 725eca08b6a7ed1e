"""The two-way split of means: against a regression, on two studies, and with what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

import perturbprob as pb


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Three perturbations over three batches."""
    return pb.simulate(n_cells=500, n_genes=12, n_perturbations=3, seed=1).screen


def test_it_is_the_split_of_a_regression(screen: pb.Screen) -> None:
    found = pb.decompose_means(screen)
    values = np.log1p(screen.counts.toarray() / screen.size_factor[:, None])
    name = np.array([p.perturbation for p in screen.conditions])[screen.condition]
    levels = list(dict.fromkeys(p.perturbation for p in screen.conditions))
    mean = np.array([[values[(name == level) & (screen.batch == b)].mean(0) for b in range(3)] for level in levels]).reshape(12, -1)
    row, column = np.repeat(np.eye(4), 3, axis=0), np.tile(np.eye(3), (4, 1))

    def left(design: np.ndarray) -> float:
        return float(((mean - design @ np.linalg.lstsq(design, mean, rcond=None)[0]) ** 2).sum())

    total = left(np.ones((12, 1)))
    both = np.concatenate([row, column], 1)
    wanted = [1 - left(row) / total, 1 - left(column) / total, left(both) / total]
    assert np.allclose(found["share"], wanted)
    assert np.allclose(found["gene_share"].sum("source"), 1)
    assert float(found["sampling"]) == pytest.approx(float(found["share"].sel(source="rest")), rel=0.5)


def test_means_that_add_up_leave_what_sampling_explains() -> None:
    """The rest is an estimate of sampling where there is nothing else."""
    ratio = []
    for seed in range(5):
        screen = pb.simulate(n_cells=2000, n_genes=40, n_perturbations=4, times=(1.0,), effect_scale=0.0, seed=seed).screen
        found = pb.decompose_means(screen)
        ratio.append(float(found["share"].sel(source="rest") / found["sampling"]))
    assert np.mean(ratio) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("name", "columns", "factor", "wanted", "sampling"),
    [
        ("papalexi2021_thp1_eccite.h5ad", {"batch": "replicate"}, "perturbation", (0.63, 0.21, 0.17), 0.14),
        (
            "zhao2021_gbm_panobinostat.h5ad",
            {"batch": "donor", "media": "treatment", "baseline": "vehicle (DMSO)"},
            "media",
            (0.14, 0.75, 0.12),
            0.005,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")
def test_studies_where_batches_add_and_where_they_do_not(
    data_path: Callable[[str], Path], name: str, columns: dict[str, str], factor: str, wanted: tuple[float, ...], sampling: float
) -> None:
    screen = pb.Screen.from_anndata(anndata.read_h5ad(data_path(name)), **columns)
    found = pb.decompose_means(screen, factor)
    assert np.allclose(found["share"], wanted, atol=0.03)
    assert float(found["sampling"]) == pytest.approx(sampling, abs=0.02)
    beyond = float(found["share"].sel(source="rest") - found["sampling"])
    assert (beyond > 0.1) == (factor == "media")


def test_levels_that_are_not_in_every_batch_are_left_out_and_named(screen: pb.Screen) -> None:
    last = screen.perturbations[-1]
    name = np.array([p.perturbation for p in screen.conditions])[screen.condition]
    found = pb.decompose_means(screen[(name != last) | (screen.batch > 0)])
    assert found.attrs["left_out"] == last
    assert found.sizes["level"] == 3


def test_a_mean_of_one_cell_takes_the_variance_of_all(screen: pb.Screen) -> None:
    cell = np.flatnonzero((screen.condition == 0) & (screen.batch == 0))[1:]
    other = np.array([p.perturbation for p in screen.conditions])[screen.condition] == "control"
    keep = ~(other & (screen.batch == 0))
    keep[cell[0]] = True
    assert np.isfinite(float(pb.decompose_means(screen[keep])["sampling"]))


def test_any_two_factors_can_be_split(screen: pb.Screen) -> None:
    found = pb.decompose_means(screen, "perturbation", "time")
    assert found["source"].values.tolist() == ["perturbation", "time", "rest"]
    assert pb.decompose_means(screen, "condition")["level"].size == len(screen.conditions)


def test_what_cannot_be_split_is_refused(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="'drug' is not a factor"):
        pb.decompose_means(screen, "drug")
    with pytest.raises(ValueError, match="are both 'batch'"):
        pb.decompose_means(screen, "batch")
    with pytest.raises(ValueError, match="1 of 1 levels of media"):
        pb.decompose_means(screen, "media")
    with pytest.raises(ValueError, match="continuous"):
        pb.decompose_means(replace(screen, values="continuous"))
