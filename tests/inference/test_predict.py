"""Predictions: labelled, on the scale they say, with intervals that widen where they should."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.inference.draws import centre
from perturbprob.inference.expectation import Expectation, interpolated_log1p
from perturbprob.measurement.counts import CountLaw


def test_answers_are_labelled(fit: pb.Fit, screen: pb.Screen) -> None:
    answer = pb.predict(fit, n_draws=4, batch="average")
    assert answer["mean"].dims == ("condition", "gene")
    assert list(answer["condition"].values) == list(map(str, screen.conditions))
    assert set(answer["media"].values) == {"rest", "drug"}
    assert set(answer["perturbation"].values) == {"control", *screen.perturbations}
    assert tuple(answer["gene"].values) == screen.genes
    assert answer.attrs["scale"] == "rate"
    assert (answer["lower"] <= answer["upper"]).all()


def test_shares_without_batch_effect_sum_to_one(fit: pb.Fit) -> None:
    assert np.allclose(pb.predict(fit, n_draws=3)["mean"].sum("gene"), 1, atol=1e-4)


def test_log1p_is_the_mean_of_log1p_under_the_law(fit: pb.Fit, screen: pb.Screen) -> None:
    condition, sites = screen.conditions[-1], centre(fit.model, fit.guide)
    torch.manual_seed(0)
    expectation, only = Expectation(fit, [condition], ["batch1"], n_rest=4096), torch.arange(1)
    mean = expectation.means(sites, only, "log1p", None)[0]
    depth = fit.depth.quantiles(condition, "batch1")[torch.randint(0, 32, (4096,))] + fit.model.log_depth
    rate = expectation.log_shares(sites, only)[:, 0] + sites["batch_effect"][0] + depth[torch.randperm(4096), None]
    drawn = torch.stack([fit.model.law(sites, rate).sample().log1p().mean(0) for _ in range(30)])
    assert torch.allclose(mean, drawn.mean(0), atol=0.02)
    assert not torch.allclose(mean, drawn.expm1().mean(0).log1p(), atol=1e-4)


def test_the_table_interpolates(screen: pb.Screen) -> None:
    law = CountLaw(torch.linspace(-8, 8, 999)[:, None].expand(-1, 2), torch.tensor([0.5, 20.0]), torch.tensor([0.01, 0.2]))
    assert torch.allclose(interpolated_log1p(law), law.mean_log1p(), atol=2e-4)


def test_counts_are_shares_times_depth(fit: pb.Fit, screen: pb.Screen) -> None:
    condition = screen.conditions[0]
    counts = pb.predict(fit, condition, n_draws=20, scale="counts", batch="batch1")["mean"]
    seen = screen.counts[(screen.condition == 0) & (screen.batch == 0)].mean(0)
    assert np.corrcoef(counts.values[0], seen)[0, 1] > 0.95
    assert float(counts.sum()) == pytest.approx(seen.sum(), rel=0.15)


def test_an_unseen_time_is_less_certain(fit: pb.Fit, screen: pb.Screen) -> None:
    name = screen.perturbations[0]
    known, later = (pb.predict(fit, pb.Knockout(name) >> pb.Wait(t), n_draws=150, scale="log1p", batch="batch1") for t in (2.0, 4.0))
    width = [float((a["upper"] - a["lower"]).mean()) for a in (known, later)]
    assert width[1] > width[0]


def test_observed_intervals_hold_the_sampling_noise(fit: pb.Fit, screen: pb.Screen) -> None:
    few, many, mean = (
        pb.predict(fit, screen.conditions[0], n_draws=200, batch="batch1", scale="log1p", **kind)
        for kind in ({"interval": "observed", "n_cells": 5}, {"interval": "observed", "n_cells": 500}, {})
    )
    width = [float((a["upper"] - a["lower"]).mean()) for a in (few, many, mean)]
    assert width[0] > width[1] > width[2]


def test_a_new_batch_is_less_certain_than_a_known_one(fit: pb.Fit, screen: pb.Screen) -> None:
    widths = [
        float((a["upper"] - a["lower"]).mean())
        for a in (pb.predict(fit, screen.conditions[0], n_draws=100, batch=b) for b in ("batch1", "new"))
    ]
    assert widths[1] > widths[0]


def test_average_is_the_mean_over_batches(fit: pb.Fit, screen: pb.Screen) -> None:
    each = [pb.predict(fit, screen.conditions[0], n_draws=5, batch=b)["mean"] for b in screen.batches]
    average = pb.predict(fit, screen.conditions[0], n_draws=5, batch="average")["mean"]
    assert np.allclose(sum(each) / 2, average, atol=1e-6)


def test_control_baseline_and_zero_waits_are_identities(fit: pb.Fit) -> None:
    plain, dressed = (pb.predict(fit, p, n_draws=3, batch="batch1") for p in (pb.Wait(1), pb.Media("rest") >> pb.Wait(0) >> pb.Wait(1)))
    assert plain.identical(dressed)


@pytest.mark.filterwarnings("ignore::perturbprob.UndeclaredWarning")
def test_it_says_when_time_and_batch_are_aliased() -> None:
    screen = pb.datasets.ishikawa2023()[::37]
    fit = pb.fit(pb.node(screen, 2), screen, epochs=1, progress=False)
    with pytest.warns(pb.AliasedWarning, match=r"time and batch are aliased.*Name batch="):
        pb.predict(fit, screen.conditions[0], n_draws=2)


@pytest.mark.filterwarnings("ignore::perturbprob.UndeclaredWarning")
def test_it_says_when_batches_are_nested_in_times(screen: pb.Screen) -> None:
    lanes = tuple(f"{b} at {t:g}" for b in screen.batches for t in screen.times)
    time = np.array([screen.times.index(p.time) for p in screen.conditions])[screen.condition]
    nested = replace(screen, batches=lanes, batch=screen.batch * len(screen.times) + time)
    fit = pb.fit(pb.node(nested, 2), nested, epochs=1, progress=False)
    with pytest.warns(pb.AliasedWarning, match="time and batch are aliased"):
        pb.predict(fit, screen.conditions[0], n_draws=2)


def test_the_noise_of_a_sample_does_not_shrink_when_batches_are_averaged(fit: pb.Fit, screen: pb.Screen) -> None:
    options = {"n_draws": 200, "scale": "counts", "interval": "observed", "n_cells": 5}
    one, both = (pb.predict(fit, screen.conditions[0], batch=b, **options) for b in ("batch1", "average"))
    ratio = ((both["upper"] - both["lower"]) / (one["upper"] - one["lower"])).mean()
    assert float(ratio) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    ("condition", "options", "message"),
    [
        (pb.Knockout("NANOG") >> pb.Wait(1), {}, r"Knockout\('NANOG'\) was never seen by this model.*Known"),
        (pb.Media("dox") >> pb.Wait(1), {}, "Media 'dox' was never seen"),
        (pb.Wait(1), {"batch": "batch9"}, "Batch 'batch9' was never seen by this model. Did you mean 'batch"),
        (pb.Wait(1), {"scale": "tpm"}, "Unknown scale 'tpm'"),
        (pb.Wait(1), {"interval": "wide"}, "Unknown interval 'wide'"),
        (pb.Wait(1), {"interval": "observed"}, "goes with n_cells="),
        (pb.Wait(1), {"n_cells": 10}, "goes with n_cells="),
        (pb.Wait(1), {"level": 1.0}, "level is a probability"),
        (pb.Wait(1), {"batch": ["batch1", "batch2"]}, "names 2 batches for 1 conditions"),
        ([], {}, "No condition to predict"),
    ],
)
def test_misuse(fit: pb.Fit, condition: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.predict(fit, condition, n_draws=2, **options)


def test_the_kind_of_perturbation_counts(fit: pb.Fit, screen: pb.Screen) -> None:
    name = screen.perturbations[0]
    with pytest.raises(ValueError, match=rf"Activation\('{name}'\) was never seen.*It has seen Knockout"):
        pb.predict(fit, pb.Activation(name) >> pb.Wait(1), n_draws=2)


def test_a_time_far_beyond_the_screen_is_said_to_be_a_guess(fit: pb.Fit, screen: pb.Screen) -> None:
    with pytest.warns(pb.UndeclaredWarning, match="lasts 100, and the screen ends at .*its interval is too narrow"):
        pb.predict(fit, pb.Knockout(screen.perturbations[0]) >> pb.Wait(100), n_draws=2)


def test_a_structure_with_noise_is_not_told_to_declare_what_it_refuses() -> None:
    screen = pb.simulate(n_cells=60, n_genes=8, n_perturbations=1, times=(1.0,), seed=0).screen
    fit = pb.fit(pb.neural_sde(screen, 2, n_steps=2), screen, epochs=1, progress=False)
    with pytest.warns(pb.UndeclaredWarning, match=r"say so, with a structure without noise, .*: node\(screen"):
        pb.predict(fit, screen.conditions[0], n_draws=2)


@pytest.mark.usefixtures("unchecked")
def test_values_of_a_wrong_type(fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match="Media needs the name of a media; got 3"):
        pb.Media(3)
    with pytest.raises(ValueError, match=r"seed must be a whole number .*; got 2\.5"):
        pb.predict(fit, pb.Wait(1), n_draws=2, seed=2.5)
    with pytest.raises(ValueError, match="batch= takes the name of a batch, one per condition, or None; got 3"):
        pb.predict(fit, pb.Wait(1), n_draws=2, batch=3)


def test_before_time_zero() -> None:
    with pytest.raises(ValueError, match="Time runs forward from the start"):
        pb.Wait(-1)


def test_a_protocol_that_waits_for_no_time_is_pointed_out(fit: pb.Fit, screen: pb.Screen) -> None:
    gene = screen.perturbations[0]
    with pytest.warns(UserWarning, match=r"waits for no time, so nothing has happened yet"):
        pb.predict(fit, pb.Knockout(gene), n_draws=2, batch="average", progress=False)


def test_shares_and_counts_leave_out_the_same_zeros(fit: pb.Fit, screen: pb.Screen) -> None:
    """A gene with a gate of 0.3 has 0.7 of its counts, and of its share."""
    zeros = copy.deepcopy(fit)
    zeros.guide.gate_loc[0] = np.log(0.3 / 0.7)
    rate, counts = (pb.predict(zeros, screen.conditions[0], n_draws=20, scale=s, progress=False)["mean"] for s in ("rate", "counts"))
    np.testing.assert_allclose(counts / rate, float((counts / rate).mean()), rtol=0.05)
    before = pb.predict(fit, screen.conditions[0], n_draws=20, progress=False)["mean"]
    assert float((rate / before)[0, 0]) < 0.8
    np.testing.assert_allclose(rate.sum("gene"), 1, rtol=1e-4)


# Several fits.


def other(fit: pb.Fit, by: float) -> pb.Fit:
    """A fit whose genes are all biased by so much in the log of their share."""
    moved = copy.deepcopy(fit)
    with torch.no_grad():
        moved.guide.block_loc[::2, 0] += by
    return moved


def test_a_fit_twice_is_the_fit(fit: pb.Fit) -> None:
    one, two = pb.predict(fit, n_draws=10, batch="batch1"), pb.predict([fit, fit], n_draws=20, batch="batch1")
    np.testing.assert_allclose(one["mean"], two["mean"], rtol=1e-5)
    np.testing.assert_allclose(two["lower"], pb.predict(fit, n_draws=10, batch="batch1", level=1 - 1e-9)["lower"], rtol=1e-5)


def test_an_ensemble_is_the_mean_of_its_members_and_holds_what_they_disagree_in(fit: pb.Fit) -> None:
    fits = [fit, other(fit, 2.0)]
    each = [pb.predict(one, n_draws=20, batch="batch1") for one in fits]
    both = pb.predict(fits, n_draws=40, batch="batch1")
    np.testing.assert_allclose(both["mean"], (each[0]["mean"] + each[1]["mean"]) / 2, rtol=1e-5)
    assert (both["upper"] - both["lower"] > 0.5 * abs(each[0]["mean"] - each[1]["mean"])).all()


def test_draws_are_dealt_to_all_members(fit: pb.Fit) -> None:
    fits = [fit, other(fit, 1.0), other(fit, 2.0)]
    each = [pb.predict(one, n_draws=n, batch="batch1")["mean"] * n for one, n in zip(fits, (2, 3, 3), strict=True)]
    np.testing.assert_allclose(pb.predict(fits, n_draws=8, batch="batch1")["mean"], sum(each) / 8, rtol=1e-5)


def test_fits_that_do_not_answer_the_same_question_are_refused(fit: pb.Fit) -> None:
    with pytest.raises(ValueError, match="No fit to ask"):
        pb.predict([])
    with pytest.raises(ValueError, match="1 draws are fewer than the 2 fits of the ensemble"):
        pb.predict([fit, fit], n_draws=1)
    few = pb.simulate(n_cells=60, n_genes=6, n_perturbations=2, seed=1).screen
    elsewhere = pb.fit(pb.node(few, 2), few, epochs=1, progress=False)
    with pytest.raises(ValueError, match="The fits of an ensemble need the same genes: make all of them from one screen"):
        pb.predict([fit, elsewhere])
    paths = replace(fit, settings=fit.settings | {"objective": "paths"})
    with pytest.raises(ValueError, match="need one objective"):
        pb.predict([fit, paths])


@pytest.mark.usefixtures("unchecked")
def test_a_model_among_the_fits_is_refused(fit: pb.Fit) -> None:
    with pytest.raises(TypeError, match="A fit is needed here; got CellModel"):
        pb.predict([fit, fit.model])  # type: ignore[list-item]
