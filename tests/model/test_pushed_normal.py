"""The law of a global site in the guide is that of torch, and knows its own draws."""

import pytest
import torch
from torch.distributions import ExpTransform, SigmoidTransform

from perturbprob.model.overdispersion import Overdispersion
from perturbprob.model.pushed_normal import PushedNormal

CASES = [
    ((), None, False),
    ((), ExpTransform(), False),
    ((3, 4), SigmoidTransform(), False),
    ((5,), Overdispersion(cache_size=1), False),
    ((6, 3), None, True),
]


def parameters(shape, tied):
    """Return μ, log σ and K, with gradients, in double precision."""
    torch.manual_seed(1)
    loc, log_scale = (0.3 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    lower = [torch.randn(*shape, shape[-1], dtype=torch.float64)] if tied else []
    return [part.requires_grad_() for part in (loc, log_scale, *lower)]


def law_of(parts, transform):
    return PushedNormal(parts[0], parts[1], transform, lower=parts[2] if len(parts) > 2 else None)


@pytest.mark.parametrize(("shape", "transform", "tied"), CASES)
def test_a_draw_of_its_own_has_the_density_and_the_gradient_of_the_law_of_torch(shape, transform, tied):
    parts = parameters(shape, tied)
    law = law_of(parts, transform)
    x = law.rsample()
    own, fresh = law.log_prob(x), law_of(parts, transform)
    reference = fresh.log_prob(x)
    torch.testing.assert_close(own, reference)
    assert own.shape == ()
    weight = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).reshape(x.shape)
    found = torch.autograd.grad(own + (weight * x).sum(), parts, retain_graph=True)
    wanted = torch.autograd.grad(reference + (weight * x).sum(), parts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("shape", "transform", "tied"), CASES)
def test_several_draws_have_a_density_each_and_the_moments_of_the_law(shape, transform, tied):
    parts = parameters(shape, tied)
    law = law_of(parts, transform)
    torch.manual_seed(0)
    with torch.no_grad():
        x = law.sample((20_000,))
        assert x.shape == (20_000, *shape)
        torch.testing.assert_close(law.log_prob(x), law_of(parts, transform).log_prob(x))
        normal = x if transform is None else transform.inv(x)
        scale = parts[1].exp()
        tied_too = torch.tril(parts[2], -1) + torch.eye(shape[-1]) if tied else None
        wide = scale if tied_too is None else scale * tied_too.square().sum(-1).sqrt()
        assert ((normal.mean(0) - parts[0]) / wide).abs().max() < 5 / 20_000**0.5
        assert (normal.std(0) / wide - 1).abs().max() < 0.04


def test_another_value_than_its_last_draw_goes_the_long_way():
    law = PushedNormal(torch.zeros(2), torch.zeros(2), ExpTransform())
    first = law.rsample()
    law.rsample()
    wanted = torch.distributions.LogNormal(torch.zeros(2), torch.ones(2)).log_prob(first).sum()
    torch.testing.assert_close(law.log_prob(first), wanted)


def test_the_line_between_zero_and_one_is_its_support():
    assert PushedNormal(torch.zeros(2), torch.zeros(2), SigmoidTransform()).support.event_dim == 1
    assert bool(PushedNormal(torch.zeros(2), torch.zeros(2)).support.check(torch.tensor([-3.0, 3.0])))


def test_a_global_site_has_no_batch_shape():
    law = PushedNormal(torch.zeros(2), torch.zeros(2))
    assert law.expand(torch.Size()) is law
    with pytest.raises(NotImplementedError, match=r"above every plate; got the batch shape \(3,\)"):
        law.expand(torch.Size([3]))
