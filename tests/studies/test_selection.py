"""select: what is chosen, that it is chosen inside the training data, and what is refused."""

from typing import Any

import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment.held_out import Split
from perturbprob.studies.held_out_means import Means
from perturbprob.studies.metrics import mean_square_error
from perturbprob.studies.predictors import predicted
from perturbprob.studies.selection import Selection

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """A small screen of two times."""
    return pb.simulate(n_cells=300, n_genes=8, n_perturbations=4, times=(1.0, 2.0), seed=1).screen


@pytest.fixture(scope="module")
def inner(screen: pb.Screen) -> Split:
    """A split of it by time."""
    return pb.split.hold_out_time(screen, 2, screen.perturbations[:2])


def small(screen: pb.Screen) -> pb.CellModel:
    """A model that trains fast."""
    return pb.node(screen, 2, n_hidden=8)


def blind(screen: pb.Screen) -> pb.CellModel:
    """A model that forgets at once what a condition does, and whose state does not move."""
    return pb.vae(screen, 1, n_hidden=8, shift="identity", memory=1e-3)


@pytest.fixture(scope="module")
def choice(inner: Split) -> Selection:
    """A choice between two."""
    models = {"blind": blind, "small": small}
    return pb.select(models, inner, epochs=5, every=2, minibatch=64, learning_rate=0.05, progress=False)


# What it is.


def test_the_least_error_of_the_table_is_chosen(choice: Selection) -> None:
    assert list(choice.errors.columns) == ["blind", "small"]
    assert list(choice.errors.index) == [2, 4, 5]
    assert choice.errors.loc[choice.epochs, choice.model] == choice.errors.to_numpy().min()
    assert choice.report().startswith(f"Chosen: {choice.model}, {choice.epochs} epochs.\n{choice.model}: error ")


def test_a_model_that_cannot_carry_effects_on_in_time_is_not_chosen(choice: Selection) -> None:
    assert choice.model == "small"


def test_the_error_at_the_end_is_that_of_a_fit_of_the_training_part(inner: Split, choice: Selection) -> None:
    training: dict[str, Any] = {"epochs": 5, "minibatch": 64, "learning_rate": 0.05, "validation": 0.0, "progress": False}
    fitted = pb.fit(small(inner.train), inner.train, **training)
    means = Means.of(inner.test, [inner.train])
    error = mean_square_error(predicted("fit", fitted, means, n_draws=10, seed=0).mean, means.observed).mean()
    np.testing.assert_allclose(choice.errors.loc[5, "small"], error, rtol=1e-5)


def test_several_splits_count_alike(inner: Split, screen: pb.Screen) -> None:
    other = pb.split.hold_out_time(screen, 2, screen.perturbations[2:])
    how: dict[str, Any] = {"epochs": 1, "minibatch": 200, "n_draws": 2, "progress": False}
    one, two, both = (pb.select({"small": small}, splits, **how).errors for splits in (inner, other, [inner, other]))
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-6)


def test_the_test_part_has_no_say_in_the_training(inner: Split, screen: pb.Screen) -> None:
    """Other cells to score on change the errors, and nothing of the runs."""
    seen: list[list[float]] = []

    def watched(part: pb.Screen) -> pb.CellModel:
        assert not set(part.cells) & set(inner.test.cells)
        return small(part)

    few = Split(inner.train, inner.test[: inner.test.n_cells // 2], (), "cells")
    how: dict[str, Any] = {"epochs": 2, "minibatch": 200, "n_draws": 2, "progress": False}
    for part in (inner, few):
        fitted = pb.select({"small": watched}, part, **how).fit(part.train, progress=False)[0]
        seen.append(fitted.losses["train"])
    assert min(len(run) for run in seen) >= 1
    n = min(map(len, seen))
    assert seen[0][:n] == seen[1][:n]


def test_the_chosen_model_is_trained_as_long_as_was_chosen_from_each_seed(screen: pb.Screen, choice: Selection) -> None:
    fits = choice.fit(screen, 2, seed=3, progress=False)
    assert [one.seed for one in fits] == [3, 4]
    assert [len(one.losses["train"]) for one in fits] == [choice.epochs] * 2
    assert all(len(one.trained_on["cells"]) == screen.n_cells for one in fits)
    assert fits[0].losses["train"] != fits[1].losses["train"]


def test_it_says_when_more_epochs_may_do_better(inner: Split) -> None:
    last = pb.select({"small": small}, inner, epochs=1, minibatch=200, n_draws=2, progress=False)
    assert "still falling at the last epoch" in repr(last)


# Misuse.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("candidates", "error", "words"),
    [
        ([pb.node], TypeError, "select takes named candidates, as in {'node': pb.node, 'vae': pb.vae}; got list"),
        ({}, ValueError, "No candidate to choose from"),
        ({"node": 3}, TypeError, "The candidate 'node' must be a function of a screen, such as pb.node; got int"),
    ],
)
def test_candidates_that_are_none_are_refused(inner: Split, candidates: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pb.select(candidates, inner)


@pytest.mark.parametrize("setting", ["each_epoch", "devices", "checkpoint"])
def test_settings_that_it_cannot_take_are_refused(inner: Split, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"select (decides|fits many models).*'{setting}'"):
        pb.select({"node": pb.node}, inner, **{setting: 2})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", ["a screen", "none", "a number"])
def test_what_is_no_split_is_refused(screen: pb.Screen, how: str) -> None:
    splits: Any = {"a screen": [screen], "none": [], "a number": 3}[how]
    with pytest.raises(TypeError, match=r"select needs a Split of the training screen, or several, as split\.hold_out_time"):
        pb.select({"small": small}, splits)


def test_numbers_out_of_range_and_continuous_values_are_refused(screen: pb.Screen, inner: Split, choice: Selection) -> None:
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1; got 0"):
        pb.select({"small": small}, inner, epochs=0)
    with pytest.raises(ValueError, match="every must be a whole number of at least 1; got 0"):
        pb.select({"small": small}, inner, every=0)
    with pytest.raises(ValueError, match="n_fits must be a whole number of at least 1; got 0"):
        choice.fit(screen, 0)
    bulk = pb.split.hold_out_time(screen.pseudobulk(), 2, screen.perturbations[:2])
    with pytest.raises(ValueError, match=r"select scores means of log\(1 \+ count\), and this screen holds continuous values"):
        pb.select({"node": pb.node}, bulk)
