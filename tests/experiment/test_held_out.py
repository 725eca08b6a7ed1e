"""A split is checked where it is made, and its proof says what a recount finds."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

import perturbprob as pb
from perturbprob.experiment.split import (
    Split,
    hold_out_batches,
    hold_out_combinations,
    hold_out_media,
    hold_out_perturbations,
    hold_out_time,
)


def test_the_proof_of_a_time_says_on_which_side_training_shows_the_perturbation(screen: pb.Screen) -> None:
    last = {t: hold_out_time(screen, t, "NANOG").proof().splitlines()[-1] for t in (2, 3, 5)}
    assert last[2] == "Extrapolated, before the first time of the perturbation in training: Knockout('NANOG') >> Wait(2)."
    assert last[3] == "Interpolated, between an earlier and a later time of the perturbation in training: Knockout('NANOG') >> Wait(3)."
    assert last[5] == "Extrapolated, past the last time of the perturbation in training: Knockout('NANOG') >> Wait(5)."


def test_each_condition_of_a_time_is_judged_by_its_own_media(crossed: pb.Screen) -> None:
    a, drug = pb.Knockout("A"), pb.Media("drug")
    late, only = a >> pb.Wait(3), a >> drug >> pb.Wait(2)
    kept = [p not in (late, a >> drug >> pb.Wait(1), a >> drug >> pb.Wait(3)) for p in crossed.conditions]
    proof = hold_out_time(crossed[np.array(kept)[crossed.condition]], 2, ["A", "B"]).proof()
    between = f"{pb.Knockout('B') >> pb.Wait(2)}, {pb.Knockout('B') >> drug >> pb.Wait(2)}"
    assert f"Interpolated, between an earlier and a later time of the perturbation in training: {between}.\n" in proof
    assert f"Extrapolated, past the last time of the perturbation in training: {a >> pb.Wait(2)}.\n" in proof
    assert proof.endswith(f"At no other time of the perturbation in these media in training: {only}.")


def test_the_proof_names_genes_of_held_out_perturbations_in_training(crossed: pb.Screen) -> None:
    proof = hold_out_perturbations(crossed, ["A", "D+E"]).proof()
    assert "Of 12 held-out conditions, 0 have a cell to train on and 12 have cells to test on" in proof
    assert "Of 2 held-out perturbations, 0 have a cell to train on in any media at any time." in proof
    assert proof.endswith("Of their 3 genes, 2 are perturbed in training: A in A+B, A+C; D in D.")
    everywhere = hold_out_perturbations(crossed, ["B", "A+B"]).proof()
    assert everywhere.endswith("Of their 2 genes, 1 is perturbed in training: A in A, A+C.")
    assert hold_out_perturbations(crossed, ["D", "D+E"]).proof().endswith("Of their 2 genes, 0 are perturbed in training.")


def test_the_proof_counts_the_parts_that_training_shows_alone(crossed: pb.Screen) -> None:
    split = hold_out_combinations(crossed, require_parts=False)
    assert split.test.perturbations == ("A+B", "A+C", "D+E")
    assert split.proof().endswith("Seen alone in training: 2 of 2 genes of A+B, A+C; 1 of 2 genes of D+E (not E).")


def test_a_gene_that_training_shows_in_a_combination_is_not_seen_alone(crossed: pb.Screen) -> None:
    without = hold_out_perturbations(crossed, "A").train
    split = hold_out_combinations(without, "A+B", require_parts=False)
    assert "A+C" in split.train.perturbations
    assert split.proof().endswith("Seen alone in training: 1 of 2 genes of A+B (not A).")


def test_the_proof_of_batches_counts_pairs_and_control(crossed: pb.Screen) -> None:
    control = int((crossed.batch[crossed.cells_of("control")] == 1).sum())
    kept, gone = (hold_out_batches(crossed, "batch2", keep_control=keep) for keep in (True, False))
    assert f"Of the control cells of held-out batches, {control} are trained on and 0 tested on." in kept.proof()
    assert f"Of the control cells of held-out batches, 0 are trained on and {control} tested on." in gone.proof()
    assert "batch2" not in gone.train.batches
    seen = crossed.summary()["batch2"].loc[lambda cells: cells > 0].index.get_level_values("perturbation")
    n_pairs, n_perturbed = len(seen), int((seen != "control").sum())
    assert f"Of {n_perturbed} held-out pairs of condition and batch, 0 have a cell to train on." in kept.proof()
    assert f"Of {n_pairs} held-out pairs of condition and batch, 0 have a cell to train on." in gone.proof()
    assert "Of 1 held-out batch, 0 have a perturbed cell to train on: batch2." in kept.proof()
    assert kept.proof().endswith(f"In other batches, {n_perturbed} of the {n_perturbed} tested conditions have cells to train on.")


def test_a_split_of_perturbations_shows_none_at_another_time(screen: pb.Screen) -> None:
    train, test = hold_out_time(screen, 5, "NANOG")
    with pytest.raises(
        ValueError, match=r"1 held-out condition \(.*\) of a perturbation that training shows elsewhere.*any media at any time"
    ):
        Split(train, test, test.conditions, "perturbations")


def test_a_split_of_media_shows_none_at_another_time(crossed: pb.Screen) -> None:
    held = pb.Knockout("A") >> pb.Media("drug") >> pb.Wait(2)
    cells = np.isin(np.arange(crossed.n_cells), crossed.cells_of(held))
    with pytest.raises(ValueError, match=r"of a pair of perturbation and media that training shows elsewhere.*at any time"):
        Split(crossed[~cells], crossed[cells], (held,), "media")


def test_a_split_of_batches_trains_on_control_at_most_and_tests_no_control_it_trains_on(crossed: pb.Screen) -> None:
    train, test = hold_out_batches(crossed, "batch2")
    with pytest.raises(ValueError, match=r"2 held-out batches \(batch1, batch3\) among the training cells: only control may stay"):
        Split(train, test, (), "batches", ("batch1", "batch2", "batch3"))
    with pytest.raises(ValueError, match=r"1 held-out batch \(batch9\) without a cell to test on"):
        Split(train, test, (), "batches", ("batch2", "batch9"))
    cells = np.isin(np.arange(crossed.n_cells), crossed.cells_of("control")) & (crossed.batch == 1)
    half = cells & (np.cumsum(cells) % 2 == 0)
    tested = np.isin(crossed.cells, test.cells) | half
    with pytest.raises(
        ValueError, match=r"1 held-out batch \(batch2\) among the training cells: only control may stay, where it is not tested"
    ):
        Split(crossed[~tested], crossed[tested], (), "batches", ("batch2",))


cell = st.tuples(
    st.sampled_from(["control", "A", "B", "A+B"]), st.sampled_from(["rest", "drug"]), st.sampled_from([1, 2, 3]), st.sampled_from("xyz")
)
CUTS: list[Callable[[pb.Screen], Split]] = [
    lambda screen: hold_out_time(screen, 2, "A"),
    lambda screen: hold_out_time(screen, screen.times[-1]),
    lambda screen: hold_out_perturbations(screen, "A"),
    lambda screen: hold_out_media(screen, "drug"),
    lambda screen: hold_out_combinations(screen, require_parts=False),
    lambda screen: hold_out_batches(screen, "y"),
    lambda screen: hold_out_batches(screen, ["x", "y"], keep_control=False),
]


@given(st.lists(cell, min_size=4, max_size=25), st.sampled_from(CUTS))
@pytest.mark.filterwarnings("ignore::perturbprob.experiment.screen.ScreenWarning")
def test_a_split_is_refused_or_its_proof_is_what_a_recount_finds(rows: list[tuple], cut: Callable[[pb.Screen], Split]) -> None:
    rows = [("control", "rest", 1, "x"), *rows]
    obs = pd.DataFrame(rows, columns=["perturbation", "media", "time", "batch"], index=[f"cell{i}" for i in range(len(rows))])
    adata = AnnData(np.ones((len(rows), 2), dtype=np.float32), obs=obs, var=pd.DataFrame(index=["A", "B"]))
    columns = {"media": "media", "baseline": "rest", "time": "time", "batch": "batch"}
    drawn = pb.Screen.from_anndata(adata, perturbation_type="knockout", **columns)
    try:
        split, refusal = cut(drawn), ""
    except ValueError as error:
        split, refusal = None, str(error)
    assert not re.search("in both parts|among the training cells|without a cell to test on|that training shows elsewhere", refusal)
    if split is None:
        return
    train, test = (obs.loc[part.cells] for part in split)
    assert sorted([*train.index, *test.index]) == sorted(obs.index)
    held = {tuple(row) for row in test.iloc[:, :3].to_numpy()} - {tuple(row) for row in train.iloc[:, :3].to_numpy()}
    assert {(p.perturbation, p.media or "rest", p.time) for p in split.held_out} == held
    proof = split.proof()
    assert proof.startswith(f"Of {len(train)} cells to train on and {len(test)} to test on, 0 are in both parts.")
    assert (f"Of {len(held)} held-out condition" in proof) == bool(held)
    if split.batches:
        pairs = {tuple(row) for row in test.to_numpy()}
        assert not pairs & {tuple(row) for row in train.to_numpy()}
        assert f"Of {len(pairs)} held-out pair" in proof
        control = train[train["batch"].isin(split.batches)]
        assert set(control["perturbation"]) <= {"control"}
        assert f"Of the control cells of held-out batches, {len(control)} are trained on" in proof
