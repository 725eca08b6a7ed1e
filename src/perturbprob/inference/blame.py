"""Where a loss is not finite."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from jaxtyping import Int
from scipy.sparse import csr_array
from torch import Tensor

from perturbprob.measurement.counts import CountLaw
from perturbprob.measurement.fused import NoCount, no_count

if TYPE_CHECKING:
    from perturbprob.inference.fit import _Training


@torch.no_grad()
def blame(training: "_Training", index: Int[Tensor, " cell"], counts: csr_array, *, elsewhere: bool) -> str:
    """Say at which step, site, batch, cells and genes the loss of a minibatch is not finite, or that another process says it."""
    if elsewhere:
        return f"The loss is not finite at step {training.step}, in the part of another process, which says more."
    if training.settings["objective"] == "kds":
        return f"The loss is not finite at step {training.step}. The last good parameters are kept in error.fit. Lower learning_rate."
    cells, screen = training.cells(index, counts), training.screen
    cells = replace(cells, counts=cells.counts.to_dense())
    index = index if cells.hits is None else index[cells.hits.of.cpu()]
    encodes = training.settings["objective"] == "elbo"
    guide = pyro.poutine.trace(training.guide).get_trace(cells) if encodes else pyro.poutine.trace(training.guide.globals).get_trace()
    model = pyro.poutine.trace(pyro.poutine.replay(training.model, guide)).get_trace(cells)
    bad = [n for t in (guide, model) for n, s in t.nodes.items() if s["type"] == "sample" and not _finite(s)]
    law = model.nodes["counts"]["fn"].base_dist
    wrong = ~torch.isfinite(law.log_prob(cells.counts)) | (no_count(cells.counts) if isinstance(law, CountLaw) else False)
    worst = index[wrong.any(-1).cpu()] if wrong.any() else index[cells.counts.sum(-1).topk(min(3, len(index))).indices.cpu()]
    genes = [screen.genes[int(g)] for g in torch.where(wrong.any(0))[0][:3]] or ["none by itself"]
    where = sorted({screen.batches[b] for b in screen.batch[worst.numpy()]})
    return (
        f"The loss is not finite at step {training.step} (site {', '.join(dict.fromkeys(bad)) or 'gradient'}; "
        f"batch {', '.join(where[:3])}; worst cells {', '.join(screen.cells[int(c)] for c in worst[:3])}; "
        f"genes {', '.join(genes)}). The last good parameters are kept "
        "in error.fit. Look at these cells' counts and size factors, or lower learning_rate."
    )


def _finite(site: dict[str, Any]) -> bool:
    """Say whether a site's value and log-density are finite."""
    try:
        log_prob = site["fn"].log_prob(site["value"])
    except NoCount:
        return False
    return bool(torch.isfinite(site["value"]).all() and torch.isfinite(log_prob).all())
