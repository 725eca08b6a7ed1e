"""Log densities of whole sites: those of torch, and their gradients."""

from itertools import product

import pyro.distributions as dist
import pytest
import torch

from perturbprob.measurement.density import log_density, normal
from perturbprob.measurement.log_normal import LogNormal

SHAPES = [(), (4,), (3, 1), (3, 4)]


@pytest.mark.parametrize(("loc", "scale"), list(product(SHAPES, SHAPES)))
@pytest.mark.parametrize("logarithm", [False, True])
def test_it_has_the_value_and_the_gradients_of_torchs_own(loc: tuple[int, ...], scale: tuple[int, ...], logarithm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw((3, 4)).exp(), draw(loc), draw(scale).exp()]
    results = []
    for law in (LogNormal, torch.distributions.LogNormal) if logarithm else (dist.Normal, torch.distributions.Normal):
        x, *parameters = (value.clone().requires_grad_() for value in inputs)
        made = law(*(value.expand(3, 4) for value in parameters)) if logarithm else law(*parameters)
        ours = law in (LogNormal, dist.Normal)
        total = 2.5 * (log_density(made.to_event(len(made.batch_shape)), x) if ours else made.log_prob(x).sum())
        total.backward()
        results.append([total.detach(), x.grad, *(parameter.grad for parameter in parameters)])
    for own, theirs in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs)


def test_other_laws_are_asked_themselves() -> None:
    x = torch.tensor([0.2, 0.7])
    law = dist.Beta(torch.ones(2), 3 * torch.ones(2))
    torch.testing.assert_close(log_density(law.to_event(1), x), law.log_prob(x).sum())


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    x = torch.zeros(3, requires_grad=True)
    normal(x, torch.ones(3), torch.ones(1)).backward()
    torch.testing.assert_close(x.grad, torch.ones(3))
