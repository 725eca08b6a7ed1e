"""The cells behind `simulate`: a gene network at rest that perturbations and media disturb."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.random import Generator
from scipy.integrate import solve_ivp

N_PROGRAMMES = 3  # latent programmes in which cells differ
_LOG_PRODUCTION_LIMIT = 2.0  # input saturates here, so that no network runs away


@final
@dataclass(frozen=True, eq=False)
class GeneNetwork:
    """Cells before anything is done to them, and the network that answers. Log rates are natural and known up to the depth of a cell."""

    base: np.ndarray  # log rate of the median cell at rest, per gene
    decay: np.ndarray  # per gene and unit of time
    dispersion: np.ndarray  # per gene
    loadings: np.ndarray  # programme × gene
    target: np.ndarray  # the genes that the screen knocks out
    weights: np.ndarray  # gene × regulator
    inputs: np.ndarray  # media × gene
    coupling: float  # how far a regulator acts by its own amount in the cell

    def outcome(self, x: np.ndarray, lost: int | None, media: int, times: Sequence[float]) -> np.ndarray:
        """Return log rates (time, point, gene) after cells that rest at log rates x (point, gene) lose a gene, or none, in a media.

        The change depends on x through the log share of each gene, so not on the constant that is depth, and not at all without coupling.
        """
        away = self.coupling * (log_softmax(x) - log_softmax(self.base)) if self.coupling else np.zeros((1, len(self.base)))
        return x + np.log(self._course(away, lost, self.inputs[media], times))

    def _course(self, away: np.ndarray, lost: int | None, context: np.ndarray, times: Sequence[float]) -> np.ndarray:
        """Integrate transcripts relative to the cell's own rest, (time, point, gene), after the product of gene ``lost`` is gone."""
        amount = np.exp(away).T
        at_rest = 2 * amount / (1 + amount)

        def slope(_: float, flat: np.ndarray) -> np.ndarray:
            transcript = flat.reshape(amount.shape)
            product = amount * transcript
            if lost is not None:
                product[lost] = 0
            drive = self.weights @ (2 * product / (1 + product) - at_rest) + context[:, None]
            limited = _LOG_PRODUCTION_LIMIT * np.tanh(drive / _LOG_PRODUCTION_LIMIT)
            return (self.decay[:, None] * (np.exp(limited) - transcript)).ravel()

        moments, place = np.unique(np.asarray(times, dtype=float), return_inverse=True)
        how = {"method": "LSODA" if len(away) == 1 else "DOP853", "rtol": 1e-8, "atol": 1e-10}  # LSODA's Jacobian is dense
        found = solve_ivp(slope, (0.0, moments[-1] or 1.0), np.ones(amount.size), t_eval=moments, **how).y.T[place]
        return found.reshape(len(place), *amount.shape).swapaxes(1, 2)


def draw_network(
    rng: Generator, n_genes: int, n_targets: int, n_inactive: int, effect_scale: float, heterogeneity: float, dispersion: float
) -> dict[str, np.ndarray]:
    """Draw base rates over a 200-fold range, decay near 1, and a network in which active targets are hubs."""
    target = rng.choice(n_genes, n_targets, replace=False)
    reach = np.full(n_genes, 0.02)
    reach[target] = 0.12
    weights = np.stack([draw_sparse(rng, n_genes, reach[j], skip=j) for j in range(n_genes)], axis=1)
    weights[:, target[:n_inactive]] = 0
    return {
        "base": rng.uniform(0, np.log(200), n_genes),
        "decay": np.exp(rng.normal(0, 0.3, n_genes)),
        "dispersion": dispersion * np.exp(rng.normal(0, 0.5, n_genes)),
        "loadings": rng.normal(0, heterogeneity / np.sqrt(N_PROGRAMMES), (N_PROGRAMMES, n_genes)),
        "target": np.sort(target),
        "weights": effect_scale * weights,
    }


def draw_sparse(rng: Generator, n_genes: int, share: float, *, skip: int = -1) -> np.ndarray:
    """Draw signed weights of mean size 1 on a share of the genes, at least one if the share is not 0, never on gene ``skip``."""
    others = np.setdiff1d(np.arange(n_genes), skip)
    chosen = rng.choice(others, max(int(share > 0), rng.binomial(len(others), share)), replace=False)
    weights = np.zeros(n_genes)
    weights[chosen] = rng.choice([-1, 1], len(chosen)) * rng.gamma(4, 1 / 4, len(chosen))
    return weights


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log of the share of each gene, the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
