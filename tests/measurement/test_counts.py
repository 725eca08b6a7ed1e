"""Count laws: log-densities, gradients and moments against scipy in float64."""

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from scipy.special import digamma, expit, gammaln

from perturbprob.measurement.counts import CountLaw, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

THETA = [1e-3, 1e-2, 0.3, 1, 7, 29.9, 30.1, 1e2, 1e3, 1e5, 1e7]
RATE = [1e-8, 1e-4, 1e-2, 1, 30, 1e3, 1e4]
COUNT = [0, 1, 2, 7, 50, 1e3, 1e4]
GATE = [1e-6, 0.01, 0.5, 0.99]
LAWS = ["poisson", "negative_binomial", "zero_inflated"]
SOFTPLUS = 3e-9  # torch's softplus is linear beyond 20, where it is off by e^-20
STIRLING = 2e-7  # the first term that the series leaves out, at its smallest θ
EVERYDAY = [(rate, theta, gate) for rate in (0.05, 1.3, 20.0) for theta in (None, 0.2, 3.0, 80.0) for gate in (None, 0.3)]

SUMMABLE = [
    (rate, theta)
    for rate in (1e-8, 1e-3, 0.2, 3.0, 60.0, 1e3)
    for theta in (1e-3, 0.1, 1.0, 10.0, 1e3, 1e7, None)
    if theta is None or rate / theta < 1e5
]


def terms(x, mu, theta):
    """The four terms of the log-density of the negative binomial, or the three of the Poisson law."""
    if theta is None:
        return [x * np.log(mu), -mu, -gammaln(x + 1)]
    return [gammaln(x + theta) - gammaln(theta), -gammaln(x + 1), -theta * np.log1p(mu / theta), -x * np.log1p(theta / mu)]


def exact(x, mu, theta, gate):
    """The log-density and its gradients by log μ, log θ and π, in float64."""
    log_prob = sum(terms(x, mu, theta))
    by_rate = x - mu if theta is None else x - (x + theta) * (mu / (mu + theta))
    by_theta = 0 * x if theta is None else theta * (digamma(x + theta) - digamma(theta) - np.log1p(mu / theta) + (mu - x) / (mu + theta))
    if gate is None:
        return log_prob, by_rate, by_theta, 0 * x
    zero = x == 0
    full = np.where(zero, np.logaddexp(np.log(gate), np.log1p(-gate) + log_prob), np.log1p(-gate) + log_prob)
    open_share = np.where(zero, np.exp(np.log1p(-gate) + log_prob - full), 1.0)
    by_gate = np.where(zero, -np.expm1(np.where(zero, log_prob, 0)) * np.exp(-np.where(zero, full, 0)), -1 / (1 - gate))
    return full, open_share * by_rate, open_share * by_theta, by_gate


def grid(law, dtype):
    """Every combination of parameters and counts, rounded to the dtype: x, log μ, θ, π as tensors."""
    axes = [*np.meshgrid(COUNT, RATE, THETA if law != "poisson" else [1], GATE if law == "zero_inflated" else [0.5], indexing="ij")]
    axes[1] = np.log(axes[1])
    x, log_rate, theta, gate = (torch.tensor(axis.ravel()).to(dtype) for axis in axes)
    return x, log_rate, None if law == "poisson" else theta, gate if law == "zero_inflated" else None


def float64(*values):
    """The same values as numpy arrays of float64."""
    return [None if value is None else value.detach().double().numpy() for value in values]


def make(rate, theta, gate, dtype=torch.float64):
    """The law of one gene."""
    rest = [None if value is None else torch.tensor([value], dtype=dtype) for value in (theta, gate)]
    return CountLaw(torch.tensor([rate], dtype=dtype).log(), *rest)


# References.


@pytest.mark.parametrize(("rate", "theta", "gate"), [(r, t, g) for r, t, g in EVERYDAY if g is None or t is not None])
def test_the_slope_of_drawn_log1p_is_on_average_that_of_its_mean(rate, theta, gate):
    n, given = 200_000, [torch.tensor([rate]).double().log().requires_grad_()]
    given += [] if theta is None else [torch.tensor([theta], dtype=torch.double, requires_grad=True)]
    law = CountLaw(*given) if gate is None else CountLaw(*given, torch.tensor([gate], dtype=torch.double))
    exact = torch.autograd.grad(law.mean_log1p().sum(), given)
    # each draw has a parameter of its own, so that its slope is seen alone
    own = [value.detach().expand(n, 1).clone().requires_grad_() for value in given]
    drawn = CountLaw(*own) if gate is None else CountLaw(*own, torch.full((n, 1), gate, dtype=torch.double))
    pyro.set_rng_seed(0)
    y = drawn.rsample_log1p()
    assert y.mean().item() == pytest.approx(law.mean_log1p().item(), abs=5 * y.std().item() / n**0.5 + 1e-5)
    for slope, expected in zip(torch.autograd.grad(y.sum(), own), exact, strict=True):
        assert slope.mean().item() == pytest.approx(float(expected), abs=5 * float(slope.std()) / n**0.5 + 1e-5)


def test_drawn_log1p_are_logs_of_counts_of_every_shape():
    law = CountLaw(torch.zeros(4, 3), torch.ones(3), torch.full((3,), 0.5))
    y = law.rsample_log1p(torch.Size([50]))
    assert y.shape == (50, 4, 3)
    torch.testing.assert_close(y.expm1(), y.expm1().round(), rtol=1e-5, atol=1e-5)
    pyro.set_rng_seed(1)
    drawn = law.rsample_log1p(torch.Size([5]))
    pyro.set_rng_seed(1)
    torch.testing.assert_close(drawn, law.sample(torch.Size([5])).log1p())


@pytest.mark.parametrize("theta", [0.01, 0.7, 12.0, 300.0])
def test_the_reference_is_scipy_where_scipy_is_accurate(theta):
    x, mu = np.arange(200.0), 9.0
    np.testing.assert_allclose(sum(terms(x, mu, theta)), stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sum(terms(x, mu, None)), stats.poisson.logpmf(x, mu), rtol=1e-12)
    step = 1e-6
    for gate in (None, 0.2):
        value = [
            exact(x, mu * np.exp(a), theta * np.exp(b), gate if gate is None else gate + c)[0]
            for a, b, c in step * np.r_[np.eye(3), -np.eye(3)]
        ]
        for k, gradient in enumerate(exact(x, mu, theta, gate)[1:]):
            np.testing.assert_allclose((value[k] - value[k + 3]) / (2 * step), gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS)
def test_log_prob_is_the_formula_in_float64_to_rounding(law, dtype):
    x, log_rate, theta, gate = grid(law, dtype)
    log_prob = CountLaw(log_rate, theta, gate).log_prob(x)
    x, log_rate, theta, gate = float64(x, log_rate, theta, gate)
    mu = np.exp(log_rate)
    error = max(4 * torch.finfo(dtype).eps, SOFTPLUS) * (1 + sum(map(abs, terms(x, mu, theta)))) + STIRLING
    assert log_prob.dtype == dtype
    assert (np.abs(log_prob.double().numpy() - exact(x, mu, theta, gate)[0]) <= error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS)
def test_gradients_are_the_formulas_in_float64_to_rounding(law, dtype):
    x, log_rate, theta, gate = grid(law, dtype)
    given = [value.requires_grad_() for value in (log_rate, theta, gate) if value is not None]
    found = dict(
        zip(("rate", "theta", "gate"), torch.autograd.grad(CountLaw(log_rate, theta, gate).log_prob(x).sum(), given), strict=False)
    )
    found = dict(zip(found, float64(*found.values()), strict=True))
    x, log_rate, theta, gate = float64(x, log_rate, theta, gate)
    mu = np.exp(log_rate)
    _, by_rate, by_theta, by_gate = exact(x, mu, theta, gate)
    rounding = max(25 * torch.finfo(dtype).eps, SOFTPLUS)
    error = rounding * (1 + x + mu) * (1 + abs(np.log(mu))) + 5 * STIRLING
    assert (np.abs(found["rate"] - by_rate) <= error).all()
    if theta is not None:
        assert (np.abs(theta * found["theta"] - by_theta) <= error).all()
    if gate is not None:
        assert (np.abs(found["gate"] - by_gate) <= rounding * (1 + np.abs(by_gate))).all()


@pytest.mark.parametrize("law", LAWS)
def test_every_gradient_is_finite_at_extreme_values(law):
    log_rate, theta, gate = torch.meshgrid(
        torch.tensor([-80.0, -40.0, 0.0, 20.0]),
        torch.tensor([1e-8, 1e-3, 1.0, 1e7, 1e20]),
        torch.tensor([1e-30, 1e-6, 0.5, 1 - 1e-6]),
        indexing="ij",
    )
    for count in (0.0, 1.0, 1e4, 1e6):
        given = [log_rate.clone(), *[theta.clone()] * (law != "poisson"), *[gate.clone()] * (law == "zero_inflated")]
        given = [value.requires_grad_() for value in given]
        log_prob = CountLaw(*given).log_prob(torch.full_like(log_rate, count))
        assert torch.isfinite(log_prob).all()
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(log_prob.sum(), given))


@pytest.mark.parametrize(("rate", "theta", "gate"), EVERYDAY)
def test_mean_variance_and_total_are_sums_over_the_density(rate, theta, gate):
    law, x = make(rate, theta, gate), torch.arange(6000, dtype=torch.float64)
    p = law.expand(torch.Size([6000, 1])).log_prob(x[:, None]).exp()[:, 0]
    mean = (p * x).sum()
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(law.mean[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(law.variance[0], (p * (x - mean) ** 2).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rate", "theta"), SUMMABLE)
def test_mean_log1p_is_the_sum_over_the_density(rate, theta, dtype):
    tail = 0 if theta is None else 45 * (rate + theta) / theta  # it falls by θ / (μ + θ) per count
    x = np.arange(2000.0 + tail)
    p = np.exp(sum(terms(x, rate, theta)))
    assert p.sum() == pytest.approx(1, abs=1e-6)
    expected = np.sum(p * np.log1p(x))
    assert float(make(rate, theta, None, dtype).mean_log1p()) == pytest.approx(expected, abs=1e-5)
    assert float(make(rate, theta, 0.25, dtype).mean_log1p()) == pytest.approx(0.75 * expected, abs=1e-5)


@pytest.mark.parametrize("rate", [1e4, 1e6])
def test_mean_log1p_of_a_large_mean_is_its_log(rate):
    # E log(1 + x) = log(1 + μ) − var / (2 (1 + μ)²) + O(1 / μ²)
    assert float(make(rate, None, None, torch.float32).mean_log1p()) == pytest.approx(
        np.log1p(rate) - 0.5 * rate / (1 + rate) ** 2, abs=1e-5
    )


@pytest.mark.parametrize(("rate", "theta", "gate"), EVERYDAY)
def test_draws_have_the_moments_and_the_zeros_of_the_law(rate, theta, gate):
    torch.manual_seed(0)
    law, n = make(rate, theta, gate), 40_000
    x = law.sample(torch.Size([n]))[:, 0]
    assert (x == x.round()).all()
    assert (x >= 0).all()
    zero = law.log_prob(torch.zeros(1, dtype=torch.float64)).exp()
    squares = (x - law.mean) ** 2
    for drawn, expected in ((x, law.mean), (squares, law.variance), ((x == 0).double(), zero)):
        assert abs(drawn.mean() - expected) < 5 * drawn.std() / n**0.5 + 1 / n


# Laws.


def test_a_closed_gate_is_no_gate_and_a_large_dispersion_is_poisson():
    x = torch.arange(30.0, dtype=torch.float64)
    rate, theta, gate = (torch.full_like(x, value) for value in (1.5, 2.0, 1e-13))
    torch.testing.assert_close(CountLaw(rate, theta, gate).log_prob(x), CountLaw(rate, theta).log_prob(x))
    torch.testing.assert_close(CountLaw(rate, 1e9 * theta).log_prob(x), CountLaw(rate).log_prob(x), atol=1e-6, rtol=0)


def test_a_gate_adds_zeros_and_takes_its_share_from_every_other_count():
    x, theta, gate, rate = torch.tensor([0.0, 1.0, 4.0]), torch.full((3,), 2.0), torch.full((3,), 0.3), torch.zeros(3)
    bare, gated = (CountLaw(rate, theta, *rest).log_prob(x).exp() for rest in ((), (gate,)))
    torch.testing.assert_close(gated, 0.7 * bare + torch.tensor([0.3, 0.0, 0.0]))


def test_shapes_broadcast_with_genes_last():
    rate, theta, gate = torch.randn(4, 1, 3), torch.rand(3) + 0.5, torch.rand(3)
    law = CountLaw(rate, theta, gate)
    assert (law.batch_shape, law.event_shape) == ((4, 1, 3), ())
    larger = law.expand(torch.Size([4, 5, 3]))
    x = torch.poisson(torch.full((4, 5, 3), 2.0))
    torch.testing.assert_close(larger.log_prob(x), CountLaw(rate.expand(4, 5, 3), theta, gate).log_prob(x))
    assert larger.sample(torch.Size([2])).shape == (2, 4, 5, 3)
    assert law.to_event(1).log_prob(x[:, :1]).shape == (4, 1)
    assert law.mean.shape == law.variance.shape == law.mean_log1p().shape == (4, 1, 3)


SHARED = ["dispersion_overall", "dispersion_spread"]


@pytest.mark.parametrize(
    ("head", "names"), [(Poisson, []), (NegativeBinomial, ["dispersion"]), (ZeroInflatedNegativeBinomial, ["dispersion", "gate"])]
)
def test_a_head_samples_its_parameters_per_gene_and_hands_them_to_its_law(head, names):
    trace = pyro.poutine.trace((block := head(5)).globals).get_trace()
    sites = trace.nodes["_RETURN"]["value"]
    assert list(sites) == names
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == (SHARED if names else []) + names
    assert all(value.shape == (5,) for value in sites.values())
    law = block(torch.zeros(2, 5), **sites)
    assert [law.dispersion is not None, law.gate is not None] == ["dispersion" in names, "gate" in names]


def test_the_prior_of_the_gate_is_centred_on_one_percent():
    law = pyro.poutine.trace(ZeroInflatedNegativeBinomial(4).globals).get_trace().nodes["gate"]["fn"].base_dist
    np.testing.assert_allclose(law.median, np.full(4, 0.01), rtol=1e-4)
    np.testing.assert_allclose(law.icdf(torch.tensor(0.5)), np.full(4, 0.01), rtol=1e-4)
    np.testing.assert_allclose(law.icdf(torch.tensor(stats.norm.cdf(1))), np.full(4, expit(np.log(0.01 / 0.99) + 1)), rtol=1e-4)


def test_dispersions_lie_around_one_that_genes_share():
    shared = {"dispersion_overall": torch.tensor(3.0), "dispersion_spread": torch.tensor(0.5)}
    trace = pyro.poutine.trace(pyro.poutine.condition(NegativeBinomial(4).globals, shared)).get_trace()
    law = trace.nodes["dispersion"]["fn"].base_dist
    np.testing.assert_allclose(law.icdf(torch.tensor(0.5)), np.full(4, 3.0), rtol=1e-4)
    np.testing.assert_allclose(law.icdf(torch.tensor(stats.norm.cdf(1))), np.full(4, 3 * np.exp(0.5)), rtol=1e-4)
    over, spread = (trace.nodes[name]["fn"] for name in SHARED)
    np.testing.assert_allclose([float(over.icdf(torch.tensor(0.5))), float(spread.icdf(torch.tensor(0.5)))], np.exp([1, -0.4]), rtol=1e-4)


@pytest.mark.parametrize(("theta", "gate"), [(None, None), (2.0, None), (0.7, 0.1)])
def test_the_variance_of_log1p_is_that_of_the_law(theta, gate):
    rates = torch.tensor([0.01, 0.3, 2.0, 40.0]).log()[:, None]
    law = CountLaw(rates, None if theta is None else torch.tensor([theta]), None if gate is None else torch.tensor([gate]))
    wide = CountLaw(law.log_rate.double(), *(None if v is None else v.double() for v in (law.dispersion, law.gate)))
    count = torch.arange(3000, dtype=torch.double)[:, None, None]
    weight = wide.log_prob(count).exp()
    mean = (weight * count.log1p()).sum(0)
    wanted = (weight * (count.log1p() - mean).square()).sum(0)
    assert torch.allclose(law.variance_log1p().double(), wanted, atol=2e-5, rtol=1e-4)
