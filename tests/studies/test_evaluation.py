"""Held-out conditions scored: laws of the score sheet, a recovery, and everything that is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy.sparse import csr_array
from scipy.stats import ttest_1samp, wilcoxon

import perturbprob as pb
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.experiment.split import Split, hold_out_batches, hold_out_cells, hold_out_perturbations, hold_out_time
from perturbprob.studies.baselines import MEAN_BASELINES
from perturbprob.studies.evaluation import chance, interval
from perturbprob.studies.mean_baselines import noise_floor

pytestmark = pytest.mark.slow

SHORT = {"n_draws": 20, "particles": 2, "at_most": 20, "progress": False}
CHEAP = {name: MEAN_BASELINES[name] for name in ("control mean", "perturbation mean", "last time")}
OF_MEANS = ["error", "weighted_error", "direction_control", "direction_mean", "discrimination", "de_overlap", "de_sign"]


@pytest.fixture(scope="module")
def ishikawa() -> Split:
    """Fold 0 of the 23 knock-outs."""
    screen = pb.datasets.ishikawa2023()
    return hold_out_time(screen, 5, screen.perturbations[::2])


@pytest.fixture(scope="module")
def small() -> pb.Screen:
    return pb.simulate(n_cells=1200, n_genes=9, n_perturbations=5, times=(1.0, 2.0), n_batches=2, seed=2).screen


@pytest.fixture(scope="module")
def part(small: pb.Screen) -> Split:
    return hold_out_time(small, 2, small.perturbations[:3])


@pytest.fixture(scope="module")
def fit(part: Split) -> pb.Fit:
    return pb.fit(pb.node(part.train, 2), part.train, epochs=2, progress=False)


@pytest.fixture(scope="module")
def found(fit: pb.Fit, part: Split) -> pb.Evaluation:
    return pb.evaluate(fit, part, **SHORT)


def truth(split: Split) -> xr.DataArray:
    """Return the observed means as a prediction."""
    return pseudobulk(split.test)["mean"]


def reversed_genes(screen: pb.Screen) -> pb.Screen:
    """Return the screen with its genes in the other order."""
    return replace(screen, genes=screen.genes[::-1], counts=csr_array(screen.counts.toarray()[:, ::-1]))


def conditions(found: pb.Evaluation, name: str = "model") -> np.ndarray:
    return found.conditions.loc[name, OF_MEANS].to_numpy(float)


def test_errors_are_those_of_the_baselines_and_the_floor_is_that_of_the_noise(ishikawa: Split) -> None:
    some = {name: MEAN_BASELINES[name] for name in ("control mean", "shrunk offset", "hierarchical Gaussian")}
    found = pb.evaluate({"truth": truth(ishikawa)}, ishikawa, baselines=some, n_draws=20)
    for name in some:
        expected = ((MEAN_BASELINES[name](ishikawa.train, ishikawa.held_out) - truth(ishikawa)) ** 2).mean("gene")
        error = found.conditions.loc[name, "error"]
        assert error.to_numpy() == pytest.approx(expected.sel(condition=error.index.to_numpy()).values)
        assert found.overall.loc[name, "error"] == pytest.approx(float(expected.mean()))
    assert found.overall.loc["noise floor", "error"] == pytest.approx(noise_floor(ishikawa.test))
    assert found.overall["error"].is_monotonic_increasing
    assert not found.left_out
    ratio = found.overall["error"] / noise_floor(ishikawa.test)
    assert found.overall["error_over_floor"].to_numpy() == pytest.approx(ratio.to_numpy())


def test_the_truth_scores_perfectly_and_beats_all(ishikawa: Split) -> None:
    found = pb.evaluate(truth(ishikawa), ishikawa, baselines=CHEAP)
    row = found.overall.loc["model"]
    assert row["error"] == pytest.approx(0, abs=1e-12)
    assert row["weighted_error"] == pytest.approx(0, abs=1e-12)
    assert row[["direction_control", "direction_mean", "discrimination", "de_overlap", "de_sign"]].tolist() == pytest.approx([1.0] * 5)
    assert found.paired["beats"].all()
    assert (found.paired["share_better"] == 1).all()
    assert "The model beats 3 of 3" in found.report()
    assert "does not beat" not in found.report()


def test_the_mean_of_the_training_perturbations_does_not_beat_itself(ishikawa: Split) -> None:
    found = pb.evaluate(pb.baselines.perturbation_mean(ishikawa.train, ishikawa.held_out), ishikawa, baselines=CHEAP)
    assert found.paired.loc["perturbation mean", ["difference", "lower", "upper"]].tolist() == [0, 0, 0]
    assert "The model does not beat the mean of the training perturbations." in repr(found)


def test_a_noisy_truth_beats_control_within_its_interval(ishikawa: Split) -> None:
    rng, mean = np.random.default_rng(0), truth(ishikawa)
    found = pb.evaluate(mean + rng.normal(0, 0.03, mean.shape), ishikawa, baselines=CHEAP)
    row = found.paired.loc["control mean"]
    assert row["beats"]
    assert row["lower"] < row["difference"] < row["upper"] < 0


def test_no_score_moves_with_predicted_controls(part: Split, small: pb.Screen) -> None:
    prediction = pseudobulk(small)["mean"]
    noisy = prediction.copy()
    control = [not p.perturbations for p in small.conditions]
    noisy[control] = np.random.default_rng(0).normal(9, 3, noisy[control].shape)
    one, other = (pb.evaluate(each, part, baselines=()) for each in (prediction, noisy))
    assert one.conditions.equals(other.conditions)
    assert np.isfinite(conditions(one)[:, 0]).all()


def test_the_order_of_conditions_and_genes_does_not_count(part: Split) -> None:
    prediction = pb.baselines.last_time(part.train, part.held_out)
    one, other = (pb.evaluate(each, part, baselines=()) for each in (prediction, prediction[::-1, ::-1]))
    assert one.conditions.equals(other.conditions)


def test_control_is_in_no_table(found: pb.Evaluation, part: Split) -> None:
    assert set(found.conditions.index.get_level_values("condition")) == {str(p) for p in part.held_out}


def test_every_row_and_column_of_a_fit(found: pb.Evaluation) -> None:
    assert set(found.left_out) <= set(MEAN_BASELINES)
    rows = set(found.overall.index)
    assert rows >= {"model", "noise floor", "control cells", "negative binomial", "condition negative binomial", "control mean"}
    assert np.isfinite(found.overall.loc["model"]).all()
    assert np.isfinite(found.overall.loc["control cells", ["energy", "mmd", "sinkhorn"]].to_numpy(float)).all()
    assert np.isfinite(found.overall.loc["negative binomial", "log_density"])
    assert set(found.paired.index) == rows & set(MEAN_BASELINES)


def test_the_error_of_a_fit_is_of_cells_in_their_own_batch(found: pb.Evaluation, fit: pb.Fit, part: Split) -> None:
    test = part.test
    cells = np.zeros((len(test.conditions), len(test.batches)), int)
    np.add.at(cells, (test.condition, test.batch), 1)
    condition, batch = np.nonzero(cells)
    asked, where = [test.conditions[k] for k in condition], [test.batches[k] for k in batch]
    means = pb.predict(fit, asked, batch=where, scale="log1p", n_draws=20, progress=False)["mean"].values
    shares = cells / cells.sum(1, keepdims=True)
    predicted = [sum(shares[k, b] * mean for c, b, mean in zip(condition, batch, means, strict=True) if c == k) for k in range(len(cells))]
    expected = np.square(np.array(predicted) - truth(part).values).mean(1)
    assert found.conditions.loc["model", "error"].to_numpy() == pytest.approx(expected, rel=1e-4)


def test_the_log_density_is_that_of_the_cells(found: pb.Evaluation, fit: pb.Fit, part: Split) -> None:
    density = pb.log_density(fit, part.test, 2, n_draws=5, progress=False).values / part.test.n_genes
    expected = np.bincount(part.test.condition, density) / np.bincount(part.test.condition)
    assert found.conditions.loc["model", "log_density"].to_numpy() == pytest.approx(expected)


def test_intervals_hold_the_noise_of_sampling(ishikawa: Split) -> None:
    """Of the truth plus sampling noise, intervals at the nominal level cover as often as they say."""
    rng, bulk = np.random.default_rng(1), pseudobulk(ishikawa.test)
    mean = bulk["mean"] + rng.normal(size=bulk["mean"].shape) * np.sqrt(bulk["variance"] / bulk["n_cells"]).values
    found = pb.evaluate(mean, ishikawa, baselines=(), n_draws=199)
    for level in (50, 80, 90):
        assert found.overall.loc["model", f"coverage{level}"] == pytest.approx(level / 100, abs=0.04)


def test_an_sd_widens_intervals_and_may_come_in_three_forms(part: Split) -> None:
    mean = pb.baselines.last_time(part.train, part.held_out)
    sd = xr.full_like(mean, 0.5)
    ends = {"lower": mean - 1.6448536 * 0.5, "upper": mean + 1.6448536 * 0.5}
    forms = [xr.Dataset({"mean": mean, "sd": sd}), mean.assign_coords(sd=sd), xr.Dataset({"mean": mean} | ends).assign_attrs(level=0.9)]
    sure, *unsure = (pb.evaluate(form, part, baselines=(), n_draws=99).overall.loc["model", "coverage50"] for form in (mean, *forms))
    assert sure < unsure[0]
    assert unsure == pytest.approx([unsure[0]] * 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::perturbprob.UndeclaredWarning", "ignore::perturbprob.AliasedWarning")
def test_what_predict_returns_scores_as_the_fit_does_in_one_batch(ishikawa: Split) -> None:
    cells = np.random.default_rng(0).permutation(ishikawa.train.n_cells)[:1500]
    train = ishikawa.train[np.sort(cells)]
    fitted = pb.fit(pb.node(train, 2), train, epochs=1, progress=False)
    table = pb.predict(fitted, list(ishikawa.held_out), scale="log1p", batch=ishikawa.test.batches[0], n_draws=20, progress=False)
    found = pb.evaluate({"fit": fitted, "table": table}, ishikawa.test, train, baselines=(), **SHORT)
    one, other = (conditions(found, name) for name in ("fit", "table"))
    assert one == pytest.approx(other, abs=1e-4, nan_ok=True)
    assert found.model == "fit"
    assert found.paired.index.tolist() == ["table"]


def test_a_fit_of_pseudobulk_is_scored_on_cells(part: Split) -> None:
    train = part.train.pseudobulk()
    fitted = pb.fit(pb.node(train), train, epochs=2, objective="paths", validation=0, progress=False)
    row = pb.evaluate(fitted, part, baselines=(), **SHORT).overall.loc["model"]
    assert np.isfinite(row[OF_MEANS].to_numpy(float)).all()
    assert row[["energy", "log_density"]].isna().all()


def test_a_fit_without_a_density_has_none(part: Split) -> None:
    fitted = pb.fit(pb.node(part.train, 2), part.train, epochs=1, objective="paths", progress=False)
    row = pb.evaluate(fitted, part, baselines=(), **SHORT).overall.loc["model"]
    assert np.isnan(row["log_density"])
    assert np.isfinite(row[["error", "energy"]].to_numpy(float)).all()


def test_a_batch_that_the_fit_never_saw(small: pb.Screen) -> None:
    screen = pb.simulate(n_cells=600, n_genes=8, n_perturbations=3, n_batches=3, seed=4).screen
    split = hold_out_batches(screen, screen.batches[-1], keep_control=False)
    fitted = pb.fit(pb.node(split.train, 2), split.train, epochs=2, progress=False)
    row = pb.evaluate(fitted, split, baselines=(), **SHORT).overall.loc["model"]
    assert np.isfinite(row[["error", "coverage90", "energy"]].to_numpy(float)).all()
    assert np.isnan(row["log_density"])
    with pytest.raises(ValueError, match=r"trained on 6 tested pairs of condition and batch .*in batch 'batch1'"):
        pb.evaluate(fitted, replace_batch(split, "batch1"), split.train, baselines=(), **SHORT)


def replace_batch(split: Split, name: str) -> pb.Screen:
    """Return the test cells as if they were of another batch."""
    return replace(split.test, batches=(name,))


def test_conditions_of_few_cells_are_scored_apart(part: Split) -> None:
    test = part.test
    first = test.cells_of(test.conditions[0])
    thinned = test[np.setdiff1d(np.arange(test.n_cells), first[9:])]
    prediction = pb.baselines.last_time(part.train, part.held_out)
    found = pb.evaluate(prediction, thinned, part.train, baselines=CHEAP)
    name, error = str(test.conditions[0]), found.conditions.loc["model", "error"]
    assert found.conditions["few"].groupby("condition").all()[name]
    assert np.isfinite(error[name])
    assert found.overall.loc["model", "error"] == pytest.approx(error.drop(name).mean())
    assert f"Fewer than 10 cells, scored apart and in no number above: {name}." in found.report()
    with pytest.raises(ValueError, match="All 1 tested conditions have fewer than 10 cells"):
        pb.evaluate(prediction, test[first[:9]], part.train)


def test_baselines_that_cannot_predict_are_left_out_with_their_reason(small: pb.Screen) -> None:
    split = hold_out_perturbations(small, small.perturbations[:2])
    found = pb.evaluate(truth(split), split)
    assert {"last time", "shrunk offset"} <= set(found.left_out)
    assert "perturbation mean" in found.overall.index
    lines = [line for line in found.report().splitlines() if line.startswith("Left out, ") and line.endswith(found.left_out["last time"])]
    assert len(lines) == 1
    assert "last time" in lines[0]


def test_one_training_perturbation_is_enough_for_the_mean_but_not_to_discriminate(small: pb.Screen) -> None:
    kept = [k for k, p in enumerate(small.conditions) if p.perturbation in ("control", *small.perturbations[:2])]
    split = hold_out_perturbations(small[np.isin(small.condition, kept)], small.perturbations[0])
    found = pb.evaluate(pb.baselines.perturbation_mean(split.train, split.held_out), split, baselines=CHEAP)
    assert np.isnan(found.overall.loc["model", "discrimination"])
    assert found.overall.loc["model", "error"] == pytest.approx(found.overall.loc["perturbation mean", "error"])


def test_cells_of_conditions_that_training_showed(small: pb.Screen) -> None:
    split = hold_out_cells(small, 0.4)
    fitted = pb.fit(pb.node(split.train, 2), split.train, epochs=1, progress=False)
    found = pb.evaluate(fitted, split, baselines=(), **SHORT)
    assert len(found.conditions.loc["model"]) == sum(bool(p.perturbations) for p in split.test.conditions)
    with pytest.raises(ValueError, match=r"other cells, but the same answer\..* give the split that hid them"):
        pb.evaluate(fitted, split.test, **SHORT)


def test_leaks_are_refused(fit: pb.Fit, part: Split, small: pb.Screen) -> None:
    with pytest.raises(ValueError, match=r"'model' was trained on \d+ of the 300 test cells, such as"):
        pb.evaluate(fit, part.train[:300], part.test)
    with pytest.raises(ValueError, match=r"cells \(.*\) in both the test and the training screen"):
        pb.evaluate(truth(part), part.test, small)
    split = hold_out_perturbations(small, small.perturbations[3:])
    held = replace(fit, trained_on=fit.trained_on | {"cells": []})
    with pytest.raises(ValueError, match=r"'model' was trained on \d+ tested pairs .*Fit the train part of a split\.$"):
        pb.evaluate(held, split)


def test_control_must_be_there(part: Split) -> None:
    control = [c for c, p in enumerate(part.train.conditions) if not p.perturbations and p.time == 2]
    train = part.train[~np.isin(part.train.condition, control)]
    with pytest.raises(ValueError, match=r"3 tested conditions \(Knockout.*without any control cell in the same media"):
        pb.evaluate(truth(part), part.test, train)
    with pytest.raises(ValueError, match="no perturbed condition: control is what perturbations are compared with"):
        pb.evaluate(truth(part), part.train[part.train.cells_of("control")], part.test)


def test_a_training_screen_is_needed(fit: pb.Fit, part: Split, tmp_path: Path) -> None:
    fit.save(tmp_path)
    loaded = pb.load(tmp_path)
    with pytest.raises(ValueError, match=r"a fit that was loaded no longer holds the screen .* pass train=, or a split as test"):
        pb.evaluate(loaded, part.test)
    with pytest.raises(ValueError, match="predictions do not hold it: pass train="):
        pb.evaluate(truth(part), part.test)
    assert pb.evaluate(loaded, part.test, part.train, baselines=(), **SHORT).overall.loc["model", "error"] > 0


def test_predictions_of_other_names_are_refused(part: Split, fit: pb.Fit) -> None:
    good = truth(part)
    with pytest.raises(ValueError, match=r"'model' lacks 1 tested gene \(G\d+\)\. Did you mean"):
        pb.evaluate(good[:, 1:], part)
    with pytest.raises(ValueError, match=r"'a' lacks 1 tested condition \(Knockout.* Did you mean"):
        pb.evaluate({"a": good[1:]}, part)
    with pytest.raises(ValueError, match=r"'model' names 1 gene \(.*\) more than once"):
        pb.evaluate(xr.concat([good, good[:, :1]], "gene"), part)
    with pytest.raises(ValueError, match=r"'model' predicts NaN or infinity in 1 condition \("):
        pb.evaluate(good.where(good["condition"] != good["condition"][0]), part)
    with pytest.raises(ValueError, match=r"on the scale 'rate'; .*scale='log1p'"):
        pb.evaluate(pb.predict(fit, list(part.held_out), batch="average", n_draws=2, progress=False), part)
    with pytest.raises(ValueError, match=r"'model' has no variable 'mean'"):
        pb.evaluate(good.to_dataset(name="means"), part)
    with pytest.raises(ValueError, match=r"does not name its genes, by which it is aligned"):
        pb.evaluate(good.drop_vars("gene"), part)
    with pytest.raises(ValueError, match=r"has an sd below 0"):
        pb.evaluate(xr.Dataset({"mean": good, "sd": good * 0 - 1}), part)
    with pytest.raises(ValueError, match=r"No predictor to evaluate"):
        pb.evaluate({}, part)
    with pytest.raises(ValueError, match=r"A predictor and a baseline are both called 'control mean'"):
        pb.evaluate({"control mean": good}, part)


def test_screens_that_do_not_fit_are_refused(part: Split, small: pb.Screen, ishikawa: Split) -> None:
    with pytest.raises(ValueError, match="need the same genes in the same order"):
        pb.evaluate(truth(part), part.test, ishikawa.train)
    with pytest.raises(ValueError, match="The test screen holds continuous values"):
        pb.evaluate(truth(part), part.test.pseudobulk(), part.train)
    with pytest.raises(ValueError, match="at_most must be a whole number of at least 2"):
        pb.evaluate(truth(part), part, at_most=1)


@pytest.mark.usefixtures("unchecked")
def test_other_things_than_predictions_are_refused(part: Split) -> None:
    with pytest.raises(
        TypeError, match="'model' is a list: evaluate takes a fit, a list of fits, a gaussian_response, or predictions of means"
    ):
        pb.evaluate([1], part)
    with pytest.raises(TypeError, match=r"baselines= takes functions by name"):
        pb.evaluate(truth(part), part, baselines=["control mean"])
    with pytest.raises(TypeError, match=r"Predictors are named by text"):
        pb.evaluate({1: truth(part)}, part)


def test_the_interval_is_that_of_scipy_and_finds_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=25)
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((theirs.low, theirs.high))
    assert np.isnan(interval(values[:2])).all()
    assert chance(values) == pytest.approx(wilcoxon(values).pvalue)
    assert chance(np.zeros(5)) == 1
    assert np.mean([chance(row) < 0.05 for row in rng.standard_t(2, size=(1000, 12))]) < 0.06
    assert np.mean([interval(row)[1] < 0 for row in rng.normal(size=(2000, 5))]) == pytest.approx(0.025, abs=0.012)


def test_models_of_other_genes_and_intervals_of_observed_means_are_refused(small: pb.Screen, part: Split) -> None:
    turned = pb.gaussian_response(reversed_genes(part.train), ["free"], progress=False)
    with pytest.raises(ValueError, match="'model' was fitted to other genes than are tested: their order differs"):
        pb.evaluate(turned, part, baselines=())
    observed = pb.gaussian_response(part.train, ["free"], progress=False).predict(part.test.conditions, n_cells=20)
    with pytest.raises(ValueError, match="holds intervals of observed means"):
        pb.evaluate(observed, part, baselines=())
    with pytest.raises(ValueError, match="'noise floor' is the name of a row that evaluate adds"):
        pb.evaluate({"noise floor": truth(part)}, part, baselines=())


def test_training_screens_that_show_the_answer_are_refused(small: pb.Screen, part: Split) -> None:
    other = replace(part.test, cells=np.array([f"{c} again" for c in part.test.cells], object))
    with pytest.raises(ValueError, match="'train=' was trained on"):
        pb.evaluate(truth(part), part.test, other, baselines=())
    cells = hold_out_cells(small, 0.2)
    with pytest.raises(ValueError, match=r"was trained on 2\d\d of the 2\d\d test cells"):
        pb.evaluate(pb.gaussian_response(small, ["free"], progress=False), cells, baselines=())


def test_tables_travel_as_json(found: pb.Evaluation) -> None:
    read = json.loads(found.to_json())
    assert read == found.to_dict()
    assert read["overall"]["model"]["error"] == found.overall.loc["model", "error"]
    assert read["overall"]["control cells"]["error"] is None
    assert len(read["conditions"]) == len(found.conditions)
    assert read["paired"]["control mean"]["beats"] in (True, False)


def test_a_response_model_and_an_ensemble_are_predictors(fit: pb.Fit, part: Split) -> None:
    response = pb.gaussian_response(part.train, ["free"], progress=False)
    found = pb.evaluate({"response": response, "twice": [fit, fit], "fit": fit}, part, baselines=(), **SHORT)
    test = part.test
    share = np.array([[np.mean(test.batch[test.condition == c] == b) for b in range(2)] for c in range(len(test.conditions))])
    each = [response.predict(test.conditions, batch=batch)["mean"].values for batch in test.batches]
    mean = share[:, :1] * each[0] + share[:, 1:] * each[1]
    expected = ((mean - truth(part).values) ** 2).mean(1)
    error = found.conditions["error"]
    assert error.loc["response"].to_numpy() == pytest.approx(expected)
    assert error.loc["twice"].to_numpy() == pytest.approx(error.loc["fit"].to_numpy(), rel=0.2)
    assert np.isnan(found.overall.loc["twice", "log_density"])
    assert found.overall.loc["response", "coverage90"] > 0.5


def test_a_response_model_that_saw_the_answer_is_refused(small: pb.Screen, part: Split) -> None:
    with pytest.raises(ValueError, match="'model' was trained on 300 of the 300 test cells"):
        pb.evaluate(pb.gaussian_response(small, ["free"], progress=False), part, baselines=())
    again = replace(small, cells=np.array([f"{c} again" for c in small.cells], object))
    with pytest.raises(ValueError, match="'model' was trained on 6 tested pairs of condition and batch"):
        pb.evaluate(pb.gaussian_response(again, ["free"], progress=False), part, baselines=())


def test_models_of_means_are_refused_where_cells_are_held_out(small: pb.Screen) -> None:
    cells = hold_out_cells(small, 0.2)
    response = pb.gaussian_response(small.pseudobulk(), ["free"], progress=False)
    with pytest.raises(ValueError, match="does not remember the cells behind them"):
        pb.evaluate(response, cells, baselines=())


def test_a_batch_that_a_response_model_never_saw_is_the_average_of_others(small: pb.Screen) -> None:
    split = hold_out_batches(small, small.batches[1], keep_control=False)
    response = pb.gaussian_response(split.train, ["free"], progress=False)
    found = pb.evaluate(response, split, baselines=(), n_draws=20)
    mean = response.predict([p for p in split.test.conditions if p.perturbations])["mean"]
    assert found.overall.loc["model", "error"] == pytest.approx(float(((mean - truth(split)) ** 2).mean()))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_an_sd_that_is_no_sd_is_refused(wrong: float, part: Split) -> None:
    mean = truth(part)
    with pytest.raises(ValueError, match="has an sd below 0, NaN or infinite"):
        pb.evaluate(xr.Dataset({"mean": mean, "sd": mean * 0 + wrong}), part, baselines=())


def test_one_sd_for_all_means_is_understood(part: Split) -> None:
    mean = truth(part)
    one, each = (pb.evaluate(xr.Dataset({"mean": mean, "sd": sd}), part, baselines=()) for sd in (0.5, mean * 0 + 0.5))
    assert one.overall.equals(each.overall)


def test_values_that_are_no_means_of_log_counts_are_refused(part: Split) -> None:
    with pytest.raises(ValueError, match=r"predicts a mean of 1e\+03, which as log"):
        pb.evaluate(truth(part) * 0 + 1000.0, part, baselines=())
    with pytest.raises(TypeError, match="holds values of type bool"):
        pb.evaluate(truth(part) > 1, part, baselines=())
    with pytest.raises(ValueError, match="The training screen holds continuous values"):
        pb.evaluate(truth(part), part.test, part.train.pseudobulk(), baselines=())


def test_the_report_says_a_reason_once_and_what_more_draws_would_tell(fit: pb.Fit, part: Split) -> None:
    def lacking(train: pb.Screen, asked: object) -> xr.DataArray:
        raise ValueError("no history")

    words = pb.evaluate(fit, part, baselines={"a": lacking, "b": lacking}, n_draws=5, particles=2, at_most=20, progress=False).report()
    assert "Left out, a, b: no history" in words
    assert "raise n_draws" in words
    assert "nan" not in words


@pytest.mark.usefixtures("unchecked")
def test_a_baseline_is_a_function(part: Split) -> None:
    with pytest.raises(TypeError, match="The baseline 'x' must be a function"):
        pb.evaluate(truth(part), part, baselines={"x": None})
