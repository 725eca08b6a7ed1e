"""What a screen says of an assumption."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

import numpy as np
from jaxtyping import Float

from perturbprob.experiment import rest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


Choose = Callable[[rest.Course, str], Float[np.ndarray, "part condition"]]


@final
@dataclass(frozen=True)
class AssumptionTest:
    """What a screen says of an assumption: the ``effect`` that it denies, its 90 % interval, and what a screen of this size could see.

    ``smallest`` is the effect that this screen would detect with a probability of 0.8; ``confounds`` says, in words, what cannot be told
    apart here. Where there is any, or nothing was measured, ``testable`` is False.
    """

    name: str
    what: str
    effect: float
    interval: tuple[float, float]
    smallest: float
    power: float
    confounds: tuple[str, ...] = ()

    @property
    def testable(self) -> bool:
        """Whether the screen can test the assumption at all."""
        return not self.confounds and math.isfinite(self.effect)

    @classmethod
    def impossible(cls, name: str, what: str, why: str) -> Self:
        """Return the test of what a screen cannot tell at all, and why."""
        return cls(name, what, math.nan, (math.nan, math.nan), math.nan, math.nan, (why,))

    @classmethod
    def of_movement(cls, name: str, what: str, screen: "Screen", chosen: Choose, media: Sequence[str]) -> Self:
        """Ask how far some conditions move beyond noise, root mean square over them; say why where the screen cannot tell.

        ``chosen`` picks mean squares, their standard errors and those if nothing moved, (part, condition), from the `rest.Course` of
        each media, named beside it.
        """
        unseen = [m for m in media if m not in screen.media]
        if unseen or not media:
            where = f"in media {unseen[0]!r}" if unseen else "of these conditions"
            return cls.impossible(name, what, f"the screen holds no cells {where}.")
        try:
            parts = np.concatenate([chosen(rest.Course.of(screen, m), m) for m in media], axis=1)
        except ValueError as error:
            return cls.impossible(name, what, str(error))
        known = parts[:, np.isfinite(parts).all(axis=0)]
        if not known.size:
            return cls.impossible(name, what, "none of these conditions was seen at two sequential times.")
        n, square = known.shape[1], float(known[0].mean())
        error, null = (float(np.sqrt((row**2).sum()) / n) for row in known[1:])
        # a mean square below 0 is noise: the upper end is that of 0, not of what noise took away
        ends = (square - 1.645 * error, max(square, 0.0) + 1.645 * error, (1.645 + 0.842) * null)
        low, high, smallest = (math.sqrt(max(0.0, value)) for value in ends)
        power = 0.5 * math.erfc((1.645 * null - square) / error / math.sqrt(2))
        return cls(name, what, math.sqrt(max(0.0, square)), (low, high), smallest, power, _time_confounds(screen))

    def __repr__(self) -> str:
        """Say it in words."""
        if not math.isfinite(self.effect):
            return "\n".join(f"{self.name}: not testable here: {words}" for words in self.confounds)
        low, high = self.interval
        lines = [
            f"{self.name}: {self.what} {self.effect:.3g} (90 % interval {low:.3g} to {high:.3g})",
            f"  smallest effect seen with a power of 0.8: {self.smallest:.3g}; power at the effect found: {self.power:.2f}",
        ]
        lines += [f"  not testable here: {words}" for words in self.confounds]
        return "\n".join(lines)


def _time_confounds(screen: "Screen") -> tuple[str, ...]:
    """Say what hides a change over time."""
    pairs = [*screen.layout.confounded(), *screen.layout.nested()]
    if any({"time", "batch"} == set(pair) for pair in pairs):
        return ("each time is one batch, so a change over time cannot be told from a batch effect.",)
    return ()
