"""What a fit records of the screen that it has seen."""

from typing import Any

import numpy as np

from perturbprob.experiment.screen import Screen


def trained_on(screen: Screen) -> dict[str, Any]:
    """Record what a fit has seen: cells, cells per condition and batch, and per assay and batch, and what is confounded."""
    table = np.zeros((len(screen.conditions), len(screen.batches)), dtype=int)
    np.add.at(table, (screen.condition, screen.batch), 1)
    conditions = {
        repr(c): {b: int(n) for b, n in zip(screen.batches, row, strict=True) if n} for c, row in zip(screen.conditions, table, strict=True)
    }
    nested = [pair for pair in screen.layout.nested() if pair[0] == "batch"]
    confounded = [list(pair) for pair in [*screen.layout.confounded(), *nested]]
    assays = {
        name: dict(zip(screen.batches, np.bincount(screen.batch, assay.present, len(screen.batches)).astype(int).tolist(), strict=True))
        for name, assay in screen.assays.items()
    }
    aliased = [list(names) for names in dict.fromkeys(tuple(alias.levels) for alias in screen.layout.aliases())]
    sgrnas = {}
    if screen.sgrna is not None:
        each = [np.unique(screen.sgrna[screen.condition == k].astype(str), return_counts=True) for k in range(len(screen.conditions))]
        sgrnas = {repr(c): dict(zip(*(part.tolist() for part in own), strict=True)) for c, own in zip(screen.conditions, each, strict=True)}
    seen = {"sgrnas": sgrnas, "conditions": conditions, "confounded": confounded, "aliased": aliased, "assays": assays}
    return {"cells": list(map(str, screen.cells)), "columns": screen.columns} | seen
