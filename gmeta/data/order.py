"""Which tasks batch (seed, epoch, index) holds, and who computes them: pure functions, no state.

Blocks of consecutive tasks are permuted by (seed, epoch), so that reads stay near-sequential. The permuted stream is
cut into windows of `window_batches` batches; a window is shuffled, bucketed by size and cut into batches of
`tasks_per_batch` tasks (G). Nothing here depends on the number of workers. Randomness is a hash, not a generator:
numpy may change its generators' streams between releases, an order that checkpoints refer to may not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gmeta.core.hashing import splitmix64

Tasks = NDArray[np.int64]
Sizes = Callable[[Tasks], tuple[Tasks, Tasks]]
"""Tasks -> (support rows, query rows) of each."""

BLOCK_TASKS = 64


def num_batches(num_tasks: int, tasks_per_batch: int) -> int:
    """Batches of an epoch; the last may be short."""
    return -(-num_tasks // tasks_per_batch)


def stored_batch(num_tasks: int, tasks_per_batch: int, index: int) -> Tasks:
    """Batch `index` of a pass in stored order (evaluation)."""
    return np.arange(index * tasks_per_batch, min((index + 1) * tasks_per_batch, num_tasks))


def window_of_batches(
    num_tasks: int,
    sizes: Sizes,
    *,
    tasks_per_batch: int,
    window_batches: int,
    seed: int,
    epoch: int,
    window: int,
    sequential: bool = True,
    size_buckets: bool = True,
) -> list[Tasks]:
    """The batches of one window of an epoch: batch k of the epoch is number k % window_batches of window
    k // window_batches.

    Every task is in exactly one batch of an epoch. Only the epoch's last batch may be short, and the tasks in it
    are a random draw of its window, because a task of a short batch weighs more.

    Not `sequential`: blocks of one task. Without `size_buckets`, batches are cut from the shuffled window as it comes.
    """
    length = tasks_per_batch * window_batches
    block = BLOCK_TASKS if sequential else 1
    stream = _stream(num_tasks, seed, epoch, block, window * length, min((window + 1) * length, num_tasks))
    tasks = stream[permutation(len(stream), seed, epoch, window)]
    num_full = len(tasks) // tasks_per_batch * tasks_per_batch
    full, short = tasks[:num_full], tasks[num_full:]
    if size_buckets:
        batches = [full[slots] for slots in bucket_by_size(*sizes(full), tasks_per_batch)]
    else:
        batches = list(full.reshape(-1, tasks_per_batch))
    shuffled = [batches[i] for i in permutation(len(batches), seed, epoch, window, 1)]
    return [*shuffled, short] if len(short) else shuffled


def bucket_by_size(num_support: Tasks, num_query: Tasks, size: int) -> list[Tasks]:
    """Cut tasks into groups of `size` (the last may be smaller) with little padding; returns positions.

    A batch is padded to its largest support and its largest query, so groups must be narrow in both: halve along the
    side with the wider range until one group is left. Ties keep their order.
    """

    def halve(slots: Tasks) -> list[Tasks]:
        if len(slots) <= size:
            return [slots] if len(slots) else []
        support, query = num_support[slots], num_query[slots]
        support_range, query_range = np.ptp(support), np.ptp(query)
        if support_range == query_range == 0:
            # What halving would come to, without its 127 sorts for 64 groups.
            return np.split(slots, range(size, len(slots), size))
        wider = support if support_range >= query_range else query
        ranked = slots[np.argsort(wider, kind="stable")]
        middle = (len(slots) // size + 1) // 2 * size
        return halve(ranked[:middle]) + halve(ranked[middle:])

    return halve(np.arange(len(num_support)))


def split_slots(cost: Tasks, world_size: int, shares: Sequence[float] | None = None) -> list[slice]:
    """Each rank's slots of a batch: consecutive, of about equal cost, or in proportion to `shares` (one a rank).

    A slot goes to the rank in whose part of the total cost its middle lies, so a rank's cost is off by at most one
    slot's, and a rank may get none. Slots of similar size are neighbours, so consecutive ones pad least.
    """
    weights = np.ones(world_size) if shares is None else np.asarray(shares, dtype=np.float64)
    if len(weights) != world_size or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"shares are {shares}: must be {world_size} numbers, not negative, not all 0")
    middle = np.cumsum(cost) - cost / 2
    ends = np.cumsum(weights) * (cost.sum() / weights.sum())
    cuts = [0, *np.searchsorted(middle, ends[:-1], side="left").tolist(), len(cost)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def permutation(n: int, *key: int) -> Tasks:
    """A permutation of n that is a function of the key alone."""
    return np.argsort(keyed_hash(np.arange(n), *key), kind="stable")


def keyed_hash(values: Tasks, *key: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each value under a key of non-negative integers."""
    start = reduce(lambda state, k: splitmix64(state + np.uint64(k)), key, np.zeros(1, np.uint64))
    return splitmix64(start + values.astype(np.uint64))


@lru_cache(maxsize=2)
def _blocks(num_tasks: int, seed: int, epoch: int, block_tasks: int) -> tuple[Tasks, Tasks]:
    """The epoch's blocks in their permuted order: (first task of each, its end in the stream)."""
    starts = np.arange(0, num_tasks, block_tasks)
    starts = starts[permutation(len(starts), seed, epoch)]
    return starts, np.cumsum(np.minimum(block_tasks, num_tasks - starts))


def _stream(num_tasks: int, seed: int, epoch: int, block_tasks: int, first: int, last: int) -> Tasks:
    """Tasks at places [first, last) of the epoch's block-permuted stream."""
    starts, ends = _blocks(num_tasks, seed, epoch, block_tasks)
    place = np.arange(first, last)
    block = np.searchsorted(ends, place, side="right")
    # A block ends at task min(start + block_tasks, num_tasks); count back from there.
    tasks: Tasks = np.minimum(starts[block] + block_tasks, num_tasks) - (ends[block] - place)
    return tasks
