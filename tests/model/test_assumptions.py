"""Assumptions: each adds its term once, counts its pairs, tests itself, and refuses what it cannot mean."""

from dataclasses import replace

import anndata
import numpy as np
import pyro
import pytest
import torch
from scipy.sparse import csr_array

import perturbprob as pb
from perturbprob.dynamics.neighbours import gradient_constant, map_constant
from perturbprob.dynamics.neural_ode import Stable
from perturbprob.inference.draws import centre
from perturbprob.model.assumptions import Bound, bind
from perturbprob.model.assumptions.terms import carried, rest_points, standard_error
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide, node_design

ALL = (pb.UneditedStable(), pb.SteadyState(), pb.SilentInBaseline(), pb.Lipschitz())


@pytest.fixture(scope="module")
def screen() -> pb.Screen:
    """Three knock-outs, three media, three times."""
    return pb.simulate(
        n_cells=720, n_genes=8, n_perturbations=3, media=("rest", "BMP4", "TGFB1"), times=(1.0, 2.0, 3.0), n_batches=2, seed=2
    ).screen


def make(screen: pb.Screen, *assumptions: object, **how: object) -> tuple:
    """A model with assumptions, its global sites at their centre, and the terms."""
    model = pb.node(screen, 2 if screen.values == "counts" else None, n_hidden=8, assumptions=assumptions, **how)
    with torch.no_grad():
        model.transition.field.get_parameter(
            "field.network.2.weight" if any(isinstance(a, pb.UneditedStable) for a in assumptions) else "network.2.weight"
        ).normal_()
    sites = centre(model, Guide(model, node_design(model, screen)))
    sites["perturbation_effect"] = torch.randn_like(sites["perturbation_effect"])
    return model, sites


# Accounting.


def test_pairs_match_a_count_by_hand(screen):
    """Three perturbations and two media beside the baseline: 12 pairs of eq 5; 12 steady states; 3 × 2 of silence; 1 identity."""
    assert len(screen.layout.paths()) == 12
    assert {type(a).__name__: len(a.pairs(screen)) for a in ALL} == {
        "UneditedStable": 1, "SteadyState": 12, "SilentInBaseline": 6, "Lipschitz": 0,
    }  # fmt: skip
    extra = [pair for a in ALL for pair in a.pairs(screen)]
    table = screen.layout.paths(extra)
    assert len(table) == 12 + 19
    assert table.source.value_counts().to_dict() == {"eq 5": 12, "SteadyState": 12, "SilentInBaseline": 6, "UneditedStable": 1}
    assert table.observed.all()


def test_pairs_say_what_is_done(screen):
    gene = screen.perturbations[0]
    own, taken_off = (pb.SteadyState([gene], reading=r).pairs(screen)[0] for r in ("own", "control_input"))
    assert (own.start, own.done, own.end) == (f"X[t; {gene}]", f"({gene}, ·, s)", f"X[t; {gene}]")
    assert taken_off.done == "(·, ·, s)"
    silent = pb.SilentInBaseline([gene]).pairs(screen)[0]
    assert (silent.start, silent.done, silent.end) == (f"X[t; {gene}]", "(·, BMP4, t)", f"X[BMP4, t; {gene}]")


# Terms.


def test_a_term_counts_once_whatever_the_minibatch(screen):
    model = pb.node(screen, 2, n_hidden=8, assumptions=[pb.SilentInBaseline()])
    table = CellTable(model, screen)
    for size in (1, 50, 720):
        torch.manual_seed(0)
        trace = pyro.poutine.trace(model).get_trace(table.cells(torch.arange(size), screen.n_cells))
        site = trace.nodes["silent_in_baseline"]
        expected = model.assumptions[0].term(model, {k: v["value"] for k, v in trace.nodes.items() if v["type"] == "sample"})
        torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)


def test_unmarked_cells_do_not_move_where_they_are_declared_stable(screen):
    for assumptions, moves in (((pb.UneditedStable(),), False), ((), True)):
        model, sites = make(screen, *assumptions)
        z0 = torch.randn(4, 2)
        end = model.moved(sites, z0, model.vocabulary.encode([pb.Protocol([pb.Wait(3)])] * 4))
        assert bool((end.delta.abs() > 1e-4).any()) == moves
    edited = model.moved(sites, z0, model.vocabulary.encode([next(p for p in screen.conditions if p.perturbations)] * 4))
    assert (edited.delta.abs() > 1e-4).any()


def test_a_steady_state_is_most_probable_where_nothing_moves(screen):
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


def still(screen: pb.Screen, assumption: object) -> tuple:
    """A model in which the latent state never moves, and its sites: what is left are the condition effects."""
    model, sites = make(screen, assumption)
    with torch.no_grad():
        for parameter in model.transition.field.parameters():
            parameter.zero_()
    return model, sites | {name: torch.zeros_like(sites[name]) for name in ("perturbation_effect", "media_effect")}


def test_silence_holds_the_condition_effect_in_baseline_media(screen):
    """The term is that of the predicted difference from control: measured nodes as they are, in log shares."""
    model, sites = still(screen, pb.SilentInBaseline())
    bound, effect = model.assumptions[0], model.condition_effect
    sites["condition_effect"] = torch.randn(len(effect.nodes), screen.n_genes, requires_grad=True)
    rows = effect.rows([effect.parts(p, model.vocabulary.time_scale) for p in bound.protocols])
    z = model.moved(sites, torch.as_tensor(rest_points(model, len(rows))), model.vocabulary.encode(bound.protocols)).z
    shares = [model.decoder(z, sites["gene_bias"] + extra).mean(0) for extra in (effect.total(sites["condition_effect"], rows), 0.0)]
    term = bound.term(model, sites)
    torch.testing.assert_close(term, bound.log_density(shares[0] - shares[1]).sum())
    assert torch.autograd.grad(term, sites["condition_effect"])[0].abs().max() > 1
    silent = sites | {"condition_effect": torch.zeros_like(sites["condition_effect"])}
    assert bool(term < bound.term(model, silent))


@pytest.mark.parametrize("wait", [1.0, 0.3])
def test_a_steady_state_holds_the_condition_effect_too(screen, wait):
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


def test_what_was_never_measured_has_the_median_error_of_what_was(screen):
    gene = screen.perturbations[0]
    hidden = np.array([p.perturbation == gene and p.media is None for p in screen.conditions])
    train = screen[~hidden[screen.condition]]
    never, measured = pb.Protocol([pb.Knockout(gene), pb.Wait(2)]), list(train.conditions)
    np.testing.assert_allclose(standard_error(train, [never])[0], np.median(standard_error(train, measured), axis=0))


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_an_unknown_error_is_in_the_unit_of_the_values(unit):
    """The spread between rows of a condition where there are several, over all rows where there is one each."""
    rng, names = np.random.default_rng(0), np.repeat(["control", "A", "B"], 200)
    values = unit * (rng.normal(0, [0.1, 2.0], (600, 2)) + np.repeat([0.0, 5.0, 9.0], 200)[:, None])
    adata = anndata.AnnData(values, obs={"perturbation": names})
    adata.var_names = ["A", "B"]
    screen = pb.Screen.from_anndata(adata, perturbation_type="knockout", values="continuous")
    np.testing.assert_allclose(standard_error(screen, screen.conditions), unit * np.array([[0.1, 2.0]] * 3) / 200**0.5, rtol=0.05)
    single = screen[[0, 200, 400]]
    np.testing.assert_allclose(standard_error(single, single.conditions), np.tile(values[::200].std(0, ddof=1), (3, 1)), rtol=1e-5)


def test_what_all_share_does_not_count_relative_to_control(screen):
    model, sites = make(screen, pb.SteadyState(relative_to_control=True))
    sites = sites | {name: torch.zeros_like(sites[name]) for name in ("perturbation_effect",)}
    bound = model.assumptions[0]
    own = replace(bound.assumption, relative_to_control=False)
    assert bound.assumption.change(model, sites, bound.protocols).abs().max() < 1e-6
    change = own.change(model, sites, bound.protocols)
    control = own.change(model, sites, [p.unperturbed() for p in bound.protocols])
    torch.testing.assert_close(change, control)
    assert change.abs().max() > 1e-3


def test_a_learnt_scale_never_falls_below_the_noise_so_the_objective_is_bounded(screen):
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


@pytest.mark.parametrize(("of", "exact"), [("map", map_constant), ("gradient", gradient_constant)])
@pytest.mark.parametrize("space", ["latent", "gene"])
def test_the_lipschitz_term_holds_the_constant_of_the_jacobian_to_its_bound(screen, of, exact, space):
    """Also in gene space, where there is one rest state: the largest constant over conditions and rest states, found from below."""
    part = screen[[p.time == 3 and p.media != "TGFB1" for p in np.array(screen.conditions)[screen.condition]]]
    torch.manual_seed(0)
    model, sites = make(part.pseudobulk() if space == "gene" else part)
    bound = pb.Lipschitz(of=of).bind(part)
    z0 = rest_points(model, len(bound.protocols))
    flow = lambda z: carried(model, sites, bound.protocols, z.reshape(z0.shape)).z.flatten(0, 1)  # noqa: E731
    with torch.no_grad():
        truth = float(exact(flow, z0.flatten(0, 1)).max())
    found = float(bound.term(model, sites).detach().neg().sqrt())
    assert 0.9 * truth < found < 1.05 * truth  # coarser steps with gradients
    assert float(bound.term(model, sites).detach().neg().sqrt()) == found
    held, free = (pb.Lipschitz(of=of, bound=b * truth).bind(part).term(model, sites) for b in (0.5, 1.1))
    assert float(held.detach()) == pytest.approx(-((found - 0.5 * truth) ** 2), rel=1e-3)
    assert float(free.detach()) == 0
    held.backward()
    assert max(float(parameter.grad.abs().max()) for parameter in model.transition.field.parameters() if parameter.grad is not None) > 0


@pytest.mark.parametrize("assumption", [*ALL, pb.SteadyState(scale="learnt", reading="control_input"), pb.Lipschitz(of="gradient")])
def test_each_enters_the_fit_and_survives_saving(screen, assumption, tmp_path):
    small = screen[::6]
    fit = pb.fit(pb.node(small, 2, n_hidden=8, assumptions=[assumption]), small, epochs=2, warmup=1, progress=False)
    assert np.isfinite(fit.losses["train"]).all()
    fit.save(tmp_path / "fit")
    again = pb.load(tmp_path / "fit")
    assert [b.assumption for b in again.model.assumptions] == [assumption]
    first, second = (pb.predict(f, n_draws=2, batch="average", progress=False)["mean"] for f in (fit, again))
    assert first.identical(second)
    assert pb.posterior(again, n_draws=2).posterior.sizes["draw"] == 2


def test_declared_stable_cells_wrap_any_field(screen):
    model = pb.node(screen, 2, assumptions=[pb.UneditedStable()])
    assert isinstance(model.transition.field, Stable)
    assert pb.node(screen, 2).transition.field.__class__.__name__ == "Push"


# Tests of assumptions.


def test_control_cells_that_drift_are_found_and_those_that_do_not_are_not():
    still = pb.simulate(n_cells=1500, n_genes=20, n_perturbations=2, times=(1.0, 2.0), n_batches=2, seed=4)
    found = pb.UneditedStable().test(still.screen)
    assert found.testable
    assert found.interval[0] <= 0.03
    assert found.effect < 2 * found.smallest
    control = still.adata[still.adata.obs.perturbation == "control"].copy()
    late = (control.obs.time == 2.0).to_numpy()
    moved = control.X.toarray()
    moved[late, :5] *= 3
    control.X = moved
    other = still.adata[still.adata.obs.perturbation != "control"].copy()
    other.X = other.X.toarray()
    drifting = pb.Screen.from_anndata(anndata.concat([control, other]), time="time", batch="batch")
    found = pb.UneditedStable().test(drifting)
    assert found.interval[0] > found.smallest
    assert found.power > 0.99


def test_where_each_time_is_one_batch_it_is_said_that_nothing_can_be_tested():
    screen = pb.datasets.ishikawa2023()
    for assumption in (pb.UneditedStable(), pb.SteadyState(["control", "NANOG"])):
        found = assumption.test(screen)
        assert not found.testable
        assert "each time is one batch" in repr(found)
    moving, resting = (pb.SteadyState([name], relative_to_control=True).test(screen).effect for name in ("POU5F1", "NANOG"))
    assert moving > 3 * resting


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


def test_silence_is_tested_at_matched_cell_numbers():
    """Effects in the other media only: many more changed genes there; the same in both: a ratio near 1."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for p in ("control", "A", "B", "C", "D"):
        for m in ("rest", "BMP4"):
            n = 300 if m == "rest" else 80
            rate = np.full(60, 5.0)
            if p != "control" and m == "BMP4":
                rate[rng.choice(60, 12, replace=False)] *= 3
            rows.append(rng.poisson(rate, (n, 60)))
            labels += [(p, m)] * n
    adata = anndata.AnnData(
        np.concatenate(rows).astype(float), obs={"perturbation": [p for p, _ in labels], "media": [m for _, m in labels]}
    )
    with pytest.warns(pb.ScreenWarning):
        screen = pb.Screen.from_anndata(
            adata, perturbation_type="knockout", media="media", baseline="rest", size_factor=np.ones(len(adata))
        )
    found = pb.SilentInBaseline().test(screen)
    assert found.interval[0] > 2
    assert found.power > 0.9


def test_nothing_to_compare_with_is_said():
    screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    assert "has a single time, 1;" in repr(pb.SteadyState().test(screen))
    assert "both in baseline and in other media" in repr(pb.SilentInBaseline().test(screen))
    assert "no screen shows how two neighbours part" in repr(pb.Lipschitz().test(screen))


# Misuse.


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: pb.SteadyState(wait=0), "needs a wait above 0.*got 0"),
        (lambda: pb.SteadyState(wait=-1.0), "needs a wait above 0"),
        (lambda: pb.SteadyState(reading="both"), "Unknown reading 'both' of eq 9"),
        (lambda: pb.SteadyState(scale="free"), "Unknown scale 'free'"),
        (lambda: pb.Lipschitz(of="field"), "use 'map' or 'gradient'"),
        (lambda: pb.Lipschitz(bound=-1.0), "use a number above 0, or 'penalty'"),
        (lambda: pb.Lipschitz(weight=0.0), "needs a weight above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_unknown_conditions_are_refused_with_the_nearest(screen):
    gene = screen.perturbations[0]
    with pytest.raises(ValueError, match=rf"names '{gene}x', which is no perturbation of this screen. Did you mean '{gene}'"):
        pb.node(screen, 2, assumptions=[pb.SteadyState([f"{gene}x"])])
    with pytest.raises(ValueError, match="SilentInBaseline names 'nobody'"):
        pb.node(screen, 2, assumptions=[pb.SilentInBaseline("nobody")])
    with pytest.raises(ValueError, match="which this screen does not hold"):
        pb.node(screen, 2, assumptions=[pb.SteadyState([pb.Knockout(gene) >> pb.Wait(99)])])


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


def test_two_kinds_on_one_gene_are_two_conditions():
    """Interference and activation of one gene: a name means both, each with a term, a pair and a test of its own."""
    names = np.array(["control", "A i", "A a", "B i"] * 80)
    kinds = [{"a": "CRISPRa", "i": "CRISPRi"}.get(name[-1], "control") for name in names]
    obs = {"perturbation": [n.split()[0] for n in names], "perturbation_type": kinds, "media": np.repeat(["rest", "BMP4"], 160)}
    obs["time"] = np.repeat([1.0, 2.0, 1.0, 2.0], 80)
    adata = anndata.AnnData(np.random.default_rng(0).poisson(5, (320, 3)).astype(float), obs=obs)
    adata.var_names = ["A", "B", "C"]
    screen = pb.Screen.from_anndata(adata, media="media", baseline="rest", time="time")
    steady, silent = pb.SteadyState("A"), pb.SilentInBaseline("A")
    both = {(pb.Interference("A"),), (pb.Activation("A"),)}
    assert {p.perturbations for p in steady.bind(screen).protocols} == {p.perturbations for p in silent.bind(screen).protocols} == both
    assert len(pb.SteadyState().bind(screen).protocols) == 8
    assert {pair.perturbation for pair in silent.pairs(screen)} == {"Activation('A')", "Interference('A')"}
    assert len(steady.pairs(screen)) == 4
    assert np.isfinite(steady.test(screen).effect)
    table = screen.layout.paths([*steady.pairs(screen), *silent.pairs(screen)])
    assert (table.source == "eq 5").sum() == 4 * 2
    assert table.observed.all()
    assert table[table.source == "eq 5"].cells.sum() == 320


def test_auto_asks_for_the_last_time_of_each_media(screen):
    """What is hidden in one media is left out there and kept in the others."""
    gene = screen.perturbations[0]
    hidden = [p.perturbation == gene and p.media == "BMP4" and p.time == 3 for p in screen.conditions]
    train = screen[~np.array(hidden)[screen.condition]]
    left_out = {(p.perturbation, p.media) for a in [pb.SteadyState()] for p in a.pairs(screen) if p not in a.pairs(train)}
    assert left_out == {(gene, "BMP4")}


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_assumption_and_one_twice(screen):
    with pytest.raises(TypeError, match=r"An assumption is one of Lipschitz\(\.\.\.\), SilentInBaseline"):
        bind(["SteadyState"], screen)
    with pytest.raises(TypeError, match=r"takes a list; write assumptions=\[UneditedStable\("):
        bind(pb.UneditedStable(), screen)
    with pytest.raises(ValueError, match="SteadyState is given twice"):
        bind([pb.SteadyState(), pb.SteadyState(wait=2.0)], screen)


def test_a_structure_without_the_semigroup_law_refuses_steady_states(screen, monkeypatch):
    from perturbprob.dynamics import NeuralODE

    monkeypatch.setattr(NeuralODE, "semigroup", False)
    with pytest.raises(ValueError, match=r"SteadyState needs W\(s\) then W\(t\) to be W\(s \+ t\), and NeuralODE does not promise that"):
        pb.node(screen, 2, assumptions=[pb.SteadyState()])
    pb.node(screen, 2, assumptions=[pb.UneditedStable()])


def test_a_bound_assumption_is_read_back_from_json(screen):
    for bound in bind(ALL, screen):
        again = Bound.from_json(bound.to_json())
        assert (again.assumption, again.protocols, again.weight) == (bound.assumption, bound.protocols, bound.weight)
        assert (bound.noise is None) == (again.noise is None)


def test_predict_warns_where_stability_is_neither_declared_nor_testable():
    screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    short = {"epochs": 1, "progress": False}
    with pytest.warns(pb.UndeclaredWarning, match="there is one time only"):
        pb.predict(pb.fit(pb.node(screen, 2), screen, **short), n_draws=2, batch="average", progress=False)
    declared = pb.fit(pb.node(screen, 2, assumptions=[pb.UneditedStable()]), screen, **short)
    pb.predict(declared, n_draws=2, batch="average", progress=False)


@pytest.mark.usefixtures("unchecked")
def test_a_protocol_alone_is_one_condition_twice_is_once_and_none_is_refused(screen):
    last = max((p for p in screen.conditions if p.perturbations), key=lambda p: p.time)
    assert pb.SteadyState(last).conditions == (repr(last),)
    assert pb.SteadyState([last, last]).conditions == (repr(last),)
    assert pb.SilentInBaseline(["A", "A"]).conditions == ("A",)
    for empty in (pb.SteadyState, pb.SilentInBaseline):
        with pytest.raises(ValueError, match=r"names no condition|takes names of perturbations"):
            empty([])
    with pytest.raises(ValueError, match="takes names of perturbations, such as"):
        pb.SilentInBaseline([last])


def test_a_wait_longer_than_anything_measured_is_pointed_out(screen):
    with pytest.warns(UserWarning, match=r"wait=100\) is longer than anything measured"):
        pb.SteadyState(wait=100).bind(screen)


def test_few_pairs_do_not_seem_sure(screen):
    found = pb.SilentInBaseline(screen.perturbations[0]).test(screen)
    assert not found.testable
    assert "too few to know how far they differ" in repr(found)
