"""The strongest simple predictor of means: a Gaussian process over perturbations and times, with the noise of every mean known."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from perturbprob.experiment.action import Protocol
from perturbprob.experiment.pseudobulk import pseudobulk
from perturbprob.response.gaussian import gaussian_response
from perturbprob.studies.time_course import TimeCourse, check_conditions, label_means

if TYPE_CHECKING:
    from perturbprob.experiment.screen import Screen


def hierarchical_gaussian(train: "Screen", conditions: Sequence[Protocol]) -> xr.DataArray:
    """Predict means of log(1 + count), dims (condition, gene), by a hierarchical Gaussian model of all training means of the media.

    It is `gaussian_response` with one structure, "free, alike", each media on its own: a size for each perturbation, a resemblance of
    rank 3 between them, any covariance between times, a scale for each gene. Earlier and later times count alike. The coordinate ``sd``
    says how sure it is of each mean. Raises ValueError for a perturbation without training cells, and a time at which nothing was seen.

    >>> from perturbprob.experiment import datasets, split
    >>> part = split.hold_out_time(datasets.ishikawa2023(), 5, ["NANOG", "SOX2"])
    >>> hierarchical_gaussian(part.train, part.held_out).sizes
    Frozen({'condition': 2, 'gene': 103})
    """
    protocols, bulk = check_conditions(train, conditions), pseudobulk(train)
    values, sd = np.empty((2, len(protocols), train.n_genes))
    for media in dict.fromkeys(p.media for p in protocols):
        index = [k for k, p in enumerate(protocols) if p.media == media]
        course = TimeCourse.of(train, media, bulk)
        for k in index:
            course.row(protocols[k])
            course.ending(protocols[k].time).check_target()
        part = train[np.array([p.media == media for p in train.conditions])[train.condition]]
        found = gaussian_response(part, ["free, alike"], progress=False).predict([protocols[k] for k in index])
        values[index], sd[index] = found["mean"].values, found["sd"].values
    return label_means(train, protocols, values, "hierarchical_gaussian", sd)
