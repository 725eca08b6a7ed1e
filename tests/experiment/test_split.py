"""Splits: nothing is in both parts, nothing is lost, and what would leak or test nothing is refused."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import perturbprob as pb
from perturbprob.experiment.split import (
    Split,
    hold_out_batches,
    hold_out_cells,
    hold_out_combinations,
    hold_out_media,
    hold_out_perturbations,
    hold_out_time,
)

SPLITS: list[Callable[[pb.Screen], Split]] = [
    lambda screen: hold_out_time(screen, 5),
    lambda screen: hold_out_time(screen, 3, ["NANOG", "SOX2"]),
    lambda screen: hold_out_time(screen, 5, "NANOG"),
    lambda screen: hold_out_perturbations(screen, ["NANOG", "SOX2"]),
    lambda screen: hold_out_batches(screen, "d5_4"),
    lambda screen: hold_out_batches(screen, ["d2_1", "d3_2"], keep_control=False),
    hold_out_cells,
    lambda screen: hold_out_cells(screen, 0.6, seed=3),
]
CROSSED: list[Callable[[pb.Screen], Split]] = [
    lambda screen: hold_out_time(screen, 2),
    lambda screen: hold_out_perturbations(screen, ["A", "B+A"]),
    lambda screen: hold_out_media(screen, "drug"),
    lambda screen: hold_out_media(screen, "rest", ["A", "A+B"]),
    lambda screen: hold_out_combinations(screen, ["A+B"]),
    lambda screen: hold_out_combinations(screen, require_parts=False),
    lambda screen: hold_out_batches(screen, ["batch1", "batch3"]),
    lambda screen: hold_out_batches(screen, "batch2", keep_control=False),
]


@pytest.mark.parametrize("cut", SPLITS)
def test_parts_are_disjoint_and_complete(screen: pb.Screen, cut: Callable[[pb.Screen], Split]) -> None:
    train, test = cut(screen)
    assert not set(train.cells) & set(test.cells)
    assert sorted([*train.cells, *test.cells]) == sorted(screen.cells)
    assert train.genes == test.genes == screen.genes


@pytest.mark.parametrize("cut", CROSSED)
def test_parts_of_a_crossed_screen_are_disjoint_and_complete(crossed: pb.Screen, cut: Callable[[pb.Screen], Split]) -> None:
    test_parts_are_disjoint_and_complete(crossed, cut)


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


def test_held_out_perturbations_are_nowhere_in_training(screen: pb.Screen) -> None:
    split = hold_out_perturbations(screen, ["SOX2", "NANOG"])
    assert split.test.perturbations == ("NANOG", "SOX2")
    assert set(split.train.perturbations) == set(screen.perturbations) - {"NANOG", "SOX2"}
    assert len(split.held_out) == 8
    assert split.train.cells_of("control").size == screen.cells_of("control").size


def test_held_out_media_keep_control_and_other_media(crossed: pb.Screen) -> None:
    split = hold_out_media(crossed, "drug", ["A", "C+A"])
    assert {(p.perturbation, p.media, p.time) for p in split.held_out} == {(p, "drug", t) for p in ("A", "A+C") for t in (1, 2, 3)}
    assert set(split.train.conditions) == set(crossed.conditions) - set(split.held_out)
    control = sum(int((crossed.condition == k).sum()) for k, p in enumerate(crossed.conditions) if p.media and not p.perturbations)
    sentences = split.proof().splitlines()[-3:]
    assert sentences == [
        "Of 2 held-out pairs of perturbation and media, 0 have a cell to train on at any time.",
        "Training shows A, A+C in rest.",
        f"Control in drug has {control} cells to train on.",
    ]


def test_the_baseline_media_may_be_held_out(crossed: pb.Screen) -> None:
    split = hold_out_media(crossed, "rest", "B")
    assert {p.media for p in split.held_out} == {None}
    assert "Training shows B in drug.\nControl in rest has " in split.proof()


def test_held_out_combinations_leave_their_parts(crossed: pb.Screen) -> None:
    split = hold_out_combinations(crossed, ["C+A", "A+B"])
    assert split.test.perturbations == ("A+B", "A+C")
    assert split.train.perturbations == ("A", "B", "C", "D", "D+E")
    assert "Of 2 held-out combinations, 0 have a cell to train on in any media at any time." in split.proof()
    assert split.proof().endswith("Seen alone in training: 2 of 2 genes of A+B, A+C.")


def test_a_part_is_seen_alone_in_the_same_kind() -> None:
    obs = pd.DataFrame({"gene": ["NT", "A", "B", "A+B"], "kind": ["", "CRISPRi", "CRISPRa", "CRISPRa"]}, index=list("wxyz"))
    adata = AnnData(np.ones((4, 2), dtype=np.float32), obs=obs, var=pd.DataFrame(index=["A", "B"]))
    kinds = pb.Screen.from_anndata(adata, perturbation="gene", perturbation_type="kind")
    with pytest.raises(ValueError, match=r"1 combination \(A\+B\) of genes that no cell shows alone, such as Activation\('A'\)"):
        hold_out_combinations(kinds)
    assert "1 of 2 genes of A+B (not A)" in hold_out_combinations(kinds, require_parts=False).proof()


def test_a_held_out_batch_keeps_its_control(crossed: pb.Screen) -> None:
    split = hold_out_batches(crossed, ["batch1", "batch3"])
    train, test = split
    assert test.batches == split.batches == ("batch1", "batch3")
    assert (train.batches, split.held_out) == (crossed.batches, ())
    assert "control" not in {p.perturbation for p in test.conditions}
    shown = {p.perturbation for p, b in zip(np.array(train.conditions, dtype=object)[train.condition], train.batch, strict=True) if b != 1}
    assert shown == {"control"}


def test_conditions_that_are_in_no_other_batch_are_held_out_with_it(screen: pb.Screen) -> None:
    split = hold_out_batches(screen, "d5_4")
    assert set(split.held_out) == set(hold_out_time(screen, 5).held_out)
    assert list(split.test.cells) == list(hold_out_time(screen, 5).test.cells)
    assert repr(split).endswith("23 conditions and 1 batch held out")
    assert split.proof().endswith("In other batches, 0 of the 23 tested conditions have cells to train on.")


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        (lambda screen: hold_out_time(screen, 2, "A+B"), lambda screen: hold_out_time(screen, 2, ["B+A", "A+B"])),
        (lambda screen: hold_out_perturbations(screen, "A"), lambda screen: hold_out_perturbations(screen, ["A", "A+ctrl", "A"])),
        (lambda screen: hold_out_media(screen, "drug"), lambda screen: hold_out_media(screen, ["drug", "drug"])),
        (lambda screen: hold_out_combinations(screen, "A+B"), lambda screen: hold_out_combinations(screen, ["B+A", "A+B"])),
        (lambda screen: hold_out_batches(screen, "batch1"), lambda screen: hold_out_batches(screen, ["batch1", "batch1"])),
    ],
)
def test_names_come_alone_or_in_a_list_and_twice_is_once(
    crossed: pb.Screen, once: Callable[[pb.Screen], Split], twice: Callable[[pb.Screen], Split]
) -> None:
    first, second = once(crossed), twice(crossed)
    assert (list(first.test.cells), first.held_out, first.batches) == (list(second.test.cells), second.held_out, second.batches)


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


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda s: hold_out_perturbations(s, ["A", "BB"]), "No cell of this screen has the perturbation 'BB'. Did you mean 'B'"),
        (lambda s: hold_out_perturbations(s, "ctrl"), "'ctrl' cannot be held out: control stays in training"),
        (lambda s: hold_out_perturbations(s, []), "No perturbation to hide: the split would test nothing. Name perturbations"),
        (
            lambda s: hold_out_perturbations(s, s.perturbations),
            r"Every perturbation of this screen \(7\) is held out, so training shows nothing of what one does",
        ),
        (lambda s: hold_out_media(s, "drugs"), "No cell of this screen has the media 'drugs'. Did you mean 'drug'"),
        (lambda s: hold_out_media(s, []), "No media to hide: the split would test nothing"),
        (lambda s: hold_out_media(s, "drug", "Z"), "No cell of this screen has the perturbation 'Z'"),
        (lambda s: hold_out_media(s, "drug", ["control"]), "'control' cannot be held out"),
        (lambda s: hold_out_media(s, "drug", []), "No perturbation to hide"),
        (
            lambda s: hold_out_media(s, ["drug", "rest"]),
            r"7 perturbations \(A, A\+B, .*\) were seen in media drug, rest only, so hiding that leaves nothing of them to train on.",
        ),
        (lambda s: hold_out_combinations(s, "A+D"), r"No cell of this screen has the combination 'A\+D'. Did you mean"),
        (
            lambda s: hold_out_combinations(s, ["A+B", "C"]),
            r"1 perturbation \(C\) of a single gene .* hold_out_perturbations.* Did you mean 'A\+C'",
        ),
        (lambda s: hold_out_combinations(s, "NT"), "'NT' cannot be held out"),
        (lambda s: hold_out_combinations(s, []), "No combination to hide"),
        (
            lambda s: hold_out_combinations(s),
            r"1 combination \(D\+E\) of genes that no cell shows alone, such as Knockout\('E'\).*require_parts=False",
        ),
        (lambda s: hold_out_batches(s, ["batch1", "batch4"]), "No cell of this screen has the batch 'batch4'. Did you mean 'batch"),
        (lambda s: hold_out_batches(s, []), "No batch to hide: the split would test nothing. Name batches"),
        (lambda s: hold_out_batches(s, s.batches), "All 3 batches are held out, so nothing is left to train on. Hold out fewer."),
        (lambda s: hold_out_time(s, 3, ["A", "Z"]), "No cell of this screen has the perturbation 'Z'"),
    ],
)
def test_misuse_of_names(crossed: pb.Screen, cut: Callable[[pb.Screen], Split], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(crossed)


def test_a_perturbation_in_one_media_has_nothing_to_test_or_to_train_on(crossed: pb.Screen) -> None:
    a = np.isin(np.arange(crossed.n_cells), crossed.cells_of("A"))
    drug = np.array([p.media == "drug" for p in crossed.conditions])[crossed.condition]
    with pytest.raises(ValueError, match=r"A has no cell in media drug, so hiding it tests nothing. It was seen in rest."):
        hold_out_media(crossed[~(a & drug)], "drug", ["A", "B"])
    with pytest.raises(
        ValueError, match=r"A was seen in media drug only, so hiding that leaves nothing of it to train on. Leave it out of pert"
    ):
        hold_out_media(crossed[~(a & ~drug)], "drug")
    assert "A" not in hold_out_media(crossed[~(a & ~drug)], "drug", ["B"]).test.perturbations


def test_a_batch_with_all_there_is_of_something_cannot_be_held_out(crossed: pb.Screen) -> None:
    a, d, control = (np.isin(np.arange(crossed.n_cells), crossed.cells_of(name)) for name in ("A", "D", "control"))
    first = crossed.batch == 0
    with pytest.raises(
        ValueError, match=r"2 perturbations \(A, D\) were seen in batch batch1 only.* screen without them: hold_out_perturbations"
    ):
        hold_out_batches(crossed[first | ~(a | d)], "batch1")
    with pytest.raises(
        ValueError, match=r"A was seen in batch batch1 only, so hiding that leaves nothing of it to train on. Hold out other batches"
    ):
        hold_out_batches(crossed[first | ~a], "batch1")
    with pytest.raises(ValueError, match=r"Control was seen in batch batch1 only. Keep it to train on: keep_control=True"):
        hold_out_batches(crossed[first | ~control], "batch1", keep_control=False)
    assert hold_out_batches(crossed[first | ~control], "batch1").train.cells_of("control").size > 0
    for keep in (True, False):
        with pytest.raises(ValueError, match="No perturbation has a cell in batch batch1, so holding it out tests nothing"):
            hold_out_batches(crossed[~first | control], "batch1", keep_control=keep)


def test_one_level_of_a_factor_cannot_be_held_out(screen: pb.Screen, crossed: pb.Screen) -> None:
    with pytest.raises(ValueError, match="This screen has one media, hiPSC_maintenance: without it nothing is left of a perturbation"):
        hold_out_media(screen, "hiPSC_maintenance")
    with pytest.raises(ValueError, match="This screen has one batch, batch1: without it nothing is left to train on"):
        hold_out_batches(crossed[crossed.batch == 0], "batch1")
    with pytest.raises(ValueError, match="No perturbation of this screen is a combination"):
        hold_out_combinations(screen)
    combined = crossed[np.concatenate([crossed.cells_of("A+B"), crossed.cells_of("control")])]
    with pytest.raises(ValueError, match=r"Every perturbation of this screen \(1\) is held out"):
        hold_out_combinations(combined, require_parts=False)


def test_a_time_or_media_of_control_alone_tests_nothing(crossed: pb.Screen) -> None:
    control = [not p.perturbations for p in crossed.conditions]
    early = crossed[np.array([c or p.time < 3 for c, p in zip(control, crossed.conditions, strict=True)])[crossed.condition]]
    with pytest.raises(ValueError, match="No perturbation has a cell at time 3, so hiding that tests nothing"):
        hold_out_time(early, 3)
    rest = crossed[np.array([c or p.media is None for c, p in zip(control, crossed.conditions, strict=True)])[crossed.condition]]
    with pytest.raises(ValueError, match="No perturbation has a cell in media drug, so hiding that tests nothing"):
        hold_out_media(rest, "drug")


@pytest.mark.parametrize("cut", [hold_out_perturbations, hold_out_media, hold_out_combinations, hold_out_batches])
@pytest.mark.parametrize("wrong", [3, ["A", 3], pb.Knockout("A") >> pb.Wait(1), {"A": 1}.values()])
@pytest.mark.usefixtures("unchecked")
def test_names_are_text(crossed: pb.Screen, cut: Callable[..., Split], wrong: object) -> None:
    with pytest.raises(TypeError, match=r"are given as a name or a list of names, in quotes; got"):
        cut(crossed, wrong)
    with pytest.raises(TypeError, match="A Screen is needed here; got str"):
        cut("screen", "A")


@pytest.mark.parametrize("time", [None, True, [5]])
@pytest.mark.usefixtures("unchecked")
def test_a_time_is_a_number(screen: pb.Screen, time: object) -> None:
    with pytest.raises(TypeError, match="time is a number in the unit of the screen; got"):
        hold_out_time(screen, time)
