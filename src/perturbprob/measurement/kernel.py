"""The compiled pass over a minibatch: log density of counts and its gradients, in closed form.

Every gene is dealt with as if it had no count, chunk by chunk of the genes of a cell, where nothing branches; then what has a count is
written over. Imported where it is first needed (`perturbprob.compiled`).
"""

import math
from typing import no_type_check

import numpy as np

from perturbprob.compiled import FAST, compiled, part
from perturbprob.measurement.elementary import HALF, ONE, ZERO, F, expm1, log, rising, stirling, tables
from perturbprob.measurement.kernel_arguments import Counts, Law, Rates, Sums

CHUNK = 512
"""So many genes are dealt with at a time: what is known of them then stays in the fastest cache."""
LANES = 8
"""Arrays over genes are filled up to a multiple of it, which the processor deals with at a time: few that are none, none by itself."""
FULL = 0.2
"""From this share of genes with a count on all genes of a cell are dealt with as if they had one."""
BLOCK = 64
"""After so many cells sums in single precision are added to those in double."""
LARGEST = 2.0**31
"""Counts are whole numbers below it."""
_LARGE, _NAN = F(1e38), F(math.nan)
_LEAST, _POSITIVE, _SIGN = np.int32(-(2**31)), np.int32(2**31 - 1), np.int32(31)


# What is known of each gene of a chunk stands in one array of scratch, one part behind the other: the compiler then knows that no part
# lies on another. RATE μ, LOG1P log(1 + μ/θ), CLOSED 1/(1 + μ/θ), OPEN the log density of no count without π and SLOPE its derivative by
# θ; TABLE and TABLE_SLOPE what the tables hold of its count; VALUE the log density, BY_RATE, BY_THETA and BY_GATE its
# derivatives by log μ, θ and π; SUM and SUM_RATE sums of VALUE and BY_RATE over chunks.
RATE, LOG1P, CLOSED, OPEN, SLOPE, TABLE, TABLE_SLOPE, VALUE, BY_RATE, BY_THETA, BY_GATE, SUM, SUM_RATE, SCRATCH = (
    k * CHUNK for k in range(14)
)


@compiled
@no_type_check
def fill(theta: np.ndarray, gate: np.ndarray, law: Law) -> None:
    """Fill in θ and π of genes, lanes without one as that of the last, and what follows from them."""
    n_chunks, width = law.inverse.shape
    for chunk in range(n_chunks):
        for j in range(width):
            g = chunk * width + j
            law.inverse[chunk, j] = ZERO
            if len(law.theta):
                law.theta[chunk, j] = theta[min(g, len(theta) - 1)]
                law.inverse[chunk, j] = ONE / law.theta[chunk, j]
            if len(law.gate):
                law.gate[chunk, j] = closed = gate[min(g, len(gate) - 1)]
                law.log_open[chunk, j] = math.log1p(-closed)
                law.by_open[chunk, j] = -ONE / (ONE - closed)
    tables(law.inverse, law.value, law.slope)


@compiled
@no_type_check
def in_order(start: np.ndarray, gene: np.ndarray, n_genes: int) -> bool:
    """Say whether each row of a sparse matrix has its genes in order, each once."""
    for cell in range(len(start) - 1):
        last = np.int32(-1)
        for entry in range(start[cell], start[cell + 1]):
            if gene[entry] <= last:
                return False
            last = gene[entry]
        if last >= n_genes:
            return False
    return True


@compiled
@no_type_check
def _ordered(bits: int) -> int:
    """Return, for the bits of a number, a whole number; these are in the order of the numbers. Its own inverse."""
    return np.int32(bits ^ (np.int32(bits >> _SIGN) & _POSITIVE))


@compiled
@no_type_check
def _largest(row: np.ndarray) -> float:
    """Return the largest of a row: as whole numbers, which are compared many at a time. NaN is above all, below if negative."""
    largest = _LEAST
    for k in range(len(row)):
        value = _ordered(np.float32(row[k]).view(np.int32))
        largest = value if value > largest else largest
    return np.int32(_ordered(largest)).view(np.float32)


@no_type_check
def _total(row: np.ndarray) -> float:
    """Return the sum of a row, in any order."""
    total = ZERO
    for k in range(len(row)):  # not over values, which would be added one by one
        total += row[k]
    return total


_sum = compiled(_total, FAST | {"reassoc"})


@compiled
@no_type_check
def _present(count: np.ndarray) -> int:
    """Return how many genes have a count, or what is none."""
    present = np.int32(0)
    for g in range(len(count)):
        present += np.int32(count[g] != ZERO)
    return present


@compiled
@no_type_check
def _shares(logits: np.ndarray, softmax: bool, share: np.ndarray) -> tuple[float, float]:
    """Fill in the shares of genes, not yet divided by their sum; return what was taken from the logits, and the sum."""
    n, largest = len(logits), ZERO
    for g in range(n):
        share[g] = logits[g]
    share[n:] = logits[n - 1]
    if softmax:
        largest = _largest(share)
    for g in range(len(share)):
        share[g] = expm1(share[g] - largest)[0]
    share[n:] = ZERO
    return largest, _sum(share) if softmax else ONE


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
        c = ONE / (ONE + r)
        log1p, beyond, near = log(ONE + r, r)
        # near 1 the difference of two nearly equal numbers is r² (1/(1 + r) − ½) + the terms of the logarithm beyond the second
        slope = -(r * r * (c - HALF) + beyond) if near > ZERO else r * c - log1p
        value = -theta[chunk, j] * log1p
        work[LOG1P + j] = log1p
        work[CLOSED + j] = c
        work[OPEN + j] = value
        work[SLOPE + j] = slope
        work[BY_THETA + j] = slope
        work[VALUE + j] = value
        work[BY_RATE + j] = -work[RATE + j] * c


@part
@no_type_check
def _gated(chunk: int, width: int, gate: np.ndarray, work: np.ndarray) -> None:
    """Put the gate around log p = a of no count: log(π + (1 − π) e^a); the share (1 − π) e^a of it keeps its derivatives.

    In three loops, for which there are registers enough; e^a and e^a − 1 stand meanwhile where tables are read later.
    """
    for j in range(width):
        work[TABLE + j], work[TABLE_SLOPE + j] = expm1(work[VALUE + j])
    for j in range(width):
        closed = gate[chunk, j]
        own = (ONE - closed) * work[TABLE + j]
        inverse = ONE / (closed + own)
        work[BY_RATE + j] *= own * inverse
        work[BY_THETA + j] *= own * inverse
        work[BY_GATE + j] = -work[TABLE_SLOPE + j] * inverse
    for j in range(width):
        closed = gate[chunk, j]
        work[VALUE + j] = log(closed + (ONE - closed) * work[TABLE + j], (ONE - closed) * work[TABLE_SLOPE + j])[0]


@part
@no_type_check
def _read(
    chunk: int,
    shape: tuple[int, int],
    count: np.ndarray,
    largest: float,
    value: np.ndarray,
    slope: np.ndarray,
    place: np.ndarray,
    work: np.ndarray,
) -> None:
    """Read the tables, as rows, at the counts of a chunk; ``place`` is room."""
    n_chunks, width = shape
    for j in range(width):
        k = count[chunk, j]
        k = largest if k > largest else k
        k = k if k > ZERO else ZERO  # NaN becomes 0
        place[j] = (np.int32(k) * np.int32(n_chunks) + np.int32(chunk)) * np.int32(width) + np.int32(j)
    for j in range(width):
        at = np.int64(place[j])
        if at < 0:  # never; it keeps the compiler from gathering many at a time, which takes twice as long
            break
        work[TABLE + j], work[TABLE_SLOPE + j] = value[np.uint64(at)], slope[np.uint64(at)]


@part
@no_type_check
def _everywhere(chunk: int, width: int, count: np.ndarray, log_rate: np.ndarray, inverse: np.ndarray, work: np.ndarray) -> None:
    """Write over what genes of a chunk have where 0 < x, with what it is up to the largest x of the tables; log p is NaN of no count."""
    for j in range(width):
        x, mean, closed = count[chunk, j], work[RATE + j], work[CLOSED + j]
        log_prob = work[TABLE + j] + x * (log_rate[chunk, j] - work[LOG1P + j]) + work[OPEN + j]
        by_theta = work[SLOPE + j] + work[TABLE_SLOPE + j] + x * mean * closed * inverse[chunk, j] * inverse[chunk, j]
        log_prob = log_prob if x == np.floor(x) else _NAN
        log_prob = log_prob if x > ZERO else _NAN
        work[VALUE + j] = work[VALUE + j] if x == ZERO else log_prob
        work[BY_RATE + j] = work[BY_RATE + j] if x == ZERO else (x - mean) * closed
        work[BY_THETA + j] = work[BY_THETA + j] if x == ZERO else by_theta


@part
@no_type_check
def _everywhere_open(chunk: int, width: int, count: np.ndarray, log_open: np.ndarray, by_open: np.ndarray, work: np.ndarray) -> None:
    """Add what the gate has to say where 0 < x: that it was open."""
    for j in range(width):
        zero = count[chunk, j] == ZERO
        work[VALUE + j] += ZERO if zero else log_open[chunk, j]
        work[BY_GATE + j] = work[BY_GATE + j] if zero else by_open[chunk, j]


@compiled
@no_type_check
def _beyond(x: float, log_rate: float, theta: float) -> tuple[float, float, float]:
    """Return log p of a count too large for the tables, and its derivatives by log μ and θ (0: without), all in double precision."""
    rate, y = math.exp(log_rate), x + 1.0
    factorial = (y - 0.5) * math.log(y) - y + 0.9189385332046727 + stirling(y)[0]
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
    chunk: int,
    first: int,
    last: int,
    gene: np.ndarray,
    count: np.ndarray,
    cell: int,
    row: int,
    shift: float,
    rates: Rates,
    law: Law,
    work: np.ndarray,
    above: float,
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
        work[VALUE + j], work[BY_RATE + j], work[BY_THETA + j] = ZERO, np.float32(by_rate), np.float32(by_theta)
        if gated:
            total += law.log_open[chunk, j]
            work[BY_GATE + j] = law.by_open[chunk, j]
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
        work[CLOSED + j] = ONE
    # over genes, and the same numbers chunk by chunk
    share, by_rate = np.zeros(n_lanes, np.float32), np.zeros(n_lanes, np.float32)
    here, log_rate = np.zeros(n_lanes, np.float32), np.zeros(n_lanes, np.float32)
    shares, by_rates, heres, log_rates = share.reshape(shape), by_rate.reshape(shape), here.reshape(shape), log_rate.reshape(shape)
    by_theta, by_gate = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    found, seen = np.empty(n + 1, np.int32), np.empty(n + 1, np.float32)
    place, value, slope = np.empty(width, np.int32), law.value.reshape(-1), law.slope.reshape(-1)
    gene, count = (found, seen) if dense else (counts.gene, counts.number)
    present = ZERO
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
                here[g] = counts.dense[cell, g] if dense else ZERO
            for k in range(entry, end):
                here[gene[k]] = count[k]
            for g in range(n):
                log_rate[g] = rates.logits[cell, g] + np.float32(shift)
            if row >= 0:
                for g in range(n):
                    log_rate[g] += rates.eta[row, g]
            if dense:
                present, most = np.float32(_present(here)), _largest(here)
        if dense and not (everywhere and most <= above):
            for g in range(n):
                found[end], seen[end] = g, counts.dense[cell, g]
                end += counts.dense[cell, g] != ZERO  # NaN is not 0
            present = np.float32(end)
        for j in range(width):
            work[SUM + j] = ZERO
        for j in range(width):
            work[SUM_RATE + j] = ZERO
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
                _read(chunk, shape, heres, F(len(law.value) - 1), value, slope, place, work)
                _everywhere(chunk, width, heres, log_rates, law.inverse, work)
                if len(law.gate):
                    _everywhere_open(chunk, width, heres, law.log_open, law.by_open, work)
            if entry < behind:  # to hand on the arrays for nothing takes as long as a dozen genes
                log_prob += _counted(chunk, entry, behind, gene, count, cell, row, shift, rates, law, work, above)
            entry = behind
            _add_up(width, work)
            if wanted:
                _keep(chunk, width, weight, by_rates, by_theta, by_gate, work)
        all_genes = _sum(work[SUM_RATE : SUM_RATE + width])
        log_prob += np.float64(_sum(work[SUM : SUM + width]))
        sums.log_prob[cell] = _NAN if math.isnan(all_genes) else np.float32(log_prob)  # `log` does not pass on what is not a number
        if wanted:
            sums.by_depth[cell] = weight * all_genes
            if row >= 0 and len(sums.by_eta):
                for g in range(n):
                    sums.by_eta[row, g] += weight * by_rate[g]
            back = all_genes / total if rates.softmax else ZERO
            for g in range(n):
                sums.by_logits[cell, g] = weight * (by_rate[g] - share[g] * back)
            if (cell - first) % BLOCK == BLOCK - 1 or cell == last - 1:
                for chunk in range(n_chunks):
                    for j in range(width):
                        sums.by_theta[chunk, j] += by_theta[chunk, j]
                        sums.by_gate[chunk, j] += by_gate[chunk, j]
                        by_theta[chunk, j], by_gate[chunk, j] = ZERO, ZERO
