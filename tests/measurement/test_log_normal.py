"""The prior of scales is that of torch."""

import pytest
import torch

from perturbprob.measurement.log_normal import LogNormal


@pytest.mark.parametrize(("loc", "scale"), [(torch.tensor(0.3), 0.7), (torch.linspace(-2, 2, 5), torch.linspace(0.1, 2, 5))])
def test_it_is_the_law_of_torch(loc, scale):
    law, reference = LogNormal(loc, scale), torch.distributions.LogNormal(loc, scale)
    x = reference.sample((7,))
    torch.testing.assert_close(law.log_prob(x), reference.log_prob(x))
    torch.testing.assert_close(law.mean, reference.mean)
    torch.testing.assert_close(law.variance, reference.variance)
    torch.testing.assert_close(law.median, reference.base_dist.mean.exp())
    torch.testing.assert_close(law.cdf(x), reference.cdf(x))
    torch.testing.assert_close(law.icdf(torch.tensor(0.3)), reference.icdf(torch.tensor(0.3)))
    torch.manual_seed(3)
    drawn = law.rsample((4,))
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, reference.rsample((4,)))


def test_draws_carry_gradients_and_shapes_expand():
    loc, scale = torch.tensor(0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    law = LogNormal(loc, scale).expand(torch.Size([3, 2]))
    law.rsample().log().sum().backward()
    assert loc.grad == pytest.approx(6.0)
    assert scale.grad.isfinite()
    assert law.to_event(2).log_prob(torch.ones(3, 2)).shape == ()
