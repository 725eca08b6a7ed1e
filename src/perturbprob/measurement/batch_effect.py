"""η^b: additive batch effects on the log rate that sum to zero over batches (eqs 15, 19)."""

import warnings
from collections.abc import Sequence
from typing import final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.nn import PyroModule
from torch import Tensor

from perturbprob.measurement.log_normal import LogNormal
from perturbprob.measurement.rate import rows

FEWEST_FOR_COVARIATES = 8
"""A regression of batch effects on what the batches hold is learnt across batches only: fewer than this say nothing of it."""


def zero_sum_basis(n: int) -> Float[Tensor, "batch free"]:
    """Return an orthonormal basis of the vectors of length n that sum to zero (Helmert's).

    >>> zero_sum_basis(3).sum(0).abs().max() < 1e-6
    tensor(True)
    """
    basis = torch.zeros(n, n - 1, dtype=torch.float64)
    for k in range(1, n):
        basis[:k, k - 1], basis[k, k - 1] = 1.0, -float(k)
    return (basis / basis.norm(dim=0)).float()


def nested_basis(groups: Sequence[int]) -> tuple[Float[Tensor, "batch free"], Float[Tensor, " free"]]:
    """Return an orthonormal basis of the vectors that sum to zero, and 1 for the columns between groups of batches, 0 within.

    Columns within a group sum to zero over its batches; columns between groups are constant in each.

    >>> basis, between = nested_basis([0, 0, 1])
    >>> between
    tensor([1., 0.])
    """
    of = torch.tensor(groups)
    member = torch.nn.functional.one_hot(of).double()
    size = member.sum(0)
    whole = torch.linalg.qr(torch.cat([size.sqrt()[:, None], torch.eye(len(size), dtype=torch.float64)], 1))[0][:, 1:]
    columns = [(member / size.sqrt()) @ whole]
    for group in range(len(size)):
        within = torch.zeros(len(of), int(size[group]) - 1, dtype=torch.float64)
        within[of == group] = zero_sum_basis(int(size[group])).double()
        columns.append(within)
    between = torch.zeros(len(of) - 1)
    between[: len(size) - 1] = 1.0
    return torch.cat(columns, 1).float(), between


@final
class BatchEffect(PyroModule):
    """η^b per batch and gene: hierarchical over genes, exactly zero-sum over batches, centred over genes by rate.

    log τ_g ~ Normal(log τ, 0.5), log τ ~ Normal(log 0.1, 1), the zero-sum coordinates of η_g ~ Normal(0, τ_g²). The constant over genes
    of a batch is depth, which the size factor holds, so Σ_g share_g η_bg = 0 for every batch. With a single batch η is 0.

    Main arguments: ``share`` is the share of each gene in all counts, shape (gene,). Three forms, and any of them together:

    - constant (the default), η^b;
    - state-dependent, where a batch acts otherwise on other cells (a drug that works differently in each patient):
      η^b(z, m) = η^b + Σ_m m α^b_m + Σ_k z_k β^b_k, zero-sum over b for every state; ``n_media`` and ``n_latent`` say how many media and
      latent axes it reads, with a scale per gene for α and per axis for β;
    - a regression across batches, η^b ~ Normal(K c_b, τ_g²), on ``covariates`` c (batch, covariate): what a batch holds (eq 19, text), or
      where its well lies on a plate. Learnt across batches only, so at least 8 are needed; covariates are standardised.

    ``groups`` numbers the screen (laboratory) of each batch: batches are then nested in it, and the columns between screens have
    a scale of their own, ``batch_screen_ratio`` · τ_g.
    """

    def __init__(
        self,
        n_batches: int,
        share: Float[Tensor, " gene"],
        *,
        n_media: int = 0,
        n_latent: int = 0,
        covariates: Float[Tensor, "batch covariate"] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Make the basis; say once that one batch has no batch effect."""
        super().__init__()
        self.n_batches, self.n_genes = n_batches, len(share)
        self.n_media, self.n_latent = (n_media, n_latent) if n_batches > 1 else (0, 0)
        self.adapted = 0
        basis, between = nested_basis([0] * n_batches if groups is None else groups)
        self.register_buffer("share", share)
        self.register_buffer("basis", basis)
        self.register_buffer("between", between)
        self._nested = bool(between.any() and not between.all())
        self.register_buffer("covariates", None if covariates is None else _standardised(covariates, n_batches))
        if n_batches == 1:
            warnings.warn(
                "The screen has one batch: its batch effect is fixed to 0. Name the batch column if there are several.", stacklevel=3
            )

    def forward(self) -> dict[str, Tensor]:
        """Sample above the cell plate; return the parts of η by name.

        Parts: batch_effect (batch, gene), batch_media_effect (media, batch, gene), batch_state_effect (latent, batch, gene).
        """
        if self.n_batches == 1:
            return {"batch_effect": torch.zeros_like(self.share)[None]}
        overall = pyro.sample("batch_scale_overall", LogNormal(self._log(0.1), 1.0))
        scale = pyro.sample("batch_scale", LogNormal(overall.log() + torch.zeros_like(self.share), 0.5).to_event(1))
        law = dist.Normal(self._expected(), scale * self._ratio()[:, None])
        effect = self.effect(pyro.sample("batch_coordinate", law.to_event(2)))
        parts = {"batch_effect": pyro.deterministic("batch_effect", effect, event_dim=2)}
        if self.adapted:
            zero = self.share.new_zeros(self.adapted, self.n_genes)
            own = pyro.sample("batch_adapted", dist.Normal(zero, scale).to_event(2))
            parts["batch_effect"] = torch.cat([parts["batch_effect"], self.centred(own)])
        return parts | self._by_media() | self._by_state()

    def _expected(self) -> Float[Tensor, "free gene"]:
        """Return the mean of the coordinates: the regression on the batches' covariates, or 0."""
        zero = self.share.new_zeros(self.n_batches - 1, self.n_genes)
        if self.covariates is None:
            return zero
        n = self.covariates.shape[1]
        scale = pyro.sample("batch_covariate_scale", LogNormal(self._log(0.1).expand(n), 1.0).to_event(1))
        law = dist.Normal(self.share.new_zeros(n, self.n_genes), scale[:, None])
        slope = self.centred(pyro.sample("batch_covariate_coordinate", law.to_event(2)))
        slope = pyro.deterministic("batch_covariate_effect", slope, event_dim=2)
        return self.basis.T @ (self.covariates @ slope)

    def _ratio(self) -> Float[Tensor, " free"]:
        """Return how much wider the columns between screens are than those within."""
        if not self._nested:
            return torch.ones_like(self.between)
        ratio = pyro.sample("batch_screen_ratio", LogNormal(self._log(2.0), 0.7))
        return torch.where(self.between > 0, ratio, torch.ones_like(ratio))

    def _by_media(self) -> dict[str, Tensor]:
        """Sample how much further each media moves each batch, with a scale per gene."""
        if not self.n_media:
            return {}
        overall = pyro.sample("batch_media_scale_overall", LogNormal(self._log(0.1), 1.0))
        scale = pyro.sample("batch_media_scale", LogNormal(overall.log() + torch.zeros_like(self.share), 0.5).to_event(1))
        zero = self.share.new_zeros(self.n_media, self.n_batches - 1, self.n_genes)
        effect = self.effect(pyro.sample("batch_media_coordinate", dist.Normal(zero, scale).to_event(3)))
        return self._with_rows("batch_media_effect", effect)

    def _by_state(self) -> dict[str, Tensor]:
        """Sample how much each latent axis changes each batch effect, with a scale per axis."""
        if not self.n_latent:
            return {}
        scale = pyro.sample("batch_state_scale", LogNormal(self._log(0.03).expand(self.n_latent), 1.0).to_event(1))
        zero = self.share.new_zeros(self.n_latent, self.n_batches - 1, self.n_genes)
        effect = self.effect(pyro.sample("batch_state_coordinate", dist.Normal(zero, scale[:, None, None]).to_event(3)))
        return self._with_rows("batch_state_effect", effect)

    def _with_rows(self, name: str, effect: Float[Tensor, "of batch gene"]) -> dict[str, Tensor]:
        """Name a part of η; a batch adapted to later has none of it."""
        return {name: torch.nn.functional.pad(pyro.deterministic(name, effect, event_dim=3), (0, 0, 0, self.adapted))}

    def effect(self, coordinate: Float[Tensor, "*of free gene"]) -> Float[Tensor, "*of batch gene"]:
        """Return η from its zero-sum coordinates."""
        return self.centred(self.basis @ coordinate)

    def centred(self, effect: Float[Tensor, "*batch gene"]) -> Float[Tensor, "*batch gene"]:
        """Take out the part that all genes share, which is depth."""
        return effect - (effect * self.share).sum(-1, keepdim=True)

    def at(
        self,
        sites: dict[str, Tensor],
        batch: Int[Tensor, " cell"],
        z: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "cell media"],
    ) -> Float[Tensor, "*eta cell gene"]:
        """Return η^b(z, m) of cells, given the parts of η, each cell's batch (−1: none, 0), its state and the marks of its media."""
        eta, row = self.table(sites, batch, z, media)
        return eta if row is None else rows(eta, row)

    def table(
        self,
        sites: dict[str, Tensor],
        batch: Int[Tensor, " cell"],
        z: Float[Tensor, "*plate cell latent"],
        media: Float[Tensor, "cell media"],
    ) -> tuple[Float[Tensor, "*eta row gene"], Int[Tensor, " cell"] | None]:
        """Return η^b as a table and the row of each cell in it; of state-dependent effects η^b(z, m) of each cell, and no rows."""
        if not self.n_media and not self.n_latent:
            return sites["batch_effect"], batch
        eta = rows(sites["batch_effect"], batch)
        for name, read in (("batch_media_effect", media), ("batch_state_effect", z)):
            for k, part in enumerate(sites[name].unbind(-3) if name in sites else ()):
                eta = eta + read[..., k, None] * rows(part, batch)
        return eta, None

    def spread(self, sites: dict[str, Tensor]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the variance, over τ², of a batch of a screen never seen and of the mean η̄ of all fitted, which nothing tells of.

        1 and 1/B. Where B batches are nested in screens of n each, the columns between screens are r times as wide: a screen has
        variance τ² (r² − 1) / n of its own, so a new one has 1 + (r² − 1) / n, and the mean r² / B.
        """
        square = sites["batch_screen_ratio"].square() if "batch_screen_ratio" in sites else self.share.new_tensor(1.0)
        n_screens = 1 + int((self.between > 0).sum())
        return 1 + (square - 1) * n_screens / self.n_batches, square / self.n_batches

    def with_new(self, sites: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of η with a batch never seen behind the others.

        η is relative to the average of the fitted batches, so the new one has the variance of a batch of its own and of that average
        (`spread`): τ_g² (1 + 1/B), and the like for what depends on media and state.
        """
        if "batch_scale" not in sites:
            return sites | {"batch_effect": torch.nn.functional.pad(sites["batch_effect"], (0, 0, 0, 1))}
        row = torch.randn_like(self.share) * sites["batch_scale"] * sum(self.spread(sites)) ** 0.5
        longer = {"batch_effect": torch.cat([sites["batch_effect"], self.centred(row)[None]])}
        for name, scale in (("batch_media_effect", "batch_media_scale"), ("batch_state_effect", "batch_state_scale")):
            if name in sites:
                known = sites[name]
                width = sites[scale] if scale == "batch_media_scale" else sites[scale][:, None]
                row = self.centred(torch.randn_like(known[:, 0]) * width) * (1 + 1 / self.n_batches) ** 0.5
                longer[name] = torch.cat([known, row[:, None]], 1)
        return sites | longer

    def design(self, batch: Int[Tensor, " row"], media: Float[Tensor, "row media"]) -> Float[Tensor, "row block"]:
        """Return how a gene's bias, batch coordinates and batch-by-media coordinates add up in cells of these batches and media."""
        own = self.basis[batch]
        parts = [own.new_ones(len(batch), 1), own]
        if self.n_media:
            parts.append((media[:, :, None] * own[:, None]).flatten(1))
        return torch.cat(parts, 1)

    def _log(self, value: float) -> Float[Tensor, ""]:
        """Return the log of a number on the device of the shares."""
        return self.share.new_tensor(value).log()


def _standardised(covariates: Float[Tensor, "batch covariate"], n_batches: int) -> Float[Tensor, "batch covariate"]:
    """Centre covariates over batches and scale them to a standard deviation of 1; refuse what cannot be learnt from."""
    if n_batches < FEWEST_FOR_COVARIATES:
        raise ValueError(
            f"A regression of batch effects on covariates of the batches is learnt across batches only, and {n_batches} are too few: "
            f"at least {FEWEST_FOR_COVARIATES} are needed. Leave the covariates out: η^b itself is estimated for each batch."
        )
    if len(covariates) != n_batches or not torch.isfinite(covariates).all():
        raise ValueError(f"Covariates need one finite row for each of the {n_batches} batches; got {tuple(covariates.shape)}.")
    spread = covariates.std(0)
    if (spread < 1e-12).any():
        raise ValueError("A batch covariate is the same in every batch, so nothing can be learnt from it: leave it out.")
    return (covariates - covariates.mean(0)) / spread
