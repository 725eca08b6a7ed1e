"""What is done to cells: perturb (P), change the media (M), wait (W), in the order written (eqs 1-4)."""

import ast
import math
from abc import ABC
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self, final


class Action(ABC):
    """One step of a protocol. Actions are joined with ``>>``, first action first."""

    def __rshift__(self, other: "Action | Protocol") -> "Protocol":
        """Return the protocol that does this action, then the other."""
        return Protocol((self,)) >> other


@dataclass(frozen=True, repr=False)
class Perturbation(Action):
    """Set the perturbation status p_γ of one gene γ (eq 1). Abstract: use one of its three kinds.

    Perturbations of different genes at one instant commute. A gene has one status: knocking it out twice is knocking it
    out once; activating or interfering with it twice, or mixing kinds on one gene, is not defined and is an error.
    """

    gene: str
    symbol: ClassVar[str] = ""
    idempotent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a gene without a name."""
        if type(self) is Perturbation:
            raise TypeError("Perturbation is abstract: use Knockout, Interference or Activation.")
        if not isinstance(self.gene, str) or not self.gene.strip():
            raise ValueError(f"{type(self).__name__} needs the name of a gene; got {self.gene!r}.")
        if self.gene == "control":
            raise ValueError(
                "Control is no gene: nothing is done to a control cell, so its protocol is that without a perturbation: Wait(5)."
            )

    def __repr__(self) -> str:
        """Return the expression that makes this action."""
        return f"{type(self).__name__}({self.gene!r})"


@final
class Knockout(Perturbation):
    """The gene's function is removed by CRISPR nuclease (p_γ = ×).

    >>> Knockout("NANOG") >> Knockout("NANOG") == Protocol([Knockout("NANOG")])
    True
    """

    symbol = "×"
    idempotent = True


@final
class Interference(Perturbation):
    """The gene's expression is lowered by CRISPRi (p_γ = ↓)."""

    symbol = "↓"


@final
class Activation(Perturbation):
    """The gene's expression is raised by CRISPRa (p_γ = ↑)."""

    symbol = "↑"


@final
@dataclass(frozen=True, repr=False)
class Media(Action):
    """Put the cells into media m (eq 2). ``Media()`` is the baseline media of the screen, in which every protocol starts.

    >>> Media() >> Wait(3) == Protocol([Wait(3)])
    True
    """

    name: str | None = None

    def __post_init__(self) -> None:
        """Refuse a media without a name."""
        if self.name is not None and (not isinstance(self.name, str) or not self.name.strip()):
            raise ValueError(f"Media needs the name of a media; got {self.name!r}, and the baseline media is Media().")

    def __repr__(self) -> str:
        """Return the expression that makes this action."""
        return "Media()" if self.name is None else f"Media({self.name!r})"


@final
@dataclass(frozen=True, repr=False)
class Wait(Action):
    """Leave the cells alone for a time t ≥ 0, in the time unit of the screen (eq 3).

    >>> Wait(2) >> Wait(3) == Protocol([Wait(5)])
    True
    """

    time: float

    def __post_init__(self) -> None:
        """Refuse a time that is not a finite number of at least 0."""
        if isinstance(self.time, bool) or not isinstance(self.time, int | float):
            raise TypeError(f"Wait needs a number of time units; got {self.time!r}.")
        if not math.isfinite(self.time) or self.time < 0:
            raise ValueError(f"Wait needs a finite time of at least 0; got {self.time!r}. Time runs forward from the start of the screen.")
        object.__setattr__(self, "time", float(self.time))

    def __repr__(self) -> str:
        """Return the expression that makes this action."""
        return f"Wait({self.time:.12g})"


@final
@dataclass(frozen=True, init=False, repr=False)
class Protocol:
    """An ordered sequence of any number of actions, F = W ∘ M ∘ P and its generalisations (eq 4).

    Protocols that the rules of eqs 1-4 identify compare and hash equal, by their normal form ``actions``: identities
    (baseline media on cells in baseline media, ``Wait(0)``) are gone, waits next to each other are added, perturbations
    next to each other are sorted, and a second knock-out of a gene is gone. The empty protocol is an untouched cell X.
    Joining keeps what was ``written``: a change back to baseline media at the start of a protocol does nothing to an untouched
    cell, and something behind another protocol.

    >>> Knockout("TGFBR1") >> Media("TGFB1") >> Wait(3)
    Knockout('TGFBR1') >> Media('TGFB1') >> Wait(3)
    >>> Knockout("A") >> Knockout("B") == Knockout("B") >> Knockout("A")
    True
    >>> Wait(1) >> Media("M") == Media("M") >> Wait(1)
    False
    """

    actions: tuple[Action, ...]
    written: tuple[Action, ...] = field(compare=False)

    def __init__(self, actions: Iterable[Action] = ()) -> None:
        """Bring the actions, first action first, to normal form."""
        normal: list[Action] = []
        written = tuple(actions)
        for action in written:
            if not isinstance(action, Action):
                raise TypeError(f"A protocol is made of Knockout, Interference, Activation, Media and Wait; got {action!r}.")
            _append(normal, action)
        object.__setattr__(self, "actions", tuple(normal))
        object.__setattr__(self, "written", written)

    def __rshift__(self, other: "Action | Protocol") -> Self:
        """Return the protocol that does this one, then the other."""
        if isinstance(other, Protocol):
            return type(self)(self.written + other.written)
        return type(self)((*self.written, other))

    def simplify(self) -> Self:
        """Return the protocol with nothing kept but its normal form.

        >>> (Wait(1) >> Knockout("A") >> Wait(0) >> Knockout("A")).simplify().written
        (Wait(1), Knockout('A'))
        """
        return type(self)(self.actions)

    def __iter__(self) -> Iterator[Action]:
        """Iterate over the actions, first action first."""
        return iter(self.actions)

    def __repr__(self) -> str:
        """Return the expression that makes this protocol; `Protocol.parse` reads it back."""
        if len(self.actions) < 2:
            return f"Protocol([{', '.join(map(repr, self.actions))}])"
        return " >> ".join(map(repr, self.actions))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a protocol from the text that ``repr`` and ``str`` write.

        >>> Protocol.parse("Knockout('NANOG') >> Wait(5)")
        Knockout('NANOG') >> Wait(5)
        """
        try:
            return cls(_read(ast.parse(text.strip(), mode="eval").body))
        except (SyntaxError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"Cannot read {text!r} as a protocol. Write it like Knockout('NANOG') >> Media('TGFB1') >> Wait(5)."
            ) from error

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """Every perturbation of the protocol, sorted by gene."""
        return tuple(sorted((a for a in self.actions if isinstance(a, Perturbation)), key=lambda a: a.gene))

    @property
    def perturbation(self) -> str:
        """The perturbed genes joined with ``+``, or ``control``."""
        return "+".join(a.gene for a in self.perturbations) or "control"

    @property
    def media(self) -> str | None:
        """The media in which the cells end; None is the baseline media."""
        return _media(self.actions)

    @property
    def time(self) -> float:
        """The time waited in all."""
        return math.fsum(a.time for a in self.actions if isinstance(a, Wait))

    def with_baseline(self, name: str | None) -> Self:
        """Return the protocol with the media called ``name`` written as the baseline media."""
        return type(self)(Media() if isinstance(a, Media) and a.name == name else a for a in self.written)

    def without(self, perturbations: Iterable[Action]) -> Self:
        """Return the protocol of a cell that some of its perturbations left as it was."""
        left = set(perturbations)
        return type(self)(a for a in self.actions if a not in left)

    def unperturbed(self) -> Self:
        """Return the protocol of a control cell beside this one: the same media and waits, no perturbation."""
        return self.without(self.perturbations)

    def segments(self) -> tuple[tuple[tuple[Action, ...], float], ...]:
        """Cut the protocol behind each wait: what is done at one instant, and how long the wait behind it is."""
        cut: list[tuple[tuple[Action, ...], float]] = []
        instant: list[Action] = []
        for action in self.actions:
            if isinstance(action, Wait):
                cut.append((tuple(instant), action.time))
                instant = []
            else:
                instant.append(action)
        if instant or not cut:
            cut.append((tuple(instant), 0.0))
        return tuple(cut)


def _media(actions: Iterable[Action]) -> str | None:
    """Return the media that the actions end in."""
    return next((a.name for a in reversed(tuple(actions)) if isinstance(a, Media)), None)


def _append(normal: list[Action], action: Action) -> None:
    """Add one action to a list in normal form and leave it in normal form."""
    if isinstance(action, Perturbation):
        _append_perturbation(normal, action)
    elif isinstance(action, Media):
        if normal and isinstance(normal[-1], Media):
            normal.pop()
        if action.name != _media(normal):
            normal.append(action)
    elif isinstance(action, Wait) and action.time > 0:
        waited = normal.pop().time if normal and isinstance(normal[-1], Wait) else 0.0
        normal.append(Wait(float(f"{waited + action.time:.12g}")))


def _append_perturbation(normal: list[Action], action: Perturbation) -> None:
    """Add one perturbation: one status a gene, sorted within a run."""
    for earlier in normal:
        if isinstance(earlier, Perturbation) and earlier.gene == action.gene:
            if earlier == action and action.idempotent:
                return
            raise ValueError(
                f"{earlier!r} and then {action!r}: a gene takes one perturbation, so this protocol is not defined. "
                "Keep one of the two, or name the second construct as a gene of its own."
            )
    place = len(normal)
    while place and isinstance(normal[place - 1], Perturbation) and normal[place - 1].gene > action.gene:
        place -= 1
    normal.insert(place, action)


_NAMES: dict[str, type[Action]] = {kind.__name__: kind for kind in (Knockout, Interference, Activation, Media, Wait)}


def _read(node: ast.expr) -> list[Action]:
    """Read the actions from the syntax tree of a protocol."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _read(node.left) + _read(node.right)
    if node.func.id == "Protocol":
        return [action for part in node.args for item in part.elts for action in _read(item)]
    if node.keywords:
        raise TypeError("a protocol is written without keywords")
    kind = _NAMES[node.func.id]
    try:
        values = [ast.literal_eval(a) for a in node.args]
    except ValueError as error:
        raise TypeError("genes and media are quoted, times are numbers") from error
    return [kind(*values)]
