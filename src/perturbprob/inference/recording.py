"""A function of parameters, recorded as the operations that it and its gradient take, and replayed without the Python around them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

SAME = ("detach", "alias", "lift_fresh")
"""Operations that give back what they are given."""
SHAPES = ("view", "_unsafe_view", "expand", "reshape")
"""Operations that do so where the shape is the same."""


class NotRecordable(RuntimeError):
    """What a function does cannot be told from what it did once."""


@final
class Recording:
    """What a function does with parameters, as it did it once; the same numbers, and the same gradients, at whatever values they have now.

    Everything else that the function reads stays as it was: other tensors, settings, and which way it went. Random numbers are drawn
    anew. All parameters must want a gradient when it is recorded; later each may or may not. Raises `NotRecordable` for a function that
    decides by the values of tensors, or writes over any, or of which a replay does not give the same.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> recording = Recording(lambda: [x.square().sum()], [x])
    >>> with torch.no_grad():
    ...     _ = x.fill_(3.0)
    >>> (y,) = recording()
    >>> y.backward()
    >>> float(y.detach()), x.grad
    (18.0, tensor([6., 6.]))
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], parameters: Sequence[Tensor]) -> None:
        """Run the function twice, without a trace in the random numbers: to record it, and to see that a replay gives the same."""
        self._parameters = tuple(parameters)
        with torch.random.fork_rng():
            forth = _Tape(self._parameters)
            with forth:
                every, distinct = _apart(function())
            self._places = [next(k for k, value in enumerate(distinct) if value is found) for found in every]
            self.moving = [value.requires_grad for value in distinct]
            slopes = [torch.ones_like(value) for value in distinct if value.requires_grad]
            back = _Tape(slopes, forth)
            with back:
                gradients = _gradients(distinct, self._parameters, slopes)
            self.back = back.replay(gradients)
            self.forth = forth.replay([*distinct, *back.kept])
            self._check(function)

    def __call__(self) -> list[Tensor]:
        """Return what the function would return."""
        distinct = _Replay.apply(self, *self._parameters)
        return [distinct[k] for k in self._places]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recording":
        """Return itself: what is copied is trained no further."""
        return self

    def _check(self, function: Callable[[], Sequence[Tensor]]) -> None:
        """See that a replay gives what the function does, at other random numbers."""
        found = []
        for run in (function, self):
            torch.manual_seed(1)
            every, distinct = _apart(run())
            found.append([*every, *_gradients(distinct, self._parameters)])
        for one, other in zip(*found, strict=True):
            if one is not other and (one is None or other is None or not torch.allclose(one, other, rtol=1e-3, equal_nan=True)):
                raise NotRecordable("A replay does not give what the function does.")


class _Replay(torch.autograd.Function):
    """Both ways as one step of autograd's."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Go forth."""
        done, n = recording.forth(*parameters), len(recording.moving)
        ctx.recording = recording
        ctx.save_for_backward(*done[n:])
        ctx.mark_non_differentiable(*(value for value, moves in zip(done[:n], recording.moving, strict=True) if not moves))
        return tuple(done[:n])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Go back."""
        recording = ctx.recording
        moved = (slope for slope, moves in zip(slopes, recording.moving, strict=True) if moves)
        return (None, *recording.back(*moved, *ctx.saved_tensors))


class _Tape(TorchDispatchMode):  # type: ignore[misc]
    """Writes down operations on tensors that it knows: those given, those of the tape before, and what becomes of them.

    What it does not know is constant. What it takes from the tape before is ``kept``, and given behind the others.
    """

    def __init__(self, given: Sequence[Tensor], before: "_Tape | None" = None) -> None:
        """Know what is given."""
        super().__init__()
        self.before, self.kept, self._graph, self._constants = before, list[Tensor](), Graph(), torch.nn.Module()
        self._nodes: dict[int, tuple[Node, Tensor]] = {}  # with the tensor, as an id is free again when this is gone
        self._named: dict[int, Node] = {}
        self._acts, self._first = set[Node](), cast("Node | None", None)
        for tensor in given:
            self._give(tensor)

    def knows(self, tensor: Tensor) -> bool:
        """Say whether it knows a tensor, by itself or from before."""
        return id(tensor) in self._nodes or (self.before is not None and self.before.knows(tensor))

    def replay(self, results: Sequence[Tensor | None]) -> GraphModule:
        """Return what gives these results."""
        self._graph.output(map_aggregate(list(results), self._told))
        self._graph.eliminate_dead_code(lambda node: node in self._acts or node.op in ("placeholder", "output"))
        return GraphModule(self._constants, self._graph)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation, and write it down unless it is constant."""
        kwargs, known = kwargs or {}, list[bool]()
        result, name = operation(*args, **kwargs), operation.overloadpacket.__name__
        map_aggregate((args, kwargs), lambda part: known.append(isinstance(part, Tensor) and self.knows(part)))
        random = torch.Tag.nondeterministic_seeded in operation.tags
        if not any(known) and not random:
            return result
        several = isinstance(result, tuple | list)
        values, writes = result if several else [result], operation._schema.is_mutable
        if not all(isinstance(value, Tensor) for value in values) or (writes and not self._made(args[0])):
            raise NotRecordable(f"The function decides by the values of tensors, or writes over what it did not make ({name}).")
        if name in SAME or (name in SHAPES and result.shape == args[0].shape):
            self._nodes[id(result)] = self._told(args[0]), result
            return result
        # torch's own functions are called in half the time of the operations behind them
        fast = getattr(torch._C._VariableFunctions, name, None) or getattr(torch._C.TensorBase, name, operation)
        node = self._graph.call_function(fast, *map_aggregate((args, kwargs), self._told))
        self._first = self._first or node
        self._acts |= {node} if random or writes else set()
        for k, value in enumerate(values):
            one = self._graph.call_function(_item, (node, k)) if several else node
            self._nodes[id(value)] = one, value
        return result

    def _made(self, tensor: Any) -> bool:
        """Say whether a tensor came of an operation that was written down here."""
        return id(tensor) in self._nodes and self._nodes[id(tensor)][0].op == "call_function"

    def _told(self, part: Any) -> Any:
        """Return the node of a tensor, and anything else as it is."""
        if not isinstance(part, Tensor):
            return part
        if id(part) in self._nodes:
            return self._nodes[id(part)][0]
        if self.before is not None and self.before.knows(part):
            self.kept.append(part)
            return self._give(part)
        if id(part) not in self._named:
            self._constants.register_buffer(name := f"constant_{len(self._named)}", part)
            self._named[id(part)] = self._graph.get_attr(name)
        return self._named[id(part)]

    def _give(self, tensor: Tensor) -> Node:
        """Know a tensor as one that is given; nodes of these come first."""
        with self._graph.inserting_before(self._first) if self._first else nullcontext():
            node = self._graph.placeholder(f"given_{len(self._nodes)}")
        self._nodes[id(tensor)] = node, tensor
        return node


def _item(values: Sequence[Tensor], k: int) -> Tensor:
    """Return one of several results."""
    return values[k]


def _apart(values: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Return values, and each of them once."""
    return values, list({id(value): value for value in values}.values())


def _gradients(values: Sequence[Tensor], parameters: Sequence[Tensor], slopes: Sequence[Tensor] | None = None) -> Sequence[Tensor | None]:
    """Return the gradients of values, each by its slope (1 without it), in parameters."""
    moved = [value for value in values if value.requires_grad]
    slopes = [torch.ones_like(value) for value in moved] if slopes is None else slopes
    return torch.autograd.grad(moved, parameters, slopes, allow_unused=True) if moved else [None] * len(parameters)
