"""Screens of several laboratories as one: nothing that a cell's counts depend on may change."""

import warnings
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

import perturbprob as pb
from perturbprob.experiment import Screen, ScreenWarning

GENES = ("A", "B", "C", "D")


def lab(seed: int, genes: tuple[str, ...] = GENES, n_cells: int = 24, **columns) -> Screen:
    """A screen of two batches with counts of any depth."""
    random = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "perturbation": np.resize(["NT", "A", "B"], n_cells),
            "media": np.resize(["rest", "rest", "rest", "drug", "drug", "drug"], n_cells),
            "time": 2.0 + seed,
            "batch": np.repeat(["rep1", "rep2"], n_cells // 2),
            "spacer": "s",
        },
        index=[f"cell{k}" for k in range(n_cells)],
    )
    counts = random.poisson(random.gamma(2.0, 10.0 * (seed + 1), (n_cells, 1)), (n_cells, len(genes))) + 1.0
    given = {"media": "media", "baseline": "rest", "time": "time", "time_unit": "day", "batch": "batch", "sgrna": "spacer"} | columns
    adata = anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=list(genes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScreenWarning)  # of perturbed genes that are not measured
        return Screen.from_anndata(adata, perturbation_type="knockout", **given)


@pytest.mark.filterwarnings("ignore:'lab1' and 'lab3' hold the same cells")
def test_every_cell_keeps_its_counts_condition_batch_and_expected_depth():
    labs = {"lab1": lab(0), "lab2": lab(1), "lab3": lab(0)}
    joint = Screen.concat(labs)
    assert joint.batches == tuple(f"{name}/rep{k}" for name in labs for k in (1, 2))
    assert joint.batch_groups.tolist() == [0, 0, 1, 1, 2, 2]
    start = 0
    for name, part in labs.items():
        cells = slice(start, start + part.n_cells)
        np.testing.assert_array_equal(joint.counts[cells].toarray(), part.counts.toarray())
        np.testing.assert_allclose(joint.size_factor[cells] * joint.depth, part.size_factor * part.depth, rtol=1e-12)
        assert [joint.conditions[c] for c in joint.condition[cells]] == [part.conditions[c] for c in part.condition]
        assert [joint.batches[b] for b in joint.batch[cells]] == [f"{name}/{part.batches[b]}" for b in part.batch]
        assert joint.cells[cells].tolist() == [f"{name}/{cell}" for cell in part.cells]
        start += part.n_cells
    assert joint.n_cells == start
    assert len(joint.conditions) == len(set(joint.conditions)) == 12
    assert [p.perturbation for p in joint.conditions[:4]] == ["control"] * 4
    assert (joint.control, joint.baseline, joint.time_unit, joint.media) == ("control", "rest", "day", ("rest", "drug"))
    assert set(joint.sgrna) == {"s"}


def test_one_screen_cut_in_two_and_joined_is_the_screen():
    screen = pb.datasets.ishikawa2023()
    joint = Screen.concat({"x": screen[screen.batch < 2], "y": screen[screen.batch >= 2]})
    np.testing.assert_allclose(joint.depth, np.median(screen.size_factor * screen.depth))
    assert joint.conditions == screen.conditions
    assert sorted(joint.cells) == sorted(screen.cells)  # no name occurs twice, so none changes
    again = joint[screen.cells]
    np.testing.assert_array_equal(again.counts.toarray(), screen.counts.toarray())
    np.testing.assert_array_equal(again.condition, screen.condition)


def test_only_common_genes_are_kept_in_the_order_of_the_first_and_the_depth_is_of_them():
    labs = {"lab1": lab(0), "lab2": lab(1, ("X", "D", "B", "Y"))}
    with pytest.warns(ScreenWarning, match=r"2 genes are measured by all screens and kept; dropped: 2 of 4 in lab1, 2 of 4 in lab2"):
        joint = Screen.concat(labs)
    assert joint.genes == ("B", "D")
    np.testing.assert_array_equal(joint.counts[24:].toarray(), labs["lab2"].counts[:, [2, 1]].toarray())
    for cells in (slice(0, 24), slice(24, 48)):
        expected = (joint.size_factor[cells] * joint.depth).sum()
        np.testing.assert_allclose(expected, joint.counts[cells].sum())


def test_batch_groups_survive_parts_and_pseudobulk():
    joint = Screen.concat({"lab1": lab(0), "lab2": lab(1)})
    assert joint[joint.batch != 0].batch_groups.tolist() == [0, 1, 1]
    assert joint[joint.batch >= 2].batch_groups.tolist() == [0, 0]
    assert joint[joint.batch >= 2].screen_of_batch == ("lab2", "lab2")
    means = joint.pseudobulk()
    assert (means.batch_groups.tolist(), means.screen_of_batch) == ([0, 0, 1, 1], joint.screen_of_batch)


def test_an_ordinary_screen_is_one_group():
    screen = lab(0)
    assert (screen.batch_groups.tolist(), screen.screen_of_batch) == ([0, 0], ())
    assert screen[screen.batch == 1].batch_groups.tolist() == [0]


def test_continuous_screens_join_with_the_errors_that_are_known():
    one, two = lab(0).pseudobulk(), lab(1).pseudobulk()
    joint = Screen.concat({"lab1": one, "lab2": replace(two, standard_error=None)})
    assert (joint.values, joint.depth, set(joint.size_factor), joint.sgrna) == ("continuous", 1.0, {1.0}, None)
    np.testing.assert_array_equal(joint.standard_error[: one.n_cells], one.standard_error)
    assert np.isnan(joint.standard_error[one.n_cells :]).all()
    assert Screen.concat({"a": replace(one, standard_error=None), "b": replace(two, standard_error=None)}).standard_error is None


def test_a_joint_screen_can_be_fitted_and_laid_out():
    joint = Screen.concat({"lab1": lab(0), "lab2": lab(1)})
    assert joint.layout.batches_with_control == joint.batches
    fit = pb.fit(pb.node(joint, n_latent=2), joint, epochs=1, progress=False)
    assert np.isfinite(fit.losses["train"]).all()


def test_misuse(unchecked):
    one, two = lab(0), lab(1)
    with pytest.raises(ValueError, match=r"joins two screens or more; got 1"):
        Screen.concat({"lab1": one})
    with pytest.raises(TypeError, match=r"joins named screens, as in .*; got list"):
        Screen.concat([one, two])
    with pytest.raises(TypeError, match=r"A Screen is needed here; got str"):
        Screen.concat({"lab1": one, "lab2": "two"})
    with pytest.raises(ValueError, match=r"Name each screen by a text, which its batches are named after; got 2"):
        Screen.concat({"lab1": one, 2: two})
    with pytest.raises(ValueError, match=r"No gene is measured by all screens; genes are called 'A' in lab1, 'ENSG1' in lab2\. Bring"):
        Screen.concat({"lab1": one, "lab2": lab(1, ("ENSG1", "ENSG2"))})
    with pytest.raises(ValueError, match=r"differ in values: 'counts' in lab1, 'continuous' in lab2. Read them the same way"):
        Screen.concat({"lab1": one, "lab2": two.pseudobulk()})
    with pytest.raises(ValueError, match=r"differ in time_unit: 'day' in lab1, 'hour' in lab2. Bring the times to one unit"):
        Screen.concat({"lab1": one, "lab2": lab(1, time_unit="hour")})
    with pytest.raises(ValueError, match=r"differ in baseline: 'rest' in lab1, 'drug' in lab2. All cells must start in one media"):
        Screen.concat({"lab1": one, "lab2": lab(1, baseline="drug")})
    with pytest.raises(ValueError, match=r"differ in baseline: 'rest' in lab1, None in lab2"):
        Screen.concat({"lab1": one, "lab2": lab(1, media=None, baseline=None)})


def test_screens_that_read_nontargeting_cells_differently_are_refused():
    other = lab(1, control="B", nontargeting="perturbation")
    with pytest.raises(ValueError, match=r"non-targeting sgRNAs are 'control' in lab1, 'perturbation' in lab2. Read each with the same"):
        Screen.concat({"lab1": lab(0), "lab2": other})


def test_a_screen_without_counts_in_the_common_genes_is_refused():
    two = lab(1)
    empty = two.counts.toarray()
    empty[:, 1:] = 0
    two = replace(two, counts=type(two.counts)(empty))
    with (
        pytest.warns(ScreenWarning, match=r"2 genes are"),
        pytest.raises(ValueError, match=r"no count in the genes that all screens"),
    ):
        Screen.concat({"lab1": lab(0, ("B", "C")), "lab2": two})


def test_the_same_cells_under_two_names_are_noticed():
    with pytest.warns(ScreenWarning, match="'lab1' and 'lab2' hold the same cells with the same values, which will count twice"):
        Screen.concat({"lab1": lab(0), "lab2": lab(0)})
