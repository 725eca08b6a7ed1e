"""The mean of every condition of a screen, with what is needed to say how well it is known."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob.experiment.moments import Moments, relative_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from perturbprob.experiment.action import Protocol
    from perturbprob.experiment.screen import Screen


def pseudobulk(screen: "Screen", *, normalise: bool = False) -> xr.Dataset:
    """Return mean and variance over cells of log(1 + count) in every condition, and the number of its cells.

    A Dataset over (condition, gene), conditions in the order of the screen:

    - ``mean`` (condition, gene): μ = Σ log(1 + x) / n over the n cells of the condition, in units of natural logs;
    - ``variance`` (condition, gene): Σ (log(1 + x) − μ)² / (n − 1), NaN where n is 1; ``variance / n_cells`` is the squared
      standard error of ``mean``;
    - ``n_cells`` (condition).

    With ``normalise``, x is the count divided by the cell's size factor. Conditions are named by ``str(protocol)`` and carry the
    coordinates perturbation, media, time. Cells × genes are never dense at once.

    >>> from perturbprob.experiment import datasets
    >>> means = pseudobulk(datasets.ishikawa2023())
    >>> dict(means.sizes), int(means["n_cells"].sum())
    ({'condition': 96, 'gene': 103}, 14945)
    >>> round(float(means["mean"].sel(condition="Knockout('NANOG') >> Wait(5)", gene="POU5F1")), 2)
    3.06
    """
    from perturbprob.experiment.screen import require_screen

    require_screen(screen)
    counts = relative_counts(screen.counts, screen.size_factor) if normalise else screen.counts.astype(np.float64)
    found = Moments.of(counts.log1p(), screen.condition, len(screen.conditions))
    data = {"mean": found.mean, "variance": found.unbiased_variance, "n_cells": found.n_cells}
    dims = {"mean": ("condition", "gene"), "variance": ("condition", "gene"), "n_cells": "condition"}
    attrs = {"scale": "log1p", "normalised": int(normalise)}
    return xr.Dataset({k: (dims[k], v) for k, v in data.items()}, condition_coordinates(screen, screen.conditions), attrs)


def condition_coordinates(screen: "Screen", conditions: "Sequence[Protocol]") -> dict[str, object]:
    """Return the coordinates of values over (condition, gene): names, and perturbation, media and time of each condition."""
    return {
        "condition": [str(p) for p in conditions],
        "gene": list(screen.genes),
        "perturbation": ("condition", [p.perturbation for p in conditions]),
        "media": ("condition", [p.media or screen.baseline or "baseline" for p in conditions]),
        "time": ("condition", [p.time for p in conditions], {"units": screen.time_unit} if screen.time_unit else {}),
    }
