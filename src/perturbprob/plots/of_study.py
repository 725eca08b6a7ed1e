"""Figures of studies."""

from typing import TYPE_CHECKING

import numpy as np

from perturbprob.plots.axes import BLUE, GREEN, GREY, RED, new_figure
from perturbprob.studies.proof_of_principle import ProofOfPrinciple

if TYPE_CHECKING:
    import matplotlib.figure

COLOURS = (GREY, BLUE, GREEN, RED, "#CC79A7", "#56B4E9", "#999933", "#882255")


def proof_of_principle(found: ProofOfPrinciple, *, figure: "matplotlib.figure.Figure | None" = None) -> "matplotlib.figure.Figure":
    """Draw Figure 4: the error on the hidden time over the steps of training, a panel for each start, a band over the seeds of each loss.

    Dashed lines are the three best baselines, the dotted one is the noise floor: what would be left of a perfect prediction.

    >>> import perturbprob as pb
    >>> screen = pb.datasets.ishikawa2023()
    >>> found = pb.proof_of_principle(screen, seeds=2, steps=2, losses=("eq5",), progress=False)
    >>> len(pb.plots.proof_of_principle(found).axes)
    2
    """
    starts = found.curve["start"].values
    figure = new_figure((5.2 * len(starts), 4.2)) if figure is None else figure
    panels = figure.subplots(1, len(starts), sharey=True, squeeze=False)[0]
    best = sorted(found.baselines.items(), key=lambda item: item[1])[:3]
    for axes, start in zip(panels, starts, strict=True):
        for loss, colour in zip(found.curve["loss"].values, COLOURS, strict=False):
            part = found.curve.sel(start=start, loss=loss)
            low, high = (part.quantile(q, "seed") for q in (0.05, 0.95))
            axes.plot(part["step"], part.mean("seed"), color=colour, label=str(loss))
            axes.fill_between(part["step"], low, high, color=colour, alpha=0.2, lw=0)
        for k, (name, value) in enumerate(best):
            axes.axhline(value, color="black", lw=0.8, ls=("--", "-.", (0, (5, 1)))[k], label=name)
        axes.axhline(found.floor, color="black", lw=0.8, ls=":", label="noise floor")
        axes.set(xlabel="step", title=f"start: {start}", yscale="log")
        axes.set_ylim(0.9 * found.floor, float(np.quantile(found.curve.isel(step=slice(1, None)), 0.98)) * 1.1)
    panels[0].set_ylabel("mean squared error on the hidden time")
    panels[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
