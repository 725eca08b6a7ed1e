"""What every test shares: shapes and types checked at run time, and the study data."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

# Every annotation of the package is checked when a function is called or a doctest runs. An int passes for a float; beartype
# cannot read Self on a method by itself.
CHECKER = """beartype.beartype(conf=beartype.BeartypeConf(
    is_pep484_tower=True, hint_overrides=beartype.FrozenDict({__import__("typing").Self: object})
))"""
jaxtyping.install_import_hook("perturbprob", CHECKER)

# many small operations: a second thread costs more than it brings, and on a busy machine much more; notebooks run in processes of their own
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Train without the checker, which takes a quarter of the time, in slow tests: others call the same functions."""
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("slow") is not None)
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def _later_epochs_unchecked() -> Iterator[None]:
    """Check annotations in the first two epochs of a training alone: later ones call the same functions."""
    training = importlib.import_module("perturbprob.inference.fit")._Training
    epoch = training._epoch

    def shortened(self: object, *args: object) -> object:
        before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", before or len(self.losses["train"]) > 1)
        try:
            return epoch(self, *args)
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_epoch", shortened)
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Run as users do, without the checker: for tests of the package's own errors about values of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_path() -> Callable[[str], Path]:
    """Find a study's data file by name, or skip: these files are not part of the repository."""
    folder = ROOT / os.environ.get("PERTURBPROB_DATA", "../shared/data")

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"needs {name}: set PERTURBPROB_DATA to the folder that holds it")
        return path

    return find
