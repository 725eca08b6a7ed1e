"""What test_distributed.py runs in one process and in two: ``python together.py FOLDER N``."""

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import perturbprob as pb
from perturbprob.inference.distributed import Processes, launched
from perturbprob.inference.fit import _Training

SETTINGS = {"objective": "elbo", "distance": "mse", "epochs": 2, "minibatch": 30, "learning_rate": 4e-3, "validation": 0.405}
SETTINGS |= {"patience": 20, "warmup": 1}


class Recorder:
    """An optimiser that keeps gradients and moves nothing."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.steps = module, []

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self) -> None:
        self.steps.append({name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None})


def at_the_means(processes: Processes) -> dict[str, Any]:
    """Go through an epoch without noise, and return its gradients."""
    torch.manual_seed(5)
    found = _Training(pb.node(screen, 2), screen, dict(SETTINGS), 0, processes)
    found.elbo(found.table.unfolded(found.training[:2], len(found.training)))
    recorder, randn, normal_ = Recorder(found.elbo), torch.randn, torch.Tensor.normal_
    torch.randn, torch.Tensor.normal_ = lambda *shape, **options: torch.zeros(*shape, **options), torch.Tensor.zero_
    loss, validation = found._epoch(recorder), found._validation()
    torch.randn, torch.Tensor.normal_ = randn, normal_
    return {"n": processes.n, "steps": recorder.steps, "loss": loss, "validation": validation}


def trained(screen: pb.Screen, epochs: int, **settings: Any) -> dict[str, Any]:
    """Fit, and return losses, parameters, the cells of each step, and where the random numbers stood at the first."""
    steps, backward = [], _Training._backward

    def recorded(self: Any, index: torch.Tensor, counts: Any) -> torch.Tensor:
        steps.append((index.tolist(), torch.get_rng_state()))
        return backward(self, index, counts)

    _Training._backward = recorded
    torch.manual_seed(os.getpid())  # the first process says how a model starts
    fit = pb.fit(pb.node(screen, 2), screen, epochs=epochs, warmup=1, minibatch=30, progress=False, devices=n, **settings)
    _Training._backward = backward
    parameters = torch.cat([p.flatten() for module in (fit.model, fit.guide) for p in module.parameters()])
    return {"losses": fit.losses, "parameters": parameters, "cells": [cells for cells, _ in steps], "random": steps[0][1]}


def stop(fit: pb.Fit) -> None:
    """End the training with an error, after the first epoch is written."""
    if len(fit.losses["train"]) == 2:
        raise ZeroDivisionError("stopped here")


def stopped(path: Path) -> str:
    """Return the error of a training that ends too soon."""
    try:
        trained(screen, 4, checkpoint=path, each_epoch=stop)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def spoilt() -> str:
    """Return the error of a training that meets a value that is no count."""
    counts = screen.counts.copy()
    counts.data[counts.indptr[7]] = 1e38
    try:
        trained(replace(screen, counts=counts), 1, validation=0.0)
    except pb.NonFiniteLoss as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    screen = pb.simulate(n_cells=203, n_genes=8, n_perturbations=2, n_batches=2, seed=1).screen
    stored = pb.Screen.from_store(folder / "screen.h5ad", time="time", batch="batch")
    result = {"means": launched(at_the_means, torch.device("cpu"), devices=n), "memory": trained(screen, 3), "disk": trained(stored, 2)}
    if n > 1:
        result["again"] = trained(screen, 4, checkpoint=folder / "1.pt")
    result["error"] = stopped(folder / f"{n}.pt")
    result["spoilt"] = spoilt()
    torch.save(result, folder / f"result{n}{os.environ.get('LOCAL_RANK', 0)}")
