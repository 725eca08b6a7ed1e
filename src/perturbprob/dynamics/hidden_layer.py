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


@final
@dataclass(frozen=True)
class HiddenLayer:
    """A push tanh(δ A + c) B + b, a function of the deviation δ alone: what rest state and marks tell the hidden units stands in c.

    ``inner`` is A, ``shift`` c, ``outer`` B and ``offset`` b. Called with δ and a clock, which it does not read. A, B and b may have a
    first axis of seeds, which then is the first axis of every state, too.

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
        decay = decay if decay.shape == layer.offset.shape else decay.expand_as(layer.offset)
        return _Steps.apply(state, shift, pace, layer.inner, layer.outer, layer.offset, decay, n_steps)

    def _fits(self, state: Float[Tensor, "*plate cell latent"]) -> bool:
        """Say whether the compiled steps can be taken: a CPU, one precision, a wait that is given, no transform of torch.func, numba."""
        layer, seeds = self.push, self.push.inner.shape[:-2]
        parts = (state, layer.inner, layer.shift, layer.outer, layer.offset, self.decay, self.pace)
        if any(part.device.type != "cpu" or part.dtype != state.dtype for part in parts) or self.pace.requires_grad:
            return False
        if state.dtype not in (torch.float32, torch.float64) or state.numel() == 0 or torch._C._are_functorch_transforms_active():
            return False
        vectors = layer.offset.numel() == seeds.numel() * state.shape[-1] and self.decay.ndim <= layer.offset.ndim
        return vectors and len(seeds) < 2 and state.shape[:-2][: len(seeds)] == seeds and kernel() is not None


def _expanded(part: Float[Tensor, "*part size"], rows: torch.Size) -> Float[Tensor, "*rows size"]:
    """Give each row its own, where they share one."""
    return part if part.shape[:-1] == rows else part.expand(*rows, -1)


def kernel() -> ModuleType | None:
    """Return the compiled steps, None where numba cannot be had."""
    return load("perturbprob.dynamics.layer_kernel", "backward", "its solver")


class _Steps(torch.autograd.Function):
    """The steps of `runge_kutta` without a graph, seed by seed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Float[Tensor, "*plate cell latent"]:
        """Take the steps of (state, shift, pace, A, B, b, γ, number of steps); keep the state before each step."""
        *given, n_steps = inputs
        compiled, arrays = kernel(), _arrays(given)
        end, (n_seeds, n_rows, n_latent) = np.empty_like(arrays[0]), arrays[0].shape
        kept = np.empty((n_seeds, -(-n_rows // compiled.LANES), n_steps, n_latent, compiled.LANES), end.dtype)
        for seed in range(n_seeds):
            state, shift, pace, *_ = (part[seed] for part in arrays)
            compiled.forward(state, shift, pace, _layer(arrays, seed), end[seed], kept[seed])
        ctx.save_for_backward(*given)
        ctx.kept, ctx.arrays = kept, arrays
        return torch.from_numpy(end).view(given[0].shape)

    @staticmethod
    def backward(ctx: Any, outward: Float[Tensor, "*plate cell latent"]) -> tuple[Tensor | None, ...]:
        """Carry the gradient back through the steps; one that is to be differentiated again goes the plain way."""
        if torch.is_grad_enabled():
            return _differentiable(ctx, outward)
        compiled, arrays = kernel(), ctx.arrays
        ends = np.ascontiguousarray(outward.numpy()).reshape(arrays[0].shape)
        state, shift, _, inner, outer, offset, decay = gradients = [np.zeros(part.shape, part.dtype) for part in arrays]
        gradients[4] = outer = np.zeros(outer.swapaxes(1, 2).shape, outer.dtype)
        for seed in range(len(ends)):
            sums = compiled.Sums(inner[seed], outer[seed], offset[seed], decay[seed])
            rows = (ends[seed], arrays[1][seed], arrays[2][seed])
            compiled.backward(*rows, _layer(arrays, seed), ctx.kept[seed], state[seed], shift[seed], sums)
        gradients[4] = outer.swapaxes(1, 2)
        shaped = [torch.from_numpy(part).reshape(of.shape) for part, of in zip(gradients, ctx.saved_tensors, strict=True)]
        return *shaped[:2], None, *shaped[3:], None


def _arrays(given: list[Tensor]) -> list[np.ndarray]:
    """Return contiguous arrays whose first axis is the seed: state, shift and pace in rows, A and B, and b and γ."""
    seeds = given[3].shape[:-2].numel()
    rows = [(seeds, -1, part.shape[-1]) for part in given[:3]]
    shapes = [*rows, *((seeds, *part.shape[-2:]) for part in given[3:5]), (seeds, -1), (seeds, -1)]
    return [np.ascontiguousarray(part.detach().numpy()).reshape(shape) for part, shape in zip(given, shapes, strict=True)]


def _layer(arrays: list[np.ndarray], seed: int) -> Any:
    """Return the layer of a seed, its matrices as they are and turned over."""
    inner, outer, offset, decay = (part[seed] for part in arrays[3:])
    return kernel().Layer(inner, np.ascontiguousarray(inner.T), outer, np.ascontiguousarray(outer.T), offset, decay)


def _differentiable(ctx: Any, outward: Float[Tensor, "*plate cell latent"]) -> tuple[Tensor | None, ...]:
    """Return the gradients by autograd, which can be differentiated again."""
    state, shift, pace, inner, outer, offset, decay = given = ctx.saved_tensors
    slope = RelaxingLayer(HiddenLayer(inner, shift, outer, offset), decay, pace)
    wanted = [k for k, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(runge_kutta(slope, state, ctx.kept.shape[2]), [given[k] for k in wanted], outward, create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return *(gradients.get(k) for k in range(len(given))), None
