"""Which edited cells were hit, and which escaped."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int, Int64
from torch import Tensor

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.screen import require_screen
from perturbprob.inference.arguments import unknown_sgrnas
from perturbprob.inference.density import importance
from perturbprob.inference.draws import Sites, check_draws, global_draws, require_fit, warn_if_large
from perturbprob.model.cells import Cells, CellTable
from perturbprob.model.penetrance import Hits, fold, ways

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit

PARTICLES = 20
"""How many rest states z₀ say how well a cell agrees with having been hit."""


@torch.no_grad()
def hit_probability(
    fit: "Fit",
    screen: "Screen",
    *,
    particles: int = PARTICLES,
    n_draws: int = 20,
    minibatch: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> xr.DataArray:
    """Return how probably each perturbation that was done to a cell has hit it, dims (cell, perturbation); NaN where it was not done.

    p(h | x) ∝ p(h | π) p(x | h), the rest state z₀ summed out by importance sampling with ``particles`` draws from q(z₀ | x, h), averaged
    over ``n_draws`` draws of what cells share. Where cells that were hit look like others it is π itself: ask `false_hits`.

    Raises ValueError for a fit without ``penetrance``.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2, penetrance=True), screen, epochs=2, progress=False)
    >>> pb.hit_probability(fit, screen, particles=4, n_draws=2).sizes
    Frozen({'cell': 200, 'perturbation': 2})
    """
    require_fit(fit)
    require_screen(screen)
    check_draws(n_draws)
    check_draws(particles, "particles")
    check_draws(minibatch, "minibatch")
    if fit.model.penetrance is None:
        raise ValueError("This fit takes every edited cell to be hit. Make its model with penetrance=True to ask which were.")
    names = fit.model.vocabulary
    warn_if_large(screen.n_cells * len(names.perturbations), "probabilities of cells and perturbations", "Ask for fewer cells.")
    _say_unknown_sgrnas(fit, screen)
    table = CellTable(fit.model, screen)
    found = torch.zeros(screen.n_cells, len(names.perturbations))
    parts = list(torch.arange(screen.n_cells).split(minibatch))
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="hits" if progress else None)):
        sites = table.sites(draw)
        for index in parts:
            cells = table.unfolded(index)
            share = weights(fit, sites, cells, particles, seed=(seed, k, 7 + int(index[0])))
            there = torch.stack([s.perturbation for s in cells.protocol]).amax(0)
            found.index_add_(0, index[_hits(cells).of.cpu()], (share[:, None] * there).cpu())
    done = np.array([[p in protocol.perturbations for p in names.perturbations] for protocol in map(names.protocol, screen.conditions)])
    value = np.where(done[screen.condition], found.numpy() / n_draws, np.nan)
    perturbations = [p.gene for p in names.perturbations]
    perturbations = perturbations if len(set(perturbations)) == len(perturbations) else list(map(repr, names.perturbations))
    return xr.DataArray(value, {"cell": list(screen.cells), "perturbation": perturbations}, ("cell", "perturbation"), "hit_probability")


def _say_unknown_sgrnas(fit: "Fit", screen: "Screen") -> None:
    """Warn of edited cells without an sgRNA of the fit, where each has a π of its own."""
    if n := unknown_sgrnas(fit.model, screen).sum():
        told = f"{n:,} edited cells have no sgRNA that the fit knows: for them its gene's π is taken"
        warnings.warn(f"{told}. If that is not meant, read the screen with sgrna=.", stacklevel=4)


def false_hits(
    fit: "Fit",
    screen: "Screen",
    *,
    particles: int = PARTICLES,
    n_draws: int = 20,
    minibatch: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return the mean probability of a hit of the cells of each perturbation, ``edited``, and of controls as if edited, ``control``.

    Nothing hit the control cells. If as many of them would be said to be hit as of the edited cells, what the fit calls hits are a part of
    the cells that is there without any editing, as in a perturbation that does nothing, and π is not to be believed. (Some are said to be
    hit wherever hit and escaped cells overlap.) Taken are cells of single perturbations, and as many controls of the same media, time
    and batch, or those there are, weighted as the edited cells are; dim (perturbation,), NaN where there are none.

    Raises ValueError for a fit without ``penetrance``.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2, penetrance=True), screen, epochs=2, progress=False)
    >>> sorted(pb.false_hits(fit, screen, particles=4, n_draws=2, progress=False))
    ['control', 'edited']
    """
    how: dict[str, Any] = {"particles": particles, "n_draws": n_draws, "minibatch": minibatch, "seed": seed, "progress": progress}
    hit = hit_probability(fit, screen, **how)
    empty = hit.isel(cell=0, drop=True).copy(data=np.full(hit.sizes["perturbation"], np.nan))
    pairs = _stand_ins(screen, np.random.default_rng(seed))
    if not pairs:
        return xr.Dataset({"edited": empty, "control": empty})
    conditions, owns, frees = zip(*pairs, strict=True)
    as_if = replace(
        screen[np.concatenate(frees)],
        conditions=screen.conditions,
        condition=np.repeat(conditions, list(map(len, frees))),
        sgrna=None if screen.sgrna is None else np.concatenate([screen.sgrna[own[: len(free)]] for _, own, free in pairs]),
    )
    places = [fit.model.vocabulary.perturbations.index(screen.conditions[k].perturbations[0]) for k in conditions]
    total, cells = np.zeros((2, len(empty))), np.zeros(len(empty))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the edited cells, whose sgRNAs these are, said it
        free_hit = hit_probability(fit, as_if, **how).values
    parts = np.split(free_hit, np.cumsum(list(map(len, frees)))[:-1])
    for place, own, part in zip(places, owns, parts, strict=True):
        total[:, place] += len(own) * np.array([hit.values[own, place].mean(), part[:, place].mean()])
        cells[place] += len(own)
    mean = np.divide(total, cells, out=np.full_like(total, np.nan), where=cells > 0)
    return xr.Dataset({name: empty.copy(data=row) for name, row in zip(("edited", "control"), mean, strict=True)})


def _stand_ins(screen: "Screen", rng: np.random.Generator) -> list[tuple[int, Int64[np.ndarray, " edited"], Int64[np.ndarray, " control"]]]:
    """Return the cells of each condition of one perturbation in each batch, and at most as many control cells beside, in random order."""
    codes, found = {condition: k for k, condition in enumerate(screen.conditions)}, []
    for k, condition in enumerate(screen.conditions):
        beside = codes.get(condition.unperturbed())
        if len(condition.perturbations) != 1 or beside is None:
            continue
        for batch in np.unique(screen.batch[screen.condition == k]):
            own, free = (rng.permutation(np.flatnonzero((screen.condition == c) & (screen.batch == batch))) for c in (k, beside))
            if len(free):
                found.append((k, own, free[: len(own)]))
    return found


@dataclass(frozen=True)
class Part:
    """Cells of a condition that went through the same: ``share`` gives their share of its cells in one draw of the globals."""

    protocol: Protocol
    share: Callable[[Sites], float]


def population(fit: "Fit", protocol: Protocol, edited: bool | None = None) -> list[Part]:
    """Return what cells of a protocol went through, and how many each: one part, unless edited cells may have escaped.

    ``edited`` asks for those hit by all that was done (True) or by nothing (False) alone. Where sgRNAs have a π of their own, those of
    the cells trained on are what a condition is made of; of a condition without such cells the π of its perturbations.
    """
    if fit.model.penetrance is None:
        return [Part(protocol, lambda _: 1.0)]
    several = ways(protocol)
    if edited is not None:
        return [Part(several[0 if edited else -1][0], lambda _: 1.0)]
    names, cells = fit.model.vocabulary, fit.trained_on.get("sgrnas", {}).get(repr(protocol), {})
    place = [names.perturbations.index(p) for p in protocol.perturbations]
    behind = {fit.model.sgrnas.index(name): n for name, n in cells.items() if name in fit.model.sgrnas}

    def share(sites: Sites, hit: tuple[bool, ...]) -> float:
        pi = sites["penetrance"][place]
        if behind and "sgrna_penetrance" in sites:
            own, n = sites["sgrna_penetrance"][list(behind)], torch.tensor(list(behind.values())).to(pi)
            pi = ((own * n).sum() / n.sum())[None]
        return math.prod((float(p if there else 1 - p) for p, there in zip(pi, hit, strict=True)), start=1.0)

    return [Part(way, partial(share, hit=hit)) for way, hit in several]


def weights(fit: "Fit", sites: Sites, cells: Cells, particles: int = PARTICLES, *, seed: tuple[int, ...] = (0,)) -> Float[Tensor, " row"]:
    """Return the probability of each way that a cell may have gone, given what was seen of it: p(h | x, globals)."""
    density, of = importance(fit.model, fit.guide, sites, cells, particles, seed=seed), _hits(cells).of
    return (density - fold(density, of)[of]).exp()


def _hits(cells: Cells) -> Hits:
    """Return the ways of unfolded cells."""
    if cells.hits is None:
        raise ValueError("These cells are not unfolded: take CellTable.unfolded of a model with penetrance.")
    return cells.hits


def gone(fit: "Fit", table: CellTable, sites: Sites, index: Int[Tensor, " cell"], *, seen: bool = True, sure: bool = False) -> Cells:
    """Return cells by the way that each has gone, hit or not: drawn, or the most probable (``sure``).

    It is drawn given what was ``seen`` of the cell, or before anything was. Where no cell escapes it is the cells themselves.
    """
    cells = table.unfolded(index)
    if fit.model.penetrance is None:
        return cells
    hits = _hits(cells)
    if seen:
        weight = weights(fit, sites, cells, seed=(int(torch.randint(2**31, ())),)).clamp(min=1e-30).log()
    else:
        weight = fit.model.penetrance.law(sites, hits).log_prob(hits.hit)
    noise = 0.0 if sure else -(-torch.rand_like(weight).clamp(1e-12, 1 - 1e-7).log()).log()  # Gumbel: the largest is a draw
    order = torch.argsort(weight + noise)
    order = order[torch.argsort(hits.of[order], stable=True)]
    return cells[order[torch.cat([hits.of.diff() > 0, hits.of.new_ones(1).bool()])]]
