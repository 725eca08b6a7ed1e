"""Pseudobulks against dense numpy, and what their answers carry."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from perturbprob.experiment import Screen, Wait, datasets
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.experiment.simulate import simulate


@pytest.fixture(scope="module")
def screen() -> Screen:
    return simulate(n_cells=300, n_genes=8, n_perturbations=3, seed=3).screen


@pytest.mark.parametrize("normalise", [False, True])
def test_means_and_variances_are_those_of_dense_numpy(screen: Screen, normalise: bool) -> None:
    dense = screen.counts.toarray().astype(float)
    log_counts = np.log1p(dense / screen.size_factor[:, None] if normalise else dense)
    bulk = pseudobulk(screen, normalise=normalise)
    for c in range(len(screen.conditions)):
        cells = log_counts[screen.condition == c]
        assert bulk["n_cells"].values[c] == len(cells)
        assert bulk["mean"].values[c] == pytest.approx(cells.mean(0), rel=1e-12)
        if len(cells) > 1:
            assert bulk["variance"].values[c] == pytest.approx(cells.var(0, ddof=1), rel=1e-9, abs=1e-12)


def test_the_counts_of_the_screen_are_left_alone(screen: Screen) -> None:
    before = screen.counts.toarray()
    pseudobulk(screen, normalise=True)
    assert (screen.counts.toarray() == before).all()


def test_conditions_are_named_in_the_order_of_the_screen(screen: Screen) -> None:
    bulk = pseudobulk(screen)
    assert list(bulk["condition"].values) == list(map(str, screen.conditions))
    assert list(bulk["perturbation"].values) == [p.perturbation for p in screen.conditions]
    assert list(bulk["time"].values) == [p.time for p in screen.conditions]
    assert set(bulk["media"].values) == set(screen.media)
    assert tuple(bulk["gene"].values) == screen.genes


def test_times_carry_their_unit() -> None:
    screen = datasets.ishikawa2023()[::50]
    assert pseudobulk(screen)["time"].attrs == {"units": "day"}


def test_a_single_cell_has_a_mean_and_no_variance(screen: Screen) -> None:
    bulk = pseudobulk(screen[[0]])
    assert bulk["mean"].values[0] == pytest.approx(np.log1p(screen.counts[[0]].toarray()[0]))
    assert np.isnan(bulk["variance"].values).all()


def test_a_gene_with_equal_counts_has_no_negative_variance(screen: Screen) -> None:
    constant = replace(screen, counts=type(screen.counts)(np.full((screen.n_cells, screen.n_genes), 3, np.float32)))
    variance = pseudobulk(constant)["variance"].values
    assert (variance[~np.isnan(variance)] >= 0).all()
    assert np.nanmax(variance) < 1e-12


def test_order_of_cells_does_not_matter(screen: Screen) -> None:
    shuffled = screen[np.random.default_rng(0).permutation(screen.n_cells)]
    xr.testing.assert_allclose(pseudobulk(screen), pseudobulk(shuffled))


def test_only_a_screen_has_pseudobulks(unchecked: None) -> None:
    with pytest.raises(TypeError, match="A Screen is needed here; got Protocol"):
        pseudobulk(Wait(1) >> Wait(2))
