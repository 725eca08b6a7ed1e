"""The latent state beside the user's own annotations."""

import anndata
import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation
from perturbprob.inference.draws import centre
from perturbprob.model.cells import CellTable


def test_latent_states_come_back_in_a_copy(simulation: Simulation, fit: pb.Fit) -> None:
    adata = simulation.adata
    before = adata.copy()
    result = fit.to_anndata(adata)
    assert result.obsm["X_perturbprob"].shape == (adata.n_obs, 3)
    assert np.isfinite(result.obsm["X_perturbprob_rest"]).all()
    assert list(adata.obsm) == []
    assert (adata.X != before.X).nnz == 0
    assert adata.obs.equals(before.obs)


def test_a_part_of_the_cells_gets_the_same_states(simulation: Simulation, fit: pb.Fit) -> None:
    """Size factors are relative to the median of the cells that are read: the states must not depend on which those are."""
    whole = fit.to_anndata(simulation.adata)
    deep = np.asarray(simulation.adata.X.sum(1)).ravel() > 150
    part = fit.to_anndata(simulation.adata[deep])
    assert np.allclose(part.obsm["X_perturbprob"], whole.obsm["X_perturbprob"][deep], atol=1e-4)


def test_missing_genes_are_named(simulation: Simulation, fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match=r"1 genes of the fit are not in adata\.var_names, such as \['G01'\]"):
        fit.to_anndata(simulation.adata[:, 1:])


@pytest.mark.usefixtures("unchecked")
def test_a_screen_is_no_anndata(screen: pb.Screen, fit: pb.Fit) -> None:
    with pytest.raises(TypeError, match=r"to_anndata takes an AnnData; got Screen\. Give the one"):
        fit.to_anndata(screen)


def test_a_screen_made_by_hand_has_no_columns(screen: pb.Screen, fit: pb.Fit, simulation: Simulation) -> None:
    from dataclasses import replace

    other = pb.fit(pb.node(screen, 1), replace(screen, columns={}), epochs=1, progress=False)
    with pytest.raises(ValueError, match="was not read from the columns"):
        other.to_anndata(simulation.adata)


def test_corrected_expectations_are_those_of_the_average_batch(simulation: Simulation, fit: pb.Fit, screen: pb.Screen) -> None:
    """The law of the counts at η = 0 and size factor 1, cell by cell."""
    result = fit.to_anndata(simulation.adata, corrected=True)
    found = result.layers["perturbprob_corrected"]
    assert "perturbprob_corrected" not in simulation.adata.layers
    sites, table = centre(fit.model, fit.guide), CellTable(fit.model, screen, batch=-1)
    cells = table.cells(torch.arange(5))
    rest = torch.as_tensor(result.obsm["X_perturbprob_rest"][:5])
    log_share = fit.model.log_shares(sites, fit.model.moved(sites, rest, cells.protocol), cells.rows)
    wanted = fit.model.law(sites, log_share + fit.model.log_depth).mean_log1p()
    assert np.allclose(found[:5], wanted, atol=5e-4)


def test_genes_that_the_fit_does_not_know_have_no_corrected_expectation(simulation: Simulation, fit: pb.Fit) -> None:
    other = simulation.adata[:, :2].copy()
    other.var_names = ["other1", "other2"]
    more = anndata.concat([other, simulation.adata], axis=1, merge="first")
    found = fit.to_anndata(more, corrected=True).layers["perturbprob_corrected"]
    assert np.isnan(found[:, :2]).all()
    assert np.isfinite(found[:, 2:]).all()


def test_what_is_aliased_with_batch_is_said_when_batches_are_taken_away(simulation: Simulation) -> None:
    adata = simulation.adata[(simulation.adata.obs["time"] == 1) == (simulation.adata.obs["batch"] == "batch1")].copy()
    screen = pb.Screen.from_anndata(adata, media="media", baseline="rest", time="time", batch="batch")
    fit = pb.fit(pb.node(screen, 1), screen, epochs=1, progress=False)
    with pytest.warns(pb.AliasedWarning, match="time and batch are aliased in this screen: what all cells of one time share"):
        fit.to_anndata(adata, corrected=True)
