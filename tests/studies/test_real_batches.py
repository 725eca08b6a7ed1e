"""Batches of two published screens: where they add up nearly, a hidden one is predicted; where they do not, the check says so."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest

import perturbprob as pb

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::perturbprob.ScreenWarning")]


def test_a_hidden_replicate_is_predicted_from_its_controls_better_than_without(data_path: Callable[[str], Path], root: Path) -> None:
    """The smallest form of ``benchmarks/held_out_replicate.py``, paired over conditions."""
    spec = importlib.util.spec_from_file_location("held_out_replicate", root / "benchmarks" / "held_out_replicate.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    screen = study.read(data_path("papalexi2021_thp1_eccite.h5ad"), "replicate", 3000, 60, 0)
    errors = study.held_out(screen, "rep_3", epochs=8, n_draws=4, seed=0)
    assert len(errors["adapt"]) == 25
    for other in ("none", "average", "data_shift"):
        assert errors["adapt"].mean() < errors[other].mean()
    assert (errors["adapt"] < errors["none"]).mean() > 0.6


def test_a_drug_that_acts_otherwise_in_each_patient_is_noticed_and_mostly_taken_up(data_path: Callable[[str], Path]) -> None:
    adata = anndata.read_h5ad(data_path("zhao2021_gbm_panobinostat.h5ad"))
    depth = np.asarray(adata.X.sum(1)).ravel()
    adata = adata[::2, ::3].copy()  # half of the cells of each patient, a third of the genes
    screen = pb.Screen.from_anndata(
        adata, batch="donor", media="treatment", baseline="vehicle (DMSO)", size_factor=(depth / np.median(depth))[::2]
    )
    left, shares = {}, {}
    for form in ("constant", "state"):
        fit = pb.fit(pb.node(screen, 5, batch_effect=form), screen, epochs=8, progress=False)
        check = pb.predictive_check(fit, screen, n_draws=20, progress=False)
        left[form] = float(check.interaction["observed_overall"] - check.interaction["replicated_overall"])
        assert "batches act differently on conditions" in check.summary()
        shares[form] = pb.decompose_batches(fit, n_draws=4, progress=False).table["overall"]
    assert left["state"] < 0.5 * left["constant"]
    for parts in shares.values():
        assert float(parts.sum()) == pytest.approx(1, abs=1e-5)
        assert float(parts.sel(source="batch")) > float(parts.sel(source="media"))  # five patients differ more than what the drug does
    assert float(shares["state"].sel(source="media:batch")) > float(shares["constant"].sel(source="media:batch"))
