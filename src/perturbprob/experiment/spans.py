"""Rows of a matrix on disk, span of neighbours by span; of a zarr store, where annbatch is installed, all spans at the same time."""

import functools
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np
from anndata.abc import CSRDataset
from jaxtyping import Int64
from scipy.sparse import csr_array, vstack

from perturbprob.experiment.raw_counts import as_csr

Spans = Sequence[Int64[np.ndarray, " _"]]
"""Rows in ascending order, in spans that are each read in one go, with the rows between."""


def reader(matrix: Any, name: str) -> Callable[[Spans], csr_array]:
    """Return what reads the rows of spans of a matrix that anndata, h5py or zarr opened; ``name`` is what errors call it.

    Dense rows are never annbatch's: those of a store that is cut along genes too it reads wrongly (0.3.1).
    """
    if isinstance(matrix, CSRDataset) and matrix.backend == "zarr" and _has_annbatch():
        return _WithAnnbatch(matrix, name)
    return functools.partial(_in_turn, matrix, name)


@functools.cache
def _has_annbatch() -> bool:
    """Say whether annbatch can be had, in a version that is asked as here, from 0.2."""
    try:
        from annbatch.types import LoadRequest
    except ImportError:
        return False
    return "requests" in LoadRequest.__annotations__


def _in_turn(matrix: Any, name: str, spans: Spans) -> csr_array:
    """Read one span after the other."""
    parts = [as_csr(matrix[int(span[0]) : int(span[-1]) + 1], name)[span - span[0]] for span in spans]
    return csr_array(vstack(parts, format="csr")) if len(parts) > 1 else parts[0]


class _WithAnnbatch:
    """Reads what spans need of a zarr store at the same time, with annbatch's `Loader`; which rows is ours to say."""

    def __init__(self, matrix: CSRDataset, name: str) -> None:
        """Hand the matrix to annbatch, which reads wherever ``indptr`` points: `StoredCounts` has looked at it."""
        from annbatch import Loader
        from annbatch.abc import Sampler

        class Asked(Sampler):
            """The rows that were asked for, as one batch."""

            batch_size, shuffle = None, False
            spans: Spans = ()

            def n_batches(self, n_obs: int) -> int:
                return 1

            def validate(self, n_obs: int) -> None:
                """Nothing can be wrong: `StoredCounts` names rows that are there."""

            def _sample(self, n_obs: int) -> Iterator[Any]:
                before = np.cumsum([0] + [int(span[-1] - span[0]) + 1 for span in self.spans])
                places = [span - span[0] + first for span, first in zip(self.spans, before[:-1], strict=True)]
                yield {"requests": [slice(int(span[0]), int(span[-1]) + 1) for span in self.spans], "splits": [np.concatenate(places)]}

        self._name, self._asked, self._one_at_a_time = name, Asked(), Lock()
        self._loader = Loader(batch_sampler=self._asked, preload_to_gpu=False).add_dataset(matrix)

    def __call__(self, spans: Spans) -> csr_array:
        """Read the rows of spans."""
        with self._one_at_a_time:
            self._asked.spans = spans
            (batch,) = self._loader
        return as_csr(batch["X"], self._name)
