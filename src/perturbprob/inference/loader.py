"""The order in which a training sees its cells: in memory cell by cell, on disk block by block, with the next blocks read ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from perturbprob.experiment.store import StoredCounts
from perturbprob.inference.distributed import ALONE, Processes

BLOCK = 256
"""So many neighbours are read from disk together: random cells of a file take three times as long."""
BUFFER = 32
"""Cells of so many random blocks are in memory, and shuffled, at a time."""

Batch = tuple[Int[Tensor, " cell"], csr_array]


def shuffled(
    counts: csr_array | StoredCounts, index: Int[Tensor, " cell"], minibatch: int, processes: Processes = ALONE
) -> Iterator[Batch]:
    """Yield the cells of ``index`` once, in a random order drawn with torch: the places of those of a minibatch, and their counts.

    Of counts on disk, blocks of neighbours come in a random order, and cells are shuffled within a few of them; all minibatches but the
    last are full. Of several processes each takes its part of a minibatch, which may be empty, or reads its own blocks; all take the
    same number of steps.

    >>> batches = shuffled(csr_array((5, 2), dtype="float32"), torch.arange(5), 2)
    >>> [(len(places), counts.shape) for places, counts in batches]
    [(2, (2, 2)), (2, (2, 2)), (1, (1, 2))]
    """
    if isinstance(counts, StoredCounts):
        yield from _own_blocks(counts, index.sort().values, minibatch, processes)
        return
    for minibatch_places in index[processes.agreed(torch.randperm(len(index)))].split(minibatch):
        places = processes.part(minibatch_places)
        yield places, counts[places.numpy()]


def _own_blocks(counts: StoredCounts, index: Int[Tensor, " cell"], minibatch: int, processes: Processes) -> Iterator[Batch]:
    """Read this process's blocks, and wait where others have more: each takes of a minibatch what it has of all cells."""
    blocks = index.split(_block(len(index), processes.n))
    order = processes.agreed(torch.randperm(len(blocks)))
    cells = [sum(len(blocks[k]) for k in order[rank :: processes.n]) for rank in range(processes.n)]
    sizes = [max(1, -(-minibatch * n // len(index))) for n in cells]
    n_steps, own = max(-(-n // size) for n, size in zip(cells, sizes, strict=True)), 0
    if cells[processes.rank]:
        for batch in _from_disk(counts, [blocks[k] for k in processes.part(order)], sizes[processes.rank]):
            own += 1
            yield batch
    for _ in range(n_steps - own):
        yield index[:0], csr_array((0, counts.shape[1]), dtype="float32")


def _block(n_cells: int, n: int) -> int:
    """Return how many neighbours are read together: fewer, where several processes would otherwise get few blocks, and unequal parts."""
    return BLOCK if n == 1 else min(BLOCK, max(1, n_cells // (8 * n)))


def _from_disk(counts: StoredCounts, blocks: Sequence[Tensor], minibatch: int) -> Iterator[Batch]:
    """Read a buffer of blocks while the one before is used; what is left over of it comes first in the next."""
    buffers = [torch.cat(list(blocks[first : first + BUFFER])) for first in range(0, len(blocks), BUFFER)]
    rest, rest_counts = buffers[0][:0], csr_array((0, counts.shape[1]), dtype="float32")
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
                rest, rest_counts = rest[:0], rest_counts[:0]


def _stacked(first: csr_array, second: csr_array) -> csr_array:
    """Return the rows of both."""
    return csr_array(vstack([first, second], format="csr")) if first.shape[0] else second
