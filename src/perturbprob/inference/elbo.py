"""The evidence lower bound, added up as the sites of guide and model are sampled."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from perturbprob.inference.recording import Recording
from perturbprob.measurement.density import log_density
from perturbprob.model.cells import Cells
from perturbprob.model.penetrance import fold

if TYPE_CHECKING:
    from perturbprob.model.cell_model import CellModel
    from perturbprob.model.guide import Guide


@final
class Elbo(nn.Module):
    """−ELBO = −E_q [log p(x, z) − log q(z)] of one draw, z drawn such that gradients pass.

    The estimate of `pyro.infer.Trace_ELBO`, but nothing is kept of a site but its value and its term. Where edited cells may have
    escaped, each has a row for each way h, and the bound sums over them,
    log Σ_h p(h | π) p(x | z_h, h) p(z_h) / q(z_h | x, h), z_h ~ q(z | x, h). Each term has the expectation p(x, h), so it bounds log p(x)
    from below, and closer than a law q(h | x) of its own would: that law is the terms, scaled to a sum of 1.
    """

    def __init__(self, model: "CellModel", guide: "Guide") -> None:
        """Keep model and guide, whose parameters are trained."""
        super().__init__()
        self.model, self.guide = model, guide
        self._recording: Recording | None = None
        self._names: list[str] = []

    def record(self) -> None:
        """Replay from now on what all cells share instead of running it, where that can be done: the same numbers, sooner."""
        # validation decides by values; and whatever the recording cannot do, the model, which ran before, still can
        with pyro.validation_enabled(False), suppress(Exception):
            self._recording = Recording(self._flat, tuple(self.parameters()))

    def forward(self, cells: Cells) -> Float[Tensor, ""]:
        """Return the loss of a minibatch, unfolded."""
        shared, model, guide = self._terms(cells)
        if cells.hits is None:
            return shared + sum(term.sum() for term in guide.own) - sum(term.sum() for term in model.own)
        return shared - self._scale(cells) * self._cells(model, guide, cells).sum()

    def between_cells(self, cells: Cells) -> Float[Tensor, ""]:
        """Return −ELBO of the cells alone, given a draw of the globals, as held-out cells are judged."""
        _, model, guide = self._terms(cells)
        return -self._cells(model, guide, cells).sum()

    def _shared(self) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Draw what all cells share; return −ELBO of it, and its values."""
        with _Terms() as guide:
            self.guide.globals()
        with _Terms(guide.values) as model:
            sites = self.model.globals()
            self.model.spreads()
        return guide.shared() - model.shared(), sites

    def _flat(self) -> tuple[Tensor, ...]:
        """Return the same one behind the other."""
        shared, sites = self._shared()
        self._names = list(sites)
        return (shared, *sites.values())

    def _terms(self, cells: Cells) -> "tuple[Float[Tensor, ''], _Terms, _Terms]":
        """Return −ELBO of what all cells share, and the terms of cells in model and guide."""
        if self._recording is None:
            shared, sites = self._shared()
        else:
            shared, *values = self._recording()
            sites = dict(zip(self._names, values, strict=True))
        with _Terms() as guide:
            self.guide.own(cells)
        with _Terms(guide.values) as model:
            self.model.own(sites, cells)
        return shared - model.shared(), model, guide

    def _scale(self, cells: Cells) -> float:
        """Return how many rows each row stands for."""
        return cells.total / len(cells)

    def _cells(self, model: "_Terms", guide: "_Terms", cells: Cells) -> Float[Tensor, " cell"]:
        """Return the bound on the log density of each cell."""
        total = torch.stack([*model.own, *(-term for term in guide.own)]).sum(0) / self._scale(cells)
        return total if cells.hits is None else fold(total, cells.hits.of)


class _Terms(Messenger):  # type: ignore[misc]
    """Collects sites as they are sampled: the laws of what all cells share, and the log density of each cell.

    Gives sites the values that were drawn before, where there are any.
    """

    def __init__(self, given: dict[str, Tensor] | None = None) -> None:
        """Start without any."""
        super().__init__()
        self.given, self.values = given or {}, dict[str, Tensor]()
        self.laws: dict[str, dist.Distribution] = {}
        self.own, self.scaled = list[Tensor](), list[Tensor]()

    def shared(self) -> Float[Tensor, ""]:
        """Return the log density of what all cells share."""
        return log_density(list(self.laws.values()), [self.values[name] for name in self.laws]) + sum(self.scaled)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        """Give the site its value."""
        if not msg["is_observed"] and msg["name"] in self.given:
            msg["value"], msg["done"] = self.given[msg["name"]], True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        """Keep the log density of the value, and the value."""
        law, value = msg["fn"], msg["value"]
        self.values[msg["name"]] = value
        known = isinstance(law, dist.Delta) and not msg["is_observed"]
        if msg["name"] == "cell" or known or msg["infer"].get("_deterministic"):
            return
        if any(frame.name == "cell" for frame in msg["cond_indep_stack"]):
            self.own.append(scale_and_mask(law.log_prob(value), msg["scale"], msg["mask"]))
        elif msg["mask"] is None and isinstance(msg["scale"], float) and msg["scale"] == 1.0:
            self.laws[msg["name"]] = law
        else:
            self.scaled.append(scale_and_mask(law.log_prob(value), msg["scale"], msg["mask"]).sum())
