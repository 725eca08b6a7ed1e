"""Spans of neighbouring rows of a matrix on disk: one after the other, or, of a zarr store and where annbatch is installed, all at once."""

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from threading import Lock
from typing import Any

from anndata.abc import CSRDataset
from scipy.sparse import csr_array, vstack

from perturbprob.experiment.raw_counts import as_csr

Reader = Callable[[Sequence[slice]], csr_array]
"""What reads the rows of spans, in their order."""


def reader(matrix: Any, name: str) -> Reader:
    """Return what reads spans of a matrix that anndata or zarr opened; ``name`` is what errors call it."""
    in_zarr = matrix.backend == "zarr" if isinstance(matrix, CSRDataset) else type(matrix).__module__.startswith("zarr.")
    if in_zarr and find_spec("annbatch") is not None:
        return _AtOnce(matrix, name)
    return functools.partial(_in_turn, matrix, name)


def _in_turn(matrix: Any, name: str, spans: Sequence[slice]) -> csr_array:
    """Read span by span."""
    parts = [as_csr(matrix[span], name) for span in spans]
    return csr_array(vstack(parts, format="csr")) if len(parts) > 1 else parts[0]


class _AtOnce:
    """Reads what spans need of a zarr store at the same time, with annbatch's `Loader`; which rows is ours to say."""

    def __init__(self, matrix: Any, name: str) -> None:
        """Hand the matrix to annbatch."""
        from annbatch import Loader
        from annbatch.abc import Sampler

        class Asked(Sampler):
            """The rows that were asked for, as one batch."""

            batch_size, shuffle = None, False
            spans: Sequence[slice] = ()

            def n_batches(self, n_obs: int) -> int:
                return 1

            def validate(self, n_obs: int) -> None:
                """Nothing can be wrong: `StoredCounts` names rows that are there."""

            def _sample(self, n_obs: int) -> Iterator[Any]:
                n_rows = sum(span.stop - span.start for span in self.spans)
                yield {"requests": list(self.spans), "splits": [range(n_rows)]}

        self._name, self._asked, self._one_at_a_time = name, Asked(), Lock()
        self._loader = Loader(batch_sampler=self._asked, preload_to_gpu=False).add_dataset(matrix)

    def __call__(self, spans: Sequence[slice]) -> csr_array:
        """Read the rows of spans."""
        with self._one_at_a_time:
            self._asked.spans = spans
            (batch,) = self._loader
        return as_csr(batch["X"], self._name)
