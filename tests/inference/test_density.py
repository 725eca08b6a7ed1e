"""Held-out log density against integration, and its laws."""

import math

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.inference.density import importance
from perturbprob.inference.draws import centre
from perturbprob.model.cells import CellTable


@pytest.fixture(scope="module")
def line(screen: pb.Screen) -> pb.Fit:
    """A fit with one latent dimension, which a grid can integrate."""
    return pb.fit(pb.node(screen, 1), screen, epochs=10, warmup=1, progress=False)


def test_importance_average_is_the_integral_over_z(line: pb.Fit, screen: pb.Screen) -> None:
    cells, sites = CellTable(line.model, screen).cells(torch.arange(20)), centre(line.model, line.guide)
    grid = torch.linspace(-7, 7, 1401)
    z = grid[:, None, None].expand(-1, 20, 1)
    log_joint = line.model.measured(sites, line.model.moved(sites, z, cells.protocol), cells).log_prob(cells.counts).sum(-1)
    log_joint = log_joint - grid[:, None] ** 2 / 2 - 0.5 * math.log(2 * math.pi)
    exact = torch.logsumexp(log_joint, 0) + math.log(0.01)
    estimate = importance(line.model, line.guide, sites, cells, 4000)
    assert torch.allclose(estimate, exact, atol=0.05)


def test_more_particles_give_more(fit: pb.Fit, screen: pb.Screen) -> None:
    few, many = (np.mean([pb.log_density(fit, screen[:200], k, n_draws=2, seed=s).mean() for s in range(5)]) for k in (1, 60))
    assert few < many


def test_it_does_not_depend_on_how_cells_are_cut(fit: pb.Fit, screen: pb.Screen) -> None:
    whole, parts = (pb.log_density(fit, screen[:120], 200, n_draws=2, minibatch=m).values for m in (120, 37))
    assert np.abs(whole - parts).mean() < 0.3
    assert abs(whole.mean() - parts.mean()) < 0.1


def test_cells_keep_their_names(fit: pb.Fit, screen: pb.Screen) -> None:
    part = screen[5:9]
    assert list(pb.log_density(fit, part, 2, n_draws=1)["cell"].values) == list(part.cells)


def test_other_genes_are_refused(fit: pb.Fit) -> None:
    other = pb.simulate(n_cells=100, n_genes=8, n_perturbations=2, seed=0).screen
    with pytest.raises(ValueError, match="knows 12 genes and the screen holds 8"):
        pb.log_density(fit, other)


def test_no_particles_is_refused(fit: pb.Fit, screen: pb.Screen) -> None:
    with pytest.raises(ValueError, match="particles must be a whole number of at least 1; got 0"):
        pb.log_density(fit, screen, 0)
