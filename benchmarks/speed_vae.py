"""Rows of `speed.py`: training a variational autoencoder beside scvi-tools (extra ``bench``).

Both have 10 latent dimensions, one hidden layer of 128 on either side, zero-inflated negative binomial counts and minibatches of 512.
A decoder of scvi-tools gives every count a gate of its own, ours one for each gene: that is theirs to choose, and part of what its step
costs. Ours is Bayesian in all global sites, reads the perturbation of each cell, and holds posteriors of its effects.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from interleaved import interleaved, row
from scipy.sparse import csr_array, csr_matrix, vstack

import perturbprob as pb

MINIBATCH, N_LATENT = 512, 10


def simulated(n_cells: int = 20_000, n_genes: int = 5_000, depth: float = 700.0, seed: int = 0) -> anndata.AnnData:
    """Return negative binomial counts of which about 89 % are 0, with four perturbations that act on some genes."""
    random, parts = np.random.default_rng(seed), []
    share = random.gamma(0.5, size=n_genes) + 0.02
    effect = np.where(random.random((5, n_genes)) < 0.05, random.normal(0, 0.5, (5, n_genes)), 0.0)
    effect[0] = 0
    which = random.integers(0, 5, n_cells)
    for cells in np.array_split(np.arange(n_cells), max(1, n_cells // 2000)):
        rate = share * np.exp(effect[which[cells]])
        rate *= depth * random.lognormal(0, 0.3, (len(cells), 1)) / rate.sum(1, keepdims=True)
        parts.append(csr_array(random.poisson(rate * random.gamma(2.0, 0.5, rate.shape)).astype(np.float32)))
    obs = pd.DataFrame({"perturbation": np.array(["control", "G1", "G2", "G3", "G4"])[which]}, index=[f"c{k}" for k in range(n_cells)])
    return anndata.AnnData(csr_array(vstack(parts)), obs=obs, var=pd.DataFrame(index=[f"G{k}" for k in range(n_genes)]))


def screen_of(adata: anndata.AnnData) -> pb.Screen:
    """Read the screen."""
    return pb.Screen.from_anndata(adata, perturbation_type="knockout")


def second_epoch(screen: pb.Screen) -> Callable[[], float]:
    """Return what trains our model for two epochs and says how long the second took."""

    def side() -> float:
        ends: list[float] = []
        model = pb.vae(screen, n_latent=N_LATENT, n_hidden=128, measurement="zero_inflated_negative_binomial")
        told = {"each_epoch": lambda _: ends.append(time.perf_counter()), "validation": 0.0, "progress": False}
        pb.fit(model, screen, epochs=2, minibatch=MINIBATCH, **told)
        return ends[1] - ends[0]

    return side


def peer(adata: anndata.AnnData) -> Any:
    """Return the model of scvi-tools."""
    import scvi

    scvi.settings.verbosity = 40
    own = adata.copy()
    own.X = csr_matrix(own.X)  # it does not know sparse arrays
    scvi.model.SCVI.setup_anndata(own)
    return scvi.model.SCVI(own, n_hidden=128, n_latent=N_LATENT, n_layers=1, gene_likelihood="zinb", dispersion="gene")


def peer_epoch(model: Any) -> Callable[[], float]:
    """Return what trains the peer for two epochs and says how long the second took."""
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):  # type: ignore[misc]
        """Keeps the time at the end of each epoch."""

        def __init__(self) -> None:
            """Start without any."""
            self.ends: list[float] = []

        def on_train_epoch_end(self, *_: Any) -> None:
            """Keep the time."""
            self.ends.append(time.perf_counter())

    def side() -> float:
        clock = Clock()
        train(model, 2, callbacks=[clock])
        return clock.ends[1] - clock.ends[0]

    return side


def train(model: Any, epochs: int, **how: Any) -> None:
    """Train the peer on all cells it was given, as a user would, without what costs time and is not training."""
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    model.train(max_epochs=epochs, train_size=1.0, batch_size=MINIBATCH, **quiet, **how)


def peer_step(model: Any, n_steps: int) -> Callable[[], float]:
    """Return what takes training steps of the peer's module on minibatches that are at hand, and says how long one took."""
    module, loader = model.module, model._make_data_loader(model.adata, batch_size=MINIBATCH)
    batches = [batch for _, batch in zip(range(n_steps), loader, strict=False)]
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)

    def side() -> float:
        module.train()
        start = time.perf_counter()
        for batch in batches:
            optimiser.zero_grad()
            module(batch, loss_kwargs={"kl_weight": 1.0})[2].loss.backward()
            optimiser.step()
        return (time.perf_counter() - start) / len(batches)

    return side


def step_5000(repeats: int) -> dict[str, Any]:
    """Time a step: of ours an epoch over its number of steps, loader and all; of the peer its module's, minibatches at hand."""
    adata = simulated()
    ours, n_steps = second_epoch(screen_of(adata)), -(-adata.n_obs // MINIBATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = interleaved({"perturbprob": lambda: ours() / n_steps, "peer": peer_step(peer(adata), 10)}, repeats)
    return row(times, zeros=round(1 - adata.X.nnz / np.prod(adata.shape), 3))


def epoch_5000(repeats: int) -> dict[str, Any]:
    """Time an epoch on 20,000 × 5,000."""
    adata = simulated()
    return _epochs(screen_of(adata), adata, repeats)


def epoch_ishikawa(repeats: int) -> dict[str, Any]:
    """Time an epoch on the Ishikawa screen."""
    screen = pb.datasets.ishikawa2023()
    return _epochs(screen, _adata(screen), repeats)


def _epochs(screen: pb.Screen, adata: anndata.AnnData, repeats: int) -> dict[str, Any]:
    """Time epochs of both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row(interleaved({"perturbprob": second_epoch(screen), "peer": peer_epoch(peer(adata))}, repeats))


def _adata(screen: pb.Screen) -> anndata.AnnData:
    """Return the counts of a screen as the peer reads them."""
    names = pd.DataFrame(index=list(map(str, screen.cells)))
    return anndata.AnnData(csr_array(screen.counts), obs=names, var=pd.DataFrame(index=list(screen.genes)))


def logp_gain(repeats: int, seconds: float = 30.0) -> dict[str, Any]:
    """Train both on nine tenths of the Ishikawa screen for equally long; compare their log densities of the held-out cells.

    Both are importance-weighted averages over 200 draws of a cell's latent state, per cell and gene. The peer is given the time of cell and
    gene counts that it has in its own data loader, as many epochs as fit into ``seconds``; so are we. One run; ``repeats`` is not used.
    """
    screen = pb.datasets.ishikawa2023()
    held = np.random.default_rng(0).random(screen.n_cells) < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peer(_adata(screen[~held]))
        train(model, 1)
        start = time.perf_counter()
        train(model, 1)
        epochs = max(1, round(seconds / (time.perf_counter() - start)))
        model = peer(_adata(screen[~held]))
        start = time.perf_counter()
        train(model, epochs)
        theirs_took = time.perf_counter() - start
        ours, ours_epochs, ours_took = _in_time(screen[~held], theirs_took)
        theirs = _peer_log_density(model, _adata(screen[held])) / screen.n_genes
        own = float(pb.log_density(ours, screen[held], particles=200, progress=False).mean()) / screen.n_genes
    took = {"perturbprob": round(ours_took, 1), "peer": round(theirs_took, 1)}
    return {"gain": round(own - theirs, 5), "perturbprob": own, "peer": theirs, "seconds": took, "epochs": [ours_epochs, epochs]}


def _in_time(screen: pb.Screen, seconds: float) -> tuple[pb.Fit, int, float]:
    """Fit ours in at most so many seconds: as many epochs as a short trial says."""
    model = pb.vae(screen, n_latent=N_LATENT, measurement="zero_inflated_negative_binomial")
    trial = pb.fit(model, screen, epochs=2, validation=0.0, progress=False)
    epochs = max(2, int(0.9 * seconds / (trial.seconds / 2)))
    fit = pb.fit(model, screen, epochs=epochs, validation=0.0, progress=False)
    return fit, epochs, fit.seconds


def _peer_log_density(model: Any, adata: anndata.AnnData) -> float:
    """Return the peer's mean log density of cells."""
    own = anndata.AnnData(csr_matrix(adata.X), obs=adata.obs, var=adata.var)
    return float(np.mean(np.asarray(model.get_marginal_ll(own, n_mc_samples=200, return_mean=True))))
