"""What each perturbation does to each gene, and whether it does anything."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from perturbprob.experiment.action import Protocol
from perturbprob.inference.draws import check_draws, global_draws, seeded
from perturbprob.inference.predict import Expectation, labelled

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit


def effects(
    fit: "Fit",
    against: str = "control",
    *,
    n_draws: int = 200,
    level: float = 0.9,
    false_discoveries: float = 0.05,
    prior: float = 0.5,
    seed: int = 0,
) -> xr.Dataset:
    """Return the log fold change of every gene in every fitted condition against control, and which perturbations are hits.

    A Dataset with, over (condition, gene): ``log_fold_change`` (natural log of the ratio of expected shares, averaged over cells, at
    η = 0),
    ``lower`` and ``upper`` (the central interval of probability ``level``) and ``local_false_sign_rate`` (the posterior probability
    that the
    sign is not that of the mean); and over (perturbation,):

    - ``log_evidence``, the log Bayes factor against the perturbation doing nothing (see `log_evidence` of the training cells);
    - ``probability`` that it does anything, from that factor and the ``prior`` probability;
    - ``false_discovery_share``, the expected share of false discoveries among it and all perturbations with a higher probability;
    - ``hit``: that share is at most ``false_discoveries``.

    ``against`` names another perturbation to compare with; media and time are then the same on both sides. An interval that leaves
    out 0 says which genes change; ``hit`` says whether the perturbation does anything at all: read it first.
    """
    check_draws(n_draws)
    if not 0 < false_discoveries < 1 or not 0 < prior < 1 or not 0 < level < 1:
        raise ValueError("level, false_discoveries and prior are probabilities between 0 and 1.")
    pairs = _pairs(fit, against)
    everyone = list(dict.fromkeys(p for pair in pairs for p in pair))
    number = {p: k for k, p in enumerate(everyone)}
    here, there = (torch.tensor([number[pair[side]] for pair in pairs]) for side in (0, 1))
    expectation, draws = Expectation(fit, everyone, [None] * len(everyone), seed=seed), []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed)):
        with seeded(seed, k, 2):
            sites = expectation.complete(sites)
            log_mean = torch.cat([torch.logsumexp(expectation.log_shares(sites, part), 0) for part in expectation.parts]).cpu()
        draws.append(log_mean[here] - log_mean[there])
    values = torch.stack(draws)
    mean = values.mean(0)
    lower, upper = torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    wrong = (values * mean.sign() <= 0).float().mean(0)
    data = {"log_fold_change": mean, "lower": lower, "upper": upper, "local_false_sign_rate": wrong}
    attrs = {"against": against, "level": level, "n_draws": n_draws, "units": "natural log of the ratio of expected shares"}
    result = labelled(fit, [p for p, _ in pairs], data, attrs)
    return result.merge(_hits(fit.evidence, prior, false_discoveries)) if against == "control" else result


def _pairs(fit: "Fit", against: str) -> list[tuple[Protocol, Protocol]]:
    """Return every fitted condition with what it is compared with: same media, same waits."""
    fitted = [Protocol.parse(text) for text in fit.trained_on["conditions"]]
    if against == "control":
        return [(p, p.unperturbed()) for p in fitted if p.perturbations]
    other = {p.unperturbed(): p for p in fitted if p.perturbation == against}
    if not other:
        known = sorted({p.perturbation for p in fitted})
        raise ValueError(f"No fitted condition has the perturbation {against!r}. Compare against one of {', '.join(known[:8])}.")
    return [(p, other[p.unperturbed()]) for p in fitted if p.perturbation != against and p.unperturbed() in other]


def _hits(evidence: dict[str, float], prior: float, cut: float) -> xr.Dataset:
    """Return each perturbation's probability of doing anything, and the expected share of false discoveries down to it."""
    names = list(evidence)
    logit = np.array([evidence[n] for n in names]) + np.log(prior / (1 - prior))
    probability = 1 / (1 + np.exp(-np.clip(logit, -500, 500)))
    order = np.argsort(-logit, kind="stable")
    share = np.empty(len(names))
    share[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(names) + 1)
    data = {"log_evidence": list(evidence.values()), "probability": probability, "false_discovery_share": share, "hit": share <= cut}
    dim = "tested_perturbation"
    return xr.Dataset({k: (dim, np.asarray(v)) for k, v in data.items()}, {dim: names}, {"false_discoveries": cut, "prior": prior})
