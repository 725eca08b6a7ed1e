"""Conditions that have come to rest (eqs 7-9)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment import rest
from perturbprob.experiment.action import Protocol, Wait
from perturbprob.experiment.paths import Pair, path_of, state
from perturbprob.experiment.vocabulary import nearest
from perturbprob.model.assumptions.assumption import Assumption, Bound
from perturbprob.model.assumptions.evidence import AssumptionTest
from perturbprob.model.assumptions.terms import carried, log_shares, standard_error

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel


LEAST_WEIGHT = 1e-3


@final
@dataclass(frozen=True)
class SteadyState(Assumption):
    """These conditions have come to rest: waiting longer does not change them (eqs 7-9).

    ``conditions``: perturbation names or protocols, or "auto", every condition weighted by its probability of rest, but for those not
    seen at the last time of their media, which may be held out. ``wait``: how much longer they are left, in the unit of the screen. The
    term is one pseudo-observation per condition: the change over ``wait``, in log rate averaged over rest states, is Normal(0, noise),
    the noise being that between random halves of the condition's cells; weighted by the probability of rest where the screen can tell
    it. ``scale`` "fixed" takes that noise, "learnt" multiplies it by 1 + u, u ~ Exponential(1): never below the noise, since a free
    scale would go to 0 and switch the field off.

    ``reading`` of eq 9: "own" leaves the perturbation's mark on, "control_input" takes it off, F(X_t^p, ·, ·, s). With
    ``relative_to_control`` the change of control over the same wait is subtracted, for screens with a drift that all cells share.
    """

    conditions: str | tuple[str, ...] = "auto"
    wait: float = 1.0
    reading: str = "own"
    scale: str = "fixed"
    relative_to_control: bool = False
    needs_semigroup: ClassVar[bool] = True

    def __init__(
        self,
        conditions: str | Sequence[str | Protocol] = "auto",
        wait: float = 1.0,
        *,
        reading: str = "own",
        scale: str = "fixed",
        relative_to_control: bool = False,
    ) -> None:
        """Check the words and the wait."""
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not (math.isfinite(wait) and wait > 0):
            raise ValueError(f"SteadyState needs a wait above 0, in the unit of the screen; got {wait!r}.")
        if reading not in ("own", "control_input"):
            raise ValueError(f"Unknown reading {reading!r} of eq 9. Use 'own' or 'control_input'.")
        if scale not in ("fixed", "learnt"):
            raise ValueError(f"Unknown scale {scale!r}. Use 'fixed' or 'learnt'.")
        if isinstance(conditions, str) and conditions != "auto":
            conditions = (conditions,)
        values = {"conditions": conditions if conditions == "auto" else tuple(map(_text, conditions)), "wait": float(wait)}
        for name, value in (values | {"reading": reading, "scale": scale, "relative_to_control": relative_to_control}).items():
            object.__setattr__(self, name, value)

    def bind(self, screen: "Screen") -> Bound:
        """Find the last state of each condition in the screen, its weight and its noise."""
        protocols = _last(screen, self.conditions)
        _refuse_held_out(screen, protocols)
        weight = _probability_of_rest(screen, protocols)
        kept = [k for k, w in enumerate(weight) if w > LEAST_WEIGHT] or list(range(len(weight)))
        chosen = tuple(protocols[k] for k in kept)
        return Bound(self, chosen, tuple(weight[k] for k in kept), 2 * standard_error(screen, chosen))

    def globals(self, bound: Bound) -> dict[str, Tensor]:
        """Sample by how much each condition's scale exceeds its noise, where it is learnt."""
        if self.scale == "fixed":
            return {}
        site = f"{self.name}_excess"
        return {site: pyro.sample(site, dist.Exponential(torch.ones(len(bound.protocols))).to_event(1))}

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return Σ_c w_c Σ_g log Normal(change_cg | 0, noise_cg)."""
        change = self._change(model, sites, bound.protocols)
        if self.relative_to_control:
            change = change - self._change(model, sites, [p.unperturbed() for p in bound.protocols])
        weight = change.new_tensor(bound.weight)
        return (weight * bound.log_density(change, sites.get(f"{self.name}_excess"))).sum()

    def _change(self, model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol]) -> Float[Tensor, "condition gene"]:
        """Return the change of each condition's mean log share over the wait, its condition effect's expected change included."""
        state = carried(model, sites, protocols)
        start = state if self.reading == "own" else replace(state, perturbation=torch.zeros_like(state.perturbation))
        wait = start.clock.new_full((len(protocols),), self.wait / model.vocabulary.time_scale)
        later = model.transition.wait(start, wait, model.pushes(sites))
        waited = [p >> Wait(self.wait) for p in protocols]
        return (log_shares(model, sites, later, waited) - log_shares(model, sites, state, protocols)).mean(0)

    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return X_t^p → X_t^p, one pair for each condition (eq 9)."""
        baseline = screen.baseline or "baseline"
        found = []
        for protocol in _last(screen, self.conditions):
            p, m = protocol.perturbation, protocol.media or baseline
            symbol = state(p, m, baseline)
            done = "(·, ·, s)" if self.reading == "control_input" or p == "control" else f"({p}, ·, s)"
            found.append(Pair(type(self).__name__, path_of(p != "control", m == baseline), p, m, symbol, done, symbol))
        return found

    def test(self, screen: "Screen") -> AssumptionTest:
        """Ask how far the conditions move in the last step beyond the shared drift: root mean square, log₂ per unit of time."""
        what = "the conditions move in their last step, beyond the drift that all share, by log₂ per unit of time"
        names = {p.perturbation for p in _last(screen, self.conditions)}
        last = lambda course: _last_step(rest.movement(course)[:, np.isin(course.perturbations, list(names))])  # noqa: E731
        return AssumptionTest.of_movement(type(self).__name__, what, screen, last)


def _text(condition: object) -> str:
    """Return a condition as text: a name, or the expression of a protocol."""
    return condition if isinstance(condition, str) else repr(condition)


def _last(screen: "Screen", conditions: str | Sequence[str]) -> list[Protocol]:
    """Return the protocols that a list of names means: the last time of each perturbation in each media; protocols as they are."""
    if conditions == "auto":
        own = [p for name in dict.fromkeys(p.perturbation for p in screen.conditions) for p in _last_times(screen, name)]
        return [p for p in own if p.time == _end(screen, p.media)]
    found: list[Protocol] = []
    for text in conditions:
        found += [Protocol.parse(text)] if "(" in text else _last_times(screen, text)
    for protocol in found:
        if protocol not in screen.conditions:
            raise ValueError(
                f"SteadyState names {protocol}, which this screen does not hold. {nearest(str(protocol), map(str, screen.conditions))}"
            )
    return found


def _last_times(screen: "Screen", name: str) -> list[Protocol]:
    """Return the last protocol of a perturbation in each media."""
    own = [p for p in screen.conditions if p.perturbation == name]
    if not own:
        raise ValueError(
            f"SteadyState names {name!r}, which is no perturbation of this screen. {nearest(name, ('control', *screen.perturbations))}"
        )
    media = sorted({p.media for p in own}, key=lambda m: m or "")
    return [max((p for p in own if p.media == m), key=lambda p: p.time) for m in media]


def _end(screen: "Screen", media: str | None) -> float:
    """Return the last time at which anything was seen in a media."""
    return max(p.time for p in screen.conditions if p.media == media)


def _refuse_held_out(screen: "Screen", protocols: Sequence[Protocol]) -> None:
    """Refuse conditions whose later times are missing where others have them: at rest they would give the hidden answer away."""
    for protocol in protocols:
        last = _end(screen, protocol.media)
        own = max(p.time for p in screen.conditions if p.perturbation == protocol.perturbation and p.media == protocol.media)
        if own < last:
            raise ValueError(
                f"SteadyState names {protocol.perturbation}, last seen at {own:g} while others are seen at {last:g}: if that time is "
                "held out, calling it a steady state leaks the answer. Name conditions that are seen to the end."
            )


def _probability_of_rest(screen: "Screen", protocols: Sequence[Protocol]) -> list[float]:
    """Return the probability that each condition is at rest in its last step; 1 where the screen cannot tell."""
    if screen.values == "continuous" or len(screen.times) < 2 or not screen.perturbations or len(screen.cells_of("control")) == 0:
        return [1.0] * len(protocols)
    found = {}
    for media in screen.media:
        try:
            course = rest.Course.of(screen, media)
        except ValueError:  # too few control cells to know the noise by: nothing speaks against rest
            continue
        probability = rest.probability_of_rest(course, 0.05)
        for name, row in zip(course.perturbations, probability, strict=True):
            seen = row[np.isfinite(row)]
            found[name, media] = float(seen[-1]) if len(seen) else 1.0
    return [found.get((p.perturbation, p.media or screen.baseline or "baseline"), 1.0) for p in protocols]


def _last_step(parts: Float[np.ndarray, "part condition step"]) -> Float[np.ndarray, "part condition"]:
    """Return the last step that each condition was seen in."""
    seen = np.isfinite(parts).all(axis=0)
    last = np.where(seen, np.arange(seen.shape[1]), -1).max(axis=1)
    return np.where(last >= 0, parts[:, np.arange(len(last)), last], np.nan)
