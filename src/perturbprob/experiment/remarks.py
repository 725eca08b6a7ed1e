"""What the owner of a valid screen should know."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from perturbprob.experiment import reading

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


def remarks(screen: "Screen") -> Iterator[str]:
    """Say what the owner of a valid screen should know, each with what can be done."""
    silent = np.zeros(screen.n_genes, bool) if screen.values == "continuous" else np.asarray(screen.counts.sum(axis=0)).ravel() == 0
    if silent.any():
        found = reading.some(np.array(screen.genes)[silent], "gene")
        drop = "adata = adata[:, np.asarray(adata.X.sum(axis=0)).ravel() > 0]"
        yield f"{found} without any count. Kept, but nothing can be learnt of them; to drop them: {drop}."
    edited = {a.gene for p in screen.conditions for a in p.perturbations}
    unseen = sorted({gene for gene in edited if reading.genes_of(gene)} - set(screen.genes))  # no gene is called NT
    if unseen:
        found = reading.some(unseen, "perturbed gene")
        yield f"{found} not in adata.var_names. Allowed; if var_names are identifiers, set them to the symbols that perturbations use."
    if lacking := screen.layout.batches_without_control():
        found = reading.some(lacking, "batch", "batches")
        yield f"{found} without control cells: there, batch effects are learnt from perturbed cells only."
    if screen.baseline is not None and screen.baseline not in screen.media:
        yield f"No cell is in the baseline media {screen.baseline!r}; all are in {screen.media[0]!r}. If it is misspelt, correct baseline=."
