"""How fast a fitted F parts neighbouring cells (B.2), measured at the cells of a screen."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from perturbprob.dynamics.neighbours import gradient_constant, map_constant
from perturbprob.experiment.settings import check_seed, is_within
from perturbprob.inference.draws import GIVEN_CELLS, Sites, check_draws, global_draws, require_likelihood, seeded
from perturbprob.inference.predict import labelled
from perturbprob.model.cells import Cells, CellTable

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit

CONSTANTS = {"map": map_constant, "gradient": gradient_constant}


def lipschitz_constant(
    fit: "Fit",
    screen: "Screen",
    *,
    of: str | Sequence[str] = ("map", "gradient"),
    n_cells: int = 20,
    n_draws: int = 20,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return the Lipschitz constant of F, and of its gradient, in each condition of a screen, at its cells (B.2).

    ``of`` "map": L with ‖F(x) − F(x′)‖ ≤ L ‖x − x′‖, the largest ‖∂z(t)/∂z₀‖₂. "gradient": L with ‖∇F(x) − ∇F(x′)‖ ≤ L ‖x − x′‖, the
    paper's inequality, the largest ‖D²F[u, ·]‖₂ over unit directions u. Both come from Jacobian-vector products at the rest states z₀
    that the guide gives to ``n_cells`` random cells of each condition, and are the largest over these cells: constants *at the data*,
    for neighbours near them. Elsewhere F may be steeper, and more cells find a larger constant. A unit is the spread of rest states.

    Returns a Dataset over (of, condition) with ``constant``, the mean over ``n_draws`` draws of all global sites and z₀, and ``lower``
    and ``upper``, the central interval of probability ``level`` over draws. "gradient" takes as many products as the square of the
    latent dimensions: in gene space ask for "map" alone. Of a fit with ``penetrance`` edited cells are taken to be hit. Raises ValueError
    for other words and for numbers out of range, and for a screen that the model does not know.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> found = pb.lipschitz_constant(fit, screen, n_cells=4, n_draws=3)
    >>> dict(found.sizes), bool((found["lower"] <= found["upper"]).all())
    ({'of': 2, 'condition': 6}, True)
    """
    require_likelihood(fit, GIVEN_CELLS)
    check_draws(n_draws)
    check_draws(n_cells, "n_cells")
    check_seed(seed)
    kinds = [of] if isinstance(of, str) else list(of)
    if not kinds or not set(kinds) <= set(CONSTANTS):
        raise ValueError(f"of={of!r}: use 'map' or 'gradient', or both.")
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")
    table = CellTable(fit.model, screen)
    chosen = _chosen(screen, n_cells if fit.model.start is None else 1, seed)  # a known start is the same for all cells
    cells, condition, draws = table.cells(chosen), torch.as_tensor(screen.condition)[chosen], []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="lipschitz_constant" if progress else None)):
        with torch.no_grad(), seeded(seed, k, 7):
            z0, flow = fit.guide.rest(cells).sample(), partial(_state, fit, sites, cells)
            draws.append(torch.stack([_largest(CONSTANTS[kind](flow, z0), condition, len(screen.conditions)) for kind in kinds]))
    values = torch.stack(draws)
    lower, upper = torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    attrs = {"level": level, "n_draws": n_draws, "n_cells": n_cells, "units": "per unit of latent distance at rest"}
    protocols = [fit.model.vocabulary.protocol(p) for p in screen.conditions]
    data = {"constant": values.mean(0), "lower": lower, "upper": upper}
    parts = [labelled(fit, protocols, {name: value[k] for name, value in data.items()}, attrs) for k in range(len(kinds))]
    return xr.concat(parts, pd.Index(kinds, name="of")).drop_vars("gene")


def _chosen(screen: "Screen", n_cells: int, seed: int) -> Int[Tensor, " cell"]:
    """Return the indices of so many random cells of each condition, or of all where there are fewer."""
    shuffled = np.random.default_rng(seed).permutation(screen.n_cells)
    rank = pd.Series(screen.condition[shuffled]).groupby(screen.condition[shuffled]).cumcount().to_numpy()
    return torch.as_tensor(np.sort(shuffled[rank < n_cells]))


def _state(fit: "Fit", sites: Sites, cells: Cells, z0: Float[Tensor, "*plate cell latent"]) -> Float[Tensor, "*plate cell latent"]:
    """Carry rest states through the cells' own protocols."""
    return fit.model.moved(sites, z0, cells.protocol).z


def _largest(value: Float[Tensor, " cell"], condition: Int[Tensor, " cell"], n_conditions: int) -> Float[Tensor, " condition"]:
    """Return the largest value of each condition's cells."""
    return torch.zeros(n_conditions).scatter_reduce(0, condition, value.cpu(), "amax")
