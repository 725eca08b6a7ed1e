"""Splits: nothing is in both parts, nothing is lost, and what would leak or test nothing is refused."""

from collections.abc import Callable

import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment.split import Split, hold_out_cells, hold_out_time


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    return pb.datasets.ishikawa2023()[::5]


SPLITS: list[Callable[[pb.Screen], Split]] = [
    lambda screen: hold_out_time(screen, 5),
    lambda screen: hold_out_time(screen, 3, ["NANOG", "SOX2"]),
    lambda screen: hold_out_time(screen, 5, "NANOG"),
    hold_out_cells,
    lambda screen: hold_out_cells(screen, 0.6, seed=3),
]


@pytest.mark.parametrize("cut", SPLITS)
def test_parts_are_disjoint_and_complete(screen: pb.Screen, cut: Callable[[pb.Screen], Split]) -> None:
    train, test = cut(screen)
    assert not set(train.cells) & set(test.cells)
    assert sorted([*train.cells, *test.cells]) == sorted(screen.cells)
    assert train.genes == test.genes == screen.genes


def test_a_held_out_time_is_in_no_training_cell(screen: pb.Screen) -> None:
    split = hold_out_time(screen, 5, ["NANOG", "SOX2"])
    assert set(split.held_out) == {pb.Knockout(name) >> pb.Wait(5) for name in ("NANOG", "SOX2")}
    assert set(split.test.conditions) == set(split.held_out)
    assert not set(split.train.conditions) & set(split.held_out)
    assert set(split.train.conditions) | set(split.held_out) == set(screen.conditions)


def test_control_and_other_times_stay(screen: pb.Screen) -> None:
    train, test = hold_out_time(screen, 5)
    assert train.perturbations == test.perturbations == screen.perturbations
    assert [p.time for p in train.conditions if not p.perturbations] == [2, 3, 4, 5]
    assert {p.time for p in train.conditions if p.perturbations} == {2, 3, 4}


def test_pairs_are_named_in_any_order_and_every_media_is_hidden() -> None:
    screen = pb.simulate(n_cells=600, n_genes=8, n_perturbations=2, media=("rest", "drug"), times=(1.0, 2.0), seed=1).screen
    name = screen.perturbations[0]
    assert {p.media for p in hold_out_time(screen, 2, name).held_out} == {None, "drug"}


def test_proof_of_a_time_counts_what_was_checked(screen: pb.Screen) -> None:
    split = hold_out_time(screen, 5, ["NANOG", "SOX2"])
    proof = split.proof()
    assert f"Of {split.train.n_cells:,} cells to train on and {split.test.n_cells:,} to test on, 0 are in both parts." in proof
    assert "Of 2 held-out conditions, 0 have a cell to train on and 2 have cells to test on: Knockout('NANOG') >> Wait(5)" in proof


def test_proof_of_cells_says_that_no_condition_is_held_out(screen: pb.Screen) -> None:
    split = hold_out_cells(screen[screen.cells_of("control")], 0.5)
    assert "No condition is held out: 4 of the 4 tested conditions have cells to train on." in split.proof()


def test_held_out_cells_are_a_function_of_the_seed(screen: pb.Screen) -> None:
    first, again, other = (hold_out_cells(screen, seed=seed).test.cells for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    assert list(first) == list(screen.cells[np.random.default_rng(0).random(screen.n_cells) < 0.1])


def test_a_split_cannot_leak(screen: pb.Screen) -> None:
    held = pb.Knockout("NANOG") >> pb.Wait(5)
    train, test = hold_out_time(screen, 5, "NANOG")
    with pytest.raises(ValueError, match=r"\d+ cells \(.*, \.\.\.\) in both parts of the split"):
        Split(screen, test, (), "time")
    half = np.arange(screen.n_cells) % 2 == 0
    with pytest.raises(ValueError, match=r"1 held-out condition \(Knockout\('NANOG'\) >> Wait\(5\)\) among the training cells"):
        Split(screen[half], screen[~half], (held,), "time")
    with pytest.raises(ValueError, match=r"1 held-out condition .* without a cell to test on"):
        Split(train[::2], train[1::2], (held,), "time")


def test_parts_measure_the_same_genes(screen: pb.Screen) -> None:
    other = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, seed=1).screen
    with pytest.raises(ValueError, match="other genes, or in another order"):
        Split(screen, other, (), "cells")


@pytest.mark.parametrize(
    ("time", "names", "message"),
    [
        (6, None, r"No cell of this screen has the time 6. Known: 2, 3, 4, 5 day"),
        (5, ["NANGO"], r"No cell of this screen has the perturbation 'NANGO'. Did you mean 'NANOG'"),
        (5, ["control"], "'control' cannot be held out: control stays in training"),
        (5, [], "No perturbation to hide: the split would test nothing"),
    ],
)
def test_misuse_of_a_time(screen: pb.Screen, time: float, names: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hold_out_time(screen, time, names)


def test_many_times_are_shortened_to_the_nearest() -> None:
    screen = pb.simulate(n_cells=900, n_genes=5, n_perturbations=1, times=tuple(map(float, range(1, 13))), seed=1).screen
    with pytest.raises(ValueError, match="Known: 1, 2, 3, 4, 5, 6, 7, 8 and 4 more"):
        hold_out_time(screen, 0.5)


def test_a_perturbation_without_that_time_tests_nothing(screen: pb.Screen) -> None:
    without = hold_out_time(screen, 5, "NANOG").train
    with pytest.raises(ValueError, match=r"NANOG has no cell at time 5, so hiding it tests nothing. It was seen at 2, 3, 4\."):
        hold_out_time(without, 5, ["NANOG"])


def test_a_perturbation_seen_once_cannot_be_hidden(screen: pb.Screen) -> None:
    once = screen[screen.cells_of(pb.Knockout("NANOG") >> pb.Wait(5))]
    with pytest.raises(ValueError, match="NANOG was seen at time 5 only, so hiding that leaves nothing of it to train on"):
        hold_out_time(once, 5)


def test_a_screen_of_controls_has_nothing_to_hide(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="No perturbation to hide"):
        hold_out_time(screen[screen.cells_of("control")], 5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0])
def test_a_share_lies_between_0_and_1(screen: pb.Screen, share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1; got"):
        hold_out_cells(screen, share)


def test_too_few_cells_leave_a_part_empty(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="None of the 3 cells is held out, so the split tests nothing"):
        hold_out_cells(screen[:3], 1e-6)
    with pytest.raises(ValueError, match="All 3 cells are held out, so nothing is left to train on"):
        hold_out_cells(screen[:3], 1 - 1e-6)


def test_only_a_screen_is_split(unchecked: None) -> None:
    with pytest.raises(TypeError, match="A Screen is needed here"):
        hold_out_cells("screen")
    with pytest.raises(TypeError, match="A Screen is needed here"):
        hold_out_time("screen", 5)


def test_the_module_has_a_short_name() -> None:
    assert pb.split.hold_out_time is hold_out_time


@pytest.mark.usefixtures("unchecked")
def test_a_time_in_quotes_is_no_time():
    with pytest.raises(TypeError, match="time is a number in the unit of the screen; got '5'"):
        pb.split.hold_out_time(pb.datasets.ishikawa2023(), "5")


@pytest.mark.usefixtures("unchecked")
def test_a_share_in_quotes_is_no_share():
    with pytest.raises(ValueError, match=r"share is the share of cells to test on, between 0 and 1; got '0.2'"):
        hold_out_cells(pb.datasets.ishikawa2023(), "0.2")
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 .*got 1\.5"):
        hold_out_cells(pb.datasets.ishikawa2023(), seed=1.5)
