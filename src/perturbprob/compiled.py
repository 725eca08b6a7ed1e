"""Compile functions with numba, the first time that they are called: light to import, as numba is not.

The modules that hold such functions are imported by `load` alone. In them annotations are for readers; numba reads the types of the
arguments.
"""

import functools
import os
import sys
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

FAST = frozenset({"contract", "nsz", "arcp"})
"""What may be done to sums and products. Not nnan: what is not a number must come out as such. Not reassoc: log1p would be off near 0."""


def compiled(function: Callable[..., Any], flags: Set[str] = FAST) -> Any:
    """Compile at the first call, and keep the result on disk where a folder can be written: the package's own, or the user's cache."""
    import numba

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it can write to
        return numba.njit(**options)(function)


def part(function: Callable[..., Any]) -> Any:
    """Put a function into those that call it, so that arrays are neither sliced nor handed on."""
    import numba

    return numba.njit(inline="always", error_model="numpy", fastmath=set(FAST))(function)


def is_kept(function: Any) -> bool:
    """Say whether a compiled function is on disk, no older than the file that it stands in."""
    folder, source = function.stats.cache_path, Path(function.py_func.__code__.co_filename)
    if folder is None or not Path(folder).is_dir():
        return False
    kept = Path(folder).glob(f"{source.stem}.{function.__name__}-*.nbc")
    return any(file.stat().st_mtime >= source.stat().st_mtime for file in kept)


@functools.lru_cache(1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; one that was split off from another has none of the other's."""
    return ThreadPoolExecutor(os.cpu_count())


def in_threads(work: Callable[[int], object], n: int) -> None:
    """Do work(0), …, work(n − 1) at the same time, the first in the thread that asks.

    The threads are kept: to make them would take longer than they save.

    >>> done = [0, 0, 0]
    >>> in_threads(lambda k: done.__setitem__(k, k + 1), 3)
    >>> done
    [1, 2, 3]
    """
    others = [_pool(os.getpid()).submit(work, k) for k in range(1, n)]
    work(0)
    for other in others:
        other.result()


@functools.cache
def load(module: str, entry: str, what: str) -> ModuleType | None:
    """Return a module of compiled functions, None where numba cannot be had; say so if ``entry``, which calls them, is yet to be compiled.

    >>> load("perturbprob.no_such_module", "run", "nothing") is None
    True
    """
    try:
        found = import_module(module)
    except ImportError:  # no numba, or none for this numpy
        return None
    if not is_kept(getattr(found, entry)):
        tqdm.write(f"perturbprob compiles {what}, once: about half a minute.", file=sys.stderr)
    return found
