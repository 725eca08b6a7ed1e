"""Conditions that have come to rest (eqs 7-9)."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.dynamics.transition import CellState
from perturbprob.experiment import rest
from perturbprob.experiment.action import Perturbation, Protocol, Wait
from perturbprob.experiment.paths import Pair, path_of, state
from perturbprob.experiment.vocabulary import labels, nearest
from perturbprob.model.assumptions.assumption import Assumption, Bound, Scale, as_is
from perturbprob.model.assumptions.evidence import AssumptionTest
from perturbprob.model.assumptions.terms import carried, log_shares, standard_error

if TYPE_CHECKING:
    from perturbprob.dynamics.transition import Transition
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

    ``reading`` of eq 9: "own" leaves the perturbation's mark on, "control_input" takes it off, F(X_t^p, ·, ·, s); in both the condition
    effect goes on by its expected path. With ``relative_to_control`` the change of control over the same wait is subtracted, for
    screens with a drift that all cells share.
    """

    conditions: str | tuple[str, ...] = "auto"
    wait: float = 1.0
    reading: str = "own"
    scale: str = "fixed"
    relative_to_control: bool = False

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
        if isinstance(conditions, Protocol) or (isinstance(conditions, str) and conditions != "auto"):
            conditions = (conditions,)
        if not len(conditions):
            raise ValueError("SteadyState names no condition. Name some, or 'auto', or leave it out.")
        values = {"conditions": conditions if conditions == "auto" else tuple(dict.fromkeys(map(_text, conditions))), "wait": float(wait)}
        for name, value in (values | {"reading": reading, "scale": scale, "relative_to_control": relative_to_control}).items():
            object.__setattr__(self, name, value)

    @property
    def learns_noise(self) -> bool:
        """Whether the scale is learnt."""
        return self.scale == "learnt"

    def refuses(self, transition: "Transition") -> str | None:
        """Refuse a transition whose waits do not add up."""
        if transition.noise_shape:
            return f"follows one path on from a state, and {type(transition).__name__} has noise on the way. Leave it out, or use node."
        if transition.semigroup:
            return None
        return (
            f"needs W(s) then W(t) to be W(s + t), and {type(transition).__name__} does not promise that: waiting on from a state is not "
            "defined there. Leave it out, or use node."
        )

    def bind(self, screen: "Screen") -> Bound:
        """Find the last state of each condition in the screen, its weight and its noise; warn of named ones that hardly count."""
        protocols, weight = self._chosen(screen)
        if self.wait > max(screen.times):
            warnings.warn(
                f"SteadyState(wait={self.wait:g}) is longer than anything measured ({max(screen.times):g}): the field is not known that "
                "far, and the fit may break. Give a wait of about the last step.",
                stacklevel=2,
            )
        if self.conditions != "auto":
            _warn_of_weightless(_last(screen, self.conditions), dict(zip(protocols, weight, strict=True)))
        return Bound(self, protocols, weight, 2 * standard_error(screen, protocols))

    def _chosen(self, screen: "Screen") -> tuple[tuple[Protocol, ...], tuple[float, ...]]:
        """Return the conditions that count, and their weights; all of them where none has a weight."""
        protocols = _last(screen, self.conditions)
        _refuse_held_out(screen, protocols, self.wait)
        pairs = list(zip(protocols, _probability_of_rest(screen, protocols), strict=True))
        kept = [pair for pair in pairs if pair[1] > LEAST_WEIGHT] or pairs
        return tuple(p for p, _ in kept), tuple(w for _, w in kept)

    def globals(self, bound: Bound) -> dict[str, Tensor]:
        """Sample by how much each condition's scale exceeds its noise, where it is learnt."""
        if self.scale == "fixed":
            return {}
        site = f"{self.name}_excess"
        return {site: pyro.sample(site, dist.Exponential(torch.ones(len(bound.protocols))).to_event(1))}

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return Σ_c w_c Σ_g log Normal(change_cg | 0, noise_cg)."""
        change = self.change(model, sites, bound.protocols)
        weight = change.new_tensor(bound.weight)
        return (weight * bound.log_density(change, sites.get(f"{self.name}_excess"))).sum()

    def loss(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound, scale: Scale) -> Float[Tensor, ""]:
        """Return the mean square of the change over conditions, by their weights, and genes."""
        return bound.mean_square(self.change(model, sites, bound.protocols, scale))

    def change(
        self, model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol], scale: Scale = as_is
    ) -> Float[Tensor, "condition gene"]:
        """Return the change of each condition over the wait, averaged over rest states; beyond that of control if so declared."""

        def mean(done: Sequence[Protocol]) -> Float[Tensor, "condition gene"]:
            later, before = self.ends(model, sites, done, carried(model, sites, done))
            return (scale(later) - scale(before)).mean(0)

        change = mean(protocols)
        return change - mean([p.unperturbed() for p in protocols]) if self.relative_to_control else change

    def ends(
        self, model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol], state: CellState
    ) -> tuple[Float[Tensor, "*plate condition gene"], Float[Tensor, "*plate condition gene"]]:
        """Return the log shares of a state after the wait, and before it; the condition effect's expected change is included."""
        start = state if self.reading == "own" else replace(state, perturbation=torch.zeros_like(state.perturbation))
        wait = start.clock.new_full((len(protocols),), self.wait / model.vocabulary.time_scale)
        later = model.transition.wait(start, wait, model.pushes(sites))
        waited = [p >> Wait(self.wait) for p in protocols]
        return log_shares(model, sites, later, waited), log_shares(model, sites, state, protocols)

    def _pairs(self, screen: "Screen") -> list[Pair]:
        """Return X_t^p → X_t^p, one pair for each condition that counts in the term (eq 9)."""
        baseline, label = screen.baseline or "baseline", dict(zip(screen.conditions, labels(screen.conditions), strict=True))
        found = []
        for protocol in self._chosen(screen)[0]:
            p, m = label[protocol], protocol.media or baseline
            symbol = state(p, m, baseline)
            done = "(·, ·, s)" if self.reading == "control_input" or p == "control" else f"({p}, ·, s)"
            found.append(Pair(type(self).__name__, path_of(p != "control", m == baseline), p, m, symbol, done, symbol))
        return found

    def _test(self, screen: "Screen") -> AssumptionTest:
        """Ask how far the conditions move in their last step: root mean square, log₂ per unit of time.

        With ``relative_to_control`` beyond the drift that all share, as the term has it.
        """
        beyond = ", beyond the drift that all share," if self.relative_to_control else ""
        what = f"the conditions move in their last step{beyond} by log₂ per unit of time"
        label = dict(zip(screen.conditions, labels(screen.conditions), strict=True))
        names: dict[str, list[str]] = {}
        for protocol in _last(screen, self.conditions):
            names.setdefault(protocol.media or screen.baseline or "baseline", []).append(label[protocol])

        def last(course: rest.Course, media: str) -> Float[np.ndarray, "part condition"]:
            moved = rest.movement(course, drift=not self.relative_to_control)
            return _last_step(moved[:, np.isin(course.perturbations, names[media])])

        return AssumptionTest.of_movement(type(self).__name__, what, screen, last, list(names))


def _text(condition: object) -> str:
    """Return a condition as text: a name, or the expression of a protocol."""
    return condition if isinstance(condition, str) else repr(condition)


def _last(screen: "Screen", conditions: str | Sequence[str]) -> list[Protocol]:
    """Return the protocols that a list of names means: the last time of each perturbation in each media; protocols as they are."""
    if conditions == "auto":
        return [p for p in _last_times(screen.conditions) if p.time == _end(screen, p.media)]
    found: list[Protocol] = []
    for text in conditions:
        found += [Protocol.parse(text)] if "(" in text else _last_times(_named(screen, text))
    for protocol in found:
        if protocol not in screen.conditions:
            raise ValueError(
                f"SteadyState names {protocol}, which this screen does not hold. {nearest(str(protocol), map(str, screen.conditions))}"
            )
    return found


def _named(screen: "Screen", name: str) -> list[Protocol]:
    """Return the conditions of a perturbation, of every kind that bears its name."""
    own = [p for p in screen.conditions if p.perturbation == name]
    if not own:
        raise ValueError(
            f"SteadyState names {name!r}, which is no perturbation of this screen. {nearest(name, ('control', *screen.perturbations))}"
        )
    return own


def _last_times(protocols: Sequence[Protocol]) -> list[Protocol]:
    """Return the last of the protocols of each perturbation, of each kind, in each media."""
    last: dict[tuple[tuple[Perturbation, ...], str], Protocol] = {}
    for p in sorted(protocols, key=lambda p: p.time):
        last[p.perturbations, p.media or ""] = p
    order = list(dict.fromkeys(p.perturbations for p in protocols))
    return [last[key] for key in sorted(last, key=lambda key: (order.index(key[0]), key[1]))]


def _end(screen: "Screen", media: str | None) -> float:
    """Return the last time at which anything was seen in a media."""
    return max(p.time for p in screen.conditions if p.media == media)


def _refuse_held_out(screen: "Screen", protocols: Sequence[Protocol], wait: float) -> None:
    """Refuse conditions that are missing, within the wait or at the end, at times others have: at rest they give the answer away."""
    for protocol in protocols:
        beside = [p for p in screen.conditions if p.media == protocol.media]
        own = {p.time for p in beside if p.perturbations == protocol.perturbations}
        until = protocol.time + wait if protocol.time + wait < max(own) else math.inf
        hidden = sorted({p.time for p in beside if protocol.time < p.time <= until} - own)
        if hidden:
            seen = max(time for time in own if time < hidden[0])
            raise ValueError(
                f"SteadyState names {protocol.perturbation}, last seen at {seen:g} while others are seen at {hidden[0]:g}: if that time is "
                "held out, calling it a steady state leaks the answer. Name conditions that are seen as long as others."
            )


def _warn_of_weightless(named: Sequence[Protocol], weight: dict[Protocol, float]) -> None:
    """Warn of conditions that were asked for by name and hardly count, as the screen shows them moving."""
    moving = [str(p) for p in named if weight.get(p, 0.0) <= LEAST_WEIGHT]
    if moving:
        warnings.warn(
            f"SteadyState names {', '.join(moving)}, which this screen shows moving: with a probability of rest below {LEAST_WEIGHT:g} it "
            "does not count; leave it out of conditions=, or read a screen with later times.",
            UserWarning,
            stacklevel=4,
        )


def _probability_of_rest(screen: "Screen", protocols: Sequence[Protocol]) -> list[float]:
    """Return the probability that each condition is at rest in its last step; 1 where the screen cannot tell."""
    if screen.values == "continuous" or len(screen.times) < 2 or not screen.perturbations or len(screen.cells_of("control")) == 0:
        return [1.0] * len(protocols)
    found, label = {}, dict(zip(screen.conditions, labels(screen.conditions), strict=True))
    for media in screen.media:
        try:
            course = rest.Course.of(screen, media)
        except ValueError:  # too few control cells to know the noise by: nothing speaks against rest
            continue
        probability = rest.probability_of_rest(course, 0.05)
        for name, row in zip(course.perturbations, probability, strict=True):
            seen = row[np.isfinite(row)]
            found[name, media] = float(seen[-1]) if len(seen) else 1.0
    return [found.get((label[p], p.media or screen.baseline or "baseline"), 1.0) for p in protocols]


def _last_step(parts: Float[np.ndarray, "part condition step"]) -> Float[np.ndarray, "part condition"]:
    """Return the last step that each condition was seen in."""
    seen = np.isfinite(parts).all(axis=0)
    last = np.where(seen, np.arange(seen.shape[1]), -1).max(axis=1)
    return np.where(last >= 0, parts[:, np.arange(len(last)), last], np.nan)
