"""What a prediction rests on beside the data, said in a warning."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perturbprob.experiment.action import Protocol
from perturbprob.model.assumptions import ExchangeableBatches

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

FAR = 2.0
"""From how many times the longest course on a prediction says that nothing was measured near."""


class AliasedWarning(UserWarning):
    """A prediction without batch effects on a screen whose batches coincide with times, media or perturbations."""


def say_aliased(fit: "Fit") -> bool:
    """Say that η = 0 is not a neutral choice where every batch holds one level of a factor; return whether that is so."""
    with_batch = sorted({f for pair in fit.trained_on["confounded"] if "batch" in pair for f in pair if f != "batch"})
    if with_batch:
        words = " and ".join([", ".join(with_batch), "batch"])
        warnings.warn(
            f"{words} are aliased in this screen: each batch holds one {with_batch[0]}, so what all cells of a {with_batch[0]} share "
            "cannot be told from its batch effect, and the prediction at η = 0 may lack it. Name batch= to predict what that batch "
            "would show.",
            AliasedWarning,
            stacklevel=3,
        )
    return bool(with_batch)


class UndeclaredWarning(UserWarning):
    """A prediction rests on an assumption that was not declared and that the screen cannot test."""


def say_untested(fit: "Fit") -> None:
    """Say that unedited cells may move, where nothing shows whether they do and nobody has declared that they do not (2.3.1)."""
    if fit.settings["objective"] == "kds":  # all cells are declared to be at rest
        return
    waits = {Protocol.parse(text).time for text in fit.trained_on["conditions"]}
    confounded = any({"time", "batch"} == set(pair) for pair in fit.trained_on["confounded"])
    if (len(waits) > 1 and not confounded) or any(bound.name == "unedited_stable" for bound in fit.model.assumptions):
        return
    why = "there is one time only" if len(waits) == 1 else "each time is one batch"
    who = ", with a structure without noise, as noise moves all cells" if fit.model.transition.noise_shape else ""
    warnings.warn(
        f"Whether unedited cells move by themselves cannot be told from this screen ({why}), and nothing is declared: part of what is "
        f"predicted may be such a drift. If they are stable, say so{who}: node(screen, assumptions=[UneditedStable()]).",
        UndeclaredWarning,
        stacklevel=3,
    )


def say_apart(fit: "Fit", protocols: Sequence[Protocol], batches: Sequence[str | None]) -> None:
    """Say that a condition was seen in batches that share none with the one asked for, so that only priors tell the two apart."""
    if not any(isinstance(bound.assumption, ExchangeableBatches) for bound in fit.model.assumptions):
        return
    import networkx

    graph = networkx.Graph()
    for text, of in fit.trained_on["conditions"].items():
        seen = Protocol.parse(text)
        graph.add_edges_from(((seen.perturbations, seen.media), b) for b in of)
    for protocol, batch in zip(protocols, batches, strict=True):
        node = (protocol.perturbations, protocol.media)
        seen_there = networkx.has_path(graph, node, batch) if {node, batch} <= set(graph) else networkx.is_connected(graph)
        if node in graph and not seen_there:
            where = "the prediction at η = 0" if batch is None else f"batch {batch!r}"
            warnings.warn(
                f"{protocol} was seen in batches that share no condition with others, so {where} differs from them by what priors alone "
                "say (ExchangeableBatches). Name a batch= that holds the condition, or compare within its part.",
                AliasedWarning,
                stacklevel=3,
            )
            return


def say_far(fit: "Fit", protocols: Sequence[Protocol]) -> None:
    """Say that nothing was measured near a time."""
    if fit.settings["objective"] == "kds":  # any time is the law at rest
        return
    last = max(Protocol.parse(text).time for text in fit.trained_on["conditions"])
    for protocol in protocols:
        if protocol.time > FAR * last:
            warnings.warn(
                f"{protocol} lasts {protocol.time:g}, and the screen ends at {last:g}: so far beyond it the prediction is what the "
                "networks and priors happen to say, and its interval is too narrow.",
                UndeclaredWarning,
                stacklevel=3,
            )
            return
