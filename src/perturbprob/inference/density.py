"""Held-out log density: the one estimator."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from perturbprob.inference.draws import Sites, bar, check_draws, global_draws, require_likelihood, seeded
from perturbprob.model.cells import Cells, CellTable
from perturbprob.model.penetrance import fold

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel
    from perturbprob.model.guide import Guide

CHUNK = 2_000_000
"""How many values of cells × genes × particles are held at once."""


@torch.no_grad()
def importance(
    model: "CellModel", guide: "Guide", sites: Sites, cells: Cells, particles: int, *, seed: tuple[int, ...] = (0,)
) -> Float[Tensor, " cell"]:
    """Return log p(x | globals) of each cell, by importance sampling of z₀ from the encoder: log mean_k p(x | z_k) p(z_k) / q(z_k | x).

    Of unfolded cells it is log p(x, h | globals) of each row.
    """
    encoder, rest = guide.rest(cells), model.at_rest(len(cells))
    step = max(1, CHUNK // max(1, cells.counts.numel()))
    parts = []
    with seeded(*seed):
        for size in [min(step, particles - k) for k in range(0, particles, step)]:
            z = encoder.sample((size,))
            seen = model.seen(sites, model.moved(sites, z, cells.protocol), cells)
            log_prob = sum(law.log_prob(counts).sum(-1) for _, law, counts in seen)
            parts.append(log_prob + rest.log_prob(z) - encoder.log_prob(z))
    density = torch.logsumexp(torch.cat(parts), 0) - math.log(particles)
    if model.penetrance is None or cells.hits is None:
        return density
    return density + model.penetrance.law(sites, cells.hits).log_prob(cells.hits.hit)


@torch.no_grad()
def log_density(
    fit: "Fit", screen: "Screen", particles: int = 100, *, n_draws: int = 10, minibatch: int = 256, seed: int = 0, progress: bool = True
) -> xr.DataArray:
    """Return the log predictive density of each cell of a screen, dim (cell,), in nats.

    log (1/S) Σ_s (1/K) Σ_k p(x | z_k, globals_s) p(z_k) / q(z_k | x): the log of the mean over ``n_draws`` global draws of the
    importance average
    over ``particles`` draws of z₀. Comparable between models on the same cells and genes; divide by the number of genes for a
    density per count. The importance average is biased low by less the more particles there are. The screen may be the training screen
    or held-out cells; a held-out condition whose perturbation and media are known is allowed.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> pb.log_density(fit, screen, particles=5).sizes["cell"]
    200
    """
    require_likelihood(fit, "log_density is the log of a likelihood")
    check_draws(particles, "particles")
    check_draws(minibatch, "minibatch")
    table = CellTable(fit.model, screen)
    draws = []
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed)):
        with seeded(seed, k, 1):
            draws.append(table.sites(draw))
    values = []
    steps = -(-screen.n_cells // minibatch)
    for number, cells in enumerate(
        bar(table.minibatches(minibatch, unfolded=True), "log density", "minibatch", progress=progress, total=steps)
    ):
        each = [importance(fit.model, fit.guide, sites, cells, particles, seed=(seed, k, 4 + number)) for k, sites in enumerate(draws)]
        density = torch.stack(each) if cells.hits is None else fold(torch.stack(each), cells.hits.of)
        values.append(torch.logsumexp(density, 0) - math.log(n_draws))
    return xr.DataArray(
        torch.cat(values).cpu().numpy().astype(np.float64), dims="cell", coords={"cell": list(screen.cells)}, name="log_density"
    )
