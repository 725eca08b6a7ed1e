"""Figures of studies."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbprob.plots.axes import BLUE, GREEN, GREY, RED, name_axis, new_axes, new_figure
from perturbprob.studies.proof_of_principle import ProofOfPrinciple

if TYPE_CHECKING:
    import matplotlib.axes
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


def compare(table: pd.DataFrame, *, ax: "matplotlib.axes.Axes | None" = None) -> "matplotlib.figure.Figure":
    """Draw what `compare` returned: how far each fit falls behind the best on the same cells, and one standard error of that.

    The best is on top, at 0, which has no error; a fit without a likelihood is left out. What reaches 0 is no worse than the best, as far
    as these conditions tell.

    >>> import pandas as pd
    >>> import perturbprob as pb
    >>> table = pd.DataFrame({"difference": [0.0, -0.02], "standard_error": [0.0, 0.01]}, index=["node", "vae"])
    >>> [label.get_text() for label in pb.plots.compare(table).axes[0].get_yticklabels()]
    ['node', 'vae']
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"plots.compare draws what compare returned; got {type(table).__name__}. Draw pb.compare(fits, test).")
    if not {"difference", "standard_error"} <= set(table.columns):
        found = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"plots.compare draws what compare returned; this table has the columns {found}. Draw pb.compare(fits, test).")
    shown = table[table["difference"].notna()]
    axes = new_axes(ax, (6.5, 0.35 * len(shown) + 1.2))
    axes.axvline(0, color="black", lw=0.8, ls=":")
    axes.errorbar(shown["difference"], range(len(shown)), xerr=shown["standard_error"], fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    name_axis(axes.yaxis, shown.index)
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel="held-out log density per count, behind the best (nats)", ylim=(len(shown) - 0.5, -0.5))
    return axes.figure.figure
