"""How strongly the cells of each perturbation speak against the perturbation doing nothing."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perturbprob.inference.density import importance
from perturbprob.inference.draws import Sites, centre, global_draws
from perturbprob.model.cell_model import CellModel
from perturbprob.model.cells import CellTable
from perturbprob.model.guide import Guide

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

PARTICLES, N_DRAWS = 32, 64


@torch.no_grad()
def log_evidence(model: CellModel, guide: Guide, screen: "Screen") -> dict[str, float]:
    """Return the log Bayes factor of each perturbation (by name, ``A+B`` for several) against no effect at all.

    Both sides are evaluated on the perturbation's own cells, with and without its mark and condition effects; what all cells
    share stays at its posterior centre. The side with effects e pays for them by Laplace's method,
    log BF = Σ_cells log p(x | ê) / p(x | 0) − ½ Σ_j [(ê_j − m_j)² / v_j + log v_j / s_j], with m_j, v_j the prior mean and variance
    of an effect and s_j its
    posterior variance. An effect that the cells do not ask for has ê near 0 and s_j near v_j, and brings nothing.
    """
    sites, names = centre(model, guide), [p.perturbation if p.perturbations else "" for p in screen.conditions]
    perturbed = torch.tensor([names[c] != "" for c in screen.condition]).nonzero()[:, 0]
    if not len(perturbed):
        return {}
    own, none = CellTable(model, screen), CellTable(model, screen, [p.unperturbed() for p in screen.conditions])
    # a control beside a perturbed cell may not have been measured: its media's effect is then what the model expects
    here, there = own.sites(sites), none.sites(sites)
    gain = dict.fromkeys(sorted({n for n in names if n}), 0.0)
    for number, index in enumerate(perturbed.split(512)):
        with_effect = importance(model, guide, here, own.cells(index), PARTICLES, seed=number)
        without = importance(model, guide, there, none.cells(index), PARTICLES, seed=number)
        for name, value in zip((names[c] for c in screen.condition[index.numpy()]), (with_effect - without).tolist(), strict=True):
            gain[name] += value
    price = _price(model, guide, sites)
    return {name: gain[name] - sum(price[part] for part in _parts(name, model, screen)) for name in gain}


def _parts(name: str, model: CellModel, screen: "Screen") -> set[str]:
    """Return the perturbations and condition terms that a perturbation's name stands for."""
    perturbations = {repr(a) for p in screen.conditions if p.perturbation == name for a in p.perturbations}
    return perturbations | {
        repr(t) for t in model.condition_effect.terms if perturbations & set(t) and set(t) - perturbations <= _media(model)
    }


def _media(model: CellModel) -> set[str]:
    """Return the names of media as condition terms write them."""
    return {f"Media({m!r})" for m in model.vocabulary.media}


def _price(model: CellModel, guide: Guide, sites: Sites) -> dict[str, float]:
    """Return what each perturbation's latent effect and each condition term pays for being there.

    A prior variance is itself uncertain; it is taken at its harmonic mean 1 / E[1 / v], at which an effect that the cells do not
    ask for has the posterior variance of its prior, and pays nothing.
    """
    price, effect = {repr(t): 0.0 for t in model.condition_effect.terms}, model.condition_effect
    draws = list(global_draws(model, guide, N_DRAWS))
    if model.vocabulary.perturbations:
        prior = _harmonic([d["perturbation_scale"][:, None].square() for d in draws])
        paid = _paid(sites["perturbation_effect"], guide.perturbation_effect_log_scale.exp().square(), prior)
        price |= {repr(p): float(v) for p, v in zip(model.vocabulary.perturbations, paid.sum(-1), strict=True)}
    if effect.nodes:
        prior = _harmonic([effect.law(d).innovation.square() for d in draws])
        change = sites["condition_effect"] - effect.law(sites).expected(sites["condition_effect"])
        for node, v in zip(effect.nodes, _paid(change, guide.condition_log_scale.exp().square(), prior).sum(-1), strict=True):
            price[repr(node.term)] += float(v)
    return price


def _harmonic(values: list[Tensor]) -> Tensor:
    """Return the harmonic mean."""
    return 1 / torch.stack([1 / v for v in values]).mean(0)


def _paid(value: Tensor, spread: Tensor, prior: Tensor) -> Tensor:
    """Return ½ [value² / prior + log prior / spread]."""
    return 0.5 * (value.square() / prior + (prior / spread).log())
