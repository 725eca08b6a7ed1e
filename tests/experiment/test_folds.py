"""Repeated splits: each name is held out once, and what is worked out of each split comes back in order."""

import pickle
from collections import Counter

import joblib
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbprob as pb
from perturbprob.experiment.split import Split, folds, hold_out_cells, hold_out_perturbations, hold_out_time, map_splits


@pytest.fixture(scope="module")
def parts(screen: pb.Screen) -> list[Split]:
    return list(folds(lambda names: hold_out_time(screen, 5, names), screen.perturbations, 4))


def dealt(split: Split, names: list[str], n_folds: int, seed: int | None) -> list[list[str]]:
    """The names of each fold."""
    found: list[list[str]] = []
    list(folds(lambda chosen: found.append(chosen) or split, names, n_folds, seed=seed))
    return found


SPLIT = hold_out_cells(pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, seed=1).screen)


@given(st.data(), st.integers(2, 6), st.none() | st.integers(0, 2**32 - 1))
def test_each_name_is_in_one_fold_and_folds_are_alike_in_size(data: st.DataObject, n_folds: int, seed: int | None) -> None:
    names = data.draw(st.lists(st.text(max_size=2), min_size=n_folds, max_size=20, unique=True))
    found = dealt(SPLIT, names, n_folds, seed)
    assert Counter(name for fold in found for name in fold) == Counter(names)
    assert sorted(map(len, found)) == sorted(len(names[q::n_folds]) for q in range(n_folds))
    assert found == dealt(SPLIT, [*names, *names], n_folds, seed)


def test_names_are_dealt_in_order_or_at_random() -> None:
    names = list("ABCDEFG")
    assert dealt(SPLIT, names, 3, None) == [["A", "D", "G"], ["B", "E"], ["C", "F"]]
    first, again, other = (dealt(SPLIT, names, 3, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({str(dealt(SPLIT, names, 3, seed)) for seed in range(20)}) > 10


def test_together_folds_test_all_that_can_be_held_out(screen: pb.Screen, parts: list[Split]) -> None:
    assert Counter(p for part in parts for p in part.held_out) == Counter(hold_out_time(screen, 5).held_out)
    tested = [cell for part in parts for cell in part.test.cells]
    assert sorted(tested) == sorted(hold_out_time(screen, 5).test.cells)
    assert [part.held_out for part in parts] == [hold_out_time(screen, 5, screen.perturbations[q::4]).held_out for q in range(4)]


def test_names_may_be_anything_that_a_split_is_made_of(screen: pb.Screen) -> None:
    found = [part.held_out[0].time for part in folds(lambda times: hold_out_time(screen, times[0]), screen.times, 4)]
    assert found == [2, 3, 4, 5]


def test_a_split_is_made_when_it_is_asked_for(screen: pb.Screen) -> None:
    asked: list[list[str]] = []
    made = folds(lambda names: (asked.append(names), hold_out_perturbations(screen, names))[1], ["NANOG", "SOX2"], 2)
    assert asked == []
    assert next(made).test.perturbations == ("NANOG",)
    assert asked == [["NANOG"]]


def test_results_come_in_the_order_of_the_splits_wherever_they_are_worked_out(parts: list[Split]) -> None:
    sizes = [part.test.n_cells for part in parts]
    assert map_splits(lambda part: part.test.n_cells, parts) == sizes
    with joblib.parallel_config(backend="threading", n_jobs=2):
        assert map_splits(lambda part: part.test.n_cells, iter(parts)) == sizes


def test_a_split_can_be_sent_to_another_process(parts: list[Split]) -> None:
    again = pickle.loads(pickle.dumps(parts[0]))
    assert again.proof() == parts[0].proof()
    assert list(again.test.cells) == list(parts[0].test.cells)


def test_an_error_in_a_split_is_raised(parts: list[Split]) -> None:
    with pytest.raises(ZeroDivisionError):
        map_splits(lambda part: part.test.n_cells / 0, parts)


def test_misuse_of_folds(screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match=r"3 folds hold out a name each, at least; got 2 names \(A, B\). Ask for fewer folds."):
        folds(lambda names: SPLIT, ["A", "B", "A"], 3)
    with pytest.raises(ValueError, match="n_folds must be a whole number of at least 2; got 1"):
        folds(lambda names: SPLIT, ["A", "B"], 1)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        folds(lambda names: SPLIT, ["A", "B"], 2, seed=-1)
    with pytest.raises(ValueError, match=r"No cell of this screen has the perturbation 'NANGO'. Did you mean 'NANOG'"):
        list(folds(lambda names: hold_out_perturbations(screen, names), ["NANGO", "SOX2"], 2))


@pytest.mark.usefixtures("unchecked")
def test_folds_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"names is a list of what to hold out, such as screen.perturbations; got 'NANOG'"):
        folds(lambda names: SPLIT, "NANOG", 2)
    with pytest.raises(TypeError, match=r"names is a list of what to hold out, such as screen.perturbations; got 5"):
        folds(lambda names: SPLIT, 5, 2)
    with pytest.raises(TypeError, match="make takes the names of one fold and returns a split"):
        folds(["A", "B"], lambda names: SPLIT, 2)
    with pytest.raises(TypeError, match=r"make must return a Split, .*; of 1 name \(A\) it made None"):
        list(folds(lambda names: None, ["A", "B"], 2))
    with pytest.raises(ValueError, match=r"n_folds must be a whole number of at least 2; got 2\.5"):
        folds(lambda names: SPLIT, ["A", "B"], 2.5)


def test_splits_are_gone_through_once(screen: pb.Screen) -> None:
    made = folds(lambda names: hold_out_perturbations(screen, names), ["NANOG", "SOX2"], 2)
    assert len(map_splits(lambda part: part.kind, made)) == 2
    with pytest.raises(ValueError, match=r"No split to work on. What folds returns can be gone through once"):
        map_splits(lambda part: part.kind, made)


@pytest.mark.usefixtures("unchecked")
def test_map_splits_takes_a_function_and_several_splits(parts: list[Split]) -> None:
    with pytest.raises(TypeError, match="map_splits takes several splits, such as those of folds, or a list of one; got Split"):
        map_splits(lambda part: part.kind, parts[0])
    with pytest.raises(TypeError, match="map_splits takes a function of a split first, then the splits; got list"):
        map_splits(parts, lambda part: part.kind)
