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
LANES = 32
"""Arrays over genes are filled up to a multiple of it, so that no gene is left over to be dealt with by itself."""
FULL = 0.2
"""From this share of genes with a count on all genes of a cell are dealt with as if they had one."""
BLOCK = 64
"""After so many cells sums in single precision are added to those in double."""
LARGEST = 2.0**31
"""Counts are whole numbers below it."""
FAST = {"contract", "nsz", "arcp"}  # not nnan: what is not a number must come out as such; not reassoc: log1p would lose its small numbers

_F = np.float32
_ZERO, _ONE, _HALF, _NAN = _F(0), _F(1), _F(0.5), _F(math.nan)
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


def part(function: Callable[..., Any]) -> Any:
    """Put a function into those that call it, so that arrays are neither sliced nor handed on."""
    return numba.njit(inline="always", error_model="numpy", fastmath=FAST)(function)


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
    n_chunks, width = inverse.shape
    total, total_slope = np.zeros(width), np.zeros(width)
    for chunk in range(n_chunks):
        for j in range(width):
            value[0, chunk, j], slope[0, chunk, j], total[j], total_slope[j] = _ZERO, _ZERO, 0.0, 0.0
        for k in range(len(value) - 1):
            kf, log_next = np.float32(k), math.log(k + 1.0)
            for j in range(width):
                ratio = kf * inverse[chunk, j]
                total[j] += _log(_ONE + ratio, ratio)[0] - log_next
                value[k + 1, chunk, j] = total[j]
            for j in range(width):
                ratio = kf * inverse[chunk, j]
                total_slope[j] -= ratio * inverse[chunk, j] / (_ONE + ratio)
                slope[k + 1, chunk, j] = total_slope[j]


class Rates(NamedTuple):
    """log rate = log ℓ_c + log softmax(logits_c) + η[row_c]; without ``softmax`` logits stand for log shares. No η where it has no rows.

    Here and below (chunk, lane) are the genes, in chunks that are filled up to a multiple of `LANES`.
    """

    logits: np.ndarray  # (cell, gene)
    log_depth: np.ndarray  # (cell,)
    eta: np.ndarray  # (row, gene)
    factor: np.ndarray  # (row, chunk, lane), exp(η)
    row: np.ndarray  # (cell,), −1 for none
    softmax: bool


class Law(NamedTuple):
    """θ and π, without genes where the law has none, and the `tables` of θ, one count behind the other."""

    theta: np.ndarray  # (chunk, lane)
    inverse: np.ndarray  # (chunk, lane), 1/θ, 0 without θ
    gate: np.ndarray  # (chunk, lane)
    log_open: np.ndarray  # (chunk, lane), log(1 − π)
    value: np.ndarray  # (count, chunk, lane)
    slope: np.ndarray  # (count, chunk, lane)


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
    by_theta: np.ndarray  # (chunk, lane)
    by_gate: np.ndarray  # (chunk, lane)


# What is known of each gene of a chunk stands in one array of scratch, one part behind the other: the compiler then knows that no part
# lies on another. RATE μ, LOG1P log(1 + μ/θ), CLOSED 1/(1 + μ/θ), OPEN the log density of no count without π and SLOPE its derivative by
# θ; TABLE and TABLE_SLOPE what the tables hold of its count; VALUE the log density, BY_RATE, BY_THETA and BY_GATE its
# derivatives by log μ, θ and π; SUM and SUM_RATE sums of VALUE and BY_RATE over chunks.
RATE, LOG1P, CLOSED, OPEN, SLOPE, TABLE, TABLE_SLOPE, VALUE, BY_RATE, BY_THETA, BY_GATE, SUM, SUM_RATE, SCRATCH = (
    k * CHUNK for k in range(14)
)


@compiled
@no_type_check
def _largest(row: np.ndarray) -> float:
    """Return the largest of a row, whose length is a multiple of `LANES`."""
    lane = row[:LANES].copy()
    lanes = row.reshape(-1, LANES)
    for block in range(len(lanes)):
        for k in range(LANES):
            value = lanes[block, k]
            lane[k] = value if value > lane[k] else lane[k]
    largest = lane[0]
    for k in range(LANES):
        largest = lane[k] if lane[k] > largest else largest
    return largest


@no_type_check
def _total(row: np.ndarray) -> float:
    """Return the sum of a row, in any order."""
    total = _ZERO
    for k in range(len(row)):  # not over values, which would be added one by one
        total += row[k]
    return total


_sum = compiled(_total, FAST | {"reassoc"})


@compiled
@no_type_check
def _summary(count: np.ndarray) -> tuple[float, float]:
    """Return how many genes have a count, and the largest."""
    present, most = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    lanes = count.reshape(-1, LANES)
    for block in range(len(lanes)):
        for k in range(LANES):
            x = lanes[block, k]
            present[k] += _ZERO if x == _ZERO else _ONE
            most[k] = most[k] if x <= most[k] else x
    largest = most[0]
    for k in range(LANES):
        largest = most[k] if most[k] > largest else largest
    return _sum(present), largest


@compiled
@no_type_check
def _shares(logits: np.ndarray, softmax: bool, share: np.ndarray) -> tuple[float, float]:
    """Fill in the shares of genes, not yet divided by their sum; return what was taken from the logits, and the sum."""
    n, largest = len(logits), _ZERO
    share[:n] = logits
    share[n:] = logits[n - 1]
    if softmax:
        largest = _largest(share)
    for g in range(len(share)):
        share[g] = _expm1(share[g] - largest)[0]
    share[n:] = _ZERO
    return largest, _sum(share) if softmax else _ONE


@part
@no_type_check
def _rates(chunk: int, width: int, share: np.ndarray, scale: float, factor: np.ndarray, row: int, work: np.ndarray) -> None:
    """Fill in μ."""
    if row >= 0:
        for j in range(width):
            work[RATE + j] = share[chunk, j] * scale * factor[row, chunk, j]
    else:
        for j in range(width):
            work[RATE + j] = share[chunk, j] * scale


@part
@no_type_check
def _poisson(width: int, work: np.ndarray) -> None:
    """Fill in log p of no count, and its derivative, without θ."""
    for j in range(width):
        value = -work[RATE + j]
        work[VALUE + j] = value
        work[OPEN + j] = value
        work[BY_RATE + j] = value


@part
@no_type_check
def _negative_binomial(chunk: int, width: int, theta: np.ndarray, inverse: np.ndarray, work: np.ndarray) -> None:
    """Fill in log p = −θ log(1 + r), r = μ/θ, of no count, and its derivatives −μ/(1 + r) and r/(1 + r) − log(1 + r)."""
    for j in range(width):
        r = work[RATE + j] * inverse[chunk, j]
        r = _LARGE if r > _LARGE else r
        c = _ONE / (_ONE + r)
        log, beyond, near = _log(_ONE + r, r)
        # near 1 the difference of two nearly equal numbers is r² (1/(1 + r) − ½) + the terms of the logarithm beyond the second
        slope = -(r * r * (c - _HALF) + beyond) if near > _ZERO else r * c - log
        value = -theta[chunk, j] * log
        work[LOG1P + j] = log
        work[CLOSED + j] = c
        work[OPEN + j] = value
        work[SLOPE + j] = slope
        work[BY_THETA + j] = slope
        work[VALUE + j] = value
        work[BY_RATE + j] = -work[RATE + j] * c


@part
@no_type_check
def _gated(chunk: int, width: int, gate: np.ndarray, work: np.ndarray) -> None:
    """Put the gate around log p = a of no count: log(π + (1 − π) e^a); the share (1 − π) e^a of it keeps its derivatives."""
    for j in range(width):
        exp, exp_less_one = _expm1(work[VALUE + j])
        closed = gate[chunk, j]
        own = (_ONE - closed) * exp
        total = closed + own
        inverse = _ONE / total
        share = own * inverse
        work[VALUE + j] = _log(total, (_ONE - closed) * exp_less_one)[0]
        work[BY_RATE + j] *= share
        work[BY_THETA + j] *= share
        work[BY_GATE + j] = -exp_less_one * inverse


@part
@no_type_check
def _read(chunk: int, width: int, count: np.ndarray, law: Law, work: np.ndarray) -> None:
    """Read the tables at the counts of a chunk."""
    largest = _F(len(law.value) - 1)
    for j in range(width):
        k = count[chunk, j]
        k = largest if k > largest else k
        k = k if k > _ZERO else _ZERO  # NaN becomes 0
        work[TABLE + j], work[TABLE_SLOPE + j] = law.value[np.int64(k), chunk, j], law.slope[np.int64(k), chunk, j]


@part
@no_type_check
def _everywhere(chunk: int, width: int, count: np.ndarray, log_rate: np.ndarray, inverse: np.ndarray, work: np.ndarray) -> None:
    """Write over what genes of a chunk have where 0 < x, with what it is up to the largest x of the tables; log p is NaN of no count."""
    for j in range(width):
        x, mean, closed = count[chunk, j], work[RATE + j], work[CLOSED + j]
        log_prob = work[TABLE + j] + x * (log_rate[chunk, j] - work[LOG1P + j]) + work[OPEN + j]
        by_theta = work[SLOPE + j] + work[TABLE_SLOPE + j] + x * mean * closed * inverse[chunk, j] * inverse[chunk, j]
        log_prob = log_prob if x == np.floor(x) else _NAN
        log_prob = log_prob if x > _ZERO else _NAN
        work[VALUE + j] = work[VALUE + j] if x == _ZERO else log_prob
        work[BY_RATE + j] = work[BY_RATE + j] if x == _ZERO else (x - mean) * closed
        work[BY_THETA + j] = work[BY_THETA + j] if x == _ZERO else by_theta


@part
@no_type_check
def _everywhere_open(chunk: int, width: int, count: np.ndarray, gate: np.ndarray, log_open: np.ndarray, work: np.ndarray) -> None:
    """Add what the gate has to say where 0 < x: that it was open."""
    for j in range(width):
        zero = count[chunk, j] == _ZERO
        work[VALUE + j] += _ZERO if zero else log_open[chunk, j]
        work[BY_GATE + j] = work[BY_GATE + j] if zero else -_ONE / (_ONE - gate[chunk, j])


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


@part
@no_type_check
def _counted(
    chunk: int, first: int, last: int, gene: np.ndarray, count: np.ndarray, cell: int, row: int, shift: float, rates: Rates, law: Law,
    work: np.ndarray, above: float,
) -> float:
    """Write over what genes of a chunk have where x > ``above``; return the sum of their log p, NaN if an x is no count."""
    total, dispersed, gated, start = 0.0, len(law.theta) > 0, len(law.gate) > 0, chunk * law.inverse.shape[1]
    for entry in range(first, last):
        g = gene[entry]
        j, x = g - start, np.float64(count[entry])
        if x == 0.0 or 0.0 < x <= above:
            continue
        if not (0.0 < x < LARGEST and x == math.floor(x)):
            total = math.nan
            break
        log_rate = np.float64(rates.logits[cell, g]) + shift
        if row >= 0:
            log_rate += np.float64(rates.eta[row, g])
        if x < len(law.value):
            k, mean, closed, inverse = int(x), np.float64(work[RATE + j]), np.float64(work[CLOSED + j]), np.float64(law.inverse[chunk, j])
            total += law.value[k, chunk, j] + x * (log_rate - np.float64(work[LOG1P + j])) + np.float64(work[OPEN + j])
            by_rate = (x - mean) * closed
            by_theta = np.float64(work[SLOPE + j]) + law.slope[k, chunk, j] + x * mean * closed * inverse * inverse
        else:
            log_prob, by_rate, by_theta = _beyond(x, log_rate, np.float64(law.theta[chunk, j]) if dispersed else 0.0)
            total += log_prob
        work[VALUE + j], work[BY_RATE + j], work[BY_THETA + j] = _ZERO, np.float32(by_rate), np.float32(by_theta)
        if gated:
            total += law.log_open[chunk, j]
            work[BY_GATE + j] = -_ONE / (_ONE - law.gate[chunk, j])
    return total


@part
@no_type_check
def _add_up(width: int, work: np.ndarray) -> None:
    """Add log densities, and derivatives by log rates, to their sums."""
    for j in range(width):
        work[SUM + j] += work[VALUE + j]
    for j in range(width):
        work[SUM_RATE + j] += work[BY_RATE + j]


@part
@no_type_check
def _keep(chunk: int, width: int, weight: float, by_rate: np.ndarray, by_theta: np.ndarray, by_gate: np.ndarray, work: np.ndarray) -> None:
    """Keep the gradients of a chunk."""
    for j in range(width):
        by_rate[chunk, j] = work[BY_RATE + j]
    for j in range(width):
        by_theta[chunk, j] += weight * work[BY_THETA + j]
    for j in range(width):
        by_gate[chunk, j] += weight * work[BY_GATE + j]


@compiled
@no_type_check
def fused(first: int, last: int, rates: Rates, law: Law, counts: Counts, sums: Sums) -> None:
    """Go through the cells from ``first`` to ``last``; the log density of a cell is NaN where one of its counts is none."""
    n, shape = rates.logits.shape[1], law.inverse.shape
    n_chunks, width = shape
    n_lanes = n_chunks * width
    wanted, has_eta, dense = len(sums.by_logits) > 0, len(rates.eta) > 0, len(counts.dense) > 0
    work = np.zeros(SCRATCH, np.float32)
    for j in range(CHUNK):
        work[CLOSED + j] = _ONE
    # over genes, and the same numbers chunk by chunk
    share, by_rate, here, log_rate = (np.zeros(n_lanes, np.float32), np.zeros(n_lanes, np.float32), np.zeros(n_lanes, np.float32), np.zeros(n_lanes, np.float32))
    shares, by_rates, heres, log_rates = share.reshape(shape), by_rate.reshape(shape), here.reshape(shape), log_rate.reshape(shape)
    by_theta, by_gate = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    found, seen = np.empty(n + 1, np.int32), np.empty(n + 1, np.float32)
    gene, count = (found, seen) if dense else (counts.gene, counts.count)
    present = _ZERO
    for cell in range(first, last):
        weight, depth = sums.weight[cell], np.float64(rates.log_depth[cell])
        largest, total = _shares(rates.logits[cell], rates.softmax, share)
        shift = depth - math.log(np.float64(total)) - np.float64(largest)
        scale = np.float32(math.exp(depth) / np.float64(total))
        row = rates.row[cell] if has_eta else -1
        entry, end, most = 0, 0, np.float32(LARGEST)
        if not dense:
            entry, end = counts.start[cell], counts.start[cell + 1]
            present = np.float32(end - entry)
        everywhere = present > FULL * n  # of rows, as it was in the cell before
        above = len(law.value) - 1.0 if everywhere else 0.0
        if everywhere:
            for g in range(n):
                here[g] = counts.dense[cell, g] if dense else _ZERO
            for k in range(entry, end):
                here[gene[k]] = count[k]
            for g in range(n):
                log_rate[g] = rates.logits[cell, g] + np.float32(shift)
            if row >= 0:
                for g in range(n):
                    log_rate[g] += rates.eta[row, g]
            if dense:
                present, most = _summary(here)
        if dense and not (everywhere and most <= above):
            for g in range(n):
                found[end], seen[end] = g, counts.dense[cell, g]
                end += not counts.dense[cell, g] == _ZERO  # NaN is not 0
            present = np.float32(end)
        for j in range(2 * CHUNK):
            work[SUM + j] = _ZERO
        log_prob = 0.0
        for chunk in range(n_chunks):
            _rates(chunk, width, shares, scale, rates.factor, row, work)
            if len(law.theta):
                _negative_binomial(chunk, width, law.theta, law.inverse, work)
            else:
                _poisson(width, work)
            if len(law.gate):
                _gated(chunk, width, law.gate, work)
            behind = entry
            while behind < end and gene[behind] < (chunk + 1) * width:
                behind += 1
            if everywhere:
                _read(chunk, width, heres, law, work)
                _everywhere(chunk, width, heres, log_rates, law.inverse, work)
                if len(law.gate):
                    _everywhere_open(chunk, width, heres, law.gate, law.log_open, work)
            log_prob += _counted(chunk, entry, behind, gene, count, cell, row, shift, rates, law, work, above)
            entry = behind
            _add_up(width, work)
            if wanted:
                _keep(chunk, width, weight, by_rates, by_theta, by_gate, work)
        all_genes = _sum(work[SUM_RATE : SUM_RATE + width])
        log_prob += np.float64(_sum(work[SUM : SUM + width]))
        sums.log_prob[cell] = _NAN if math.isnan(all_genes) else np.float32(log_prob)  # `_log` does not pass on what is not a number
        if wanted:
            sums.by_depth[cell] = weight * all_genes
            if row >= 0 and len(sums.by_eta):
                for g in range(n):
                    sums.by_eta[row, g] += weight * by_rate[g]
            back = all_genes / total if rates.softmax else _ZERO
            for g in range(n):
                sums.by_logits[cell, g] = weight * (by_rate[g] - share[g] * back)
            if (cell - first) % BLOCK == BLOCK - 1 or cell == last - 1:
                for chunk in range(n_chunks):
                    for j in range(width):
                        sums.by_theta[chunk, j] += by_theta[chunk, j]
                        sums.by_gate[chunk, j] += by_gate[chunk, j]
                        by_theta[chunk, j], by_gate[chunk, j] = _ZERO, _ZERO
