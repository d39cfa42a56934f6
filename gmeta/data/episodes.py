"""Several episodes an epoch of one long task: stretches of its rows, each with a support and a query of its own.

Episodes are numbered through the split as tasks are, so that the order of batches, positions and resuming know nothing
of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gmeta.data.layout import Array
from gmeta.data.shards import PackSplit, TaskRows


class Episodes:
    """The episodes of a split's tasks: a task of at most `most_rows` rows is one, a longer one is several.

    A task of n rows gives k = ceil(n / most_rows) episodes of consecutive rows in stored order, about equally many
    each: rows n·i // k to n·(i + 1) // k. Every row is in one of them. The first rows of an episode are its support,
    the others its query: the side that is the shorter one in the task keeps its size, but for at most half of the rows.
    """

    def __init__(self, split: PackSplit, most_rows: int) -> None:
        support, query = split.unverified_sizes()
        self._split = split
        self._most_rows = most_rows
        self._ends = np.cumsum(-(-(support + query) // most_rows))  # of each task's episodes in the numbering
        self.num_episodes = self.of_first(len(self._ends))

    def of_first(self, num_tasks: int) -> int:
        """Return how many episodes the first so many tasks have, at least one."""
        return int(self._ends[num_tasks - 1])

    def task_of(self, episodes: Array) -> Array:
        """Return the positions of the tasks of episodes, int64 [T]."""
        return np.searchsorted(self._ends, episodes, side="right")

    def locate(self, episodes: Array) -> TaskRows:
        """Look up where episodes lie, int64 [T] numbers of them; as `PackSplit.locate` does for tasks."""
        task = self.task_of(episodes)
        at = self._split.locate(task)
        rows, count = at.num_rows, -(-at.num_rows // self._most_rows)
        place = episodes - (self._ends[task] - count)
        first, last = rows * place // count, rows * (place + 1) // count
        support = _support_of(at, last - first)
        return replace(
            at,
            start=at.start + first,
            num_support=np.where(count == 1, at.num_support, support),
            num_rows=last - first,
        )


def _support_of(at: TaskRows, length: Array) -> Array:
    """Return the support rows of an episode of `length` rows of each task, int64 [T]."""
    shorter = np.minimum(np.minimum(at.num_support, at.num_query), length // 2)
    support: Array = np.where(at.num_support <= at.num_query, shorter, length - shorter)
    return support
