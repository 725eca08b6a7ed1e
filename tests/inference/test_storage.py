"""Saving and loading: bit-identical, versioned, and nothing that runs."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import perturbprob as pb


@pytest.fixture
def saved(fit: pb.Fit, tmp_path: Path) -> Path:
    """A saved fit."""
    fit.save(tmp_path / "node")
    return tmp_path / "node"


def test_a_loaded_fit_predicts_bit_identically(fit: pb.Fit, screen: pb.Screen, saved: Path) -> None:
    again = pb.load(saved)
    for kind in (
        {"scale": "log1p", "batch": "batch1"},
        {"scale": "rate", "batch": "average"},
        {"scale": "counts", "interval": "observed", "n_cells": 50, "batch": "new"},
    ):
        assert pb.predict(fit, n_draws=3, **kind).identical(pb.predict(again, n_draws=3, **kind))
    assert pb.effects(fit, n_draws=3).identical(pb.effects(again, n_draws=3))
    assert pb.log_density(fit, screen[:50], 3, n_draws=2).identical(pb.log_density(again, screen[:50], 3, n_draws=2))
    assert (again.losses, again.seed, again.settings, again.versions) == (fit.losses, fit.seed, fit.settings, fit.versions)
    assert again.trained_on == fit.trained_on
    assert again.report() == fit.report()


def test_the_folder_holds_json_and_tensors_only(saved: Path) -> None:
    assert sorted(f.name for f in saved.iterdir()) == ["fit.json", "tensors.pt"]
    assert json.loads((saved / "fit.json").read_text())["format"] == 1
    assert all(isinstance(v, Tensor) for part in torch.load(saved / "tensors.pt", weights_only=True).values() for v in part.values())


class Field(nn.Module):
    """A field of the user's own."""

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.line = nn.Linear(n_latent, n_latent)

    def forward(self, z: Tensor, perturbation: Tensor, media: Tensor, clock: Tensor) -> Tensor:
        return torch.tanh(self.line(z + perturbation + media))


def test_a_custom_field_is_asked_for_and_filled(screen: pb.Screen, tmp_path: Path) -> None:
    fit = pb.fit(pb.node(screen, 2, field=Field(2)), screen, epochs=1, progress=False)
    fit.save(tmp_path)
    with pytest.raises(ValueError, match=r"field of your own, .*Field: pass load"):
        pb.load(tmp_path)
    again = pb.load(tmp_path, modules={"field": Field(2)})
    condition = screen.conditions[-1]
    assert pb.predict(fit, condition, n_draws=2, batch="average").identical(pb.predict(again, condition, n_draws=2, batch="average"))


def test_a_module_too_many_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="no custom module"):
        pb.load(saved, modules={"field": Field(3)})


def test_no_fit_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no fit in .*fit.json is missing"):
        pb.load(tmp_path / "nothing")


def test_unknown_version(saved: Path) -> None:
    values = json.loads((saved / "fit.json").read_text())
    (saved / "fit.json").write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(ValueError, match=r"format version 99; this perturbprob reads 1\. Update"):
        pb.load(saved)


@pytest.mark.parametrize(("name", "keep"), [("fit.json", 0.5), ("tensors.pt", 0.5), ("tensors.pt", 0.98)])
def test_truncated_file(saved: Path, name: str, keep: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="damaged"):
        pb.load(saved)


def test_missing_tensors(saved: Path) -> None:
    (saved / "tensors.pt").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        pb.load(saved)


class Bomb:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was run",))


def test_a_bare_pickle_is_not_read(saved: Path) -> None:
    (saved / "tensors.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="a bare pickle is never read"):
        pb.load(saved)


def test_a_pickle_inside_is_not_run(saved: Path) -> None:
    torch.save({"model": Bomb()}, saved / "tensors.pt")
    with pytest.raises(ValueError, match="holds a pickle of something other than tensors"):
        pb.load(saved)


def test_tensors_of_another_fit(saved: Path) -> None:
    torch.save({"model": {}, "guide": {}}, saved / "tensors.pt")
    with pytest.raises(ValueError, match=r"does not fit fit\.json"):
        pb.load(saved)


@pytest.mark.parametrize("name", ["depth", "trained_on"])
def test_a_folder_that_lacks_a_part_is_damaged(saved: Path, name: str) -> None:
    values = json.loads((saved / "fit.json").read_text())
    del values[name]
    (saved / "fit.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is damaged"):
        pb.load(saved)


def test_a_list_is_no_fit(saved: Path) -> None:
    (saved / "fit.json").write_text("[]")
    with pytest.raises(ValueError, match="format version None"):
        pb.load(saved)


@pytest.mark.usefixtures("unchecked")
def test_an_anndata_is_no_screen(simulation: object, fit: pb.Fit) -> None:
    for ask in (
        lambda a: pb.node(a),
        lambda a: pb.fit(fit.model, a),
        lambda a: pb.log_density(fit, a),
        lambda a: pb.predictive_check(fit, a),
    ):
        with pytest.raises(TypeError, match=r"A Screen is needed here; got AnnData\. Read an AnnData with"):
            ask(simulation.adata)
