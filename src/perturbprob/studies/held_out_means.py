"""The means of held-out conditions, and of the control cells beside them: what predicted means are scored against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.moments import membership
from perturbprob.inference.predict import predict
from perturbprob.studies.metrics import direction, discrimination, mean_square_error

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen
    from perturbprob.inference.fit import Fit

NAMES = ("error", "direction", "discrimination")


@dataclass(frozen=True, eq=False)
class Means:
    """Means of log(1 + count) over the cells of each condition of a test screen, ``observed``, and over the ``control`` cells beside it.

    ``cells`` holds how many cells of each condition are in each batch. Control of the same media and time is weighted over batches as
    the condition is; a batch without control cells takes those of all batches. NaN where there are none.
    """

    test: "Screen"
    cells: Int64[np.ndarray, "condition batch"]
    observed: Float[np.ndarray, "condition gene"]
    control: Float[np.ndarray, "condition gene"]

    @classmethod
    def of(cls, test: "Screen", others: Sequence["Screen"] = ()) -> "Means":
        """Take control cells from the test screen and from ``others``, each cell once."""
        test = test.with_rna
        n = len(test.conditions)
        cells = np.zeros((n, len(test.batches)), dtype=np.int64)
        np.add.at(cells, (test.condition, test.batch), 1)
        if test.values != "counts":
            return cls(test, cells, (nothing := np.full((n, test.n_genes), np.nan)), nothing)
        observed = (membership(test.condition, n) @ test.counts.log1p()).toarray() / cells.sum(1)[:, None]
        known, names = dict[tuple[Protocol, str], list[Any]](), set[str]()
        for screen in (test, *(other.with_rna for other in others)):
            new = np.array([str(name) not in names for name in screen.cells])
            names.update(map(str, screen.cells))
            for code, condition in enumerate(screen.conditions):
                for b, batch in enumerate(screen.batches) if not condition.perturbations else ():
                    rows = np.flatnonzero(new & (screen.condition == code) & (screen.batch == b))
                    known.setdefault((condition, batch), []).append(screen.counts[rows].log1p().toarray())
        control = {key: np.concatenate(rows) for key, rows in known.items() if sum(map(len, rows))}
        return cls(test, cells, observed, cls._beside(test, cells, control))

    @staticmethod
    def _beside(
        test: "Screen", cells: Int64[np.ndarray, "condition batch"], control: dict[tuple[Protocol, str], np.ndarray]
    ) -> Float[np.ndarray, "condition gene"]:
        """Return the mean of the control cells beside each condition."""
        found = np.full((len(test.conditions), test.n_genes), np.nan)
        for row, (condition, weight) in enumerate(zip(test.conditions, cells, strict=True)):
            rows = {batch: part for (c, batch), part in control.items() if c == condition.unperturbed()}
            if rows:
                whole = np.concatenate(list(rows.values())).mean(0)
                each = np.stack([rows[batch].mean(0) if batch in rows else whole for batch in test.batches])
                found[row] = weight @ each / weight.sum()
        return found

    def score(self, fit: "Fit", how: dict[str, Any]) -> dict[str, float]:
        """Return how near a fit's means come, cells in their own batch."""
        if self.test.values != "counts":
            return dict.fromkeys(NAMES, np.nan)
        predicted, edited = self._predicted(fit, how), np.array([bool(c.perturbations) for c in self.test.conditions])
        change = (mean[edited] - self.control[edited] for mean in (predicted, self.observed))
        return {
            "error": float(mean_square_error(predicted, self.observed).mean()),
            "direction": _mean(direction(*change)),
            "discrimination": _mean(self._discrimination(predicted)),
        }

    def _predicted(self, fit: "Fit", how: dict[str, Any]) -> Float[np.ndarray, "condition gene"]:
        """Return the predicted mean of each condition, weighted over the batches that it is in."""
        condition, batch = np.nonzero(self.cells)
        conditions, batches = [self.test.conditions[c] for c in condition], [self.test.batches[b] for b in batch]
        found = predict(fit, conditions, batch=batches, scale="log1p", **how)["mean"].values
        weight = self.cells[condition, batch] / self.cells.sum(1)[condition]
        return membership(condition, len(self.cells)) @ (weight[:, None] * found)

    def _discrimination(self, predicted: Float[np.ndarray, "condition gene"]) -> Float[np.ndarray, " condition"]:
        """Return it within perturbed conditions of the same media and time."""
        place, conditions = {gene: k for k, gene in enumerate(self.test.genes)}, self.test.conditions
        found = np.full(len(conditions), np.nan)
        for beside in {c.unperturbed() for c in conditions}:
            rows = [k for k, c in enumerate(conditions) if c.perturbations and c.unperturbed() == beside]
            targets = [[place[p.gene] for p in conditions[k].perturbations if p.gene in place] for k in rows]
            found[rows] = discrimination(predicted[rows], self.observed[rows], targets)
        return found


def _mean(values: Float[np.ndarray, " condition"]) -> float:
    """Return the mean over conditions that have a value."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
