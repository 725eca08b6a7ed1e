"""The demonstration: a fit of the embedded screen, how good it is, and the files that it leaves."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from perturbprob import plots
from perturbprob.experiment import datasets
from perturbprob.experiment.screen import Screen
from perturbprob.inference import Fit, effects, fit, log_density, posterior
from perturbprob.model import node
from perturbprob.studies import baselines, predictive_check
from perturbprob.studies.predictive_check import PredictiveCheck

if TYPE_CHECKING:
    import xarray as xr

Say = Callable[[str], object]


@final
@dataclass(frozen=True)
class Effort:
    """How much work the demonstration does; ``every`` n-th cell is used."""

    epochs: int = 160
    warmup: int = 30
    particles: int = 100
    draws: int = 200
    replicates: int = 20
    every: int = 1


QUICK = Effort(epochs=3, warmup=1, particles=5, draws=10, replicates=2, every=5)
"""Enough to see that everything runs, and not what the model can do."""


def demo(out: Path, effort: Effort | None = None, *, seed: int = 0, say: Say = print, progress: bool = False) -> dict[str, Any]:
    """Fit the embedded screen, judge the fit on cells that it never saw, and write posterior, report, figures and fit into a folder.

    Lines of text go to ``say`` as the work proceeds. Returns the numbers: cells, genes, elbo_first and elbo_last (of validation
    cells), heldout_logp, baseline_condition_nb and baseline_nb (log density per held-out cell and gene, in nats), zero_observed,
    zero_replicated, seconds, and the names of the files.
    """
    start, effort = time.perf_counter(), effort or Effort()
    screen, train, test = held_out(effort.every)
    out.mkdir(parents=True, exist_ok=True)
    say(f"{screen!r}\n\nLayout\n{_indented(screen.layout.report())}\n")
    fitted = fit(node(train, n_latent=10), train, epochs=effort.epochs, warmup=effort.warmup, seed=seed, progress=progress)
    facts: dict[str, Any] = (
        {"cells": screen.n_cells, "genes": screen.n_genes}
        | _elbo(fitted, say)
        | _densities(fitted, train, test, effort, say, progress=progress)
    )
    check = predictive_check(fitted, screen, n_draws=effort.replicates, seed=seed, progress=progress)
    facts |= _zeros(check, say)
    hits = effects(fitted, n_draws=effort.draws, seed=seed, progress=progress)
    say(f"Perturbations that do something: {', '.join(hits.tested_perturbation.values[hits.hit.values]) or 'none'}.\n")
    files = _write(out, fitted, check, hits, n_draws=effort.draws)
    facts |= {"seconds": round(time.perf_counter() - start, 1), "files": files}
    say(f"Wrote, after {facts['seconds']:.0f} s:\n{_indented(chr(10).join(files))}")
    return facts


def held_out(every: int = 1) -> tuple[Screen, Screen, Screen]:
    """Return the embedded screen, its cells for fitting, and the tenth of its cells that no part of a fit sees.

    >>> [part.n_cells for part in held_out()]
    [14945, 13403, 1542]
    """
    screen = datasets.ishikawa2023()
    held = np.random.default_rng(0).random(screen.n_cells) < 0.1
    chosen = np.arange(screen.n_cells) % every == 0
    return screen[chosen], screen[chosen & ~held], screen[chosen & held]


def elbo(fitted: Fit) -> tuple[float, float]:
    """Return the ELBO per cell and gene after the first epoch and at the epoch that was kept, of validation cells where there are any."""
    losses = fitted.losses["validation"] or fitted.losses["train"]
    return -losses[0], -losses[fitted.settings["best_epoch"]]


def _elbo(fitted: Fit, say: Say) -> dict[str, float]:
    """Say how the training went."""
    first, last = elbo(fitted)
    say(f"{fitted.report()}\nELBO per cell and gene, validation cells: {first:.4f} after the first epoch, {last:.4f} in the end.\n")
    return {"elbo_first": first, "elbo_last": last}


def _densities(fitted: Fit, train: Screen, test: Screen, effort: Effort, say: Say, *, progress: bool) -> dict[str, float]:
    """Say how probable the held-out cells are, beside the baselines."""
    density = {
        "heldout_logp": log_density(fitted, test, effort.particles, seed=fitted.seed, progress=progress),
        "baseline_condition_nb": baselines.condition_negative_binomial(train, test),
        "baseline_nb": baselines.negative_binomial(train, test),
    }
    values = {name: float(value.mean()) / test.n_genes for name, value in density.items()}
    say(
        f"Log predictive density per cell and gene of {test.n_cells:,} held-out cells, which the fit never saw:\n"
        f"  this fit                             {values['heldout_logp']:.4f}\n"
        f"  one negative binomial per condition  {values['baseline_condition_nb']:.4f}\n"
        f"  one negative binomial for all        {values['baseline_nb']:.4f}\n"
    )
    return values


def _zeros(check: PredictiveCheck, say: Say) -> dict[str, float]:
    """Say how the replicated screens compare with the data."""
    part = check.gene.sel(statistic="zero_fraction")
    values = {"zero_observed": float(part.observed.mean()), "zero_replicated": float(part.replicated.mean())}
    say(f"{check.summary()}\nZero fraction: observed {values['zero_observed']:.4f}, replicated {values['zero_replicated']:.4f}.\n")
    return values


def _write(out: Path, fitted: Fit, check: PredictiveCheck, hits: "xr.Dataset", *, n_draws: int) -> list[str]:
    """Write everything that is worth keeping; return the names of the files."""
    from perturbprob.report import write_report

    posterior(fitted, n_draws, seed=fitted.seed).to_netcdf(str(out / "posterior.nc"))
    write_report(fitted, out / "report.html", check=check, hits=hits)
    figures = {"losses": plots.losses(fitted), "predictive_check": plots.predictive_check(check), "effects": plots.effects(hits)}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    fitted.save(out / "fit")
    names = ["posterior.nc", "report.html", *(f"{name}.png" for name in figures), "fit/fit.json", "fit/tensors.pt"]
    return [str(out / name) for name in names]


def _indented(text: str) -> str:
    """Return text with each line indented."""
    return "\n".join(f"  {line}" for line in text.splitlines())
