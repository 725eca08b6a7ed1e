"""The pair of AnnData for cell-eval: what is in it, and that cell-eval agrees with our scores where it is installed."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import perturbprob as pb
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.experiment.split import Split, hold_out_time
from perturbprob.studies.cell_eval import with_mean
from perturbprob.studies.metrics import discrimination


@pytest.fixture(scope="module")
def part() -> Split:
    screen = pb.datasets.ishikawa2023()
    return hold_out_time(screen, 5, screen.perturbations[::2])


@pytest.fixture(scope="module")
def means(part: Split) -> xr.DataArray:
    return pb.baselines.shrunk_offset(part.train, part.held_out)


def test_cells_are_counts_of_the_predicted_means(part: Split, means: xr.DataArray) -> None:
    predicted, real = pb.to_cell_eval(means, part)
    assert predicted.obs["target"].equals(real.obs["target"])
    for k, condition in enumerate(part.held_out):
        cells = predicted[predicted.obs["target"] == condition.perturbation].X.toarray()
        np.testing.assert_allclose(cells.mean(0), np.maximum(means.values[k], 0), atol=1e-9)
        counts = np.expm1(cells)
        assert (np.abs(counts - np.rint(counts)) > 1e-6).sum(0).max() <= 1
        assert cells.min() >= 0
    control = predicted.obs["target"] == "non-targeting"
    assert (predicted[control].X != real[control].X).nnz == 0
    assert control.sum() == sum(len(part.train.cells_of(p)) for p in part.train.conditions if not p.perturbations and p.time == 5)


@pytest.mark.parametrize("mean", [-0.1, 0.0, 0.02, 0.6, 3.0])
def test_any_mean_can_be_reached_from_any_counts(mean: float) -> None:
    rng = np.random.default_rng(0)
    for counts in (np.zeros(7), np.array([0.0, 1.0, 30.0]), np.array([5.0])):
        assert with_mean(counts, mean, rng).mean() == pytest.approx(max(mean, 0.0))


def test_a_fit_predicts_cells() -> None:
    screen = pb.simulate(n_cells=400, n_genes=8, n_perturbations=3, times=(1.0, 2.0), n_batches=2, seed=2).screen
    split = hold_out_time(screen, 2, screen.perturbations[:2])
    fit = pb.fit(pb.node(split.train, 2), split.train, epochs=1, progress=False)
    predicted, real = pb.to_cell_eval(fit, split, progress=False)
    assert predicted.shape == real.shape
    assert np.rint(np.expm1(predicted.X.toarray())) == pytest.approx(np.expm1(predicted.X.toarray()))
    again = pb.to_cell_eval(fit, split, progress=False)[0]
    assert (predicted.X != again.X).nnz == 0


@pytest.mark.usefixtures("unchecked")
def test_several_times_or_predictors_are_refused(means: xr.DataArray, part: Split) -> None:
    screen = pb.simulate(n_cells=300, n_genes=8, n_perturbations=3, times=(1.0, 2.0), seed=2).screen
    split = pb.split.hold_out_perturbations(screen, screen.perturbations[:1])
    mean = pb.baselines.control_mean(split.train, split.held_out)
    with pytest.raises(ValueError, match="The test has 1 media and 2 times, and cell-eval holds all cells against one control"):
        pb.to_cell_eval(mean, split)
    with pytest.raises(ValueError, match="cell-eval compares one predictor with real cells; got 2"):
        pb.to_cell_eval({"a": means, "b": means}, part)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_cell_eval_finds_the_same_scores(part: Split, means: xr.DataArray, tmp_path: Path) -> None:
    cell_eval = pytest.importorskip("cell_eval")
    predicted, real = pb.to_cell_eval(means, part)
    judge = cell_eval.MetricsEvaluator(adata_pred=predicted, adata_real=real, num_threads=1, outdir=str(tmp_path))
    whole = {"discrimination_score_l1": {"exclude_target_gene": False}}
    how = {"profile": "full", "write_csv": False, "skip_metrics": ["clustering_agreement"], "metric_configs": whole}
    theirs = judge.compute(**how)[0].to_pandas()
    ours = pb.evaluate(means, part, baselines=()).conditions.loc["model"]
    ours.index = [pb.Protocol.parse(name).perturbation for name in ours.index]
    ours, theirs = ours.sort_index(), theirs.set_index("perturbation").sort_index()
    assert ours["error"].to_numpy() == pytest.approx(theirs["mse"].to_numpy(), abs=1e-8)
    assert ours["direction_control"].to_numpy() == pytest.approx(theirs["pearson_delta"].to_numpy(), abs=1e-6)
    # genes edited in either of two conditions are left out of our column, the one's own of theirs: compared are scores of all genes
    order = [list(part.held_out).index(next(p for p in part.held_out if p.perturbation == name)) for name in theirs.index]
    truth = pseudobulk(part.test)["mean"].sel(condition=[str(p) for p in part.held_out]).values[order]
    further = (1 - discrimination(means.values[order], truth)) * (len(order) - 1)
    assert further == pytest.approx((1 - theirs["discrimination_score_l1"].to_numpy()) * len(order))
