"""Metrics of the first k rows of each task, by falling score. docs/evaluation.md defines each.

Tied rows have no order. Each metric is its expected value over all orders of tied rows, in closed form (McSherry &
Najork 2008), so that a constant score earns what chance earns, and no metric depends on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TaskOrder:
    """Rows sorted by task and, within a task, by a key; rows of equal key form a group."""

    index: IntArray  # [N], where the sorted rows stand among the unsorted
    task: IntArray  # [N], rising
    rank: IntArray  # [N], place in the task, from 0
    group: IntArray  # [N], rising over all tasks
    num_tasks: int

    @staticmethod
    def build(task: IntArray, key: NDArray[Any], num_tasks: int) -> TaskOrder:
        """Sort rows by rising `key` [N] within their `task` [N]."""
        index = np.lexsort((key, task))
        task, key = task[index], key[index]
        count = np.bincount(task, minlength=num_tasks)
        rank = np.arange(len(task)) - (np.cumsum(count) - count)[task]
        return TaskOrder(index, task, rank, np.cumsum(group_starts(task, key)) - 1, num_tasks)


def group_starts(*keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark where any of the sorted keys differs from the row before."""
    start = np.ones(len(keys[0]), dtype=np.bool_)
    if len(start):
        start[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return start


def dcg(order: TaskOrder, gain: FloatArray, k: int) -> FloatArray:
    """Return DCG@k of each task, [tasks]; `gain` [N] is that of the unsorted rows. Tied rows share their mean gain."""
    discount = np.where(order.rank < k, 1 / np.log2(order.rank + 2), 0.0)
    tied_gain = np.bincount(order.group, gain[order.index]) / np.bincount(order.group)
    values = np.bincount(order.task, discount * tied_gain[order.group], minlength=order.num_tasks)
    return values.astype(np.float64)


@dataclass(frozen=True)
class TopPlaces:
    """What is expected on the first k places of each task, over all orders of tied rows; 0 on places without a row."""

    relevance: FloatArray  # [tasks, k], chance that the row there is relevant
    hazard: FloatArray  # [tasks, k], the same, given that no row before it is
    precision: FloatArray  # [tasks, k], expected (relevance there) · (fraction of relevant rows up to there)
    num_relevant: FloatArray  # [tasks], among all rows of the task

    @staticmethod
    def build(order: TaskOrder, relevant: NDArray[np.bool_], k: int) -> TopPlaces:
        """Look at the first k places; `relevant` [N] is that of the unsorted rows."""
        starts = np.flatnonzero(group_starts(order.group))
        size = np.bincount(order.group)
        hits = np.bincount(order.group, relevant[order.index])
        num_relevant = np.bincount(order.task[starts], hits, minlength=order.num_tasks)
        # Relevant rows of the task in groups before this one.
        before = np.cumsum(hits) - hits - (np.cumsum(num_relevant) - num_relevant)[order.task[starts]]
        top = order.rank < k
        group, rank = order.group[top], order.rank[top]
        earlier = rank - order.rank[starts][group]  # tied rows on places before
        size, hits = size[group], hits[group]
        chance = hits / size
        # Of the tied rows before, each is relevant with this chance where the row here is.
        other = (hits - 1) / np.maximum(size - 1, 1)
        place = order.task[top], rank

        def matrix(values: NDArray[Any]) -> FloatArray:
            out = np.zeros((order.num_tasks, k))
            out[place] = values
            return out

        return TopPlaces(
            relevance=matrix(chance),
            hazard=matrix(np.minimum(hits / (size - earlier), 1.0)),
            precision=matrix(chance * (1 + before[group] + earlier * other) / (rank + 1)),
            num_relevant=num_relevant.astype(np.float64),
        )

    @property
    def none_upto(self) -> FloatArray:
        """Return the chance that no row up to a place is relevant, [tasks, k]."""
        return np.asarray(np.cumprod(1 - self.hazard, axis=1), dtype=np.float64)


def _precision(top: TopPlaces) -> FloatArray:
    return np.asarray(top.relevance.mean(axis=1), dtype=np.float64)


def _recall(top: TopPlaces) -> FloatArray:
    return np.asarray(top.relevance.sum(axis=1) / np.maximum(top.num_relevant, 1), dtype=np.float64)


def _hit_rate(top: TopPlaces) -> FloatArray:
    return np.asarray(1 - top.none_upto[:, -1], dtype=np.float64)


def _average_precision(top: TopPlaces) -> FloatArray:
    most = np.clip(top.num_relevant, 1, top.precision.shape[1])
    return np.asarray(top.precision.sum(axis=1) / most, dtype=np.float64)


def _reciprocal_rank(top: TopPlaces) -> FloatArray:
    k = top.hazard.shape[1]
    first = top.hazard * np.concatenate([np.ones((len(top.hazard), 1)), top.none_upto[:, :-1]], axis=1)
    return np.asarray(first @ (1 / np.arange(1, k + 1)), dtype=np.float64)


TOP_K: dict[str, Callable[[TopPlaces], FloatArray]] = {
    "precision": _precision,
    "recall": _recall,
    "hit_rate": _hit_rate,
    "map": _average_precision,
    "mrr": _reciprocal_rank,
}
"""Name -> value of each task [tasks]; it means nothing for a task without a relevant row."""

SAMPLED = "sampled_"
"""Begins the name of a metric of ranks among a sample of the candidates."""
PLACE_METRICS = (
    *(f"{name}@{k}" for k in (1, 5, 10, 50) for name in ("recall", "ndcg", "mrr")),
    "mrr",
    *(f"{SAMPLED}{name}@{k}" for k in (1, 10) for name in ("recall", "ndcg")),
)
"""Metrics of next-item runs, where each task has one relevant item, and all others are ranked with it."""
