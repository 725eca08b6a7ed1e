"""Predictions of held-out conditions, scored honestly: beside every simple baseline and the noise floor, with words."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy import stats

from perturbprob.experiment.settings import check_seed, check_whole
from perturbprob.inference.draws import check_draws
from perturbprob.inference.fit import Fit
from perturbprob.studies import cell_scores
from perturbprob.studies.evaluation_words import report
from perturbprob.studies.held_out_means import FEW, Means
from perturbprob.studies.mean_baselines import MEAN_BASELINES
from perturbprob.studies.mean_scores import INTERVAL_SCORES, MEAN_SCORES, Scores, overall_mean, score_intervals, score_means
from perturbprob.studies.predictors import Predictor, named, predicted
from perturbprob.studies.trial import Trial

if TYPE_CHECKING:
    from perturbprob.experiment.action import Protocol
    from perturbprob.experiment.screen import Screen
    from perturbprob.experiment.split import Split

Baselines = Mapping[str, Callable[["Screen", "Sequence[Protocol]"], xr.DataArray]]

FLOOR = "noise floor"
CONTROL = "control cells"
SCORES = ("error", "error_over_floor", *MEAN_SCORES[1:], *INTERVAL_SCORES, *cell_scores.DISTANCES, "log_density")


@final
@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """How near predictions came, beside baselines and the noise floor; what `evaluate` returns, where the scores are explained.

    - ``conditions``: the scores of each (predictor, condition), with ``n_cells`` and whether these are ``few``, under 10.
    - ``overall``: their means over conditions that are not few and have a value, the smallest error first. ``error_over_floor`` is the
      mean error over the mean floor.
    - ``paired``: of the ``model``, the first predictor, against each other prediction of means: ``difference`` in error (model − other,
      below 0 where the model is better), mean over conditions, with the central 95 % ``lower`` and ``upper`` by Student's t over
      conditions (NaN of fewer than three); ``share_better``, the share of conditions where the model is better; ``p`` of Wilcoxon's
      signed-rank test; ``beats``, p < 0.05 and better on average and in most conditions. Below six conditions nothing can be beaten.
    - ``left_out``: why a baseline, or a score of a predictor, is not there.
    """

    model: str
    conditions: pd.DataFrame
    overall: pd.DataFrame
    paired: pd.DataFrame
    left_out: dict[str, str] = field(default_factory=dict)
    n_genes: int = 0

    def report(self) -> str:
        """Say in words what the model beats and what it does not, how sure it was, and what was left out."""
        return report(self)

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """Return all tables as nested dicts of plain values; NaN is None."""
        tables = {"overall": self.overall, "paired": self.paired}
        found: dict[str, Any] = {"model": self.model, "n_genes": self.n_genes, "left_out": dict(self.left_out)}
        found |= {name: {str(row): _plain(values) for row, values in table.to_dict("index").items()} for name, table in tables.items()}
        return found | {"conditions": [_plain(row) for row in self.conditions.reset_index().to_dict("records")]}

    def to_json(self) -> str:
        """Return the same as text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def evaluate(
    predictor: Predictor | Mapping[str, Predictor],
    test: "Split | Screen",
    train: "Screen | None" = None,
    *,
    baselines: "Baselines | Sequence[Any] | None" = None,
    n_draws: int = 100,
    particles: int = 20,
    at_most: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Score predictions of held-out conditions, beside every simple baseline and the noise floor.

    Units are perturbed conditions (p, m, t). Observed is the mean of log(1 + count) over a condition's test cells; control is real cells
    of the same media and time, of the test and training screens, weighted over batches as the condition is. Predicted control is
    never looked at. Main arguments:

    - ``predictor``: a fit; a list of fits that differ in their seed (an ensemble, scored as means); a `gaussian_response`; or predicted
      means, as `predict` with ``scale="log1p"`` and the `baselines` return them: a Dataset with ``mean`` (condition, gene) and, if known,
      ``sd``, the standard deviation of that mean (or ``lower`` and ``upper`` of `predict`), or a DataArray with the coordinate ``sd``. Or
      several of these by name, the first of which is what the words are about. Predictions are aligned by name. Values that a fit of
      continuous values predicts are taken for means of log(1 + count).
    - ``test``: a split, or a screen, beside which ``train`` is the training screen (by default the one that the fit still holds).
    - ``baselines``: functions of a training screen and conditions by name, instead of `baselines.MEAN_BASELINES`; () for none.
    - ``n_draws`` of predicted means, ``particles`` of `log_density`, ``at_most`` so many cells of a condition for distances.

    Scores, by column, the further equations at `perturbprob.studies.metrics` and `perturbprob.studies.distribution_metrics`:

    - ``error``: mean over genes of (predicted − observed)²; ``error_over_floor``, over that of the noise floor. ``weighted_error``
      weighs genes by how surely they differ from the other perturbations (`rest_weights`).
    - ``direction_control``, ``direction_mean``: Pearson's correlation over genes of predicted and observed change from control, and from
      the mean of the other perturbed conditions, trained on or tested, of the same media and time.
    - ``discrimination``: share of the other tested conditions of the same media and time that the prediction is further from.
    - ``de_overlap``, ``de_sign``: of the genes that differ between observed cells and control, the share among as many of largest predicted
      change, in standard errors of the observed one, and the share predicted in the right direction. Edited genes are left out of these
      three and of weights.
    - ``coverage50``, ``coverage80``, ``coverage90``, ``crps``: intervals and draws of the observed mean, Normal(0, V_g / n) added to the
      predicted one for the noise of n cells, V the variance between training cells of one condition. Means without an sd claim to be sure.
    - ``energy``, ``mmd``, ``sinkhorn``: distances of cells replicated from rest by a fit, in the test cells' own batches and at their
      size factors, from those observed.
    - ``log_density``: of a fit by the ELBO, mean over the cells of a condition, per count, in nats.

    A fit predicts cells in their own batch; a batch that it never saw as a new one, or with η = 0 for replicated cells (no
    log density). Beside predictors and baselines stand "noise floor" (``error`` and ``weighted_error`` are variance / n, what the truth
    would score; other scores take one half of a condition's cells for the prediction of the other), and beside fits "control cells"
    (distances of real control cells) and two negative binomials that know no model (log densities).

    Baselines know a condition and not its batch: where a media and time is in several batches, part of what a model gains over them is
    that it does. Raises ValueError for a fit that was trained on a test cell, or on a tested condition in a tested batch (unless the
    split is one of cells), for a training screen that shows these, for a condition without control cells, for predictions that lack a gene
    or condition or are NaN, and where all conditions have fewer than 10 cells.

    >>> import perturbprob as pb
    >>> screen = pb.datasets.ishikawa2023()
    >>> part = pb.split.hold_out_time(screen, 5, screen.perturbations[::2])
    >>> found = pb.evaluate(pb.baselines.shrunk_offset(part.train, part.held_out), part)
    >>> found.overall.index[:2].tolist()
    ['noise floor', 'hierarchical Gaussian']
    """
    check_draws(n_draws)
    check_draws(particles, "particles")
    check_whole(2, at_most=at_most)
    check_seed(seed)
    predictors = named(predictor)
    if taken := [name for name in predictors if name in (FLOOR, CONTROL, *cell_scores.DENSITIES)]:
        raise ValueError(f"{taken[0]!r} is the name of a row that evaluate adds for comparison: call the predictor otherwise.")
    trial = Trial.of(predictors, test, train)
    scoring = _Scoring(trial.means, trial.train, n_draws, particles, at_most, seed, progress)
    left_out: dict[str, str] = {}
    rows = {name: scoring.of_predictor(name, one) for name, one in predictors.items()}
    for name, baseline in _baselines(baselines, rows).items():
        try:
            table = baseline(trial.train, list(trial.means.test.conditions))
        except ValueError as error:
            left_out[name] = str(error)
            continue
        rows[name] = scoring.of_predictor(name, table)
    compared = [name for name in rows if name != next(iter(predictors))]
    rows |= scoring.beside(any(isinstance(one, Fit) for one in predictors.values()))
    conditions = _table(trial.means, rows)
    return Evaluation(
        model=(model := next(iter(predictors))),
        conditions=conditions,
        overall=_overall(conditions, list(rows)),
        paired=_paired(conditions, model, compared),
        left_out=left_out,
        n_genes=trial.means.test.n_genes,
    )


def _baselines(given: "Baselines | Sequence[Any] | None", rows: dict[str, Scores]) -> Baselines:
    """Return the baselines by name; refuse a name that is taken."""
    baselines: Baselines = MEAN_BASELINES if given is None else given if isinstance(given, Mapping) else {}
    if given is not None and not isinstance(given, Mapping) and len(given):
        raise TypeError("baselines= takes functions by name, as in {'mean': pb.baselines.perturbation_mean}, or () for none.")
    if wrong := [name for name, one in baselines.items() if not callable(one)]:
        raise TypeError(f"The baseline {wrong[0]!r} must be a function of a training screen and conditions.")
    if taken := [name for name in baselines if name in rows]:
        raise ValueError(f"A predictor and a baseline are both called {taken[0]!r}: rename the predictor.")
    return baselines


@dataclass(frozen=True, eq=False)
class _Scoring:
    """What every predictor is scored by."""

    means: Means
    train: "Screen"
    n_draws: int
    particles: int
    at_most: int
    seed: int
    progress: bool

    def of_predictor(self, name: str, predictor: Predictor) -> Scores:
        """Return all scores of a fit, or those of means of a table."""
        means, seed = self.means, self.seed
        found = predicted(name, predictor, means, n_draws=self.n_draws, seed=seed, progress=self.progress)
        scores = score_means(means, found.mean) | score_intervals(means, found.draws, seed)
        if not isinstance(predictor, Fit) or predictor.model.start is not None:
            return scores
        scores |= cell_scores.fit_distances(means, predictor, self.at_most, seed, progress=self.progress)
        density = cell_scores.fit_log_density(means, predictor, particles=self.particles, seed=seed, progress=self.progress)
        return scores | {"log_density": density}

    def beside(self, cells: bool) -> dict[str, Scores]:
        """Return the rows that are no prediction of means: the noise floor and, beside fits, control cells and densities."""
        means, (half, other, halves) = self.means, self.means.halved(self.seed)
        floor = {**score_means(half, other), "error": means.noise.mean(1)}
        floor["weighted_error"] = (means.weights * np.where(means.weights == 0, 0, means.noise)).sum(1)
        if not cells:
            return {FLOOR: floor}
        found = {FLOOR: floor | cell_scores.half_distances(means, halves, self.at_most, self.seed)}
        found[CONTROL] = cell_scores.control_distances(means, self.at_most, self.seed)
        return found | {name: {"log_density": cell_scores.baseline_log_density(means, self.train, name)} for name in cell_scores.DENSITIES}


def _table(means: Means, rows: dict[str, Scores]) -> pd.DataFrame:
    """Put the scores of perturbed conditions into one table."""
    names, kept = [str(p) for p, edited in zip(means.test.conditions, means.perturbed, strict=True) if edited], means.perturbed
    floor = rows[FLOOR]["error"][kept]
    parts = []
    for name, scores in rows.items():
        part = pd.DataFrame({score: values[kept] for score, values in scores.items()}).reindex(columns=list(SCORES))
        part["error_over_floor"] = part["error"] / np.where(floor > 0, floor, np.nan)
        part.insert(0, "n_cells", means.n[kept])
        part.insert(1, "few", means.n[kept] < FEW)
        part.index = pd.MultiIndex.from_product([[name], names], names=["predictor", "condition"])
        parts.append(part)
    return pd.concat(parts)


def _overall(conditions: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Return means over conditions with enough cells."""
    enough = conditions[~conditions["few"]]
    found = pd.DataFrame(
        [[overall_mean(enough.loc[name, score].to_numpy(float)) for score in SCORES] for name in order],
        index=pd.Index(order, name="predictor"),
        columns=list(SCORES),
    )
    floor = found.loc[FLOOR, "error"]
    found["error_over_floor"] = found["error"] / (floor if floor > 0 else np.nan)
    return found.sort_values("error", kind="stable", na_position="last")


def _paired(conditions: pd.DataFrame, model: str, others: list[str]) -> pd.DataFrame:
    """Return the difference in error of the model from each other, paired over conditions."""
    enough = conditions.loc[~conditions["few"], "error"]
    rows = []
    for name in others:
        difference = (enough[model] - enough[name]).to_numpy(float)
        lower, upper = interval(difference)
        share = float(((difference < 0) + 0.5 * (difference == 0)).mean()) if len(difference) else np.nan
        p = chance(difference)
        rows.append([overall_mean(difference), lower, upper, share, p, bool(p < 0.05 and difference.mean() < 0 and share > 0.5)])
    columns = ["difference", "lower", "upper", "share_better", "p", "beats"]
    found = pd.DataFrame(rows, index=pd.Index(others, name="predictor", dtype=object), columns=columns)
    return found.astype(dict.fromkeys(columns[:-1], float) | {"beats": bool})


def chance(values: Float[np.ndarray, " condition"]) -> float:
    """Return Wilcoxon's signed-rank p, two-sided, of differences that are symmetric about 0; 1 where all are 0, or none is given.

    A few hard conditions carry most of an error, so that its mean differs by much more in some than in others: ranks do not mind.

    >>> chance(np.array([-1.0, -2.0, -3.0, -4.0, -5.0]))
    0.0625
    """
    told = values[values != 0]
    return float(stats.wilcoxon(told).pvalue) if len(told) else 1.0


def interval(values: Float[np.ndarray, " condition"]) -> tuple[float, float]:
    """Return the central 95 % interval of a mean over conditions by Student's t; NaN of fewer than three, which cannot tell.

    A bootstrap of a handful of conditions finds a difference where there is none in up to a quarter of trials.

    >>> interval(np.array([-1.0, -1.0, -1.0]))
    (-1.0, -1.0)
    """
    n = len(values)
    if n < 3:
        return np.nan, np.nan
    reach = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return float(values.mean()) - reach, float(values.mean()) + reach


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return values that JSON knows."""

    def plain(value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {str(name): plain(value) for name, value in row.items()}
