"""What an assumption is, what it becomes on one screen, and how several enter a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.paths import Pair
from perturbprob.experiment.screen import require_screen
from perturbprob.model.assumptions.evidence import AssumptionTest

if TYPE_CHECKING:
    from perturbprob.dynamics.transition import Transition
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel


Scale = Callable[[Float[Tensor, "*plate condition gene"]], Float[Tensor, "*plate condition gene"]]
"""From log shares, or the location of values, to what is compared."""


def as_is(location: Float[Tensor, "*plate condition gene"]) -> Float[Tensor, "*plate condition gene"]:
    """Compare log shares, or values, themselves."""
    return location


@final
@dataclass(frozen=True)
class Bound:
    """An assumption about certain conditions of one screen: their protocols, a weight for each, and the noise of each gene."""

    assumption: "Assumption"
    protocols: tuple[Protocol, ...] = ()
    weight: tuple[float, ...] = ()
    noise: Float[np.ndarray, "condition gene"] | None = None

    @property
    def name(self) -> str:
        """The name of the term in the model."""
        return self.assumption.name

    def globals(self) -> dict[str, Tensor]:
        """Sample the sites of the assumption's own."""
        return self.assumption.globals(self)

    def term(self, model: "CellModel", sites: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Return the log-density of the assumption, counted once."""
        return self.assumption.term(model, sites, self)

    def loss(self, model: "CellModel", sites: dict[str, Tensor], scale: Scale) -> Float[Tensor, ""]:
        """Return what the assumption adds to a loss of pairs (`Assumption.loss`)."""
        return self.assumption.loss(model, sites, self, scale)

    def mean_square(self, change: Float[Tensor, "condition gene"]) -> Float[Tensor, ""]:
        """Return the mean square of changes over genes and conditions, these by their weights."""
        weight = change.new_tensor(self.weight)
        return (weight * change.square().mean(-1)).sum() / weight.sum()

    def log_density(self, change: Float[Tensor, "condition gene"], excess: Tensor | None = None) -> Float[Tensor, " condition"]:
        """Return the log-density of each condition's change under its noise, which may exceed what is known of it."""
        noise = torch.as_tensor(self.noise, dtype=change.dtype, device=change.device)
        if excess is not None:
            noise = noise * (1 + excess)[:, None]
        return dist.Normal(torch.zeros_like(change), noise, validate_args=False).log_prob(change).sum(-1)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        noise = None if self.noise is None else self.noise.tolist()
        spec = {"kind": type(self.assumption).__name__} | vars(self.assumption)
        return {"assumption": spec, "protocols": list(map(repr, self.protocols)), "weight": list(self.weight), "noise": noise}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Bound":
        """Read back what `to_json` wrote."""
        spec = dict(values["assumption"])
        kind = _kinds()[spec.pop("kind")]
        spec = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
        noise = None if values["noise"] is None else np.array(values["noise"])
        return cls(kind(**spec), tuple(map(Protocol.parse, values["protocols"])), tuple(values["weight"]), noise)


class Assumption(ABC):
    """Something taken to be true of the cells, made explicit."""

    optional: ClassVar[bool] = True  # whether its screens can be fitted without it

    @property
    def name(self) -> str:
        """The name of the term in the model: the class in snake case."""
        return "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def refuses(self, transition: "Transition") -> str | None:
        """Say why a transition cannot carry it, in words that follow its name; None where it can."""
        return None

    def bind(self, screen: "Screen") -> Bound:
        """Return the assumption about one screen; refuse conditions that the screen does not hold."""
        return Bound(self)

    @property
    def learns_noise(self) -> bool:
        """Whether a noise is learnt with it, which only a density can weigh."""
        return False

    def globals(self, bound: Bound) -> dict[str, Tensor]:
        """Sample the sites of its own, above the cell plate; none by default."""
        return {}

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return the log-density that the assumption adds to the model; 0 where it holds by construction."""
        return model.log_share.new_zeros(())

    def loss(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound, scale: Scale) -> Float[Tensor, ""]:
        """Return what it adds to a loss of pairs (eq 5): the mean square of the change that it denies, on the ``scale`` compared."""
        return model.log_share.new_zeros(())

    @final
    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return the input-output pairs that it adds to those of eq 5."""
        require_screen(screen, partial=True)
        return self._pairs(screen)

    @abstractmethod
    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return the pairs."""

    @final
    def test(self, screen: "Screen") -> AssumptionTest:
        """Ask the screen: how large is the effect that is denied, how well is that known, and what makes it untestable."""
        require_screen(screen)
        return self._test(screen)

    @abstractmethod
    def _test(self, screen: "Screen") -> AssumptionTest:
        """Ask the screen."""


def _kinds() -> dict[str, type[Assumption]]:
    """Return every kind of assumption by its name."""
    return {kind.__name__: kind for kind in Assumption.__subclasses__()}


def bind(assumptions: Sequence[Assumption], screen: "Screen") -> list[Bound]:
    """Bind assumptions to a screen; refuse what is none, and one kind twice."""
    if isinstance(assumptions, Assumption | str):
        name = assumptions if isinstance(assumptions, str) else type(assumptions).__name__
        raise TypeError(f"assumptions= takes a list; write assumptions=[{name}(...)].")
    kinds = [type(a) for a in assumptions]
    for assumption in assumptions:
        if not isinstance(assumption, Assumption):
            known = ", ".join(f"{name}(...)" for name in _kinds())
            raise TypeError(f"An assumption is one of {known}; got {assumption!r}.")
        if kinds.count(type(assumption)) > 1:
            raise ValueError(f"{type(assumption).__name__} is given twice: give one with all its conditions.")
    return [assumption.bind(screen) for assumption in assumptions]
