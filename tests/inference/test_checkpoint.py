"""A training that was killed goes on as if it had not been."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import perturbprob as pb
from perturbprob.inference.fit import _Training

SETTINGS = {"epochs": 5, "warmup": 2, "minibatch": 40, "progress": False}


@pytest.fixture(scope="module")
def small(screen: pb.Screen) -> pb.Screen:
    """Two hundred cells."""
    return screen[:200]


def model(screen: pb.Screen, n_latent: int = 2) -> pb.CellModel:
    """A model that always starts alike."""
    torch.manual_seed(0)
    return pb.node(screen, n_latent)


def parameters(fit: pb.Fit) -> torch.Tensor:
    """All parameters of a fit in one vector."""
    return torch.cat([p.flatten() for module in (fit.model, fit.guide) for p in module.parameters()])


def interrupted(screen: pb.Screen, path: Path, after: int, **settings: Any) -> None:
    """Train until an error ends the training after so many epochs."""

    def stop(fit: pb.Fit) -> None:
        if len(fit.losses["train"]) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pb.fit(model(screen), screen, checkpoint=path, each_epoch=stop, **(SETTINGS | settings))


@pytest.mark.parametrize("after", [1, 3])
def test_it_goes_on_as_if_it_had_never_stopped(small: pb.Screen, tmp_path: Path, after: int) -> None:
    whole, path = pb.fit(model(small), small, **SETTINGS), tmp_path / "new folder" / "fit.pt"
    interrupted(small, path, after)
    torch.rand(3)
    again = pb.fit(model(small), small, checkpoint=path, **SETTINGS)
    assert again.losses == whole.losses
    assert again.settings == whole.settings
    assert torch.equal(parameters(again), parameters(whole))
    assert [file.name for file in path.parent.iterdir()] == ["fit.pt"]


@pytest.mark.parametrize("objective", ["paths", "elbo"])
def test_so_it_does_on_disk_with_escapes_and_along_paths(screen: pb.Screen, simulation: Any, tmp_path: Path, objective: str) -> None:
    simulation.adata.write_h5ad(tmp_path / "screen.h5ad")
    stored = pb.Screen.from_store(tmp_path / "screen.h5ad", media="media", baseline="rest", time="time", batch="batch")
    settings = SETTINGS | {"objective": objective, "epochs": 3}

    def made() -> pb.CellModel:
        torch.manual_seed(0)
        return pb.vae(stored, 2, penetrance=objective == "elbo")

    whole, begun = pb.fit(made(), stored, **settings), []

    def stop(fit: pb.Fit) -> None:
        begun.append(fit)
        if len(begun) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pb.fit(made(), stored, checkpoint=tmp_path / "fit.pt", each_epoch=stop, **settings)
    again = pb.fit(made(), stored, checkpoint=tmp_path / "fit.pt", **settings)
    assert again.losses == whole.losses
    assert torch.equal(parameters(again), parameters(whole))


def test_a_training_that_ended_is_not_trained_further(small: pb.Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, early = tmp_path / "fit.pt", SETTINGS | {"epochs": 60, "learning_rate": 0.05, "patience": 2}
    whole = pb.fit(model(small), small, checkpoint=path, **early)
    assert len(whole.losses["train"]) < 60
    monkeypatch.setattr(_Training, "_epoch", lambda *_: pytest.fail("trained further"))
    again = pb.fit(model(small), small, checkpoint=path, **early)
    assert (again.losses, again.settings) == (whole.losses, whole.settings)
    assert torch.equal(parameters(again), parameters(whole))
    assert again.seconds > whole.seconds / 2


def test_the_file_does_not_change_the_training(small: pb.Screen, tmp_path: Path) -> None:
    plain, kept = pb.fit(model(small), small, **SETTINGS), pb.fit(model(small), small, checkpoint=tmp_path / "fit.pt", **SETTINGS)
    assert kept.losses == plain.losses
    assert torch.equal(parameters(kept), parameters(plain))


def test_another_training_is_refused_and_the_file_left_alone(small: pb.Screen, tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    interrupted(small, path, 1)
    before = path.read_bytes()
    fewer = small[np.arange(150)]
    deeper = replace(small, size_factor=small.size_factor * np.linspace(0.9, 1.1, small.n_cells))
    swapped = small.counts.copy()
    swapped.data[:2] = swapped.data[1::-1]  # sums of cells stay
    assert swapped.data[0] != swapped.data[1]
    for others, message in [
        ((model(small), replace(small, counts=swapped), SETTINGS), "not the same screen"),
        ((model(small, 3), small, SETTINGS), "not the same model. Name another file in checkpoint="),
        ((model(small), fewer, SETTINGS), "not the same screen"),
        ((model(small), deeper, SETTINGS), "not the same screen"),
        ((model(small), small, SETTINGS | {"epochs": 6}), r"not the same settings \(epochs=5 there, 6 here\)"),
        ((model(small), small, SETTINGS | {"seed": 1}), r"not the same settings \(seed=0 there, 1 here\)"),
    ]:
        with pytest.raises(ValueError, match=f"fit.pt belongs to another training: {message}"):
            pb.fit(others[0], others[1], checkpoint=path, **others[2])
    assert path.read_bytes() == before


class Harmful:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("content", ["text", "cut", "flipped", "other", "harmful"])
def test_what_is_no_checkpoint_is_refused(small: pb.Screen, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fit.pt"
    if content in ("cut", "flipped"):
        interrupted(small, path, 1)
        whole = path.read_bytes()
        middle = len(whole) // 2
        wrong = bytes(byte ^ 255 for byte in whole[middle : middle + 64])
        path.write_bytes(whole[:2000] if content == "cut" else whole[:middle] + wrong + whole[middle + 64 :])
    elif content == "text":
        path.write_text("epoch 3")
    else:
        torch.save({"format": 0} if content == "other" else Harmful(), path)
    with pytest.raises(ValueError, match=r"fit\.pt is no checkpoint of this version of perturbprob, or is damaged\. Name another"):
        pb.fit(model(small), small, checkpoint=path, **SETTINGS)
    assert not (tmp_path / "harmed").exists()


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch, perturbprob as pb
torch.set_num_threads(1)
screen = pb.simulate(n_cells=100, n_genes=8, n_perturbations=2, n_batches=2, seed=1).screen
torch.manual_seed(0)
def kill(fit):
    if len(fit.losses["train"]) == 3 and sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
settings = {"epochs": 4, "warmup": 1, "progress": False, "each_epoch": kill}
print(pb.fit(pb.node(screen, 2), screen, checkpoint=None if sys.argv[1] == "whole" else "fit.pt", **settings).losses)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that can kill a process")
def test_a_process_that_was_killed_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    killed, again, whole = (
        subprocess.run([sys.executable, "-c", KILLED, how], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
        for how in ("killed", "again", "whole")
    )
    assert killed.returncode == -signal.SIGKILL
    assert again.stdout == whole.stdout != ""


def test_a_place_where_no_file_can_be_is_refused_before_any_work(small: pb.Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Training, "_epoch", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, r"is a folder\. Name a file in it"),
        (tmp_path / "file" / "fit.pt", r"cannot be written: .*Name another file"),
    ]:
        with pytest.raises(ValueError, match=message):
            pb.fit(model(small), small, checkpoint=path, **SETTINGS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"checkpoint": 5}, "is the path of a file"),
        ({"checkpoint": ""}, "is the path of a file"),
        ({"each_epoch": 3}, "each_epoch is a function"),
    ],
)
def test_what_is_no_path_and_no_function_is_refused(small: pb.Screen, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pb.fit(model(small), small, **setting, **SETTINGS)


def test_a_checkpoint_from_memory_serves_the_same_screen_on_disk(tmp_path: Path) -> None:
    adata = pb.simulate(n_cells=120, n_genes=8, n_perturbations=2, n_batches=2, seed=1).adata
    adata.write_h5ad(tmp_path / "screen.h5ad")
    how = {"batch": "batch", "time": "time"}
    memory, disk = pb.Screen.from_anndata(adata, **how), pb.Screen.from_store(tmp_path / "screen.h5ad", **how)
    kept = [pb.fit(model(screen), screen, checkpoint=tmp_path / "fit.pt", **SETTINGS) for screen in (memory, disk)]
    assert torch.equal(*map(parameters, kept))
