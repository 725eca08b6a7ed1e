"""Screens with known truth, from a generator that shares nothing with the fitted model: a gene network at rest, disturbed."""

import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData
from numpy.random import Generator
from scipy.integrate import solve_ivp
from scipy.sparse import csr_matrix

from perturbprob.experiment.action import Knockout, Media, Protocol, Wait
from perturbprob.experiment.screen import Screen

_PROGRAMMES = 3  # latent programmes in which cells differ
_DEPTH_SD = 0.3  # standard deviation of the log size factor
_LOG_PRODUCTION_LIMIT = 2.0  # input saturates here, so that no network runs away


@dataclass(frozen=True, eq=False)
class Simulation:
    """A simulated screen and the truth behind it.

    ``adata`` holds raw counts (CSR, float32) with the obs columns perturbation, perturbation_type, media, time and batch.
    ``truth`` holds named, identified quantities, logs being natural:

    - ``rate_share`` (condition, gene): expected share of a cell's counts at η = 0, averaged over cells; rows sum to 1.
    - ``log_fold_change`` (condition, gene): log of that share against control of the same media and time.
    - ``batch_effect`` (batch, gene): η^b on the log rate. It sums to 0 over batches, and over genes when weighted by the
      share of control in the baseline media (that constant is depth).
    - ``dispersion`` (gene): θ of the negative binomial, whose variance is μ + μ²/θ.
    - ``network`` (gene, regulator): signed weights.
    - ``active`` (target): whether knocking out this gene does anything at all.
    - ``size_factor`` (cell): depth of the cell relative to ``depth``.
    - ``median_log_rate`` (condition, gene) and ``programme`` (cell, gene), what sets a cell apart from the median one; `log_rate`
      adds them up.

    The condition axis is labelled by ``str(Protocol)`` and carries perturbation, media and time.
    """

    adata: AnnData
    truth: xr.Dataset

    @cached_property
    def screen(self) -> Screen:
        """The counts as a `Screen`; the first media is its baseline."""
        return Screen.from_anndata(self.adata, media="media", baseline=str(self.truth["media"].values[0]), time="time", batch="batch")

    def log_rate(self, condition: str | Protocol) -> xr.DataArray:
        """Return the log of the expected count of each cell and gene had the same cells gone through a condition.

        Batch and depth stay the cell's own.

        >>> simulation = simulate(n_cells=100, n_genes=10, n_perturbations=2, seed=1)
        >>> simulation.log_rate(simulation.screen.conditions[-1]).sizes
        Frozen({'cell': 100, 'gene': 10})
        """
        truth = self.truth
        logits = truth["median_log_rate"].sel(condition=str(condition), drop=True) + truth["programme"]
        eta = truth["batch_effect"].sel(batch=xr.DataArray(self.adata.obs["batch"].to_numpy(str), dims="cell"), drop=True)
        depth = np.log(truth["size_factor"]) + np.log(truth.attrs["depth"])
        total: xr.DataArray = xr.apply_ufunc(np.exp, logits).sum("gene")
        log_rate: xr.DataArray = logits - np.log(total) + eta + depth
        return log_rate.transpose("cell", "gene").assign_coords(cell=self.adata.obs_names.to_numpy(str))


@dataclass(frozen=True, eq=False)
class _System:
    """The cells before anything is done to them, and the network that answers."""

    base: np.ndarray  # log rate at rest, per gene
    decay: np.ndarray  # per gene and unit of time
    dispersion: np.ndarray  # per gene
    loadings: np.ndarray  # programme × gene
    target: np.ndarray  # the genes that the screen knocks out
    network: np.ndarray  # gene × regulator


def simulate(
    *,
    n_cells: int = 2000,
    n_genes: int = 50,
    n_perturbations: int = 8,
    media: Sequence[str] = ("baseline",),
    times: Sequence[float] = (1.0, 2.0),
    n_batches: int = 3,
    batch_scale: float = 0.2,
    effect_scale: float = 0.7,
    inactive: float = 0.25,
    heterogeneity: float = 0.3,
    dispersion: float = 5.0,
    depth: float = 200.0,
    unequal: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulate a screen: control and ``n_perturbations`` knock-outs, in every media, at every time, over ``n_batches``.

    Transcripts r, relative to rest, leave r = 1 by dr/dt = d ⊙ (exp f(W (h(q) − 1) + c_m) − r), where h(q) = 2q / (1 + q),
    f saturates at ±2 and c_m is the input of the media (0 in the first, the baseline). The product q equals r; it is 0 for
    a gene knocked out, whose own transcript is still made. Cells differ in three latent programmes u ~ N(0, I), and

        counts ~ NB(mean = depth · size factor · softmax(log base + log r + L u) · exp(η^b), θ).

    ``times`` are ≥ 0 in any unit, in which decay d is near 1. Scales are in natural logs: ``batch_scale`` (sd of η
    before it is centred), ``effect_scale`` (mean weight of an edge and of a media input) and ``heterogeneity`` (sd between
    cells, per gene). ``inactive`` is the share of knock-outs that do nothing at all, ``dispersion`` the median of θ and
    ``depth`` the median expected total of a cell. ``unequal`` goes from 0 (every condition is spread evenly over
    batches) to 1 (most of its cells are in one or two batches). Truth depends on ``seed`` but not on ``n_cells``, and cells
    without counts are drawn again.

    Raises ValueError or TypeError for a setting out of range, fewer cells than conditions, or a batch left without cells.

    >>> simulation = simulate(n_cells=300, n_genes=20, n_perturbations=4, media=("baseline", "BMP4"), seed=1)
    >>> simulation.adata.shape, simulation.truth["log_fold_change"].shape
    ((300, 20), (20, 20))
    >>> bool(abs(simulation.truth["batch_effect"].sum("batch")).max() < 1e-12)
    True
    """
    _check_whole(n_cells=(n_cells, 1), n_genes=(n_genes, 2), n_perturbations=(n_perturbations, 0), n_batches=(n_batches, 1), seed=(seed, 0))
    _check_range(0.0, 5.0, batch_scale=batch_scale, effect_scale=effect_scale)
    _check_range(0.0, 1.5, heterogeneity=heterogeneity)
    _check_range(0.0, 1.0, inactive=inactive, unequal=unequal)
    _check_range(0.01, 1e6, dispersion=dispersion)
    _check_range(1.0, 1e6, depth=depth)
    _check_levels(media, times)
    _check_fit(n_cells, n_genes, n_perturbations, len(media) * len(times))

    world, lanes, cells = (np.random.default_rng([seed, stream]) for stream in range(3))  # more cells leave the truth alone
    system = _draw_system(world, n_genes, n_perturbations, round(inactive * n_perturbations), effect_scale, heterogeneity, dispersion)
    context = [effect_scale * _sparse(world, n_genes, share=0.2 if i else 0.0) for i in range(len(media))]
    log_rate = _log_rate(system, context, times)
    condition, batch = _layout(cells, n_cells, len(log_rate), n_batches, unequal)

    truth = _truth(system, log_rate, media, times).assign_coords(batch=[f"batch{b + 1}" for b in range(n_batches)])
    eta = _batch_effect(lanes, n_batches, batch_scale, truth["rate_share"].values[0])
    size_factor = np.exp(cells.normal(0, _DEPTH_SD, n_cells))
    truth = truth.assign(batch_effect=(("batch", "gene"), eta), size_factor=("cell", size_factor))

    programmes = cells.standard_normal((n_cells, _PROGRAMMES)) @ system.loadings
    truth = truth.assign(programme=(("cell", "gene"), programmes)).assign_attrs(depth=depth)
    mean = depth * size_factor[:, None] * _softmax(log_rate[condition] + programmes) * np.exp(eta[batch])
    return _label(_draw_counts(cells, mean, system.dispersion), truth, condition, batch)


def _draw_system(
    rng: Generator, n_genes: int, n_targets: int, n_inactive: int, effect_scale: float, heterogeneity: float, dispersion: float
) -> _System:
    """Draw base rates over a 200-fold range, decay near 1, and a network in which active targets are hubs."""
    target = rng.choice(n_genes, n_targets, replace=False)
    reach = np.full(n_genes, 0.02)
    reach[target] = 0.12
    weights = np.stack([_sparse(rng, n_genes, reach[j], skip=j) for j in range(n_genes)], axis=1)
    weights[:, target[:n_inactive]] = 0
    return _System(
        base=rng.uniform(0, np.log(200), n_genes),
        decay=np.exp(rng.normal(0, 0.3, n_genes)),
        dispersion=dispersion * np.exp(rng.normal(0, 0.5, n_genes)),
        loadings=rng.normal(0, heterogeneity / np.sqrt(_PROGRAMMES), (_PROGRAMMES, n_genes)),
        target=np.sort(target),
        network=effect_scale * weights,
    )


def _sparse(rng: Generator, n_genes: int, share: float, *, skip: int = -1) -> np.ndarray:
    """Draw signed weights of mean size 1 on a share of the genes, at least one if the share is not 0, never on gene ``skip``."""
    others = np.setdiff1d(np.arange(n_genes), skip)
    chosen = rng.choice(others, max(int(share > 0), rng.binomial(len(others), share)), replace=False)
    weights = np.zeros(n_genes)
    weights[chosen] = rng.choice([-1, 1], len(chosen)) * rng.gamma(4, 1 / 4, len(chosen))
    return weights


def _log_rate(system: _System, contexts: list[np.ndarray], times: Sequence[float]) -> np.ndarray:
    """Return the log rate of the median cell (condition, gene): perturbation slowest with control first, then media, then time."""
    runs = itertools.product([None, *system.target.tolist()], contexts)
    return system.base + np.log(np.concatenate([_time_course(system, context, lost, times) for lost, context in runs]))


def _time_course(system: _System, context: np.ndarray, lost: int | None, times: Sequence[float]) -> np.ndarray:
    """Integrate transcripts relative to rest, (time, gene), after the product of gene ``lost`` is gone."""

    def slope(_: float, transcript: np.ndarray) -> np.ndarray:
        product = transcript.copy()
        if lost is not None:
            product[lost] = 0
        drive = system.network @ (2 * product / (1 + product) - 1) + context
        limited = _LOG_PRODUCTION_LIMIT * np.tanh(drive / _LOG_PRODUCTION_LIMIT)
        return system.decay * (np.exp(limited) - transcript)

    moments, place = np.unique(np.asarray(times, dtype=float), return_inverse=True)
    span = (0.0, moments[-1] or 1.0)
    return solve_ivp(slope, span, np.ones(len(context)), method="LSODA", t_eval=moments, rtol=1e-8, atol=1e-10).y.T[place]


def _expected_share(log_rate: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """Average the softmax over the programmes by Gauss-Hermite quadrature.

    Its error is below 1e-4 in the log up to a heterogeneity of 1 and below 1e-3 up to 1.5. All conditions share the
    nodes, so conditions of equal rates get shares equal to the last bit.
    """
    node, weight = np.polynomial.hermite_e.hermegauss(11)
    nodes = np.array(list(itertools.product(node, repeat=_PROGRAMMES)))
    weights = np.array(list(itertools.product(weight, repeat=_PROGRAMMES))).prod(axis=1)
    return weights @ _softmax(log_rate + nodes @ loadings) / weights.sum()


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Normalise the exponentials over genes, the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _batch_effect(rng: Generator, n_batches: int, scale: float, share: np.ndarray) -> np.ndarray:
    """Draw η (batch, gene) and centre it over batches, then over genes by rate; the second keeps the first."""
    eta = rng.normal(0, scale, (n_batches, len(share)))
    eta -= eta.mean(axis=0)
    return eta - (eta @ share / share.sum())[:, None]


def _layout(rng: Generator, n_cells: int, n_conditions: int, n_batches: int, unequal: float) -> tuple[np.ndarray, np.ndarray]:
    """Give each cell a condition (equal numbers) and a batch (systematic sampling of the condition's own shares), in random order."""
    condition = np.arange(n_cells) % n_conditions
    own = rng.dirichlet(np.full(n_batches, 0.3), n_conditions)
    edges = np.cumsum((1 - 0.9 * unequal) / n_batches + 0.9 * unequal * own, axis=1)  # a tenth stays even: batches stay connected
    place = (np.arange(n_cells) // n_conditions + 0.5) / np.bincount(condition)[condition]
    place = (place + condition / n_conditions) % 1  # each condition starts elsewhere, or all remainders would fall into one batch
    batch = (place[:, None] > edges[condition, :-1]).sum(axis=1)
    if len(np.unique(batch)) < n_batches:
        raise ValueError(f"{n_cells} cells leave some of the {n_batches} batches empty: raise n_cells, or lower n_batches or unequal.")
    order = rng.permutation(n_cells)
    return condition[order], batch[order]


def _draw_counts(rng: Generator, mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Draw negative binomial counts as gamma-Poisson; a cell without counts is drawn again."""
    counts = rng.poisson(rng.gamma(dispersion, mean / dispersion))
    while (empty := ~counts.any(axis=1)).any():
        counts[empty] = rng.poisson(rng.gamma(dispersion, mean[empty] / dispersion))
    return counts


def _truth(system: _System, log_rate: np.ndarray, media: Sequence[str], times: Sequence[float]) -> xr.Dataset:
    """Name what was drawn, and derive what is identified."""
    gene = [f"G{i + 1:0{len(str(len(system.base)))}d}" for i in range(len(system.base))]
    target = [gene[j] for j in system.target]
    share = np.stack([_expected_share(row, system.loadings) for row in log_rate])
    log_share = np.log(share).reshape(len(target) + 1, -1, len(gene))
    variables = {
        "rate_share": (("condition", "gene"), share),
        "median_log_rate": (("condition", "gene"), log_rate),
        "log_fold_change": (("condition", "gene"), (log_share - log_share[:1]).reshape(share.shape)),
        "dispersion": ("gene", system.dispersion),
        "network": (("gene", "regulator"), system.network),
        "active": ("target", system.network[:, system.target].any(axis=0)),
    }
    conditions = list(itertools.product(["control", *target], media, map(float, times)))
    protocol = [str(_protocol(*condition).with_baseline(media[0])) for condition in conditions]
    labels = pd.DataFrame(conditions, columns=["perturbation", "media", "time"], index=pd.Index(protocol, name="condition"))
    return xr.Dataset(variables, {"gene": gene, "regulator": gene, "target": target}).assign_coords(labels.to_xarray())


def _protocol(perturbation: str, media: str, time: float) -> Protocol:
    """Return the protocol of a condition."""
    knockouts = [] if perturbation == "control" else [Knockout(perturbation)]
    return Protocol([*knockouts, Media(media), Wait(time)])


def _label(counts: np.ndarray, truth: xr.Dataset, condition: np.ndarray, batch: np.ndarray) -> Simulation:
    """Put the counts beside what is known of every cell."""
    cell = [f"cell{i + 1}" for i in range(len(counts))]
    known = {name: truth[name].values[condition] for name in ("perturbation", "media", "time")}
    obs = pd.DataFrame(known | {"perturbation_type": "knockout", "batch": truth["batch"].values[batch]}, index=cell)
    adata = AnnData(csr_matrix(counts, dtype=np.float32), obs=obs, var=pd.DataFrame(index=truth["gene"].values))
    return Simulation(adata, truth.assign_coords(cell=cell))


def _check_whole(**settings: tuple[int, int]) -> None:
    """Refuse numbers that are not whole or below their least value."""
    for name, (value, least) in settings.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")


def _check_range(low: float, high: float, **settings: float) -> None:
    """Refuse numbers that are not finite or outside [low, high]."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}; got {value!r}.")


def _check_levels(media: Sequence[str], times: Sequence[float]) -> None:
    """Refuse media and times that are not lists of different levels."""
    if isinstance(media, str) or not all(isinstance(name, str) and name.strip() for name in media):
        raise TypeError(f"media must be a sequence of names such as ('baseline', 'BMP4'); got {media!r}.")
    _check_range(0.0, 1e6, **{f"times[{i}]": time for i, time in enumerate(times)})
    for name, levels in (("media", media), ("times", times)):
        if not len(levels) or len(set(levels)) < len(levels):
            raise ValueError(f"{name} must hold at least one level and none twice; got {levels!r}.")


def _check_fit(n_cells: int, n_genes: int, n_perturbations: int, n_settings: int) -> None:
    """Refuse more targets than genes and more conditions than cells."""
    if n_perturbations > n_genes:
        raise ValueError(f"{n_perturbations} perturbations need as many genes; got n_genes={n_genes}.")
    if n_cells < (n_conditions := (n_perturbations + 1) * n_settings):
        raise ValueError(f"{n_conditions} conditions (perturbation × media × time) need as many cells; got n_cells={n_cells}.")
