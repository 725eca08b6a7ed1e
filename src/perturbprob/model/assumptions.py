"""What the literature leaves silent, as objects: each enters the fit, counts the pairs that it adds, and tests itself.

An assumption has a ``term``, a log-density that counts once per screen; ``pairs(screen)``, the input-output pairs that it adds to those
of eq 5; and ``test(screen)``, which says how large the effect is that it denies, how well that is known, and what makes the test
impossible. ``node(screen, assumptions=[...])`` puts it into the fit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.experiment import rest
from perturbprob.experiment.action import Protocol, Wait
from perturbprob.experiment.paths import Pair, path_of, state
from perturbprob.experiment.silence import silence
from perturbprob.experiment.vocabulary import nearest

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.model.cell_model import CellModel

N_REST = 32
"""How many rest states a term is averaged over."""
LEAST_WEIGHT = 1e-3


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

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        noise = None if self.noise is None else self.noise.tolist()
        spec = {"kind": type(self.assumption).__name__} | vars(self.assumption)
        return {"assumption": spec, "protocols": list(map(repr, self.protocols)), "weight": list(self.weight), "noise": noise}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Bound":
        """Read back what `to_json` wrote."""
        spec = dict(values["assumption"])
        kind = ASSUMPTIONS[spec.pop("kind")]
        spec = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
        noise = None if values["noise"] is None else np.array(values["noise"])
        return cls(kind(**spec), tuple(map(Protocol.parse, values["protocols"])), tuple(values["weight"]), noise)


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


class Assumption(ABC):
    """Something taken to be true of the cells, made explicit."""

    needs_semigroup: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name of the term in the model: the class in snake case."""
        return "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def bind(self, screen: "Screen") -> Bound:
        """Return the assumption about one screen; refuse conditions that the screen does not hold."""
        return Bound(self)

    def globals(self, bound: Bound) -> dict[str, Tensor]:
        """Sample the sites of its own, above the cell plate; none by default."""
        return {}

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return the log-density that the assumption adds to the model; 0 where it holds by construction."""
        return model.log_share.new_zeros(())

    @abstractmethod
    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return the input-output pairs that it adds to those of eq 5."""

    @abstractmethod
    def test(self, screen: "Screen") -> AssumptionTest:
        """Ask the screen."""


@final
@dataclass(frozen=True)
class UneditedStable(Assumption):
    """Unedited cells do not respond to baseline media: X_t = X (2.3.1).

    The push without marks is 0 by construction, so the term is 0, and control cells of any time are X: path 4 is the identity.
    """

    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return X_t → X for path 4, which is then an identity: one pair."""
        baseline = screen.baseline or "baseline"
        return [Pair(type(self).__name__, 4, "control", baseline, "X[t]", "(·, ·, 0)", "X")]

    def test(self, screen: "Screen") -> AssumptionTest:
        """Ask how far control cells in baseline media move per unit of time, root mean square over genes in log₂ units."""
        what = "control cells in baseline media move, per unit of time, by log₂"
        if len(screen.times) < 2:
            return AssumptionTest(
                type(self).__name__, what, math.nan, (math.nan, math.nan), math.nan, math.nan, ("there is one time only.",)
            )
        steps = rest.movement(rest.Course.of(screen), drift=True)[:, 0]
        return _tested(type(self).__name__, what, steps, _time_confounds(screen))


@final
@dataclass(frozen=True)
class SteadyState(Assumption):
    """These conditions have come to rest: waiting longer does not change them (eqs 7-9).

    ``conditions``: perturbation names or protocols, or "auto", every condition weighted by its probability of rest. ``wait``: how much
    longer they are left, in the unit of the screen. The term is one pseudo-observation per condition: the change over ``wait``, in log
    rate averaged over rest states, is Normal(0, noise), the noise being that between random halves of the condition's cells;
    weighted by the probability of rest where the screen can tell it. ``scale`` "fixed" takes that noise, "learnt" multiplies it by
    1 + u, u ~ Exponential(1): never below the noise, since a free scale would go to 0 and switch the field off.

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
        if self.conditions != "auto":
            _refuse_held_out(screen, protocols)
        weight = _probability_of_rest(screen, protocols)
        kept = [k for k, w in enumerate(weight) if w > LEAST_WEIGHT] or list(range(len(weight)))
        chosen = tuple(protocols[k] for k in kept)
        return Bound(self, chosen, tuple(weight[k] for k in kept), 2 * _standard_error(screen, chosen))

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
        return (weight * _log_density(change, bound, sites.get(f"{self.name}_excess"))).sum()

    def _change(self, model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol]) -> Float[Tensor, "condition gene"]:
        """Return the change of each condition's mean location over the wait."""
        state = _carried(model, sites, protocols)
        start = state if self.reading == "own" else replace(state, perturbation=torch.zeros_like(state.perturbation))
        wait = start.clock.new_full((len(protocols),), self.wait / model.vocabulary.time_scale)
        later = model.transition.wait(start, wait, model.pushes(sites))
        return (_location(model, sites, later.z) - _location(model, sites, state.z)).mean(0)

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
        if len(screen.times) < 2:
            return AssumptionTest(
                type(self).__name__, what, math.nan, (math.nan, math.nan), math.nan, math.nan, ("there is one time only.",)
            )
        names = {p.perturbation for p in _last(screen, self.conditions)}
        course = rest.Course.of(screen)
        own = [k for k, name in enumerate(course.perturbations) if name in names]
        return _tested(type(self).__name__, what, _last_step(rest.movement(course)[:, own]), _time_confounds(screen))


@final
@dataclass(frozen=True)
class SilentInBaseline(Assumption):
    """These perturbations do nothing in baseline media: X_t^p = X^p (eqs 13-14, appendix A).

    ``conditions``: perturbation names, or "auto", all. The term: for each, the difference from control of the same time in baseline
    media, in log rate averaged over rest states, is Normal(0, noise), the noise being the standard error of that difference.
    """

    conditions: str | tuple[str, ...] = "auto"

    def __init__(self, conditions: str | Sequence[str] = "auto") -> None:
        """Keep the names."""
        several = (conditions,) if isinstance(conditions, str) and conditions != "auto" else conditions
        object.__setattr__(self, "conditions", several if several == "auto" else tuple(map(_text, several)))

    def bind(self, screen: "Screen") -> Bound:
        """Find the conditions in baseline media, or where they were not measured what they would be, and their noise."""
        protocols = tuple(self._protocols(screen))
        noise = np.hypot(_standard_error(screen, protocols), _standard_error(screen, [p.unperturbed() for p in protocols]))
        return Bound(self, protocols, (1.0,) * len(protocols), noise)

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return Σ_p Σ_g log Normal(difference_pg | 0, noise_pg)."""
        here, control = (
            _location(model, sites, _carried(model, sites, protocols).z).mean(0)
            for protocols in (bound.protocols, [p.unperturbed() for p in bound.protocols])
        )
        return _log_density(here - control, bound).sum()

    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return F(X_t^p, ·, m, t) → X_{m,t}^p for each perturbation and media beside the baseline: n_S n_m pairs."""
        baseline = screen.baseline or "baseline"
        media = [m for m in screen.media if m != baseline]
        return [
            Pair(type(self).__name__, 1, p, m, state(p, baseline, baseline), f"(·, {m}, t)", state(p, m, baseline))
            for p in self._names(screen)
            for m in media
        ]

    def test(self, screen: "Screen") -> AssumptionTest:
        """Ask how many genes perturbations change in other media for each that they change in baseline media, at matched cell numbers."""
        found = silence(screen, self._names(screen))
        what = "genes changed in other media for each changed in baseline media, at matched numbers of cells:"
        power = 0.5 * math.erfc((1.645 - abs(math.log(found.ratio)) / max(found.spread, 1e-12)) / math.sqrt(2))
        smallest = math.exp((1.645 + 0.842) * found.spread)
        return AssumptionTest(type(self).__name__, what, found.ratio, found.interval, smallest, power, found.confounds)

    def _names(self, screen: "Screen") -> list[str]:
        """Return the perturbations, each known to the screen."""
        if self.conditions == "auto":
            return list(screen.perturbations)
        for name in self.conditions:
            if name not in screen.perturbations:
                raise ValueError(
                    f"SilentInBaseline names {name!r}, which is no perturbation of this screen. {nearest(name, screen.perturbations)}"
                )
        return list(self.conditions)

    def _protocols(self, screen: "Screen") -> list[Protocol]:
        """Return each perturbation alone at each time of the screen."""
        kinds = {p.perturbation: p.perturbations for p in screen.conditions}
        return [Protocol([*kinds[name], Wait(time)]) for name in self._names(screen) for time in screen.times]


@final
@dataclass(frozen=True)
class Lipschitz(Assumption):
    """F does not change faster than its input, by a constant (B.2).

    ``of="gradient"`` is the paper's inequality, ‖∇F(x) − ∇F(x′)‖ ≤ L ‖x − x′‖; ``of="map"`` is ‖F(x) − F(x′)‖ ≤ L ‖x − x′‖. A number for
    ``bound`` adds −weight · relu(L̂ − bound)², "penalty" −weight · L̂², with L̂ the largest constant between random neighbours
    at rest of the screen's conditions. A spectral norm on the field would bound the flow by e^(Lt) only. `constant` gives the constant
    at given rest states from Jacobian-vector products.
    """

    of: str = "map"
    bound: float | str = "penalty"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the words and numbers."""
        if self.of not in ("map", "gradient"):
            raise ValueError(f"Lipschitz(of={self.of!r}): use 'map' or 'gradient'.")
        if self.bound != "penalty" and (isinstance(self.bound, str) or not self.bound > 0):
            raise ValueError(f"Lipschitz(bound={self.bound!r}): use a number above 0, or 'penalty'.")
        if not self.weight > 0:
            raise ValueError(f"Lipschitz needs a weight above 0; got {self.weight!r}.")

    def bind(self, screen: "Screen") -> Bound:
        """Take the conditions of the screen."""
        return Bound(self, tuple(screen.conditions), (1.0,) * len(screen.conditions))

    def term(self, model: "CellModel", sites: dict[str, Tensor], bound: Bound) -> Float[Tensor, ""]:
        """Return minus the weighted square of the constant, or of its excess over the bound."""
        rest_states, step = _rest_points(model, len(bound.protocols)), 1e-2
        direction = torch.nn.functional.normalize(torch.randn_like(rest_states), dim=-1)
        at = [_carried(model, sites, bound.protocols, rest_states + k * step * direction).z for k in (0, 1, 2)]
        slope = at[1] - at[0] if self.of == "map" else (at[2] - 2 * at[1] + at[0]) / step
        constant = (slope.norm(dim=-1) / step).amax()
        return -self.weight * (constant if self.bound == "penalty" else torch.relu(constant - self.bound)).square()

    @torch.no_grad()
    def constant(self, model: "CellModel", sites: dict[str, Tensor], z0: Float[Tensor, "cell latent"], protocol: Protocol) -> float:
        """Return the largest ‖∂z(t)/∂z₀‖ over cells from Jacobian-vector products, or its change between neighbours per distance."""
        from perturbprob.dynamics.inverse import jacobian

        flow = lambda z: _carried(model, sites, [protocol] * len(z0), z[None]).z[0]  # noqa: E731
        slope = jacobian(flow, z0)[1]
        if self.of == "map":
            return float(torch.linalg.matrix_norm(slope, 2).max())
        step = 1e-2 * torch.nn.functional.normalize(torch.randn_like(z0), dim=-1)
        return float((torch.linalg.matrix_norm(jacobian(flow, z0 + step)[1] - slope, 2) / 1e-2).max())

    def pairs(self, screen: "Screen") -> list[Pair]:
        """Return nothing: it adds no pair."""
        return []

    def test(self, screen: "Screen") -> AssumptionTest:
        """Say that a screen cannot test it: no two cells were both followed."""
        words = "each cell is measured once, so no screen shows how two neighbours part; ask a fit for the constant."
        return AssumptionTest(type(self).__name__, "Lipschitz constant", math.nan, (math.nan, math.nan), math.nan, math.nan, (words,))


ASSUMPTIONS: dict[str, type[Assumption]] = {kind.__name__: kind for kind in (UneditedStable, SteadyState, SilentInBaseline, Lipschitz)}


def _text(condition: object) -> str:
    """Return a condition as text: a name, or the expression of a protocol."""
    return condition if isinstance(condition, str) else repr(condition)


def _last(screen: "Screen", conditions: str | Sequence[str]) -> list[Protocol]:
    """Return the protocols that a list of names means: the last time of each perturbation in each media; protocols as they are."""
    if conditions == "auto":
        conditions = ("control", *screen.perturbations)
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


def _refuse_held_out(screen: "Screen", protocols: Sequence[Protocol]) -> None:
    """Refuse conditions whose later times are missing where others have them: at rest they would give the hidden answer away."""
    for protocol in protocols:
        last = max(p.time for p in screen.conditions if p.media == protocol.media)
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


def _standard_error(screen: "Screen", protocols: Sequence[Protocol]) -> Float[np.ndarray, "condition gene"]:
    """Return the standard error of the log of each condition's mean; of the value itself where values are continuous."""
    rows = []
    for protocol in protocols:
        own = np.isin(screen.condition, [k for k, p in enumerate(screen.conditions) if p == protocol])
        rows.append(_error(screen, own if own.any() else np.ones(screen.n_cells, bool)))
    return np.stack(rows)


def _error(screen: "Screen", own: np.ndarray) -> Float[np.ndarray, " gene"]:
    """Return the standard error of one group of cells."""
    if screen.values == "continuous":
        known = screen.standard_error
        error = np.full((int(own.sum()), screen.n_genes), 0.1) if known is None else np.where(np.isfinite(known[own]), known[own], 0.1)
        return np.sqrt(np.mean(error.astype(float) ** 2, axis=0)) + 1e-3
    share = screen.counts[own].multiply(1 / screen.size_factor[own, None]).tocsr()
    n, mean = int(own.sum()), np.asarray(share.mean(0)).ravel()
    variance = np.maximum(np.asarray(share.multiply(share).mean(0)).ravel() - mean**2, 0) + 0.5 / n
    return np.sqrt(variance / n) / (mean + 0.5 / n)


def _tested(name: str, what: str, parts: Float[np.ndarray, "part condition"], confounds: tuple[str, ...]) -> AssumptionTest:
    """Turn mean squares beyond noise into a root-mean-square effect over conditions, its interval and its power."""
    known = parts[:, np.isfinite(parts).all(axis=0)]
    n, square = known.shape[1], float(known[0].mean())
    error, null = (float(np.sqrt((row**2).sum()) / n) for row in known[1:])
    low, high, smallest = (math.sqrt(max(0.0, value)) for value in (square - 1.645 * error, square + 1.645 * error, (1.645 + 0.842) * null))
    power = 0.5 * math.erfc((1.645 * null - square) / error / math.sqrt(2))
    return AssumptionTest(name, what, math.sqrt(max(0.0, square)), (low, high), smallest, power, confounds)


def _last_step(parts: Float[np.ndarray, "part condition step"]) -> Float[np.ndarray, "part condition"]:
    """Return the last step that each condition was seen in."""
    seen = np.isfinite(parts).all(axis=0)
    last = np.where(seen, np.arange(seen.shape[1]), -1).max(axis=1)
    return np.where(last >= 0, parts[:, np.arange(len(last)), last], np.nan)


def _time_confounds(screen: "Screen") -> tuple[str, ...]:
    """Say what hides a change over time."""
    pairs = [*screen.layout.confounded(), *screen.layout.nested()]
    if any({"time", "batch"} == set(pair) for pair in pairs):
        return ("each time is one batch, so a change over time cannot be told from a batch effect.",)
    return ()


def _rest_points(model: "CellModel", n_conditions: int) -> Float[Tensor, "rest condition latent"]:
    """Return the same rest states for each condition."""
    n_rest = 1 if model.start is not None else N_REST
    uniform = SobolEngine(model.n_latent, scramble=True, seed=0).draw(n_rest).clamp(1e-6, 1 - 1e-6).to(model.log_share)
    return model.rest_points(uniform)[:, None].expand(-1, n_conditions, -1)


def _carried(
    model: "CellModel", sites: dict[str, Tensor], protocols: Sequence[Protocol], z0: Float[Tensor, "rest condition latent"] | None = None
) -> Any:
    """Carry rest states through each protocol."""
    segments = [s.to(model.log_share.device) for s in model.vocabulary.encode(protocols)]
    return model.moved(sites, _rest_points(model, len(protocols)) if z0 is None else z0, segments)


def _location(
    model: "CellModel", sites: dict[str, Tensor], z: Float[Tensor, "rest condition latent"]
) -> Float[Tensor, "rest condition gene"]:
    """Return the log share of each gene, or the location of each value, without condition effects."""
    return model.decoder(z, sites["gene_bias"])


def _log_density(change: Float[Tensor, "condition gene"], bound: Bound, excess: Tensor | None = None) -> Float[Tensor, " condition"]:
    """Return the log-density of each condition's change under its noise."""
    noise = torch.as_tensor(bound.noise, dtype=change.dtype, device=change.device)
    if excess is not None:
        noise = noise * (1 + excess)[:, None]
    return dist.Normal(torch.zeros_like(change), noise, validate_args=False).log_prob(change).sum(-1)


def bind(assumptions: Sequence[Assumption], screen: "Screen") -> list[Bound]:
    """Bind assumptions to a screen; refuse what is none, and one kind twice."""
    if isinstance(assumptions, Assumption):
        raise TypeError(f"assumptions= takes a list; write assumptions=[{type(assumptions).__name__}(...)].")
    kinds = [type(a) for a in assumptions]
    for assumption in assumptions:
        if not isinstance(assumption, Assumption):
            known = ", ".join(f"{name}(...)" for name in ASSUMPTIONS)
            raise TypeError(f"An assumption is one of {known}; got {assumption!r}.")
        if kinds.count(type(assumption)) > 1:
            raise ValueError(f"{type(assumption).__name__} is given twice: give one with all its conditions.")
    return [assumption.bind(screen) for assumption in assumptions]
