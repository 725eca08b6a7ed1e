"""The edges of a fitted network: signed weights with intervals, and how probable each is."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob.experiment.settings import is_within
from perturbprob.inference.draws import check_draws, global_draws, require_fit
from perturbprob.model.network_effect import NetworkEffect

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit


def edges(fit: "Fit", *, n_draws: int = 200, level: float = 0.9, seed: int = 0) -> xr.Dataset:
    """Return the edges of the network of a `causal_context`: a Dataset over (gene, regulator).

    ``weight`` is the posterior mean of W, how far the target of a gene's log rate moves per unit of the regulator's product (1 at rest),
    ``lower`` and ``upper`` bound its central ``level`` interval; ``probability`` is the share of draws in which the gate of the edge
    is more than half open, and ``positive`` that in which W is above 0. The diagonal is NaN: what a gene does to itself is not told apart
    from its decay. ``perturbed`` says whether a regulator was perturbed; edges from others rest on what moved them.

    A fit of `stationary` has one best weight for each edge, and no draws: ``lower``, ``upper``, ``probability`` and ``positive`` are NaN.

    Raises ValueError for a fit without a network.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.causal_context(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> pb.edges(fit, n_draws=20).sizes
    Frozen({'gene': 10, 'regulator': 10})
    """
    require_fit(fit)
    check_draws(n_draws)
    if not is_within(level, 0, 1):
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")
    if not isinstance(fit.model.mark_effect, NetworkEffect):
        raise ValueError("This fit has no network over genes. Fit a causal_context to ask for edges.")
    names, found = fit.model.vocabulary, list(global_draws(fit.model, fit.guide, n_draws, seed))
    weight, gate = (np.stack([s.get(name, s["network"]).cpu().numpy() for s in found]) for name in ("network", "edge_gate"))
    lower, upper = np.quantile(weight, [(1 - level) / 2, (1 + level) / 2], axis=0)
    values = {
        "weight": weight.mean(0),
        "lower": lower,
        "upper": upper,
        "probability": (gate > 0.5).mean(0),
        "positive": (weight > 0).mean(0),
    }
    if fit.settings["objective"] == "kds":
        values |= {name: np.full_like(value, np.nan) for name, value in values.items() if name != "weight"}
    diagonal = np.eye(len(names.genes), dtype=bool)
    genes, done = list(names.genes), {p.gene for p in names.perturbations}
    return xr.Dataset(
        {name: (("gene", "regulator"), np.where(diagonal, np.nan, value)) for name, value in values.items()},
        {"gene": genes, "regulator": genes, "perturbed": ("regulator", [g in done for g in genes])},
        {"level": level, "n_draws": n_draws},
    )
