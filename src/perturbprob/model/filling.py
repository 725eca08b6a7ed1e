"""How `CellModel`'s slots are filled, from the facts of a screen and the arguments of a structure."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.dynamics.causal_context import CausalContext
from perturbprob.dynamics.latent_shift import Additive, LatentShift, Network, Unmoved
from perturbprob.dynamics.neural_ode import NeuralODE, Push, Stable
from perturbprob.dynamics.neural_sde import NeuralSDE
from perturbprob.dynamics.solve import Solver
from perturbprob.dynamics.stationary import StationaryDiffusion
from perturbprob.dynamics.transition import Transition
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.assays import Assay
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_seed, is_within
from perturbprob.experiment.vocabulary import Vocabulary
from perturbprob.measurement.assays import AssayHead, OpenWindowHead, ProteinHead, WindowHead
from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountHead, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.measurement.decoder import Decoder, Identity, Log1p, LogRate
from perturbprob.measurement.exact import Exact
from perturbprob.measurement.normal import Normal
from perturbprob.model.assumptions import Assumption, Bound, UneditedStable, bind, check_connected
from perturbprob.model.cell_model import CellModel
from perturbprob.model.condition_effect import ConditionEffect, nodes
from perturbprob.model.mark_effect import MarkEffect, ShrunkEffect, SparseEffect
from perturbprob.model.network_effect import LaplaceNetwork, NetworkEffect
from perturbprob.model.penetrance import Penetrance, ways

HEADS: dict[str, Callable[[int], CountHead | Normal]] = {
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
    "negative_binomial": NegativeBinomial,
    "poisson": Poisson,
    "normal": Normal,
    "known_noise": partial(Normal, learnt=False),
}
UNMEASURED: dict[str, Callable[[int], Exact]] = {"exact": Exact}
"""Heads that only a structure of their own takes."""
ASSAYS: dict[str, Callable[..., AssayHead]] = {"protein": ProteinHead, "chromatin": WindowHead, "open": OpenWindowHead}
SHIFTS: dict[str, Callable[[int], nn.Module]] = {
    "additive": Additive,
    "network": Network,
    "sparse": Additive,
    "identity": lambda _: Unmoved(),
}
CONTINUOUS = ("normal", "known_noise")
BATCH_EFFECTS = ("constant", "state")


@dataclass(frozen=True)
class Slots:
    """What a structure fills by itself: how waiting moves the state, and what marks add to the push.

    ``in_genes`` says that the state is how far the log rate of each gene is from the median cell's: then few programmes make a cell at
    rest, no network decodes, and all that a condition does is in the state. ``decoder`` is what decodes it, where log rates do not.
    """

    transition: Transition
    mark_effect: MarkEffect
    in_genes: bool = False
    decoder: Log1p | None = None


def _node(facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None) -> Slots:
    """Fill the slots with a neural ODE."""
    n_latent = arguments["n_latent"]
    moving = _stable(facts, field or Push(n_latent))
    return Slots(NeuralODE(n_latent, field=moving, solver=Solver(arguments["solver"])), ShrunkEffect(facts["vocabulary"], n_latent))


def _neural_sde(facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None) -> Slots:
    """Fill the slots with a neural SDE."""
    n_latent = arguments["n_latent"]
    waits = {"n_waits": arguments["n_waits"], "n_steps": arguments["n_steps"]}
    return Slots(NeuralSDE(n_latent, field=field, **waits), ShrunkEffect(facts["vocabulary"], n_latent))


def _vae(facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None) -> Slots:
    """Fill the slots with a latent shift."""
    n_latent = arguments["n_latent"]
    shift = field or SHIFTS[arguments["shift"]](n_latent)
    effect = SparseEffect if arguments["shift"] == "sparse" else ShrunkEffect
    return Slots(LatentShift(n_latent, field=_stable(facts, shift)), effect(facts["vocabulary"], n_latent))


def _causal_context(facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None) -> Slots:
    """Fill the slots with a network over genes."""
    start, drifts = facts["start"], not _declared(facts)
    centre = torch.zeros_like(facts["log_share"]) if start is None else start
    transition = CausalContext(centre, drifts=drifts, solver=Solver(arguments["solver"]))
    return Slots(transition, NetworkEffect(facts["vocabulary"]), in_genes=True)


def _stationary(facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None) -> Slots:
    """Fill the slots with a network over genes at rest."""
    n_genes = len(facts["vocabulary"].genes)
    transition = StationaryDiffusion(n_genes, n_waits=arguments["n_waits"])
    effect = NetworkEffect(facts["vocabulary"], LaplaceNetwork(n_genes, arguments["edge_scale"]))
    return Slots(transition, effect, in_genes=True, decoder=Log1p(n_genes, facts["log_depth"]))


def _declared(facts: dict[str, Any]) -> bool:
    """Say whether unedited cells are declared to stay where they are."""
    return any(isinstance(bound.assumption, UneditedStable) for bound in facts["assumptions"])


def _stable(facts: dict[str, Any], field: nn.Module) -> nn.Module:
    """Return a field that does not move unmarked cells, where that is declared."""
    return Stable(field) if _declared(facts) else field


STRUCTURES: dict[str, Callable[[dict[str, Any], dict[str, Any], nn.Module | None], Slots]] = {
    "node": _node,
    "vae": _vae,
    "neural_sde": _neural_sde,
    "causal_context": _causal_context,
    "stationary": _stationary,
}


def make(
    screen: Screen,
    structure: str,
    own: dict[str, Any],
    *,
    n_latent: int | None,
    assumptions: Sequence[Assumption],
    measurement: str | None,
    batch_effect: str | pd.DataFrame,
    n_hidden: int,
    field: nn.Module | None,
    penetrance: bool | str,
    seed: int,
) -> CellModel:
    """Return the model of a structure, ``own`` being its own arguments; refuse what does not fit the screen."""
    require_screen(screen, partial=True)
    check_seed(seed)
    if screen.values == "continuous" and n_latent not in (None, screen.n_genes):
        raise ValueError(f"Continuous values are modelled in gene space, one latent axis for each gene: leave n_latent={n_latent} out.")
    n_latent = 10 if n_latent is None else n_latent
    for name, value in (("n_latent", n_latent), ("n_hidden", n_hidden)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a number of dimensions and must be a whole number of at least 1; got {value!r}.")
    if "memory" in own:
        _check_memory(screen, own["memory"])
    arguments: dict[str, Any] = {"measurement": _measurement(screen, measurement), "batch_effect": _batch_effect(screen, batch_effect)}
    facts = _facts(screen, _penetrance(screen, penetrance)) | {"assumptions": bind(assumptions, screen.with_rna)}
    check_connected(screen, assumptions)
    arguments |= {"n_latent": n_latent if facts["start"] is None else screen.n_genes, "n_hidden": n_hidden} | own
    return _started(structure, facts, arguments, field, seed)


def _check_memory(screen: Screen, memory: float | None) -> None:
    """Refuse a memory that is no time, or of effects that the model does not have."""
    if memory is None:
        return
    if not is_within(memory, 0, math.inf):
        raise ValueError(f"memory is a time, in median waits of the screen, and must be a finite number above 0; got {memory!r}.")
    if screen.values == "continuous":
        raise ValueError(
            "memory is of the effects on single genes of counts; in gene space all that a condition does is in the state: leave it out."
        )


def again(model: CellModel, screen: Screen, assumptions: Sequence[Assumption], *, seed: int) -> CellModel:
    """Return a model of the same structure and arguments, started afresh, under other assumptions."""
    recipe = model.recipe
    facts = _facts(screen, recipe["penetrance"]) | {"assumptions": bind(assumptions, screen.with_rna)}
    return _started(recipe["structure"], facts, recipe["arguments"], None, seed)


def _started(structure: str, facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None, seed: int) -> CellModel:
    """Fill the slots with networks that start from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fill(structure, facts, arguments, field)
    model.recipe["seed"] = seed
    return model


def _batch_effect(screen: Screen, form: str | pd.DataFrame) -> str | dict[str, Any]:
    """Return the form of the batch effects as JSON can hold it: a word, or the covariates of each batch."""
    if isinstance(form, str):
        if form not in BATCH_EFFECTS:
            raise ValueError(f"Unknown batch_effect {form!r}. Use {', '.join(map(repr, BATCH_EFFECTS))}, or a table of covariates.")
        return form
    if not isinstance(form, pd.DataFrame):
        raise TypeError(f"batch_effect= is a word or a table (DataFrame) of covariates of the batches; got {type(form).__name__}.")
    table = form.set_axis(form.index.map(str)).rename(columns=str)
    if not table.shape[1]:
        raise ValueError("The table of covariates has no column. Leave it out, or give at least one covariate of the batches.")
    for what, names in (("row", table.index), ("column", table.columns)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise ValueError(
                f"The table of covariates has {int((names == twice).sum())} {what}s named {twice!r}: give one row for each batch and one "
                "column for each covariate. Columns of cells are averaged by obs.groupby(batch).mean()."
            )
    if missing := [b for b in screen.batches if b not in table.index]:
        raise ValueError(f"The table of covariates has no row for {', '.join(map(repr, missing[:3]))}: its index names the batches.")
    if not all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes):
        raise ValueError(f"Covariates of batches are numbers; the columns hold {', '.join(map(str, table.dtypes))}.")
    table = table.loc[list(screen.batches)].astype(float)
    if unknown := table.index[~np.isfinite(table).all(axis=1)].tolist():
        raise ValueError(f"The covariates of batch {unknown[0]!r} are not all finite. Fill them in, or leave that column out.")
    return table.to_dict()


def _measurement(screen: Screen, name: str | None) -> str:
    """Return the name of a measurement that fits the values of the screen."""
    known = CONTINUOUS if screen.values == "continuous" else tuple(name for name in HEADS if name not in CONTINUOUS)
    if name is None:
        return known[0]
    if name not in HEADS:
        raise ValueError(f"Unknown measurement {name!r}. Use one of {', '.join(map(repr, HEADS))}.")
    if name not in known:
        raise ValueError(f"measurement={name!r} does not fit {screen.values}. Use one of {', '.join(map(repr, known))}.")
    if name == "known_noise" and (screen.standard_error is None or not (screen.standard_error > 0).all()):
        raise ValueError("measurement='known_noise' needs a standard error above 0 for every value. Use 'normal': it learns the rest.")
    return name


def _penetrance(screen: Screen, kind: bool | str) -> dict[str, int] | None:
    """Return the number of the perturbation behind each sgRNA, none where π is asked for by gene; None where no cell escapes."""
    if kind is False:
        return None
    if kind is not True and kind != "sgrna":
        raise ValueError(f"penetrance= is True, for a probability of each perturbation, 'sgrna', of each sgRNA, or False; got {kind!r}.")
    if screen.values == "continuous":
        raise ValueError("penetrance is about single cells that escape, and a row of continuous values is a mean of cells: leave it out.")
    vocabulary = Vocabulary.of(screen)
    if not vocabulary.perturbations:
        raise ValueError("No cell of this screen is perturbed, so none can escape: leave penetrance out.")
    for protocol in screen.conditions:
        ways(protocol)
    return _sgrnas(screen, vocabulary) if kind == "sgrna" else {}


def _sgrnas(screen: Screen, vocabulary: Vocabulary) -> dict[str, int]:
    """Return the number of the perturbation behind each sgRNA of edited cells."""
    if screen.sgrna is None:
        raise ValueError("penetrance='sgrna' needs to know the sgRNA of each cell: read the screen with sgrna=, the column that names it.")
    behind: dict[str, int] = {}
    for condition, protocol in enumerate(screen.conditions):
        done = vocabulary.protocol(protocol).perturbations
        if len(done) > 1:
            raise ValueError(f"penetrance='sgrna' wants one edited gene in each cell; {protocol} has {len(done)}. Use penetrance=True.")
        for name in map(str, np.unique(screen.sgrna[screen.condition == condition])) if done else ():
            number = vocabulary.perturbations.index(done[0])
            if behind.setdefault(name, number) != number:
                both = " and ".join(repr(vocabulary.perturbations[k]) for k in (behind[name], number))
                raise ValueError(f"The sgRNA {name!r} stands beside {both}; one sgRNA makes one perturbation. Check the column.")
    return behind


def _facts(screen: Screen, sgrnas: dict[str, int] | None) -> dict[str, Any]:
    """Return what a structure needs to know of a screen; ``sgrnas`` is None where no edited cell escapes."""
    vocabulary = Vocabulary.of(screen)
    facts: dict[str, Any] = {"vocabulary": vocabulary, "nodes": [], "start": None, "log_depth": float(np.log(screen.depth))}
    facts |= {
        "penetrance": sgrnas,
        "groups": screen.batch_groups.tolist(),
        "adapted": 0,
        "assays": {n: _assay(screen, a) for n, a in screen.assays.items()},
    }
    facts["levels"] = {name: torch.as_tensor(assay.level, dtype=torch.float32) for name, assay in screen.assays.items()}
    if screen.values == "continuous":
        return facts | {"start": _start(screen), "log_share": torch.full((screen.n_genes,), -torch.inf)}
    totals = np.asarray(screen.with_rna.counts.sum(0)).ravel() + 0.5
    gone = screen.conditions if sgrnas is None else [way for p in screen.conditions for way, _ in ways(p)]
    facts["nodes"] = sorted({node for p in gone for node in nodes(p, vocabulary.time_scale)})
    return facts | {"log_share": torch.as_tensor(np.log(totals / totals.sum()), dtype=torch.float32)}


def _start(screen: Screen) -> Float[Tensor, " gene"]:
    """Return the mean of control at its first time, in baseline media where there is one; of all rows without control."""
    first = min(range(len(screen.conditions)), key=lambda k: _order(screen.conditions[k]))
    return torch.as_tensor(np.asarray(screen.counts[screen.condition == first].mean(0)).ravel(), dtype=torch.float32)


def _order(protocol: Protocol) -> tuple[bool, str, float]:
    """Sort control in baseline media at its first time to the front."""
    return bool(protocol.perturbations), protocol.media or "", protocol.time


def _batches(facts: dict[str, Any], form: str | dict[str, Any], n_latent: int) -> BatchEffect:
    """Make the batch effects in one of their forms."""
    vocabulary, how = facts["vocabulary"], dict[str, Any]()
    if form == "state":
        how = {"n_media": len(vocabulary.media), "n_latent": n_latent if facts["start"] is None else 0}
    elif isinstance(form, dict):
        how = {"covariates": torch.tensor([[column[b] for column in form.values()] for b in vocabulary.batches])}
    effect = BatchEffect(len(vocabulary.batches) - facts["adapted"], facts["log_share"].exp(), groups=facts["groups"], **how)
    effect.adapted = facts["adapted"]
    return effect


def _assay(screen: Screen, assay: Assay) -> dict[str, Any]:
    """Return what a head must know of an assay, as JSON can hold it; refuse one that no cell has."""
    if not assay.present.any():
        raise ValueError(
            f"No cell of this screen has the assay of {len(assay.features):,} features such as {assay.features[0]!r}: nothing "
            "can be learnt of it. Leave it out with screen.with_assays."
        )
    place = {gene: k for k, gene in enumerate(screen.genes)}
    genes = [-1 if gene is None else place[gene] for gene in assay.genes]
    return {"kind": "open" if assay.binary else assay.kind, "features": list(assay.features), "genes": genes}


def _heads(facts: dict[str, Any], n_latent: int, n_hidden: int) -> dict[str, AssayHead]:
    """Make the heads of further assays."""
    n_batches, heads = len(facts["vocabulary"].batches) - facts["adapted"], {}
    for name, assay in facts["assays"].items():
        level = facts["levels"][name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what one batch means is said of RNA
            effect = BatchEffect(n_batches, level / level.sum(), groups=facts["groups"])
        known = (name, assay["features"], level, assay["genes"], facts["log_share"], effect)
        heads[name] = ASSAYS[assay["kind"]](*known, n_latent=n_latent, n_hidden=n_hidden)
    return heads


def _programmes(n_latent: int, n_genes: int) -> nn.Linear:
    """Make the programmes in which cells at rest differ."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element")  # cells at rest may all be alike
        return nn.Linear(n_latent, n_genes, bias=False)


def fill(structure: str, facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None = None) -> CellModel:
    """Fill the slots from the facts of a screen and the arguments of a structure."""
    vocabulary, n_latent, n_hidden = facts["vocabulary"], arguments["n_latent"], arguments["n_hidden"]
    n_genes, start = len(vocabulary.genes), facts["start"]
    bound: list[Bound] = facts["assumptions"]
    sgrnas: dict[str, int] | None = facts["penetrance"]
    slots = STRUCTURES[structure](facts, arguments, field)
    in_genes = slots.in_genes and start is None
    n_state = n_genes if in_genes else n_latent
    return CellModel(
        vocabulary,
        slots.transition,
        slots.decoder or (Identity() if start is not None else LogRate() if in_genes else Decoder(n_latent, n_genes, n_hidden=n_hidden)),
        (HEADS | UNMEASURED)[arguments["measurement"]](n_genes),
        _batches(facts, arguments["batch_effect"], n_state),
        ConditionEffect([] if in_genes else facts["nodes"], n_genes, memory=arguments.get("memory")),
        slots.mark_effect,
        n_latent=n_state,
        n_hidden=n_hidden,
        programmes=_programmes(n_latent, n_genes) if in_genes else None,
        log_share=facts["log_share"],
        log_depth=facts["log_depth"],
        start=start,
        assumptions=bound,
        assays=_heads(facts, n_state, n_hidden),
        penetrance=None if sgrnas is None else Penetrance(len(vocabulary.perturbations), list(sgrnas.values())),
        sgrnas=list(sgrnas or ()),
        recipe={
            "penetrance": sgrnas,
            "structure": structure,
            "arguments": arguments,
            "assumptions": [b.to_json() for b in bound],
            "groups": facts["groups"],
            **({"assays": facts["assays"]} if facts["assays"] else {}),
            "field": None if field is None else type(field).__qualname__,
        },
    )
