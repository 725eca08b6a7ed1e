"""How fast the package is beside what a user would else take, as ratios within one process.

    python benchmarks/speed.py --json
    python benchmarks/speed.py --rows zinb_5000 --threads 1 --repeats 11

Each row runs both sides in turns on the same numbers, ``repeats`` times after one round that is not counted (compilation), and gives the
median of each in milliseconds and the ratio of the medians, for each number of threads.

``zinb_5000`` and ``zinb_103``: value and gradient of the zero-inflated negative binomial, 512 cells × 5,000 genes with 92 % zeros and × 103
with 31 %, from logits to the sum over cells and back to logits, θ and π; beside `log_zinb_positive` of scvi-tools after a softmax and the
size factor. Without scvi-tools (extra ``bench``) its published formula stands in for it, which ``peer`` says.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from perturbprob.measurement import CountLaw, Rate

Step = Callable[[], object]
N_CELLS = 512


def interleaved(sides: dict[str, Step], repeats: int) -> dict[str, float]:
    """Return the median time of each side in milliseconds, the sides taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(every[1:]) for name, every in times.items()}


def published_log_zinb(x: Tensor, mean: Tensor, theta: Tensor, logit: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the log density of each count by the formula of scvi-tools, term for term."""
    softplus_logit, log_theta = softplus(-logit), torch.log(theta + eps)
    log_both = torch.log(theta + mean + eps)
    closed = -logit + theta * (log_theta - log_both)
    zero = (x < eps).float() * (softplus(closed) - softplus_logit)
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return zero + (x > eps).float() * (-softplus_logit + closed + x * (torch.log(mean + eps) - log_both) + gammas)


def peer() -> tuple[str, Callable[..., Tensor]]:
    """Return the log density of scvi-tools and its name, or its formula where it cannot be imported."""
    try:
        from scvi.distributions._negative_binomial import log_zinb_positive
    except ImportError:
        return "formula of scvi-tools, which is not installed", published_log_zinb
    return f"scvi-tools {version('scvi-tools')}", log_zinb_positive


def zinb(n_genes: int, zeros: float, repeats: int) -> dict[str, Any]:
    """Time value and gradient of the zero-inflated negative binomial."""
    random = torch.Generator().manual_seed(0)
    empty = torch.rand(N_CELLS, n_genes, generator=random) < zeros
    counts = torch.where(empty, 0.0, torch.empty(N_CELLS, n_genes).geometric_(0.4, generator=random))
    log_depth = counts.sum(1).clamp(min=1).log()
    logits = torch.randn(N_CELLS, n_genes, generator=random).requires_grad_()
    theta = (0.5 + 0.7 * torch.randn(n_genes, generator=random)).exp().requires_grad_()
    logit = torch.full((n_genes,), -4.0).requires_grad_()
    name, log_density = peer()

    def back(log_prob: Tensor) -> None:
        logits.grad = theta.grad = logit.grad = None
        log_prob.sum().backward()

    def one_pass() -> None:
        back(CountLaw(Rate(logits, log_depth), theta, torch.sigmoid(logit)).to_event(1).log_prob(counts))

    def theirs() -> None:
        back(log_density(counts, log_depth.exp()[:, None] * torch.softmax(logits, -1), theta, logit))

    def in_torch() -> None:
        back(CountLaw(Rate(logits, log_depth), theta, torch.sigmoid(logit)).log_prob(counts))

    times = interleaved({"perturbprob": one_pass, "peer": theirs, "torch path": in_torch}, repeats)
    return {"ratio": round(times["peer"] / times["perturbprob"], 2), "ms": {k: round(t, 2) for k, t in times.items()}, "peer": name}


ROWS: dict[str, Callable[[int], dict[str, Any]] | None] = {
    "zinb_5000": lambda repeats: zinb(5000, 0.92, repeats),
    "zinb_103": lambda repeats: zinb(103, 0.31, repeats),
    # not measured yet: a training step, whole epochs, the neural ODE's, the solver alone, held-out density at equal time, memory
    "step_5000": None,
    "epoch_5000": None,
    "epoch_ishikawa": None,
    "node_epoch": None,
    "ode": None,
    "logp_gain": None,
    "rss_gb": None,
}


def versions() -> dict[str, str]:
    """Return the versions that the numbers belong to."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("perturbprob", "torch", "pyro-ppl", "numpy", "numba", "scvi-tools"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Run the rows that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=[name for name, row in ROWS.items() if row is not None])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table: dict[str, Any] = {}
    for name in options.rows:
        row, table[name] = ROWS[name], {}
        for threads in options.threads if row is not None else ():
            torch.set_num_threads(threads)
            table[name][str(threads)] = row(options.repeats)
            if not options.json:
                print(name, f"{threads} threads", table[name][str(threads)], flush=True)
    if options.json:
        print(json.dumps(table | {"roof": None, "threads": options.threads, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
