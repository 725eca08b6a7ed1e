"""Batches that share no condition are draws of one population (eqs 15, 16)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from perturbprob.experiment.paths import Pair
from perturbprob.model.assumptions.assumption import Assumption
from perturbprob.model.assumptions.evidence import AssumptionTest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

SHOWN = 4


@final
@dataclass(frozen=True)
class ExchangeableBatches(Assumption):
    """The batch effects of all batches are draws of one population, also where batches share no condition.

    V (eq 16) joins batches by the perturbations in media that they share, at whatever time. Where it falls into parts, the cells say
    nothing of how the batch effects of one part differ from those of another: any difference could as well be one of their
    conditions. `node` refuses such a screen unless this is declared: then priors alone tell them apart, η^b ~ Normal(0, τ_g²) with
    τ_g learnt from batches within parts (from its own prior where each part is one batch) against effects of conditions that shrink to 0.
    Comparisons within a part owe nothing to it. It adds no term, as these priors are part of the model, and no pair.

    >>> from perturbprob.experiment import datasets
    >>> ExchangeableBatches().test(datasets.ishikawa2023())
    ExchangeableBatches: not testable here: V is connected, each batch shares conditions with others, and nothing rests on it.
    """

    optional: ClassVar[bool] = False

    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return nothing: it adds no pair."""
        return []

    def _test(self, screen: "Screen") -> AssumptionTest:
        """Say that no screen that needs it can test it."""
        why = "V is connected, each batch shares conditions with others, and nothing rests on it."
        if not screen.layout.connected:
            why = f"batches fall into parts that share no condition ({_parts(screen)}), so how their batch effects differ was never seen."
        return AssumptionTest.impossible(type(self).__name__, "batch effects differ between parts", why)


def check_connected(screen: "Screen", assumptions: Sequence[Assumption]) -> None:
    """Refuse a disconnected V unless `ExchangeableBatches` is declared."""
    if screen.layout.connected or any(isinstance(a, ExchangeableBatches) for a in assumptions):
        return
    raise ValueError(
        f"Batches fall into {len(screen.layout.components())} parts that share no condition (a perturbation in a media, control included): "
        f"{_parts(screen)}. How the batch effects of these parts differ cannot be told from how their conditions differ. Fit each part by "
        "itself, name another batch column, or declare that all batches are draws of one population, so that their prior alone tells the "
        "parts apart: node(screen, assumptions=[ExchangeableBatches()]). The next screen should hold one condition, such as control, in "
        "every batch."
    )


def _parts(screen: "Screen") -> str:
    """Name the parts, the first few batches of each."""
    parts = screen.layout.components()
    named = [f"[{', '.join(part[:SHOWN])}{f' and {len(part) - SHOWN} more' if len(part) > SHOWN else ''}]" for part in parts[:SHOWN]]
    return ", ".join(named) + (f" and {len(parts) - SHOWN} more parts" if len(parts) > SHOWN else "")
