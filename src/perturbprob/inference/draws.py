"""Coherent draws: one value of every global site per draw, the same for all cells and minibatches."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from perturbprob.experiment.settings import check_seed

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel
    from perturbprob.model.guide import Guide

Sites = dict[str, Tensor]

LARGE = 2e9
GIVEN_CELLS = "What is asked of given cells goes by the law of their rest states given their counts"


def check_draws(n_draws: int, name: str = "n_draws") -> None:
    """Refuse a number of draws below 1."""
    if isinstance(n_draws, bool) or not isinstance(n_draws, int) or n_draws < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {n_draws!r}.")


def check_flag(value: object, name: str) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False; got {value!r}.")


def require_fit(fit: object) -> None:
    """Refuse anything but a fit, such as the model it should come from."""
    from perturbprob.inference.fit import Fit

    if not isinstance(fit, Fit):
        raise TypeError(f"A fit is needed here; got {type(fit).__name__}. Make one with fit = pb.fit(model, screen).")


def require_likelihood(fit: "Fit", what: str) -> None:
    """Refuse a fit of a structure without a likelihood where an answer needs one."""
    require_fit(fit)
    if fit.settings["objective"] == "kds":
        raise ValueError(
            f"{what}, and a stationary diffusion has no likelihood (objective='kds'). Ask predict, predictive_check or edges, which give "
            "its one best answer; or fit causal_context, which has the same network and a posterior."
        )


def require_posterior(fit: "Fit", what: str) -> None:
    """Refuse a deterministic fit where an answer is a statement about its uncertainty."""
    require_likelihood(fit, f"{what} by their posterior")
    if fit.settings["objective"] == "paths":
        raise ValueError(f"{what} by their posterior, and objective='paths' has none. Compare conditions with predict, or fit by the ELBO.")


def bar(items: Iterable[Any], what: str, unit: str, *, progress: bool, total: int | None = None) -> "tqdm[Any]":
    """Iterate with a progress bar, silent where it is not wanted."""
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules  # a log file would fill with fragments of bars
    return tqdm(items, desc=what, unit=unit, total=total, disable=not (progress and seen), leave=False)


def warn_if_large(n_values: int, what: str, advice: str) -> None:
    """Say before the work starts that it will hold more than 2 GB of single-precision values."""
    if 4 * n_values > LARGE:
        warnings.warn(f"This will hold {4 * n_values / 1e9:.1f} GB of {what}. {advice}", stacklevel=3)


@torch.no_grad()
def global_draws(model: "CellModel", guide: "Guide | None", n_draws: int, seed: int = 0, *, progress: str | None = None) -> Iterator[Sites]:
    """Yield draws of every global site, sampled and derived, from the guide; from the prior where there is no guide.

    The user's random state is left alone; draw k is the same whatever is done between draws. ``progress`` names the bar, if any.
    """
    check_draws(n_draws)
    check_seed(seed)
    for k in bar(range(n_draws), progress or "", "draw", progress=progress is not None):
        with seeded(seed, k):
            around = model.globals
            if guide is not None:
                around = pyro.poutine.replay(model.globals, pyro.poutine.trace(guide.globals).get_trace())
            sites = _sites(around)
        yield sites


@torch.no_grad()
def centre(model: "CellModel", guide: "Guide") -> Sites:
    """Return every global site at the centre of its law."""
    return sites_at(model, guide)


def sites_at(model: "CellModel", guide: "Guide") -> Sites:
    """Return every global site at the centre of its law, with gradients."""
    return _sites(pyro.poutine.condition(model.globals, guide.centre()))


def _sites(run: Callable[[], Sites]) -> Sites:
    """Run the global sites of a model and collect sampled and derived values."""
    trace = pyro.poutine.trace(run).get_trace()
    values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    return values | trace.nodes["_RETURN"]["value"]


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Run a block under a seed of its own, mixed from several numbers, and give the user's random state back."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        yield


@torch.no_grad()
def coherent_draws(
    model: Callable[..., Any], guide: Callable[..., Any], minibatches: Iterable[Any], n_draws: int, *, plate: str = "cell", seed: int = 0
) -> Iterator[Sites]:
    """Yield joint draws of the global and per-cell sites of any Pyro model, cells in the order of the minibatches.

    Each draw takes every site outside the ``plate`` once, and replays it over all minibatches: a mean over cells then carries
    the uncertainty of the globals, as it must. ``model`` and ``guide`` are called with one minibatch; ``minibatches`` is iterated
    over once per draw. Per-cell sites are concatenated along the plate, which must be their leftmost dimension.
    """
    check_draws(n_draws)
    batches = list(minibatches)
    for k in range(n_draws):
        with seeded(seed, k):
            shared, local = pyro.poutine.Trace(), cast("dict[str, list[Tensor]]", {})
            for cells in batches:
                guided = pyro.poutine.trace(pyro.poutine.replay(guide, shared)).get_trace(cells)
                modelled = pyro.poutine.trace(pyro.poutine.replay(model, guided)).get_trace(cells)
                for name, site in modelled.nodes.items():
                    if site["type"] != "sample" or (site["is_observed"] and "_deterministic" not in site["infer"]):
                        continue
                    if any(frame.name == plate for frame in site["cond_indep_stack"]):
                        local.setdefault(name, []).append(site["value"])
                    elif name != plate and name not in shared:
                        shared.add_node(name, **site)
        together = {name: torch.cat(values) for name, values in local.items() if name != plate}
        yield {name: site["value"] for name, site in shared.nodes.items() if site["type"] == "sample"} | together
