"""The compiled pass over counts: log densities and all gradients against `CountLaw` in float64, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln

import perturbprob as pb
from perturbprob.measurement import fused
from perturbprob.measurement.counts import CountLaw, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.measurement.fused import FusedCountLaw
from perturbprob.measurement.rate import Rate

LAWS = ["poisson", "negative_binomial", "zero_inflated", "zero_inflated_poisson"]
TOLERANCE = 1e-5
pytest.importorskip("numba")


def parts(law, n_cells=6, n_genes=70, *, zero=0.8, seed=0, n_batches=3):
    """Random parts of a law, in single precision, and counts: logits, log depth, η, θ, π, rows, counts."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    empty = torch.rand(n_cells, n_genes, generator=random) < zero
    counts = torch.where(empty, 0.0, torch.poisson(normal(n_cells, n_genes).exp() * 4, random))
    theta = (0.5 + normal(n_genes)).exp() if "poisson" not in law else None
    gate = torch.sigmoid(normal(n_genes) - 2) if "zero" in law else None
    row = torch.randint(-1, n_batches, (n_cells,), generator=random)
    logits, log_depth = normal(n_cells, n_genes), normal(n_cells) + math.log(n_genes)
    return [logits, log_depth, 0.3 * normal(n_batches, n_genes), theta, gate], row, counts


def gradients(values, row, counts, *, softmax=True, weight=None, dtype=torch.float32):
    """The log density of each cell and the gradients of their (weighted) sum."""
    values = [None if value is None else value.detach().to(dtype).requires_grad_() for value in values]
    logits, depth, eta, theta, gate = values
    law = CountLaw(Rate(logits, depth, eta, row, softmax), theta, gate).to_event(1)
    assert isinstance(law, FusedCountLaw) == (dtype == torch.float32)
    log_prob = law.log_prob(counts.to(dtype))
    (log_prob * (1 if weight is None else weight.to(dtype))).sum().backward()
    return log_prob.detach(), [None if value is None else value.grad for value in values]


def scale(values, row, counts, softmax):
    """How large the terms are of which each gradient is the sum, so that what cancels is not divided by."""
    values = [None if value is None else value.double() for value in values]
    logits, depth, eta, theta, gate = values
    flat = Rate(logits, depth, eta, row, softmax).log.requires_grad_()
    own = [None if value is None else value.expand_as(flat).clone().requires_grad_() for value in (theta, gate)]
    CountLaw(flat, *own).log_prob(counts.double()).sum().backward()
    each = flat.grad.abs()
    share = torch.softmax(logits, -1) if softmax else torch.zeros_like(logits)
    of_eta = None if eta is None else torch.zeros(len(eta) + 1, eta.shape[1]).double().index_add_(0, row % (len(eta) + 1), each)[:-1]
    return [each + share * each.sum(1, keepdim=True), each.sum(1), of_eta, *(None if v is None else v.grad.abs().sum(0) for v in own)]


def check(values, row, counts, *, softmax=True, weight=None):
    """Compare with float64, relative to the terms that make up a number."""
    log_prob, by = gradients(values, row, counts, softmax=softmax, weight=weight)
    exact, by_exact = gradients(values, row, counts, softmax=softmax, weight=weight, dtype=torch.float64)
    assert ((log_prob - exact).abs() <= TOLERANCE * exact.abs()).all()
    weight = 1.0 if weight is None else float(weight.abs().max())
    for mine, theirs, terms in zip(by, by_exact, scale(values, row, counts, softmax), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert ((mine - theirs).abs() <= TOLERANCE * (theirs.abs() + weight * terms) + 1e-37).all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("zero", [0.95, 0.3])
def test_values_and_all_gradients_are_those_of_the_law(law, softmax, zero):
    values, row, counts = parts(law, zero=zero)
    values[1] -= 0.0 if softmax else math.log(70)
    check(values, row, counts, softmax=softmax)


def formulas(x, log_rate, theta, gate):
    """Of each count in float64: log p, and its derivatives by log μ, θ and π with the size of the terms that they are made of.

    Nothing is subtracted from what it nearly equals, as autograd does with digamma(x + θ) − digamma(θ), which is then off by 1e-3.
    """
    mean = np.exp(log_rate)
    r = mean / theta if theta is not None else 0 * mean
    closed = 1 / (1 + r)
    log_prob, by_theta, of_theta = x * log_rate - mean - gammaln(x + 1), 0 * x, 0 * x
    if theta is not None:
        t, (each, where) = theta[0], np.unique(x, return_inverse=True)  # one θ for all genes
        rising = np.array([np.log1p(np.arange(k) / t).sum() for k in each])[where]
        slope = np.array([-(np.arange(k) / (t * (t + np.arange(k)))).sum() for k in each])[where]
        excess = np.where(r < 1e-4, r**2 / 2 - 2 * r**3 / 3, np.log1p(r) - r * closed)
        log_prob = x * (log_rate - np.log1p(r)) - theta * np.log1p(r) - gammaln(x + 1) + rising
        by_theta, of_theta = slope + x * r * closed / theta - excess, -slope + x * r * closed / theta + excess
    by_rate, of_rate, by_gate = (x - mean) * closed, (x + mean) * closed, 0 * x
    if gate is not None:
        zero = x == 0
        empty = np.where(zero, log_prob, 0.0)
        both = gate + (1 - gate) * np.exp(empty)
        share = np.where(zero, (1 - gate) * np.exp(empty) / both, 1.0)
        near = np.log1p(np.maximum((1 - gate) * np.expm1(empty), -0.5))
        log_prob = np.where(zero, np.where(both > 0.5, near, np.log(both)), log_prob + np.log1p(-gate))
        by_gate = np.where(zero, -np.expm1(empty) / both, -1 / (1 - gate))
        by_rate, of_rate, by_theta, of_theta = share * by_rate, share * of_rate, share * by_theta, share * of_theta
    return log_prob, (by_rate, of_rate), (by_theta, of_theta), (by_gate, np.abs(by_gate))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("theta", [1e-3, 0.3, 7.0, 200.0, 1e6])
@pytest.mark.parametrize("log10_rate", [-8, -3, 0, 2, 5])
@pytest.mark.parametrize("zero", [0.9, 0.3])
def test_extreme_parameters_against_formulas(law, theta, log10_rate, zero):
    (logits, _, _, dispersion, gate), _, counts = parts(law, n_cells=16, n_genes=40, zero=zero)
    counts[:, ::4] = torch.tensor([1.0, 2, 5, 9, 31, 32, 33, 100, 1e3, 65535, 1e6, 0, 0, 0, 0, 0])[:, None]
    counts[:, 1::4] = torch.poisson(torch.full((16, 10), 10.0**log10_rate), torch.Generator().manual_seed(1))
    log_rate = (0.2 * logits + log10_rate * math.log(10)).requires_grad_()
    dispersion = None if dispersion is None else torch.full((40,), theta, requires_grad=True)
    gate = None if gate is None else torch.tensor([1e-6, 1e-3, 0.1, 0.9]).repeat(10).requires_grad_()
    log_prob = CountLaw(log_rate, dispersion, gate).to_event(1).log_prob(counts)
    log_prob.sum().backward()
    wide = [None if value is None else value.detach().double().numpy() for value in (counts, log_rate, dispersion, gate)]
    exact, by_rate, by_theta, by_gate = formulas(*wide)
    np.testing.assert_allclose(log_prob.detach(), exact.sum(1), rtol=TOLERANCE)
    nothing = 1e-25  # exp(-87) stands for what is smaller
    assert (np.abs(log_rate.grad.numpy() - by_rate[0]) <= TOLERANCE * by_rate[1] + nothing).all()
    for value, (by, terms) in ((dispersion, by_theta), (gate, by_gate)):
        if value is not None:
            assert (np.abs(value.grad.numpy() - by.sum(0)) <= TOLERANCE * terms.sum(0) + 1e-5 * nothing).all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("n_cells", "n_genes"), [(1, 5), (5, 1), (1, 1), (3, 513), (130, 33)])
def test_any_shape(law, n_cells, n_genes):
    check(*parts(law, n_cells, n_genes))


@pytest.mark.parametrize("law", LAWS)
def test_cells_and_genes_without_counts(law):
    values, row, counts = parts(law)
    counts[2], counts[:, 5] = 0.0, 0.0
    check(values, row, counts)
    check(values, row, torch.zeros_like(counts))


def test_a_batch_effect_of_each_cell_or_none():
    values, row, counts = parts("zero_inflated")
    table, values[2] = values[2], torch.cat([values[2], torch.zeros(1, 70)])[row]
    log_prob, by = gradients(values, None, counts)
    values[2] = table
    of_table, by_table = gradients(values, row, counts)
    torch.testing.assert_close(log_prob, of_table, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.zeros(4, 70).index_add_(0, row % 4, by[2])[:-1], by_table[2], rtol=1e-5, atol=1e-6)
    values[2] = None
    check(values, row, counts)


def test_cells_may_weigh_differently_later():
    values, row, counts = parts("zero_inflated")
    check(values, row, counts, weight=torch.tensor([0.5, 2.0, -1.0, 0.0, 3.0, 1.0]))
    check(values, row, counts, weight=torch.full((6,), 0.25))


def test_a_second_backward_pass_gives_the_same_gradients():
    (logits, *others), row, counts = parts("negative_binomial")
    logits.requires_grad_()
    total = CountLaw(Rate(logits, others[0], others[1], row), others[2]).to_event(1).log_prob(counts).sum() * 3
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_threads_do_not_change_the_result(monkeypatch):
    values, row, counts = parts("zero_inflated", 64, 40)
    alone, by_alone = gradients(values, row, counts)
    monkeypatch.setattr(fused, "WORTH_A_THREAD", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together, by_together = gradients(values, row, counts)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    for one, other in zip(by_together, by_alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_rows_of_a_sparse_matrix_are_the_same_counts():
    from scipy.sparse import csr_array

    from perturbprob.model.sparse_input import as_tensor

    for zero in (0.95, 0.3):
        values, row, counts = parts("zero_inflated", zero=zero)
        given = fused._Given(*values, row, True, counts)
        dense = fused.taken(given, np.ones(6, np.float32), (True,) * 5)
        for sparse in (as_tensor(csr_array(counts.numpy())), counts.to_sparse_csr()):  # of 32 and of 64 bits
            same = fused.taken(given._replace(counts=sparse), np.ones(6, np.float32), (True,) * 5)
            torch.testing.assert_close(same[0], dense[0], rtol=1e-6, atol=0)
            for one, other in zip(same[1], dense[1], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support is in beta")
@pytest.mark.parametrize("kind", ["out of order", "coo", "csc", "double"])
def test_other_sparse_counts_are_the_same_counts(kind):
    (logits, log_depth, *_, theta, gate), _, counts = parts("zero_inflated", n_genes=600)
    law = CountLaw(Rate(logits, log_depth), theta, gate).to_event(1)
    assert isinstance(law, FusedCountLaw)
    if kind == "out of order":  # as products of sparse matrices are
        rows = [row.nonzero()[0][::-1] for row in counts.numpy()]
        start = np.cumsum([0, *map(len, rows)])
        gene, number = np.concatenate(rows), np.concatenate([counts.numpy()[c, row] for c, row in enumerate(rows)])
        sparse = torch.sparse_csr_tensor(*map(torch.from_numpy, (start, gene, number)), counts.shape, check_invariants=False)
    else:
        sparse = {"coo": counts.to_sparse(), "csc": counts.to_sparse_csc(), "double": counts.double().to_sparse_csr()}[kind]
    torch.testing.assert_close(law.log_prob(sparse).float(), law.log_prob(counts), rtol=1e-5, atol=0)


@pytest.mark.parametrize("theta", [1e-3, 0.5, 3.0, 40.0, 1e6])
@pytest.mark.parametrize("x", [9.0, 40.0, 1e3, 1e6])
def test_rising_factorials_of_large_counts(theta, x):
    from perturbprob.measurement.elementary import rising

    value, slope = rising(theta, x)
    assert value == pytest.approx(gammaln(x + theta) - gammaln(theta) - x * math.log(theta), rel=1e-9, abs=1e-7)
    assert slope == pytest.approx(digamma(x + theta) - digamma(theta) - x / theta, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("wrong", [-1.0, 1.5, math.nan, -math.nan, math.inf, 2.0**31, 40.5])
@pytest.mark.parametrize("zero", [0.95, 0.0])
def test_what_is_no_count_is_refused(wrong, zero):
    values, row, counts = parts("negative_binomial", zero=zero)
    counts[4, 7] = wrong
    with pytest.raises(fused.NoCount, match=r"whole numbers from 0 to 2\^31 - 1; that of cell 4, gene 7 is .*raw counts"):
        gradients(values, row, counts)


@pytest.mark.parametrize("part", range(5))
def test_parameters_that_are_no_numbers_give_no_number(part):
    values, row, counts = parts("zero_inflated")
    row[0] = 1
    values[part][(1, 3) if values[part].ndim == 2 else 0] = math.nan
    log_prob, _ = gradients(values, row, counts)
    assert log_prob.isnan().any()


def test_the_torch_path_stands_behind_the_same_law(monkeypatch):
    values, row, counts = parts("zero_inflated")
    logits, depth, eta, theta, gate = values
    rate = Rate(logits, depth, eta, row)
    assert isinstance(CountLaw(rate, theta, gate).to_event(1), FusedCountLaw)
    assert not isinstance(CountLaw(rate, theta, gate).mask(torch.ones(6, 1, dtype=torch.bool)).to_event(1), FusedCountLaw)
    assert not isinstance(CountLaw(rate, theta.expand(6, 70), gate).to_event(1), FusedCountLaw)
    assert not isinstance(CountLaw(Rate(logits.expand(2, 6, 70), depth, eta, row), theta, gate).to_event(1), FusedCountLaw)
    assert not isinstance(CountLaw(Rate(logits.double(), depth.double()), None).to_event(1), FusedCountLaw)
    monkeypatch.setattr(fused, "kernel", lambda: None)
    law = CountLaw(rate, theta, gate).to_event(1)
    assert not isinstance(law, FusedCountLaw)
    assert law.log_prob(counts).shape == (6,)


def test_the_distribution_is_otherwise_that_of_the_counts():
    values, row, counts = parts("zero_inflated")
    logits, depth, eta, theta, gate = values
    single = CountLaw(Rate(logits, depth, eta, row), theta, gate)
    law = single.to_event(1)
    assert (law.batch_shape, law.event_shape) == ((6,), (70,))
    torch.testing.assert_close(law.mean, single.mean)
    torch.testing.assert_close(law.variance, single.variance)
    assert law.sample(torch.Size((2,))).shape == (2, 6, 70)
    assert law.expand([6]) is law
    assert law.expand([2, 6]).log_prob(counts.expand(2, 6, 70)).shape == (2, 6)
    torch.testing.assert_close(law.log_prob(counts), single.log_prob(counts).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_heads_take_a_rate_in_parts_or_as_it_is(head):
    values, row, counts = parts("zero_inflated")
    rate = Rate(values[0], values[1], values[2], row)
    sites = dict(zip(head.sites, values[3:], strict=True)) if head is ZeroInflatedNegativeBinomial else {}
    apart, added = head(70)(rate, **sites).to_event(1), head(70)(rate.log, **sites).to_event(1)
    assert isinstance(apart, FusedCountLaw)
    assert isinstance(added, FusedCountLaw)
    torch.testing.assert_close(apart.log_prob(counts), added.log_prob(counts), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("measurement", ["poisson", "negative_binomial", "zero_inflated_negative_binomial"])
def test_a_fit_goes_the_same_way_by_either_path(monkeypatch, measurement):
    screen = pb.simulate(n_cells=200, n_genes=12, n_batches=2, seed=0)
    screen = getattr(screen, "screen", screen)

    def losses():
        model = pb.vae(screen, n_latent=2, n_hidden=8, measurement=measurement)
        return pb.fit(model, screen, epochs=3, seed=0, progress=False).losses

    one_pass = losses()
    monkeypatch.setattr(fused, "kernel", lambda: None)
    in_torch = losses()
    assert one_pass["train"] == pytest.approx(in_torch["train"], rel=1e-4)
    assert one_pass["validation"] == pytest.approx(in_torch["validation"], rel=1e-4)
    assert one_pass["train"] != in_torch["train"]  # the two paths were taken
