"""Screens that tests of splits share."""

import pandas as pd
import pytest
from anndata import AnnData

import perturbprob as pb


@pytest.fixture(scope="session")
def screen() -> pb.Screen:
    """A fifth of the embedded screen."""
    return pb.datasets.ishikawa2023()[::5]


@pytest.fixture(scope="session")
def crossed() -> pb.Screen:
    """Control, A, B, C, D, A+B, A+C and D+E in two media at three times in three batches; E is never perturbed alone."""
    simulation = pb.simulate(n_cells=1500, n_genes=8, n_perturbations=7, media=("rest", "drug"), times=(1.0, 2.0, 3.0), seed=1)
    names = dict(zip(simulation.screen.perturbations, ["A", "B", "C", "D", "A+B", "A+C", "D+E"], strict=True))
    obs = simulation.adata.obs.assign(perturbation=simulation.adata.obs["perturbation"].astype(str).replace(names))
    adata = AnnData(simulation.adata.X, obs=obs, var=pd.DataFrame(index=list("ABCDEFGH")))
    return pb.Screen.from_anndata(adata, media="media", baseline="rest", time="time", batch="batch")
