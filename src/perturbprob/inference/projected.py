"""𝓕 = V∘F∘V⁻¹: the function from measurement to measurement that a fit has learnt (eqs 11, 12, 17, 18)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float
from torch import Tensor

from perturbprob.experiment.action import Action, Protocol, Wait
from perturbprob.inference.draws import GIVEN_CELLS, Sites, centre, require_likelihood
from perturbprob.inference.predict import known_protocol

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit


@final
class Projected:
    """F_L(x, p, m, t, b′ → b) of several conditions: from the log rate of untouched cells in one batch to that of a condition in another.

    V⁻¹ is the mean of the encoder, given that the cells are control in baseline media and waited as long as the condition; F the
    transition; V the decoder with bias, condition effects and η^b. x is the log share of each gene plus η^b′, shape (point, condition,
    gene), and so is the answer: a log rate at size factor 1 without the depth. Of continuous values V is the identity. Made by `projected`.
    """

    def __init__(self, fit: "Fit", conditions: Sequence[Protocol], sites: Sites, batch_from: str | None, batch_to: str | None) -> None:
        """Encode both ends."""
        self.fit, self.model, effect, names = fit, fit.model, fit.model.condition_effect, fit.model.vocabulary
        device = self.model.log_share.device
        self.segments = [s.to(device) for s in names.encode(conditions)]
        self.origin = [s.to(device) for s in names.encode([Protocol([Wait(p.time)]) for p in conditions])]
        parts = [effect.parts(p, names.time_scale) for p in conditions]
        extra = effect.unknown(parts)
        self.rows, self.sites = effect.rows(parts, extra).to(device), self.model.completed(sites, extra)
        self.come, self.go = (
            torch.full((len(conditions),), -1 if b is None else names.batch_code(b), device=device) for b in (batch_from, batch_to)
        )

    def __call__(self, x: Float[Tensor, "point condition gene"]) -> Float[Tensor, "point condition gene"]:
        """Return what 𝓕 makes of log rates."""
        model = self.model
        state = model.moved(self.sites, self.rest(x), self.segments)
        return model.log_shares(self.sites, state, self.rows) + model.batch_effect.at(self.sites, self.go, state.z, state.media)

    def rest(self, x: Float[Tensor, "point condition gene"]) -> Float[Tensor, "point condition latent"]:
        """V⁻¹: return the rest state of each log rate."""
        if self.model.start is not None:
            return x
        guide = self.fit.guide
        context = guide.context(self.origin, self.come)
        log_counts = torch.log1p(torch.exp(x + self.model.log_depth))
        return guide.encoder(log_counts, context.expand(len(x), -1, -1)).mean

    def slope(
        self, x: Float[Tensor, "point condition gene"], direction: Float[Tensor, "point condition gene"]
    ) -> tuple[Float[Tensor, "point condition gene"], Float[Tensor, "point condition gene"]]:
        """Return 𝓕(x) and η·∇𝓕(x) along a direction, by one Jacobian-vector product; no genes × genes Jacobian is ever made."""
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch compiles its own rules for jvp at first use
            value, slope = torch.func.jvp(self, (x,), (direction,))[:2]
        return value, slope


def projected(
    fit: "Fit",
    conditions: Protocol | Action | Sequence[Protocol | Action],
    *,
    sites: Sites | None = None,
    batch_from: str | None = None,
    batch_to: str | None = None,
) -> Projected:
    """Return the function 𝓕_L that a fit has learnt, for one or more conditions.

    ``sites`` is one draw of the globals (default: the centre of the posterior); ``batch_from`` and ``batch_to`` name fitted batches;
    None is η = 0, the average over batches in log rate (eq 17). Raises ValueError for a fit by ``objective="paths"`` of counts, which
    has no V⁻¹.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> f = pb.projected(fit, screen.conditions[-1], batch_from="batch1", batch_to="batch2")
    >>> f(fit.model.log_share.expand(3, 1, -1)).shape
    torch.Size([3, 1, 10])
    """
    require_likelihood(fit, GIVEN_CELLS)
    if fit.model.start is None and not fit.guide.encodes:
        raise ValueError("A fit with objective='paths' of counts has no V⁻¹ from counts to states. Fit with objective='elbo'.")
    if fit.model.assays:
        raise ValueError("𝓕 is from RNA to RNA, and this fit has seen further assays: fit the RNA alone, node(screen.with_assays({})).")
    several = [conditions] if isinstance(conditions, Protocol | Action) else list(conditions)
    with torch.no_grad():
        sites = centre(fit.model, fit.guide) if sites is None else sites
        return Projected(fit, [known_protocol(fit, p) for p in several], sites, batch_from, batch_to)
