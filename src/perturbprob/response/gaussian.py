"""A Gaussian model of the means of a screen: effects that persist, change and resemble each other, and noise that is known."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float64
from scipy.stats import norm
from torch import Tensor
from tqdm.auto import tqdm

from perturbprob.experiment.action import Action, Protocol
from perturbprob.experiment.pseudobulk import condition_coordinates
from perturbprob.experiment.screen import Screen
from perturbprob.experiment.settings import check_whole, is_within
from perturbprob.experiment.vocabulary import nearest
from perturbprob.response.prior import STRUCTURES, ResponsePrior
from perturbprob.response.rows import Place, Rows, check_instants

STEPS, LEARNING_RATE = 250, 0.05
GROUP_VARIANCE = 4.0  # of what all conditions of one group share around the mean of all, in units of the variance between cells


def gaussian_response(screen: Screen, structures: Sequence[str] = tuple(STRUCTURES), *, progress: bool = True) -> "GaussianResponse":
    """Fit the Gaussian response model to the means of a screen, in seconds: the default for predicting means of conditions.

    Each gene g is divided by its standard deviation between cells of one condition: a mean over n cells then has noise of variance 1 / n.
    The mean of perturbation p in media m at time t and batch b is then

        Y[p, m, t, b, g] = μ_g + group[m, t, b, g] + δ[p, m, t, g] + noise,   δ[·, g] ~ Normal(0, a_g Σ),   δ[control] = 0,

    with group ~ Normal(0, 4), so that what a day or a batch does to all cells, control among them, is not taken for an effect, and Σ as in
    `ResponsePrior`: a size for each perturbation, resemblance between perturbations, a way through time, and a part that does not
    persist. Its parameters are fitted to the marginal likelihood (δ, group and noise integrated out) by 250 steps of Adam from a fixed
    start, with weak priors; one eigendecomposition a step serves every gene. ``structures`` are names of `STRUCTURES`, ways in which
    effects go on: predictions are averages over them, weighted for each condition by one over their variance, and where they disagree the
    interval is wider.

    ``screen`` holds counts, of which means of log(1 + count) are taken, or continuous values with standard errors or cells behind. It
    is linear and Gaussian, a Gaussian process over conditions, and knows no cells: it has no density of a cell, no batch effect that
    depends on state and no network. Raises ValueError for protocols of several instants, more than 3,000 means, and unknown structures.

    >>> import perturbprob as pb
    >>> train, test = pb.split.hold_out_time(pb.datasets.ishikawa2023(), 5, ["NANOG", "SOX2"])
    >>> response = pb.gaussian_response(train, ["lasting, alike + changing"], progress=False)
    >>> response.predict(test.conditions).sizes
    Frozen({'condition': 2, 'gene': 103})
    """
    if isinstance(structures, str) or not isinstance(structures, Sequence) or not structures:
        raise ValueError(f"structures= is a list of names of STRUCTURES, one at least; got {structures!r}.")
    for name in structures:
        if not isinstance(name, str) or name not in STRUCTURES:
            raise ValueError(f"Unknown structure {name!r}. {nearest(str(name), STRUCTURES)}")
    rows = Rows.of(screen)
    table = Table.of(rows)
    bar = tqdm(dict.fromkeys(structures), "gaussian_response", disable=not progress)
    return GaussianResponse(rows, {name: fitted(table, prior_of(rows, name)) for name in bar}, screen.values == "counts")


@final
@dataclass(frozen=True, eq=False)
class GaussianResponse:
    """A fitted response model: ask it for means with `predict`.

    ``priors`` holds the fitted covariance of each structure by name; ``counts`` says whether means are of log(1 + count), or of continuous
    values as they were measured.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=300, n_genes=10, n_perturbations=2, seed=1).screen
    >>> pb.gaussian_response(screen, ["free"], progress=False)
    GaussianResponse(18 means × 10 genes, 2 perturbations, averaged over 1 structure)
    """

    rows: Rows
    priors: dict[str, ResponsePrior]
    counts: bool = True

    def __repr__(self) -> str:
        """Say in one line what was fitted."""
        n, genes = self.rows.values.shape
        structures = f"{len(self.priors)} structure" + "s" * (len(self.priors) > 1)
        return f"GaussianResponse({n} means × {genes} genes, {len(self.rows.perturbations)} perturbations, averaged over {structures})"

    def predict(
        self,
        conditions: Sequence[Protocol | Action] | Protocol | Action,
        *,
        batch: str | Sequence[str | None] | None = None,
        n_cells: int | None = None,
        level: float = 0.9,
    ) -> xr.Dataset:
        """Return the expected means of conditions, dims (condition, gene), on the scale of the screen's means: mean, sd, lower, upper.

        ``sd`` and the central interval of probability ``level`` are of the population mean; with ``n_cells``, of the mean over so many
        cells. ``batch`` names a batch (or one for each condition) with cells in that media and time; None averages over all of them. A
        perturbation never seen is expected to do what the others have in common, in structures where they are alike, with a wide
        interval. Raises ValueError for media, times and batches of which nothing was seen, and where control alone was.

        >>> import perturbprob as pb
        >>> screen = pb.simulate(n_cells=300, n_genes=10, n_perturbations=2, seed=1).screen
        >>> response = pb.gaussian_response(screen, ["free"], progress=False)
        >>> sorted(response.predict(screen.conditions[:2]).data_vars)
        ['lower', 'mean', 'sd', 'upper']
        """
        protocols = _asked(self.rows, conditions)
        batches = _batches(self.rows, protocols, batch)
        if n_cells is not None:
            check_whole(1, n_cells=n_cells)
        if not is_within(level, 0, 1):
            raise ValueError(f"level is a probability between 0 and 1; got {level!r}.")
        place = self.rows.at([p for p, own in zip(protocols, batches, strict=True) for _ in own], [b for own in batches for b in own])
        weight = torch.block_diag(*(torch.full((1, len(own)), 1 / len(own), dtype=torch.float64) for own in batches))
        table = Table.of(self.rows)
        each = [table.posterior(prior, place, weight) for prior in self.priors.values()]
        means, variances = (np.stack([getattr(one, name).numpy() for one in each]) for name in ("mean", "variance"))
        share = 1 / np.maximum(variances.mean(2, keepdims=True), 1e-12)
        share /= share.sum(0)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0) + (0 if n_cells is None else 1 / n_cells)
        mean, sd = mean * self.rows.scale, np.sqrt(variance) * self.rows.scale
        reach = norm.ppf((1 + level) / 2) * sd
        data = {"mean": mean, "sd": sd, "lower": mean - reach, "upper": mean + reach}
        attrs = {
            "scale": "log1p",
            "interval": "mean" if n_cells is None else "observed",
            "level": level,
            "structures": ", ".join(self.priors),
        }
        coordinates = condition_coordinates(self.rows.screen, protocols)
        return xr.Dataset({name: (("condition", "gene"), value) for name, value in data.items()}, coordinates, attrs)


class _Posterior(NamedTuple):
    """Mean and variance of asked means, scaled as the rows are."""

    mean: Float64[Tensor, "asked gene"]
    variance: Float64[Tensor, "asked gene"]


@final
class Table(NamedTuple):
    """The rows as tensors; ``whitener`` C⁻¹ makes noise and groups, of covariance C Cᵀ, white."""

    place: Place
    centre: Float64[Tensor, " gene"]
    residual: Float64[Tensor, "row gene"]
    whitener: Float64[Tensor, "row row"]

    @classmethod
    def of(cls, rows: Rows) -> "Table":
        """Collect what was seen."""
        place, values = rows.place, torch.tensor(rows.values)
        root = torch.linalg.cholesky(torch.tensor(rows.noise).diag() + cls.group_covariance(place, place))
        whitener = torch.linalg.solve_triangular(root, torch.eye(len(values), dtype=torch.float64), upper=False)
        return cls(place, values.mean(0), values - values.mean(0), whitener)

    @staticmethod
    def group_covariance(left: Place, right: Place) -> Float64[Tensor, "left right"]:
        """Return the covariance that rows owe to what their group shares."""
        return GROUP_VARIANCE * (left.group[:, None] == right.group).double()

    def eigen(self, covariance: Float64[Tensor, "row row"]) -> tuple[Float64[Tensor, " mode"], Float64[Tensor, "row mode"]]:
        """Return λ and Q with Qᵀ (covariance) Q = diag(λ) and Qᵀ (noise) Q = I: every gene's covariance is diagonal under Q."""
        values, vectors = torch.linalg.eigh(self.whitener @ covariance @ self.whitener.T)
        return values.clamp(min=0.0), self.whitener.T @ vectors

    def loss(self, prior: ResponsePrior) -> Float64[Tensor, ""]:
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
    def posterior(self, prior: ResponsePrior, asked: Place, weight: Float64[Tensor, "asked place"]) -> _Posterior:
        """Return the posterior of weighted sums of means at some places."""
        values, q = self.eigen(prior(self.place, self.place))
        scale = prior.log_scale.exp()
        white = 1 + values[:, None] * scale
        effect, group = (weight @ cov(asked, self.place) @ q for cov in (prior, self.group_covariance))
        turned = q.T @ self.residual / white
        mean = self.centre + (effect @ turned) * scale + group @ turned
        before = [((weight @ cov(asked, asked)) * weight).sum(1) for cov in (prior, self.group_covariance)]
        gain = torch.stack([((e[:, None] * scale + g[:, None]) ** 2 / white).sum(0) for e, g in zip(effect, group, strict=True)])
        return _Posterior(mean, (before[0][:, None] * scale + before[1][:, None] - gain).clamp(min=0.0))


def prior_of(rows: Rows, structure: str) -> ResponsePrior:
    """Return the prior of a structure for some rows, its parameters where they start."""
    return ResponsePrior(STRUCTURES[structure], rows.times, len(rows.media), len(rows.perturbations), rows.values.shape[1])


def fitted(table: Table, prior: ResponsePrior) -> ResponsePrior:
    """Return the prior with its parameters fitted to the marginal likelihood."""
    optimiser = torch.optim.Adam(prior.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        table.loss(prior).backward()
        optimiser.step()
    return prior


def _asked(rows: Rows, conditions: Sequence[Protocol | Action] | Protocol | Action) -> list[Protocol]:
    """Return the protocols that are asked for, the screen's baseline media understood."""
    several = list(conditions) if isinstance(conditions, Sequence) and not isinstance(conditions, Protocol | str) else [conditions]
    if not several:
        raise ValueError("No condition to predict: give protocols, such as the held_out of a split.")
    if wrong := [one for one in several if not isinstance(one, Protocol | Action)]:
        raise TypeError(f"A condition is a protocol such as Knockout('NANOG') >> Wait(5), without quotes around it; got {wrong[0]!r}.")
    protocols = [(one if isinstance(one, Protocol) else Protocol([one])).with_baseline(rows.screen.baseline) for one in several]
    check_instants(protocols)
    if not rows.perturbations and any(p.perturbations for p in protocols):
        raise ValueError("The model knows control only: no perturbed condition was trained on, so what a perturbation does is not known.")
    if never := dict.fromkeys(p for protocol in protocols for p in protocol.perturbations if p not in rows.perturbations):
        hint = nearest(repr(next(iter(never))), map(repr, rows.perturbations))
        warnings.warn(f"Never trained on, and taken to be like the others: {', '.join(map(repr, never))}. {hint}", stacklevel=3)
    return protocols


def _batches(rows: Rows, protocols: list[Protocol], batch: str | Sequence[str | None] | None) -> list[list[str]]:
    """Return the batches that each prediction is an average over."""
    seen = [rows.batches_of(protocol) for protocol in protocols]
    if batch is None:
        return seen
    if not isinstance(batch, Sequence):
        raise TypeError(f"batch= takes the name of a batch, one (or None) per condition, or None; got {batch!r}.")
    named: list[str | None] = [batch] * len(protocols) if isinstance(batch, str) else list(batch)
    if len(named) != len(protocols):
        raise ValueError(f"batch= names {len(named)} batches for {len(protocols)} conditions: give one name, or one per condition.")
    for name, own, protocol in zip(named, seen, protocols, strict=True):
        if name is not None and name not in own:
            raise ValueError(f"Batch {name!r} has no training cell in the media and at the time of {protocol}. {nearest(name, own)}")
    return [own if name is None else [name] for name, own in zip(named, seen, strict=True)]
