"""Screens whose truth is one of our own structures: counts drawn from its prior, in the layout of another screen."""

import copy
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import nn

from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_range
from perturbprob.inference.draws import global_draws
from perturbprob.measurement.exact import Exact
from perturbprob.model.cell_model import CellModel
from perturbprob.model.cells import CellTable

EFFECTS = ("perturbation_effect", "media_effect")
_MOST = 1e5  # a draw of the prior may be of any size, and a count in single precision may not


@torch.no_grad()
def prior_screen(model: CellModel, template: Screen, seed: int = 0, *, strength: float = 1.0) -> Screen:
    """Return the template with counts drawn from the prior of a model: what `fit` and `compare` should find out again.

    Every global site is one draw from its prior, the weights of networks are drawn from Normal(0, 1 / fan in), and every cell is at rest
    z₀ ~ Normal(0, I), goes through its own protocol and is measured (eqs 4, 10, 15). Cells, conditions, batches and size factors are
    those of the template, of whose counts nothing is kept; the new ones (cell, gene) stop at 100,000. The model has to know the
    genes and names of the template. It is not changed, nor is the user's random state. What perturbations and media add to the push
    on a latent state is ``strength`` times its draw; the network of a causal context stays as drawn.

    Raises ValueError for continuous values, for a template or model of further assays, for `stationary`, which has no law of counts, and
    for ``penetrance``, as every cell would be hit.

    >>> import perturbprob as pb
    >>> template = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> screen = pb.prior_screen(pb.node(template, n_latent=2), template, seed=3)
    >>> screen.counts.shape, screen.conditions == template.conditions
    ((200, 10), True)
    """
    _check(model, template)
    check_range(0.0, 1e6, strength=strength)
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, layer.in_features**-0.5)
        table = CellTable(model, template)
        draw = next(iter(global_draws(model, None, 1, seed)))
        sites = table.sites(draw | {name: strength * draw[name] for name in EFFECTS if name in draw})
        cells = table.cells(torch.arange(template.n_cells))
        state = model.moved(sites, model.at_rest(len(cells)).sample(), cells.protocol)
        counts = model.measured(sites, state, cells).sample().clamp(max=_MOST)
    return replace(template, counts=csr_array(counts.cpu().numpy().astype(np.float32)))


def _check(model: object, template: Screen) -> None:
    """Refuse what has no prior of counts, and what a screen of counts cannot show."""
    require_screen(template)
    if not isinstance(model, CellModel):
        raise TypeError(f"prior_screen draws from a model; got {type(model).__name__}. Make one with pb.node(template, n_latent=2).")
    if template.values == "continuous" or template.assays or model.assays:
        raise ValueError("prior_screen draws counts of RNA: give a template and a model of counts, without further assays.")
    if isinstance(model.measurement, Exact):
        raise ValueError("A stationary diffusion has no law of counts to draw from: take causal_context, which has the same network.")
    if model.penetrance is not None:
        raise ValueError("prior_screen has every edited cell hit, and this model lets cells escape: make it without penetrance=.")
