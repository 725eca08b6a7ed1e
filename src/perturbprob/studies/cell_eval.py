"""The pair of AnnData that the package cell-eval (Arc Institute, 2025) reads: predicted cells, and real ones."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float
from scipy.sparse import csr_array, csr_matrix, vstack

from perturbprob.experiment.settings import check_seed
from perturbprob.inference.fit import Fit
from perturbprob.studies.cell_scores import control_beside, replicates
from perturbprob.studies.predictors import Predictor, named
from perturbprob.studies.predictors import predicted as predicted_means
from perturbprob.studies.trial import Trial

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.experiment.split import Split
    from perturbprob.studies.held_out_means import Means

CONTROL = "non-targeting"
COLUMN = "target"


def to_cell_eval(
    predictor: Predictor, test: "Split | Screen", train: "Screen | None" = None, *, seed: int = 0, progress: bool = True
) -> tuple[AnnData, AnnData]:
    """Return predicted and real cells as cell-eval reads them, an outside check of `evaluate`: ``MetricsEvaluator(*pair)``.

    X is log(1 + count), not normalised by depth, as `evaluate` scores it. ``obs["target"]`` names the perturbation, and control
    "non-targeting", which are what cell-eval looks for by default; a single edited gene has the name of its column, so that cell-eval can
    leave it out. Real are the perturbed test cells. In both stand the same real control cells, of the test and training screens: what
    a model predicts for control is not looked at. cell-eval holds all against one control, not weighted over batches, so that a test of
    several media or times is refused.

    A fit predicts one cell for each test cell, of its batch and size factor, replicated from rest. Of predicted means cells have to be
    made, as many as were tested: real control cells, drawn at random, to which counts are added or from which they are taken away, one at
    a time in cells at random, until their mean of log(1 + count) is the predicted one; what is less than a count is left to one cell. So
    means are exact, numbers stay counts, with the ties that rank tests rest on, and the spread is about that of control. A mean below 0
    is taken for 0.

    Raises ValueError as `evaluate` does.

    >>> import perturbprob as pb
    >>> screen = pb.datasets.ishikawa2023()
    >>> part = pb.split.hold_out_time(screen, 5, ["NANOG", "SOX2"])
    >>> predicted, real = pb.to_cell_eval(pb.baselines.last_time(part.train, part.held_out), part)
    >>> real.obs["target"].value_counts().to_dict()
    {'non-targeting': 364, 'NANOG': 284, 'SOX2': 95}
    """
    check_seed(seed)
    predictors = named(predictor)
    if len(predictors) > 1:
        raise ValueError(f"cell-eval compares one predictor with real cells; got {len(predictors)}: call to_cell_eval for each.")
    means = Trial.of(predictors, test, train).means
    if len({p.unperturbed() for p in means.test.conditions}) > 1:
        raise ValueError(
            f"The test has {len(means.test.media)} media and {len(means.test.times)} times, and cell-eval holds all cells against "
            "one control: give a screen of test cells of one media and time, and train=."
        )
    name, one = next(iter(predictors.items()))
    control = control_beside(means, means.test.conditions[0], set())
    predicted = _of_fit(one, means, seed, progress=progress) if isinstance(one, Fit) else _of_table(name, one, means, control, seed)
    return _stacked(means, predicted, control), _stacked(means, means.test.counts.astype(np.float64).log1p(), control)


def _of_fit(fit: Fit, means: "Means", seed: int, *, progress: bool) -> csr_array:
    """Return log(1 + count) of a replicate of each test cell."""
    if fit.model.start is not None:
        raise ValueError("A fit of continuous values has no cells with counts: give its predicted means.")
    return csr_array(np.log1p(replicates(fit, means.test, seed=seed, progress=progress).astype(np.float64)))


def _of_table(name: str, table: Predictor, means: "Means", control: csr_array, seed: int) -> csr_array:
    """Return log(1 + count) of cells made to have the predicted means, one for each test cell."""
    test, rng = means.test, np.random.default_rng([seed, 5])
    wanted = predicted_means(name, table, means, n_draws=20, seed=seed).mean
    found, known = np.empty((test.n_cells, test.n_genes)), np.rint(np.expm1(control.toarray()))
    for k, mean in enumerate(wanted):
        rows = np.flatnonzero(test.condition == k)
        drawn = rng.permutation(np.resize(rng.permutation(len(known)), len(rows)))
        found[rows] = np.stack([with_mean(known[drawn, g], m, rng) for g, m in enumerate(mean)], 1)
    return csr_array(found)


def with_mean(counts: Float[np.ndarray, " cell"], mean: float, rng: np.random.Generator) -> Float[np.ndarray, " cell"]:
    """Return log(1 + count) of cells whose counts were changed one at a time, in cells at random, until their mean is the given one.

    >>> (with_mean(np.array([0.0, 0.0, 0.0]), np.log(2), np.random.default_rng(0)) / np.log(2)).round(6)
    array([1., 1., 1.])
    """
    counts, missing = counts.copy(), len(counts) * max(mean, 0.0) - np.log1p(counts).sum()
    step = np.sign(missing)
    while abs(missing) > 1e-9:
        cells = rng.permutation(np.flatnonzero(counts + step >= 0))
        change = np.log1p(counts[cells] + step) - np.log1p(counts[cells])
        n = int((np.abs(change.cumsum()) <= abs(missing)).cumprod().sum())
        counts[cells[:n]] += step
        missing -= change[:n].sum()
        if n < len(cells):  # the next whole count would be too much
            values = np.log1p(counts)
            values[cells[n]] += missing
            return values
    return np.log1p(counts)


def _stacked(means: "Means", cells: csr_array, control: csr_array) -> AnnData:
    """Put perturbed and control cells into one AnnData."""
    test = means.test
    of = np.array([p.perturbation for p in test.conditions], object)[test.condition]
    names = [*map(str, test.cells), *(f"{CONTROL} {k}" for k in range(control.shape[0]))]
    obs = pd.DataFrame({COLUMN: pd.Categorical([*of, *[CONTROL] * control.shape[0]])}, index=pd.Index(names, dtype=object))
    values = csr_matrix(vstack([cells, control]))
    return AnnData(values, obs=obs, var=pd.DataFrame(index=pd.Index(list(test.genes), dtype=object)))
