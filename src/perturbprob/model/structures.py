"""Structures: named fillings of `CellModel`'s slots."""

import math
from collections.abc import Iterable, Sequence

import pandas as pd
from torch import nn

from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.settings import is_within
from perturbprob.model.assumptions import Assumption, UneditedStable
from perturbprob.model.cell_model import CellModel
from perturbprob.model.filling import SHIFTS, make

MOST_GENES = 1000
"""The most genes of a causal context: each may regulate each."""
MOST_AT_REST = 400
"""The most genes of a stationary diffusion, whose simulated way takes 24 numbers for each gene."""


def node(
    screen: Screen,
    n_latent: int | None = None,
    *,
    assumptions: Sequence[Assumption] = (),
    measurement: str | None = None,
    batch_effect: str | pd.DataFrame = "constant",
    n_hidden: int = 128,
    field: nn.Module | None = None,
    solver: str = "rk4",
    penetrance: bool | str = False,
    memory: float | None = None,
    seed: int = 0,
) -> CellModel:
    """The default structure: a neural ODE on (z₀, δ), counts, and zero-sum batch effects.

    ``n_latent`` is the size of the latent state (default 10) and ``n_hidden`` the width of decoder and encoder; ``measurement`` is one of
    "zero_inflated_negative_binomial" (default), "negative_binomial", "poisson". ``assumptions`` are objects such as
    `SteadyState`; each adds its term to the fit. ``batch_effect`` is "constant" (default), a batch effect for each batch and gene;
    "state", which also lets it depend on the media and the latent state (a drug that acts otherwise in each patient); or a table of
    covariates of the batches, one row for each, on which the batch effects are regressed (see `BatchEffect`). ``field`` is any module
    ``field(z, perturbation, media, clock)`` that returns the push (see `NeuralODE`); ``solver`` "rk4" or a method of torchdiffeq;
    ``seed`` starts the networks. The screen gives names and the share of each gene in all counts; nothing of it is kept.

    Raises ValueError where batches share no condition, not even control, unless `ExchangeableBatches` is among the assumptions.

    ``penetrance=True`` lets edited cells escape: each perturbation hits a cell with a probability π of its own, in the posterior as
    ``penetrance``; "sgrna" gives every sgRNA its own (see `Penetrance`, `hit_probability`). A cell has at most 4 edited genes then, or with
    "sgrna" one, and values are counts.

    ``memory`` is how long what a condition does to single genes lasts, in median waits of the screen: a time t later an effect is expected
    to be e^(−t / memory) of what it was. None learns it, and tends to find it too short for predictions of later times
    (`ConditionEffect`); ``memory=5`` lets effects last.

    Where the screen has further `assays`, each gets a head over the same state (`ProteinHead`, `WindowHead`, `OpenWindowHead`).

    A screen of continuous values is modelled in gene space: the state is the values, the start the mean of control at its first
    time, in baseline media where there is one, and there is no decoder. ``measurement`` is then "normal" (known standard errors
    and learnt noise, the default) or "known_noise".
    """
    return make(
        screen,
        "node",
        {"solver": solver, "memory": memory},
        n_latent=n_latent,
        assumptions=assumptions,
        measurement=measurement,
        batch_effect=batch_effect,
        n_hidden=n_hidden,
        field=field,
        penetrance=penetrance,
        seed=seed,
    )


def vae(
    screen: Screen,
    n_latent: int | None = None,
    *,
    shift: str | nn.Module = "additive",
    assumptions: Sequence[Assumption] = (),
    measurement: str | None = None,
    batch_effect: str | pd.DataFrame = "constant",
    n_hidden: int = 128,
    penetrance: bool | str = False,
    memory: float | None = None,
    seed: int = 0,
) -> CellModel:
    """A variational autoencoder in the same frame: a function L(z, p, m, t) in place of waiting (eqs 26-28, D.1).

    L(z₀, p, m, t) = z₀ + (1 − e^(−κ t)) ⊙ shift. ``shift`` is "additive", the sum of an effect for each perturbation and media and of a
    drift that all cells share; "network", a network of these, the state and the time; "sparse", additive with a gate for each perturbation
    and latent axis (a relaxed spike and slab), whose posterior ``perturbation_gate`` says which axes a perturbation acts on; "identity",
    L(z) = z, which maps each cell onto itself and knows no effect but those on single genes; or a module ``shift(z, perturbation, media,
    clock)``. L has no semigroup law: it reads what was done and how long ago it began, not when (see `LatentShift`), so assumptions about
    waiting on, such as `SteadyState`, are refused. The other arguments are those of `node`, and so is everything but the waiting.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.vae(screen, n_latent=2, shift="sparse"), screen, epochs=2, progress=False)
    >>> dict(pb.posterior(fit, 5).posterior["perturbation_gate"].sizes)
    {'chain': 1, 'draw': 5, 'perturbation': 2, 'latent': 2}
    """
    if not isinstance(shift, nn.Module) and shift not in SHIFTS:
        raise ValueError(f"Unknown shift {shift!r}. Use one of {', '.join(map(repr, SHIFTS))}, or a module.")
    custom = shift if isinstance(shift, nn.Module) else None
    return make(
        screen,
        "vae",
        {"shift": "custom" if custom is not None else shift, "memory": memory},
        n_latent=n_latent,
        assumptions=assumptions,
        measurement=measurement,
        batch_effect=batch_effect,
        n_hidden=n_hidden,
        field=custom,
        penetrance=penetrance,
        seed=seed,
    )


def neural_sde(
    screen: Screen,
    n_latent: int | None = None,
    *,
    n_steps: int = 8,
    assumptions: Sequence[Assumption] = (),
    measurement: str | None = None,
    batch_effect: str | pd.DataFrame = "constant",
    n_hidden: int = 128,
    field: nn.Module | None = None,
    penetrance: bool | str = False,
    memory: float | None = None,
    seed: int = 0,
) -> CellModel:
    """A neural SDE for systems that differentiate: the push and decay of `node`, and noise on the way (C.1; `NeuralSDE`).

    Cells alike at rest may then end in different branches; `branch_shares` says how many of each condition do. Each wait takes ``n_steps``
    steps; their noise is part of the rest state that the encoder finds for a cell, ``n_steps`` · ``n_latent`` numbers for each wait of the
    longest protocol. The other arguments are those of `node`.

    Raises ValueError for continuous values, which have no cells to differ, and where `UneditedStable` or `SteadyState` is declared: the
    noise moves unedited and settled cells as well.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> pb.fit(pb.neural_sde(screen, n_latent=2, n_steps=4), screen, epochs=2, progress=False).model.transition.noise_shape
    (1, 4, 2)
    """
    require_screen(screen, partial=True)
    if screen.values == "continuous":
        raise ValueError("neural_sde is about how cells differ, and a row of continuous values is a mean of cells: use node.")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps must be a whole number of at least 1, and without noise it is node; got {n_steps!r}.")
    if isinstance(assumptions, Iterable) and any(isinstance(a, UneditedStable) for a in assumptions):
        raise ValueError("UneditedStable says that unedited cells stay as they are, and the noise of neural_sde moves them: leave one out.")
    n_waits = max(len(protocol.segments()) for protocol in screen.conditions)
    return make(
        screen,
        "neural_sde",
        {"n_steps": n_steps, "n_waits": max(1, n_waits), "memory": memory},
        n_latent=n_latent,
        assumptions=assumptions,
        measurement=measurement,
        batch_effect=batch_effect,
        n_hidden=n_hidden,
        field=field,
        penetrance=penetrance,
        seed=seed,
    )


def causal_context(
    screen: Screen,
    n_latent: int | None = None,
    *,
    assumptions: Sequence[Assumption] = (),
    measurement: str | None = None,
    batch_effect: str | pd.DataFrame = "constant",
    n_hidden: int = 128,
    solver: str = "rk4",
    penetrance: bool | str = False,
    seed: int = 0,
) -> CellModel:
    """A sparse signed network over genes with a posterior, each perturbation on its own gene, media and time around it (Figure 8).

    The state is how far the log rate of each gene is from that of the median cell. Each gene is made by the products of others through W
    and decays; a knock-out takes the product of its gene away (its transcript goes on), interference scales it, activation adds to it
    (`CausalContext`, `NetworkEffect`). Cells at rest differ in ``n_latent`` programmes (default 10). The posterior holds ``network``
    (gene, regulator), the signed weights, and ``edge_gate``, how open each edge is. Edges from genes that nothing perturbs rest on
    what other genes did to them, and may be any of several networks. The other arguments are those of `node`.

    Raises ValueError for more than 1,000 genes, and where a perturbed gene is not among them.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, seed=1).screen
    >>> fit = pb.fit(pb.causal_context(screen, n_latent=2), screen, epochs=2, progress=False)
    >>> dict(pb.posterior(fit, 5).posterior["network"].sizes)
    {'chain': 1, 'draw': 5, 'gene': 10, 'regulator': 10}
    """
    require_screen(screen, partial=True)
    _check_genes("causal_context", screen, MOST_GENES)
    return make(
        screen,
        "causal_context",
        {"solver": solver},
        n_latent=n_latent,
        assumptions=assumptions,
        measurement=measurement,
        batch_effect=batch_effect,
        n_hidden=n_hidden,
        field=None,
        penetrance=penetrance,
        seed=seed,
    )


def stationary(screen: Screen, *, edge_scale: float = 0.1, seed: int = 0) -> CellModel:
    """The network of `causal_context` as a stationary diffusion, for cells at rest at the one time of a screen (Lorch et al., 2024).

    dx = (W (f − 1) + context − x) ds + σ ⊙ dB: the state x is log(1 + count / size factor), less its mean in control, in standard
    deviations of each gene among cells of one condition (`StationaryDiffusion`, `Log1p`). `fit` finds the diffusion that leaves the
    cells of each condition as they are, by the kernel deviation from stationarity (`stationarity_deviation`), with weights
    W ~ Laplace(0, ``edge_scale``) at the mode. A weight is how many standard deviations a gene is drawn up per unit of the regulator's
    product (1 in control); a smaller ``edge_scale`` leaves fewer that matter. ``seed`` is kept as elsewhere.

    What it does not have: a law of measuring, so the noise of counting is taken for diffusion (use it where counts are high), and batch
    effects are what a regression of condition means finds; a likelihood, so there are no intervals, no posterior and no `log_density`;
    time, so `predict` gives the law at rest whatever the wait above 0. `predict`, `predictive_check` and `edges` answer.

    Raises ValueError for continuous values, for several times or time 0, without control, with further assays, for more than 400 genes,
    and where a perturbed gene is not among them.

    >>> import perturbprob as pb
    >>> screen = pb.simulate(n_cells=200, n_genes=10, n_perturbations=2, times=(3.0,), seed=1).screen
    >>> fit = pb.fit(pb.stationary(screen), screen, epochs=2, progress=False)
    >>> fit.settings["objective"], pb.edges(fit)["weight"].shape
    ('kds', (10, 10))
    """
    require_screen(screen, partial=True)
    _check_genes("stationary", screen, MOST_AT_REST)
    require_at_rest(screen)
    if not is_within(edge_scale, 0, math.inf):
        raise ValueError(f"edge_scale is how large weights are and must be a finite number above 0; got {edge_scale!r}.")
    n_waits = max(len(protocol.segments()) for protocol in screen.conditions)
    own = {"edge_scale": edge_scale, "n_waits": n_waits, "n_latent": 0, "measurement": "exact"}
    return make(
        screen,
        "stationary",
        own,
        n_latent=None,
        assumptions=(),
        measurement=None,
        batch_effect="constant",
        n_hidden=1,
        field=None,
        penetrance=False,
        seed=seed,
    )


def require_at_rest(screen: Screen) -> None:
    """Refuse a screen that `stationary` cannot be made of, or fitted to."""
    if screen.values == "continuous" or screen.assays:
        raise ValueError("stationary is about counts of RNA in single cells: for continuous values use node; leave other assays out.")
    if len(screen.times) != 1 or screen.times[0] <= 0:
        found = ", ".join(f"{time:g}" for time in screen.times)
        raise ValueError(
            f"stationary takes all cells to be at rest, and this screen has the times {found}: keep the one at which they are "
            "(steady_states says which), or use causal_context, which learns from the way there."
        )
    if screen.conditions[0].perturbations:
        raise ValueError("stationary counts from the mean of control cells, and this screen has none: add them, or name control=.")


def _check_genes(structure: str, screen: Screen, most: int) -> None:
    """Refuse more genes than a structure in gene space takes."""
    if screen.n_genes > most:
        raise ValueError(
            f"{structure} is in gene space, where {screen.n_genes:,} genes would be {screen.n_genes**2:,} edges; it takes at most "
            f"{most:,}. Select genes before reading the screen, the perturbed ones among them: "
            "scanpy.pp.highly_variable_genes, then adata[:, adata.var.highly_variable | adata.var_names.isin(perturbed)]."
        )
