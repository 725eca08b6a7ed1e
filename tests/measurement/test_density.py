"""Log densities of many sites together: those of torch, and their gradients."""

from itertools import product

import pyro.distributions as dist
import pytest
import torch
from torch import distributions as theirs

from perturbprob.measurement.density import log_density
from perturbprob.measurement.log_normal import LogNormal
from perturbprob.measurement.logit_normal import LogitNormal

SHAPES = [(), (4,), (3, 1), (3, 4)]
LAWS = {
    "itself": (dist.Normal, theirs.Normal),
    "log": (LogNormal, theirs.LogNormal),
    "logit": (LogitNormal, lambda loc, scale: theirs.TransformedDistribution(theirs.Normal(loc, scale), [theirs.SigmoidTransform()])),
}


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return numbers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("loc", "scale"), list(product(SHAPES, SHAPES)))
@pytest.mark.parametrize("line", LAWS)
def test_they_have_the_value_and_the_gradients_of_torchs_own(loc: tuple[int, ...], scale: tuple[int, ...], line: str) -> None:
    x, centre, width = drawn((3, 4), loc, scale)
    inputs, results = [torch.sigmoid(x), centre, width.exp()], []
    for law in LAWS[line]:
        x, *parameters = (value.clone().requires_grad_() for value in inputs)
        made = law(*(value.expand(3, 4) for value in parameters))
        total = 2.5 * (log_density([made.to_event(2)], [x]) if law is LAWS[line][0] else made.log_prob(x).sum())
        total.backward()
        results.append([total.detach(), x.grad, *(parameter.grad for parameter in parameters)])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other)


def test_sites_add_up_whatever_their_laws_and_their_order() -> None:
    share, row, single = torch.tensor([0.2, 0.7]), torch.linspace(0.1, 2, 3), torch.tensor(0.4)
    laws = [
        dist.Beta(torch.ones(2), 3 * torch.ones(2)).to_event(1),
        LogNormal(single, 0.3),
        dist.Normal(torch.zeros(3), row).to_event(1),
        LogitNormal(torch.zeros(2), 1.5).to_event(1),
        LogNormal(torch.zeros(3), row).to_event(1),
    ]
    values = [share, single, row, share, row]
    wanted = sum(law.log_prob(value) for law, value in zip(laws, values, strict=True))
    torch.testing.assert_close(log_density(laws, values), wanted)
    torch.testing.assert_close(log_density(laws[::-1], values[::-1]), wanted)


def test_of_nothing_it_is_zero() -> None:
    assert log_density([], []) == 0
