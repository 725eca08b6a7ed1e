"""How the effects of perturbations go on over time, and how alike they are: covariances with few, readable parameters."""

from typing import NamedTuple, final

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from perturbprob.response.rows import Place, alike_wide

RANK = 3
INCREMENT = 0.3  # where the standard deviation of a change between successive times (or media) starts, that at the first being 1
NUGGET = 0.02  # where the share of an effect that does not persist starts


class Component(NamedTuple):
    """A part of every effect: how it goes on over ``time``, and whether perturbations are ``alike`` in it beyond their size."""

    time: str
    alike: bool = False


STRUCTURES: dict[str, tuple[Component, ...]] = {
    "free": (Component("free"),),
    "free, alike": (Component("free", alike=True),),
    "free, alike + changing": (Component("free", alike=True), Component("walk")),
    "lasting, alike + changing": (Component("constant", alike=True), Component("walk")),
    "lasting, alike + changing + growing": (Component("constant", alike=True), Component("walk"), Component("line")),
    "lasting + changing + passing": (Component("constant"), Component("walk"), Component("each")),
}
"""The ways in which effects may move through time, by name: those that `gaussian_response` averages over."""


@final
class ResponsePrior(nn.Module):
    """The covariance of effects δ between rows, before the scale a of a gene.

    Σ_c (D (diag τ_c + L Lᵀ) Dᵀ + ι [combination]) ∘ T_c ∘ M + ν [same condition]; L Lᵀ in a component that is alike, ι in the first.
    D says which perturbations act on a row, so that effects on several genes add up, but for ι. T_c over times, scaled to run from 0 to 1:
    1 ("constant"), min(s, t) ("walk"), s t ("line"), [s = t] ("each"), or any covariance ("free"); M over media is any. Of a
    perturbation without rows the loadings L are those of the mean, and how far others are from that is added to its τ, the mean too.
    """

    times: Tensor

    def __init__(
        self, components: tuple[Component, ...], times: tuple[float, ...], n_media: int, n_perturbations: int, n_genes: int
    ) -> None:
        """Start with little in common."""
        super().__init__()
        self.components = components
        span = torch.tensor(times, dtype=torch.float64)
        self.register_buffer("times", (span - span[0]) / (span[-1] - span[0]).clamp(min=1e-12))
        start = torch.Generator().manual_seed(0)
        first = torch.arange(len(components), dtype=torch.float64)[:, None] == 0
        self.log_spread = nn.Parameter(torch.where(first, -1.0, -2.0).double().repeat(1, n_perturbations))
        self.loading = nn.Parameter(0.1 * torch.randn(n_perturbations, RANK, generator=start, dtype=torch.float64))
        self.time_root = nn.Parameter(_increments(len(times)))
        self.media_root = nn.Parameter(_increments(n_media))
        self.log_interaction = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.log_nugget = nn.Parameter(torch.tensor(NUGGET, dtype=torch.float64).log())
        self.log_scale = nn.Parameter(torch.full((n_genes,), -1.0, dtype=torch.float64))

    def forward(self, left: Place, right: Place) -> Float64[Tensor, "left right"]:
        """Return the covariance between two lists of rows."""
        same, media = left.same(right), _free(self.media_root)[left.media][:, right.media]
        several = same & (left.members.sum(1) > 1)[:, None]
        total = same * (left.media[:, None] == right.media) * (left.time[:, None] == right.time) * self.log_nugget.exp()
        for k, component in enumerate(self.components):
            similar = self._similar(left.members, right.members, k) + several * self.log_interaction.exp() * (k == 0)
            total = total + similar * self._over_time(component.time)[left.time][:, right.time] * media
        return total

    def penalty(self) -> Float64[Tensor, ""]:
        """Return minus the log prior of the parameters, up to a constant."""
        spread = (self.log_spread - self.log_spread.mean(1, keepdim=True)).square().sum() if self.log_spread.numel() else 0.0
        scale = (self.log_scale - self.log_scale.mean()).square().sum()
        return 0.05 * (spread + scale) + 0.5 * self.loading.square().sum()

    def _similar(self, left: Float64[Tensor, "left some"], right: Float64[Tensor, "right others"], k: int) -> Float64[Tensor, "left right"]:
        """Return how alike effects are in one component, times over media apart."""
        left, right = alike_wide(left, right)
        spread, loading = self.log_spread[k].exp(), self.loading.clone()
        if (more := left.shape[1] - len(loading)) and len(loading):
            mean, own = loading.mean(0), self.components[k].alike * (loading - loading.mean(0)).square().sum(1).mean()
            spread = torch.cat([spread, (spread.mean() + own).expand(more)])
            loading = torch.cat([loading, mean.expand(more, -1)])
        alike = (left @ loading) @ (right @ loading).T if self.components[k].alike else 0.0
        return (left * spread) @ right.T + alike

    def _over_time(self, kind: str) -> Float64[Tensor, "time time"]:
        """Return the covariance between times that a component has."""
        if kind == "free":
            return _free(self.time_root)
        t = self.times
        kinds = {"walk": torch.minimum(t[:, None], t), "line": torch.outer(t, t), "each": torch.eye(len(t), dtype=t.dtype)}
        return kinds.get(kind, torch.ones(len(t), len(t), dtype=t.dtype))


def _increments(n: int) -> Float64[Tensor, "n n"]:
    """Return the root to start from: 1 at the first level, small independent changes from each to the next."""
    return torch.tensor([1.0] + [INCREMENT] * (n - 1), dtype=torch.float64).diag()


def _free(root: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Return any covariance, 1 at the first level, its root written by changes between successive levels.

    A change that no mean bears on keeps its start and has mean 0, so that an effect stays where it was.
    """
    whole = root.tril().cumsum(0)
    return whole @ whole.T / whole[0, 0] ** 2
