"""A function of parameters, recorded as the operations that it and its gradient take, and replayed without the Python around them."""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, final

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
    anew. Parameters that want no gradient now stay as they are; of the others each may or may not want one later. Raises `NotRecordable`
    for a function that decides by the values of tensors, writes over what was there before, or of which a replay does not give the same.
    What goes behind torch's back, such as a decision by ``x.tolist()``, is only seen if a small move of the parameters changes it.

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
        self._parameters = tuple(parameter for parameter in parameters if parameter.requires_grad)
        with torch.random.fork_rng():
            forth = _Tape(self._parameters)
            with forth:
                every = function()
            distinct = _distinct(every)
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
        """See that replays give what the function does, before and after it, at other random numbers and other parameters."""
        before, found = [parameter.detach().clone() for parameter in self._parameters], []
        try:
            with torch.no_grad():
                for parameter in self._parameters:
                    parameter.add_(0.01 * torch.randn_like(parameter))
            for run in (self, function, self):
                torch.manual_seed(1)
                values = run()
                found.append([*values, *_gradients(_distinct(values), self._parameters)])
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, before, strict=True):
                    parameter.copy_(value)
        for parts in zip(*found, strict=True):
            if not all(_alike(parts[1], part) for part in parts):
                raise NotRecordable("A replay does not give what the function does.")


class _Replay(torch.autograd.Function):
    """Both ways as one step of autograd's."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Go forth."""
        done, n = recording.forth(*parameters), len(recording.moving)
        # what does not move may be a constant of the recording, which nobody is to write over
        results = [value if moves else value.clone() for value, moves in zip(done[:n], recording.moving, strict=True)]
        ctx.recording = recording
        ctx.save_for_backward(*done[n:])
        ctx.mark_non_differentiable(*(value for value, moves in zip(results, recording.moving, strict=True) if not moves))
        return tuple(results)

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
        self._acts: set[Node] = set()
        for tensor in given:
            self._give(tensor)

    def knows(self, tensor: Tensor) -> bool:
        """Say whether it knows a tensor, by itself or from before."""
        return id(tensor) in self._nodes or (self.before is not None and self.before.knows(tensor))

    def replay(self, results: Sequence[Tensor | None]) -> GraphModule:
        """Return what gives these results."""
        self._graph.output(map_aggregate(list(results), self._told))
        for node in reversed(self._graph.nodes):
            if not node.users and node not in self._acts and node.op not in ("placeholder", "output"):
                self._graph.erase_node(node)
        return GraphModule(self._constants, self._graph)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation, and write it down unless it is constant."""
        kwargs = kwargs or {}
        result, name = operation(*args, **kwargs), operation.overloadpacket.__name__
        random, writes = torch.Tag.nondeterministic_seeded in operation.tags, operation._schema.is_mutable
        known = [part for part in _tensors((args, kwargs)) if self.knows(part)]
        if not known and not random:
            return result
        several = isinstance(result, tuple | list)
        values = result if several else [result]
        if not all(isinstance(value, Tensor) for value in values) or _shape_by_value(operation, known):
            raise NotRecordable(f"The function decides by the values of tensors ({name}).")
        if writes and not all(map(self._made, _tensors(_written(operation, args, kwargs)))):
            raise NotRecordable(f"The function writes over what was there before ({name}).")
        if name in SAME or (name in SHAPES and result.shape == args[0].shape):
            self._nodes[id(result)] = self._told(args[0]), result
            return result
        node = self._graph.call_function(_fast(operation), *map_aggregate((args, kwargs), self._told))
        self._acts |= {node} if random or writes else set()
        for k, value in enumerate(values):
            one = self._graph.call_function(getitem, (node, k)) if several else node
            self._nodes[id(value)] = one, value
        return result

    def _made(self, tensor: Tensor) -> bool:
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
        """Know a tensor as one that is given."""
        node = self._graph.placeholder(f"given_{len(self._nodes)}")
        self._nodes[id(tensor)] = node, tensor
        return node


def _tensors(arguments: Any) -> list[Tensor]:
    """Return all tensors among arguments."""
    found = list[Tensor]()
    map_aggregate(arguments, lambda part: found.append(part) if isinstance(part, Tensor) else None)
    return found


def _written(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes over."""
    names = [argument.name for argument in operation._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    given = dict(zip((argument.name for argument in operation._schema.arguments), args, strict=False)) | kwargs
    return [given[name] for name in names if name in given]


def _shape_by_value(operation: Any, known: Sequence[Tensor]) -> bool:
    """Say whether the shape of a result depends on values; to take rows by number is said to, and does not."""
    depends = torch.Tag.dynamic_output_shape in operation.tags
    return depends and (operation.overloadpacket.__name__ != "index" or any(part.dtype == torch.bool for part in known))


def _fast(operation: Any) -> Any:
    """Return torch's own function, which is called in half the time of the operation behind it."""
    name = operation.overloadpacket.__name__
    if operation.namespace != "aten":
        return operation
    return getattr(torch._C._VariableFunctions, name, None) or getattr(torch._C.TensorBase, name, operation)


def _distinct(values: Sequence[Tensor]) -> list[Tensor]:
    """Return each of the values once."""
    return list({id(value): value for value in values}.values())


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Say whether two gradients or values are the same, but for the order of sums."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-6, equal_nan=True)


def _gradients(values: Sequence[Tensor], parameters: Sequence[Tensor], slopes: Sequence[Tensor] | None = None) -> Sequence[Tensor | None]:
    """Return the gradients of values, each by its slope (1 without it), in parameters."""
    moved = [value for value in values if value.requires_grad]
    slopes = [torch.ones_like(value) for value in moved] if slopes is None else slopes
    return torch.autograd.grad(moved, parameters, slopes, allow_unused=True) if moved else [None] * len(parameters)
