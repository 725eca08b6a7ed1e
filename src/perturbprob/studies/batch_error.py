"""How far batches push what is learnt from what is true (appendix B.2, eqs 20-22)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from perturbprob.experiment.action import Protocol, Wait
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import check_seed
from perturbprob.inference.draws import GIVEN_CELLS, Sites, check_draws, global_draws, require_likelihood, seeded
from perturbprob.inference.projected import Projected, projected

if TYPE_CHECKING:
    from perturbprob.inference.fit import Fit

CHUNK = 2_000_000
"""How many values of points × conditions × genes are held at once."""


@final
@dataclass(frozen=True, eq=False)
class BatchError:
    """Mean squared errors over genes, in log rate, per posterior draw.

    ``table`` is a Dataset with, over (draw, condition, batch, batch_from): ``pair``, the square of −η^b + η^b′·∇F_L, and its two terms
    alone, ``effect`` (draw, condition, batch) and ``carried`` (draw, condition, batch_from); over (draw, condition): ``bound``, the mean of
    ``pair`` over batches, which is eq 22 as printed; ``tight``, the square of the mean instead; and ``irreducible``, what the average of
    all batches adds to either: the fit knows η − η̄ only, and no layout of these batches removes it.
    """

    table: xr.Dataset

    def total(self, form: str = "tight", level: float = 0.9) -> tuple[float, float, float]:
        """Return ε(x, t), averaged over conditions: mean and central interval over draws, of "tight" or "bound", with ``irreducible``."""
        if form not in ("tight", "bound"):
            raise ValueError(f"Unknown form {form!r} of eq 22. Use 'tight', or 'bound' for eq 22 as printed.")
        draws = (self.table[form] + self.table["irreducible"]).mean("condition")
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return float(draws.mean()), float(low), float(high)

    def report(self) -> str:
        """Say how large it is and which batches and conditions carry it."""
        mean = self.table.mean("draw")
        lines = [
            f"{words}: {np.sqrt(value[0]):.3f} in log rate (90 % interval {np.sqrt(value[1]):.3f} to {np.sqrt(value[2]):.3f})"
            for words, value in (("error that batches leave", self.total()), ("upper bound, eq 22 as printed", self.total("bound")))
        ]
        lines.append(f"  of it no layout of these batches removes {np.sqrt(float(mean['irreducible'].mean())):.3f}")
        measured, started = mean["pair"].mean(("condition", "batch_from")), mean["pair"].mean(("condition", "batch"))
        ranked = (("batches measured in", measured), ("batches started from", started), ("conditions", mean["bound"]))
        for what, values in ranked:
            order = np.argsort(-values.values)[:3]
            named = ", ".join(f"{values[values.dims[0]].values[k]} ({np.sqrt(values.values[k]):.3f})" for k in order)
            lines.append(f"  {what} that carry most: {named}")
        return "\n".join([*lines, "  of this fit alone: compare layouts with plan_batches"])

    def __repr__(self) -> str:
        """Return the report."""
        return self.report()


@torch.no_grad()
def batch_error(fit: "Fit", screen: Screen, *, n_draws: int = 20, n_points: int = 8, seed: int = 0, progress: bool = True) -> BatchError:
    """Return both terms of eq 22 for every condition of a screen and every pair of batches.

    For batches b′ that hold control in baseline media (V_00) and all fitted batches b, at the log rates x of ``n_points`` untouched cells:

        −η^b + η^b′·∇F_L(x^b′, p, m, t, b′ → b),    x^b′ = x + η^b′,

    squared and averaged over genes and points. The directional derivative is a Jacobian-vector product through encoder, transition and
    decoder (`projected`). Eq 22 as printed averages the squares over b and b′, an upper bound of the square of the average (eq 17), which
    stands beside it as ``tight``; its sums run over (n_p + 1)(n_M + 1) conditions, by which number they are divided here, not by n_p n_M.
    The fit identifies η − η̄: η̄ ~ Normal(0, τ²/B) adds −η̄ + η̄·∇F_L, the slope averaged over b′. All is to first order in η.

    It speaks of one fit: how far its batches push what it learnt. It holds no error of estimating η, and τ is learnt in each fit and
    shrinks where batches coincide with conditions, so totals of fits of different layouts cannot be compared: `plan_batches` compares
    layouts, under one law.

    Raises ValueError for a fit of one batch, and for a screen without control in baseline media in any fitted batch.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.node(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> dict(pb.batch_error(fit, screen, n_draws=3, progress=False).table["pair"].sizes)
    {'draw': 3, 'condition': 6, 'batch': 3, 'batch_from': 3}
    """
    require_likelihood(fit, GIVEN_CELLS)
    require_screen(screen)
    check_draws(n_draws)
    check_draws(n_points, "n_points")
    check_seed(seed)
    batches = fit.model.vocabulary.batches[: fit.model.batch_effect.n_batches]
    if len(batches) == 1:
        raise ValueError("The fit has one batch: how far batches differ was never seen, so there is no error to work out.")
    sources = [b for b in batches if b in screen.layout.batches_with_control]
    if not sources:
        raise ValueError("No fitted batch holds control cells in baseline media (V_00 is empty), so there is no x^b' to start from.")
    conditions = [fit.model.vocabulary.protocol(p) for p in screen.conditions]
    uniform = SobolEngine(fit.model.rest_size, scramble=True, seed=seed).draw(n_points).clamp(1e-6, 1 - 1e-6)
    size = max(1, CHUNK // (n_points * len(fit.model.vocabulary.genes)))
    parts = [conditions[k : k + size] for k in range(0, len(conditions), size)]
    found = []
    for k, sites in enumerate(global_draws(fit.model, fit.guide, n_draws, seed, progress="batch error" if progress else None)):
        with seeded(seed, k, 8):
            mean_effect = torch.randn_like(fit.model.log_share) * sites["batch_scale"] * fit.model.batch_effect.spread(sites)[1] ** 0.5
            mean_effect = fit.model.batch_effect.centred(mean_effect)
            each = [
                _errors(fit, sites, part, batches, sources, fit.model.rest_points(uniform.to(mean_effect)), mean_effect) for part in parts
            ]
        found.append({name: torch.cat([one[name] for one in each]).cpu().numpy() for name in each[0]})
    return BatchError(_labelled(found, conditions, batches, sources))


def _errors(
    fit: "Fit",
    sites: Sites,
    conditions: list[Protocol],
    batches: tuple[str, ...],
    sources: list[str],
    z0: Float[Tensor, "point latent"],
    mean_effect: Float[Tensor, " gene"],
) -> dict[str, Tensor]:
    """Return the mean squares of one draw and some conditions."""
    model = fit.model
    at_rest = z0[:, None].expand(-1, len(conditions), -1)
    control = projected(fit, [Protocol([Wait(p.time)]) for p in conditions], sites=sites)
    untouched = model.moved(control.sites, at_rest, control.segments)
    x = model.log_shares(control.sites, untouched, control.rows)
    by_state = "batch_state_effect" in sites or "batch_media_effect" in sites
    effects = [_effect(fit, sites, conditions, at_rest, b) for b in batches]
    pair, carried, total, whole = [], [], torch.zeros_like(x), mean_effect.expand_as(x)
    common = torch.zeros_like(x)
    for source in sources:
        code = torch.full((len(conditions),), model.vocabulary.batch_code(source), device=x.device)
        eta = model.batch_effect.at(sites, code, untouched.z, untouched.media).expand_as(x)
        slopes = [_slope(fit, sites, conditions, x + eta, eta, source, b if by_state else None) for b in (batches if by_state else [None])]
        errors = [slopes[k if by_state else 0] - effect for k, effect in enumerate(effects)]
        pair.append(torch.stack([_square(error) for error in errors], -1))
        carried.append(_square(torch.stack(slopes).mean(0)))
        total += torch.stack(errors).mean(0) / len(sources)
        common += (_slope(fit, sites, conditions, x + eta, whole, source, None) - whole) / len(sources)
    irreducible = _square(common)
    both = torch.stack(pair, -1)
    named = {"pair": both, "effect": torch.stack([_square(e) for e in effects], -1), "carried": torch.stack(carried, -1)}
    return named | {"bound": both.mean((-1, -2)), "tight": _square(total), "irreducible": irreducible}


def _effect(fit: "Fit", sites: Sites, conditions: list[Protocol], z0: Tensor, batch: str) -> Float[Tensor, "point condition gene"]:
    """Return η^b in the state that each condition ends in."""
    there: Projected = projected(fit, conditions, sites=sites, batch_to=batch)
    state = fit.model.moved(there.sites, z0, there.segments)
    eta = fit.model.batch_effect.at(sites, there.go, state.z, state.media)
    return eta.expand(*z0.shape[:-1], eta.shape[-1])


def _slope(
    fit: "Fit", sites: Sites, conditions: list[Protocol], x: Tensor, eta: Tensor, source: str | None, target: str | None
) -> Float[Tensor, "point condition gene"]:
    """Return η·∇F_L at x."""
    return projected(fit, conditions, sites=sites, batch_from=source, batch_to=target).slope(x, eta)[1]


def _square(error: Float[Tensor, "point condition gene"]) -> Float[Tensor, " condition"]:
    """Return the mean square over points and genes."""
    return error.square().mean((0, 2))


def _labelled(found: list[dict[str, np.ndarray]], conditions: list[Protocol], batches: tuple[str, ...], sources: list[str]) -> xr.Dataset:
    """Name what was found."""
    dims = {"pair": ("condition", "batch", "batch_from"), "effect": ("condition", "batch"), "carried": ("condition", "batch_from")}
    data = {name: (("draw", *dims.get(name, ("condition",))), np.stack([draw[name] for draw in found])) for name in found[0]}
    return xr.Dataset(data, {"condition": list(map(str, conditions)), "batch": list(batches), "batch_from": sources})
