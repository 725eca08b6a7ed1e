"""The compiled Runge-Kutta steps of dδ/ds = pace ⊙ (tanh(δ A + c) B + b − γ ⊙ δ), and the way back through them.

Cells are taken in blocks, one for each lane, so that all of a block stays in the fastest cache; of the way only the state before each step
is kept. Imported where it is first needed (`perturbprob.compiled`).
"""

import math
from functools import partial
from typing import NamedTuple, no_type_check

import numpy as np

from perturbprob.compiled import FAST
from perturbprob.compiled import compiled as compiled_with

LANES, STRIDE = 64, 16
"""So many cells are dealt with at a time, filled up to a multiple of the second."""
compiled = partial(compiled_with, flags=FAST | {"reassoc"})
# tanh as a ratio of polynomials in single precision, as in Eigen; beyond the largest it is ±1
_LARGEST, *_P = map(
    np.float32,
    (
        7.90531110763549805,
        *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
        *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
        *(1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
    ),
)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _Q0, _Q1, _Q2, _Q3 = _P


class Layer(NamedTuple):
    """The layer, with A and B and what they are turned over."""

    inner: np.ndarray  # (latent, hidden), A
    inner_t: np.ndarray  # (hidden, latent)
    outer: np.ndarray  # (hidden, latent), B
    outer_t: np.ndarray  # (latent, hidden)
    offset: np.ndarray  # (latent,), b
    decay: np.ndarray  # (latent,), γ


class Sums(NamedTuple):
    """The gradients of the layer, to which each block adds."""

    inner: np.ndarray  # (latent, hidden)
    outer_t: np.ndarray  # (latent, hidden)
    offset: np.ndarray  # (latent,)
    decay: np.ndarray  # (latent,)


@compiled
@no_type_check
def _lanes(rows: np.ndarray) -> np.ndarray:
    """Return room for a block of rows. One by one: of arrays unpacked from an array numba would not know that they are contiguous."""
    return np.zeros((rows.shape[1], LANES), rows.dtype)


@compiled
@no_type_check
def _load(rows: np.ndarray, first: int, last: int, lanes: int, out: np.ndarray) -> None:
    """Turn rows into lanes; what is beyond the last is like the last."""
    for w in range(lanes):
        row = min(first + w, last - 1)
        for i in range(len(out)):
            out[i, w] = rows[row, i]


@compiled
@no_type_check
def _store(lanes: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
    """Turn lanes into rows."""
    for row in range(first, last):
        for i in range(len(lanes)):
            out[row, i] = lanes[i, row - first]


@compiled
@no_type_check
def _set(value: np.ndarray, scale: float, lanes: int, out: np.ndarray) -> None:
    """Set to a multiple. Written out, as are all sums here: numba is slow with slices."""
    for i in range(len(out)):
        for w in range(lanes):
            out[i, w] = scale * value[i, w]


@compiled
@no_type_check
def _add(value: np.ndarray, lanes: int, out: np.ndarray) -> None:
    """Add."""
    for i in range(len(out)):
        for w in range(lanes):
            out[i, w] += value[i, w]


@compiled
@no_type_check
def _squash(units: np.ndarray, lanes: int) -> None:
    """Take tanh."""
    for j in range(len(units)):
        if units.itemsize == 4:
            for w in range(lanes):
                x = units[j, w]
                x = _LARGEST if x > _LARGEST else x  # in this order NaN stays NaN
                x = -_LARGEST if x < -_LARGEST else x
                q = x * x
                over = (((((_P0 * q + _P1) * q + _P2) * q + _P3) * q + _P4) * q + _P5) * q + _P6
                units[j, w] = x * over / (((_Q0 * q + _Q1) * q + _Q2) * q + _Q3)
        else:
            for w in range(lanes):
                units[j, w] = math.tanh(units[j, w])


@compiled
@no_type_check
def _add_product(matrix: np.ndarray, x: np.ndarray, lanes: int, out: np.ndarray) -> None:
    """Add a matrix times what stands in the lanes, eight columns at a time."""
    n_rows, n_columns = matrix.shape
    whole = n_columns - n_columns % 8
    for r in range(n_rows):
        for k in range(0, whole, 8):
            a0, a1, a2, a3 = matrix[r, k], matrix[r, k + 1], matrix[r, k + 2], matrix[r, k + 3]
            a4, a5, a6, a7 = matrix[r, k + 4], matrix[r, k + 5], matrix[r, k + 6], matrix[r, k + 7]
            for w in range(lanes):
                four = a0 * x[k, w] + a1 * x[k + 1, w] + a2 * x[k + 2, w] + a3 * x[k + 3, w]
                out[r, w] += four + (a4 * x[k + 4, w] + a5 * x[k + 5, w] + a6 * x[k + 6, w] + a7 * x[k + 7, w])
        for k in range(whole, n_columns):
            a0 = matrix[r, k]
            for w in range(lanes):
                out[r, w] += a0 * x[k, w]


@compiled
@no_type_check
def _add_outer(left: np.ndarray, right: np.ndarray, lanes: int, out: np.ndarray) -> None:
    """Add left times right, summed over lanes, four columns at a time."""
    n_rows, n_columns = out.shape
    whole, zero = n_columns - n_columns % 4, out.dtype.type(0)
    for r in range(n_rows):
        for k in range(0, whole, 4):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for w in range(lanes):
                a = left[r, w]
                s0 += a * right[k, w]
                s1 += a * right[k + 1, w]
                s2 += a * right[k + 2, w]
                s3 += a * right[k + 3, w]
            out[r, k] += s0
            out[r, k + 1] += s1
            out[r, k + 2] += s2
            out[r, k + 3] += s3
        for k in range(whole, n_columns):
            s0 = zero
            for w in range(lanes):
                s0 += left[r, w] * right[k, w]
            out[r, k] += s0


@compiled
@no_type_check
def _stage(at: np.ndarray, shift: np.ndarray, layer: Layer, lanes: int, units: np.ndarray, slope: np.ndarray) -> None:
    """Fill in the hidden units, and tanh(δ A + c) B + b − γ ⊙ δ."""
    _set(shift, units.dtype.type(1), lanes, units)
    _add_product(layer.inner_t, at, lanes, units)
    _squash(units, lanes)
    for i in range(len(slope)):
        offset, decay = layer.offset[i], layer.decay[i]
        for w in range(lanes):
            slope[i, w] = offset - decay * at[i, w]
    _add_product(layer.outer_t, units, lanes, slope)


@compiled
@no_type_check
def _advance(before: np.ndarray, span: np.ndarray, slope: np.ndarray, reach: float, lanes: int, out: np.ndarray) -> None:
    """Go along a slope for a share of a step."""
    for i in range(len(out)):
        for w in range(lanes):
            out[i, w] = before[i, w] + reach * span[0, w] * slope[i, w]


@compiled
@no_type_check
def _pull(layer: Layer, units: np.ndarray, by_slope: np.ndarray, lanes: int, by_units: np.ndarray, by_state: np.ndarray) -> None:
    """Carry the gradient of a slope back to δ A + c and to δ."""
    for j in range(len(units)):
        for w in range(lanes):
            by_units[j, w] = 0
    _add_product(layer.outer, by_slope, lanes, by_units)
    for j in range(len(units)):
        for w in range(lanes):
            by_units[j, w] *= 1 - units[j, w] * units[j, w]
    for i in range(len(by_state)):
        decay = layer.decay[i]
        for w in range(lanes):
            by_state[i, w] = -decay * by_slope[i, w]
    _add_product(layer.inner, by_units, lanes, by_state)


@compiled
@no_type_check
def forward(state: np.ndarray, shift: np.ndarray, pace: np.ndarray, layer: Layer, out: np.ndarray, kept: np.ndarray) -> None:
    """Take the steps; ``kept`` (block, step, latent, lane) gets the state before each."""
    n_rows, number = len(state), state.dtype.type
    now, at, total, slope = _lanes(state), _lanes(state), _lanes(state), _lanes(state)
    units, shifts, span = _lanes(shift), _lanes(shift), _lanes(pace)
    h, half, one = number(1 / kept.shape[1]), number(0.5), number(1)
    for block in range(len(kept)):
        first, last = block * LANES, min(n_rows, (block + 1) * LANES)
        lanes = -(-(last - first) // STRIDE) * STRIDE
        _load(pace, first, last, lanes, span)
        _load(state, first, last, lanes, now)
        _load(shift, first, last, lanes, shifts)
        _set(span, h, lanes, span)
        for step in range(kept.shape[1]):
            _set(now, one, lanes, kept[block, step])
            _set(now, one, lanes, at)
            _set(now, one, lanes, total)
            for j in range(4):
                _stage(at, shifts, layer, lanes, units, slope)
                _advance(total, span, slope, number(1 / 6) if j % 3 == 0 else number(1 / 3), lanes, total)
                _advance(now, span, slope, half if j < 2 else one, lanes, at)
            _set(total, one, lanes, now)
        _store(now, first, last, out)


@compiled
@no_type_check
def backward(
    outward: np.ndarray,
    shift: np.ndarray,
    pace: np.ndarray,
    layer: Layer,
    kept: np.ndarray,
    by_state: np.ndarray,
    by_shift: np.ndarray,
    sums: Sums,
) -> None:
    """Carry the gradient of the end back through the steps, taking each once more from its beginning."""
    n_rows, n_latent, number = len(outward), outward.shape[1], outward.dtype.type
    at, units = np.empty((4, n_latent, LANES), outward.dtype), np.empty((4, shift.shape[1], LANES), outward.dtype)
    slope, later, by_slope, by_at, earlier = _lanes(outward), _lanes(outward), _lanes(outward), _lanes(outward), _lanes(outward)
    shifts, by_units, total, span = _lanes(shift), _lanes(shift), _lanes(shift), _lanes(pace)
    h, half, one = number(1 / kept.shape[1]), number(0.5), number(1)
    for block in range(len(kept)):
        first, last = block * LANES, min(n_rows, (block + 1) * LANES)
        lanes = -(-(last - first) // STRIDE) * STRIDE
        _load(pace, first, last, lanes, span)
        _load(outward, first, last, lanes, later)
        _load(shift, first, last, lanes, shifts)
        _set(span, h, lanes, span)
        for w in range(last - first, lanes):
            span[0, w] = 0  # what only fills up has no gradient
        _set(total, number(0), lanes, total)
        for step in range(kept.shape[1] - 1, -1, -1):
            before = kept[block, step]
            _set(before, one, lanes, at[0])
            for j in range(4):
                _stage(at[j], shifts, layer, lanes, units[j], slope)
                if j < 3:
                    _advance(before, span, slope, half if j < 2 else one, lanes, at[j + 1])
            _set(later, one, lanes, earlier)
            _set(later, number(0), lanes, by_at)
            for j in range(3, -1, -1):
                weight, reach = number(1 / 6) if j % 3 == 0 else number(1 / 3), one if j == 2 else half
                for i in range(n_latent):
                    whole, held = number(0), number(0)
                    for w in range(lanes):
                        x = span[0, w] * (weight * later[i, w] + reach * by_at[i, w])
                        by_slope[i, w] = x
                        whole += x
                        held += x * at[j, i, w]
                    sums.offset[i] += whole
                    sums.decay[i] -= held
                _pull(layer, units[j], by_slope, lanes, by_units, by_at)
                _add_outer(by_slope, units[j], lanes, sums.outer_t)
                _add_outer(at[j], by_units, lanes, sums.inner)
                _add(by_units, lanes, total)
                _add(by_at, lanes, earlier)
            _set(earlier, one, lanes, later)
        _store(later, first, last, by_state)
        _store(total, first, last, by_shift)
