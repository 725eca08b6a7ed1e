"""Functions that numba compiles: exponentials, logarithms and factorials, in the precision that log densities of counts need.

Imported where it is first needed (`perturbprob.compiled`). What numba keeps on disk it forgets when the file of the function that was
called changes: after a change here alone, touch kernel.py.
"""

import math
from typing import no_type_check

import numpy as np

from perturbprob.compiled import compiled

F = np.float32
ZERO, ONE, HALF = F(0), F(1), F(0.5)
_LOG2E, _LN2_HIGH, _LN2_LOW = F(1.44269504088896341), F(0.693359375), F(-2.12194440e-4)
_LEAST_EXPONENT, _LARGEST_EXPONENT = F(-87.0), F(88.0)
_SQRT_HALF, _MANTISSA = np.int32(0x3F3504F3), np.int32(0x007FFFFF)
_SHIFT, _BIAS, _NONE = np.int32(23), np.int32(127), np.int32(0)
# Cephes' polynomials for exp and log in single precision
_E0, _E1, _E2, _E3, _E4, _E5 = map(
    F, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
_L0, _L1, _L2, _L3, _L4 = map(F, (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1))
_L5, _L6, _L7, _L8 = map(F, (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1))


@compiled
@no_type_check
def expm1(x: float) -> tuple[float, float]:
    """Return exp(x) and exp(x) − 1, x from −87 to 88."""
    x = _LEAST_EXPONENT if x < _LEAST_EXPONENT else x  # in this order NaN stays NaN
    x = _LARGEST_EXPONENT if x > _LARGEST_EXPONENT else x
    n = np.floor(x * _LOG2E + HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    y = y * r * r + r
    power = np.int32(np.int32(np.int32(n) + _BIAS) << _SHIFT).view(np.float32)
    return power * y + power, power * y + (power - ONE)


@compiled
@no_type_check
def log(t: float, less_one: float) -> tuple[float, float, float]:
    """Return log t for t > 0, given t − 1 more precisely than t has it; also its terms beyond the second, and 1 where t is near 1."""
    bits = np.int32(np.float32(t).view(np.int32) - _SQRT_HALF)
    power = np.int32(bits >> _SHIFT)
    near = power == _NONE
    e = np.float32(power)
    m = less_one if near else np.int32(np.int32(bits & _MANTISSA) + _SQRT_HALF).view(np.float32) - ONE
    z = m * m
    beyond = ((((((((_L0 * m + _L1) * m + _L2) * m + _L3) * m + _L4) * m + _L5) * m + _L6) * m + _L7) * m + _L8) * m * z
    return m + (beyond + e * _LN2_LOW - HALF * z) + e * _LN2_HIGH, beyond, ONE if near else ZERO


@compiled
@no_type_check
def stirling(z: float) -> tuple[float, float]:
    """Return log Γ(z) − (z − ½) log z + z − ½ log 2π and the derivative of that, for z ≥ 8."""
    i = 1.0 / z
    s = i * i
    value = i * (1 / 12 - s * (1 / 360 - s * (1 / 1260 - s * (1 / 1680 - s / 1188))))
    slope = -s * (1 / 12 - s * (1 / 120 - s * (1 / 252 - s * (1 / 240 - s / 132))))
    return value, slope


@compiled
@no_type_check
def rising(theta: float, x: float) -> tuple[float, float]:
    """Return Σ_{j<x} log(1 + j/θ) = log Γ(x + θ) − log Γ(θ) − x log θ and Σ_{j<x} (1/(θ + j) − 1/θ), for x ≥ 8."""
    z, product, inverse = theta, 1.0, 0.0
    while z < 8.0:
        product *= z
        inverse += 1.0 / z
        z += 1.0
    y = theta + x
    more = y - z
    ratio = math.log1p(more / z)
    (value_y, slope_y), (value_z, slope_z) = stirling(y), stirling(z)
    value = (y - 0.5) * ratio - more + value_y - value_z
    if z != theta:
        value += more * math.log(z) - x * math.log(theta) + math.log(product)
    # ψ(y) − ψ(z) − x/θ; where nothing was shifted the two large terms stand together
    slope = ratio - x / theta + 0.5 * more / (y * z) + slope_y - slope_z + inverse
    return value, slope


@compiled
@no_type_check
def tables(inverse: np.ndarray, value: np.ndarray, slope: np.ndarray) -> None:
    """Fill the tables over counts k: Σ_{j<k} log(1 + j/θ_g) − log k!, and Σ_{j<k} (1/(θ_g + j) − 1/θ_g); ``inverse`` is 1/θ."""
    n_chunks, width = inverse.shape
    total, total_slope = np.zeros(width), np.zeros(width)
    for chunk in range(n_chunks):
        for j in range(width):
            value[0, chunk, j], slope[0, chunk, j], total[j], total_slope[j] = ZERO, ZERO, 0.0, 0.0
        for k in range(len(value) - 1):
            kf, log_next = np.float32(k), math.log(k + 1.0)
            for j in range(width):
                ratio = kf * inverse[chunk, j]
                total[j] += log(ONE + ratio, ratio)[0] - log_next
                value[k + 1, chunk, j] = total[j]
            for j in range(width):
                ratio = kf * inverse[chunk, j]
                total_slope[j] -= ratio * inverse[chunk, j] / (ONE + ratio)
                slope[k + 1, chunk, j] = total_slope[j]
