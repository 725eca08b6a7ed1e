"""Genes changed in other media for each changed in baseline media: matched numbers of cells, in counts and in means."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment.silence import Group, changed, groups


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Two media and two batches, with sizes of cells all alike."""
    screen = pb.simulate(n_cells=900, n_genes=15, n_perturbations=3, media=("rest", "BMP4"), n_batches=2, seed=3).screen
    return replace(screen, size_factor=np.ones(screen.n_cells))


@pytest.fixture
def jurkat(data_path: Callable[[str], Path]) -> Callable[..., pb.Screen]:
    """Reads the means of a knock-out screen with and without stimulation; control has no error and no number of cells."""

    def read(**how: object) -> pb.Screen:
        adata = anndata.read_h5ad(data_path("datlinger2017_jurkat_summary.h5ad"))
        known = {"standard_error": "uncertainty_se", "cells_behind": "n_cells"} | how
        with pytest.warns(pb.ScreenWarning):
            return pb.Screen.from_anndata(adata, media="media", baseline="unstimulated", time="time", values="continuous", **known)

    return read


def test_the_means_of_a_pseudobulk_are_those_of_its_cells(screen):
    own, bulk = groups(screen), groups(screen.pseudobulk())
    assert list(own) == list(bulk)
    for key, group in own.items():
        assert bulk[key].n_cells == group.n_cells
        np.testing.assert_allclose(bulk[key].mean, group.mean, rtol=1e-5)
        np.testing.assert_allclose(bulk[key].variance, group.variance, rtol=0.2)  # batches differ beyond their cells


def test_rows_weigh_by_their_cells_and_those_of_unknown_error_are_left_out():
    adata = anndata.AnnData(
        np.array([[0.0, 0.0], [1.0, 1.0], [4.0, 4.0]]),
        obs={"perturbation": ["control", "A", "A"], "n": [np.nan, 10, 30]},
        layers={"se": np.array([[np.nan, np.nan], [0.3, 0.3], [0.1, np.nan]])},
    )
    adata.var_names = ["A", "B"]
    found = groups(pb.Screen.from_anndata(adata, perturbation_type="knockout", values="continuous", standard_error="se", cells_behind="n"))
    np.testing.assert_allclose(found["A", None].mean, [(10 + 120) / 40, 1.0])
    np.testing.assert_allclose(found["A", None].variance, [(3**2 + 3**2) / 40, 0.09 * 40])  # alone, so shrunken to itself
    assert found["A", None].n_cells == 40
    assert found["control", None].variance.tolist() == [0, 0]


def test_the_jurkat_screen_is_compared_at_matched_numbers_of_cells(jurkat):
    screen = jurkat()
    found = pb.SilentInBaseline().test(screen)
    assert found.testable
    assert found.interval[0] < found.effect < found.interval[1]
    own = groups(screen)
    cells = screen.cells_behind[screen.cells_of(screen.conditions[-1])]
    assert own[screen.conditions[-1].perturbation, screen.conditions[-1].media].n_cells == cells.sum()


def test_a_thinned_mean_has_the_noise_of_so_many_cells():
    rng, truth = np.random.default_rng(0), np.linspace(0, 2, 20_000)
    own = Group(truth + rng.normal(0, np.sqrt(3 / 40), 20_000), np.full(20_000, 3.0), 40.0)
    thinned = own.thinned(10.0, rng)
    assert (thinned.mean - truth).var() == pytest.approx(3 / 10, rel=0.05)
    assert thinned.n_cells == 10
    assert np.array_equal(own.thinned(40.0, rng).mean, own.mean)


def test_what_continuous_values_leave_open_is_said(jurkat):
    unmatched = pb.SilentInBaseline().test(jurkat(cells_behind=None))
    assert np.isfinite(unmatched.effect)
    assert not unmatched.testable
    assert "numbers of cells are not known, so they are not matched" in repr(unmatched)
    assert "not testable here: values without standard errors" in repr(pb.SilentInBaseline().test(jurkat(standard_error=None)))
    for assumption in (pb.SteadyState(), pb.UneditedStable()):
        assert "not testable here: This screen holds continuous values; whether means move" in repr(assumption.test(jurkat()))


@pytest.mark.parametrize("n", [5, 30, 100])
def test_where_nothing_changes_few_cells_do_not_seem_to_change(n):
    """Sparse genes, all cells alike: nearly none of 1,000 genes is called, whatever the number of cells, also when thinned."""
    rng = np.random.default_rng(n)
    labels = ["control"] * 1500 + ["A"] * n + ["B"] * 300
    rate = np.exp(rng.normal(-1.5, 1.5, 1000)) / 3
    adata = anndata.AnnData(rng.poisson(rng.gamma(3, rate, (len(labels), 1000))).astype(float), obs={"perturbation": labels})
    with pytest.warns(pb.ScreenWarning):
        found = groups(pb.Screen.from_anndata(adata, perturbation_type="knockout", size_factor=np.ones(len(labels))))
    assert changed(found["A", None], found["control", None]).sum() <= 10
    assert changed(found["B", None].thinned(n, rng), found["control", None]).sum() <= 10
