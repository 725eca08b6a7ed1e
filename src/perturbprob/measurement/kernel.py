"""The compiled pass over a minibatch: log density of counts and its gradients, in closed form.

Imported where it is first needed, as numba is heavy. The functions are annotated for readers; numba reads the types of the arrays.
"""

import math
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np

CHUNK = 512
"""So many genes are dealt with at a time: what is known of them then stays in the fastest cache."""
BLOCK = 64
"""After so many cells sums in single precision are added to those in double."""
LARGEST = 2.0**31
"""Counts are whole numbers below it."""
FAST = {"contract", "nsz", "arcp"}  # not nnan: what is not a number must come out as such; not reassoc: log1p would lose its small numbers

_F = np.float32
_ZERO, _ONE, _HALF = _F(0), _F(1), _F(0.5)
_LARGE = _F(1e38)
_LOG2E, _LN2_HIGH, _LN2_LOW = _F(1.44269504088896341), _F(0.693359375), _F(-2.12194440e-4)
_EXP_LOW, _EXP_HIGH = _F(-87.0), _F(88.0)
_SQRT_HALF, _MANTISSA = np.int32(0x3F3504F3), np.int32(0x007FFFFF)
_SHIFT, _BIAS, _NONE = np.int32(23), np.int32(127), np.int32(0)
# Cephes' polynomials for exp and log in single precision
_E0, _E1, _E2, _E3, _E4, _E5 = map(_F, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = map(
    _F,
    (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ),
)


def compiled(function: Callable[..., Any], flags: Set[str] = FAST) -> Any:
    """Compile at the first call, and keep the result on disk where a folder can be written: the package's own, or the user's cache."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it can write to
        return numba.njit(**options)(function)


def is_kept(function: Any) -> bool:
    """Say whether a compiled function is on disk, no older than this file."""
    folder, source = function.stats.cache_path, Path(__file__)
    if folder is None or not Path(folder).is_dir():
        return False
    kept = Path(folder).glob(f"{source.stem}.{function.__name__}-*.nbc")
    return any(file.stat().st_mtime >= source.stat().st_mtime for file in kept)


@compiled
@no_type_check
def _expm1(x: float) -> tuple[float, float]:
    """Return exp(x) and exp(x) − 1, x from −87 to 88."""
    x = _EXP_LOW if x < _EXP_LOW else x  # in this order NaN stays NaN
    x = _EXP_HIGH if x > _EXP_HIGH else x
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    y = y * r * r + r
    power = np.int32(np.int32(np.int32(n) + _BIAS) << _SHIFT).view(np.float32)
    return power * y + power, power * y + (power - _ONE)


@compiled
@no_type_check
def _log(t: float, less_one: float) -> tuple[float, float, float]:
    """Return log t for t > 0, given t − 1 more precisely than t has it; also its terms beyond the second, and 1 where t is near 1."""
    bits = np.int32(np.float32(t).view(np.int32) - _SQRT_HALF)
    power = np.int32(bits >> _SHIFT)
    near = power == _NONE
    e = np.float32(power)
    m = less_one if near else np.int32(np.int32(bits & _MANTISSA) + _SQRT_HALF).view(np.float32) - _ONE
    z = m * m
    beyond = ((((((((_L0 * m + _L1) * m + _L2) * m + _L3) * m + _L4) * m + _L5) * m + _L6) * m + _L7) * m + _L8) * m * z
    return m + (beyond + e * _LN2_LOW - _HALF * z) + e * _LN2_HIGH, beyond, _ONE if near else _ZERO


@compiled
@no_type_check
def _largest(row: np.ndarray) -> float:
    """Return the largest of a row, eight at a time."""
    lane = np.full(8, row[0], np.float32)
    whole = len(row) // 8 * 8
    for start in range(0, whole, 8):
        for k in range(8):
            value = row[start + k]
            lane[k] = value if value > lane[k] else lane[k]
    largest = row[0]
    for k in range(8):
        largest = max(largest, lane[k])
    for k in range(whole, len(row)):
        largest = max(largest, row[k])
    return largest


@no_type_check
def _total(row: np.ndarray) -> float:
    """Return the sum of a row, in any order."""
    total = _ZERO
    for g in range(len(row)):  # not over values, which would be added one by one
        total += row[g]
    return total


_sum = compiled(_total, FAST | {"reassoc"})


@compiled
@no_type_check
def _stirling(z: float) -> tuple[float, float]:
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
    (value_y, slope_y), (value_z, slope_z) = _stirling(y), _stirling(z)
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
    value[0], slope[0] = 0.0, 0.0
    for k in range(len(value) - 1):
        j, log_next = np.float32(k), math.log(k + 1.0)
        for g in range(len(inverse)):
            ratio = j * inverse[g]
            value[k + 1, g] = value[k, g] + _log(_ONE + ratio, ratio)[0] - log_next
        for g in range(len(inverse)):
            slope[k + 1, g] = slope[k, g] - j * inverse[g] * inverse[g] / (_ONE + j * inverse[g])


@compiled
@no_type_check
def _present(row: np.ndarray, gene: np.ndarray, count: np.ndarray) -> int:
    """Write the genes with a count into ``gene``, and their counts; return how many."""
    n = 0
    for g in range(len(row)):
        gene[n], count[n] = g, row[g]
        n += not row[g] == 0  # NaN is not 0
    return n


class Rates(NamedTuple):
    """log rate = log ℓ_c + log softmax(logits_c) + η[row_c]; without ``softmax`` logits stand for log shares. No η where it has no rows."""

    logits: np.ndarray  # (cell, gene)
    log_depth: np.ndarray  # (cell,)
    eta: np.ndarray  # (row, gene)
    factor: np.ndarray  # (row, gene), exp(η)
    row: np.ndarray  # (cell,), −1 for none
    softmax: bool


class Law(NamedTuple):
    """θ and 1/θ, its tables over counts, and π; without genes where the law has none."""

    theta: np.ndarray  # (gene,)
    inverse: np.ndarray  # (gene,), 0 without θ
    gate: np.ndarray  # (gene,), 0 without π
    log_open: np.ndarray  # (gene,), log(1 − π) in double precision
    value: np.ndarray  # (count, gene)
    slope: np.ndarray  # (count, gene)


class Counts(NamedTuple):
    """Counts of cells: in rows, or, where these hold no cell, what is not 0 in them (CSR)."""

    dense: np.ndarray  # (cell, gene)
    start: np.ndarray  # (cell + 1,)
    gene: np.ndarray  # (entry,)
    count: np.ndarray  # (entry,)


class Sums(NamedTuple):
    """What is filled in: log p of each cell, and where it has cells, the gradients of Σ_c weight_c log p_c."""

    weight: np.ndarray  # (cell,)
    log_prob: np.ndarray  # (cell,)
    by_logits: np.ndarray  # (cell, gene)
    by_depth: np.ndarray  # (cell,)
    by_eta: np.ndarray  # (row, gene)
    by_theta: np.ndarray  # (gene,)
    by_gate: np.ndarray  # (gene,)


# What is known of each gene of a chunk stands in one array of scratch, one part behind the other: the compiler then knows that no part
# lies on another. RATE μ, LOG1P log(1 + μ/θ), CLOSED 1/(1 + μ/θ), SLOPE ∂/∂θ of the log density of no count without π; VALUE the log
# density, BY_RATE, BY_THETA and BY_GATE its derivatives by log μ, θ and π.
RATE, LOG1P, CLOSED, SLOPE, VALUE, BY_RATE, BY_THETA, BY_GATE, SCRATCH = (part * CHUNK for part in range(9))


@compiled
@no_type_check
def _shares(logits: np.ndarray, softmax: bool, share: np.ndarray) -> tuple[float, float]:
    """Fill in the shares of genes, not yet divided by their sum; return what was taken from the logits, and the sum."""
    largest = _largest(logits) if softmax else _ZERO
    for g in range(len(logits)):
        share[g] = _expm1(logits[g] - largest)[0]
    return largest, _sum(share) if softmax else _ONE


@compiled
@no_type_check
def _rates(share: np.ndarray, scale: float, factor: np.ndarray, work: np.ndarray) -> None:
    """Fill in μ."""
    if len(factor):
        for g in range(len(share)):
            work[RATE + g] = share[g] * scale * factor[g]
    else:
        for g in range(len(share)):
            work[RATE + g] = share[g] * scale


@compiled
@no_type_check
def _poisson(n: int, work: np.ndarray) -> None:
    """Fill in log p of no count, and its derivatives, without θ."""
    for g in range(n):
        work[VALUE + g] = -work[RATE + g]
        work[BY_RATE + g] = -work[RATE + g]


@compiled
@no_type_check
def _negative_binomial(theta: np.ndarray, inverse: np.ndarray, work: np.ndarray) -> None:
    """Fill in log p = −θ log(1 + r), r = μ/θ, of no count, and its derivatives −μ/(1 + r) and r/(1 + r) − log(1 + r)."""
    for g in range(len(theta)):
        r = work[RATE + g] * inverse[g]
        r = _LARGE if r > _LARGE else r
        c = _ONE / (_ONE + r)
        log, beyond, near = _log(_ONE + r, r)
        # near 1 the difference of two nearly equal numbers is r² (1/(1 + r) − ½) + the terms of the logarithm beyond the second
        slope = -(r * r * (c - _HALF) + beyond) if near > _ZERO else r * c - log
        work[LOG1P + g] = log
        work[CLOSED + g] = c
        work[SLOPE + g] = slope
        work[BY_THETA + g] = slope
        work[VALUE + g] = -theta[g] * log
        work[BY_RATE + g] = -work[RATE + g] * c


@compiled
@no_type_check
def _gated(gate: np.ndarray, work: np.ndarray) -> None:
    """Put the gate around log p = a of no count: log(π + (1 − π) e^a); the share (1 − π) e^a of it keeps its derivatives."""
    for g in range(len(gate)):
        exp, exp_less_one = _expm1(work[VALUE + g])
        is_open = _ONE - gate[g]
        own = is_open * exp
        total = gate[g] + own
        inverse = _ONE / total
        share = own * inverse
        work[VALUE + g] = _log(total, is_open * exp_less_one)[0]
        work[BY_RATE + g] *= share
        work[BY_THETA + g] *= share
        work[BY_GATE + g] = -exp_less_one * inverse


@compiled
@no_type_check
def _beyond(x: float, log_rate: float, theta: float) -> tuple[float, float, float]:
    """Return log p of a count too large for the tables, and its derivatives by log μ and θ (0: without), all in double precision."""
    rate, y = math.exp(log_rate), x + 1.0
    factorial = (y - 0.5) * math.log(y) - y + 0.9189385332046727 + _stirling(y)[0]
    if theta == 0.0:
        return x * log_rate - rate - factorial, x - rate, 0.0
    r = rate / theta
    log1p, closed = math.log1p(r), 1.0 / (1.0 + r)
    value, slope = rising(theta, x)
    by_theta = r * closed - log1p + slope + x * r * closed / theta
    return value - factorial + x * (log_rate - log1p) - theta * log1p, (x - rate) * closed, by_theta


@compiled
@no_type_check
def _counted(
    start: int, gene: np.ndarray, count: np.ndarray, logits: np.ndarray, eta: np.ndarray, shift: float, law: Law, work: np.ndarray
) -> float:
    """Write over what genes of the chunk from ``start`` have where x > 0; return the sum of their log p, NaN where an x is no count."""
    total, n_table, dispersed, gated = 0.0, len(law.value), len(law.theta) > 0, len(law.gate) > 0
    for entry in range(len(gene)):
        g = gene[entry]
        j, x = g - start, np.float64(count[entry])
        if x == 0.0:
            continue
        if not (0.0 < x < LARGEST and x == math.floor(x)):
            return math.nan
        log_rate = np.float64(logits[g]) + shift + (np.float64(eta[g]) if len(eta) else 0.0)
        if x < n_table:
            k, rate, closed, inverse = int(x), np.float64(work[RATE + j]), np.float64(work[CLOSED + j]), np.float64(law.inverse[g])
            log1p = np.float64(work[LOG1P + j])
            total += law.value[k, g] + x * (log_rate - log1p) - (np.float64(law.theta[g]) * log1p if dispersed else rate)
            by_rate = (x - rate) * closed
            by_theta = np.float64(work[SLOPE + j]) + law.slope[k, g] + x * rate * closed * inverse * inverse
        else:
            log_prob, by_rate, by_theta = _beyond(x, log_rate, np.float64(law.theta[g]) if dispersed else 0.0)
            total += log_prob
        work[VALUE + j], work[BY_RATE + j], work[BY_THETA + j] = _ZERO, np.float32(by_rate), np.float32(by_theta)
        if gated:
            total += law.log_open[g]
            work[BY_GATE + j] = -_ONE / (_ONE - law.gate[g])
    return total


@compiled
@no_type_check
def _add(weight: float, part: np.ndarray, total: np.ndarray) -> None:
    """Add a row, weighted, to another."""
    for g in range(len(total)):
        total[g] += weight * part[g]


@compiled
@no_type_check
def _back(weight: float, share: np.ndarray, by_share: float, by_logits: np.ndarray) -> None:
    """Turn derivatives by log rates into those by logits."""
    for g in range(len(share)):
        by_logits[g] = weight * (by_logits[g] - share[g] * by_share)


@compiled
@no_type_check
def fused(first: int, last: int, rates: Rates, law: Law, counts: Counts, sums: Sums) -> None:
    """Go through the cells from ``first`` to ``last``; the log density of a cell is NaN where one of its counts is none."""
    n = rates.logits.shape[1]
    wanted = len(sums.by_logits) > 0
    work = np.zeros(SCRATCH, np.float32)
    work[CLOSED : CLOSED + CHUNK] = _ONE
    share, by_theta, by_gate = np.empty(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
    found, seen, none = np.empty(n + 1, np.int32), np.empty(n + 1, np.float32), np.empty(0, np.float32)
    for cell in range(first, last):
        logits = rates.logits[cell]
        largest, total = _shares(logits, rates.softmax, share)
        shift = np.float64(rates.log_depth[cell]) - math.log(np.float64(total)) - np.float64(largest)
        scale = np.float32(math.exp(np.float64(rates.log_depth[cell])) / np.float64(total))
        row = rates.row[cell] if len(rates.eta) else -1
        eta, factor = (rates.eta[row], rates.factor[row]) if row >= 0 else (none, none)
        if len(counts.dense):
            there = _present(counts.dense[cell], found, seen)
            gene, count = found[:there], seen[:there]
        else:
            gene = counts.gene[counts.start[cell] : counts.start[cell + 1]]
            count = counts.count[counts.start[cell] : counts.start[cell + 1]]
        by_rate = sums.by_logits[cell] if wanted else none
        log_prob, all_genes, entry = 0.0, _ZERO, 0
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            size = stop - start
            _rates(share[start:stop], scale, factor[start:stop], work)
            if len(law.theta):
                _negative_binomial(law.theta[start:stop], law.inverse[start:stop], work)
            else:
                _poisson(size, work)
            if len(law.gate):
                _gated(law.gate[start:stop], work)
            behind = entry + np.searchsorted(gene[entry:], stop)
            log_prob += _counted(start, gene[entry:behind], count[entry:behind], logits, eta, shift, law, work)
            entry = behind
            log_prob += np.float64(_sum(work[VALUE : VALUE + size]))
            if wanted:
                all_genes += _sum(work[BY_RATE : BY_RATE + size])
                by_rate[start:stop] = work[BY_RATE : BY_RATE + size]
                _add(sums.weight[cell], work[BY_THETA:], by_theta[start:stop])
                _add(sums.weight[cell], work[BY_GATE:], by_gate[start:stop])
        sums.log_prob[cell] = np.float32(log_prob)
        if wanted:
            sums.by_depth[cell] = sums.weight[cell] * all_genes
            if row >= 0 and len(sums.by_eta):
                _add(sums.weight[cell], by_rate, sums.by_eta[row])
            _back(sums.weight[cell], share, all_genes / total if rates.softmax else _ZERO, by_rate)
            if (cell - first) % BLOCK == BLOCK - 1 or cell == last - 1:
                sums.by_theta[:] += by_theta
                sums.by_gate[:] += by_gate
                by_theta[:], by_gate[:] = _ZERO, _ZERO
