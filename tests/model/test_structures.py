"""node(): what it fills the slots with, screens with something absent, and arguments that cannot work."""

import copy

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from perturbprob.dynamics import NeuralODE, SolverError
from perturbprob.experiment.action import Knockout, Media, Protocol, Wait
from perturbprob.experiment.simulate import simulate
from perturbprob.measurement import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.model.cells import CellTable
from perturbprob.model.condition_effect import Node
from perturbprob.model.guide import Guide, node_design
from perturbprob.model.structures import causal_context, neural_sde, node, vae


def simulated(**how):
    """A small screen."""
    how = {"n_cells": 60, "n_genes": 8, "n_perturbations": 2, "times": (1.0, 2.0), "n_batches": 2, "seed": 4} | how
    return simulate(**how).screen


@pytest.fixture(scope="module")
def screen():
    """A screen with everything in it."""
    return simulated(media=("mTeSR", "BMP4"))


def step(model, screen):
    """Take one gradient step of the ELBO; return the loss before and after on the same noise."""
    elbo = Trace_ELBO()(model, Guide(model, node_design(model, screen)))
    cells, losses = CellTable(model, screen).cells(torch.arange(screen.n_cells)), []
    optimiser = torch.optim.Adam(elbo.parameters(), lr=1e-3)
    for _ in range(2):
        pyro.set_rng_seed(0)
        optimiser.zero_grad()
        losses.append(elbo(cells))
        losses[-1].backward()
        assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in elbo.parameters())
        optimiser.step()
    return losses[0].item(), losses[1].item()


def assert_trains(model, screen):
    """Check that a step of the ELBO is finite and goes down."""
    before, after = step(model, screen)
    assert np.isfinite([before, after]).all()
    assert after < before


# Every choice and every screen builds and trains.


@pytest.mark.parametrize(
    ("measurement", "kind"),
    [("poisson", Poisson), ("negative_binomial", NegativeBinomial), ("zero_inflated_negative_binomial", ZeroInflatedNegativeBinomial)],
)
def test_every_measurement_trains(screen, measurement, kind):
    model = node(screen, 2, measurement=measurement)
    assert type(model.measurement) is kind
    assert_trains(model, screen)


@pytest.mark.parametrize(
    "how",
    [
        {"media": ("mTeSR", "BMP4", "A83")},
        {"media": ("mTeSR",)},
        {"n_perturbations": 0, "media": ("mTeSR", "BMP4")},
        {"n_perturbations": 0},
        {"times": (3.0,)},
        {"times": (0.0, 1.0)},
        {"times": (0.0,)},
        {"n_perturbations": 0, "times": (1.0,)},
        {"n_genes": 2, "n_perturbations": 1},
    ],
    ids=str,
)
def test_a_screen_with_something_absent_trains(how):
    part = simulated(**how)
    assert_trains(node(part, 2), part)


def test_a_screen_of_one_batch_trains_and_says_so_once():
    part = simulated(n_batches=1)
    with pytest.warns(UserWarning, match="one batch") as said:
        model = node(part, 2)
    assert len(said) == 1
    assert_trains(model, part)  # a second warning would be an error here


def test_a_screen_without_control_trains(screen):
    perturbed = screen[screen.condition > 3]
    assert all(p.perturbations for p in perturbed.conditions)
    assert_trains(node(perturbed, 2), perturbed)


class Saturating(nn.Module):
    """A field of the user's own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, z, perturbation, media, clock):
        return self.gain * torch.tanh(z + perturbation + media) * torch.exp(-clock)


@pytest.mark.parametrize("how", [{"solver": "dopri5"}, {"field": Saturating()}, {"n_hidden": 3}], ids=str)
def test_every_slot_can_be_filled_otherwise(screen, how):
    assert_trains(node(screen, 2, **how), screen)


@pytest.mark.parametrize("structure", [node, vae, neural_sde])
def test_a_memory_is_kept_in_the_recipe_and_trains(screen, structure):
    model = structure(screen, 2, memory=5.0)
    assert model.recipe["arguments"]["memory"] == model.condition_effect.given_memory == 5.0
    assert_trains(model, screen)


# Laws.


def test_cells_at_time_0_weigh_as_much_as_others():
    losses = [step(node(part, 2), part)[0] / part.counts.shape[0] for part in (simulated(times=(0.0, 1.0)), simulated(times=(1.0, 2.0)))]
    assert losses[0] < 2 * losses[1]


def test_the_model_knows_the_screen_by_name_share_and_depth(screen):
    model = node(screen, 4)
    assert isinstance(model.transition, NeuralODE)
    assert (model.n_latent, model.vocabulary.genes, model.vocabulary.baseline) == (4, screen.genes, "mTeSR")
    totals = screen.counts.toarray().sum(0)
    np.testing.assert_allclose(model.log_share.exp(), totals / totals.sum(), atol=1e-3)
    assert float(model.log_depth) == pytest.approx(np.log(totals.sum() / screen.size_factor.sum()), rel=1e-5)


def test_every_term_has_a_node_at_every_time_it_was_measured(screen):
    scale = node(screen).vocabulary.time_scale
    genes, media = screen.perturbations, ("Media('BMP4')",)
    expected = {Node(media, round(t / scale, 12)) for t in (1, 2)}
    for gene in genes:
        own = (f"Knockout('{gene}')",)
        expected |= {Node(term, round(t / scale, 12)) for term in (own, own + media) for t in (1, 2)}
    found = node(screen).condition_effect.nodes
    assert set(found) == expected
    assert list(found) == sorted(found)


def test_a_seed_gives_the_same_model_and_leaves_the_users_random_state_alone(screen):
    torch.manual_seed(7)
    first = node(screen, 2).state_dict()
    after = torch.rand(1)
    torch.manual_seed(8)
    same, other = node(screen, 2).state_dict(), node(screen, 2, seed=1).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)


def test_two_models_of_one_session_do_not_share_parameters(screen):
    pyro.clear_param_store()
    first, second = node(screen, 2), node(screen, 2)
    before = copy.deepcopy(second.state_dict())
    step(first, screen)
    assert all(torch.equal(before[name], value) for name, value in second.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in first.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_protocols_that_the_screen_never_saw_can_be_carried(screen):
    model = node(screen, 2)
    gene, other = (Knockout(name) for name in screen.perturbations)
    protocols = [gene >> Wait(1) >> Media("BMP4") >> other >> Wait(2.5), Protocol([Wait(9)])]
    state = model.transition(torch.zeros(2, 2), model.vocabulary.encode(protocols), model.pushes(model.globals()))
    assert (state.clock * model.vocabulary.time_scale).tolist() == pytest.approx([3.5, 9.0])
    assert state.perturbation.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert torch.isfinite(state.z).all()


# Misuse.


@pytest.mark.parametrize("n_latent", [0, -3])
def test_a_latent_state_needs_a_size(screen, n_latent):
    with pytest.raises(ValueError, match=f"n_latent is a number of dimensions and must be a whole number of at least 1; got {n_latent}"):
        node(screen, n_latent)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("structure", [node, vae, neural_sde, causal_context])
def test_sizes_and_seeds_of_a_wrong_kind_are_refused(screen, structure):
    for sizes in ({"n_latent": True}, {"n_hidden": True}, {"n_latent": "2"}):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} is a number of dimensions"):
            structure(screen, **sizes)
    for seed in ("a", -1, 1.5, True):
        with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to 2.*; got {seed!r}"):
            structure(screen, seed=seed)
    with pytest.raises(ValueError, match="n_steps must be a whole number of at least 1"):
        neural_sde(screen, n_steps=True)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("inf"), float("nan"), True])
def test_a_memory_that_is_no_time_is_refused(screen, memory):
    with pytest.raises(ValueError, match=f"memory is a time, in median waits .* got {memory!r}"):
        node(screen, 2, memory=memory)


def test_a_memory_in_gene_space_is_refused(screen):
    with pytest.raises(ValueError, match="memory is of the effects on single genes of counts"):
        node(screen.pseudobulk(), memory=5.0)


def test_an_unknown_measurement_is_refused_with_those_there_are(screen):
    with pytest.raises(
        ValueError, match=r"Unknown measurement 'zinb'\. Use one of 'zero_inflated_negative_binomial', 'negative_binomial', 'poisson'"
    ):
        node(screen, measurement="zinb")


class Exploding(nn.Module):
    """A field that only cells whose media was changed cannot be solved under."""

    def forward(self, z, perturbation, media, clock):
        return 50 * torch.sin(1e4 * z) * (media.abs().sum(-1, keepdim=True) > 0) + 0 * perturbation


def test_a_wait_that_cannot_be_solved_names_what_was_done_to_the_worst_cell(screen):
    model = node(screen, 2, field=Exploding())
    cells = CellTable(model, screen).cells(torch.arange(screen.n_cells))
    with (
        torch.no_grad(),
        pytest.raises(SolverError, match=r"could not be solved with 128 steps.* Worst: .*Media\('BMP4'\) >> Wait\([12]\)") as caught,
    ):
        model.moved(model.globals(), torch.randn(screen.n_cells, 2), cells.protocol)
    assert screen.conditions[screen.condition[caught.value.cell]].media == "BMP4"
    assert caught.value.error > 1e-3
