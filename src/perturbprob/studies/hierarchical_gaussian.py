"""The strongest simple predictor of means: a Gaussian process over perturbations and times, with the noise of every mean known."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.studies.time_course import Means, TimeCourse, check_conditions, label_means

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen

RANK = 3
STEPS, LEARNING_RATE = 250, 0.05
DAY_VARIANCE = 4.0  # of the mean of a day around that of all days, in units of the variance between cells
INCREMENT = 0.3  # where the standard deviation of a change between successive times starts, that of the first time being 1
NUGGET = 0.02  # where it starts


def hierarchical_gaussian(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict means of log(1 + count), dims (condition, gene), by a hierarchical Gaussian model of all training means of the media.

    Each gene g is divided by its standard deviation σ_g between cells of one condition (pooled), so that a mean over n cells has noise of
    variance 1 / n. Then

        Y[p, t, g] / σ_g = μ_g + day[t, g] + δ[p, t, g] + noise,   δ[·, ·, g] ~ Normal(0, a_g (K ⊗ T + ν I)),   δ[control] = 0,

    with day ~ Normal(0, 4), K = diag(τ) + L Lᵀ over perturbations (L of rank 3), T any covariance over times (its first entry 1) and
    ν what does not persist. T is written by the changes between successive times, so that δ stays where it was at a time of which only
    control was seen. μ_g is the mean over the training conditions; a, τ, L, T and ν are fitted to the marginal likelihood, by 250
    steps of Adam from a fixed start, with weak priors on log a, log τ and L. The prediction is the posterior mean; earlier and later
    times count alike. As all genes share K, T and the noise, one eigendecomposition a step, of (conditions)², serves every gene.

    Raises ValueError for a perturbation without training cells, and a time at which nothing was seen.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG", "SOX2"])
    >>> hierarchical_gaussian(part.train, part.held_out).sizes
    Frozen({'condition': 2, 'gene': 103})
    """
    protocols, bulk = check_conditions(train, conditions), pseudobulk(train)
    values = np.empty((len(protocols), train.n_genes))
    for media in dict.fromkeys(p.media for p in protocols):
        index = [k for k, p in enumerate(protocols) if p.media == media]
        values[index] = _predict(TimeCourse.of(train, media, bulk), [protocols[k] for k in index])
    return label_means(train, protocols, values, "hierarchical_gaussian")


def _predict(course: TimeCourse, asked: list[Protocol]) -> Means:
    """Return the posterior means of some conditions of one media."""
    for protocol in asked:
        course.ending(protocol.time).check_target()
    place = _Place(torch.tensor([course.row(p) for p in asked]), torch.tensor([course.times.index(p.time) for p in asked]))
    deviation = np.sqrt(course.pooled_variance.mean(0))
    scale = np.where(deviation > 0, deviation, 1.0)
    data = _Data.of(course, scale)
    return data.posterior_mean(_fitted(data, course), place).numpy() * scale


class _Place(NamedTuple):
    """Conditions as indices into the perturbations and times of a course."""

    perturbation: Int[Tensor, " condition"]
    time: Int[Tensor, " condition"]


@final
class _Prior(nn.Module):
    """The covariance of δ between conditions, before the scale a of a gene."""

    def __init__(self, n_perturbations: int, n_times: int, n_genes: int) -> None:
        """Start with little in common; control (row 0 of every course) has no parameters."""
        super().__init__()
        start = torch.Generator().manual_seed(0)
        self.log_spread = nn.Parameter(torch.full((n_perturbations - 1,), -1.0, dtype=torch.float64))
        self.loading = nn.Parameter(0.1 * torch.randn(n_perturbations - 1, RANK, generator=start, dtype=torch.float64))
        self.root = nn.Parameter(torch.tensor([1.0] + [INCREMENT] * (n_times - 1), dtype=torch.float64).diag())
        self.log_nugget = nn.Parameter(torch.tensor(NUGGET, dtype=torch.float64).log())
        self.log_scale = nn.Parameter(torch.full((n_genes,), -1.0, dtype=torch.float64))

    def forward(self, left: _Place, right: _Place) -> Float64[Tensor, "left right"]:
        """Return the covariance between two lists of conditions."""
        similar = nn.functional.pad(self.log_spread.exp().diag() + self.loading @ self.loading.T, (1, 0, 1, 0))
        # rows of the root are changes from the time before: one that no mean bears on keeps its start, and is a change of mean 0
        root = self.root.tril().cumsum(0)
        times = root @ root.T / root[0, 0] ** 2
        same = (left.perturbation[:, None] == right.perturbation) & (left.time[:, None] == right.time)
        lone = same & (left.perturbation > 0)[:, None]
        return similar[left.perturbation][:, right.perturbation] * times[left.time][:, right.time] + lone * self.log_nugget.exp()

    def penalty(self) -> Float64[Tensor, ""]:
        """Return minus the log prior of the parameters, up to a constant."""
        spread, scale = (((x - x.mean()) ** 2).sum() for x in (self.log_spread, self.log_scale))
        return 0.05 * (spread + scale) + 0.5 * (self.loading**2).sum()


@final
class _Data(NamedTuple):
    """The training means of one media, scaled; ``whitener`` C⁻¹ makes noise and day means, of covariance C Cᵀ, white."""

    place: _Place
    centre: Float64[Tensor, " gene"]
    residual: Float64[Tensor, "condition gene"]
    whitener: Float64[Tensor, "condition condition"]

    @classmethod
    def of(cls, course: TimeCourse, scale: Float[np.ndarray, " gene"]) -> "_Data":
        """Collect what was seen."""
        p, t = np.nonzero(course.seen)
        place = _Place(torch.tensor(p), torch.tensor(t))
        means = torch.tensor(course.mean[p, t] / scale)
        noise = torch.diag(1 / torch.tensor(course.cells[p, t], dtype=torch.float64)) + cls.day_covariance(place, place)
        root = torch.linalg.cholesky(noise)
        whitener = torch.linalg.solve_triangular(root, torch.eye(len(p), dtype=torch.float64), upper=False)
        return cls(place, means.mean(0), means - means.mean(0), whitener)

    @staticmethod
    def day_covariance(left: _Place, right: _Place) -> Float64[Tensor, "left right"]:
        """Return the covariance that conditions of one day owe to the mean of the day."""
        return DAY_VARIANCE * (left.time[:, None] == right.time).double()

    def eigen(self, prior: Float64[Tensor, "condition condition"]) -> tuple[Float64[Tensor, " mode"], Float64[Tensor, "condition mode"]]:
        """Return λ and Q with Qᵀ (prior) Q = diag(λ) and Qᵀ (noise) Q = I: every gene's covariance is diagonal under Q."""
        values, vectors = torch.linalg.eigh(self.whitener @ prior @ self.whitener.T)
        return values.clamp(min=0.0), self.whitener.T @ vectors

    def loss(self, prior: _Prior) -> Float64[Tensor, ""]:
        """Return minus the log marginal likelihood and minus the log prior, up to constants, with the right gradient.

        For gene g, Σ = a K + C Cᵀ: minus the log density is half the sum over modes of log(1 + a λ) + u² / (1 + a λ), with
        u = Qᵀ r of the residual r. Its gradient in K is written out, ½ a (Σ⁻¹ − Σ⁻¹ r rᵀ Σ⁻¹) summed over genes: that of an
        eigendecomposition is not finite where eigenvalues coincide.
        """
        covariance, scale = prior(self.place, self.place), prior.log_scale.exp()
        with torch.no_grad():
            values, q = self.eigen(covariance)
            turned = q.T @ self.residual
            white = 1 + values[:, None] * scale
            solved = q @ (turned / white)
            gradient = 0.5 * ((q * (scale / white).sum(1)) @ q.T - (solved * scale) @ solved.T)
        variance = 1 + values[:, None] * scale
        density = 0.5 * (variance.log() + turned**2 / variance).sum()
        along = (covariance * gradient).sum()
        return density + prior.penalty() + along - along.detach()

    @torch.no_grad()
    def posterior_mean(self, prior: _Prior, asked: _Place) -> Float64[Tensor, "asked gene"]:
        """Return the expected means of other conditions, scaled as the data are."""
        values, q = self.eigen(prior(self.place, self.place))
        scale = prior.log_scale.exp()
        solved = q @ (q.T @ self.residual / (1 + values[:, None] * scale))
        return self.centre + prior(asked, self.place) @ solved * scale + self.day_covariance(asked, self.place) @ solved


def _fitted(data: _Data, course: TimeCourse) -> _Prior:
    """Return the prior with its parameters fitted."""
    prior = _Prior(*course.mean.shape)
    optimiser = torch.optim.Adam(prior.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        data.loss(prior).backward()
        optimiser.step()
    return prior
