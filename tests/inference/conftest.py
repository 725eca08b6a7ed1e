"""A small screen and a fit of it that most tests of this room share."""

import pytest

import perturbprob as pb
from perturbprob.experiment.simulate import Simulation


@pytest.fixture(scope="session")
def simulation() -> Simulation:
    """600 cells, 12 genes, 3 knock-outs of which one does nothing, two media, two times, two batches."""
    return pb.simulate(n_cells=600, n_genes=12, n_perturbations=3, media=("rest", "drug"), times=(1.0, 2.0), n_batches=2, seed=3)


@pytest.fixture(scope="session")
def screen(simulation: Simulation) -> pb.Screen:
    """The simulated counts as a screen."""
    return simulation.screen


@pytest.fixture(scope="session")
def fit(screen: pb.Screen) -> pb.Fit:
    """A short fit."""
    return pb.fit(pb.node(screen, 3), screen, epochs=40, warmup=5, progress=False)
