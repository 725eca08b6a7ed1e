"""The Lipschitz term (B.2): the constant of the Jacobian, held to a bound."""

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.dynamics.neighbours import gradient_constant, map_constant
from perturbprob.model.assumptions.terms import carried, rest_points


@pytest.mark.parametrize(("of", "exact"), [("map", map_constant), ("gradient", gradient_constant)])
@pytest.mark.parametrize("space", ["latent", "gene"])
def test_the_lipschitz_term_holds_the_constant_of_the_jacobian_to_its_bound(screen, of, exact, space, make):
    """Also in gene space, where there is one rest state: the largest constant over conditions and rest states, found from below."""
    part = screen[[p.time == 3 and p.media != "TGFB1" for p in np.array(screen.conditions)[screen.condition]]]
    torch.manual_seed(0)
    model, sites = make(part.pseudobulk() if space == "gene" else part)
    bound = pb.Lipschitz(of=of).bind(part)
    z0 = rest_points(model, len(bound.protocols))
    flow = lambda z: carried(model, sites, bound.protocols, z.unflatten(-2, z0.shape[:2])).z.flatten(-3, -2)  # noqa: E731
    with torch.no_grad():
        truth = float(exact(flow, z0.flatten(0, 1)).max())
    found = float(bound.term(model, sites).detach().neg().sqrt())
    assert 0.9 * truth < found < 1.05 * truth  # coarser steps with gradients
    assert float(bound.term(model, sites).detach().neg().sqrt()) == found
    held, free = (pb.Lipschitz(of=of, bound=b * truth).bind(part).term(model, sites) for b in (0.5, 1.1))
    assert float(held.detach()) == pytest.approx(-((found - 0.5 * truth) ** 2), rel=1e-3)
    assert float(free.detach()) == 0
    held.backward()
    assert max(float(parameter.grad.abs().max()) for parameter in model.transition.field.parameters() if parameter.grad is not None) > 0
