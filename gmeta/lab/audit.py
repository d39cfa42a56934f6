"""Checks that every task of every epoch took effect exactly once, from metrics.jsonl and the pack alone.

Nothing is taken from the ledger or the coordinator. What each batch held is computed again from the order, and what of
it took effect follows from what the trainer logged step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmeta.config.train import TrainConfig
from gmeta.data.order import Tasks, num_batches, window_of_batches
from gmeta.data.shards import PackSplit


@dataclass
class Audit:
    """Tasks counted over all epochs."""

    expected: int = 0
    lost: int = 0  # that took effect in no step of an epoch
    repeated: int = 0  # effects too many
    problems: list[str] = field(default_factory=list)  # records that contradict the order

    @property
    def exactly_once(self) -> bool:
        """Whether nothing was lost, repeated or contradictory."""
        return not (self.lost or self.repeated or self.problems)


def audit(records: Sequence[Mapping[str, Any]], split: PackSplit, config: TrainConfig) -> Audit:
    """Check a run that has finished its epochs. `records` are those of kind train."""
    found = Audit(expected=split.num_tasks * config.schedule.epochs)
    size = config.loader.tasks_per_batch
    for epoch in range(config.schedule.epochs):
        order = list(batches_of(split, config, epoch))
        effects = np.zeros(split.num_tasks, np.int64)
        tail: list[int] = []
        for record in records:
            if record["epoch"] != epoch:
                continue
            index = record["index"]
            tasks = order[index] if index < len(order) else np.asarray(tail[:size], np.int64)
            tail = tail if index < len(order) else tail[size:]
            back = record["put_back"]
            if sum(record["slots"]) != len(tasks):
                text = (
                    f"{sum(record['slots'])} tasks were divided among ranks for the {len(tasks)} tasks of batch {index}"
                )
                found.problems.append(f"step {record['step']}: {text}")
            if not set(back) <= set(tasks.tolist()):
                found.problems.append(f"step {record['step']}: tasks were put back that were not in the batch")
            np.add.at(effects, tasks, 1)
            np.add.at(effects, np.asarray(back, np.int64), -1)
            tail += back
        found.lost += int((effects < 1).sum())
        found.repeated += int((effects - 1).clip(min=0).sum())
    return found


def batches_of(split: PackSplit, config: TrainConfig, epoch: int) -> Iterator[Tasks]:
    """Yield the batches of an epoch, in order, as positions in the split."""
    loader = config.loader
    batches = num_batches(split.num_tasks, loader.tasks_per_batch)
    for window in range(-(-batches // loader.window_batches)):
        yield from window_of_batches(
            split.num_tasks,
            split.sizes,
            tasks_per_batch=loader.tasks_per_batch,
            window_batches=loader.window_batches,
            seed=config.seed,
            epoch=epoch,
            window=window,
        )
