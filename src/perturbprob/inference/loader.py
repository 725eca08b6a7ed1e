"""The order in which a training sees its cells: in memory cell by cell, on disk block by block, with the next blocks read ahead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from perturbprob.experiment.store import StoredCounts

BLOCK = 256
"""So many neighbours are read from disk together: random cells of a file take three times as long."""
BUFFER = 32
"""Cells of so many random blocks are in memory, and shuffled, at a time."""

Batch = tuple[Int[Tensor, " cell"], csr_array]


def shuffled(counts: csr_array | StoredCounts, index: Int[Tensor, " cell"], minibatch: int) -> Iterator[Batch]:
    """Yield the cells of ``index`` once, in a random order drawn with torch: the places of those of a minibatch, and their counts.

    Of counts on disk, blocks of neighbours come in a random order, and cells are shuffled within a few of them; all minibatches but the
    last are full.

    >>> batches = shuffled(csr_array((5, 2), dtype="float32"), torch.arange(5), 2)
    >>> [(len(places), counts.shape) for places, counts in batches]
    [(2, (2, 2)), (2, (2, 2)), (1, (1, 2))]
    """
    if isinstance(counts, StoredCounts):
        yield from _from_disk(counts, index.sort().values, minibatch)
        return
    for places in index[torch.randperm(len(index))].split(minibatch):
        yield places, counts[places.numpy()]


def _from_disk(counts: StoredCounts, index: Int[Tensor, " cell"], minibatch: int) -> Iterator[Batch]:
    """Read a buffer of blocks while the one before is used; what is left over of it comes first in the next."""
    blocks = index.split(BLOCK)
    order = torch.randperm(len(blocks))
    buffers = [torch.cat([blocks[k] for k in part]) for part in order.split(BUFFER)]
    rest, rest_counts = index[:0], csr_array((0, counts.shape[1]), dtype="float32")
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(counts.__getitem__, buffers[0].numpy())
        for k, places in enumerate(buffers):
            read = ahead.result()
            if k + 1 < len(buffers):
                ahead = reader.submit(counts.__getitem__, buffers[k + 1].numpy())
            places, read = torch.cat([rest, places]), _stacked(rest_counts, read)
            mixed = torch.randperm(len(places))
            for chosen in mixed.split(minibatch):
                part = places[chosen], read[chosen.numpy()]
                if len(chosen) < minibatch and k + 1 < len(buffers):
                    rest, rest_counts = part
                    break
                yield part
            else:
                rest, rest_counts = index[:0], rest_counts[:0]


def _stacked(first: csr_array, second: csr_array) -> csr_array:
    """Return the rows of both."""
    return csr_array(vstack([first, second], format="csr")) if first.shape[0] else second
