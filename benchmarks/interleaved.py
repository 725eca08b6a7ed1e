"""Times of several sides of a comparison, taken in turns in one process."""

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

Step = Callable[[], object]


def interleaved(sides: Mapping[str, Step], repeats: int) -> dict[str, float]:
    """Return the median time of each side in milliseconds, the sides taken in turns, after one round that is not counted.

    A side may time itself, and return seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, step in sides.items():
            start = time.perf_counter()
            own, end = step(), time.perf_counter()
            times[name].append(1e3 * (own if isinstance(own, float) else end - start))
    return {name: median(every[1:]) for name, every in times.items()}


def row(times: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """Return a row of the table: the ratio of the peer's time to ours, and all times."""
    return {"ratio": round(times["peer"] / times["perturbprob"], 2), "ms": {name: round(t, 2) for name, t in times.items()}, **more}


def versions() -> dict[str, str]:
    """Return the versions that the numbers belong to."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("perturbprob", "torch", "pyro-ppl", "torchdiffeq", "numpy", "numba", "scvi-tools", "torchode"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
