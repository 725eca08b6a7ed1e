"""What a network says of perturbations that were never done, alone or together: do-queries."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob.experiment.action import Action, Perturbation, Protocol
from perturbprob.experiment.settings import is_within
from perturbprob.experiment.vocabulary import nearest
from perturbprob.inference.caveats import say_far
from perturbprob.inference.draws import check_draws, check_flag, global_draws, require_posterior, warn_if_large
from perturbprob.inference.effects import changes_of, fold_changes
from perturbprob.inference.predict import listed
from perturbprob.model.network_effect import NetworkEffect

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel


def do(
    fit: "Fit",
    protocols: Protocol | Action | Sequence[Protocol | Action],
    *,
    settled: bool = False,
    n_draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Return by how much each gene changes when any genes of the network are perturbed, whether or not the screen perturbed them.

    Takes a fit of `causal_context`. In dδ/ds = γ ⊙ (W (f − f₀) + context − δ) a perturbation acts on the product f of its own gene alone,
    so W says what follows (`CausalContext`). A knock-out takes all of the product away and needs nothing that was not learnt; how strong
    an interference or activation is, where it was never done, is drawn from its prior (`NetworkEffect`). What such a perturbation does
    to the transcript of its own gene was not seen and is left out: of the perturbed gene itself the interval is too narrow. Answers
    for genes that were never perturbed rest on edges that other networks explain as well (`edges`), more than intervals say.

    Protocols say how long cells wait, as in `predict`; with ``settled`` they are then left alone for good, and the answer is the steady
    state, δ = W (f − f₀) + context. Each is compared with the same protocol without its perturbations. A Dataset as that of `effects`,
    over (condition, gene): ``log_fold_change``, averaged over cells at rest at η = 0, ``lower`` and ``upper``, and
    ``local_false_sign_rate``. ``time`` is infinite where ``settled``.

    Raises ValueError for a fit without a network, a gene that is not in its state, a protocol that waits for no time, and, with
    ``settled``, a network that in some draw never comes to rest.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.causal_context(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> never = next(g for g in screen.genes if g not in screen.perturbations)
    >>> pb.do(fit, pb.Knockout(never) >> pb.Wait(2), n_draws=4, progress=False).sizes
    Frozen({'condition': 1, 'gene': 10})
    >>> both = pb.Knockout(never) >> pb.Interference(screen.perturbations[0])
    >>> pb.do(fit, both, settled=True, n_draws=4, progress=False)["time"].item()
    inf
    """
    require_posterior(fit, "do judges fold changes")
    check_draws(n_draws)
    if not is_within(level, 0, 1):
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")
    if not isinstance(fit.model.mark_effect, NetworkEffect):
        raise ValueError("This fit has no network over genes. Fit a causal_context for do, or ask predict or effects of what was done.")
    asked, known = asked_of(fit, protocols, settled=settled)
    warn_if_large(4 * n_draws * len(known) * len(fit.model.vocabulary.genes), f"{n_draws} draws", "Ask for fewer protocols at once.")
    draws = global_draws(fit.model, fit.guide, n_draws, seed, progress="do" if progress else None)
    values = fold_changes(asked, [(p, p.unperturbed()) for p in known], draws, settled=settled, seed=seed)
    return timed(changes_of(asked, known, values, level, against="unperturbed"), settled=settled)


def asked_of(fit: "Fit", protocols: Protocol | Action | Sequence[Protocol | Action], *, settled: bool) -> tuple["Fit", list[Protocol]]:
    """Return the fit with every perturbation of the protocols among its names, where a network says what they do, and the protocols."""
    check_flag(settled, "settled")
    several = [Protocol() >> p for p in listed(protocols)]
    if settled and not isinstance(fit.model.mark_effect, NetworkEffect):
        raise ValueError("Only a network over genes tells where cells come to rest: fit a causal_context, or give protocols with a Wait.")
    model = _knowing(fit.model, [a for protocol in several for a in protocol.perturbations])
    known = [model.vocabulary.protocol(p) for p in several]
    if not settled and (idle := [p for p in known if p.actions and p.time == 0]):
        more = " Or leave them alone for good: settled=True." if isinstance(model.mark_effect, NetworkEffect) else ""
        raise ValueError(f"{idle[0]} waits for no time, so nothing has happened yet: write it with >> Wait(t) behind.{more}")
    if not settled:
        say_far(fit, known)
    return replace(fit, model=model), known


def timed(result: xr.Dataset, *, settled: bool) -> xr.Dataset:
    """Return the answer with an infinite time where cells were left alone for good."""
    return result.assign_coords(time=result["time"].copy(data=np.full(result.sizes["condition"], np.inf))) if settled else result


def _knowing(model: "CellModel", perturbations: Sequence[Perturbation]) -> "CellModel":
    """Return a model in whose vocabulary these perturbations come behind those of the screen; only a network says what they do."""
    names = model.vocabulary
    new = tuple(p for p in dict.fromkeys(perturbations) if p not in names.perturbations)
    if not new or not isinstance(model.mark_effect, NetworkEffect):
        return model
    if outside := [p for p in new if p.gene not in names.genes]:
        raise ValueError(f"{outside[0]!r} is of no gene in the state of this fit. {nearest(outside[0].gene, names.genes)}")
    model = copy.deepcopy(model)
    model.vocabulary = replace(names, perturbations=names.perturbations + new)
    model.mark_effect = NetworkEffect(model.vocabulary).to(model.log_share.device)
    return model
