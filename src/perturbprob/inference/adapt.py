"""A batch that the fit has never seen: its η from given cells, everything else as it was fitted."""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.inference.draws import Sites, check_draws, global_draws, seeded
from perturbprob.model.cells import Cells, CellTable
from perturbprob.model.guide import Guide

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel

NEWTON_STEPS = 12
ROUNDS = 3
"""How often the cells' states are found again, their counts corrected by the η found so far."""


def adapt(fit: "Fit", cells: Screen, batch: str, *, n_draws: int = 50, minibatch: int = 512, seed: int = 0, progress: bool = True) -> "Fit":
    """Return a fit that also knows ``batch``, whose η is estimated from given cells; everything else is as it was fitted.

    For each of ``n_draws`` coherent draws of the globals, z of every cell is drawn from q(z₀ | x) and carried through the cell's
    protocol; then, gene by gene,

        log p(η_g) = log Normal(η_g | 0, τ_g²) + Σ_cells log p(x_g | log rate + η_g),

    is maximised by Newton steps, and its curvature gives the spread. The law kept is normal per gene, with the mean and
    variance over draws. Fold changes and states of the cells are known from the other batches, so control cells alone will do. A new
    batch is not part of the zero sum: its η is relative to the average of those fitted. In a fit with ``batch_effect="state"`` it is
    constant over states and media.

    ``cells`` holds cells of that batch: those labelled so, or all where there is one batch only. Raises ValueError for a batch that
    the fit knows, for cells of other batches only, and for a fit of one batch, in which η has no scale.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=10, n_perturbations=2, seed=1).screen
    >>> train, new = screen[screen.batch != 2], screen[screen.batch == 2]
    >>> fit = pb.fit(pb.node(train, n_latent=2), train, epochs=2, progress=False)
    >>> again = pb.adapt(fit, new[new.cells_of("control")], "batch3", n_draws=4, progress=False)
    >>> again.model.vocabulary.batches
    ('batch1', 'batch2', 'batch3')
    """
    require_screen(cells)
    check_draws(n_draws)
    cells = _of_batch(fit, cells, batch)
    table, means, variances = CellTable(fit.model, cells, batch=-1), [], []
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="adapt" if progress else None)):
        with seeded(seed, k, 6):
            mean, variance = _mode(fit, table, table.sites(draw), minibatch)
        means.append(mean)
        variances.append(variance)
    mean, variance = torch.stack(means), torch.stack(variances)
    spread = mean.var(0, correction=0) + variance.mean(0)
    return _extended(fit, batch, mean.mean(0), spread, cells)


def _of_batch(fit: "Fit", cells: Screen, batch: str) -> Screen:
    """Return the cells of the new batch; refuse what is none."""
    if batch in fit.model.vocabulary.batches:
        raise ValueError(f"The fit knows batch {batch!r} already. Give the name of a batch that it has not seen.")
    if fit.model.batch_effect.n_batches == 1:
        raise ValueError("The fit has one batch, so how far batches differ was never seen. Fit a screen of several batches to adapt it.")
    if batch in cells.batches:
        return cells[cells.batch == cells.batches.index(batch)]
    if len(cells.batches) > 1:
        raise ValueError(f"No cell is in batch {batch!r}; the screen holds {', '.join(map(repr, cells.batches[:5]))}. Name one of them.")
    return cells


def _mode(fit: "Fit", table: CellTable, sites: Sites, minibatch: int) -> tuple[Float[Tensor, " gene"], Float[Tensor, " gene"]]:
    """Return the most probable η given one draw of the globals, and the inverse of its curvature."""
    model, precision = fit.model, sites["batch_scale"].square().reciprocal()
    eta = torch.zeros_like(model.log_share)
    for _ in range(ROUNDS):
        with torch.no_grad():
            parts = [(_offset(fit, sites, cells, eta), cells) for cells in table.minibatches(minibatch)]
        for _ in range(NEWTON_STEPS):
            slopes = [_slope(model, sites, offset + eta, cells) for offset, cells in parts]
            slope = sum(s for s, _ in slopes) - precision * eta
            curvature = sum(c for _, c in slopes) + precision
            step = (slope / curvature).clamp(-1, 1)
            eta = eta + step
            if step.abs().max() < 1e-4:
                break
    return eta, 1 / curvature


def _offset(fit: "Fit", sites: Sites, cells: Cells, eta: Float[Tensor, " gene"]) -> Float[Tensor, "cell gene"]:
    """Return the location of each cell's law without the new η, given a draw of its state from counts corrected by η."""
    model = fit.model
    corrected = cells.counts * torch.exp(-eta) if model.start is None else cells.counts - eta
    z = fit.guide.rest(replace(cells, counts=corrected)).sample()
    return (cells.log_size_factor + model.log_depth)[:, None] + model.log_shares(sites, model.moved(sites, z, cells.protocol), cells.rows)


@torch.enable_grad()
def _slope(model: "CellModel", sites: Sites, location: Float[Tensor, "cell gene"], cells: Cells) -> tuple[Tensor, Tensor]:
    """Return, summed over cells, slope and curvature of the log-density of each gene along its location; the curvature at least 0."""
    location = location.detach().requires_grad_()
    total = model.law(sites, location, cells.standard_error).log_prob(cells.counts).sum()
    (slope,) = torch.autograd.grad(total, location, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), location)
    return slope.detach().sum(0), -bend.sum(0).clamp(max=0)


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
