"""What a fit expects of a protocol, seen or unseen: means with intervals."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.action import Action, Protocol
from perturbprob.experiment.settings import is_within
from perturbprob.experiment.vocabulary import nearest
from perturbprob.inference.caveats import say_aliased, say_apart, say_far, say_untested
from perturbprob.inference.draws import Sites, check_draws, check_flag, global_draws, require_fit, seeded, warn_if_large
from perturbprob.inference.escape import population
from perturbprob.inference.expectation import Expectation

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

SCALES = {"counts": ("rate", "counts", "log1p"), "continuous": ("value",)}


def predict(
    fit: "Fit | Sequence[Fit]",
    conditions: Protocol | Action | Sequence[Protocol | Action] | None = None,
    *,
    n_draws: int = 200,
    scale: str | None = None,
    batch: str | Sequence[str] | None = None,
    interval: str = "mean",
    n_cells: int | None = None,
    edited: bool | None = None,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Predict the mean of each gene under one or more protocols (default: every condition of the fit), with intervals.

    Returns a Dataset over (condition, gene) with ``mean``, ``lower`` and ``upper``: the posterior mean and the central interval of
    probability ``level``. Conditions carry the coordinates perturbation, media, time. Main arguments:

    - ``scale``: "rate" (default), the expected share of a gene in all counts, which in a named batch is the share times e^η and adds up to
      1 over genes to first order in η only; "counts", the expected count of a cell; "log1p",
      E[log(1 + count)] under the law of the counts. Counts are averaged over the fitted law of the size factor in the condition and batch.
      A fit of continuous values has one scale, "value".
    - ``batch``: a name (or one per condition); "average" over the fitted batches; "new", a batch never seen; None, η = 0. Where
      batches coincide with times or media, η may hold what they share, and None says so.
    - ``interval``: "mean", of the population mean; "observed", of the mean over a sample of ``n_cells`` cells.
    - ``edited``, of a fit with ``penetrance``: True, of cells that were hit by all that was done to them; False, of those that escaped it
      all; None, of both as they are mixed in the population.

    Several fits that differ in their seed, or in their structure, are an ensemble, a posterior over functions: each gives an equal part
    of the draws, so that the mean is that of all, and intervals hold what they disagree in.
    A fit by ``objective="paths"`` or "kds" has no posterior: its intervals of means are NaN. A perturbation, media or batch that the fit
    has never seen is refused. A time it has not seen is predicted with wider intervals; of `stationary` any time is the law at rest.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> pb.predict(fit, screen.conditions[-1], n_draws=4, batch="average").sizes
    Frozen({'condition': 1, 'gene': 10})
    """
    check_draws(n_draws)
    fits = members(fit, n_draws)
    fit = fits[0]
    scale = _scale(fit, scale)
    _check_choices(interval, level, n_cells)
    protocols = conditions_of(fit, conditions)
    if not (batch is None or isinstance(batch, Sequence)):
        raise ValueError(f"batch= takes the name of a batch, one per condition, or None; got {batch!r}.")
    batches: list[str | None] = [batch] * len(protocols) if batch is None or isinstance(batch, str) else list(batch)
    if len(batches) != len(protocols):
        raise ValueError(f"batch= names {len(batches)} batches for {len(protocols)} conditions: give one name, or one per condition.")
    if "new" in batches and fit.model.batch_effect.n_batches == 1:
        raise ValueError("The fit has one batch, so how far another would be off was never seen: batch='new' cannot be answered.")
    if not (None in batches and say_aliased(fit)):
        say_apart(fit, protocols, batches)
    if edited is not None:
        check_flag(edited, "edited")
    if edited is not None and any(one.model.penetrance is None for one in fits):
        raise ValueError(
            "edited= tells hit cells from escaped ones, and this fit takes all to be hit: make its model with penetrance=True."
        )
    say_untested(fit)
    say_far(fit, protocols)
    n_values = 3 * n_draws * len(protocols) * len(fit.model.vocabulary.genes)
    warn_if_large(n_values, f"{n_draws} draws of {len(protocols)} conditions", "Predict fewer conditions at once, or lower n_draws.")

    def mean(expectation: Expectation, sites: Sites, part: Tensor, share: Tensor) -> Tensor:
        return expectation.means(sites, part, scale, None if n_cells is None else (n_cells * share).clamp(min=1))

    how: dict[str, Any] = {"edited": edited, "n_cells": n_cells, "seed": seed, "progress": progress}
    shares = ensemble_shares(len(fits), n_draws)
    draws = (_draws(one, protocols, batches, mean, n_draws=n, **how) for one, n in zip(fits, shares, strict=True))
    data = _interval(torch.stack(list(chain.from_iterable(draws))), level)
    if fit.settings["objective"] != "elbo" and interval == "mean":  # a deterministic fit does not know how sure it is
        data |= {end: torch.full_like(data[end], torch.nan) for end in ("lower", "upper")}
    units = {"rate": "share of all counts", "counts": "counts per cell", "log1p": "mean of log(1 + count)", "value": "as measured"}
    attrs = {"scale": scale, "units": units[scale], "interval": interval, "level": level, "n_draws": n_draws}
    return labelled(fit, protocols, data, attrs | {"batch": ", ".join(dict.fromkeys(map(str, batches)))})


def members(fits: "Fit | Sequence[Fit]", n_draws: int) -> "list[Fit]":
    """Return the fits of an ensemble, or the one there is; refuse fits that do not answer the same questions."""
    several = list(fits) if isinstance(fits, Sequence) else [fits]
    for one in several:
        require_fit(one)
    if not several:
        raise ValueError("No fit to ask: give one, or a list of fits that differ in their seed.")
    for other in several[1:]:
        for what in ("genes", "perturbations", "media", "batches", "time_scale"):
            if getattr(several[0].model.vocabulary, what) != getattr(other.model.vocabulary, what):
                raise ValueError(f"The fits of an ensemble need the same {what.replace('_', ' ')}: make all of them from one screen.")
        if several[0].settings["objective"] != other.settings["objective"]:
            raise ValueError("The fits of an ensemble need one objective: what has a posterior cannot be mixed with what has none.")
    if n_draws < len(several):
        raise ValueError(f"{n_draws} draws are fewer than the {len(several)} fits of the ensemble: raise n_draws.")
    return several


def ensemble_shares(n_fits: int, n_draws: int) -> list[int]:
    """Return how many of the draws each fit of an ensemble gives, as equal as can be.

    >>> ensemble_shares(3, 10)
    [3, 3, 4]
    """
    return [(k + 1) * n_draws // n_fits - k * n_draws // n_fits for k in range(n_fits)]


def predict_assay(
    fit: "Fit",
    conditions: Protocol | Action | Sequence[Protocol | Action] | None = None,
    *,
    assay: str,
    n_draws: int = 200,
    batch: str | None = None,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Predict the mean count of each feature of a further assay, in cells of size factor 1, with intervals.

    Of windows read as open or closed it is the probability to be open. Returns a Dataset over (condition, feature) with ``mean``,
    ``lower`` and ``upper`` as `predict` does. ``batch`` is a name; "average" over the fitted batches; or None, η = 0 in both assays.

    >>> import numpy as np
    >>> import perturbprob as pb
    >>> simulation = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1)
    >>> adata = simulation.adata.copy()
    >>> adata.obsm["surface"] = np.random.default_rng(0).poisson(5, (200, 3))
    >>> screen = simulation.screen.with_assays({"protein": pb.Assay.from_anndata(adata, kind="protein", obsm="surface")})
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> pb.predict_assay(fit, screen.conditions[-1], assay="protein", n_draws=4, batch="average").sizes
    Frozen({'condition': 1, 'feature': 3})
    """
    require_fit(fit)
    check_draws(n_draws)
    _check_choices("mean", level, None)
    if assay not in fit.model.assays:
        raise ValueError(f"The fit has no assay {assay!r}. {nearest(assay, fit.model.assays)}")
    fitted = fit.model.vocabulary.batches[: fit.model.batch_effect.n_batches]
    if batch not in (None, "average", *fitted):
        raise ValueError(f"Batch {batch!r} is none whose {assay} was fitted. {nearest(str(batch), fitted)}")
    seen = fit.trained_on.get("assays", {}).get(assay, {})
    if batch not in (None, "average") and not seen.get(batch, 1):
        raise ValueError(f"No cell of batch {batch!r} has the assay {assay!r}, so what it does there was never seen. Name another.")
    protocols = conditions_of(fit, conditions)
    if batch is None:
        say_aliased(fit)
    say_untested(fit)

    def mean(expectation: Expectation, sites: Sites, part: Tensor, share: Tensor) -> Tensor:
        return expectation.assay_means(sites, part, assay)

    draws = _draws(fit, protocols, [batch] * len(protocols), mean, n_draws=n_draws, seed=seed, progress=progress)
    attrs: dict[str, object] = {"assay": assay, "units": "counts at size factor 1", "level": level, "n_draws": n_draws, "batch": str(batch)}
    return labelled(fit, protocols, _interval(torch.stack(list(draws)), level), attrs, features=fit.model.assays[assay].features)


def _interval(values: Float[Tensor, "draw condition gene"], level: float) -> dict[str, Tensor]:
    """Return mean and central interval of draws."""
    lower, upper = torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    return {"mean": values.mean(0), "lower": lower, "upper": upper}


def _scale(fit: "Fit", scale: str | None) -> str:
    """Return a scale that fits what the model measures."""
    known = SCALES["counts" if fit.model.start is None else "continuous"]
    if scale is not None and scale not in known:
        raise ValueError(f"Unknown scale {scale!r}. Use one of {', '.join(map(repr, known))}.")
    return scale or known[0]


def _check_choices(interval: str, level: float, n_cells: int | None) -> None:
    """Refuse words and numbers that predict does not know."""
    if interval not in ("mean", "observed"):
        raise ValueError(f"Unknown interval {interval!r}. Use 'mean', or 'observed' with n_cells=.")
    if (interval == "observed") != (n_cells is not None) or (n_cells is not None and n_cells < 1):
        raise ValueError(
            "interval='observed' goes with n_cells=, the number of cells (at least 1) whose mean is observed; 'mean' goes without."
        )
    if not is_within(level, 0, 1):
        raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")


def conditions_of(fit: "Fit", conditions: Protocol | Action | Sequence[Protocol | Action] | None) -> list[Protocol]:
    """Return protocols that the model knows; a bare wait before time 0 is already refused by `Wait`."""
    if conditions is None:
        return [Protocol.parse(text) for text in fit.trained_on["conditions"]]
    return [known_protocol(fit, p) for p in listed(conditions)]


def listed(conditions: Protocol | Action | Sequence[Protocol | Action]) -> list[Protocol | Action]:
    """Return one or several protocols as a list; refuse none, and what is no protocol."""
    several = list(conditions) if isinstance(conditions, Sequence) and not isinstance(conditions, Protocol | str) else [conditions]
    if not several:
        raise ValueError("No condition to predict: give a protocol such as Knockout('NANOG') >> Wait(5).")
    for one in several:
        if not isinstance(one, Protocol | Action):
            raise TypeError(
                f"A condition is a protocol such as Knockout('NANOG') >> Wait(5), without quotes around it; got {one!r}. "
                "Protocol.parse reads one from text."
            )
    return several


def known_protocol(fit: "Fit", protocol: Protocol | Action) -> Protocol:
    """Return a protocol in the words of the fit; warn of one that waits for no time."""
    known = fit.model.vocabulary.protocol(protocol)
    if known.actions and known.time == 0:
        warnings.warn(f"{known} waits for no time, so nothing has happened yet: write {known} >> Wait(t).", stacklevel=5)
    return known


def drawn_means(
    fit: "Fit",
    conditions: Sequence[Protocol],
    batches: Sequence[str | None],
    scale: str,
    *,
    n_draws: int,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Float[Tensor, "condition gene"]]:
    """Yield draw by draw what `predict` summarises: the population mean of each condition, each in its batch, without its warnings.

    Conditions and batches are named in pairs and may come several times; one draw is one value of every global for all of them. Raises
    ValueError for what the fit does not know.
    """
    protocols = [fit.model.vocabulary.protocol(p) for p in conditions]

    def mean(expectation: Expectation, sites: Sites, part: Tensor, share: Tensor) -> Tensor:
        return expectation.means(sites, part, scale, None)

    yield from _draws(fit, protocols, list(batches), mean, n_draws=n_draws, seed=seed, progress=progress)


def _draws(
    fit: "Fit",
    protocols: list[Protocol],
    batches: list[str | None],
    mean: Callable[["Expectation", Sites, Tensor, Tensor], Tensor],
    *,
    edited: bool | None = None,
    n_cells: int | None = None,
    n_draws: int,
    seed: int,
    progress: bool,
) -> Iterator[Float[Tensor, "condition gene"]]:
    """Yield each posterior draw's ``mean`` of every condition, from its rows, over the batches and hits of which each is a share."""
    fitted = fit.model.vocabulary.batches[: fit.model.batch_effect.n_batches]
    named = [fitted if b == "average" else [b] for b in batches]
    parts = [population(fit, p, edited) for p in protocols]
    rows = [(c, way, b) for c, names in enumerate(named) for way in range(len(parts[c])) for b in names]
    of = torch.tensor([c for c, _, _ in rows])
    done, batch_of = [parts[c][way].protocol for c, way, _ in rows], [b for _, _, b in rows]
    expectation = Expectation(fit, done, batch_of, depth_of=[protocols[c] for c, _, _ in rows], seed=seed)
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="predict" if progress else None)):
        with seeded(seed, k, 2):
            shares = [_sampled(torch.tensor([part.share(sites) for part in own]), n_cells) for own in parts]
            share = torch.stack([shares[c][way] / len(named[c]) for c, way, _ in rows])[:, None]
            sites = expectation.complete(sites)
            means = torch.cat([mean(expectation, sites, part, share[part]) for part in expectation.parts]).cpu()
        yield means.new_zeros(len(protocols), means.shape[1]).index_add_(0, of, share * means)


def _sampled(share: Float[Tensor, " part"], n_cells: int | None) -> Float[Tensor, " part"]:
    """Return the shares of the parts of a population among so many cells drawn from it; those of the population, where it has one part."""
    if n_cells is None or len(share) == 1:
        return share
    return torch.multinomial(share, n_cells, replacement=True).bincount(minlength=len(share)) / n_cells


def labelled(
    fit: "Fit",
    protocols: Sequence[Protocol],
    data: dict[str, Tensor],
    attrs: dict[str, object],
    *,
    features: Sequence[str] | None = None,
) -> xr.Dataset:
    """Put names on tensors of shape (condition, gene) or (condition,); or (condition, feature), where features are named."""
    names, along = fit.model.vocabulary, "gene" if features is None else "feature"
    unit = {"units": names.time_unit} if names.time_unit else {}
    coords = {
        "condition": [str(p) for p in protocols],
        along: list(names.genes) if features is None else list(features),
        "perturbation": ("condition", [p.perturbation for p in protocols]),
        "media": ("condition", [p.media or names.baseline or "baseline" for p in protocols]),
        "time": ("condition", [p.time for p in protocols], unit),
    }
    dims = {name: ("condition", along)[: value.ndim] for name, value in data.items()}
    arrays = {name: (dims[name], np.asarray(value.cpu() if isinstance(value, Tensor) else value)) for name, value in data.items()}
    return xr.Dataset(arrays, coords, attrs)
