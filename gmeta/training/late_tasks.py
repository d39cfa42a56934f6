"""Tasks that a slow rank leaves for later (`DROP_LATE` of an elastic group).

A rank whose first micro-batch took longer than the split allows begins no further one. The step is then a sum over
fewer tasks, and the tasks that were left come again at the end of the epoch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, TaskBatch
from gmeta.recommender.system import PreparedBatch


def too_late(batch: TaskBatch, begun_s: float, device: torch.device) -> bool:
    """Say whether to leave the rest of the batch for the epoch's tail. The first micro-batch is always computed.

    `begun_s` is when the first one began, by `time.perf_counter`.
    """
    if batch.drop_after_s is None:
        return False
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun_s > batch.drop_after_s


def finished_names(batch: TaskBatch) -> tuple[str, ...]:
    """Return the names of the sums that count the micro-batches each rank finished. They are empty where no rank may
    leave any.
    """
    if batch.batch_split is None or batch.drop_after_s is None:
        return ()
    return tuple(f"finished_{rank}" for rank in range(len(batch.batch_split.ends)))


def used_rows(prepared: PreparedBatch, rows: EmbeddedRows, finished: int) -> dict[str, Tensor] | None:
    """Return which fetched rows the first `finished` micro-batches read: table -> bool [U]. It is None where nothing
    may be left.

    Rows that only unfinished tasks read do not take part in the step. Otherwise weight decay and moments would move
    them twice.
    """
    if prepared.batch.drop_after_s is None:
        return None
    complete = finished == len(prepared.parts)
    used = {table: w.new_full(w.shape[:1], complete, dtype=torch.bool) for table, w in rows.weights.items()}
    for part in prepared.parts[:finished]:
        if part.lookups is None:  # the batch is one
            continue
        for side, lookups in zip((part.tasks.support, part.tasks.query), part.lookups, strict=True):
            for found in lookups.values():
                index = found.index if found.lengths is not None else found.index[side.mask]
                used[found.table][index] = True
    for found in rows.shared.values() if finished else ():
        used[found.table][found.index] = True
    return used


def rescale(batch: TaskBatch, finished_tasks: Tensor) -> Tensor | None:
    """Return the factor [] from a sum divided by all tasks of the batch to one divided by those that were finished."""
    return None if batch.drop_after_s is None else batch.num_tasks_global / finished_tasks


def dropped_tasks(batch: TaskBatch, stats: Mapping[str, float]) -> NDArray[np.int64]:
    """Return the tasks that no rank finished, from the step's global statistics: positions in the split."""
    if batch.batch_split is None or batch.drop_after_s is None:
        return np.zeros(0, np.int64)
    return batch.batch_split.unfinished([int(stats[name]) for name in finished_names(batch)])
