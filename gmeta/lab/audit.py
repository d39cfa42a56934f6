"""Checks that every task of every epoch took effect exactly once, from metrics.jsonl and the pack alone.

With `loader.episode_rows` a task here is an episode, as in the loader.
Nothing is taken from the ledger or the coordinator. What each batch held is computed again from the order, and what of
it took effect follows from what the trainer logged step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmeta.config.train import TrainConfig
from gmeta.data.episodes import Episodes
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
    num_tasks, size = _num_tasks(split, config), config.loader.tasks_per_batch
    found = Audit(expected=num_tasks * config.schedule.epochs)
    for epoch in range(config.schedule.epochs):
        order = list(batches_of(split, config, epoch))
        effects = np.zeros(num_tasks, np.int64)
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
    """Yield the batches of an epoch, in order, as positions among the split's tasks or episodes."""
    loader, num_tasks = config.loader, _num_tasks(split, config)
    batches = num_batches(num_tasks, loader.tasks_per_batch)
    located = Episodes(split, loader.episode_rows).locate if loader.episode_rows else split.locate

    def sizes(tasks: Tasks) -> tuple[Tasks, Tasks]:
        at = located(tasks).last_support(loader.max_support_rows)
        return at.num_support, at.num_query

    for window in range(-(-batches // loader.window_batches)):
        yield from window_of_batches(
            num_tasks,
            sizes,
            tasks_per_batch=loader.tasks_per_batch,
            window_batches=loader.window_batches,
            seed=config.seed,
            epoch=epoch,
            window=window,
        )


def _num_tasks(split: PackSplit, config: TrainConfig) -> int:
    episode_rows = config.loader.episode_rows
    return Episodes(split, episode_rows).num_episodes if episode_rows else split.num_tasks
