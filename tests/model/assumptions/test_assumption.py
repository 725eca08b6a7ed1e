"""Assumptions of every kind: each adds its term once, counts its pairs, is saved, and refuses what it cannot mean."""

import anndata
import numpy as np
import pyro
import pytest
import torch

import perturbprob as pb
from perturbprob.model.assumptions import Bound, bind
from perturbprob.model.cells import CellTable

ALL = (pb.UneditedStable(), pb.SteadyState(), pb.SilentInBaseline(), pb.Lipschitz(), pb.ExchangeableBatches())


def test_pairs_match_a_count_by_hand(screen):
    """Three perturbations and two media beside the baseline: 12 pairs of eq 5; 12 steady states; 3 × 2 of silence; 1 identity."""
    assert len(screen.layout.paths()) == 12
    assert {type(a).__name__: len(a.pairs(screen)) for a in ALL} == {
        "UneditedStable": 1, "SteadyState": 12, "SilentInBaseline": 6, "Lipschitz": 0, "ExchangeableBatches": 0,
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


def test_a_term_counts_once_whatever_the_minibatch(screen):
    model = pb.node(screen, 2, n_hidden=8, assumptions=[pb.SilentInBaseline()])
    table = CellTable(model, screen)
    for size in (1, 50, 720):
        torch.manual_seed(0)
        trace = pyro.poutine.trace(model).get_trace(table.cells(torch.arange(size), screen.n_cells))
        site = trace.nodes["silent_in_baseline"]
        expected = model.assumptions[0].term(model, {k: v["value"] for k, v in trace.nodes.items() if v["type"] == "sample"})
        torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)


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


def test_where_each_time_is_one_batch_it_is_said_that_nothing_can_be_tested():
    screen = pb.datasets.ishikawa2023()
    for assumption in (pb.UneditedStable(), pb.SteadyState(["control", "NANOG"])):
        found = assumption.test(screen)
        assert not found.testable
        assert "each time is one batch" in repr(found)
    moving, resting = (pb.SteadyState([name], relative_to_control=True).test(screen).effect for name in ("POU5F1", "NANOG"))
    assert moving > 3 * resting


def test_nothing_to_compare_with_is_said():
    screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=2, times=(1.0,), seed=1).screen
    assert "has a single time, 1;" in repr(pb.SteadyState().test(screen))
    assert "both in baseline and in other media" in repr(pb.SilentInBaseline().test(screen))
    assert "no screen shows how two neighbours part" in repr(pb.Lipschitz().test(screen))


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


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_assumption_and_one_twice(screen):
    with pytest.raises(TypeError, match=r"An assumption is one of ExchangeableBatches\(\.\.\.\), Lipschitz\(\.\.\.\), SelfReconstruction"):
        bind(["SteadyState"], screen)
    with pytest.raises(TypeError, match=r"takes a list; write assumptions=\[UneditedStable\("):
        bind(pb.UneditedStable(), screen)
    with pytest.raises(TypeError, match=r"takes a list; write assumptions=\[UneditedStable\("):
        pb.neural_sde(screen, assumptions=pb.UneditedStable())
    with pytest.raises(ValueError, match="noise of neural_sde moves them"):
        pb.neural_sde(screen, assumptions={pb.UneditedStable()})
    with pytest.raises(ValueError, match="SteadyState is given twice"):
        bind([pb.SteadyState(), pb.SteadyState(wait=2.0)], screen)


def test_a_bound_assumption_is_read_back_from_json(screen):
    for bound in bind(ALL, screen):
        again = Bound.from_json(bound.to_json())
        assert (again.assumption, again.protocols, again.weight) == (bound.assumption, bound.protocols, bound.weight)
        assert (bound.noise is None) == (again.noise is None)


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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("assumption", ALL)
def test_each_asks_a_screen_and_nothing_else(assumption):
    for ask in (assumption.test, assumption.pairs):
        with pytest.raises(TypeError, match="A Screen is needed here; got AnnData"):
            ask(anndata.AnnData(np.ones((2, 2))))
