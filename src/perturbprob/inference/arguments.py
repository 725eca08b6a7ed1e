"""The settings of a training: their defaults, and what is refused."""

import os
import warnings
from numbers import Real

import numpy as np
import torch
from jaxtyping import Bool

from perturbprob.experiment.screen import Screen
from perturbprob.model.cell_model import CellModel


def default_minibatch(screen: Screen, objective: str) -> int:
    """Return a fiftieth of the cells within bounds; where cells of one condition are compared, at least eight for each."""
    size = min(256, max(32, screen.n_cells // 50))
    return max(size, 8 * len(screen.conditions)) if objective == "kds" else size


def check_callers(each_epoch: object, checkpoint: object) -> None:
    """Refuse what cannot be called after an epoch, and what names no file."""
    if each_epoch is not None and not callable(each_epoch):
        raise TypeError(f"each_epoch is a function of the fit as it is after an epoch; got {each_epoch!r}.")
    if checkpoint is not None and (not isinstance(checkpoint, str | os.PathLike) or not str(checkpoint)):
        raise TypeError(f"checkpoint is the path of a file, such as 'fit.pt'; got {checkpoint!r}.")


def unknown_sgrnas(model: CellModel, screen: Screen) -> Bool[np.ndarray, " cell"]:
    """Tell which edited cells have no sgRNA of the model, where each has a π of its own."""
    if not model.sgrnas:
        return np.zeros(screen.n_cells, bool)
    known = set(model.vocabulary.perturbations)  # of others it is said that they are unknown
    edited = np.array([bool(c.perturbations) and known.issuperset(c.perturbations) for c in screen.conditions])[screen.condition]
    return edited & (True if screen.sgrna is None else ~np.isin(screen.sgrna.astype(str), model.sgrnas))


def check_arguments(model: CellModel, screen: Screen, **numbers: float) -> None:
    """Refuse settings that cannot work; say once what a screen of one condition cannot teach."""
    for name, value in numbers.items():
        low, high = {"validation": (0, 0.9), "learning_rate": (1e-8, 1), "warmup": (0, 10**9)}.get(name, (1, 10**9))
        kind, what = (Real, "number") if name in ("validation", "learning_rate") else (int, "whole number")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} must be a {what}; got {value!r}.")
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high:g}; got {value}.")
    if lacking := sorted(set(model.assays) - set(screen.assays)):
        raise ValueError(f"The model has the assay {lacking[0]!r} and the screen has not. Make the model from this screen.")
    unknown = unknown_sgrnas(model, screen)
    if unknown.any():
        known = f"{unknown.sum():,} edited cells of the screen have no sgRNA that the model knows, and it gives each a π of its own"
        raise ValueError(f"{known}. Make the model from this screen (read with sgrna=), or make it with penetrance=True.")
    if model.log_share.dtype != torch.float32:
        raise ValueError(f"A model is trained in single precision; this one is in {model.log_share.dtype}. Take model.float().")
    if screen.n_cells < 2:
        raise ValueError(f"A fit needs at least 2 cells; the screen has {screen.n_cells}.")
    if not model.vocabulary.perturbations and not model.vocabulary.media and len(screen.times) < 2:
        warnings.warn(
            "The screen has one condition: the variation between its cells can be learnt, but no effect of a perturbation, media or time.",
            stacklevel=3,
        )
