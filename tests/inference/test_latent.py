"""The latent state beside the user's own annotations."""

import numpy as np
import pytest

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation


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


def test_a_screen_made_by_hand_has_no_columns(screen: pb.Screen, fit: pb.Fit, simulation: Simulation) -> None:
    from dataclasses import replace

    other = pb.fit(pb.node(screen, 1), replace(screen, columns={}), epochs=1, progress=False)
    with pytest.raises(ValueError, match="was not read from the columns"):
        other.to_anndata(simulation.adata)
