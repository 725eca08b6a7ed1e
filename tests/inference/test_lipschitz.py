"""Lipschitz constants at the data: against automatic differentiation, in every condition, and refused where they mean nothing."""

from functools import partial

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.dynamics.neighbours import gradient_constant, map_constant
from perturbprob.inference.draws import global_draws, seeded
from perturbprob.model.cells import CellTable

SHORT = {"n_draws": 3, "progress": False}


def bent(z: torch.Tensor) -> torch.Tensor:
    """A map of which every derivative can be written down."""
    return torch.stack([z[..., 0].sin() * z[..., 1], z[..., 1] ** 2 + z[..., 0] * z[..., 2], z[..., 2].exp()], -1)


def test_constants_of_a_map_are_those_of_its_derivatives():
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.linspace(0, np.pi, 61, dtype=torch.float64)
    tilt, turn = torch.meshgrid(angles, 2 * angles, indexing="ij")
    every = torch.stack([tilt.sin() * turn.cos(), tilt.sin() * turn.sin(), tilt.cos()], -1).reshape(-1, 3)
    for row, slope, turning in zip(z, map_constant(bent, z), gradient_constant(bent, z), strict=True):
        first = torch.autograd.functional.jacobian(bent, row)
        second = torch.autograd.functional.jacobian(lambda x: torch.autograd.functional.jacobian(bent, x, create_graph=True), row)
        assert float(slope) == pytest.approx(float(torch.linalg.matrix_norm(first, 2)))
        largest = torch.linalg.matrix_norm(torch.einsum("ijk,uk->uij", second, every), 2).max()
        assert float(turning) == pytest.approx(float(largest), rel=3e-3)


def test_the_constant_of_a_fit_is_that_of_its_jacobian_at_its_cells(fit: pb.Fit, screen: pb.Screen):
    part = screen[screen.cells_of(screen.conditions[-1])[:5]]
    found = pb.lipschitz_constant(fit, part, of="map", **SHORT)
    table = CellTable(fit.model, part)
    cells, expected = table.cells(torch.arange(5)), []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, 3, 0)):
        with torch.no_grad(), seeded(0, k, 7):
            z0 = fit.guide.rest(cells).sample()
        flow = partial(lambda sites, z: fit.model.moved(sites, z[None], [s[torch.tensor([0])] for s in cells.protocol]).z[0], sites)
        expected.append(max(float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(flow, z), 2)) for z in z0))
    assert found["constant"].item() == pytest.approx(np.mean(expected), rel=1e-2)  # coarser steps with gradients


def test_every_condition_has_a_constant_of_both(fit: pb.Fit, screen: pb.Screen):
    found = pb.lipschitz_constant(fit, screen, n_cells=5, **SHORT)
    assert found["of"].values.tolist() == ["map", "gradient"]
    assert found["condition"].values.tolist() == [str(p) for p in screen.conditions]
    assert bool((found["constant"] > 0).all())
    assert bool(((found["lower"] <= found["constant"]) & (found["constant"] <= found["upper"])).all())
    more = pb.lipschitz_constant(fit, screen, of="map", n_cells=screen.n_cells, **SHORT)
    few = pb.lipschitz_constant(fit, screen, of="map", n_cells=5, **SHORT)
    assert float((more["constant"] >= 0.9 * few["constant"]).mean()) == 1  # the largest over more cells, in other draws of z₀


def test_a_seed_repeats_and_leaves_the_users_random_state_alone(fit: pb.Fit, screen: pb.Screen):
    state = torch.random.get_rng_state()
    first, again = (pb.lipschitz_constant(fit, screen, of="map", n_cells=3, **SHORT) for _ in range(2))
    assert first.identical(again)
    assert torch.equal(state, torch.random.get_rng_state())
    other = pb.lipschitz_constant(fit, screen, of="map", n_cells=3, seed=1, **SHORT)
    assert not np.allclose(first["constant"], other["constant"])


def test_continuous_values_have_constants_in_gene_space():
    bulk = pb.simulate(n_cells=300, n_genes=6, n_perturbations=2, times=(1.0, 2.0), seed=0).screen.pseudobulk()
    fit = pb.fit(pb.node(bulk), bulk, epochs=2, progress=False)
    found = pb.lipschitz_constant(fit, bulk, **SHORT)
    assert bool((found["constant"] > 0).all())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"of": "field"}, "of='field': use 'map' or 'gradient'"),
        ({"of": ()}, "use 'map' or 'gradient'"),
        ({"n_cells": 0}, "n_cells must be a whole number of at least 1; got 0"),
        ({"n_draws": 0}, "n_draws must be a whole number of at least 1"),
        ({"level": 1.0}, "level is a probability between 0 and 1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fit: pb.Fit, screen: pb.Screen, how: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pb.lipschitz_constant(fit, screen, **how)


def test_a_screen_of_other_genes_is_refused(fit: pb.Fit):
    with pytest.raises(ValueError, match="The model knows 12 genes"):
        pb.lipschitz_constant(fit, pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, seed=1).screen)
