"""Structures: named fillings of `CellModel`'s slots."""

from typing import Any

import numpy as np
import torch
from torch import nn

from perturbprob.dynamics.neural_ode import NeuralODE
from perturbprob.dynamics.solve import Solver
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.vocabulary import Vocabulary
from perturbprob.measurement.batch_effect import BatchEffect
from perturbprob.measurement.counts import CountHead, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from perturbprob.measurement.decoder import Decoder
from perturbprob.model.cell_model import CellModel
from perturbprob.model.condition_effect import ConditionEffect, nodes

HEADS: dict[str, type[CountHead]] = {
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
    "negative_binomial": NegativeBinomial,
    "poisson": Poisson,
}


def node(
    screen: Screen,
    n_latent: int = 10,
    *,
    measurement: str = "zero_inflated_negative_binomial",
    n_hidden: int = 128,
    field: nn.Module | None = None,
    solver: str = "rk4",
    seed: int = 0,
) -> CellModel:
    """The default structure: a neural ODE on (z₀, δ), counts, and zero-sum batch effects.

    ``n_latent`` is the size of the latent state and ``n_hidden`` the width of decoder and encoder; ``measurement`` is one of
    "zero_inflated_negative_binomial", "negative_binomial", "poisson"; ``field`` any module ``field(z, perturbation, media, clock)``
    that returns the push (see `NeuralODE`); ``solver`` "rk4" or a method of torchdiffeq; ``seed`` starts the networks. The screen
    gives names and the
    share of each gene in all counts; nothing of it is kept.
    """
    require_screen(screen)
    for name, value in (("n_latent", n_latent), ("n_hidden", n_hidden)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a number of dimensions and must be a whole number of at least 1; got {value!r}.")
    if measurement not in HEADS:
        raise ValueError(f"Unknown measurement {measurement!r}. Use one of {', '.join(map(repr, HEADS))}.")
    totals = np.asarray(screen.counts.sum(0)).ravel() + 0.5
    vocabulary = Vocabulary.of(screen)
    facts = {
        "vocabulary": vocabulary,
        "nodes": sorted({node for p in screen.conditions for node in nodes(p, vocabulary.time_scale)}),
        "log_share": torch.as_tensor(np.log(totals / totals.sum()), dtype=torch.float32),
        "log_depth": float(np.log(screen.depth)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fill(facts, {"n_latent": n_latent, "measurement": measurement, "n_hidden": n_hidden, "solver": solver}, field)


def fill(facts: dict[str, Any], arguments: dict[str, Any], field: nn.Module | None = None) -> CellModel:
    """Fill the slots from the facts of a screen and the arguments of `node`."""
    vocabulary, n_latent, n_hidden = facts["vocabulary"], arguments["n_latent"], arguments["n_hidden"]
    n_genes = len(vocabulary.genes)
    return CellModel(
        vocabulary,
        NeuralODE(n_latent, field=field, solver=Solver(arguments["solver"])),
        Decoder(n_latent, n_genes, n_hidden=n_hidden),
        HEADS[arguments["measurement"]](n_genes),
        BatchEffect(len(vocabulary.batches), facts["log_share"].exp()),
        ConditionEffect(facts["nodes"], n_genes),
        n_latent=n_latent,
        n_hidden=n_hidden,
        log_share=facts["log_share"],
        log_depth=facts["log_depth"],
        recipe={"structure": "node", "arguments": arguments, "field": None if field is None else type(field).__qualname__},
    )
