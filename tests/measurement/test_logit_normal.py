"""The prior of shares is that of torch."""

import pytest
import torch
from torch import distributions as theirs

from perturbprob.measurement.logit_normal import LogitNormal


@pytest.mark.parametrize(("loc", "scale"), [(torch.tensor(0.3), 0.7), (torch.linspace(-2, 2, 5), torch.linspace(0.1, 2, 5))])
def test_it_is_the_law_of_torch(loc: torch.Tensor, scale: float | torch.Tensor) -> None:
    law, reference = LogitNormal(loc, scale), theirs.TransformedDistribution(theirs.Normal(loc, scale), [theirs.SigmoidTransform()])
    x = reference.sample((7,))
    torch.testing.assert_close(law.log_prob(x), reference.log_prob(x))
    torch.testing.assert_close(law.median, torch.sigmoid(loc))
    torch.testing.assert_close(law.cdf(x), reference.cdf(x))
    torch.testing.assert_close(law.icdf(torch.tensor(0.3)), reference.icdf(torch.tensor(0.3)))
    torch.manual_seed(3)
    drawn = law.rsample((4,))
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, reference.rsample((4,)))


def test_draws_carry_gradients_stay_inside_and_shapes_expand() -> None:
    loc, scale = torch.tensor(0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    law = LogitNormal(loc, scale).expand(torch.Size([3, 2]))
    torch.logit(law.rsample()).sum().backward()
    assert loc.grad == pytest.approx(6.0, rel=1e-5)
    assert scale.grad.isfinite()
    assert law.to_event(2).log_prob(torch.full((3, 2), 0.5)).shape == ()
    assert 0 < LogitNormal(torch.tensor([-200.0, 200.0]), 1.0).sample().prod() < 1
