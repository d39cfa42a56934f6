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
"""Gives the support rows and the query rows of each task."""

BLOCK_TASKS = 64
PART_CELLS = 1 << 12
"""What it costs to compute some tasks on their own, whatever they are, in padded rows."""


def num_batches(num_tasks: int, tasks_per_batch: int) -> int:
    """Count the batches of an epoch, the last of which may be short."""
    return -(-num_tasks // tasks_per_batch)


def batches_of_pass(
    num_support: Tasks,
    num_query: Tasks,
    cells_per_row: Tasks,
    tasks_per_batch: int,
    max_cells: int,
    window_batches: int,
) -> list[Tasks]:
    """Cut a pass over all tasks (evaluation) into batches with little padding, positions in the split.

    Sizes and `cells_per_row`, as `cheapest_ends` takes them, are int64 [num_tasks]. Windows of consecutive tasks, so
    that reads stay near-sequential, are bucketed by size as in training. Each bucket, in ascending order of rows, is
    cut where that is worth a batch: `cheapest_ends`.
    """
    batches: list[Tasks] = []
    length = tasks_per_batch * window_batches
    for start in range(0, len(num_support), length):
        part = slice(start, start + length)
        support, query, cells = num_support[part], num_query[part], cells_per_row[part]
        for members in bucket_by_size(support, query, tasks_per_batch):
            tasks = members[np.argsort((support + query)[members], kind="stable")]
            ends = cheapest_ends(support[tasks], query[tasks], cells[tasks], max_cells)
            batches += np.split(start + tasks, ends[:-1])
    return batches


def cheapest_ends(num_support: Tasks, num_query: Tasks, cells_per_row: Tasks, max_cells: int) -> tuple[int, ...]:
    """Cut consecutive tasks into parts that are padded on their own, at least cost; returns where each part ends.

    A part costs its cells, tasks times (longest support + longest query) times what its longest row counts, and
    `PART_CELLS` besides. `cells_per_row` [num_tasks] is what `PackSplit.cells_per_row` gives: 1 without sequences. A
    part has at most `max_cells` cells, but for a task that alone has more. So padding is at most `PART_CELLS` a task.
    """
    num_tasks = len(num_support)
    cells = num_tasks * int(num_support.max(initial=0) + num_query.max(initial=0)) * int(cells_per_row.max(initial=1))
    if cells <= max_cells and cells - int(((num_support + num_query) * cells_per_row).sum()) <= PART_CELLS:
        return (num_tasks,)
    best, begin = np.zeros(num_tasks + 1), np.zeros(num_tasks + 1, np.int64)  # of the first so many tasks
    for end in range(1, num_tasks + 1):
        sizes = (num_support, num_query, cells_per_row)
        support, query, row = (np.maximum.accumulate(size[:end][::-1]) for size in sizes)
        of_part = np.arange(1, end + 1) * (support + query) * row  # of the last 1, 2, … of them
        cost = best[:end][::-1] + of_part + PART_CELLS
        cost[1:][of_part[1:] > max_cells] = np.inf
        size = int(cost.argmin())
        best[end], begin[end] = cost[size], end - 1 - size
    ends = [num_tasks]
    while begin[ends[-1]] > 0:
        ends.append(int(begin[ends[-1]]))
    return tuple(reversed(ends))


def ends_within(num_support: Tasks, num_query: Tasks, cells_per_row: Tasks, max_cells: int | None) -> tuple[int, ...]:
    """Cut consecutive tasks into parts that are padded on their own; returns where each part ends.

    Together they are padded to the longest support, the longest query and the longest row; cells are those of
    `cheapest_ends`. There is one part where that is no more than `max_cells` of them. Otherwise parts have at most a
    quarter of that each: one task is then far longer than its neighbours, and must not pad as many of them as still
    fit. A task that alone has more is a part of its own.
    """
    num_tasks = len(num_support)
    rows = int(num_support.max(initial=0) + num_query.max(initial=0))
    if max_cells is None or num_tasks * rows * int(cells_per_row.max(initial=1)) <= max_cells:
        return (num_tasks,)
    ends: list[int] = []
    start = support = query = row = 0
    for i, (s, q, r) in enumerate(zip(num_support.tolist(), num_query.tolist(), cells_per_row.tolist(), strict=True)):
        support, query, row = max(support, s), max(query, q), max(row, r)
        if i > start and (i + 1 - start) * (support + query) * row > max_cells // 4:
            ends.append(i)
            start, support, query, row = i, s, q, r
    return (*ends, num_tasks)


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
    scenarios: Callable[[Tasks], Tasks] | None = None,
) -> list[Tasks]:
    """Return the batches of one window of an epoch: batch k of the epoch is number k % window_batches of window
    k // window_batches.

    Every task is in exactly one batch of an epoch. Only the epoch's last batch may be short. The tasks in it are a
    random draw of all, because a task of a short batch weighs more.

    Not `sequential`, blocks have one task. Without `size_buckets`, batches are cut from the window as it is shuffled.
    With `scenarios`, which gives that of each task, they are cut from its tasks scenario by scenario, in an order of
    scenarios that is the window's own: no buckets then, and a batch in which one ends has the first tasks of the next.
    """
    length = tasks_per_batch * window_batches
    block = BLOCK_TASKS if sequential else 1
    short = _short_batch(num_tasks, num_tasks % tasks_per_batch, seed, epoch)
    num_full = num_tasks - len(short)
    stream = _stream(num_full, seed, epoch, block, window * length, min((window + 1) * length, num_full))
    stream += np.searchsorted(np.sort(short) - np.arange(len(short)), stream, side="right")  # step over the short batch
    full = stream[permutation(len(stream), seed, epoch, window)]
    if scenarios is not None:
        turn = keyed_hash(scenarios(full), seed, epoch, window, 3)
        shuffled = list(full[np.argsort(turn, kind="stable")].reshape(-1, tasks_per_batch))
        return [*shuffled, short] if len(short) and window == num_full // length else shuffled
    if size_buckets:
        batches = [full[members] for members in bucket_by_size(*sizes(full), tasks_per_batch)]
    else:
        batches = list(full.reshape(-1, tasks_per_batch))
    shuffled = [batches[i] for i in permutation(len(batches), seed, epoch, window, 1)]
    return [*shuffled, short] if len(short) and window == num_full // length else shuffled


def bucket_by_size(num_support: Tasks, num_query: Tasks, size: int) -> list[Tasks]:
    """Cut tasks into groups of `size` (the last may be smaller) with little padding; returns positions.

    A batch is padded to its largest support and its largest query, so groups must be narrow in both: halve along the
    side with the wider range until one group is left. Ties keep their order.
    """

    def halve(members: Tasks) -> list[Tasks]:
        if len(members) <= size:
            return [members] if len(members) else []
        support, query = num_support[members], num_query[members]
        support_range, query_range = np.ptp(support), np.ptp(query)
        if support_range == query_range == 0:
            # What halving would come to, without its 63 sorts for 64 groups.
            return np.split(members, range(size, len(members), size))
        wider = support if support_range >= query_range else query
        ranked = members[np.argsort(wider, kind="stable")]
        middle = (len(members) // size + 1) // 2 * size
        return halve(ranked[:middle]) + halve(ranked[middle:])

    return halve(np.arange(len(num_support)))


def tasks_per_rank(cost: Tasks, world_size: int, fractions: Sequence[float] | None = None) -> list[slice]:
    """Split the tasks of a batch over ranks: each gets consecutive ones, of about equal cost, or as `fractions` says.

    A task goes to the rank in whose part of the total cost its middle lies, so that a rank's cost is off by at most one
    task's, and a rank may get none. Tasks of similar size are neighbours, so that consecutive ones pad least.
    """
    weights = np.ones(world_size) if fractions is None else np.asarray(fractions, dtype=np.float64)
    if len(weights) != world_size or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"fractions are {fractions}: must be {world_size} numbers, not negative, not all 0")
    middle = np.cumsum(cost) - cost / 2
    ends = np.cumsum(weights) * (cost.sum() / weights.sum())
    bounds = [0, *np.searchsorted(middle, ends[:-1], side="left").tolist(), len(cost)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def permutation(n: int, *key: int) -> Tasks:
    """Return a permutation of 0 … n - 1 that is a function of the key alone."""
    return np.argsort(keyed_hash(np.arange(n), *key), kind="stable")


def keyed_hash(values: Tasks, *key: int) -> NDArray[np.uint64]:
    """Hash each value under a key of non-negative integers, each to 64 bits."""
    start = reduce(lambda state, k: splitmix64(state + np.uint64(k)), key, np.zeros(1, np.uint64))
    return splitmix64(start + values.astype(np.uint64))


@lru_cache(maxsize=2)
def _short_batch(num_tasks: int, count: int, seed: int, epoch: int) -> Tasks:
    """Draw `count` different tasks: of hash values modulo `num_tasks`, in turn, those that have not come before."""
    drawn, draws = np.zeros(0, np.int64), 2 * count
    while len(drawn) < count:
        values = keyed_hash(np.arange(draws), seed, epoch, 0, 2) % np.uint64(num_tasks)
        _, first = np.unique(values, return_index=True)
        drawn, draws = values[np.sort(first)][:count].astype(np.int64), 2 * draws
    return drawn


@lru_cache(maxsize=2)
def _blocks(num_tasks: int, seed: int, epoch: int, block_tasks: int) -> tuple[Tasks, Tasks]:
    """Return the epoch's blocks in their permuted order: the first task of each, and its end in the stream."""
    starts = np.arange(0, num_tasks, block_tasks)
    starts = starts[permutation(len(starts), seed, epoch)]
    return starts, np.cumsum(np.minimum(block_tasks, num_tasks - starts))


def _stream(num_tasks: int, seed: int, epoch: int, block_tasks: int, first: int, last: int) -> Tasks:
    """Return the tasks at positions [first, last) of the epoch's stream of permuted blocks."""
    starts, ends = _blocks(num_tasks, seed, epoch, block_tasks)
    position = np.arange(first, last)
    block = np.searchsorted(ends, position, side="right")
    # A block ends at task min(start + block_tasks, num_tasks); count back from there.
    tasks: Tasks = np.minimum(starts[block] + block_tasks, num_tasks) - (ends[block] - position)
    return tasks
