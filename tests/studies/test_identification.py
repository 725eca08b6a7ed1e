"""Screens drawn from the prior of a structure: its law, the template's layout, and nothing of the user's touched."""

import numpy as np
import pytest
import torch

import perturbprob as pb

STRUCTURES = {"node": pb.node, "vae": pb.vae, "neural_sde": pb.neural_sde, "causal_context": pb.causal_context}


@pytest.fixture(scope="module")
def template() -> pb.Screen:
    """Two times, two batches, a thousand cells."""
    return pb.simulate(n_cells=1000, n_genes=8, n_perturbations=2, times=(1.0, 2.0), n_batches=2, seed=2).screen


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_counts_are_new_and_the_layout_is_the_template_s(name: str, template: pb.Screen) -> None:
    screen = pb.prior_screen(STRUCTURES[name](template, n_latent=2), template, seed=1)
    counts = screen.counts.toarray()
    assert counts.shape == template.counts.shape
    assert (counts == np.rint(counts)).all()
    assert 0 <= counts.min() < counts.max() <= 1e5
    assert (counts != template.counts.toarray()).mean() > 0.5
    assert screen.summary().equals(template.summary())
    assert (screen.size_factor == template.size_factor).all()
    assert (screen.cells == template.cells).all()


def test_a_seed_gives_one_screen_and_leaves_model_template_and_random_state_alone(template: pb.Screen) -> None:
    model, before = pb.node(template, n_latent=2), template.counts.toarray()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first, same, other = (pb.prior_screen(model, template, seed).counts.toarray() for seed in (1, 1, 2))
    assert (first == same).all()
    assert (first != other).any()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert (template.counts.toarray() == before).all()


def test_strength_moves_perturbed_cells_alone(template: pb.Screen) -> None:
    """The same draw with a push and with a hard one: control cells stay where they were, edited ones do not."""
    weak, hard = (pb.prior_screen(pb.vae(template, n_latent=2), template, 1, strength=k).counts.log1p() for k in (0.0, 5.0))
    control = np.isin(np.arange(template.n_cells), template.cells_of("control"))
    moved = [
        np.abs(hard[part].mean(axis=0) - weak[part].mean(axis=0)).max() for part in (np.flatnonzero(~control), np.flatnonzero(control))
    ]
    assert moved[0] > 3 * moved[1]


def test_totals_follow_depth_and_zero_inflation_adds_zeros(template: pb.Screen) -> None:
    screens = [pb.prior_screen(pb.node(template, n_latent=2, measurement="poisson"), template, seed) for seed in range(5)]
    for screen in screens:  # batch effects aside, a cell's expected total is its size factor times the depth of the template
        total = np.asarray(screen.counts.sum(axis=1)).ravel() / (template.size_factor * template.depth)
        assert 0.5 < np.median(total) < 2
    zeros = [(screen.counts.toarray() == 0).mean() for screen in screens]
    extra = [(pb.prior_screen(pb.node(template, n_latent=2), template, seed).counts.toarray() == 0).mean() for seed in range(5)]
    assert np.mean(extra) > np.mean(zeros)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_prior_of_counts_is_refused(template: pb.Screen) -> None:
    late = template[np.array([template.conditions[k].time == 2.0 for k in template.condition])]
    with pytest.raises(TypeError, match="prior_screen draws from a model; got str"):
        pb.prior_screen("node", template)
    with pytest.raises(ValueError, match="no law of counts to draw from: take causal_context"):
        pb.prior_screen(pb.stationary(late), late)
    with pytest.raises(ValueError, match="make it without penetrance="):
        pb.prior_screen(pb.node(template, n_latent=2, penetrance=True), template)
    with pytest.raises(ValueError, match=r"strength must be a number from 0 to 1e\+06; got -1\.0"):
        pb.prior_screen(pb.node(template, n_latent=2), template, strength=-1.0)
    means = template.pseudobulk()
    with pytest.raises(ValueError, match="draws counts of RNA"):
        pb.prior_screen(pb.node(means), means)
