"""Genes changed in other media for each changed in baseline media: matched numbers of cells, in counts and in means."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment.silence import Group, changed, groups, silence


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
    own = found["A", None, 1.0]
    np.testing.assert_allclose(own.mean, [(10 + 120) / 40, 1.0])
    np.testing.assert_allclose(own.variance, [(3**2 + 3**2) / 40, 0.09 * 40])  # alone, so shrunken to itself
    assert own.n_cells == 40
    assert found["control", None, 1.0].variance.tolist() == [0, 0]


def test_the_jurkat_screen_is_compared_at_matched_numbers_of_cells(jurkat):
    screen = jurkat()
    found = pb.SilentInBaseline().test(screen)
    assert found.testable
    assert found.interval[0] < found.effect < found.interval[1]
    own = groups(screen)
    last = screen.conditions[-1]
    assert own[last.perturbation, last.media, last.time].n_cells == screen.cells_behind[screen.cells_of(last)].sum()


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
    control = found["control", None, 1.0]
    assert changed(found["A", None, 1.0], control).sum() <= 10
    assert changed(found["B", None, 1.0].thinned(n, rng), control).sum() <= 10


def screen_of(cells: dict[tuple[str, str, float], tuple[int, np.ndarray]], kinds: dict[str, str] | None = None) -> pb.Screen:
    """Poisson counts: for each perturbation, media and time, a number of cells and their rates."""
    rng, labels = np.random.default_rng(0), [key for key, (n, _) in cells.items() for _ in range(n)]
    counts = np.concatenate([rng.poisson(rate, (n, len(rate))) for n, rate in cells.values()]).astype(float)
    name, media, time = zip(*labels, strict=True)
    obs = {"perturbation": name, "media": media, "time": time, "perturbation_type": [(kinds or {}).get(n, "knockout") for n in name]}
    obs["perturbation"] = [n.split()[0] for n in name]
    with pytest.warns(pb.ScreenWarning):
        return pb.Screen.from_anndata(
            anndata.AnnData(counts, obs=obs), media="media", baseline="rest", time="time", size_factor=np.ones(len(counts))
        )


def moved(k: int, factor: float = 1.25, n_genes: int = 100) -> np.ndarray:
    """Rates with every gene from the k-th of ten moved."""
    return np.where(np.arange(n_genes) % 10 == k, factor, 1.0)


@pytest.mark.parametrize("controls", [(2000, 60), (60, 2000)])
def test_the_same_effects_in_both_media_give_a_ratio_near_1_whatever_the_numbers_of_control_cells(controls):
    cells = {("control", media, 1.0): (n, np.full(100, 5.0)) for media, n in zip(("rest", "BMP4"), controls, strict=True)}
    cells |= {(f"G{k}", media, 1.0): (200, 5 * moved(k)) for k in range(8) for media in ("rest", "BMP4")}
    screen = screen_of(cells)
    found = pb.SilentInBaseline().test(screen)
    assert found.interval[0] < 1 < found.interval[1]
    assert 0.6 < found.effect < 1.6


def test_a_drift_over_time_and_an_uneven_spread_over_times_are_no_effect():
    """Control is late in baseline media and perturbed cells early; in the other media both are spread alike."""
    cells = {}
    for time, drift in ((1.0, 1.0), (2.0, 3.0)):
        for name in ("control", "A", "B", "C", "D"):
            early = name == "control"
            cells[name, "rest", time] = (150 if early == (time == 2.0) else 20, np.full(60, 2 * drift))
            cells[name, "BMP4", time] = (80, np.full(60, 2 * drift))
    found = groups(screen_of(cells))
    assert sum(changed(own, found["control", m, t]).sum() for (name, m, t), own in found.items() if name != "control") <= 5
    test = pb.SilentInBaseline().test(screen_of(cells))
    assert test.interval[0] < 1 < test.interval[1]


def test_two_kinds_on_one_gene_are_two_perturbations():
    """Interference and activation that cancel on average are each seen to change genes, and one name asks for both."""
    kinds = {"A i": "CRISPRi", "A a": "CRISPRa"}
    cells = {("control", media, 1.0): (200, np.full(40, 5.0)) for media in ("rest", "BMP4")}
    for name, factor in (("A i", 0.5), ("A a", 1.5)):
        cells |= {(name, media, 1.0): (100, 5 * moved(0, factor if media == "BMP4" else 1.0, 40)) for media in ("rest", "BMP4")}
    screen = screen_of(cells, kinds)
    assert {name for name, *_ in groups(screen)} == {"control", "Activation('A')", "Interference('A')"}
    assert silence(screen, ["A"]).ratio > 3
