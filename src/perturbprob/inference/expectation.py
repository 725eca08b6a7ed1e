"""Averages of what a model expects of protocols, over cells at rest."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.dynamics.causal_context import CausalContext
from perturbprob.dynamics.transition import CellState
from perturbprob.experiment.action import Protocol
from perturbprob.experiment.settings import check_seed
from perturbprob.experiment.vocabulary import Segment
from perturbprob.inference.draws import Sites
from perturbprob.measurement.counts import CountLaw
from perturbprob.measurement.exact import ExactLaw

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit
    from perturbprob.model.cell_model import CellModel

N_REST = 128
"""How many rest states z₀, and size factors with them, an expectation is averaged over (the same Sobol points for every draw)."""
CHUNK = 20_000_000
"""How many values of rest states × conditions × genes are held at once."""


class Expectation:
    """Averages over cells at rest z₀ ~ Normal(0, I), by the same Sobol points for every condition and draw.

    One row per protocol, each in its batch (None: η = 0, "new": a batch never seen), with the depths of the condition ``depth_of``
    (itself). With ``settled`` cells are left alone for good behind their protocol, as a network can tell. Rows are worked through in
    ``parts`` that fit into memory.
    """

    def __init__(
        self,
        fit: "Fit",
        protocols: Sequence[Protocol],
        batches: Sequence[str | None],
        *,
        depth_of: Sequence[Protocol] | None = None,
        settled: bool = False,
        n_rest: int = N_REST,
        seed: int = 0,
    ) -> None:
        """Encode the protocols and place the points."""
        check_seed(seed)
        self.fit, self.model, self.settled = fit, fit.model, settled
        names, effect, device = fit.model.vocabulary, fit.model.condition_effect, fit.model.log_share.device
        self.new = len(names.batches)
        codes = [-1 if b is None else self.new if b == "new" else names.batch_code(b) for b in batches]
        self.batch = torch.tensor(codes, device=device)
        points = SobolEngine(fit.model.rest_size + 1, scramble=True, seed=seed).draw(n_rest).clamp(1e-6, 1 - 1e-6)
        self.z = fit.model.rest_points(points[:, 1:].to(device))
        depths = [fit.depth.quantiles(p, None if b == "new" else b) for p, b in zip(depth_of or protocols, batches, strict=True)]
        ranked = torch.stack(depths)[:, (points[:, 0] * len(depths[0])).long()]
        self.log_depth = ranked.to(self.z) + fit.model.log_depth
        self.segments = [s.to(device) for s in names.encode(protocols)]
        parts = [effect.parts(p, names.time_scale) for p in protocols]
        self.extra = effect.unknown(parts)
        self.rows = effect.rows(parts, self.extra).to(device)
        size = max(1, CHUNK // (n_rest * len(names.genes)))
        self.parts = [torch.arange(k, min(k + size, len(protocols))) for k in range(0, len(protocols), size)]

    def complete(self, sites: Sites) -> Sites:
        """Return one draw of the global sites with the effects of nodes that were not measured drawn too, and of a new batch."""
        sites = self.model.completed(sites, self.extra)
        return self.model.batch_effect.with_new(sites) if (self.batch == self.new).any() else sites

    @torch.no_grad()
    def log_shares(self, sites: Sites, part: Int[Tensor, " part"]) -> Float[Tensor, "rest part gene"]:
        """Return the log share of each gene in each rest state and row."""
        return self.model.log_shares(sites, self._state(part, sites), self.rows[part])

    @torch.no_grad()
    def log_rates(self, sites: Sites, part: Int[Tensor, " part"]) -> Float[Tensor, "rest part gene"]:
        """Return the same with the effect of each row's batch: of its name, of one never seen, or none."""
        state = self._state(part, sites)
        eta = self.model.batch_effect.at(sites, self.batch[part], state.z, state.media)
        return self.model.log_shares(sites, state, self.rows[part]) + eta

    @torch.no_grad()
    def assay_means(self, sites: Sites, part: Int[Tensor, " part"], name: str) -> Float[Tensor, "part feature"]:
        """Return the mean over cells of each row of a further assay's counts, at size factor 1."""
        state, rows = self._state(part, sites), self.rows[part]
        share = self.model.log_shares(sites, state, rows)
        law = self.model.assayed(name, sites, state, share, torch.zeros_like(share[..., 0]), rows, self.batch[part])
        return law.mean.mean(0)

    def _state(self, part: Int[Tensor, " part"], sites: Sites) -> CellState:
        """Carry the rest states through the protocols of some rows."""
        z = self.z[:, None].expand(-1, len(part), -1)
        return ended(self.model, sites, z, [s[part] for s in self.segments], settled=self.settled)

    @torch.no_grad()
    def means(
        self, sites: Sites, part: Int[Tensor, " part"], scale: str, n_cells: Float[Tensor, "part 1"] | None
    ) -> Float[Tensor, "part gene"]:
        """Return the mean over cells of each row, with the noise of a sample of so many cells where asked."""
        log_rate = self.log_rates(sites, part)
        depth = self.log_depth[part].T[..., None]
        law = self.model.law(sites, log_rate + depth)
        unit = depth.exp() * _seen_share(law) if scale == "rate" else torch.ones(())
        value = interpolated_log1p(law) if scale == "log1p" else law.mean / unit
        mean = value.mean(0)
        if n_cells is None:
            return mean
        variance = law.sample().log1p().var(0) if scale == "log1p" else (law.variance / unit.square()).mean(0) + value.var(0)
        return mean + torch.randn_like(mean) * (variance / n_cells.to(mean)).sqrt()


def _seen_share(law: CountLaw | ExactLaw) -> Float[Tensor, "rest part 1"]:
    """Return the share of all counts that extra zeros leave, so that shares of genes add up to what they do without."""
    return law.mean.sum(-1, keepdim=True) / law.log_rate.exp().sum(-1, keepdim=True)


def ended(
    model: "CellModel", sites: Sites, z: Float[Tensor, "*plate cell rest"], protocol: Sequence[Segment], *, settled: bool
) -> CellState:
    """Carry rest states through their protocols; with ``settled`` leave them alone for good behind."""
    state = model.moved(sites, z, protocol)
    return model.transition.settled(state, model.pushes(sites)) if settled and isinstance(model.transition, CausalContext) else state


def interpolated_log1p(law: CountLaw | ExactLaw, moment: Callable[[CountLaw], Tensor] = CountLaw.mean_log1p) -> Float[Tensor, "... gene"]:
    """Return E[log(1 + x)], or another ``moment``, of many rates that share each gene's dispersion and gate, from a table over log rates.

    The table has a step of 0.05 or finer; the second derivative is at most about 0.25, so linear interpolation errs by less than 1e-4.
    """
    if isinstance(law, ExactLaw):
        return law.mean_log1p()
    rates = law.log_rate.flatten(0, -2)
    low, high = rates.min() - 0.1, rates.max() + 0.1
    n = max(2, int((high - low) / 0.05) + 2)
    grid = torch.linspace(float(low), float(high), n).to(rates)
    table = moment(CountLaw(grid[:, None].expand(-1, rates.shape[-1]), law.dispersion, law.gate))
    place = (rates - low) / (high - low) * (n - 1)
    left = place.floor().long().clamp(0, n - 2)
    part = place - left
    return (table.gather(0, left) * (1 - part) + table.gather(0, left + 1) * part).view_as(law.log_rate)
