"""Steady states (eq 9): most probable where nothing moves, never leaking what a split hides, and told from a drift that all share."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import perturbprob as pb


def test_a_steady_state_is_most_probable_where_nothing_moves(screen, make):
    for reading in ("own", "control_input"):
        model, sites = make(screen, pb.SteadyState(reading=reading))
        bound, moving = model.assumptions[0], float(model.assumptions[0].term(model, sites).detach())
        with torch.no_grad():
            for parameter in model.transition.field.parameters():
                parameter.zero_()
        sites = sites | {name: torch.zeros_like(sites[name]) for name in ("perturbation_effect", "media_effect")}
        still = float(bound.term(model, sites).detach())
        noise, weight = torch.as_tensor(bound.noise), torch.tensor(bound.weight)
        best = (weight[:, None] * torch.distributions.Normal(0.0, noise).log_prob(torch.zeros_like(noise))).sum()
        assert still == pytest.approx(float(best), rel=1e-4)
        assert moving < still


@pytest.mark.parametrize("wait", [1.0, 0.3])
def test_a_steady_state_holds_the_condition_effect_too(screen, wait, still):
    """Nothing else moves, so the term is highest where effects are remembered for long, and with it the expected change is small."""
    model, sites = still(screen, pb.SteadyState(wait=wait))
    sites["condition_effect"] = torch.randn(len(model.condition_effect.nodes), screen.n_genes)
    bound, changes = model.assumptions[0], []
    for memory in (1.0, 10.0, 1e4):
        at = sites | {"condition_memory": torch.tensor(memory)}
        changes.append(
            (float(bound.term(model, at).detach()), float(bound.assumption.change(model, at, bound.protocols).detach().abs().mean()))
        )
    terms, sizes = zip(*changes, strict=True)
    assert sorted(terms) == list(terms)
    assert sizes[0] > 3 * sizes[1] > 30 * sizes[2]
    state = torch.get_rng_state()
    assert torch.equal(bound.term(model, at), bound.term(model, at))
    assert torch.equal(state, torch.get_rng_state())


def test_what_all_share_does_not_count_relative_to_control(screen, make):
    model, sites = make(screen, pb.SteadyState(relative_to_control=True))
    sites = sites | {name: torch.zeros_like(sites[name]) for name in ("perturbation_effect",)}
    bound = model.assumptions[0]
    own = replace(bound.assumption, relative_to_control=False)
    assert bound.assumption.change(model, sites, bound.protocols).abs().max() < 1e-6
    change = own.change(model, sites, bound.protocols)
    control = own.change(model, sites, [p.unperturbed() for p in bound.protocols])
    torch.testing.assert_close(change, control)
    assert change.abs().max() > 1e-3


def test_a_learnt_scale_never_falls_below_the_noise_so_the_objective_is_bounded(screen, make):
    model, sites = make(screen, pb.SteadyState(scale="learnt"))
    bound = model.assumptions[0]
    values = []
    for size in (0.0, 1e-6, 1.0, 10.0):
        excess = {"steady_state_excess": torch.full((len(bound.protocols),), size)}
        values.append(float(bound.term(model, sites | excess).detach()))
    fixed, fixed_sites = make(screen, pb.SteadyState())
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    noise, weight = torch.as_tensor(bound.noise), torch.tensor(bound.weight)
    ceiling = float((weight[:, None] * torch.distributions.Normal(0.0, noise).log_prob(torch.zeros_like(noise))).sum())
    assert max(values) <= ceiling + 1e-3
    assert fixed.assumptions[0].term(fixed, fixed_sites) <= ceiling + 1e-3


def test_a_drift_that_all_share_counts_unless_it_is_taken_relative_to_control():
    """Every cell's first genes treble: nothing moves beyond that, and everything does without looking at control."""
    rng, rate = np.random.default_rng(0), np.full((2, 30), 5.0)
    rate[1, :10] *= 3
    time, names = np.tile([1.0, 2.0], 600), np.repeat(["control", "A", "B", "C"], 300)
    counts = rng.poisson(rate[(time - 1).astype(int)]).astype(float)
    adata = anndata.AnnData(counts, obs={"perturbation": names, "time": time})
    with pytest.warns(pb.ScreenWarning):
        screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", time="time", size_factor=np.ones(1200))
    own, relative = (pb.SteadyState("A", relative_to_control=r).test(screen) for r in (False, True))
    assert own.interval[0] > 0.5
    assert relative.interval[0] < 0.05
    assert "beyond the drift" in repr(relative)
    assert "beyond the drift" not in repr(own)


def test_movement_is_sought_in_every_media_of_the_conditions(screen):
    """Cells of one media move; a test of all media sees it, a test of the others and of control in baseline media does not."""
    counts = screen.counts.toarray().astype(np.float32)
    late = np.array([p.media == "TGFB1" and p.time == 3 for p in screen.conditions])[screen.condition]
    counts[late, :4] = counts[late, :4] * 8 + 8
    moved = replace(screen, counts=csr_array(counts))
    gene = screen.perturbations[0]
    protocols = {m: next(p for p in screen.conditions if (p.perturbation, p.media, p.time) == (gene, m, 3)) for m in (None, "TGFB1")}
    rest, media, both = (pb.SteadyState(which).test(moved) for which in ([protocols[None]], [protocols["TGFB1"]], list(protocols.values())))
    assert media.effect > 3 * rest.effect
    assert both.effect**2 == pytest.approx((rest.effect**2 + media.effect**2) / 2, rel=0.2)
    other = np.array([p.media is not None for p in screen.conditions])[screen.condition]
    assert "the screen holds no cells in media 'rest'" in repr(pb.UneditedStable().test(screen[other]))


def test_a_steady_state_may_not_give_held_out_times_away():
    train, _ = pb.split.hold_out_time(pb.datasets.ishikawa2023(), 5, ["POU5F1"])
    with pytest.raises(ValueError, match=r"POU5F1, last seen at 4 while others are seen at 5: .* leaks the answer"):
        pb.node(train, assumptions=[pb.SteadyState(["POU5F1"])])


def test_auto_leaves_out_what_a_split_by_time_hides():
    screen = pb.datasets.ishikawa2023()
    train, _ = pb.split.hold_out_time(screen, 5, ["POU5F1", "NANOG"])
    auto = pb.SteadyState()
    bound = auto.bind(train)
    assert {p.time for p in bound.protocols} == {5.0}
    assert not {"POU5F1", "NANOG"} & {p.perturbation for p in bound.protocols}
    assert {p.perturbation for p in auto.pairs(screen)} - {p.perturbation for p in auto.pairs(train)} == {"NANOG"}  # POU5F1 moves


def test_a_time_hidden_within_the_wait_may_not_be_given_away(screen):
    """Seen at 1 and 3 and held out at 2: waiting from 1 to 2 would be told the answer; from 3 on nothing is hidden."""
    gene = screen.perturbations[0]
    hidden = np.array([p.perturbation == gene and p.time == 2 for p in screen.conditions])
    train, early = screen[~hidden[screen.condition]], pb.Knockout(gene) >> pb.Wait(1)
    with pytest.raises(ValueError, match=r"last seen at 1 while others are seen at 2: .* leaks the answer"):
        pb.SteadyState([early], wait=1.5).bind(train)
    assert pb.SteadyState([early], wait=0.5).bind(train).protocols == (early,)
    assert {p.time for p in pb.SteadyState([gene], wait=1.5)._chosen(train)[0]} == {3.0}


def test_conditions_that_are_named_and_move_are_warned_of_and_not_counted():
    screen, named = pb.datasets.ishikawa2023(), pb.SteadyState(["NANOG", "POU5F1"])
    with pytest.warns(UserWarning, match=r"names Knockout\('POU5F1'\) >> Wait\(5\), which this screen shows moving.*leave it out"):
        bound = named.bind(screen)
    assert [p.perturbation for p in bound.protocols] == [pair.perturbation for pair in named.pairs(screen)] == ["NANOG"]
    pb.SteadyState().bind(screen)


def test_auto_asks_for_the_last_time_of_each_media(screen):
    """What is hidden in one media is left out there and kept in the others."""
    gene = screen.perturbations[0]
    hidden = [p.perturbation == gene and p.media == "BMP4" and p.time == 3 for p in screen.conditions]
    train = screen[~np.array(hidden)[screen.condition]]
    left_out = {(p.perturbation, p.media) for a in [pb.SteadyState()] for p in a.pairs(screen) if p not in a.pairs(train)}
    assert left_out == {(gene, "BMP4")}


def test_a_structure_without_the_semigroup_law_refuses_steady_states(screen, monkeypatch):
    from perturbprob.dynamics import NeuralODE

    monkeypatch.setattr(NeuralODE, "semigroup", False)
    with pytest.raises(ValueError, match=r"SteadyState needs W\(s\) then W\(t\) to be W\(s \+ t\), and NeuralODE does not promise that"):
        pb.node(screen, 2, assumptions=[pb.SteadyState()])
    pb.node(screen, 2, assumptions=[pb.UneditedStable()])


def test_a_wait_longer_than_anything_measured_is_pointed_out(screen):
    with pytest.warns(UserWarning, match=r"wait=100\) is longer than anything measured"):
        pb.SteadyState(wait=100).bind(screen)
