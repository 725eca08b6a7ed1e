"""Draws of what all cells share, as ArviZ InferenceData with named dimensions."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from perturbprob.inference.draws import Sites, check_draws, global_draws, require_likelihood

if TYPE_CHECKING:
    from arviz import InferenceData

    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel

DIMS: dict[str, tuple[str, ...]] = {
    "network": ("gene", "regulator"),
    "edge_gate": ("gene", "regulator"),
    "edge_inclusion": (),
    "edge_scale": (),
    "perturbation_own": ("perturbation",),
    "interference_strength": ("interference",),
    "activation_strength": ("activation",),
    "batch_effect": ("batch", "gene"),
    "batch_scale_overall": (),
    "batch_scale": ("gene",),
    "batch_media_effect": ("media", "batch", "gene"),
    "batch_media_scale_overall": (),
    "batch_media_scale": ("gene",),
    "batch_state_effect": ("latent", "batch", "gene"),
    "batch_state_scale": ("latent",),
    "batch_covariate_effect": ("batch_covariate", "gene"),
    "batch_covariate_scale": ("batch_covariate",),
    "batch_screen_ratio": (),
    "gene_bias": ("gene",),
    "dispersion": ("gene",),
    "dispersion_overall": (),
    "dispersion_spread": (),
    "gate": ("gene",),
    "perturbation_scale": ("perturbation",),
    "perturbation_effect": ("perturbation", "latent"),
    "perturbation_gate": ("perturbation", "latent"),
    "media_gate": ("media", "latent"),
    "perturbation_inclusion": (),
    "media_inclusion": (),
    "media_scale": ("media",),
    "media_effect": ("media", "latent"),
    "condition_scale": ("term",),
    "condition_gene_scale": ("gene",),
    "condition_local_scale": ("term", "gene"),
    "condition_memory": (),
    "condition_effect": ("node", "gene"),
    "noise": ("gene",),
    "penetrance": ("perturbation",),
    "penetrance_concentration": (),
    "sgrna_penetrance": ("sgrna",),
    "steady_state_excess": ("steady_state",),
}
"""The dimensions of every global site of a `CellModel`; its name is also its name in ArviZ."""
ASSAY_DIMS: dict[str, tuple[str, ...]] = {
    "level": ("feature",),
    "coupling": ("linked",),
    "dispersion": ("feature",),
    "dispersion_overall": (),
    "dispersion_spread": (),
    "background": ("feature",),
    "background_weight": ("feature",),
    "condition_scale": ("term",),
    "condition_gene_scale": ("feature",),
    "condition_local_scale": ("term", "feature"),
    "condition_memory": (),
    "condition_effect": ("node", "feature"),
    "batch_effect": ("batch", "feature"),
    "batch_scale_overall": (),
    "batch_scale": ("feature",),
    "batch_screen_ratio": (),
}
"""The same for a further assay, whose name comes before that of the site; so it does before feature, and linked, those with a gene."""


def posterior(fit: "Fit", n_draws: int = 200, *, seed: int = 0) -> "InferenceData":
    """Draw from the posterior of everything that cells share.

    Returns ArviZ InferenceData (a DataTree from ArviZ 1 on) with the group ``posterior``: dims (chain, draw, ...) and named coordinates
    batch, gene, perturbation, media, latent, and node and term for the condition effects (``node`` carries term and time). The latent
    axes rotate from fit to fit; batch effects, dispersions and fold changes (see `effects`) are what a paper should quote.
    Each draw is one value of every site, shared by all cells.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> pb.posterior(fit, n_draws=5).posterior["batch_effect"].sel(batch="batch1").dims
    ('chain', 'draw', 'gene')
    """
    require_likelihood(fit, "A posterior is of a likelihood")
    check_draws(n_draws)
    return _inference_data("posterior", fit.model, global_draws(fit.model, fit.guide, n_draws, seed))


def prior(model: "CellModel", screen: "Screen", n_draws: int = 200, *, seed: int = 0) -> "InferenceData":
    """Draw from the prior of everything that cells share; the group is ``prior``, else as `posterior`.

    The screen must have the genes that the model knows.
    """
    check_draws(n_draws)
    if tuple(screen.genes) != model.vocabulary.genes:
        raise ValueError(
            f"The model knows {len(model.vocabulary.genes)} genes and the screen {screen.n_genes} others: build the model from this screen."
        )
    return _inference_data("prior", model, global_draws(model, None, n_draws, seed))


def _of_assay(name: str, site: str) -> tuple[str, ...]:
    """Return the dimensions of a site of an assay."""
    return tuple(dim if dim in ("batch", "term", "node") else f"{name}_{dim}" for dim in ASSAY_DIMS[site])


def _inference_data(group: str, model: "CellModel", draws: Iterable[Sites]) -> "InferenceData":
    """Name the draws; ArviZ is touched here only. From 1 it takes a DataTree, though from 1.3 it has the name InferenceData again."""
    import arviz

    dataset = _dataset(model, draws)
    if int(arviz.__version__.partition(".")[0]) < 1:
        return arviz.InferenceData(warn_on_custom_groups=False, **{group: dataset})
    # its summary wants every variable to have all coordinates, so that what more is known of nodes stands beside
    beside = dataset[[str(name) for name in dataset.coords if name not in dataset.dims]].reset_coords()
    groups = {group: dataset.drop_vars(list(beside.data_vars))} | ({"constant_data": beside} if beside.data_vars else {})
    return cast("InferenceData", xr.DataTree.from_dict(groups))


def _dataset(model: "CellModel", draws: Iterable[Sites]) -> xr.Dataset:
    """Stack draws into a labelled Dataset with one chain."""
    kept: dict[str, list[np.ndarray]] = {}
    own = DIMS if model.programmes is None else {n: tuple("gene" if d == "latent" else d for d in along) for n, along in DIMS.items()}
    dims = own | {f"{name}_{site}": _of_assay(name, site) for name in model.assays for site in ASSAY_DIMS}
    for sites in draws:
        for name in dims:
            if name in sites and sites[name].numel():
                kept.setdefault(name, []).append(sites[name].detach().cpu().numpy())
    arrays = {name: (("chain", "draw", *dims[name]), np.stack(values)[None]) for name, values in kept.items()}
    used = {dim for along, _ in arrays.values() for dim in along}
    coords = {name: value for name, value in coordinates(model).items() if (value[0] if isinstance(value, tuple) else name) in used}
    return xr.Dataset(arrays, coords, {"inference_library": "pyro", "creation_library": "perturbprob"})


def coordinates(model: "CellModel") -> dict[str, Any]:
    """Return the names along every dimension of a model's sites."""
    names, effect = model.vocabulary, model.condition_effect
    genes = [p.gene for p in names.perturbations]
    unit = {"units": names.time_unit} if names.time_unit else {}
    return {
        **{f"{name}_feature": list(head.features) for name, head in model.assays.items()},
        **{f"{name}_linked": list(head.linked) for name, head in model.assays.items()},
        "batch": list(names.batches),
        "gene": list(names.genes),
        "regulator": list(names.genes),
        "interference": [p.gene for p in names.perturbations if p.symbol == "↓"],
        "activation": [p.gene for p in names.perturbations if p.symbol == "↑"],
        "perturbation": genes if len(set(genes)) == len(genes) else list(map(repr, names.perturbations)),
        "sgrna": list(model.sgrnas),
        "media": list(names.media),
        "batch_covariate": list(batches) if isinstance(batches := model.recipe.get("arguments", {}).get("batch_effect"), dict) else [],
        "latent": np.arange(model.n_latent),
        "term": [" & ".join(t) for t in effect.terms],
        "node": [f"{' & '.join(n.term)} at {n.time * names.time_scale:g}" for n in effect.nodes],
        "node_term": ("node", [" & ".join(n.term) for n in effect.nodes]),
        "steady_state": [str(p) for bound in model.assumptions if bound.name == "steady_state" for p in bound.protocols],
        "node_time": ("node", [round(n.time * names.time_scale, 9) for n in effect.nodes], unit),
    }
