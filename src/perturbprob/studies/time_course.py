"""The pseudobulks of one media as a table, perturbation × time × gene: what predictors of means learn from and answer in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from perturbprob.experiment.action import Perturbation, Protocol
from perturbprob.experiment.pseudobulk import condition_coordinates, pseudobulk
from perturbprob.experiment.screen import Screen, require_screen
from perturbprob.experiment.vocabulary import nearest

Rows = Int[np.ndarray, " row"]
Means = Float[np.ndarray, "row gene"]


class Posterior(NamedTuple):
    """Predicted means, and the standard deviation of what is not known of them."""

    mean: Means
    sd: Means


@dataclass(frozen=True, eq=False)
class TimeCourse:
    """What was seen in one media: mean and variance of log(1 + count), and the cells behind them.

    ``perturbations`` are sets of perturbations, none (control) first, whether or not control was seen; ``times`` are sorted. Where
    ``cells`` (perturbation, time) is 0, ``mean`` and ``variance`` (perturbation, time, gene) are NaN.

    >>> from perturbprob.experiment import datasets
    >>> course = TimeCourse.of(datasets.ishikawa2023(), None)
    >>> course.mean.shape, course.times
    ((24, 4, 103), (2.0, 3.0, 4.0, 5.0))
    """

    media: str
    perturbations: tuple[tuple[Perturbation, ...], ...]
    times: tuple[float, ...]
    mean: Float[np.ndarray, "perturbation time gene"]
    variance: Float[np.ndarray, "perturbation time gene"]
    cells: Int[np.ndarray, "perturbation time"]

    @classmethod
    def of(cls, screen: Screen, media: str | None, bulk: xr.Dataset | None = None) -> Self:
        """Collect the conditions of one media (None: the baseline); ``bulk`` is the screen's `pseudobulk`, where it is at hand."""
        bulk = pseudobulk(screen) if bulk is None else bulk
        chosen = [(c, p) for c, p in enumerate(screen.conditions) if p.media == media]
        perturbations = tuple(dict.fromkeys([(), *(p.perturbations for _, p in chosen)]))
        times = tuple(sorted({p.time for _, p in chosen}))
        row = {p: k for k, p in enumerate(perturbations)}
        source = np.full((len(perturbations), len(times)), -1)
        for c, p in chosen:
            source[row[p.perturbations], times.index(p.time)] = c
        mean, variance = (np.where(source[..., None] < 0, np.nan, bulk[name].values[source]) for name in ("mean", "variance"))
        cells = np.where(source < 0, 0, bulk["n_cells"].values[source])
        return cls(media or screen.baseline or "baseline", perturbations, times, mean, variance, cells)

    @cached_property
    def seen(self) -> Bool[np.ndarray, "perturbation time"]:
        """Which perturbations have cells at which times."""
        return self.cells > 0

    @cached_property
    def offsets(self) -> Float[np.ndarray, "perturbation time gene"]:
        """The mean minus that of control at the same time."""
        return self.mean - self.mean[0]

    @cached_property
    def pooled_variance(self) -> Float[np.ndarray, "time gene"]:
        """The variance between cells of one condition, pooled over the conditions of each time."""
        freedom = np.maximum(self.cells - 1, 0)[..., None]
        return (np.where(freedom > 0, self.variance, 0.0) * freedom).sum(0) / np.maximum(freedom.sum(0), 1)

    def taking(self, columns: Sequence[int]) -> Self:
        """Return the course at some of its times, by index."""
        times = tuple(self.times[k] for k in columns)
        return replace(self, times=times, mean=self.mean[:, columns], variance=self.variance[:, columns], cells=self.cells[:, columns])

    def ending(self, time: float) -> Self:
        """Return the course up to ``time``: the times before it at which a perturbation was seen, and itself, seen or not."""
        earlier = [k for k, t in enumerate(self.times) if t < time and self.seen[1:, k].any()]
        if time in self.times:
            return self.taking([*earlier, self.times.index(time)])
        course, blank = self.taking(earlier), np.full((len(self.perturbations), 1, self.mean.shape[2]), np.nan)
        mean, variance = (np.concatenate([values, blank], 1) for values in (course.mean, course.variance))
        return replace(course, times=(*course.times, time), mean=mean, variance=variance, cells=np.pad(course.cells, ((0, 0), (0, 1))))

    def with_history(self) -> Self:
        """Return the perturbations that were seen at every time but, maybe, the last; and control."""
        keep = np.append(0, 1 + np.flatnonzero(self.seen[1:, :-1].all(1)))
        perturbations = tuple(self.perturbations[k] for k in keep)
        return replace(self, perturbations=perturbations, mean=self.mean[keep], variance=self.variance[keep], cells=self.cells[keep])

    def hiding(self, rows: Rows) -> Self:
        """Return the course without the last time of some perturbations."""
        mean, variance, cells = self.mean.copy(), self.variance.copy(), self.cells.copy()
        mean[rows, -1], variance[rows, -1], cells[rows, -1] = np.nan, np.nan, 0
        return replace(self, mean=mean, variance=variance, cells=cells)

    def row(self, protocol: Protocol) -> int:
        """Return the row of a protocol's perturbations; refuse one without training cells."""
        wanted, seen = protocol.perturbations, [p for p, cells in zip(self.perturbations, self.cells, strict=True) if cells.any()]
        if wanted not in seen:
            hint = nearest(_name(wanted), map(_name, seen))
            raise ValueError(f"{_name(wanted)} has no training cells in media {self.media!r}, so nothing is known of it. {hint}")
        return self.perturbations.index(wanted)

    def check_history(self, protocol: Protocol) -> None:
        """Refuse a protocol whose perturbation was not seen at every earlier time."""
        if len(self.times) < 2:
            raise ValueError(f"{protocol}: no perturbation has training cells before time {self.times[-1]:g}, from which to predict it.")
        lacking = [f"{t:g}" for t, seen in zip(self.times[:-1], self.seen[self.row(protocol)], strict=False) if not seen]
        if lacking:
            needed = ", ".join(f"{t:g}" for t in self.times[:-1])
            raise ValueError(f"{protocol} needs training cells at every earlier time ({needed}) and has none at {', '.join(lacking)}.")

    def check_control(self) -> None:
        """Refuse a course without control at some time."""
        if lacking := [f"{t:g}" for t, seen in zip(self.times, self.seen[0], strict=True) if not seen]:
            where = f"in media {self.media!r} at time {', '.join(lacking)}"
            raise ValueError(f"Control has no training cells {where}, where this baseline needs it. Keep control in training.")

    def check_target(self) -> None:
        """Refuse a course of which nothing was seen at the last time."""
        if not self.seen[:, -1].any():
            raise ValueError(f"Nothing was seen in media {self.media!r} at time {self.times[-1]:g}, so nothing is known of that time.")


def _name(perturbations: tuple[Perturbation, ...]) -> str:
    """Return the expression of a set of perturbations."""
    return " >> ".join(map(repr, perturbations)) or "control"


def predict_means(
    train: Screen, conditions: Sequence[Protocol], name: str, method: Callable[[TimeCourse, list[Protocol]], Means | Posterior]
) -> xr.DataArray:
    """Return what ``method`` predicts for the conditions, media by media and time by time, dims (condition, gene).

    ``method`` gets the course of a media that ends at the time, and the conditions of that media and time; it may say how sure it is.
    Raises ValueError for a protocol that does not do everything at one instant and then wait.
    """
    protocols, bulk = check_conditions(train, conditions), pseudobulk(train)
    values, sd = np.empty((len(protocols), train.n_genes)), None
    for media, time in dict.fromkeys((p.media, p.time) for p in protocols):
        index = [k for k, p in enumerate(protocols) if (p.media, p.time) == (media, time)]
        course = TimeCourse.of(train, media, bulk).ending(time)
        found = method(course, [protocols[k] for k in index])
        if isinstance(found, Posterior):
            sd = np.empty_like(values) if sd is None else sd
            sd[index], found = found.sd, found.mean
        values[index] = found
    return label_means(train, protocols, values, name, sd)


def check_conditions(train: Screen, conditions: Sequence[Protocol]) -> list[Protocol]:
    """Return the protocols with the screen's baseline media understood; refuse what is no list of one-instant protocols."""
    require_screen(train)
    if isinstance(conditions, Protocol) or not all(isinstance(p, Protocol) for p in conditions):
        raise TypeError("Conditions are a list of protocols, such as [Knockout('NANOG') >> Wait(5)].")
    if not len(conditions):
        raise ValueError("No condition to predict: give a list of protocols, such as the held_out of a split.")
    protocols = [p.with_baseline(train.baseline) for p in conditions]
    known = {p.media for p in train.conditions}
    for protocol in protocols:
        if protocol.media not in known:
            name = protocol.media or train.baseline or "baseline"
            raise ValueError(f"No training cell is in media {name!r}, which {protocol} ends in. {nearest(name, train.media)}")
    for protocol in (*protocols, *train.conditions):
        if len(protocol.segments()) > 1:
            raise ValueError(f"{protocol} acts at more than one instant; these baselines know only protocols that act once, then wait.")
    return protocols


def label_means(
    train: Screen, protocols: Sequence[Protocol], values: Float[np.ndarray, "condition gene"], name: str, sd: Means | None = None
) -> xr.DataArray:
    """Name the conditions and genes of predicted means; ``sd`` says how sure they are, where that is known."""
    attrs = {"baseline": name, "scale": "log1p", "units": "mean of log(1 + count)"}
    coordinates = condition_coordinates(train, protocols) | ({} if sd is None else {"sd": (("condition", "gene"), sd)})
    return xr.DataArray(values, coordinates, ("condition", "gene"), "mean", attrs)
