"""The means of a screen as rows: what was done, where, when and in which batch, and how well each mean is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, final

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from perturbprob.experiment.action import Perturbation, Protocol
from perturbprob.experiment.screen import Screen, require_screen

MOST_ROWS = 3000
"""The most means of one fit: each step of it costs their number to the third power."""


class Place(NamedTuple):
    """Where means stand. ``members`` is 1 where a perturbation acts on a row; ``media``, ``time`` and ``group`` are indices."""

    members: Float64[Tensor, "row perturbation"]
    media: Int[Tensor, " row"]
    time: Int[Tensor, " row"]
    group: Int[Tensor, " row"]

    def same(self, other: "Place") -> Bool[Tensor, "row other_row"]:
        """Which pairs of rows, control apart, had the same done to them."""
        left, right = alike_wide(self.members, other.members)
        common, mine, theirs = left @ right.T, left.sum(1), right.sum(1)
        return (common > 0) & (common == mine[:, None]) & (common == theirs)


def alike_wide(
    left: Float64[Tensor, "left some"], right: Float64[Tensor, "right others"]
) -> tuple[Float64[Tensor, "left perturbation"], Float64[Tensor, "right perturbation"]]:
    """Return two tables of members with as many columns: perturbations that only one of them knows stand behind the others."""
    wide = max(left.shape[1], right.shape[1])
    return nn.functional.pad(left, (0, wide - left.shape[1])), nn.functional.pad(right, (0, wide - right.shape[1]))


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """The means of a screen, one for each condition in each batch, in units of the spread between cells.

    ``values`` (row, gene) are means over ``scale`` (gene,), the standard deviation between cells of one condition, so that a mean over n
    cells has noise of variance 1 / n: ``noise`` (row,). ``cells`` names the cells behind the rows. ``perturbations``, ``media``,
    ``times`` and ``groups`` are the levels; a group is what cells were in when nothing was done, media and time, in one batch.
    """

    screen: Screen
    cells: np.ndarray
    perturbations: tuple[Perturbation, ...]
    media: tuple[str | None, ...]
    times: tuple[float, ...]
    groups: tuple[tuple[Protocol, str], ...]
    values: Float64[np.ndarray, "row gene"]
    noise: Float64[np.ndarray, " row"]
    scale: Float64[np.ndarray, " gene"]

    @classmethod
    def of(cls, screen: Screen) -> Self:
        """Take the means of counts, or the continuous values of a screen that says how well they are known."""
        require_screen(screen)
        check_instants(screen.conditions)
        bulk = screen if screen.values == "continuous" else screen.pseudobulk()
        if bulk.n_cells > MOST_ROWS:
            raise ValueError(
                f"The screen has {bulk.n_cells:,} means of conditions in batches; this model takes {MOST_ROWS:,} at most. "
                "Take some of its conditions, such as the media and times that are asked about."
            )
        done, batches = [bulk.conditions[c] for c in bulk.condition], [bulk.batches[b] for b in bulk.batch]
        noise, scale = _noise(bulk)
        return cls(
            bulk,
            screen.cells,
            tuple(dict.fromkeys(p for protocol in done for p in protocol.perturbations)),
            tuple(dict.fromkeys(p.media for p in done)),
            tuple(sorted({p.time for p in done})),
            tuple(dict.fromkeys((p.unperturbed(), batch) for p, batch in zip(done, batches, strict=True))),
            bulk.counts.toarray().astype(np.float64) / scale,
            noise,
            scale,
        )

    @property
    def place(self) -> Place:
        """Where the rows themselves stand."""
        screen = self.screen
        return self.at([screen.conditions[c] for c in screen.condition], [screen.batches[b] for b in screen.batch])

    def at(self, protocols: Sequence[Protocol], batches: Sequence[str]) -> Place:
        """Return where protocols in batches stand; perturbations that no row shows get columns of their own, behind the others."""
        known = dict.fromkeys([*self.perturbations, *(p for protocol in protocols for p in protocol.perturbations)])
        column = {p: k for k, p in enumerate(known)}
        members = torch.zeros(len(protocols), len(column), dtype=torch.float64)
        for row, protocol in enumerate(protocols):
            members[row, [column[p] for p in protocol.perturbations]] = 1.0
        group = [self.groups.index((p.unperturbed(), batch)) for p, batch in zip(protocols, batches, strict=True)]
        media, time = ([level.index(value) for value in values] for level, values in self._levels(protocols))
        return Place(members, torch.tensor(media), torch.tensor(time), torch.tensor(group))

    def _levels(self, protocols: Sequence[Protocol]) -> list[tuple[tuple[object, ...], list[object]]]:
        """Return the known media and times, each with those of protocols."""
        return [(self.media, [p.media for p in protocols]), (self.times, [p.time for p in protocols])]

    def batches_of(self, protocol: Protocol) -> list[str]:
        """Return the batches that show the media and time of a protocol; refuse one of which nothing was seen there."""
        found = [batch for beside, batch in self.groups if beside == protocol.unperturbed()]
        if not found:
            media = protocol.media or self.screen.baseline or "baseline"
            known = sorted({f"{p.media or self.screen.baseline or 'baseline'} at {p.time:g}" for p, _ in self.groups})
            raise ValueError(
                f"Nothing was seen in media {media!r} at time {protocol.time:g}, not even control, so nothing is known of genes "
                f"there. Seen: {', '.join(known[:12])}."
            )
        return found


def check_instants(protocols: Sequence[Protocol]) -> None:
    """Refuse protocols that act at more than one instant."""
    for protocol in protocols:
        if len(protocol.segments()) > 1:
            raise ValueError(f"{protocol} acts at more than one instant; this model knows only protocols that act once, then wait.")


def _noise(bulk: Screen) -> tuple[Float64[np.ndarray, " row"], Float64[np.ndarray, " gene"]]:
    """Return the variance of each row's noise in units of the variance between cells, and the standard deviation between cells.

    Rows that do not say how many cells are behind them are given the number that their standard errors speak for; control that says neither
    counts as much as the row with the most cells.
    """
    if bulk.standard_error is None or not np.isfinite(bulk.standard_error).any():
        raise ValueError(
            "This screen of continuous values does not say how well they are known. Read it with standard_error= (a layer), or give counts."
        )
    cells = np.full(bulk.n_cells, np.nan) if bulk.cells_behind is None else bulk.cells_behind.astype(np.float64)
    error = bulk.standard_error.astype(np.float64)
    told = np.isfinite(error)
    weight = np.where(np.isfinite(cells), np.maximum(cells - 1, 0), np.nan) if np.isfinite(cells).any() else np.ones(len(cells))
    squares = error**2 * np.where(np.isfinite(cells), cells, 1.0)[:, None]
    use = told & (weight > 0)[:, None]
    total = np.where(use, weight[:, None], 0.0).sum(0)
    variance = np.divide(np.where(use, squares * weight[:, None], 0.0).sum(0), total, out=np.zeros(len(total)), where=total > 0)
    scale = np.where(variance > 0, np.sqrt(np.maximum(variance, 0)), 1.0)
    spoken = np.array([_cells_of(row[ok & (variance > 0)], variance[ok & (variance > 0)]) for row, ok in zip(error, told, strict=True)])
    cells = np.where(np.isfinite(cells), cells, spoken)
    return 1 / np.where(np.isfinite(cells), cells, np.nanmax(cells)), scale


def _cells_of(error: Float64[np.ndarray, " gene"], variance: Float64[np.ndarray, " gene"]) -> float:
    """Return how many cells the standard errors of a row speak for; NaN where it has none."""
    return float(np.median(variance / np.maximum(error, 1e-12) ** 2)) if len(error) else float("nan")
