"""Where cells end: the share of each branch under each condition (C.1)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike
from torch import Tensor

from perturbprob.experiment.action import Action, Protocol
from perturbprob.experiment.reading import named_values
from perturbprob.experiment.screen import require_screen
from perturbprob.experiment.settings import is_within
from perturbprob.inference.draws import check_draws, global_draws, require_fit, seeded
from perturbprob.inference.escape import population
from perturbprob.inference.latent import latent
from perturbprob.inference.predict import conditions_of, labelled

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit

N_CELLS = 500
"""How many cells of each condition are simulated per draw."""


@torch.no_grad()
def branch_shares(
    fit: "Fit",
    screen: "Screen",
    branches: ArrayLike,
    conditions: Protocol | Action | Sequence[Protocol | Action] | None = None,
    *,
    n_draws: int = 50,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return the share of cells that end in each branch, per condition, with intervals over posterior draws.

    ``branches`` names the branch of each cell of ``screen``, such as a lineage or a cluster; None, NaN or "" leaves a cell out. A Series
    with names of cells is taken by these. The latent states z(t)
    of the named cells give each branch a mean, and all of them one covariance; then, per draw of the globals, 500 cells of each
    condition are drawn at rest, carried through their protocol with their noise, and each counts for the branch of the nearest mean in that
    covariance (linear discriminant analysis with even odds). ``conditions`` are by default those of the fit. Returns a Dataset over
    (condition, branch) with ``mean``, ``lower`` and ``upper``.

    Raises ValueError for fewer than two branches, or one of no more cells than latent axes.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.neural_sde(screen, n_latent=2, n_steps=4), screen, epochs=2, progress=False)
    >>> named = ["up" if deep else "down" for deep in screen.size_factor > 1]
    >>> pb.branch_shares(fit, screen, named, n_draws=4, progress=False).sizes
    Frozen({'condition': 6, 'branch': 2})
    """
    require_fit(fit)
    require_screen(screen)
    check_draws(n_draws)
    protocols = conditions_of(fit, conditions)
    if not is_within(level, 0, 1):
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")
    names, centre, whiten = _discriminant(fit, screen, _labels(branches, screen))
    parts = [(c, part) for c, p in enumerate(protocols) for part in population(fit, p)]
    of, segments = (
        torch.tensor([c for c, _ in parts]),
        [s.to(centre.device) for s in fit.model.vocabulary.encode([p.protocol for _, p in parts])],
    )
    found = []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="branches" if progress else None)):
        with seeded(seed, k, 9):
            rest = fit.model.at_rest(N_CELLS).sample()[:, None].expand(-1, len(parts), -1)
        z = fit.model.moved(sites, rest, segments).z
        nearest = torch.cdist(z @ whiten, centre @ whiten).argmin(-1)
        ended = torch.nn.functional.one_hot(nearest, len(names)).double().mean(0).cpu()
        share = torch.tensor([part.share(sites) for _, part in parts], dtype=torch.double)[:, None]
        found.append(torch.zeros(len(protocols), len(names), dtype=torch.double).index_add(0, of, share * ended))
    shares = torch.stack(found)
    lower, upper = torch.quantile(shares, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=shares.dtype), dim=0)
    data = {"mean": shares.mean(0), "lower": lower, "upper": upper}
    attrs: dict[str, object] = {"units": "share of cells", "level": level, "n_draws": n_draws}
    return labelled(fit, protocols, data, attrs, features=names).rename(feature="branch")


def _labels(branches: ArrayLike, screen: "Screen") -> Shaped[np.ndarray, " cell"]:
    """Return the branch of each cell as a word, "" for none; a Series with names of cells is taken by these."""
    if isinstance(branches, pd.Series) and not isinstance(branches.index, pd.RangeIndex):
        branches = named_values(branches, screen.cells, "branches=")
    labels = np.array(branches, dtype=object)
    if labels.shape != (screen.n_cells,):
        found = f"{branches!r}" if not labels.ndim else f"values of shape {labels.shape}"
        raise ValueError(
            f"branches= gives the branch of each of the {screen.n_cells:,} cells of the screen, or None; got {found}. Give a column of obs."
        )
    return np.array(["" if pd.isna(b) else str(b) for b in labels])


def _discriminant(
    fit: "Fit", screen: "Screen", branches: Shaped[np.ndarray, " cell"]
) -> tuple[list[str], Float[Tensor, "branch latent"], Float[Tensor, "latent latent"]]:
    """Return the names of the branches, their means in the latent state, and what makes their common covariance the identity."""
    names = sorted({str(b) for b in branches if b})
    if len(names) < 2:
        raise ValueError(f"Shares of branches need at least two; branches= names {', '.join(names) or 'none'}.")
    state = torch.as_tensor(latent(fit, screen)["state"])
    few = {n: int((branches == n).sum()) for n in names if (branches == n).sum() <= state.shape[1]}
    if few:
        raise ValueError(
            f"Each branch needs more cells than the {state.shape[1]} latent axes; found {few}. Name more cells, or leave it out."
        )
    of = [state[torch.as_tensor(branches == n)] for n in names]
    within = torch.cat([part - part.mean(0) for part in of])
    covariance = within.T @ within / (len(within) - len(names))
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance + 1e-6 * torch.eye(state.shape[1]))).T
    return names, torch.stack([part.mean(0) for part in of]).to(fit.model.log_share), whiten.to(fit.model.log_share)
