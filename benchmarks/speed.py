"""How fast the package is beside what a user would else take, as ratios within one process.

    python benchmarks/speed.py --json
    python benchmarks/speed.py --rows zinb_5000 --threads 1 --repeats 11

Each row runs both sides in turns on the same numbers, ``repeats`` times after one round that is not counted (compilation), and gives the
median of each in milliseconds and the ratio of the medians, for each number of threads.

``zinb_5000`` and ``zinb_103``: value and gradient of the zero-inflated negative binomial, 512 cells × 5,000 genes with 92 % zeros and × 103
with 31 %, from logits to the sum over cells and back to logits, θ and π; beside `log_zinb_positive` of scvi-tools after a softmax and the
size factor. Without scvi-tools (extra ``bench``) its published formula stands in for it, which ``peer`` says. What the other rows are is
said in speed_vae.py (``step_5000``, ``epoch_5000``, ``epoch_ishikawa``, ``logp_gain``), speed_ode.py (``node_epoch``, ``ode``) and
speed_memory.py (``rss_gb``).

``roof`` is how long the products of matrices of a training step of ``step_5000`` take by themselves, dense, in milliseconds, and what share
of our step that is. Results that are kept stand in benchmarks/results.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import speed_memory
import speed_ode
import speed_vae
import torch
from interleaved import interleaved, row, versions
from torch import Tensor
from torch.nn.functional import softplus

from perturbprob.measurement import CountLaw, Rate

N_CELLS = 512


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
    return f"scvi-tools {versions()['scvi-tools']}", log_zinb_positive


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
    return row(times, peer=name)


def roof(repeats: int) -> float:
    """Return how long the products of a step take: encoder and decoder, forward, and back to weights and hidden units."""
    cells, hidden, genes = N_CELLS, 128, 5000
    x, h, w = torch.randn(cells, genes), torch.randn(cells, hidden), torch.randn(hidden, genes)

    def products() -> None:
        for left, right in ((x, w.mT), (h.mT, x), (h, w), (h.mT, x), (x, w.mT)):
            torch.mm(left, right)

    return interleaved({"products": products}, repeats)["products"]


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "zinb_5000": lambda repeats: zinb(5000, 0.92, repeats),
    "zinb_103": lambda repeats: zinb(103, 0.31, repeats),
    "step_5000": speed_vae.step_5000,
    "epoch_5000": speed_vae.epoch_5000,
    "epoch_ishikawa": speed_vae.epoch_ishikawa,
    "node_epoch": speed_ode.node_epoch,
    "ode": speed_ode.ode,
    "logp_gain": speed_vae.logp_gain,
    "rss_gb": speed_memory.rss_gb,
}
ONCE = ("logp_gain", "rss_gb")
"""Run with one number of threads."""


def main() -> None:
    """Run the rows that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table: dict[str, Any] = {}
    for name in options.rows:
        table[name] = {}
        for threads in options.threads[:1] if name in ONCE else options.threads:
            torch.set_num_threads(threads)
            table[name][str(threads)] = found = ROWS[name](options.repeats)
            if name == "step_5000":
                alone = roof(options.repeats)
                table.setdefault("roof", {})[str(threads)] = {"ms": round(alone, 1), "share": round(alone / found["ms"]["perturbprob"], 2)}
            print(name, f"{threads} threads", found, flush=True, file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(table | {"threads": options.threads, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
