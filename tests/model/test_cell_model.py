"""The generative story: what stands where in the log-density, and that a minibatch speaks for all cells."""

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from perturbprob.experiment.action import Knockout, Media, Wait
from perturbprob.experiment.simulate import simulate
from perturbprob.measurement.counts import CountLaw
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide, node_design
from perturbprob.model.structures import node

N_CELLS = 96


@pytest.fixture(scope="module")
def screen():
    """A small screen with everything in it."""
    return simulate(n_cells=N_CELLS, n_genes=9, n_perturbations=2, media=("mTeSR", "BMP4"), times=(1.0, 3.0), n_batches=3, seed=2).screen


@pytest.fixture
def model(screen):
    """A model of the screen."""
    return node(screen, 3, n_hidden=16)


def drawn(model, cells, seed=0):
    """One draw of every site, global and per cell."""
    pyro.set_rng_seed(seed)
    trace = pyro.poutine.trace(model).get_trace(cells)
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name not in ("cell", "counts", "batch_effect")
    }


def log_joint(model, cells, values):
    """The log-density of every site of the model at these values, by name."""
    with torch.no_grad():
        trace = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(cells)
        trace.compute_log_prob()
    return {name: float(site["log_prob_sum"]) for name, site in trace.nodes.items() if site["type"] == "sample" and name != "cell"}


def every(table):
    """All cells of a table."""
    return table.cells(torch.arange(N_CELLS))


# Laws.


def test_the_log_density_of_minibatches_averages_to_that_of_all_cells(model, screen):
    table = CellTable(model, screen)
    values = drawn(model, every(table))
    full = log_joint(model, every(table), values)
    for size in (8, 32):
        parts = [log_joint(model, table.cells(index), values | {"z": values["z"][index]}) for index in torch.randperm(N_CELLS).split(size)]
        assert sum(sum(part.values()) for part in parts) / len(parts) == pytest.approx(sum(full.values()), rel=1e-5)
        assert np.std([part["counts"] for part in parts]) > 1  # they differ, only their mean is the same
        for name in full.keys() - {"z", "counts"}:
            assert {part[name] for part in parts} == {full[name]}


def test_the_elbo_of_minibatches_averages_to_that_of_all_cells(model, screen):
    table, guide = CellTable(model, screen), Guide(model, node_design(model, screen))
    with torch.no_grad():
        shared = pyro.poutine.trace(guide.globals).get_trace()
        values = {name: site["value"] for name, site in shared.nodes.items() if site["type"] == "sample"}
        z = torch.randn(N_CELLS, 3)

        def elbo(index):
            cells = table.cells(index)
            trace = pyro.poutine.trace(guide).get_trace(cells)
            for name, value in (values | {"z": z[index]}).items():
                trace.nodes[name]["value"] = value
            return -Trace_ELBO().loss(model, pyro.poutine.replay(guide, trace), cells)

        full = elbo(torch.arange(N_CELLS))
        parts = [elbo(index) for index in torch.randperm(N_CELLS).split(12)]
    assert np.mean(parts) == pytest.approx(full, rel=1e-5)
    assert np.std(parts) > 1


def test_the_plate_stands_for_as_many_cells_as_it_is_told(model, screen):
    table, index = CellTable(model, screen), torch.arange(24)
    values = drawn(model, table.cells(index, 24))
    small, large = (log_joint(model, table.cells(index, total), values) for total in (24, 240))
    for name in small:
        assert large[name] == pytest.approx(small[name] * (10 if name in ("z", "counts") else 1), rel=1e-5)


def test_warmth_weighs_the_rest_states_and_nothing_else(model, screen):
    table = CellTable(model, screen)
    values = drawn(model, every(table))
    warm, cold = (log_joint(model, table.cells(torch.arange(N_CELLS), warmth=warmth), values) for warmth in (1.0, 0.25))
    assert cold.pop("z") == pytest.approx(0.25 * warm.pop("z"), rel=1e-5)
    assert cold == warm


def test_cells_of_one_condition_are_interchangeable(model, screen):
    table = CellTable(model, screen)
    values = drawn(model, every(table))
    order = torch.randperm(N_CELLS)
    one, other = log_joint(model, every(table), values), log_joint(model, table.cells(order), values | {"z": values["z"][order]})
    assert other == pytest.approx(one, rel=1e-5)


# References.


def test_the_log_rate_is_depth_times_share_times_batch_effect(model, screen):
    cells = every(CellTable(model, screen))
    values = drawn(model, cells)
    sites = pyro.poutine.condition(model.globals, values)()
    law = model.measured(sites, model.moved(sites, values["z"], cells.protocol), cells)
    assert isinstance(law, CountLaw)
    share = torch.exp(law.log_rate - cells.log_size_factor[:, None] - model.log_depth - sites["batch_effect"][cells.batch])
    torch.testing.assert_close(share.sum(-1), torch.ones(N_CELLS))
    deeper = model.measured(
        sites, model.moved(sites, values["z"], cells.protocol), replace(cells, log_size_factor=cells.log_size_factor + 1.5)
    )
    torch.testing.assert_close(deeper.log_rate, law.log_rate + 1.5)
    average = model.measured(sites, model.moved(sites, values["z"], cells.protocol), replace(cells, batch=torch.full((N_CELLS,), -1)))
    torch.testing.assert_close(average.log_rate, law.log_rate - sites["batch_effect"][cells.batch])


def test_the_counts_are_scored_by_the_law_of_their_rate(model, screen):
    cells = every(CellTable(model, screen))
    values = drawn(model, cells)
    sites = pyro.poutine.condition(model.globals, values)()
    law = model.measured(sites, model.moved(sites, values["z"], cells.protocol), cells)
    expected = float(law.log_prob(torch.tensor(screen.counts.toarray())).detach().double().sum())
    assert log_joint(model, cells, values)["counts"] == pytest.approx(expected, rel=1e-5)
    assert log_joint(model, cells, values)["z"] == pytest.approx(
        float(torch.distributions.Normal(0, 1).log_prob(values["z"]).sum()), rel=1e-5
    )


def test_condition_effects_and_bias_act_on_single_genes(model, screen):
    cells = every(CellTable(model, screen))
    values = drawn(model, cells)
    sites = pyro.poutine.condition(model.globals, values)()
    state = model.moved(sites, values["z"], cells.protocol)
    moved = sites | {"gene_bias": sites["gene_bias"] + torch.nn.functional.one_hot(torch.tensor(4), 9)}
    change = model.log_shares(moved, state, cells.rows) - model.log_shares(sites, state, cells.rows)
    torch.testing.assert_close((change[:, 4] - change[:, 3]), torch.ones(N_CELLS))
    moved = sites | {"condition_effect": sites["condition_effect"].clone()}
    moved["condition_effect"][0, 4] += 1
    change = model.log_shares(moved, state, cells.rows) - model.log_shares(sites, state, cells.rows)
    touched = (cells.rows == 0).any(-1)
    assert 0 < touched.sum() < N_CELLS
    torch.testing.assert_close((change[:, 4] - change[:, 3]), touched.float())


def test_draws_stand_before_cells(model, screen):
    cells = every(CellTable(model, screen))
    values = drawn(model, cells)
    sites = pyro.poutine.condition(model.globals, values)()
    z = torch.stack([values["z"], 0 * values["z"]])
    both = model.measured(sites, model.moved(sites, z, cells.protocol), cells).log_rate
    assert both.shape == (2, N_CELLS, 9)
    torch.testing.assert_close(both[0], model.measured(sites, model.moved(sites, z[0], cells.protocol), cells).log_rate)


def test_a_screen_is_read_cell_by_cell(model, screen):
    table = CellTable(model, screen)
    index = torch.tensor([5, 0, 17])
    cells = table.cells(index)
    assert (len(cells), cells.total) == (3, N_CELLS)
    np.testing.assert_array_equal(cells.counts, screen.counts[[5, 0, 17]].toarray())
    np.testing.assert_allclose(cells.log_size_factor.exp(), screen.size_factor[[5, 0, 17]], rtol=1e-6)
    assert [model.vocabulary.batches[b] for b in cells.batch] == [screen.batches[screen.batch[i]] for i in index]
    for row, i in enumerate(index):
        alone = model.vocabulary.encode([screen.conditions[screen.condition[i]]])[0]
        assert torch.equal(cells.protocol[0].perturbation[[row]], alone.perturbation)
        assert torch.equal(cells.protocol[0].media[[row]], alone.media)
        assert torch.equal(cells.protocol[0].wait[[row]], alone.wait)
    whole = list(table.minibatches(40))
    assert [len(part) for part in whole] == [40, 40, 16]
    np.testing.assert_array_equal(torch.cat([part.counts for part in whole]), screen.counts.toarray())


def test_another_screen_is_read_in_the_names_of_the_model(model, screen):
    some = screen[screen.batch == 2]
    assert some.batches == screen.batches[2:]
    cells = CellTable(model, some).cells(torch.arange(some.n_cells))
    assert cells.batch.tolist() == [2] * some.n_cells


def test_size_factors_are_relative_to_the_depth_of_their_own_screen(model, screen):
    expected = every(CellTable(model, screen)).log_size_factor
    halved = replace(screen, size_factor=screen.size_factor / 2, depth=2 * screen.depth)
    torch.testing.assert_close(every(CellTable(model, halved)).log_size_factor, expected)
    torch.testing.assert_close(every(CellTable(model, replace(screen, depth=3 * screen.depth))).log_size_factor, expected + np.log(3))
    part = CellTable(model, screen[:10]).cells(torch.arange(10))
    torch.testing.assert_close(part.log_size_factor, expected[:10])


def test_conditions_never_measured_get_effects_of_their_own(model, screen):
    late = [Knockout(a.gene) >> Wait(7) for a in model.vocabulary.perturbations[:1]]
    protocols = [late[0] if k == 0 else p for k, p in enumerate(screen.conditions)]
    table = CellTable(model, screen, protocols)
    assert [n.time for n in table.extra] == [7 / model.vocabulary.time_scale]
    pyro.set_rng_seed(0)
    sites = model.globals()
    longer = table.sites(sites)
    assert longer["condition_effect"].shape == (len(model.condition_effect.nodes) + 1, 9)
    assert torch.equal(longer["condition_effect"][:-1], sites["condition_effect"])
    control = screen.condition == 0
    assert (table.rows[screen.condition][control] == len(model.condition_effect.nodes)).any(-1).all()
    assert CellTable(model, screen).sites(sites) is sites


# Misuse.


def test_a_screen_with_other_genes_is_refused(model):
    other = simulate(n_cells=40, n_genes=8, n_perturbations=1, seed=3).screen
    with pytest.raises(ValueError, match=r"The model knows 9 genes and the screen holds 8; 1 of its genes are missing, such as \['G9'\]"):
        CellTable(model, other)


def test_a_screen_with_another_unit_of_time_is_refused(model, screen):
    with pytest.raises(ValueError, match=r"counts time in None and the screen in 'hour'. Convert the time column first."):
        CellTable(model, replace(screen, time_unit="hour"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: replace(s, batches=("batch1", "batch2", "bach3")), "Batch 'bach3' was never seen by this model. Did you mean 'batch3'"),
        (lambda s: replace(s, conditions=(Knockout("X") >> Wait(1), *s.conditions[1:])), r"Knockout\('X'\) was never seen"),
        (
            lambda s: replace(s, conditions=(Media("BMP") >> Wait(1), *s.conditions[1:])),
            "Media 'BMP' was never seen by this model. Did you mean 'BMP4'",
        ),
    ],
)
def test_a_screen_with_names_never_seen_is_refused_with_the_nearest(model, screen, change, said):
    with pytest.raises(ValueError, match=said):
        CellTable(model, change(screen))
