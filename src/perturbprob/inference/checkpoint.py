"""What a training writes after each epoch, so that one that was killed goes on from there."""

import json
import os
import pickle
import time
import zipfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from perturbprob.experiment.screen import Screen
from perturbprob.model.cell_model import CellModel

if TYPE_CHECKING:
    from perturbprob.inference.fit import _Training

FORMAT = 2
"""The version of the file's layout."""
WHAT = ("model", "screen", "settings")


def about(model: CellModel, screen: Screen, settings: dict[str, Any]) -> dict[str, str]:
    """Return marks by which a training is known again: of the model all but its numbers, of the screen names, codes, depths and counts."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    names: list[Iterable[Any]] = [screen.cells, screen.genes, list(map(repr, screen.conditions)), screen.batches]
    known = [model.vocabulary.to_json(), model.recipe, shapes]
    screen_mark = sha256("\n".join("\t".join(map(str, part)) for part in names).encode())
    for codes in (screen.condition, screen.batch, screen.size_factor.astype("float32")):
        screen_mark.update(codes.tobytes())
    # sums over cells, each with a weight of its own: the same from memory and from disk, and other if two counts change places
    weight = 1.0 + np.arange(screen.n_cells) * 7919 % 10007
    screen_mark.update(np.asarray(weight @ screen.counts, np.float64).tobytes())
    return {
        "model": sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest(),
        "screen": screen_mark.hexdigest(),
        "settings": json.dumps(settings, sort_keys=True),
    }


@final
class Checkpoint:
    """The file of a training. It holds tensors, numbers and text, nothing that runs when read; without a path it keeps nothing."""

    def __init__(self, path: str | Path | None, marks: dict[str, str]) -> None:
        """Name the file, and the training that it belongs to."""
        self.path, self.marks = None if path is None else Path(path), marks

    def resume(self, training: "_Training", optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> bool:
        """Put a training where the file left it, if there is one; say whether it had come to its end."""
        kept = None if self.path is None else training.processes.first(self._read)
        if kept is None:
            return False
        training.elbo.load_state_dict(kept["elbo"])
        optimiser.load_state_dict(kept["optimiser"])
        schedule.load_state_dict(kept["schedule"])
        for name in ("losses", "best", "best_epoch", "step"):
            setattr(training, name, kept[name])
        training.start -= kept["seconds"]
        if training.model.transition.solver is not None:
            training.model.transition.solver.n_steps, training.model.transition.solver.n_solves = kept["solver"]
        _set_random(kept["random"], training)
        return bool(kept["ended"])

    def keep(
        self, training: "_Training", optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, *, ended: bool
    ) -> None:
        """Write where a training stands."""
        if self.path is None:
            return
        solver, random = training.model.transition.solver, training.processes.gathered(_random(training))
        kept = {name: getattr(training, name) for name in ("losses", "best", "best_epoch", "step")}
        kept |= {"elbo": training.elbo.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
        kept |= {"seconds": time.perf_counter() - training.start, "solver": solver and (solver.n_steps, solver.n_solves)}
        kept |= {"format": FORMAT, "marks": self.marks, "random": random, "ended": ended}
        training.processes.first(lambda: self._write(kept))

    def _read(self) -> dict[str, Any] | None:
        """Read the file, if there is one, and refuse that of another training."""
        path = self.path
        if path is None or not path.exists():
            self._find_room()
            return None
        if path.is_dir():
            raise ValueError(f"checkpoint={str(path)!r} is a folder. Name a file in it, such as {path / 'fit.pt'}.")
        none = f"{path} is no checkpoint of this version of perturbprob, or is damaged. Name another file in checkpoint=."
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch does not look
            kept = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise ValueError(none) from error
        if not isinstance(kept, dict) or kept.get("format") != FORMAT:
            raise ValueError(none)
        if other := [name for name in WHAT if kept["marks"][name] != self.marks[name]]:
            raise ValueError(
                f"{path} belongs to another training: not the same {' and '.join(other)}{self._settings(kept['marks'])}. Name another file "
                "in checkpoint=, or delete this one to start afresh."
            )
        return kept

    def _find_room(self) -> None:
        """Make the folder of the file; refuse, before any work is done, where none can be written."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self._beside()
            beside.touch()
            beside.unlink()
        except OSError as error:
            raise ValueError(f"checkpoint={str(self.path)!r} cannot be written: {error.strerror}. Name another file.") from error

    def _beside(self) -> Path:
        """Return where the file is written before it takes its place."""
        assert self.path is not None
        return self.path.with_name(f".{self.path.name}.part")

    def _settings(self, marks: dict[str, str]) -> str:
        """Say which settings differ."""
        there, here = json.loads(marks["settings"]), json.loads(self.marks["settings"])
        other = [f"{name}={there.get(name)!r} there, {value!r} here" for name, value in here.items() if there.get(name) != value]
        return f" ({'; '.join(other)})" if other else ""

    def _write(self, kept: dict[str, Any]) -> None:
        """Write beside the file, and put it in its place when all is on disk: whoever is killed leaves the old one, or the new."""
        assert self.path is not None
        beside = self._beside()
        try:
            with beside.open("wb") as file:
                torch.save(kept, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)


def _random(training: "_Training") -> list[torch.Tensor]:
    """Return where the random numbers of this process stand."""
    device = training.model.log_share.device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random(states: list[list[torch.Tensor]], training: "_Training") -> None:
    """Go on with the random numbers of the process of this rank; one that is new draws others than all before."""
    if training.processes.rank >= len(states):
        training.processes.part_ways(training.seed + len(training.losses["train"]) * 1000)
        return
    own, device = states[training.processes.rank], training.model.log_share.device
    torch.set_rng_state(own[0])
    if device.type == "cuda" and len(own) > 1:
        torch.cuda.set_rng_state(own[1], device)
