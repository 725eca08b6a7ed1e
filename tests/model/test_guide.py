"""The variational family: every site has its law, and what the data tie together stays together."""

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats

from perturbprob.experiment.simulate import simulate
from perturbprob.model.cells import CellTable
from perturbprob.model.condition_effect import nodes
from perturbprob.model.filling import CONTINUOUS, HEADS
from perturbprob.model.guide import Guide, node_design
from perturbprob.model.overdispersion import LEAST, Overdispersion
from perturbprob.model.structures import node

N_CELLS, N_GENES = 60, 7


def simulated(**how):
    """A small screen; one batch unless said otherwise."""
    how = {"n_perturbations": 2, "n_batches": 3, "times": (1.0, 2.0), "seed": 5} | how
    return simulate(n_cells=N_CELLS, n_genes=N_GENES, **how).screen


def make(screen, **how):
    """A model of a screen, its guide and its cells."""
    model = node(screen, 2, n_hidden=8, **how)
    torch.manual_seed(0)
    return model, Guide(model, node_design(model, screen)), CellTable(model, screen).cells(torch.arange(screen.n_cells))


@pytest.fixture(scope="module")
def screen():
    """A screen whose batches are unequal over conditions."""
    return simulated(unequal=1.0, media=("mTeSR", "BMP4"), n_batches=2)


def shapes(trace):
    """The shapes of values and of log-densities of the sites that the guide must give."""
    skipped = ("cell", "counts", "batch_effect")
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site["infer"].get("is_auxiliary")}
    return {
        name: (site["value"].shape, site["fn"].batch_shape, site["fn"].event_shape) for name, site in sites.items() if name not in skipped
    }


def global_draws(guide, n):
    """Draws of the guide's global sites, by name, in float64."""
    with torch.no_grad():
        traces = [pyro.poutine.trace(guide.globals).get_trace() for _ in range(n)]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]).double() for name in traces[0].nodes if name[0] != "_"}


# Laws.


@pytest.mark.parametrize("measurement", [name for name in HEADS if name not in CONTINUOUS])
@pytest.mark.parametrize(
    "how", [{}, {"media": ("mTeSR", "BMP4")}, {"n_perturbations": 0}, {"times": (1.0,)}, {"n_perturbations": 0, "times": (1.0,)}], ids=str
)
def test_every_site_of_the_model_is_in_the_guide_with_its_shapes_and_no_other(how, measurement):
    model, guide, cells = make(simulated(**how), measurement=measurement)
    found, wanted = (shapes(pyro.poutine.trace(part).get_trace(cells)) for part in (guide, model))
    assert found == wanted


def test_with_one_batch_the_guide_has_no_batch_sites():
    with pytest.warns(UserWarning, match="one batch"):
        model, guide, cells = make(simulated(n_batches=1))
    found, wanted = (shapes(pyro.poutine.trace(part).get_trace(cells)) for part in (guide, model))
    assert found == wanted
    assert not [name for name in found if name.startswith("batch")]


def test_values_are_in_the_support_of_the_prior(screen):
    model, guide, cells = make(screen)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    for _ in range(5):
        trace = pyro.poutine.trace(guide).get_trace(cells)
        replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(cells)
        for name, site in replayed.nodes.items():
            if site["type"] == "sample" and name not in ("cell", "batch_effect"):
                assert site["fn"].support.check(site["value"]).all(), name
        assert torch.isfinite(replayed.log_prob_sum())
        assert torch.isfinite(trace.log_prob_sum())


def test_every_parameter_exists_from_the_start_and_running_the_elbo_changes_none(screen):
    model, guide, cells = make(screen)
    elbo = Trace_ELBO()(model, guide)
    before = {name: parameter.clone() for name, parameter in elbo.named_parameters()}
    for _ in range(2):
        elbo(cells).detach()
    after = dict(elbo.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(pyro.get_param_store()) == 0


def test_every_parameter_of_model_and_guide_is_trained(screen):
    model, guide, cells = make(screen)
    with torch.no_grad():
        model.transition.field.network[-1].weight.normal_()
    elbo = Trace_ELBO()(model, guide)
    elbo(cells).backward()
    without = [name for name, parameter in elbo.named_parameters() if parameter.grad is None or not parameter.grad.abs().max() > 0]
    assert without == []


def test_it_starts_as_wide_as_the_counts_leave_it(screen):
    model, guide, _ = make(screen)
    guide.start(model, screen)
    counts = screen.counts.toarray()
    for number, node_ in enumerate(model.condition_effect.nodes):
        own = [c for c, p in enumerate(screen.conditions) if node_ in nodes(model.vocabulary.protocol(p), model.vocabulary.time_scale)]
        groups = [counts[screen.condition == c] for c in own]
        information = sum(g.sum(0) / (1 + g.mean(0)) for g in groups) + 100
        np.testing.assert_allclose(guide.condition_log_scale[number].detach(), -0.5 * np.log(information), rtol=1e-4)
    cells = [counts[(screen.condition == c) & (screen.batch == b)] for c in range(len(screen.conditions)) for b in range(2)]
    batches = sum(group.sum(0) / (1 + group.mean(0)) for group in cells if len(group))
    np.testing.assert_allclose(guide.block_log_scale[:, 0].detach(), -0.5 * np.log(batches + 1), rtol=1e-4)
    assert (guide.dispersion_log_scale < 0.5 * np.log(2)).all()  # no wider than the prior


def test_making_a_guide_and_its_model_leaves_the_random_state_of_globals_alone(screen):
    model = node(screen, 2)
    shares = node_design(model, screen)
    torch.manual_seed(0)
    Guide(model, shares)
    first = torch.rand(1)
    torch.manual_seed(0)
    Guide(node(screen, 2), shares)
    assert torch.equal(torch.rand(1), first)


@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_condition_effects_fall_where_the_batches_of_their_cells_rise(screen, weight):
    _, guide, _ = make(screen)
    with torch.no_grad():
        guide.condition_weight.fill_(np.log(weight / (1 - weight)))
        guide.block_lower.normal_()
    draws = global_draws(guide, n := 800)
    coordinate, bias = draws["batch_coordinate"], draws["gene_bias"]
    carried = torch.einsum("nb,dbg->dng", guide.node_design.double(), torch.cat([bias[:, None], coordinate], 1))
    effect = draws["condition_effect"]
    carried, effect = (x - x.mean(0) for x in (carried, effect))
    slope = (carried * effect).sum(0) / carried.square().sum(0)
    own, spread = float(guide.condition_log_scale.detach().exp()[0, 0]), carried.std(0)
    assert (abs(slope + weight) < 5 * own / (spread * n**0.5)).all()
    correlation = slope * spread / effect.std(0)
    assert (correlation < 0).all()
    np.testing.assert_allclose(effect.std(0), torch.sqrt((weight * spread) ** 2 + own**2), rtol=5 / (2 * n) ** 0.5)


def test_the_design_of_a_node_is_the_mean_of_its_cells(screen):
    model, guide, _ = make(screen)
    assert guide.node_design.shape == (len(model.condition_effect.nodes), 2)
    torch.testing.assert_close(guide.node_design[:, 0], torch.ones(len(guide.node_design)))
    basis = model.batch_effect.basis[:, 0].numpy()
    parts = [nodes(p, model.vocabulary.time_scale) for p in screen.conditions]
    rows = model.condition_effect.rows(parts)[torch.as_tensor(screen.condition)]
    for number in range(len(guide.node_design)):
        own = (rows == number).any(-1).numpy()
        np.testing.assert_allclose(guide.node_design[number, 1], basis[screen.batch[own]].mean(), atol=1e-6)
    assert guide.node_design[:, 1].abs().max() > 0.3  # unequal, so the tie between η and effects differs between conditions


def test_bias_and_batch_effects_of_a_gene_have_the_covariance_of_their_block(screen):
    _, guide, _ = make(screen)
    with torch.no_grad():
        guide.block_lower.fill_(2.0)
    draws = global_draws(guide, 800)
    parts = torch.stack([draws["gene_bias"], draws["batch_coordinate"][:, 0]])
    found = np.cov((parts - parts.mean(1, keepdim=True)).flatten(1).numpy())  # every gene has the same block
    sd = float(guide.block_log_scale.detach().exp()[0, 0])
    expected = sd**2 * np.array([[1, 2], [2, 5]])
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_the_centre_is_the_median_of_each_site(screen):
    _, guide, _ = make(screen)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    draws, centre = global_draws(guide, 501), guide.centre()
    assert {*centre, "gene_block"} == {name for name in draws if not name.endswith("_and_alike")}
    for name, value in centre.items():
        below = (draws[name] < value.detach()).double().mean(0)
        assert (abs(below - 0.5) < 5 * 0.5 / 501**0.5).all(), name


def test_the_encoder_gives_each_cell_a_law_that_reads_counts_protocol_and_batch(screen):
    _, guide, cells = make(screen)
    law = guide.rest(cells)
    assert (law.batch_shape, law.event_shape) == ((N_CELLS,), (2,))
    assert (law.base_dist.scale > 0).all()
    first = cells.protocol[0]
    changed = [
        replace(cells, counts=cells.counts + 1),
        replace(cells, batch=1 - cells.batch),
        replace(cells, protocol=[replace(first, perturbation=1 - first.perturbation)]),
        replace(cells, protocol=[replace(first, media=1 - first.media)]),
        replace(cells, protocol=[replace(first, wait=first.wait + 1)]),
        replace(cells, batch=torch.full_like(cells.batch, -1)),
    ]
    for other in changed:
        assert (guide.rest(other).mean != law.mean).any(-1).all()
    scaled = replace(cells, counts=3 * cells.counts, log_size_factor=cells.log_size_factor + np.log(3))
    torch.testing.assert_close(guide.rest(scaled).mean, law.mean, rtol=1e-4, atol=1e-5)


def test_the_kl_term_of_the_cells_carries_the_warmth(screen):
    model, guide, cells = make(screen)
    for part in (model, guide):
        trace = pyro.poutine.trace(part).get_trace(replace(cells, warmth=0.25, total=2 * N_CELLS))
        trace.compute_log_prob()
        site = trace.nodes["z"]
        torch.testing.assert_close(site["log_prob_sum"], 0.25 * 2 * site["fn"].log_prob(site["value"]).sum())


# References.


def test_log_density_of_the_globals_is_that_of_the_described_law(screen):
    _, guide, _ = make(screen)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        trace = pyro.poutine.trace(guide.globals).get_trace()
        trace.compute_log_prob()
    site = trace.nodes["dispersion_and_alike"]
    loc, scale = (part.detach().double().numpy() for part in (guide.dispersion_loc, guide.dispersion_log_scale.exp()))
    theta = site["value"].double().numpy()
    line = np.log(np.expm1(20 * (1 / theta - LEAST))) / 20  # 1 / θ = log(1 + exp(20 u)) / 20 + least
    slope = theta**2 / (1 + np.exp(-20 * line))
    assert float(site["log_prob_sum"]) == pytest.approx((stats.norm.logpdf(line, loc, scale) - np.log(slope)).sum(), rel=1e-4)
    site, scale = trace.nodes["gene_block"], guide.block_log_scale.detach().exp()
    factor = torch.tril(guide.block_lower.detach(), -1) * scale[:, :, None] + torch.diag_embed(scale)
    cov = (factor @ factor.mT).double().numpy()
    parts = zip(site["value"].double().numpy(), guide.block_loc.detach().double().numpy(), cov, strict=True)
    assert float(site["log_prob_sum"]) == pytest.approx(sum(stats.multivariate_normal.logpdf(*part) for part in parts), rel=1e-4)
    for name in ("gene_bias", "batch_coordinate"):
        assert float(trace.nodes[name]["log_prob_sum"]) == 0.0


def test_a_wide_law_of_a_dispersion_has_finite_gradients_at_the_poisson_end(screen):
    """Of a gene with hardly a count the law of u becomes wide in training; 1/θ would be 0 in the tail."""
    model, guide, cells = make(screen)
    with torch.no_grad():
        guide.dispersion_loc.fill_(18.0)
        guide.dispersion_log_scale.fill_(np.log(20.0))
    elbo = Trace_ELBO()(model, guide)
    torch.manual_seed(1)
    for _ in range(20):
        elbo.zero_grad()
        loss = elbo(cells)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(parameter.grad).all() for parameter in elbo.parameters())


def test_the_line_of_overdispersion_goes_both_ways():
    line = torch.tensor([-0.2, 0.0, 0.7, 30.0], dtype=torch.double)
    to = Overdispersion()
    torch.testing.assert_close(to.inv(to(line)), line)
    slope = torch.autograd.functional.jacobian(to, line).diagonal()
    torch.testing.assert_close(to.log_abs_det_jacobian(line, to(line)), slope.abs().log())
    assert torch.isfinite(Overdispersion()(torch.tensor([-1e3, 1e3]))).all()
    assert torch.isfinite(Overdispersion().inv(torch.tensor([1e4, 1e5]))).all()


def test_batch_effects_start_at_a_regression_of_the_means(screen):
    """Against weighted least squares with a column for each condition, and the ridge that the scales name."""
    model, guide, _ = make(screen, batch_effect="state")
    guide.start(model, screen)
    counts, centre = screen.counts.toarray(), {name: value.detach().numpy() for name, value in guide.centre().items()}
    pairs = [(c, b) for c in range(len(screen.conditions)) for b in range(2) if ((screen.condition == c) & (screen.batch == b)).any()]
    cells = [(screen.condition == c) & (screen.batch == b) for c, b in pairs]
    total = np.stack([counts[own].sum(0) for own in cells]).astype(float)
    y = np.log((total + 0.5) / np.array([screen.size_factor[own].sum() * screen.depth for own in cells])[:, None])
    weight = total / (1 + total / np.array([own.sum() for own in cells])[:, None])
    own = model.batch_effect.basis.numpy()[[b for _, b in pairs], 0]
    media = np.array([screen.conditions[c].media is not None for c, _ in pairs])
    dummies = np.eye(len(screen.conditions))[[c for c, _ in pairs]]
    scales = [float(centre[f"batch_{kind}scale_overall"]) for kind in ("", "media_")]
    for gene in range(N_GENES):
        root = np.sqrt(weight[:, gene])[:, None]
        ridge = np.eye(2, 2 + dummies.shape[1]) / np.array(scales)[:, None]
        design = np.concatenate([root * np.column_stack([own, own * media, dummies]), ridge])
        found = np.linalg.lstsq(design, np.concatenate([root[:, 0] * y[:, gene], np.zeros(2)]), rcond=None)[0]
        started = [float(centre["batch_coordinate"][0, gene]), float(centre["batch_media_coordinate"][0, 0, gene])]
        np.testing.assert_allclose(started, found[:2], rtol=0.02, atol=1e-3)  # the scales have moved on by one step


def test_batch_effects_that_coincide_with_conditions_start_at_0(screen):
    """No cell tells them from what the conditions do."""
    late = np.array([p.time == 2 for p in screen.conditions])[screen.condition]
    part = screen[(screen.batch == 1) == late]
    model, guide, _ = make(part)
    guide.start(model, part)
    assert float(guide.centre()["batch_coordinate"].detach().abs().max()) < 1e-5
    assert float(guide.centre()["batch_scale_overall"].detach()) == pytest.approx(0.1, rel=1e-3)
