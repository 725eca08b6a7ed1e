"""What the compiled pass over a minibatch is given, as arrays: light to import, as numba is not."""

from typing import NamedTuple

import numpy as np


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
    by_open: np.ndarray  # (chunk, lane), its derivative −1/(1 − π)
    value: np.ndarray  # (count, chunk, lane)
    slope: np.ndarray  # (count, chunk, lane)


class Counts(NamedTuple):
    """Counts of cells: in rows, or, where these hold no cell, what is not 0 in them (CSR)."""

    dense: np.ndarray  # (cell, gene)
    start: np.ndarray  # (cell + 1,)
    gene: np.ndarray  # (entry,)
    number: np.ndarray  # (entry,)


class Sums(NamedTuple):
    """What is filled in: log p of each cell, and where it has cells, the gradients of Σ_c weight_c log p_c."""

    weight: np.ndarray  # (cell,)
    log_prob: np.ndarray  # (cell,)
    by_logits: np.ndarray  # (cell, gene)
    by_depth: np.ndarray  # (cell,)
    by_eta: np.ndarray  # (row, gene)
    by_theta: np.ndarray  # (chunk, lane)
    by_gate: np.ndarray  # (chunk, lane)
