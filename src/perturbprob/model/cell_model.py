"""The generative story of a screen: η, P, M, W, V, in that order."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.nn import PyroModule
from torch import Tensor, nn

from perturbprob.dynamics.solve import SolverError
from perturbprob.dynamics.transition import CellState, Effects, Transition
from perturbprob.experiment.vocabulary import Segment, Vocabulary
from perturbprob.measurement.assays import AssayHead
from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountHead
from perturbprob.measurement.decoder import Decoder, Identity, Log1p, LogRate, log_prior
from perturbprob.measurement.exact import Exact
from perturbprob.measurement.fused import FusedCountLaw
from perturbprob.measurement.normal import Normal
from perturbprob.measurement.rate import Rate
from perturbprob.model.cells import Cells
from perturbprob.model.condition_effect import ConditionEffect, Node
from perturbprob.model.mark_effect import MarkEffect
from perturbprob.model.penetrance import Penetrance

if TYPE_CHECKING:
    from perturbprob.model.assumptions import Bound


@final
class CellModel(PyroModule):
    """A screen as the paper tells it: cells at rest X are perturbed, their media changed, left alone, and measured.

    Main arguments: the slots. ``transition`` moves the latent state (W∘M∘P, eq 4), ``decoder`` and ``measurement`` see it (V, eq 10),
    ``batch_effect`` is η^b (eq 15), ``condition_effect`` what a condition does to single genes beyond the latent state, ``mark_effect``
    what perturbations and media add to the push.
    ``programmes`` are the few directions in which cells at rest differ, where the state has an axis for each gene; without them every
    axis of the state differs on its own.
    ``assays`` see the same state beside RNA, by name, any subset in each cell. ``penetrance``, where there is one, is how probably an
    edited cell is hit, ``sgrnas`` the names of its sgRNAs.
    ``vocabulary`` holds the names, ``log_share`` the log share of each gene in all counts, around which its bias is centred,
    ``log_depth`` the log of the depth at size factor 1, ``n_hidden`` the width of the guide's encoder. ``start`` is the
    rest state where it is known, as in gene space, instead of z₀ ~ Normal(0, I). ``assumptions`` are those
    declared, each with a term of its own. ``recipe`` is how `load` builds the model again.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        transition: Transition,
        decoder: Decoder | LogRate | Log1p | Identity,
        measurement: CountHead | Normal | Exact,
        batch_effect: BatchEffect,
        condition_effect: ConditionEffect,
        mark_effect: MarkEffect,
        *,
        n_latent: int,
        n_hidden: int = 128,
        programmes: nn.Linear | None = None,
        log_share: Float[Tensor, " gene"],
        log_depth: float,
        start: Float[Tensor, " latent"] | None = None,
        assumptions: Sequence["Bound"] = (),
        recipe: dict[str, Any] | None = None,
        assays: Mapping[str, AssayHead] | None = None,
        penetrance: Penetrance | None = None,
        sgrnas: Sequence[str] = (),
    ) -> None:
        """Fill the slots."""
        super().__init__()
        self.vocabulary, self.recipe = vocabulary, recipe or {}
        self.transition, self.decoder, self.measurement = transition, decoder, measurement
        self.batch_effect, self.condition_effect, self.mark_effect = batch_effect, condition_effect, mark_effect
        self.assays = cast("dict[str, AssayHead]", nn.ModuleDict(assays or {}))
        own = {
            name: ConditionEffect(condition_effect.nodes, len(head.features), name, memory=condition_effect.given_memory)
            for name, head in self.assays.items()
        }
        self.assay_effects = cast("dict[str, ConditionEffect]", nn.ModuleDict(own))
        self.n_latent, self.n_hidden, self.programmes = n_latent, n_hidden, programmes
        self.penetrance, self.sgrnas = penetrance, tuple(sgrnas)
        self.assumptions = tuple(assumptions)
        for bound in self.assumptions:
            if reason := bound.assumption.refuses(transition):
                raise ValueError(f"{type(bound.assumption).__name__} {reason}")
        self.register_buffer("log_share", log_share)
        self.register_buffer("log_depth", torch.tensor(log_depth))
        self.register_buffer("start", start)

    @property
    def rest_size(self) -> int:
        """How many numbers make a cell at rest: its state z₀, and the noise that its transition wants."""
        return self._n_rest + (math.prod(self.transition.noise_shape) if self.transition.noise_shape else 0)

    @property
    def _n_rest(self) -> int:
        """How many numbers make z₀."""
        return self.n_latent if self.programmes is None else self.programmes.in_features

    def resting(self, z: Float[Tensor, "*plate cell rest"]) -> Float[Tensor, "*plate cell latent"]:
        """Return z₀, the state of a cell at rest, from the numbers that make it."""
        own = z[..., : self._n_rest]
        return own if self.programmes is None else self.programmes(own)

    def forward(self, cells: Cells) -> None:
        """Sample the screen, eqs 1-10 and 15. Global sites stand above the plate; ``z`` and ``counts`` are per cell."""
        sites = self.globals()
        self.spreads()
        self.own(sites, cells)

    def own(self, sites: dict[str, Tensor], cells: Cells) -> None:
        """Sample what is of the cells, given what all cells share, and the terms of assumptions."""
        for bound in self.assumptions:
            pyro.factor(bound.name, bound.term(self, sites))  # above the plate: once per screen, not once per cell
        with pyro.plate("cell", cells.total, subsample=cells.index):
            if self.penetrance is not None and cells.hits is not None:  # a row for each way that an edited cell may have gone
                pyro.sample("hit", self.penetrance.law(sites, cells.hits), obs=cells.hits.hit)
            with pyro.poutine.scale(scale=cells.warmth):
                z = pyro.sample("z", self.at_rest(len(cells)))  # X, a cell at rest
            state = self.moved(sites, z, cells.protocol)  # W(M(P(X))), eq 4
            for name, law, counts in self.seen(sites, state, cells):
                seen = law.to_event(1)
                pyro.sample(name, seen, obs=counts if isinstance(seen, FusedCountLaw) else counts.to_dense())  # V of each assay, eq 10

    def globals(self) -> dict[str, Tensor]:
        """Sample what all cells share: η, the measurement, and the effects."""
        eta = self.batch_effect()  # eqs 15, 19
        measurement = self.measurement.globals()
        bias = torch.zeros_like(self.log_share)
        if self.start is None:  # a known start is a known bias
            bias = pyro.sample("gene_bias", dist.Normal(self.log_share, 1.0).to_event(1))
        own = {name: value for part in (*self.assays.values(), *self.assumptions) for name, value in part.globals().items()}
        for effect in (self.condition_effect, *self.assay_effects.values()):
            own |= effect()
        escape = {} if self.penetrance is None else self.penetrance()
        return {**eta, "gene_bias": bias, **self.mark_effect(), **measurement, **own, **escape}

    def spreads(self) -> None:
        """Add the prior of how far networks move their genes, above the plate."""
        for name, part in {"decoder": self.decoder, **self.assays}.items():
            if isinstance(part, Decoder | AssayHead):
                pyro.factor(f"{name}_spread", log_prior(part.network, part.points))

    def at_rest(self, n_cells: int) -> dist.Distribution:
        """Return the law of z₀ for each cell, and of the noise of its way behind it: Normal(0, I), or the known start."""
        if self.start is not None:
            return dist.Delta(self.start.expand(n_cells, -1), event_dim=1)
        return dist.Normal(self.log_share.new_zeros(n_cells, self.rest_size), 1.0).to_event(1)

    def rest_points(self, uniform: Float[Tensor, "point rest"]) -> Float[Tensor, "point rest"]:
        """Turn uniform points into rest states of the law `at_rest`."""
        return torch.special.ndtri(uniform) if self.start is None else self.start.expand_as(uniform)

    def moved(self, sites: dict[str, Tensor], z: Float[Tensor, "*plate cell rest"], protocol: Sequence[Segment]) -> CellState:
        """Carry cells at rest through their protocols."""
        return self.course(sites, z, protocol)[-1]

    def course(self, sites: dict[str, Tensor], z: Float[Tensor, "*plate cell rest"], protocol: Sequence[Segment]) -> list[CellState]:
        """Carry cells at rest through their protocols; return the state at the end of each segment."""
        try:
            shape = self.transition.noise_shape
            noise = z[..., self._n_rest :].unflatten(-1, shape) if shape else None
            return self.transition.course(self.resting(z), protocol, self.pushes(sites), noise)
        except SolverError as error:
            worst = self._described(protocol, error.cell) if error.cell >= 0 else "not known"
            advice = "Wait no longer than was measured, lower learning_rate, or give a smoother field."
            raise SolverError(f"{error} Worst: {worst}. {advice}", error.cell, error.error) from None

    def _described(self, protocol: Sequence[Segment], cell: int) -> str:
        """Say what was done to a cell, and over which span it was solved."""
        names, steps = self.vocabulary, []
        for segment in protocol:
            done = [repr(p) for p, there in zip(names.perturbations, segment.perturbation[cell], strict=True) if there]
            done += [f"Media({m!r})" for m, there in zip(names.media, segment.media[cell], strict=True) if there]
            steps += [*done, f"Wait({float(segment.wait[cell]) * names.time_scale:g})"]
        return " >> ".join(steps)

    def pushes(self, sites: dict[str, Tensor]) -> Effects:
        """Return what perturbations and media add to the push, in the words of the transition."""
        return self.mark_effect.pushes(sites)

    def log_shares(self, sites: dict[str, Tensor], state: CellState, rows: Int[Tensor, "cell part"]) -> Float[Tensor, "*plate cell gene"]:
        """Return the log of each gene's expected share of a cell's counts, before batch effects."""
        return self.decoder(state.z, self.offset(sites, rows))

    def offset(self, sites: dict[str, Tensor], rows: Int[Tensor, "cell part"]) -> Float[Tensor, "cell gene"]:
        """Return what acts on genes directly: the bias of each, and the effects of a cell's condition."""
        return self.condition_effect.total(sites["condition_effect"], rows, sites["gene_bias"])

    def seen(self, sites: dict[str, Tensor], state: CellState, cells: Cells) -> Iterator[tuple[str, dist.Distribution, Tensor]]:
        """Yield the law of each assay's counts, RNA first, under the name of its site, and the counts; cells that lack it are masked."""
        law = self.measured(sites, state, cells)
        yield "counts", law if cells.present is None else law.mask(cells.present[:, None]), cells.counts
        if self.assays:
            log_share = self.log_shares(sites, state, cells.rows)
        for name in self.assays:
            seen = cells.assays[name]
            law = self.assayed(name, sites, state, log_share, seen.log_size_factor, cells.rows, cells.batch)
            yield f"{name}_counts", law.mask(seen.present[:, None]), seen.counts

    def assayed(
        self,
        name: str,
        sites: dict[str, Tensor],
        state: CellState,
        log_share: Float[Tensor, "*plate cell gene"],
        log_size_factor: Float[Tensor, "*#plate cell"],
        rows: Int[Tensor, "cell part"],
        batch: Int[Tensor, " cell"],
    ) -> dist.Distribution:
        """Return the law of a further assay's counts; what its conditions and batches do to single features is its own."""
        head, effect = self.assays[name], self.assay_effects[name].total(sites[f"{name}_condition_effect"], rows)
        return head(sites, state.z, log_share, log_size_factor, effect + head.eta(sites, batch, state.z, state.media))

    def completed(self, sites: dict[str, Tensor], extra: Sequence[Node]) -> dict[str, Tensor]:
        """Return one draw of the global sites with a draw of the effects of marks and ``extra`` nodes that were not measured."""
        sites = self.mark_effect.completed(sites)
        for effect in (self.condition_effect, *self.assay_effects.values()):
            sites = effect.completed(sites, extra)
        return sites

    def measured(self, sites: dict[str, Tensor], state: CellState, cells: Cells) -> dist.Distribution:
        """Return the law of the counts, log rate = log ℓ + log share + η^b (eq 15), or of continuous values around z + η^b."""
        depth = cells.log_size_factor + self.log_depth
        eta = self.batch_effect.table(sites, cells.batch, state.z, state.media)
        logits, offset = getattr(self.decoder, "logits", self.decoder), self.offset(sites, cells.rows)  # or log shares themselves
        rate = Rate(logits(state.z, offset), depth, *eta, softmax=isinstance(self.decoder, Decoder | LogRate))
        return self.law(sites, rate if isinstance(self.measurement, CountHead) else rate.log, cells.standard_error)

    def seen_state(self, sites: dict[str, Tensor], cells: Cells) -> dist.Distribution:
        """Return the law of z(t) given values that measure the state itself, as in gene space: around x − η^b, with the noise of x."""
        media = self.moved(sites, self.at_rest(len(cells)).sample(), cells.protocol).media
        eta = self.batch_effect.at(sites, cells.batch, cells.counts, media)
        return self.law(sites, cells.counts - eta, cells.standard_error)

    def law(
        self,
        sites: dict[str, Tensor],
        location: Float[Tensor, "*plate gene"] | Rate,
        standard_error: Float[Tensor, "cell gene"] | None = None,
    ) -> dist.Distribution:
        """Return the law of counts around a log rate, or of values around a location with known standard errors."""
        known = {} if standard_error is None else {"standard_error": standard_error}
        return self.measurement(location, **{name: sites[name] for name in self.measurement.sites if name in sites}, **known)
