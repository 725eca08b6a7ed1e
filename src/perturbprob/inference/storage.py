"""save and load: a folder of JSON and tensors, with a format version, and nothing that runs when read."""

import json
import pickle
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perturbprob.experiment.vocabulary import Vocabulary
from perturbprob.inference.depth import DepthLaw
from perturbprob.inference.fit import Fit
from perturbprob.model.assumptions import Bound
from perturbprob.model.condition_effect import Node
from perturbprob.model.filling import fill
from perturbprob.model.guide import Guide

FORMAT = 1
"""The version of the folder's layout; a later package reads every earlier one."""


def save(fit: Fit, path: str | Path) -> None:
    """Write a fit into a folder: ``fit.json`` with all settings and names, ``tensors.pt`` with all parameters."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model = fit.model
    facts = {
        "vocabulary": model.vocabulary.to_json(),
        "nodes": [[list(n.term), n.time] for n in model.condition_effect.nodes],
        "recipe": model.recipe,
        "solver_steps": None if model.transition.solver is None else model.transition.solver.n_steps,
    }
    if not model.recipe:
        raise ValueError(
            "This CellModel was put together by hand, so load could not build it again. Make it with a structure such as pb.node."
        )
    kept = ("losses", "seed", "settings", "trained_on", "versions", "seconds")
    values = {"format": FORMAT, "model": facts, "depth": asdict(fit.depth)} | {name: getattr(fit, name) for name in kept}
    torch.save({"model": model.state_dict(), "guide": fit.guide.state_dict()}, folder / "tensors.pt")
    (folder / "fit.json").write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")


def load(path: str | Path, modules: dict[str, nn.Module] | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote; it predicts what the saved one did, bit for bit.

    ``modules`` gives custom modules by slot, e.g. ``{"field": MyField()}``, for fits that were made with one: only their tensors are
    stored, never code. Raises FileNotFoundError where there is no fit, ValueError for a folder of another version, a damaged file, or one
    that holds anything but tensors.
    """
    folder = Path(path)
    values = _read_json(folder)
    tensors = _read_tensors(folder / "tensors.pt")
    try:
        field = _field(values["model"]["recipe"], modules or {})
        model, guide = _rebuild(values["model"], tensors, field)
        depth = values["depth"]
        means = {key: (mean, n) for key, (mean, n) in depth["means"].items()}
        kept = {name: values[name] for name in ("losses", "seed", "settings", "trained_on", "versions", "seconds")}
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is damaged: tensors.pt does not fit fit.json. Save the fit again. ({error})") from error
    return Fit(model=model, guide=guide, depth=DepthLaw(depth["factors"], means, tuple(depth["residual"]), depth["spread"]), **kept)


def _read_json(folder: Path) -> dict[str, Any]:
    """Read and check fit.json."""
    file = folder / "fit.json"
    if not file.is_file():
        raise FileNotFoundError(f"There is no fit in {folder}: {file.name} is missing. Name the folder that fit.save() wrote.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged or cut off: {error}. Save the fit again.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or "model" not in values:
        found = values.get("format") if isinstance(values, dict) else None
        raise ValueError(f"{folder} has format version {found!r}; this perturbprob reads {FORMAT}. Update perturbprob.")
    return values


def _read_tensors(file: Path) -> dict[str, dict[str, Tensor]]:
    """Read tensors.pt without running anything that it holds."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the fit is incomplete. Save it again.")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is damaged, cut off, or not a file of tensors (a bare pickle is never read). Save the fit again.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds a pickle of something other than tensors, which is not read since it could run code.") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged or cut off: {error}. Save the fit again.") from error


def _field(recipe: dict[str, Any], modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the custom field that a fit asks for."""
    wanted = recipe["field"]
    if wanted is None and modules:
        raise ValueError(f"This fit has no custom module; modules= names {', '.join(modules)}.")
    if wanted is not None and "field" not in modules:
        raise ValueError(
            f"This fit was made with a field of your own, {wanted}: pass load(path, modules={{'field': {wanted.split('.')[-1]}(...)}})."
        )
    return modules.get("field")


def _rebuild(facts: dict[str, Any], tensors: dict[str, dict[str, Tensor]], field: nn.Module | None) -> tuple[Any, Guide]:
    """Build model and guide from their recipe and fill in the tensors."""
    state = tensors["model"]
    parts = {
        "vocabulary": Vocabulary.from_json(facts["vocabulary"]),
        "nodes": [Node(tuple(term), time) for term, time in facts["nodes"]],
        "log_share": state["log_share"],
        "log_depth": float(state["log_depth"]),
        "start": state.get("start"),
        "groups": facts["recipe"].get("groups"),
        "penetrance": facts["recipe"].get("penetrance"),
        "adapted": facts["recipe"].get("adapted", 0),
        "assays": facts["recipe"].get("assays", {}),
        "levels": {name: state[f"assays.{name}.level"] for name in facts["recipe"].get("assays", {})},
        "assumptions": [Bound.from_json(values) for values in facts["recipe"].get("assumptions", [])],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a screen of one batch means was said when the model was made
        model = fill(facts["recipe"]["structure"], parts, facts["recipe"]["arguments"], field)
    guide = Guide(model, tensors["guide"]["node_design"], encodes=any(name.startswith("encoder.") for name in tensors["guide"]))
    model.load_state_dict(state)
    guide.load_state_dict(tensors["guide"])
    if model.transition.solver is not None:
        model.transition.solver.n_steps = facts["solver_steps"]
    for module in (model, guide):
        module.eval().requires_grad_(False)
    return model, guide
