"""Which perturbation brings cells nearest to a desired state (D.2)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.experiment.action import Action, Protocol, Wait
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_seed, is_within
from perturbprob.experiment.vocabulary import nearest
from perturbprob.inference.caveats import say_far, say_untested
from perturbprob.inference.do import asked_of, timed
from perturbprob.inference.draws import Sites, check_draws, global_draws, require_posterior, seeded
from perturbprob.inference.escape import gone
from perturbprob.inference.expectation import CHUNK, N_REST, ended
from perturbprob.inference.predict import labelled
from perturbprob.model.cells import CellTable
from perturbprob.model.condition_effect import Node

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

Rest = Iterable[tuple[Float[Tensor, "cell rest"], Int[Tensor, " cell"]]]
"""Rest states of cells, and which of the protocols that they come from is theirs, part by part."""
MINIBATCH = 512


@torch.no_grad()
def rank_perturbations(
    fit: "Fit",
    target_state: "Screen | pd.Series[float] | Mapping[str, float]",
    candidates: Protocol | Action | Sequence[Protocol | Action] | None = None,
    *,
    start: Screen | None = None,
    settled: bool = False,
    n_draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> xr.Dataset:
    """Rank protocols by how near they bring cells to a desired state (D.2): the first is the nearest.

    The distance is the mean over genes of the squared difference of log rates, averaged over cells at η = 0; of values, where they are
    continuous. Main arguments:

    - ``target_state``: cells in the desired state (a Screen of conditions and batches that the fit knows; each is seen through
      q(z₀ | x) and its own protocol, or as measured where values are continuous), or the wanted change of some genes in log rate
      against doing nothing, gene by gene (a Series or mapping); only these genes then count.
    - ``candidates``: protocols, as in `predict`; one given twice is taken once. Default: every single perturbation of the fit, for the
      longest time that it has seen. A fit of `causal_context` takes perturbations of any gene, as `do` does.
    - ``start``: cells to begin with, diseased ones say. They go on from where their own protocol has brought them. Default: cells at rest.
    - ``settled``: cells are left alone for good behind the protocol, which needs a network, as in `do`.

    A Dataset over (condition,), sorted: ``distance`` (posterior mean) with ``lower`` and ``upper`` (the central interval of probability
    ``level``), ``best``, the posterior probability to be the nearest of all candidates, and ``better``, that to be nearer than doing
    nothing for as long as the longest candidate, whose own distance is ``nothing``, with ``nothing_lower`` and ``nothing_upper``. Each
    draw takes the same globals for all, and the same z₀ for all candidates and nothing. Which is best among candidates that are alike in
    truth is chance: read ``best`` beside the intervals. Cells that may have escaped their edits are drawn as hit or not, each time.

    Raises ValueError for unknown names, a ``level`` outside (0, 1), candidates that wait for no time, ``settled`` without a network, and
    ``start`` of continuous values or of a structure with noise, and a fit without a posterior (`stationary`, ``objective="paths"``);
    TypeError for another ``target_state``.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> ranked = pb.rank_perturbations(fit, {screen.genes[0]: -0.5, screen.genes[3]: 0.2}, n_draws=4)
    >>> sorted(ranked["perturbation"].values) == list(screen.perturbations), ranked["best"].sum().item()
    (True, 1.0)
    """
    require_posterior(fit, "rank_perturbations judges protocols")
    check_draws(n_draws)
    check_seed(seed)
    if not is_within(level, 0, 1):
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")
    _check_start(fit, start)
    asked, known = asked_of(fit, _each(fit, start, settled=settled) if candidates is None else candidates, settled=settled)
    known = list({_written(p): p for p in known}.values())
    say_untested(fit)
    nothing = Protocol() if settled else Protocol([Wait(max(p.time for p in known))])
    origins, cells = ([Protocol()], _at_rest(fit, seed)) if start is None else _rest_of(fit, start)
    ends = _Ends(asked, origins, [*known, nothing], settled=settled)
    if start is not None and not settled:
        say_far(fit, ends.protocols)
    wanted, genes, also = _wanted(fit, asked, target_state)
    extra = asked.model.condition_effect.unknown([*ends.parts, *(also.parts if also else [])])
    for each in (ends, also):
        if each is not None:
            each.number(extra)
    distances = []
    for k, draw in enumerate(global_draws(fit.model, fit.guide, n_draws, seed)):
        with seeded(seed, k, 2):
            sites = asked.model.completed(draw, extra)  # once, for candidates and target alike
            reached = ends(sites, cells(draw))
            distances.append((reached - wanted(draw, sites, reached[-1]))[:, genes].square().mean(-1).cpu())
    return timed(_ranked(asked, known, torch.stack(distances), level), settled=settled)


def _check_start(fit: "Fit", start: "Screen | None") -> None:
    """Refuse cells to begin with where none can be taken further."""
    if start is None:
        return
    require_screen(start)
    if fit.model.start is not None:
        raise ValueError("Rows of continuous values all begin at one known state, so start= would be ignored: leave it out.")
    if fit.model.transition.noise_shape:
        raise ValueError("The noise of this structure is made for the waits of its screen, and start= adds one: leave start= out.")


def _each(fit: "Fit", start: "Screen | None", *, settled: bool) -> list[Protocol]:
    """Return every perturbation of the fit alone, for the longest time that was seen; of genes that no given cell has perturbed yet."""
    names = fit.model.vocabulary
    if not names.perturbations:
        raise ValueError("The fit has seen no perturbation. Name candidates, such as Media('BMP4') >> Wait(5).")
    longest = max(Protocol.parse(text).time for text in fit.trained_on["conditions"])
    done = set() if start is None else {p.gene for protocol in start.conditions for p in protocol.perturbations}
    left = [p for p in names.perturbations if p.gene not in done]
    if not left:
        raise ValueError("The cells to begin with have every perturbation of the fit already: name candidates.")
    return [Protocol([p] if settled else [p, Wait(longest)]) for p in left]


@final
class _Ends:
    """Where cells end under each candidate, behind the protocols that they come from: mean log shares at η = 0."""

    def __init__(self, fit: "Fit", origins: Sequence[Protocol], candidates: Sequence[Protocol], *, settled: bool) -> None:
        """Encode every origin with every candidate behind it."""
        self.model, self.n, self.settled = fit.model, len(candidates), settled
        names, effect, device = fit.model.vocabulary, fit.model.condition_effect, fit.model.log_share.device
        self.protocols = [names.protocol(own >> then) for own in origins for then in candidates]
        self.parts = [effect.parts(p, names.time_scale) for p in self.protocols]
        self.segments = [s.to(device) for s in names.encode(self.protocols)]
        self.rows = torch.empty(0)

    def number(self, extra: Sequence[Node]) -> None:
        """Number the condition effects, ``extra`` ones behind those of the model."""
        self.rows = self.model.condition_effect.rows(self.parts, extra).to(self.model.log_share.device)

    def __call__(self, sites: Sites, cells: Rest) -> Float[Tensor, "candidate gene"]:
        """Return the mean over cells in one draw of the globals, completed."""
        total, count = torch.zeros(()), 0
        each = torch.arange(self.n, device=self.rows.device)
        size = max(1, CHUNK // (self.n * len(self.model.vocabulary.genes)))
        for z0, origin in cells:
            for z, own in zip(z0.split(size), origin.split(size), strict=True):
                number = (own[:, None] * self.n + each).flatten()
                state = ended(self.model, sites, z.repeat_interleave(self.n, 0), [s[number] for s in self.segments], settled=self.settled)
                total = total + self.model.log_shares(sites, state, self.rows[number]).unflatten(0, (len(z), self.n)).sum(0)
            count += len(z0)
        return total / count


def _at_rest(fit: "Fit", seed: int) -> Callable[[Sites], Rest]:
    """Return rest states of the model, the same in every draw."""
    points = SobolEngine(fit.model.rest_size, scramble=True, seed=seed).draw(N_REST).clamp(1e-6, 1 - 1e-6)
    z = fit.model.rest_points(points.to(fit.model.log_share.device))
    return lambda _: [(z, torch.zeros(len(z), dtype=torch.long, device=z.device))]


def _rest_of(fit: "Fit", screen: Screen) -> tuple[Sequence[Protocol], Callable[[Sites], Rest]]:
    """Return the protocols that given cells may have gone through, and a draw of their rest states with the number of each one's."""
    table = CellTable(fit.model, screen)

    def rest(draw: Sites) -> Rest:
        sites = table.sites(draw)
        for index in torch.arange(screen.n_cells).split(MINIBATCH):
            cells = gone(fit, table, sites, index)
            yield fit.guide.rest(cells).sample(), cells.condition if cells.hits is None else cells.hits.way

    return table.protocols, rest


Wanted = Callable[[Sites, Sites, Float[Tensor, " gene"]], Float[Tensor, " gene"]]
"""The desired state in one draw of the globals, as drawn and completed, given where cells end that nothing is done to."""


def _wanted(
    fit: "Fit", asked: "Fit", target: "Screen | pd.Series[float] | Mapping[str, float]"
) -> tuple[Wanted, Int[Tensor, " part"], "_Ends | None"]:
    """Return the desired state, the places of the genes that count, and where cells of the target end."""
    genes = list(fit.model.vocabulary.genes)
    if isinstance(target, Screen):
        everything = torch.arange(len(genes))
        if fit.model.start is not None:
            table = CellTable(fit.model, target)

            def measured(draw: Sites, _: Sites, __: Tensor) -> Tensor:
                sites = table.sites(draw)
                return torch.cat([fit.model.seen_state(sites, c).mean for c in table.minibatches(MINIBATCH)]).mean(0)

            return measured, everything, None
        origins, cells = _rest_of(fit, target)
        own = _Ends(asked, origins, [Protocol()], settled=False)
        return lambda draw, sites, _: own(sites, cells(draw))[0], everything, own
    if not isinstance(target, pd.Series | Mapping) or not len(target):
        raise TypeError(
            "target_state is a Screen of cells in the desired state, or the wanted changes in log rate by gene, such as "
            f"{{{genes[0]!r}: -0.5}}; got {type(target).__name__}{' without a gene' if isinstance(target, pd.Series | Mapping) else ''}."
        )
    given = pd.Series(target)
    shift = pd.to_numeric(given, errors="coerce")
    if unknown := [name for name in shift.index if name not in genes]:
        raise ValueError(f"target_state names {unknown[0]!r}, which is no gene of the fit. {nearest(unknown[0], genes)}")
    if len(wrong := given[given.index.duplicated() | ~(shift.abs() < torch.inf)]):
        found = f"{wrong.iloc[0]} for {wrong.index[0]!r}"
        raise ValueError(f"target_state must hold one finite change in log rate for each gene it names; got {found}.")
    place = torch.tensor([genes.index(name) for name in shift.index])
    moved = torch.zeros(len(genes)).index_copy(0, place, torch.tensor(shift.to_numpy(), dtype=torch.float32))
    return lambda _, __, nothing: nothing + moved.to(nothing), place, None


def _ranked(fit: "Fit", known: Sequence[Protocol], distances: Float[Tensor, "draw candidate"], level: float) -> xr.Dataset:
    """Sort candidates by their mean distance; the last column is that of doing nothing."""
    lower, upper = torch.quantile(distances, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    own, mean, n = distances[:, :-1], distances.mean(0), len(known)
    data = {
        "distance": mean[:n],
        "lower": lower[:n],
        "upper": upper[:n],
        "best": torch.nn.functional.one_hot(own.argmin(1), n).float().mean(0),
        "better": (own < distances[:, -1:]).float().mean(0),
    }
    data |= {"nothing": mean[n], "nothing_lower": lower[n], "nothing_upper": upper[n]}
    units = "squared natural log of a rate" if fit.model.start is None else "squared value"
    attrs: dict[str, object] = {"units": units, "level": level, "n_draws": len(distances)}
    result = labelled(fit, known, data, attrs).drop_vars("gene").assign_coords(condition=[_written(p) for p in known])
    return result.isel(condition=mean[:n].argsort().numpy())


def _written(protocol: Protocol) -> str:
    """Name a protocol as it was written: behind another one a change to baseline media does something."""
    return str(protocol) if protocol.written == protocol.actions else " >> ".join(map(repr, protocol.written))
