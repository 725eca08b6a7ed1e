"""Wells of arrayed screens: where they lie, who lies beside them, and what is at the edge."""

import anndata
import numpy as np
import pandas as pd
import pytest

import perturbprob as pb
from perturbprob.experiment.plate import PLATES, read_wells


def all_wells(plate: int) -> list[str]:
    """Every well of a plate, row by row."""
    rows, columns = PLATES[plate]
    letters = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB", "AC", "AD", "AE", "AF"]
    return [f"{letter}{column + 1:02d}" for letter in letters[:rows] for column in range(columns)]


@pytest.mark.parametrize("size", sorted(PLATES))
def test_every_well_of_every_plate_is_read(size):
    rows, columns = PLATES[size]
    names = all_wells(size)
    plate = read_wells(names, plate=size)
    assert (len(names), plate.shape) == (size, (rows, columns))
    place = plate.place.loc[names]
    assert place["row"].tolist() == np.repeat(np.arange(rows), columns).tolist()
    assert place["column"].tolist() == np.tile(np.arange(columns), rows).tolist()
    grid = place["edge"].to_numpy().reshape(rows, columns)
    assert grid.sum() == size - (rows - 2) * (columns - 2)
    assert not grid[1:-1, 1:-1].any()
    assert len(plate.neighbours) == rows * (columns - 1) + columns * (rows - 1)


def test_distance_and_radius_are_symmetric_and_grow_outwards():
    place = read_wells(all_wells(96), plate=96).place
    radius, distance = (place.sort_values(["row", "column"])[name].to_numpy().reshape(8, 12) for name in ("radius", "distance"))
    for values in (radius, distance):
        np.testing.assert_allclose(values, values[::-1])
        np.testing.assert_allclose(values, values[:, ::-1])
    assert (distance.max(), radius.max()) == (3, 1.0)
    np.testing.assert_allclose(radius[0, 0], 1.0)
    assert (np.diff(radius[:4], axis=0) < 0).all()
    assert (np.diff(radius[:, :6], axis=1) < 0).all()


def test_cells_share_wells_and_either_spelling_is_read():
    plate = read_wells(pd.Series(["B2", "a1", "B2", "H12"], dtype="category"), plate=96)
    assert (plate.wells, plate.well.tolist()) == (("B2", "H12", "a1"), [0, 2, 0, 1])
    assert plate.place.loc["a1", ["row", "column"]].tolist() == [0, 0]


def test_neighbours_are_on_one_plate():
    plate = read_wells(["p1_A1", "p1_A2", "p2_A1", "p2_B1", "p1_B2", "p1_C3"])
    pairs = {frozenset((plate.wells[a], plate.wells[b])) for a, b in plate.neighbours}
    assert pairs == {frozenset(("p1_A1", "p1_A2")), frozenset(("p1_A2", "p1_B2")), frozenset(("p2_A1", "p2_B1"))}
    assert read_wells(["A1", "C3"]).neighbours.shape == (0, 2)


def test_covariates_stand_in_the_order_of_the_batches_of_a_screen():
    wells = ["A1", "A10", "A2", "D6", "H12", "D6"]
    obs = pd.DataFrame({"perturbation": ["NT", "A", "A", "NT", "A", "NT"], "well": wells}, index=[f"c{k}" for k in range(6)])
    adata = anndata.AnnData(np.ones((6, 1), np.float32), obs=obs, var=pd.DataFrame(index=["A"]))
    with pytest.warns(pb.ScreenWarning, match="3 batches .A10, A2, H12. without control cells"):
        screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", batch="well")
    plate = read_wells(adata.obs["well"], plate=96)
    assert plate.wells == screen.batches
    np.testing.assert_array_equal(plate.well, screen.batch)
    covariate = plate.covariates("indicator", batches=screen.batches)
    assert tuple(covariate.index) == screen.batches
    assert covariate["edge"].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    pd.testing.assert_frame_equal(covariate, plate.covariates("indicator"))
    joint = pb.Screen.concat({"lab1": screen, "lab2": screen[:3]})
    again = read_wells(joint.batches).covariates("indicator", batches=joint.batches)
    np.testing.assert_array_equal(again[: len(screen.batches)], covariate)


def test_edge_terms_and_neighbours_of_a_whole_plate():
    rows, columns = PLATES[24]
    plate = read_wells(all_wells(24), plate=24)
    table = plate.covariates("radial", neighbours=True)
    assert (list(table.columns), tuple(table.index)) == (["radius_squared", "neighbours"], plate.wells)
    radial, beside = (table.loc[all_wells(24), name].to_numpy().reshape(rows, columns) for name in table)
    np.testing.assert_allclose(radial, (np.linspace(-1, 1, rows)[:, None] ** 2 + np.linspace(-1, 1, columns) ** 2) / 2)
    assert beside.tolist() == [[2, 3, 3, 3, 3, 2], [3, 4, 4, 4, 4, 3], [3, 4, 4, 4, 4, 3], [2, 3, 3, 3, 3, 2]]
    assert list(plate.covariates("indicator").columns) == ["edge"]
    assert plate.covariates(None, neighbours=True)["neighbours"].equals(table["neighbours"])


def test_misuse():
    with pytest.raises(ValueError, match=r"2 wells \(H13, Z60\) not on a plate of 96 wells \(A1 to H12\)\. Did you mean 'H"):
        read_wells(["A1", "H13", "Z60"])
    with pytest.raises(ValueError, match=r"1 well \(I20\) .* A plate of 384 wells has it: pass plate=384 if it is one\. Did you mean"):
        read_wells(["A1", "I20"])
    with pytest.raises(ValueError, match=r"2 wells \(A0, well 3\) not on a plate of 384 wells \(A1 to P24\)\. Did you mean 'A"):
        read_wells(["A0", "well 3"], plate=384)
    with pytest.raises(ValueError, match=r"1 well \(nan\) not on a plate"):
        read_wells(pd.Series(["A1", np.nan], dtype=object))
    with pytest.raises(ValueError, match=r"2 names \(A01, A1\) that mean the same wells: write each well in one way"):
        read_wells(["A1", "A01"])
    with pytest.raises(ValueError, match=r"plate=100 is no usual size of a plate\. Known: 6, 12, 24, 48, 96, 384, 1536"):
        read_wells(["A1"], plate=100)
    with pytest.raises(ValueError, match="no well to read"):
        read_wells([])
    with pytest.raises(ValueError, match=r"1 batch \(A3\) without a well in this plate map\. Did you mean 'A1'"):
        read_wells(["A1", "B1"]).covariates(batches=["A3"])
    with pytest.raises(ValueError, match=r"Unknown edge='rim'\. Use 'radial', 'indicator' or None"):
        read_wells(["A1"]).covariates("rim")
    with pytest.raises(ValueError, match="leaves no covariate"):
        read_wells(["A1"]).covariates(None)
