"""What predictors say of the means of conditions: fits and predictions read into one form, names checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import scipy.stats
import xarray as xr
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from perturbprob.experiment.moments import membership
from perturbprob.experiment.reading import some
from perturbprob.experiment.vocabulary import nearest
from perturbprob.inference.fit import Fit
from perturbprob.inference.predict import drawn_means, ensemble_shares, members
from perturbprob.response import GaussianResponse

if TYPE_CHECKING:
    from perturbprob.experiment.action import Protocol
    from perturbprob.studies.held_out_means import Means

Predictor = Fit | Sequence[Fit] | GaussianResponse | xr.Dataset | xr.DataArray


HIGHEST = 12.0
"""The highest mean of log(1 + count) that is believed: 160,000 counts of one gene in a cell."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A predicted mean of log(1 + count) and draws of it, which tell how sure it is."""

    mean: Float[np.ndarray, "condition gene"]
    draws: Float[np.ndarray, "draw condition gene"]


def named(predictor: Predictor | Mapping[str, Predictor]) -> dict[str, Predictor]:
    """Return predictors by name; a single one is called "model"."""
    several = isinstance(predictor, Mapping) and not isinstance(predictor, xr.Dataset)
    found: dict[Any, Any] = dict(cast("Mapping[str, Predictor]", predictor)) if several else {"model": predictor}
    if not found:
        raise ValueError("No predictor to evaluate: give a fit, or predictions of means.")
    for name, one in found.items():
        if not isinstance(name, str):
            raise TypeError(f"Predictors are named by text, as in {{'node': fit}}; got the name {name!r}.")
        if not isinstance(one, Fit | GaussianResponse | xr.Dataset | xr.DataArray) and not fits_of(one):
            raise TypeError(
                f"{name!r} is a {type(one).__name__}: evaluate takes a fit, a list of fits, a gaussian_response, or predictions of "
                "means such as predict(fit, conditions, scale='log1p') or a baseline returns."
            )
    return found


def fits_of(predictor: Predictor) -> list[Fit]:
    """Return the fits that a predictor consists of: itself, or the members of an ensemble."""
    several: list[Any] = list(predictor) if isinstance(predictor, list | tuple) else [predictor]
    return several if all(isinstance(one, Fit) for one in several) else []


def predicted(name: str, predictor: Predictor, means: "Means", *, n_draws: int, seed: int, progress: bool = False) -> Prediction:
    """Return the predicted means of tested conditions, cells in their own batch, with draws of them."""
    if fits := fits_of(predictor):
        _check_genes(name, fits[0].model.vocabulary.genes, means)
        return _from_fits(members(fits, n_draws), means, n_draws=n_draws, seed=seed, progress=progress)
    if isinstance(predictor, GaussianResponse):
        _check_genes(name, predictor.rows.screen.genes, means)
        return _from_response(predictor, means, n_draws, seed)
    table = cast("xr.Dataset | xr.DataArray", predictor)
    return from_table(name, table, means.test.genes, means.test.conditions, n_draws=n_draws, seed=seed)


def _from_fits(fits: Sequence[Fit], means: "Means", *, n_draws: int, seed: int, progress: bool) -> Prediction:
    """Predict each condition by fits that share the draws: draws of the mean, weighted over the batches that the condition is in.

    A batch that the fits never saw is one more of their law of batches; where they have seen one batch only, η is taken as 0.
    """
    condition, batch, weight = _pairs(means)
    batches, protocols = [batch_of(fits[0], means.test.batches[b]) for b in batch], [means.test.conditions[c] for c in condition]
    scale, draws = "log1p" if fits[0].model.start is None else "value", []
    for k, (fit, n) in enumerate(zip(fits, ensemble_shares(len(fits), n_draws), strict=True)):
        found = drawn_means(fit, protocols, batches, scale, n_draws=n, seed=seed + k, progress=progress)
        draws += [weight @ each.numpy().astype(np.float64) for each in found]
    return Prediction(np.mean(draws, 0), np.stack(draws))


def _from_response(response: GaussianResponse, means: "Means", n_draws: int, seed: int) -> Prediction:
    """Predict each condition in each of its batches; what is not known of a condition is taken to be the same in all of them."""
    condition, batch, weight = _pairs(means)
    protocols, names = [means.test.conditions[c] for c in condition], [means.test.batches[b] for b in batch]
    known = set(response.rows.groups)
    batches = [b if (p.unperturbed(), b) in known else None for p, b in zip(protocols, names, strict=True)]
    found = response.predict(protocols, batch=batches)
    mean, sd = (weight @ found[name].values for name in ("mean", "sd"))
    return Prediction(mean, mean + sd * np.random.default_rng([seed, 2]).standard_normal((n_draws, *sd.shape)))


def _check_genes(name: str, genes: Sequence[str], means: "Means") -> None:
    """Refuse a model of other genes, or of the same in another order: its answers would be held against the wrong ones."""
    if tuple(genes) != tuple(means.test.genes):
        differ = len(set(genes) ^ set(means.test.genes))
        what = f"{differ} genes are in one of the two only" if differ else "their order differs"
        raise ValueError(
            f"{name!r} was fitted to other genes than are tested: {what}. Cut train and test from one screen, as a split does."
        )


def _pairs(means: "Means") -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"], csr_array]:
    """Return the tested pairs of condition and batch, and the matrix (condition, pair) that averages over a condition's cells."""
    condition, batch = np.nonzero(means.cells)
    share = means.cells[condition, batch] / means.n[condition]
    return condition, batch, csr_array(membership(condition, len(means.cells)).multiply(share))


def batch_of(fit: Fit, batch: str) -> str | None:
    """Return what `predict` calls a batch: its name, "new" where the fit never saw it, None where it cannot tell batches apart."""
    if batch in fit.model.vocabulary.batches:
        return batch
    return "new" if fit.model.batch_effect.n_batches > 1 else None


def from_table(
    name: str, table: xr.Dataset | xr.DataArray, genes: Sequence[str], conditions: "Sequence[Protocol]", *, n_draws: int, seed: int
) -> Prediction:
    """Read predictions, aligned by name of condition and gene; what is lacking, doubled, NaN or on another scale is refused."""
    mean, sd = _columns(name, table)
    wanted = {"condition": list(map(str, conditions)), "gene": list(genes)}
    parts = [_aligned(name, part, wanted) for part in (mean, sd)]
    if not np.isfinite(parts[0]).all():
        lacking = [wanted["condition"][k] for k in np.flatnonzero(~np.isfinite(parts[0]).all(1))]
        raise ValueError(f"{name!r} predicts NaN or infinity in {some(lacking, 'condition')}: every gene needs a number.")
    if (parts[0] > HIGHEST).any():
        raise ValueError(
            f"{name!r} predicts a mean of {parts[0].max():.3g}, which as log(1 + count) is more than {np.expm1(HIGHEST):.0e} counts: give "
            "means of log(1 + count)."
        )
    untold = np.isnan(parts[1]).all() and isinstance(table, xr.Dataset) and "sd" not in table  # predict of a fit that has no posterior
    spread = np.zeros_like(parts[1]) if untold else parts[1]
    if not ((spread >= 0) & np.isfinite(spread)).all():
        raise ValueError(
            f"{name!r} has an sd below 0, NaN or infinite: give the standard deviation of each predicted mean, or none at all."
        )
    draws = parts[0] + spread * np.random.default_rng([seed, 2]).standard_normal((n_draws, *spread.shape))
    return Prediction(parts[0], draws)


def _columns(name: str, table: xr.Dataset | xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Return mean and sd; an sd that is not given is read from the interval of `predict`, and is 0 without one."""
    if isinstance(table, xr.Dataset) and "mean" not in table:
        raise ValueError(f"{name!r} has no variable 'mean'. {nearest('mean', map(str, table.data_vars))}")
    mean = table["mean"] if isinstance(table, xr.Dataset) else table
    if mean.dtype.kind not in "fiu":
        raise TypeError(f"{name!r} holds values of type {mean.dtype}; means of log(1 + count) are numbers.")
    scale = table.attrs.get("scale", mean.attrs.get("scale", "log1p"))
    if scale != "log1p":
        raise ValueError(f"{name!r} predicts on the scale {scale!r}; means of log(1 + count) are scored: predict(fit, ..., scale='log1p').")
    if set(mean.dims) != {"condition", "gene"}:
        raise ValueError(f"{name!r} has the dims {tuple(mean.dims)}; means have the dims ('condition', 'gene').")
    for dim in ("condition", "gene"):
        if dim not in mean.coords:
            raise ValueError(f"{name!r} does not name its {dim}s, by which it is aligned: give it the coordinate {dim!r}.")
    if table.attrs.get("interval", "mean") != "mean":
        raise ValueError(
            f"{name!r} holds intervals of observed means; evaluate adds the noise of sampling itself: predict without n_cells=."
        )
    if isinstance(table, xr.Dataset) and {"lower", "upper"} <= set(table) and "sd" not in table:
        width = 2 * scipy.stats.norm.ppf((1 + table.attrs.get("level", 0.9)) / 2)
        return mean, (table["upper"] - table["lower"]) / width
    known = "sd" in table if isinstance(table, xr.Dataset) else "sd" in table.coords
    return mean, xr.broadcast(table["sd"].reset_coords(drop=True), mean)[0] if known else xr.zeros_like(mean)


def _aligned(name: str, part: xr.DataArray, wanted: dict[str, list[str]]) -> Float[np.ndarray, "condition gene"]:
    """Return values in the order of the names that are scored."""
    part = part.transpose("condition", "gene")
    at = []
    for dim, names in wanted.items():
        own = list(map(str, part[dim].values))
        place = {one: k for k, one in enumerate(own)}
        if lacking := [one for one in names if one not in place]:
            raise ValueError(f"{name!r} lacks {some(lacking, f'tested {dim}')}. {nearest(lacking[0], own)}")
        if doubled := [one for one in names if own.count(one) > 1]:
            raise ValueError(f"{name!r} names {some(doubled, dim)} more than once: give each once.")
        at.append([place[one] for one in names])
    return part.values[np.ix_(*at)].astype(np.float64)
