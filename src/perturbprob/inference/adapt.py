"""A batch that the fit has never seen: its η from given cells, everything else as it was fitted."""

import copy
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.inference.draws import Sites, check_draws, global_draws, require_posterior, seeded
from perturbprob.inference.expectation import Expectation
from perturbprob.model.cells import CellTable, require_genes
from perturbprob.model.guide import Guide

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit


def adapt(fit: "Fit", cells: Screen, batch: str, *, n_draws: int = 50, seed: int = 0, progress: bool = True) -> "Fit":
    """Return a fit that also knows ``batch``, whose η is estimated from given cells; everything else is as it was fitted.

    For each of ``n_draws`` coherent draws of the globals the expected counts m_ng of the cells at η = 0 are known, averaged over rest
    states, and so is their variance. The quasi-likelihood of η_g has its mode and its variance in closed form,

        log (Σ_n x_ng + ½) / (Σ_n m_ng + ½)  and  1 / (Σ_n x_ng + ½) + Σ_n m_ng² (1/θ_g + CV²) / (Σ_n m_ng)²,

    CV² being the variance of a gene's expected share between cells over the square of its mean; both meet the prior
    Normal(0, c τ_g²). τ_g is learnt from how the fitted batches differ among themselves, which may be few and alike; c, common to all
    genes, is how much further off the new one is (`widening`). It asks nothing of q(z | x), which has never seen the batch and would
    take part of η for states of the cells. The law kept is normal per gene, with mean and variance over draws. Fold changes are known
    from the other batches, so control cells alone will do. A new batch is not part of the zero sum: its η is relative to the average of
    those fitted. In a fit with ``batch_effect="state"`` it is constant over states and media. Of continuous values, η is the mean of
    x − m.

    ``cells`` holds cells of that batch: those labelled so, or all where there is one batch only. Raises ValueError for a batch that
    the fit knows, for cells of other batches only, for cells with further assays, of whose η the RNA says nothing, and for a fit of one
    batch, in which η has no scale.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=10, n_perturbations=2, seed=1).screen
    >>> train, new = screen[screen.batch != 2], screen[screen.batch == 2]
    >>> fit = pb.fit(pb.node(train, n_latent=2), train, epochs=2, progress=False)
    >>> again = pb.adapt(fit, new[new.cells_of("control")], "batch3", n_draws=4, progress=False)
    >>> again.model.vocabulary.batches
    ('batch1', 'batch2', 'batch3')
    """
    require_posterior(fit, "New batches are known")
    require_screen(cells)
    check_draws(n_draws)
    _check(fit, cells, batch)
    cells = _of_batch(fit, cells, batch)
    seen, found = _Seen(fit, cells), []
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="adapt" if progress else None)):
        with seeded(seed, k, 6):
            mean, variance = seen.mode(draw)
        mean, prior = fit.model.batch_effect.centred(mean), draw["batch_scale"].square()
        prior = prior * widening(mean, variance, prior)
        found.append(torch.stack([mean * prior / (prior + variance), variance * prior / (prior + variance)]))
    mean, variance = torch.stack(found, 1)
    return _extended(fit, batch, mean.mean(0), mean.var(0, correction=0) + variance.mean(0), cells)


def widening(mode: Float[Tensor, " gene"], variance: Float[Tensor, " gene"], prior: Float[Tensor, " gene"]) -> Float[Tensor, ""]:
    """Return the most probable c from 0.01 to 1000 where modes ~ Normal(0, c · prior + variance).

    Ten genes more are taken to say c = 1, so that a handful of genes does not decide.

    >>> mode = torch.tensor([-2.0, 2.0]).repeat(2500)
    >>> round(float(widening(mode, torch.full((5000,), 0.01), torch.ones(5000))), 1)
    4.0
    """
    c = torch.logspace(-2, 3, 501, device=prior.device)
    total = c[:, None] * prior + variance
    return c[((total.log() + mode.square() / total).sum(1) + 10 * (c.log() + 1 / c)).argmin()]


def _check(fit: "Fit", cells: Screen, batch: str) -> None:
    """Refuse a name or cells that the fit has seen, genes that it has not, and a fit in which η has no scale."""
    if not isinstance(batch, str) or batch in ("", "average", "new"):
        raise ValueError(f"batch= names the new batch, by a word that predict does not mean otherwise; got {batch!r}.")
    require_genes(fit.model, cells)
    if batch in fit.model.vocabulary.batches:
        raise ValueError(f"The fit knows batch {batch!r} already. Give the name of a batch that it has not seen.")
    if cells.assays:
        raise ValueError(
            f"adapt estimates η of the RNA alone; what batch {batch!r} does to the assay {next(iter(cells.assays))!r} would stay 0. Leave "
            "the assays out, cells.with_assays({}), and take predictions of them in batches that were fitted."
        )
    if fit.model.penetrance is not None and any(p.perturbations for p in cells.conditions):
        raise ValueError(
            "Of edited cells that may have escaped, adapt cannot tell a batch effect from a smaller share of hits: give control cells, "
            "cells[cells.cells_of('control')]."
        )
    if fit.model.batch_effect.n_batches == 1:
        raise ValueError("The fit has one batch, so how far batches differ was never seen. Fit a screen of several batches to adapt it.")


def _of_batch(fit: "Fit", cells: Screen, batch: str) -> Screen:
    """Return the cells of the new batch; refuse cells of other batches only, and warn of those that the fit has seen."""
    if batch in cells.batches:
        cells = cells[cells.batch == cells.batches.index(batch)]
    elif len(cells.batches) > 1:
        raise ValueError(f"No cell is in batch {batch!r}; the screen holds {', '.join(map(repr, cells.batches[:5]))}. Name one of them.")
    if seen := set(map(str, cells.cells)) & set(fit.trained_on["cells"]):
        warnings.warn(
            f"{len(seen):,} of these cells have names of cells that the fit was trained on: if they are the same, this is no new batch.",
            stacklevel=3,
        )
    return cells


class _Seen:
    """What the cells of the new batch add up to, and what a draw of the globals expects of them."""

    def __init__(self, fit: "Fit", cells: Screen) -> None:
        """Add up the values of each gene, and depths and their squares over the cells of each condition."""
        self.model, n = fit.model, len(cells.conditions)
        self.expectation = Expectation(fit, list(cells.conditions), [None] * n)
        depth = (CellTable(fit.model, cells, batch=-1).log_size_factor + float(fit.model.log_depth)).double().exp()
        condition = torch.as_tensor(cells.condition)
        self.depth, self.squares = (torch.zeros(n, dtype=torch.double).index_add_(0, condition, d) for d in (depth, depth.square()))
        self.cells = torch.bincount(condition, minlength=n).double()
        self.total = torch.as_tensor(np.asarray(cells.counts.sum(axis=0, dtype=np.float64)).ravel())
        known = cells.standard_error
        self.known = 0.0 if known is None else torch.as_tensor(np.nan_to_num(known).astype(float) ** 2).sum(0)

    @torch.no_grad()
    def mode(self, draw: Sites) -> tuple[Float[Tensor, " gene"], Float[Tensor, " gene"]]:
        """Return, given one draw of the globals, the most probable η without its prior, and its variance."""
        sites = self.expectation.complete(draw)
        parts = [self._moments(sites, part) for part in self.expectation.parts]
        mean, variance = (torch.cat(values).double() for values in zip(*parts, strict=True))
        unit = self.model.law(sites, torch.zeros_like(self.model.log_share))
        if self.model.start is not None:
            n = self.cells.sum()
            noise = self.cells @ variance + n * unit.variance + self.known
            return ((self.total - self.cells @ mean) / n).to(draw["gene_bias"]), (noise / n**2).to(draw["gene_bias"])
        extra = (unit.variance - unit.mean) / unit.mean.square() + variance / mean.square()
        expected = (self.depth @ mean) * unit.mean
        spread = (self.squares @ (mean.square() * extra)) * unit.mean.square() / expected.square()
        eta, variance = ((self.total + 0.5) / (expected + 0.5)).log(), 1 / (self.total + 0.5) + spread
        return eta.to(draw["gene_bias"]), variance.to(draw["gene_bias"])

    def _moments(self, sites: Sites, part: Tensor) -> tuple[Float[Tensor, "part gene"], Float[Tensor, "part gene"]]:
        """Return mean and variance over rest states of the expected share, or of the location of continuous values."""
        values = self.expectation.log_shares(sites, part)
        values = values.exp() if self.model.start is None else values
        return values.mean(0).cpu(), values.var(0, correction=0).cpu()


def _extended(fit: "Fit", batch: str, mean: Float[Tensor, " gene"], variance: Float[Tensor, " gene"], cells: Screen) -> "Fit":
    """Return a copy of the fit with one more batch, and the normal law of its η in the guide."""
    model = copy.deepcopy(fit.model)
    model.vocabulary = replace(model.vocabulary, batches=(*model.vocabulary.batches, batch))
    model.batch_effect.adapted += 1
    model.recipe = model.recipe | {"adapted": model.batch_effect.adapted}
    guide, known = Guide(model, fit.guide.node_design, encodes=fit.guide.encodes), fit.guide.state_dict()
    rows = {"loc": model.batch_effect.centred(mean), "log_scale": 0.5 * variance.log()}
    for part, row in rows.items():
        name = f"batch_adapted_{part}"
        known[name] = torch.cat([known[name], row[None]]) if name in known else row[None]
    guide.load_state_dict(known)
    guide.eval().requires_grad_(False)
    adapted = fit.trained_on.get("adapted", {}) | {batch: list(map(str, cells.cells))}
    return replace(fit, model=model, guide=guide.to(model.log_share.device), trained_on=fit.trained_on | {"adapted": adapted})
