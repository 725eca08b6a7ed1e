"""Screens with known truth, from a generator that shares nothing with the fitted model: a gene network at rest, disturbed."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData
from scipy.integrate import solve_ivp
from scipy.sparse import csr_matrix

from perturbprob.experiment.action import Knockout, Media, Protocol, Wait
from perturbprob.experiment.screen import Screen

_PROGRAMMES = 3  # latent programmes in which cells differ
_DEPTH_SD = 0.3  # standard deviation of the log size factor
_MAX_LOG_PRODUCTION = 2.0  # no input raises or lowers production by more than this, so that strong networks stay bounded


@dataclass(frozen=True)
class Simulation:
    """A simulated screen and the truth behind it.

    ``adata`` holds raw counts (CSR, float32) with the obs columns perturbation, perturbation_type, media, time and batch.
    ``truth`` holds identified quantities with named dims, natural logs throughout:

    - ``rate_share`` (condition, gene): expected share of a cell's counts at η = 0, averaged over cells; rows sum to 1.
    - ``log_fold_change`` (condition, gene): log of that share against control of the same media and time.
    - ``batch_effect`` (batch, gene): η^b on the log rate; sums to 0 over batches, and over genes weighted by the share of
      control in the first media (that constant is depth).
    - ``dispersion`` (gene): θ of the negative binomial, whose variance is μ + μ²/θ.
    - ``network`` (gene, regulator): log change of the gene's production when the regulator's product is removed, sign reversed.
    - ``active`` (target): whether knocking this gene out does anything.
    - ``size_factor`` (cell): depth of each cell relative to the median of their law.

    The condition axis is labelled by ``str(Protocol)`` and carries the coordinates perturbation, media and time.
    """

    adata: AnnData
    truth: xr.Dataset

    @cached_property
    def screen(self) -> Screen:
        """The counts as a `Screen`, the first media being the baseline."""
        baseline = str(self.truth["media"].values[0])
        return Screen.from_anndata(self.adata, media="media", baseline=baseline, time="time", batch="batch")


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
    """Simulate a knock-out screen: control and ``n_perturbations`` knock-outs in every media at every time, in ``n_batches``.

    Transcripts r (relative to rest) follow dr/dt = d ⊙ (exp f(W (h(q) − 1) + c_m) − r) from r = 1, where h(q) = 2q / (1 + q),
    f saturates at ±2, c_m is the input of the media (0 in the first, the baseline) and the product q is r, or 0 for a
    gene knocked out, whose transcript stays. Cells differ in three latent programmes u ~ N(0, I), and

        counts ~ NB(mean = depth · size factor · softmax(log base + log r + L u) · exp(η^b), dispersion θ).

    Screen: ``media`` names (the first is the baseline), ``times`` ≥ 0, and ``unequal``, from 0 (all batches have the same
    composition of conditions, to within a cell) to 1 (each condition falls mostly into one or two batches).
    Size of things, in natural logs: ``batch_scale`` (sd of η before centring), ``effect_scale`` (mean weight of an edge
    and of a media input), ``heterogeneity`` (sd between cells). ``inactive`` is the share of knock-outs that do nothing at
    all, ``dispersion`` the median of θ, ``depth`` the median total of a cell. The truth about control, network and
    effects depends on ``seed`` only, not on the numbers of cells and batches. Cells without counts are drawn again.

    Raises ValueError for a setting out of range, fewer cells than conditions, and a batch left without cells.

    >>> simulation = simulate(n_cells=300, n_genes=20, n_perturbations=4, media=("baseline", "BMP4"), seed=1)
    >>> simulation.adata.shape, dict(simulation.truth["log_fold_change"].sizes)
    ((300, 20), {'condition': 20, 'gene': 20})
    >>> bool(abs(simulation.truth["batch_effect"].sum("batch")).max() < 1e-12)
    True
    """
    _check_sizes(n_cells=n_cells, n_genes=n_genes, n_perturbations=n_perturbations, n_batches=n_batches, seed=seed)
    _check_levels(media, times)
    _check_scales(batch_scale=batch_scale, effect_scale=effect_scale, heterogeneity=heterogeneity)
    _check_range(0, 1, inactive=inactive, unequal=unequal)
    _check_range(1e-3, 1e6, dispersion=dispersion)
    _check_range(1, 1e9, depth=depth)
    world, lanes, cells = (np.random.default_rng([seed, stream]) for stream in range(3))  # so that more cells keep the truth
    gene = [f"G{i + 1:0{len(str(n_genes))}d}" for i in range(n_genes)]
    base, decay, theta = _gene_constants(world, n_genes, dispersion)
    loadings = world.normal(0, heterogeneity / np.sqrt(_PROGRAMMES), (_PROGRAMMES, n_genes))
    target = np.sort(world.choice(n_genes, n_perturbations, replace=False))
    network = _network(world, n_genes, target, round(inactive * n_perturbations), effect_scale)
    context = {name: _media_input(world, n_genes, effect_scale) if i else np.zeros(n_genes) for i, name in enumerate(media)}

    courses = {(p, m): _time_course(network, decay, context[m], p, sorted(times)) for p in (None, *target) for m in media}
    log_rate = base + np.log(np.concatenate(list(courses.values())))
    share = np.stack([_expected_share(row, loadings) for row in log_rate])
    conditions = [(gene[p] if p is not None else "control", m, t) for p, m in courses for t in sorted(map(float, times))]
    eta = _batch_effect(lanes, n_batches, batch_scale, share[0])

    condition, batch = _layout(cells, n_cells, len(conditions), n_batches, unequal)
    size_factor = np.exp(cells.normal(0, _DEPTH_SD, n_cells))
    programme = cells.standard_normal((n_cells, _PROGRAMMES))
    mean = depth * size_factor[:, None] * _softmax(log_rate[condition] + programme @ loadings) * np.exp(eta[batch])
    counts = _negative_binomial(cells, mean, theta)

    obs = pd.DataFrame([conditions[c] for c in condition], columns=["perturbation", "media", "time"])
    obs = obs.assign(perturbation_type="knockout", batch=[f"batch{b + 1}" for b in batch]).set_index("cell" + (obs.index + 1).astype(str))
    adata = AnnData(csr_matrix(counts, dtype=np.float32), obs=obs, var=pd.DataFrame(index=gene))
    truth = xr.Dataset(
        {
            "rate_share": (("condition", "gene"), share),
            "log_fold_change": (("condition", "gene"), _against_control(share, len(media) * len(times))),
            "batch_effect": (("batch", "gene"), eta),
            "dispersion": ("gene", theta),
            "network": (("gene", "regulator"), network),
            "active": ("target", network[:, target].any(axis=0)),
            "size_factor": ("cell", size_factor),
        },
        coords={
            **_condition_coordinates(conditions, media[0]),
            "gene": gene,
            "regulator": gene,
            "target": [gene[p] for p in target],
            "batch": [f"batch{b + 1}" for b in range(n_batches)],
            "cell": obs.index.to_numpy(),
        },
    )
    return Simulation(adata, truth)
