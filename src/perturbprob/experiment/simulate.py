"""Screens with known truth, from a generator that shares nothing with the fitted model: a gene network at rest, disturbed."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData
from numpy.random import Generator
from scipy.sparse import csr_matrix

from perturbprob.experiment.action import Knockout, Media, Protocol, Wait
from perturbprob.experiment.gene_network import N_PROGRAMMES, GeneNetwork, draw_network, draw_sparse, log_softmax
from perturbprob.experiment.screen import Screen
from perturbprob.experiment.settings import check_range, check_whole

_DEPTH_SD = 0.3  # standard deviation of the log size factor


@final
@dataclass(frozen=True, eq=False)
class Simulation:
    """A simulated screen and the truth behind it.

    ``adata`` holds raw counts (CSR, float32) with the obs columns perturbation, perturbation_type, media, time and batch.
    ``truth`` holds named, identified quantities, logs being natural:

    - ``rate_share`` (condition, gene): expected share of a cell's counts at η = 0, averaged over cells; rows sum to 1.
    - ``log_fold_change`` (condition, gene): log of that share against control of the same media and time.
    - ``batch_effect`` (batch, gene): η^b on the log rate. It sums to 0 over batches (not so after `remeasured`), and over genes when
      weighted by the share of control in the baseline media (that constant is depth).
    - ``dispersion`` (gene): θ of the negative binomial, whose variance is μ + μ²/θ.
    - ``network`` (gene, regulator): signed weights.
    - ``active`` (target): whether knocking out this gene does anything at all.
    - ``size_factor`` (cell): depth of the cell relative to ``depth``.
    - ``median_log_rate`` (condition, gene): log rate of the median cell, and ``programme`` (cell, gene), what sets a cell apart from
      it at rest.

    The condition axis is labelled by ``str(Protocol)`` and carries perturbation, media and time. ``network`` is what made it.
    """

    adata: AnnData
    truth: xr.Dataset
    network: GeneNetwork

    @cached_property
    def screen(self) -> Screen:
        """The counts as a `Screen`; the first media is its baseline."""
        return Screen.from_anndata(self.adata, media="media", baseline=str(self.truth["media"].values[0]), time="time", batch="batch")

    def outcome(self, x: np.ndarray, condition: str | Protocol) -> np.ndarray:
        """Return 𝓕 of the truth (eq 12): the log share of each gene in a condition, for cells that rest at log shares x (point, gene).

        >>> simulation = simulate(n_cells=100, n_genes=10, n_perturbations=2, coupling=1.0, seed=1)
        >>> rest = np.log(simulation.truth["rate_share"].values[:1])
        >>> bool(np.allclose(simulation.outcome(rest, "Protocol([Wait(1)])"), rest))  # untouched cells rest
        True
        """
        return log_softmax(_carried(self.network, self.truth, x, self.truth.get_index("condition").get_loc(str(condition))))

    def log_rate(self, condition: str | Protocol) -> xr.DataArray:
        """Return the log of the expected count of each cell and gene had the same cells gone through a condition.

        Batch and depth stay the cell's own.

        >>> simulation = simulate(n_cells=100, n_genes=10, n_perturbations=2, seed=1)
        >>> simulation.log_rate(simulation.screen.conditions[-1]).sizes
        Frozen({'cell': 100, 'gene': 10})
        """
        truth, batch = self.truth, self.adata.obs["batch"].to_numpy(str)
        share = self.outcome(self.network.base + truth["programme"].values, condition)
        eta = truth["batch_effect"].sel(batch=batch).values
        log_rate = share + eta + np.log(truth["size_factor"].values)[:, None] + np.log(truth.attrs["depth"])
        return xr.DataArray(log_rate, {"cell": self.adata.obs_names.to_numpy(str), "gene": truth["gene"].values}, ("cell", "gene"))

    def remeasured(self, layout: pd.DataFrame, *, batch_scale: float = 0.2, seed: int = 0) -> "Simulation":
        """Measure the same truth again, in the batches of a layout, whose effects are independent draws from their population.

        ``layout`` is a table of cells, conditions (perturbation, media, time) × batches, as `Screen.summary` and `propose_layouts`
        give. η^b ~ Normal(0, batch_scale²) for each gene, centred over genes by rate but not over batches: their mean is part of
        what is measured, and nothing in the counts tells of it. One seed gives the first batches of all layouts the same effects.

        Raises ValueError for a condition that the truth does not hold, numbers of cells below 0, and a batch without cells.

        >>> simulation = simulate(n_cells=60, n_genes=8, n_perturbations=1, times=(1.0,), seed=1)
        >>> layout = simulation.screen.summary() * 2
        >>> again = simulation.remeasured(layout, seed=5)
        >>> bool((again.screen.summary() == layout).all(axis=None)), again.truth["rate_share"].identical(simulation.truth["rate_share"])
        (True, True)
        """
        check_range(0.0, 5.0, batch_scale=batch_scale)
        check_whole(0, seed=seed)
        condition, batch = _placed(layout, self.truth)
        lanes, cells = (np.random.default_rng([seed, stream]) for stream in (3, 4))  # not those of `simulate`
        shuffled = cells.permutation(len(condition))
        eta = _batch_effect(lanes, layout.shape[1], batch_scale, self.truth["rate_share"].values[0])
        truth = self.truth.drop_dims(["batch", "cell"]).assign_coords(batch=layout.columns.astype(str).to_numpy())
        return _measured(self.network, truth.assign(batch_effect=(("batch", "gene"), eta)), condition[shuffled], batch[shuffled], cells)


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
    coupling: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulate a screen: control and ``n_perturbations`` knock-outs, in every media, at every time, over ``n_batches``.

    Transcripts r, relative to rest, leave r = 1 by dr/dt = d ⊙ (exp f(W (h(q) − h(q₀)) + c_m) − r), where h(q) = 2q / (1 + q),
    f saturates at ±2 and c_m is the input of the media (0 in the first, the baseline). The product q is q₀ r; it is 0 for
    a gene knocked out, whose own transcript is still made. Cells differ in three latent programmes u ~ N(0, I), and

        counts ~ NB(mean = depth · size factor · softmax(log base + log r + L u) · exp(η^b), θ).

    log q₀ is ``coupling`` times the log share of the gene at rest, against the median cell: at 0 all cells change alike and 𝓕 has
    the identity for its gradient; at 1 a cell that makes more of a regulator loses more with it, and 𝓕 is not linear.

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
    check_whole(0, n_perturbations=n_perturbations, seed=seed)
    check_whole(1, n_cells=n_cells, n_batches=n_batches)
    check_whole(2, n_genes=n_genes)
    check_range(0.0, 5.0, batch_scale=batch_scale, effect_scale=effect_scale)
    check_range(0.0, 1.5, heterogeneity=heterogeneity)
    check_range(0.0, 1.0, inactive=inactive, unequal=unequal, coupling=coupling)
    check_range(0.01, 1e6, dispersion=dispersion)
    check_range(1.0, 1e6, depth=depth)
    _check_levels(media, times)
    _check_fit(n_cells, n_genes, n_perturbations, len(media) * len(times))

    world, lanes, cells = (np.random.default_rng([seed, stream]) for stream in range(3))  # more cells leave the truth alone
    drawn = draw_network(world, n_genes, n_perturbations, round(inactive * n_perturbations), effect_scale, heterogeneity, dispersion)
    inputs = np.stack([effect_scale * draw_sparse(world, n_genes, share=0.2 if i else 0.0) for i in range(len(media))])
    network = GeneNetwork(**drawn, inputs=inputs, coupling=coupling)
    truth = _truth(network, media, times).assign_coords(batch=[f"batch{b + 1}" for b in range(n_batches)]).assign_attrs(depth=depth)
    condition, batch = _layout(cells, n_cells, truth.sizes["condition"], n_batches, unequal)
    eta = _batch_effect(lanes, n_batches, batch_scale, truth["rate_share"].values[0], zero_sum=True)
    return _measured(network, truth.assign(batch_effect=(("batch", "gene"), eta)), condition, batch, cells)


def _measured(network: GeneNetwork, truth: xr.Dataset, condition: np.ndarray, batch: np.ndarray, rng: Generator) -> Simulation:
    """Draw cells of given conditions and batches, and their counts."""
    size_factor = np.exp(rng.normal(0, _DEPTH_SD, len(condition)))
    programme = rng.standard_normal((len(condition), N_PROGRAMMES)) @ network.loadings
    log_rate = truth["median_log_rate"].values[condition] + programme
    for c in np.unique(condition) if network.coupling else ():
        log_rate[condition == c] = _carried(network, truth, network.base + programme[condition == c], int(c))
    mean = truth.attrs["depth"] * size_factor[:, None] * np.exp(log_softmax(log_rate) + truth["batch_effect"].values[batch])
    counts = _draw_counts(rng, mean, network.dispersion)
    truth = truth.assign(size_factor=("cell", size_factor), programme=(("cell", "gene"), programme))
    adata = _labelled(counts, truth, condition, batch)
    return Simulation(adata, truth.assign_coords(cell=adata.obs_names.to_numpy(str)), network)


def _carried(network: GeneNetwork, truth: xr.Dataset, x: np.ndarray, condition: int) -> np.ndarray:
    """Return log rates (point, gene) in a condition, given by its number."""
    at = {name: truth[name].values for name in ("perturbation", "media", "time")}
    lost = int(truth.get_index("gene").get_indexer([at["perturbation"][condition]])[0])
    media = list(dict.fromkeys(at["media"])).index(at["media"][condition])
    return network.outcome(x, lost if lost >= 0 else None, media, [float(at["time"][condition])])[0]


def _batch_effect(rng: Generator, n_batches: int, scale: float, share: np.ndarray, *, zero_sum: bool = False) -> np.ndarray:
    """Draw η (batch, gene) and centre it over batches, if asked for, then over genes by rate; the second keeps the first."""
    eta = rng.normal(0, scale, (n_batches, len(share)))
    eta -= eta.mean(axis=0) if zero_sum else 0
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


def _placed(layout: pd.DataFrame, truth: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the condition and batch of each cell of a layout, in the order of the table."""
    known = pd.MultiIndex.from_arrays([truth[name].values for name in ("perturbation", "media", "time")])
    rows, cells = known.get_indexer(layout.index), layout.to_numpy()
    if (rows < 0).any():
        raise ValueError(
            f"The truth holds no condition {layout.index[rows < 0].tolist()[0]}. Take the rows of layout from screen.summary()."
        )
    if not np.issubdtype(cells.dtype, np.integer) or cells.min(initial=0) < 0 or not cells.any(axis=0).all():
        raise ValueError("layout must hold whole numbers of cells of at least 0, and some in every batch.")
    row, batch = (index.ravel() for index in np.indices(cells.shape))
    return rows[np.repeat(row, cells.ravel())], np.repeat(batch, cells.ravel())


def _truth(network: GeneNetwork, media: Sequence[str], times: Sequence[float]) -> xr.Dataset:
    """Name what was drawn, and derive what is identified: perturbation slowest with control first, then media, then time."""
    gene = [f"G{i + 1:0{len(str(len(network.base)))}d}" for i in range(len(network.base))]
    target = [gene[j] for j in network.target]
    nodes, weights = _programmes(network.loadings)
    runs = itertools.product([None, *network.target.tolist()], range(len(media)))
    solved = [network.outcome(network.base + nodes, lost, m, times) for lost, m in runs]
    share = np.concatenate([weights @ np.exp(log_softmax(run)) for run in solved])
    log_share = np.log(share).reshape(len(target) + 1, -1, len(gene))
    variables = {
        "rate_share": (("condition", "gene"), share),
        "median_log_rate": (("condition", "gene"), np.concatenate([run[:, len(nodes) // 2] for run in solved])),
        "log_fold_change": (("condition", "gene"), (log_share - log_share[:1]).reshape(share.shape)),
        "dispersion": ("gene", network.dispersion),
        "network": (("gene", "regulator"), network.weights),
        "active": ("target", network.weights[:, network.target].any(axis=0)),
    }
    conditions = list(itertools.product(["control", *target], media, map(float, times)))
    protocol = [str(_protocol(*condition).with_baseline(media[0])) for condition in conditions]
    labels = pd.DataFrame(conditions, columns=["perturbation", "media", "time"], index=pd.Index(protocol, name="condition"))
    return xr.Dataset(variables, {"gene": gene, "regulator": gene, "target": target}).assign_coords(labels.to_xarray())


def _programmes(loadings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what programmes add to log rates, and weights that sum to 1, for Gauss-Hermite quadrature; the middle one is the median cell.

    Its error is below 1e-4 in the log up to a heterogeneity of 1 and below 1e-3 up to 1.5. All conditions share the
    nodes, so conditions of equal rates get shares equal to the last bit.
    """
    node, weight = np.polynomial.hermite_e.hermegauss(11)
    nodes = np.array(list(itertools.product(node, repeat=N_PROGRAMMES)))
    weights = np.array(list(itertools.product(weight, repeat=N_PROGRAMMES))).prod(axis=1)
    return nodes @ loadings, weights / weights.sum()


def _protocol(perturbation: str, media: str, time: float) -> Protocol:
    """Return the protocol of a condition."""
    knockouts = [] if perturbation == "control" else [Knockout(perturbation)]
    return Protocol([*knockouts, Media(media), Wait(time)])


def _labelled(counts: np.ndarray, truth: xr.Dataset, condition: np.ndarray, batch: np.ndarray) -> AnnData:
    """Put the counts beside what is known of every cell."""
    cell = [f"cell{i + 1}" for i in range(len(counts))]
    known = {name: truth[name].values[condition] for name in ("perturbation", "media", "time")}
    obs = pd.DataFrame(known | {"perturbation_type": "knockout", "batch": truth["batch"].values[batch]}, index=cell)
    return AnnData(csr_matrix(counts, dtype=np.float32), obs=obs, var=pd.DataFrame(index=truth["gene"].values))


def _check_levels(media: Sequence[str], times: Sequence[float]) -> None:
    """Refuse media and times that are not lists of different levels."""
    if isinstance(media, str) or not isinstance(media, Iterable) or not all(isinstance(name, str) and name.strip() for name in media):
        raise TypeError(f"media must be a sequence of names such as ('baseline', 'BMP4'); got {media!r}.")
    if not isinstance(times, Iterable):
        raise TypeError(f"times must be a sequence of numbers such as (1.0, 2.0); got {times!r}.")
    check_range(0.0, 1e6, **{f"times[{i}]": time for i, time in enumerate(times)})
    for name, levels in (("media", media), ("times", times)):
        if not len(levels) or len(set(levels)) < len(levels):
            raise ValueError(f"{name} must hold at least one level and none twice; got {levels!r}.")


def _check_fit(n_cells: int, n_genes: int, n_perturbations: int, n_settings: int) -> None:
    """Refuse more targets than genes and more conditions than cells."""
    if n_perturbations > n_genes:
        raise ValueError(f"{n_perturbations} perturbations need as many genes; got n_genes={n_genes}.")
    if n_cells < (n_conditions := (n_perturbations + 1) * n_settings):
        raise ValueError(f"{n_conditions} conditions (perturbation × media × time) need as many cells; got n_cells={n_cells}.")
