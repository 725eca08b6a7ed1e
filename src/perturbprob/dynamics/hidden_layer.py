"""A push by one hidden layer: what is constant over a wait is computed once, and its steps are compiled."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.compiled import load
from perturbprob.dynamics.solve import OwnSteps, runge_kutta

NARROW = 2048
"""Up to so many entries of A the compiled steps are faster; the products of wider layers are better left to torch."""


@final
@dataclass(frozen=True)
class HiddenLayer:
    """A push tanh(δ A + c) B + b, a function of the deviation δ alone: what rest state and marks tell the hidden units stands in c.

    ``inner`` is A, ``shift`` c, ``outer`` B and ``offset`` b. Called with δ and a clock, which it does not read. A and B may have a first
    axis of seeds, and b (seed, 1, latent), where every state has one.

    >>> one = torch.ones(1, 1)
    >>> HiddenLayer(one, -one, one, 2 * one[0])(one, one)
    tensor([[2.]])
    """

    inner: Float[Tensor, "*seed latent hidden"]
    shift: Float[Tensor, "*plate cell hidden"]
    outer: Float[Tensor, "*seed hidden latent"]
    offset: Float[Tensor, "*each latent"]

    def __call__(
        self, delta: Float[Tensor, "*plate cell latent"], clock: Float[Tensor, "*any cell 1"]
    ) -> Float[Tensor, "*plate cell latent"]:
        """Return the push."""
        return torch.tanh(delta @ self.inner + self.shift) @ self.outer + self.offset


@final
@dataclass(frozen=True)
class RelaxingLayer(OwnSteps):
    """The slope pace ⊙ (push − γ ⊙ δ) of a `HiddenLayer`, pace being how long each cell waits."""

    push: HiddenLayer
    decay: Float[Tensor, "*latent"]
    pace: Float[Tensor, "*plate cell 1"]

    def __call__(self, s: Float[Tensor, ""], state: Float[Tensor, "*plate cell latent"]) -> Float[Tensor, "*plate cell latent"]:
        """Return the slope, which is the same at all s."""
        return self.pace * torch.addcmul(self.push(state, self.pace), self.decay, state, value=-1)

    def steps(self, state: Float[Tensor, "*plate cell latent"], n_steps: int) -> Float[Tensor, "*plate cell latent"]:
        """Take the steps of `runge_kutta`, compiled where that can be."""
        if not self._fits(state):
            return runge_kutta(self, state, n_steps)
        layer, rows = self.push, state.shape[:-1]
        shift, pace, decay = _expanded(layer.shift, rows), _expanded(self.pace, rows), self.decay
        decay = decay.expand_as(layer.offset)
        return _Steps.apply(state, shift, pace, layer.inner, layer.outer, layer.offset, decay, n_steps)

    def _fits(self, state: Float[Tensor, "*plate cell latent"]) -> bool:
        """Say whether the compiled steps can be taken: one narrow layer, a CPU, one precision, a given wait, no torch.func, numba."""
        layer = self.push
        parts = (state, layer.inner, layer.shift, layer.outer, layer.offset, self.decay, self.pace)
        if any(part.device.type != "cpu" or part.dtype != state.dtype for part in parts) or self.pace.requires_grad:
            return False
        if state.dtype not in (torch.float32, torch.float64) or state.numel() == 0 or torch._C._are_functorch_transforms_active():
            return False
        one = layer.inner.ndim == 2 and layer.offset.ndim == 1 and self.decay.ndim < 2
        return one and layer.inner.numel() <= NARROW and kernel() is not None


def _expanded(part: Float[Tensor, "*part size"], rows: torch.Size) -> Float[Tensor, "*rows size"]:
    """Give each row its own, where they share one."""
    return part if part.shape[:-1] == rows else part.expand(*rows, -1)


def kernel() -> ModuleType | None:
    """Return the compiled steps, None where numba cannot be had."""
    return load("perturbprob.dynamics.layer_kernel", "backward", "its solver")


class _Steps(torch.autograd.Function):
    """The steps of `runge_kutta` without a graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Float[Tensor, "*plate cell latent"]:
        """Take the steps of (state, shift, pace, A, B, b, γ, number of steps); keep the state before each step."""
        *given, n_steps = inputs
        compiled, arrays = kernel(), [*map(_rows, given[:3]), *map(_array, given[3:])]
        end, (n_rows, n_latent) = np.empty_like(arrays[0]), arrays[0].shape
        kept = np.empty((-(-n_rows // compiled.LANES), n_steps, n_latent, compiled.LANES), end.dtype)
        compiled.forward(*arrays[:3], _layer(arrays), end, kept)
        ctx.save_for_backward(*given)
        ctx.kept, ctx.arrays = kept, arrays
        return torch.from_numpy(end).view(given[0].shape)

    @staticmethod
    def backward(ctx: Any, outward: Float[Tensor, "*plate cell latent"]) -> tuple[Tensor | None, ...]:
        """Carry the gradient back through the steps; one that is to be differentiated again goes the plain way."""
        if torch.is_grad_enabled():
            return _differentiable(ctx, outward)
        compiled, arrays = kernel(), ctx.arrays
        state, shift, _, inner, outer, offset, decay = (np.zeros(part.shape, part.dtype) for part in arrays)
        outer_t = np.zeros(outer.T.shape, outer.dtype)
        sums = compiled.Sums(inner, outer_t, offset, decay)
        compiled.backward(_rows(outward), *arrays[1:3], _layer(arrays), ctx.kept, state, shift, sums)
        found = zip((state, shift, inner, outer_t.T, offset, decay), [k for k in range(7) if k != 2], strict=True)
        first, second, *rest = (torch.from_numpy(part).reshape(ctx.saved_tensors[k].shape) for part, k in found)
        return first, second, None, *rest, None


def _array(part: Tensor) -> np.ndarray:
    """Return a tensor as an array, contiguous."""
    return np.ascontiguousarray(part.detach().numpy())


def _rows(part: Float[Tensor, "*plate cell size"]) -> np.ndarray:
    """Return all cells of a plate in rows."""
    return _array(part).reshape(-1, part.shape[-1])


def _layer(arrays: list[np.ndarray]) -> Any:
    """Return the layer, its matrices as they are and turned over."""
    inner, outer, offset, decay = arrays[3:]
    return kernel().Layer(inner, np.ascontiguousarray(inner.T), outer, np.ascontiguousarray(outer.T), offset, decay)


def _differentiable(ctx: Any, outward: Float[Tensor, "*plate cell latent"]) -> tuple[Tensor | None, ...]:
    """Return the gradients by autograd, which can be differentiated again."""
    state, shift, pace, inner, outer, offset, decay = given = ctx.saved_tensors
    slope = RelaxingLayer(HiddenLayer(inner, shift, outer, offset), decay, pace)
    wanted = [k for k, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(runge_kutta(slope, state, ctx.kept.shape[2]), [given[k] for k in wanted], outward, create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return *(gradients.get(k) for k in range(len(given))), None
