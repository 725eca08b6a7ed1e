"""Proteins and chromatin windows: the laws against float64 formulas, and what a head adds up."""

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from perturbprob.measurement.assays import AssayHead, BackgroundLaw, OpenLaw, OpenWindowHead, ProteinHead, WindowHead
from perturbprob.measurement.batch_effect import BatchEffect

RNA = torch.log(torch.tensor([0.5, 0.3, 0.2]))


def head(kind: type[AssayHead], name: str = "seen") -> AssayHead:
    """A head of four features, the second of which names the third gene, in three batches."""
    torch.manual_seed(0)
    level = torch.tensor([1.0, 2.0, 3.0, 4.0])
    effect = BatchEffect(3, level / level.sum())
    return kind(name, ["a", "b", "c", "d"], level, [-1, 2, -1, -1], RNA, effect, n_latent=2, n_hidden=8)


# References.


def test_the_background_mixture_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    background, signal, theta, weight = rng.gamma(2, 2, (4, 6))
    weight = weight / (1 + weight)
    count = rng.poisson(8, 6).astype(float)

    def binomial(rate: np.ndarray) -> np.ndarray:
        return stats.nbinom.logpmf(count, theta, theta / (theta + rate))

    expected = np.logaddexp(np.log(weight) + binomial(background), np.log1p(-weight) + binomial(background + signal))
    given = (torch.tensor(np.asarray(v), dtype=torch.float32) for v in (np.log(background), np.log(signal), theta, weight, count))
    *parameters, value = given
    np.testing.assert_allclose(BackgroundLaw(*parameters).log_prob(value), expected, rtol=1e-4)


def test_the_background_mixture_has_the_mean_of_its_draws_and_sums_to_one() -> None:
    law = BackgroundLaw(torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([0.3]))
    counts = torch.arange(500.0)[:, None]
    probability = law.log_prob(counts).double().exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-4)
    assert float((counts * probability).sum()) == pytest.approx(float(law.mean), rel=1e-3)
    pyro.set_rng_seed(0)
    assert float(law.sample(torch.Size([20_000])).mean()) == pytest.approx(float(law.mean), rel=0.03)


@pytest.mark.parametrize("low", [-40.0, -12.0])
def test_open_windows_are_those_of_scipy(low: float) -> None:
    log_rate = np.linspace(low, 3, 60)
    law = OpenLaw(torch.tensor(log_rate, dtype=torch.float32))
    exact = -np.expm1(-np.exp(log_rate))
    for value in (0, 1):
        expected = stats.bernoulli.logpmf(value, exact) if low > -36 else [np.log(exact), np.log1p(-exact)][1 - value]
        np.testing.assert_allclose(law.log_prob(torch.full((60,), float(value))), expected, rtol=2e-4, atol=2e-7)
    np.testing.assert_allclose(law.mean, exact, rtol=1e-4)


def test_the_gradient_of_a_rare_open_window_is_finite() -> None:
    log_rate = torch.tensor([-60.0, -20.0, 0.0, 4.0], requires_grad=True)
    OpenLaw(log_rate).log_prob(torch.ones(4)).sum().backward()
    exact = [float(np.exp(x - np.exp(x)) / -np.expm1(-np.exp(x))) for x in (-60.0, -20.0, 0.0, 4.0)]
    np.testing.assert_allclose(log_rate.grad, exact, rtol=1e-4, atol=1e-20)


# Laws.


@pytest.mark.parametrize("kind", [ProteinHead, WindowHead, OpenWindowHead])
def test_every_site_bears_the_name_of_its_assay(kind: type[AssayHead]) -> None:
    trace = pyro.poutine.trace(head(kind).globals).get_trace()
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert all(name.startswith("seen_") for name in names)
    assert {"seen_level", "seen_coupling", "seen_batch_effect", "seen_batch_scale"} <= set(names)
    assert set(names) >= {f"seen_{site}" for site in kind.own_sites}


def test_two_assays_share_no_site() -> None:
    names = [set(pyro.poutine.trace(head(ProteinHead, name).globals).get_trace().nodes) for name in ("left", "right")]
    assert not {n for n in names[0] & names[1] if not n.startswith("_")}


def test_the_log_rate_is_the_sum_of_its_parts() -> None:
    windows = head(WindowHead)
    pyro.set_rng_seed(1)
    sites = windows.globals()
    z, share = torch.randn(5, 2), torch.log_softmax(torch.randn(5, 3), -1)
    eta = windows.eta(sites, torch.tensor([0, 1, 2, -1, 7]), z, torch.zeros(5, 0))
    assert (eta[3:] == 0).all()
    assert float((eta[:3] * windows.batch_effect.share).sum(-1).abs().max()) < 1e-6
    expected = sites["seen_level"].log() + windows.network(z) + eta + torch.arange(5.0)[:, None]
    expected[:, 1] += sites["seen_coupling"][0] * (share[:, 2] - RNA[2])
    torch.testing.assert_close(windows(sites, z, share, torch.arange(5.0), eta).log_rate, expected)


def test_only_features_of_a_gene_follow_its_rna() -> None:
    windows = head(WindowHead)
    sites, z, eta = windows.globals(), torch.zeros(1, 2), torch.zeros(1, 4)
    one, other = (windows(sites, z, share[None], torch.zeros(1), eta).log_rate for share in (RNA, RNA + torch.tensor([1.0, 1.0, 2.0])))
    torch.testing.assert_close((other - one)[0], torch.tensor([0.0, 2.0, 0.0, 0.0]) * sites["seen_coupling"])
