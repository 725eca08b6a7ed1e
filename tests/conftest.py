"""What every test shares: shapes and types checked at run time, and the study data."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import pyro
import pytest
import torch

# Every annotation of the package is checked when a function is called or a doctest runs. An int passes for a float; beartype
# cannot read Self on a method by itself.
CHECKER = """beartype.beartype(conf=beartype.BeartypeConf(
    is_pep484_tower=True, hint_overrides=beartype.FrozenDict({__import__("typing").Self: object})
))"""
ENOUGH = 10
"""How many calls of a function are checked in a test: a training makes thousands, all alike."""
CALLS: Counter[CodeType] = Counter()
checks_all_calls = jaxtyping.jaxtyped


def checks_first_calls(fn: Any = None, *, typechecker: Any = None) -> Any:
    """Decorate as `jaxtyping.jaxtyped` does, and make the checks of a function when it is first called."""
    if fn is None:
        return partial(checks_first_calls, typechecker=typechecker)
    if not isinstance(fn, FunctionType):
        return checks_all_calls(fn, typechecker=typechecker)
    if CALLS[fn.__code__] >= ENOUGH:
        return fn
    checked = None

    @wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable or CALLS[fn.__code__] >= ENOUGH:
            return fn(*args, **kwargs)
        CALLS[fn.__code__] += 1
        checked = checked or checks_all_calls(fn, typechecker=typechecker)
        return checked(*args, **kwargs)

    return called


jaxtyping.jaxtyped = checks_first_calls
jaxtyping.install_import_hook("perturbprob", CHECKER)

# many small operations: a second thread costs more than it brings, and on a busy machine much more; notebooks run in processes of their own
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]


def pytest_collection_finish() -> None:
    """Leave what is there for good out of the search for what can be freed: the libraries are millions of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _afresh() -> None:
    """Count the checked calls of each function from 0, and seed what draws without a seed: a test alone does as it does after others."""
    CALLS.clear()
    pyro.set_rng_seed(0)


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
