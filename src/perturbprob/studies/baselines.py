"""What a model must beat, on densities and on means.

Densities of cells: negative binomials that know nothing of a cell but its size factor, or that and its condition. Means of
conditions: the baselines of `perturbprob.studies.mean_baselines`, all of them in ``MEAN_BASELINES``, and the ``noise_floor`` beneath them.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, xlogy

from perturbprob.experiment.screen import require_screen
from perturbprob.studies.hierarchical_gaussian import hierarchical_gaussian
from perturbprob.studies.mean_baselines import (
    MEAN_BASELINES,
    control_mean,
    control_offset,
    denoised_offset,
    last_time,
    last_time_drift,
    linear_ode,
    low_rank_linear,
    noise_floor,
    perturbation_mean,
    shrunk_offset,
)

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

__all__ = [
    "MEAN_BASELINES",
    "condition_negative_binomial",
    "control_mean",
    "control_offset",
    "denoised_offset",
    "hierarchical_gaussian",
    "last_time",
    "last_time_drift",
    "linear_ode",
    "low_rank_linear",
    "negative_binomial",
    "noise_floor",
    "perturbation_mean",
    "shrunk_offset",
]


def negative_binomial(train: "Screen", test: "Screen") -> xr.DataArray:
    """Return the log density of each test cell, dim (cell,), in nats, under one negative binomial per gene for all cells.

    x ~ NB(mean = ℓ r_g, variance = mean + mean² / θ_g), with ℓ the size factor of the cell, r_g the gene's counts over the size factors
    of the training cells (and half a count, so that a gene silent in training is not impossible) and θ_g at its maximum
    likelihood. It is on the scale of `log_density`: compare the two on the same cells.

    >>> from perturbprob.experiment.simulate import simulate
    >>> screen = simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> negative_binomial(screen[:150], screen[150:]).sizes["cell"]
    50
    """
    _check_genes(train, test)
    total = np.zeros(test.n_cells)
    for counts, (rate, theta) in zip(_columns(test), _fits(train), strict=True):
        total += _log_density(counts, rate * test.size_factor, theta)
    return _labelled(total, test)


def condition_negative_binomial(train: "Screen", test: "Screen") -> xr.DataArray:
    """Return the log density of each test cell, dim (cell,), in nats, under one negative binomial per gene and condition.

    As `negative_binomial`, with the same θ_g and the rate of the cell's condition c, shrunken to that of all cells,
    r_gc = (counts_gc + κ r_g) / (ℓ_c + κ): counts and size factors ℓ_c summed over the training cells of c. κ, the same for all genes,
    maximises the density of the training cells when each is left out of its own condition's sums. A condition without
    training cells gets r_g.

    >>> from perturbprob.experiment.simulate import simulate
    >>> screen = simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> condition_negative_binomial(screen[:150], screen[150:]).sizes["cell"]
    50
    """
    _check_genes(train, test)
    fits = _fits(train)
    prior = _prior_exposure(train, fits)
    number = {condition: k for k, condition in enumerate(train.conditions)}
    unseen = len(number)
    own = np.array([number.get(condition, unseen) for condition in test.conditions])[test.condition]
    exposure = np.bincount(train.condition, train.size_factor, unseen + 1) + prior
    total = np.zeros(test.n_cells)
    for known, counts, (rate, theta) in zip(_columns(train), _columns(test), fits, strict=True):
        rates = (np.bincount(train.condition, known, unseen + 1) + prior * rate) / exposure
        total += _log_density(counts, rates[own] * test.size_factor, theta)
    return _labelled(total, test)


def _check_genes(train: "Screen", test: "Screen") -> None:
    """Refuse screens whose genes differ."""
    require_screen(train)
    require_screen(test)
    if train.genes != test.genes:
        differ = len(set(train.genes) ^ set(test.genes))
        raise ValueError(f"Training and test cells need the same genes in the same order; {differ} genes are in one of the two only.")


def _columns(screen: "Screen") -> Iterator[Float[np.ndarray, " cell"]]:
    """Yield the counts of each gene: only one gene is dense at a time."""
    columns = screen.counts.tocsc().astype(float)
    return (columns[:, [g]].toarray()[:, 0] for g in range(screen.n_genes))


def _fits(train: "Screen") -> list[tuple[float, float]]:
    """Return the rate r and the dispersion θ of each gene over all training cells."""
    rates = ((counts, (counts.sum() + 0.5) / train.size_factor.sum()) for counts in _columns(train))
    return [(float(rate), _dispersion(counts, rate * train.size_factor)) for counts, rate in rates]


def _dispersion(counts: Float[np.ndarray, " cell"], mean: Float[np.ndarray, " cell"]) -> float:
    """Return the maximum-likelihood θ of one gene, between 10⁻³ and 10⁶ (nearly Poisson)."""
    found = minimize_scalar(lambda log: -_log_density(counts, mean, np.exp(log)).sum(), bounds=np.log([1e-3, 1e6]), method="bounded")
    return float(np.exp(found.x))


def _prior_exposure(train: "Screen", fits: list[tuple[float, float]]) -> float:
    """Return κ, how many cells of size factor 1 the rate of all cells counts for in a condition: between 0.1 and 10⁴."""
    loss = partial(_left_out_loss, train, fits)
    return float(np.exp(minimize_scalar(loss, bounds=np.log([0.1, 1e4]), method="bounded", options={"xatol": 0.05}).x))


def _left_out_loss(train: "Screen", fits: list[tuple[float, float]], log_prior: float) -> float:
    """Return minus the log density of the training cells, each under the rates of its condition's other cells."""
    prior, code, size = np.exp(log_prior), train.condition, train.size_factor
    exposure = np.bincount(code, size)[code] - size + prior
    loss = 0.0
    for counts, (rate, theta) in zip(_columns(train), fits, strict=True):
        rates = (np.bincount(code, counts)[code] - counts + prior * rate) / exposure
        loss -= _log_density(counts, rates * size, theta).sum()
    return loss


def _log_density(counts: Float[np.ndarray, " cell"], mean: Float[np.ndarray, " cell"], theta: float) -> Float[np.ndarray, " cell"]:
    """Return the log density of the negative binomial of this mean and variance mean + mean² / θ."""
    binomial = gammaln(counts + theta) - gammaln(theta) - gammaln(counts + 1)
    return binomial - theta * np.log1p(mean / theta) + xlogy(counts, mean / (mean + theta))


def _labelled(total: Float[np.ndarray, " cell"], test: "Screen") -> xr.DataArray:
    """Name the cells."""
    return xr.DataArray(total, dims="cell", coords={"cell": list(test.cells)}, name="log_density")
