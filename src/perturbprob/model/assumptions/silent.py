"""Perturbations that do nothing in baseline media (eqs 13-14, appendix A)."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.action import Protocol, Wait
from perturbprob.experiment.paths import Pair, state
from perturbprob.experiment.silence import silence
from perturbprob.experiment.vocabulary import labels, meant, nearest
from perturbprob.model.assumptions.assumption import Assumption, Bound, Scale, as_is
from perturbprob.model.assumptions.evidence import AssumptionTest
from perturbprob.model.assumptions.terms import carried, log_shares, standard_error

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel


@final
@dataclass(frozen=True)
class SilentInBaseline(Assumption):
    """These perturbations do nothing in baseline media: X_t^p = X^p (eqs 13-14, appendix A).

    ``conditions``: perturbation names, each meaning every kind of perturbation of these genes, or "auto", all. The term is the
    difference in baseline media and nothing else: for each perturbation and time, that from control, in log share averaged over rest
    states and with the expected condition effect, is Normal(0, noise), the noise being the standard error of that difference.

    The pairs counted are F(X_t^p, ·, m, t) → X_{m,t}^p, one for each perturbation and media beside the baseline. They need no term of
    their own: where X_t^p = X^p, a cell kept with its perturbation in baseline media starts as X^p does, and the pair
    follows from F(X, p, m, t) → X_{m,t}^p of eq 5.
    """

    conditions: str | tuple[str, ...] = "auto"

    def __init__(self, conditions: str | Sequence[str] = "auto") -> None:
        """Keep the names."""
        several = (conditions,) if isinstance(conditions, str) and conditions != "auto" else conditions
        if not len(several) or not all(isinstance(name, str) for name in several):
            raise ValueError(f"SilentInBaseline takes names of perturbations, such as ['SOX2'], or 'auto'; got {conditions!r}.")
        object.__setattr__(self, "conditions", several if several == "auto" else tuple(dict.fromkeys(several)))

    def bind(self, screen: "Screen") -> Bound:
        """Find the conditions in baseline media, or where they were not measured what they would be, and their noise."""
        protocols = tuple(self._protocols(screen))
        if not protocols:
            raise ValueError("SilentInBaseline is about perturbations, and this screen has none. Leave it out.")
        if len(screen.media) < 2:
            warnings.warn(
                f"SilentInBaseline on a screen of one media, {screen.media[0]!r}, says that these perturbations do nothing at all, and "
                "shrinks their effects. Leave it out, or read the screen with baseline= if this media is not the baseline.",
                stacklevel=2,
            )
        noise = np.hypot(standard_error(screen, protocols), standard_error(screen, [p.unperturbed() for p in protocols]))
        return Bound(self, protocols, (1.0,) * len(protocols), noise)

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return Σ_p Σ_g log Normal(difference_pg | 0, noise_pg)."""
        return bound.log_density(self.change(model, sites, bound.protocols)).sum()

    def loss(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound, scale: Scale) -> Float[Tensor, ""]:
        """Return the mean square of the difference over perturbations, times and genes."""
        return bound.mean_square(self.change(model, sites, bound.protocols, scale))

    def change(
        self, model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol], scale: Scale = as_is
    ) -> Float[Tensor, "condition gene"]:
        """Return the difference of each condition from control, averaged over rest states."""
        here, control = (
            scale(log_shares(model, sites, carried(model, sites, done), done)).mean(0)
            for done in (protocols, [p.unperturbed() for p in protocols])
        )
        return here - control

    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return F(X_t^p, ·, m, t) → X_{m,t}^p for each perturbation and media beside the baseline: n_S n_m pairs."""
        baseline = screen.baseline or "baseline"
        media = [m for m in screen.media if m != baseline]
        return [
            Pair(type(self).__name__, 1, p, m, state(p, baseline, baseline), f"(·, {m}, t)", state(p, m, baseline))
            for p in self._names(screen)
            for m in media
        ]

    def _test(self, screen: "Screen") -> AssumptionTest:
        """Ask how many genes perturbations change in other media for each that they change in baseline media, at matched cell numbers."""
        found = silence(screen, self._names(screen))
        what = "genes changed in other media for each changed in baseline media, at matched numbers of cells:"
        power = 0.5 * math.erfc((1.645 - abs(math.log(found.ratio)) / max(found.spread, 1e-12)) / math.sqrt(2))
        smallest = math.exp((1.645 + 0.842) * found.spread)
        return AssumptionTest(type(self).__name__, what, found.ratio, found.interval, smallest, power, found.confounds)

    def _names(self, screen: "Screen") -> list[str]:
        """Return the labels of the perturbations, each known to the screen."""
        if self.conditions == "auto":
            return sorted(set(labels(screen.conditions)) - {"control"})
        for name in self.conditions:
            if name not in screen.perturbations:
                raise ValueError(
                    f"SilentInBaseline names {name!r}, which is no perturbation of this screen. {nearest(name, screen.perturbations)}"
                )
        return list(dict.fromkeys(label for name in self.conditions for label in meant(name, screen.conditions)))

    def _protocols(self, screen: "Screen") -> list[Protocol]:
        """Return each perturbation alone at each time of the screen."""
        kinds = {label: p.perturbations for label, p in zip(labels(screen.conditions), screen.conditions, strict=True)}
        return [Protocol([*kinds[name], Wait(time)]) for name in self._names(screen) for time in screen.times]
