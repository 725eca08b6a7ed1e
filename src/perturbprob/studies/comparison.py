"""Several fits on one score sheet: the same cells, the same questions, paired."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbprob.experiment.screen import require_screen
from perturbprob.inference.density import log_density
from perturbprob.inference.draws import require_fit
from perturbprob.studies.cell_scores import DISTANCES, fit_distances
from perturbprob.studies.held_out_means import Means
from perturbprob.studies.mean_scores import overall_mean, score_intervals, score_means
from perturbprob.studies.predictive_check import predictive_check
from perturbprob.studies.predictors import predicted
from perturbprob.studies.trial import refuse_trained_cells

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit

AT_MOST = 200
"""Of how many cells of a condition distances are taken."""
COLUMNS = {"direction_control": "direction"}
SCORES = ("error", "weighted_error", "direction", "direction_mean", "discrimination", "de_overlap", "de_sign")
SPREADS = (*DISTANCES, "crps", "coverage50", "coverage80")


def compare(
    fits: Mapping[str, "Fit"],
    test: "Screen",
    *,
    particles: int = 100,
    n_draws: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Return a table of fits, the best first, scored on the cells of a test screen; like ArviZ's compare, on held-out cells.

    - ``log_density``: `log_density`, mean over cells, per count (of RNA and of further assays), in nats; rows are in its order.
    - ``difference``, ``standard_error``: how far below the best, and of that difference. Cells of one condition share its prediction,
      so conditions are what is drawn at random where there are at least two: the error is that of a ratio of sums over conditions.
    - ``conditions_better``: the share of conditions whose cells it gives more density than the best does.
    - ``error``: mean square over conditions and genes of predicted minus observed mean of log(1 + count), cells in their own batch;
      NaN for continuous values, as are the next columns up to ``coverage80``.
    - ``direction``: mean over perturbed conditions of the correlation over genes of predicted and observed change of that mean from control
      cells of the same media and time, in the same batches where there are any, of the test screen and the screens trained on. Both
      sides have the noise of these cells, so that few of them make it too large. ``discrimination``: mean over perturbed conditions of the
      share of the others of the same media and time that the prediction is further from, edited genes left out; 0.5 by chance.
      Both are NaN where there is nothing to compare with (`perturbprob.studies.metrics`).
    - ``weighted_error``, ``direction_mean``, ``de_overlap``, ``de_sign``, ``energy``, ``mmd``, ``sinkhorn``, ``crps``, ``coverage50``,
      ``coverage80``: the scores of `evaluate`, mean over perturbed conditions (of the last three, over all) that have a value.
    - ``coverage``: the share of conditions and genes whose observed mean lies inside the central 90 % of screens replicated from rest.
    - ``parameters``: numbers trained, of model and guide; ``seconds``: how long that took.

    A fit of `stationary` has no likelihood: ``log_density`` and what is derived from it are NaN, its row is last, and a warning says so.

    Raises ValueError for fewer than two fits, for fits of different genes, and for a test cell that a fit was trained on: a fit that saw
    the answer cannot be compared. A fit by ``objective="paths"`` of counts has no density, and is refused too.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=10, n_perturbations=2, seed=1).screen
    >>> train, test = pb.split.hold_out_cells(screen, 0.2)
    >>> fits = {"node": pb.fit(pb.node(train, 2), train, epochs=2, progress=False),
    ...         "vae": pb.fit(pb.vae(train, 2), train, epochs=2, progress=False)}
    >>> pb.compare(fits, test, particles=5, n_draws=2, progress=False).columns[:3].tolist()
    ['log_density', 'difference', 'standard_error']
    """
    _check(fits, test)
    how: dict[str, Any] = {"n_draws": n_draws, "seed": seed, "progress": progress}
    means = Means.of(test, [fit.screen for fit in fits.values() if fit.screen is not None])
    density = {name: _density(fit, test, particles, how) for name, fit in fits.items()}
    order = sorted(density, key=lambda name: (np.isnan(density[name]).all(), -density[name].mean()))
    rows = []
    for name in order:
        fit, behind = fits[name], density[name] - density[order[0]]
        check = predictive_check(fit, test, **how).condition["tail_probability"].sel(statistic="mean")
        rows.append(
            {
                "log_density": density[name].mean(),
                "difference": behind.mean(),
                "standard_error": _standard_error(behind, test.condition),
                "conditions_better": float(np.heaviside(_sums(behind, test.condition), 0).mean()),
                **_scores(means, fit, how),
                "coverage": float(((check >= 0.05) & (check <= 0.95)).mean()),
                "parameters": sum(p.numel() for module in (fit.model, fit.guide) for p in module.parameters()),
                "seconds": fit.seconds,
            }
        )
    return pd.DataFrame(rows, index=pd.Index(order, name="fit"))


def _scores(means: Means, fit: "Fit", how: dict[str, Any]) -> dict[str, float]:
    """Return the scores of `evaluate`, mean over conditions."""
    if means.test.values != "counts":
        return dict.fromkeys((*SCORES, *SPREADS), np.nan)
    means_of = predicted("fit", fit, means, **how)
    found = score_means(means, means_of.mean) | score_intervals(means, means_of.draws, how["seed"])
    found |= fit_distances(means, fit, AT_MOST, how["seed"], progress=how["progress"])
    found = {COLUMNS.get(name, name): value for name, value in found.items()}
    return {name: overall_mean(found[name]) for name in (*SCORES, *SPREADS)}


def _density(fit: "Fit", test: "Screen", particles: int, how: dict[str, Any]) -> Float[np.ndarray, " cell"]:
    """Return the log density of each cell, per count; NaN where the structure has no likelihood."""
    if fit.settings["objective"] == "kds":
        return np.full(test.n_cells, np.nan)
    n_seen = test.n_genes + sum(len(assay.features) for assay in test.assays.values())
    return log_density(fit, test, particles, **how).values / n_seen


def _check(fits: Mapping[str, "Fit"], test: "Screen") -> None:
    """Refuse what cannot be compared."""
    require_screen(test)
    if not isinstance(fits, Mapping):
        raise TypeError(f"compare takes named fits, as in {{'node': fit1, 'vae': fit2}}; got {type(fits).__name__}.")
    if len(fits) < 2:
        raise ValueError(f"compare needs two fits or more; got {len(fits)}.")
    for name, fit in fits.items():
        require_fit(fit)
        if fit.settings["objective"] == "paths" and fit.model.start is None:
            raise ValueError(f"{name!r} was fitted by objective='paths' and has no density of a cell: compare fits by the ELBO.")
        refuse_trained_cells(name, fit, test)
    if without := [name for name, fit in fits.items() if fit.settings["objective"] == "kds"]:
        warnings.warn(
            f"{', '.join(map(repr, without))} has no likelihood, being fitted by objective='kds': log_density, difference, standard_error "
            "and conditions_better do not apply to it and are NaN.",
            stacklevel=3,
        )


def _sums(values: Float[np.ndarray, " cell"], condition: np.ndarray) -> Float[np.ndarray, " condition"]:
    """Add values up over the cells of each condition."""
    return np.bincount(condition, values)


def _standard_error(values: Float[np.ndarray, " cell"], condition: np.ndarray) -> float:
    """Return the standard error of a mean over cells, conditions being drawn; cells, where there is one condition."""
    left = values - values.mean()
    parts = left if condition.max() == 0 else _sums(left, condition)
    return float(np.sqrt(np.square(parts).sum() * len(parts) / max(1, len(parts) - 1)) / len(values))
