"""What each perturbation does to each gene, and whether it does anything."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.settings import is_within
from perturbprob.inference.caveats import AliasedWarning
from perturbprob.inference.draws import Sites, check_draws, global_draws, require_posterior, seeded, warn_if_large
from perturbprob.inference.expectation import Expectation
from perturbprob.inference.predict import labelled

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit


CHANGED, SLABS = 0.05, (1.0, 4.0, 16.0)
"""The share of genes that an active perturbation changes a priori, and the squared sizes of changes in posterior deviations."""


def effects(
    fit: "Fit",
    against: str = "control",
    *,
    n_draws: int = 200,
    level: float = 0.9,
    false_discoveries: float = 0.05,
    prior: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return the log fold change of every gene in every fitted condition against control, and which perturbations are hits.

    A Dataset with, over (condition, gene): ``log_fold_change`` (natural log of the ratio of expected shares, averaged over cells, at
    η = 0; the difference of continuous values), ``lower`` and ``upper`` (the central interval of probability ``level``) and
    ``local_false_sign_rate`` (the posterior probability that the sign is not that of the mean); and over (tested_perturbation,):

    - ``log_evidence``, an approximate log Bayes factor against the perturbation doing nothing;
    - ``probability`` that it does anything, from that factor and the ``prior`` probability;
    - ``false_discovery_share``, the expected share of false discoveries among it and all perturbations with a higher probability;
    - ``hit``: that share is at most ``false_discoveries``, its own probability above 0.5, and some of its cells are in a batch
      with control cells.

    Of a fit with ``penetrance`` the changes are those of cells that were hit.

    The factor is Wakefield's (Genet. Epidemiol. 33:79, 2009) from the posterior mean m and covariance C of a gene's fold changes over
    the T media and times of the perturbation. A perturbation that does something changes each gene with probability w = 0.05,
    by effects ~ Normal(0, κ C), κ = 1, 4 or 16 alike:
    log BF = Σ_genes log(1 − w + w mean_κ (1 + κ)^(−T/2) exp(½ κ/(1 + κ) mᵀ C⁻¹ m)), divided by the number of
    genes that move as one in the draws, tr(R²) / genes of their correlation R, since genes that share a direction
    count once. Posterior means are shrunk towards 0, so it errs
    towards "nothing".

    ``against`` names another perturbation to compare with; media and time are then the same on both sides. An interval that leaves
    out 0 says which genes change; ``hit`` says whether the perturbation does anything at all: read it first.
    """
    require_posterior(fit, "effects judges fold changes")
    check_draws(n_draws)
    if n_draws < 2:
        raise ValueError("effects needs at least 2 draws: fold changes are judged by their posterior deviation.")
    if not all(is_within(share, 0, 1) for share in (false_discoveries, prior, level)):
        raise ValueError("level, false_discoveries and prior are probabilities between 0 and 1.")
    pairs = _pairs(fit, against)
    n_values = 4 * n_draws * len(pairs) * len(fit.model.vocabulary.genes)
    warn_if_large(n_values, f"{n_draws} draws of {len(pairs)} conditions", "Lower n_draws.")
    draws = global_draws(fit.model, fit.guide, n_draws, seed, progress="effects" if progress else None)
    values = fold_changes(fit, pairs, draws, seed=seed)
    result = changes_of(fit, [p for p, _ in pairs], values, level, against=against)
    if against != "control":
        return result
    names = [p.perturbation for p, _ in pairs]
    evidence = {n: log_evidence(values[:, [k for k, m in enumerate(names) if m == n]]) for n in dict.fromkeys(names)}
    hits = _hits(evidence, prior, false_discoveries)
    alone = _uncontrolled(fit)
    hits["hit"] = hits["hit"] & ~hits["tested_perturbation"].isin(alone)
    return result.merge(hits, combine_attrs="no_conflicts")


def fold_changes(
    fit: "Fit", pairs: Sequence[tuple[Protocol, Protocol]], draws: Iterable[Sites], *, settled: bool = False, seed: int = 0
) -> Float[Tensor, "draw pair gene"]:
    """Return the log fold change between the two protocols of each pair in each draw of the globals."""
    everyone = list(dict.fromkeys(p for pair in pairs for p in pair))
    number = {p: k for k, p in enumerate(everyone)}
    here, there = (torch.tensor([number[pair[side]] for pair in pairs]) for side in (0, 1))
    expectation, found = Expectation(fit, everyone, [None] * len(everyone), settled=settled, seed=seed), []
    for k, sites in enumerate(draws):
        with seeded(seed, k, 2):
            sites = expectation.complete(sites)
            log_mean = torch.cat([_level(fit, expectation.log_shares(sites, part)) for part in expectation.parts]).cpu()
        found.append(log_mean[here] - log_mean[there])
    return torch.stack(found)


def changes_of(
    fit: "Fit", protocols: Sequence[Protocol], values: Float[Tensor, "draw pair gene"], level: float, *, against: str
) -> xr.Dataset:
    """Return draws of fold changes as mean, interval and local false sign rate, with names."""
    mean = values.mean(0)
    lower, upper = torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    wrong = (values * mean.sign() <= 0).float().mean(0)
    data = {"log_fold_change": mean, "lower": lower, "upper": upper, "local_false_sign_rate": wrong}
    units = "natural log of the ratio of expected shares" if fit.model.start is None else "difference of values"
    return labelled(fit, protocols, data, {"against": against, "level": level, "n_draws": len(values), "units": units})


def _level(fit: "Fit", location: Float[Tensor, "rest part gene"]) -> Float[Tensor, "part gene"]:
    """Return, up to a constant, the log of the mean share over rest states; of continuous values their mean."""
    return torch.logsumexp(location, 0) if fit.model.start is None else location.mean(0)


def log_evidence(draws: Float[Tensor, "draw condition gene"]) -> float:
    """Return the approximate log Bayes factor of one perturbation's fold changes against no change; see `effects`.

    The covariance over conditions is that of the draws, its correlations shrunk by the share of conditions in draws.
    """
    mean, n_conditions = draws.double().mean(0).T, draws.shape[1]
    centred = draws.double().permute(2, 1, 0) - mean[..., None]
    covariance = centred @ centred.mT / (len(draws) - 1)
    variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
    shrunk = min(1.0, 2 * n_conditions / len(draws))
    covariance = (1 - shrunk) * covariance + torch.diag_embed(shrunk * variance + 1e-12)
    squares = (mean * torch.linalg.solve(covariance, mean[..., None])[..., 0]).sum(-1)
    slabs = torch.tensor(SLABS, dtype=torch.double)[:, None]
    each = 0.5 * squares * slabs / (1 + slabs) - 0.5 * n_conditions * torch.log1p(slabs)
    changed = torch.logsumexp(each, 0) - math.log(len(SLABS))
    total = torch.logaddexp(torch.full_like(changed, math.log(1 - CHANGED)), math.log(CHANGED) + changed).sum()
    return float(total / _shared(centred / variance.sqrt().clamp(min=1e-12)[..., None]))


def _shared(standardised: Float[Tensor, "gene condition draw"]) -> float:
    """Return how many genes move as one in the draws: tr(R²) / genes of their correlation R, freed of its sampling noise; at least 1."""
    n_genes, n_conditions, n_draws = standardised.shape
    squares = -(n_genes**2) / (n_draws - 1)
    for x in standardised.unbind(1):
        gram = x @ x.T if n_genes < n_draws else x.T @ x
        squares += float((gram / (n_draws - 1)).square().sum()) / n_conditions
    return max(1.0, squares / n_genes)


def _pairs(fit: "Fit", against: str) -> list[tuple[Protocol, Protocol]]:
    """Return every fitted condition with what it is compared with: same media, same waits."""
    fitted = [Protocol.parse(text) for text in fit.trained_on["conditions"]]
    if not any(p.perturbations for p in fitted):
        raise ValueError("The fit has no perturbed cells, so there is no effect of a perturbation. Compare conditions with predict.")
    if against == "control":
        return [(p, p.unperturbed()) for p in fitted if p.perturbations]
    other = {p.unperturbed(): p for p in fitted if p.perturbation == against}
    if not other:
        known = sorted({p.perturbation for p in fitted})
        raise ValueError(f"No fitted condition has the perturbation {against!r}. Compare against one of {', '.join(known[:8])}.")
    pairs = [(p, other[p.unperturbed()]) for p in fitted if p.perturbation != against and p.unperturbed() in other]
    if not pairs:
        raise ValueError(f"No other fitted condition has the media and times of {against!r}, so nothing can be compared with it.")
    return pairs


def _uncontrolled(fit: "Fit") -> list[str]:
    """Return, and warn of, perturbations without a cell in any batch that holds control cells."""
    batches: dict[str, set[str]] = {}
    for text, cells in fit.trained_on["conditions"].items():
        batches.setdefault(Protocol.parse(text).perturbation, set()).update(cells)
    controlled = batches.pop("control", set())
    alone = [name for name, own in batches.items() if not own & controlled]
    if alone:
        warnings.warn(
            f"No cell of {', '.join(alone[:5])}{' and others' if len(alone) > 5 else ''} is in a batch with control cells: what it does "
            "cannot be told from its batch effect. It is not called a hit; put control cells into every batch.",
            AliasedWarning,
            stacklevel=3,
        )
    return alone


def _hits(evidence: dict[str, float], prior: float, cut: float) -> xr.Dataset:
    """Return each perturbation's probability of doing anything, and the expected share of false discoveries down to it."""
    names = list(evidence)
    logit = np.array([evidence[n] for n in names]) + np.log(prior / (1 - prior))
    probability = 1 / (1 + np.exp(-np.clip(logit, -500, 500)))
    order = np.argsort(-logit, kind="stable")
    share = np.empty(len(names))
    share[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(names) + 1)
    data = {
        "log_evidence": list(evidence.values()),
        "probability": probability,
        "false_discovery_share": share,
        "hit": (share <= cut) & (probability > 0.5),
    }
    dim = "tested_perturbation"
    return xr.Dataset({k: (dim, np.asarray(v)) for k, v in data.items()}, {dim: names}, {"false_discoveries": cut, "prior": prior})
