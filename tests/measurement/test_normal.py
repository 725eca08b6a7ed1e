"""Normal values: the density of known, learnt and both kinds of noise, against scipy."""

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from perturbprob.measurement.normal import Normal


@pytest.mark.parametrize(("noise", "error"), [(0.5, None), (None, 0.3), (0.5, 0.3)])
def test_density_is_that_of_scipy(noise, error):
    torch.manual_seed(0)
    location, value = torch.randn(4, 3), torch.randn(4, 3)
    sigma = None if noise is None else torch.full((3,), noise)
    known = None if error is None else torch.full((4, 3), error)
    law = Normal(3)(location, sigma, known)
    scale = np.sqrt((noise or 0) ** 2 + (error or 0) ** 2)
    np.testing.assert_allclose(law.log_prob(value), stats.norm.logpdf(value.double(), location.double(), scale), rtol=1e-5)


def test_learnt_noise_is_one_site_for_each_gene_and_known_noise_none():
    trace = pyro.poutine.trace(Normal(3).globals).get_trace()
    assert trace.nodes["noise"]["value"].shape == (3,)
    assert Normal(3, learnt=False).globals() == {}
