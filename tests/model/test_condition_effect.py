"""Condition effects: the law of their paths, and what they are at times and in combinations never measured."""

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from perturbprob.experiment.action import Activation, Knockout, Media, Protocol, Wait
from perturbprob.model.condition_effect import ConditionEffect, Node, nodes

A, B = ("Knockout('A')",), ("Media('B')",)
NODES = [Node(A, 0.5), Node(A, 1.25), Node(A, 3.0), Node(B, 1.0), Node((*A, *B), 0.25), Node((*A, *B), 0.5)]
MEMORY = 0.8


def kernel(times, others, memory=MEMORY):
    """The covariance of an Ornstein-Uhlenbeck path of scale 1 that leaves 0 at time 0."""
    t, u = np.asarray(times)[:, None], np.asarray(others)[None]
    return np.exp(-np.abs(t - u) / memory) - np.exp(-(t + u) / memory)


def sites(block, memory=MEMORY):
    """One draw of the sites with scales of 1 and a known memory, in float64."""
    block.double()
    known = {"condition_memory": torch.tensor(memory, dtype=torch.float64)}
    drawn = {name: site["value"] for name, site in pyro.poutine.trace(block).get_trace().nodes.items() if site["type"] == "sample"}
    known |= {name: torch.ones_like(value) for name, value in drawn.items() if "scale" in name}
    trace = pyro.poutine.trace(pyro.poutine.condition(block, known)).get_trace()
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}, trace.nodes["condition_effect"]["fn"]


def block_of(nodes=NODES, n_genes=2, seed=0):
    """A block with its sites and the law of its paths."""
    pyro.set_rng_seed(seed)
    block = ConditionEffect(nodes, n_genes)
    return block, *sites(block)


# References.


def test_log_prob_is_that_of_a_normal_law_with_the_kernel_of_a_path_from_rest():
    pyro.set_rng_seed(0)
    block = ConditionEffect(NODES, 3).double()
    trace = pyro.poutine.trace(block).get_trace()  # scales and memory drawn from the prior
    law, memory = trace.nodes["condition_effect"]["fn"], float(trace.nodes["condition_memory"]["value"])
    value = torch.randn(2, len(NODES), 3, dtype=torch.float64)
    expected = np.zeros(2)
    for term in block.terms:
        own = [k for k, node in enumerate(block.nodes) if node.term == term]
        times = [block.nodes[k].time for k in own]
        for gene in range(3):
            scale = law.scale[own, gene].numpy()
            assert np.ptp(scale) == 0
            cov = scale[0] ** 2 * kernel(times, times, memory)
            expected += stats.multivariate_normal.logpdf(value[:, own, gene].numpy(), cov=cov)
    np.testing.assert_allclose(law.log_prob(value), expected, rtol=1e-8)


def test_draws_have_the_covariance_of_a_path_from_rest_and_terms_are_independent():
    _, _, law = block_of(n_genes=1)
    n = 40_000
    draws = law.rsample(torch.Size([n]))[..., 0].numpy()
    ordered = sorted(NODES, key=lambda node: (node.term, node.time))
    same = np.array([[a.term == b.term for b in ordered] for a in ordered])
    expected = same * kernel(*[[node.time for node in ordered]] * 2)
    sampling = np.sqrt((expected**2 + np.outer(expected.diagonal(), expected.diagonal())) / n)
    assert (np.abs(np.cov(draws.T) - expected) < 5 * sampling).all()
    assert (np.abs(draws.mean(0)) < 5 * np.sqrt(expected.diagonal() / n)).all()


def test_draws_carry_gradients_to_scale_and_memory():
    block = ConditionEffect(NODES, 2).double()
    drawn, _ = sites(block)
    leaves = {name: value.requires_grad_() for name, value in drawn.items() if name != "condition_effect"}
    trace = pyro.poutine.trace(pyro.poutine.condition(block, leaves)).get_trace()
    gradients = torch.autograd.grad(trace.nodes["condition_effect"]["value"].square().sum(), list(leaves.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


# Many genes with one scale are many draws of the same path.
def test_a_new_time_is_drawn_as_exact_conditioning_says():
    block, drawn, _ = block_of(n_genes=20_000)
    drawn["condition_effect"] = torch.randn(len(NODES), 1, dtype=torch.float64).expand(-1, block.n_genes)
    new, old = [0.2, 1.0, 2.0, 3.3, 8.0], [0.5, 1.25, 3.0]
    found = block.extended(drawn, [Node(A, t) for t in new]).numpy()
    own = [block.nodes.index(Node(A, t)) for t in old]
    gain = kernel(new, old) @ np.linalg.inv(kernel(old, old))
    mean, cov = gain @ drawn["condition_effect"][own, 0].numpy(), kernel(new, new) - gain @ kernel(old, new)
    n = block.n_genes
    sampling = np.sqrt((cov**2 + np.outer(cov.diagonal(), cov.diagonal())) / n)
    assert (np.abs(found.mean(1) - mean) < 5 * np.sqrt(cov.diagonal() / n)).all()
    assert (np.abs(np.cov(found) - cov) < 5 * sampling + 1e-9).all()


# Laws.


def test_scales_multiply_and_every_node_of_a_term_shares_them():
    pyro.set_rng_seed(0)
    block = ConditionEffect(NODES, 4)
    once = pyro.poutine.trace(block).get_trace()
    doubled = {"condition_scale": 2 * once.nodes["condition_scale"]["value"], "condition_gene_scale": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    rest = {name: site["value"] for name, site in once.nodes.items() if site["type"] == "sample" and name != "condition_effect"}
    twice = pyro.poutine.trace(pyro.poutine.condition(block, rest | doubled)).get_trace()
    ratio = twice.nodes["condition_effect"]["fn"].scale / once.nodes["condition_effect"]["fn"].scale
    torch.testing.assert_close(ratio, 2 * (doubled["condition_gene_scale"] / rest["condition_gene_scale"]).expand(len(NODES), 4))


def test_an_effect_starts_at_0():
    block, drawn, law = block_of([Node(A, 0.0), Node(A, 1.0)], n_genes=1000)
    assert law.rsample()[0].abs().max() < 0.01
    assert law.rsample()[1].std() > 0.8
    assert block.extended(drawn, [Node(B, 0.0)]).abs().max() < 1e-3
    other, drawn, _ = block_of([Node(A, 1.0)], n_genes=1000)
    assert other.extended(drawn, [Node(A, 0.0)]).abs().max() < 1e-3


@pytest.mark.parametrize("node", NODES, ids=str)
@pytest.mark.parametrize("memory", [0.1, 0.8, 10.0])
def test_at_its_own_time_a_node_is_what_it_was(node, memory):
    block = ConditionEffect(NODES, 5)
    drawn, _ = sites(block, memory)
    found = block.extended(drawn, [node])
    torch.testing.assert_close(found[0], drawn["condition_effect"][block.nodes.index(node)], atol=1e-3, rtol=0)


def test_the_expected_path_is_the_mean_of_exact_conditioning_and_draws_nothing():
    block, drawn, _ = block_of()
    new = [0.2, 0.5, 0.9, 1.25, 2.5, 3.0, 4.0, 40.0]
    state = torch.get_rng_state()
    found = block.expected(drawn, [Node(A, t) for t in new])
    assert torch.equal(state, torch.get_rng_state())
    own, known = [0.5, 1.25, 3.0], drawn["condition_effect"][[block.nodes.index(Node(A, t)) for t in (0.5, 1.25, 3.0)]].numpy()
    np.testing.assert_allclose(found, kernel(new, own) @ np.linalg.solve(kernel(own, own), known), atol=1e-10)
    np.testing.assert_allclose(found[[1, 3, 5]], known, rtol=1e-12)
    assert block.expected(drawn, [Node(("Knockout('C')",), 1.0)]).abs().max() == 0
    short = drawn | {"condition_memory": torch.tensor(1e-3, dtype=torch.float64)}
    assert bool(block.expected(short, [Node(A, 2.0)]).isfinite().all())


def test_the_expected_path_carries_gradients_to_the_memory():
    block, drawn, _ = block_of()
    memory = drawn["condition_memory"].requires_grad_()
    assert torch.autograd.gradcheck(lambda m: block.expected(drawn | {"condition_memory": m}, [Node(A, 4.0), Node(B, 0.3)]), memory)


def test_the_spread_grows_with_the_distance_from_what_was_measured():
    block, drawn, _ = block_of(n_genes=4000)
    drawn["condition_effect"] = torch.zeros_like(drawn["condition_effect"])
    spread = {t: float(block.extended(drawn, [Node(A, t)]).std()) for t in (1.25, 1.3, 1.6, 2.1, 2.6, 2.9, 3.0, 3.2, 4.0, 8.0)}
    between = [spread[t] for t in (1.25, 1.3, 1.6, 2.1)]
    back = [spread[t] for t in (3.0, 2.9, 2.6, 2.1)]
    beyond = [spread[t] for t in (3.0, 3.2, 4.0, 8.0)]
    assert all(np.all(np.diff(course) > 0) for course in (between, back, beyond))
    assert spread[8.0] == pytest.approx(1.0, abs=0.06)


def test_new_nodes_come_back_in_the_order_asked_and_paths_are_drawn_whole():
    block, drawn, _ = block_of(n_genes=3)
    asked = [Node(B, 1.0), Node(A, 3.0), Node((*A, *B), 0.5), Node(A, 0.5)]
    known = torch.stack([drawn["condition_effect"][block.nodes.index(node)] for node in asked])
    torch.testing.assert_close(block.extended(drawn, asked), known, atol=1e-3, rtol=0)
    block, drawn, _ = block_of(n_genes=20_000)
    near = block.extended(drawn, [Node(("never",), 5.0), Node(A, 6.0), Node(A, 6.01)]).numpy()
    assert np.corrcoef(near[1:])[0, 1] > 0.95
    assert abs(np.corrcoef(near[:2])[0, 1]) < 0.05


def test_a_term_never_seen_is_drawn_from_the_prior_with_the_median_scale():
    block, drawn, _ = block_of(n_genes=20_000)
    drawn["condition_scale"] = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64)
    found = block.extended(drawn, [Node(("Knockout('C')",), 0.4)])[0].abs().log()
    # the mean of log |N(0, 1)| is −(Euler's γ + log 2) / 2; a factor of a gene of its own may widen it
    expected = np.log(3.0) + 0.5 * np.log(kernel([0.4], [0.4]).item()) - (np.euler_gamma + np.log(2)) / 2
    assert float(found.mean()) == pytest.approx(expected, abs=0.06)
    assert float(found.std()) >= 0.95 * np.pi / 8**0.5


def test_nodes_are_each_part_and_all_parts_together():
    assert nodes(Protocol() >> Wait(2)) == []
    assert nodes(Wait(1) >> Media("M") >> Wait(2)) == [Node(("Media('M')",), 2.0)]
    assert [n.term for n in nodes(Activation("B") >> Knockout("A") >> Wait(2))] == [
        ("Knockout('A')",),
        ("Activation('B')",),
        ("Knockout('A')", "Activation('B')"),
    ]
    assert len(nodes(Knockout("A") >> Knockout("B") >> Media("M") >> Wait(1))) == 4
    assert nodes(Knockout("A") >> Media("M") >> Wait(1) >> Media()) == [Node(A, 1.0)]


def test_a_node_counts_time_since_it_was_done():
    found = nodes(Wait(1) >> Knockout("A") >> Wait(2) >> Media("B") >> Wait(3), 0.5)
    assert found == [Node(A, 10.0), Node(B, 6.0), Node((*A, *B), 6.0)]
    assert nodes(Wait(4) >> Knockout("A")) == []


def test_a_condition_is_the_sum_of_its_terms_at_its_time():
    protocols = [Knockout("A") >> Media("B") >> Wait(1), Protocol([Wait(1)]), Knockout("A") >> Wait(2), Media("B") >> Wait(3)]
    parts = [nodes(p) for p in protocols]
    block, extra = ConditionEffect([n for part in parts[:3] for n in part], 2), [Node(B, 3.0)]
    assert block.unknown(parts) == extra
    effect = torch.randn(len(block.nodes) + 1, 2)
    at = {node: effect[k] for k, node in enumerate([*block.nodes, *extra])}
    found = block.total(effect, block.rows(parts, extra))
    expected = [at[Node(A, 1.0)] + at[Node(B, 1.0)] + at[Node((*A, *B), 1.0)], torch.zeros(2), at[Node(A, 2.0)], at[Node(B, 3.0)]]
    torch.testing.assert_close(found, torch.stack(expected))


def test_without_terms_there_is_no_site_and_no_effect():
    block = ConditionEffect([], 3)
    trace = pyro.poutine.trace(block).get_trace()
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == []
    rows = block.rows([[], []])
    assert torch.equal(block.total(trace.nodes["_RETURN"]["value"]["condition_effect"], rows), torch.zeros(2, 3))
    assert torch.equal(block.extended({}, [Node(A, 1.0)]), torch.zeros(1, 3))


# A memory that is given.


def test_a_given_memory_is_a_narrow_prior_and_leaves_the_paths_alone() -> None:
    free, given = (
        pyro.poutine.trace(ConditionEffect(NODES, 2, memory=memory)).get_trace().nodes["condition_memory"]["fn"] for memory in (None, 4.0)
    )
    assert free.loc == 0
    assert free.scale == 0.5
    np.testing.assert_allclose([given.loc, given.scale], [np.log(4.0), 0.1], rtol=1e-6)


def test_effects_of_a_longer_memory_are_nearer_to_what_they_were() -> None:
    block, drawn, _ = block_of()
    last, later = drawn["condition_effect"][2], [Node(A, 4.0)]
    short, long = (block.expected(drawn | {"condition_memory": torch.tensor(m, dtype=torch.float64)}, later)[0] for m in (1.0, 5.0))
    np.testing.assert_allclose(short, np.exp(-1.0) * last)
    np.testing.assert_allclose(long, np.exp(-0.2) * last)
