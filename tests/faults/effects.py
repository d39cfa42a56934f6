"""Which tasks took effect in a run, by its metrics.jsonl and the order alone: an account that no ledger has a part in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from gmeta.config import TrainConfig
from gmeta.data.order import window_of_batches
from gmeta.data.pack import open_pack
from gmeta.rundir import read_config


def effects(run_dir: Path) -> dict[int, Counter[int]]:
    """Epoch -> how often each task (position in the split) took effect, of the steps that were not rolled back."""
    config = read_config(run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), "a step is missing, or twice"
    counts: dict[int, Counter[int]] = {}
    tails: dict[int, list[int]] = {}
    for record in records:
        epoch, index = record["epoch"], record["index"]
        batches, tail = _batches(config, epoch), tails.setdefault(epoch, [])
        if index < len(batches):
            tasks = batches[index]
        else:
            size = config.loader.tasks_per_batch
            tasks, tail[:] = tail[:size], tail[size:]
        assert sum(record["slots"]) == len(tasks)
        tail += record["put_back"]
        finished = Counter(tasks)
        finished.subtract(record["put_back"])
        assert min(finished.values()) >= 0, "a task was put back that the batch did not hold"
        counts.setdefault(epoch, Counter()).update(finished)
    return counts


_CACHE: dict[tuple[str, int, int], list[list[int]]] = {}


def _batches(config: TrainConfig, epoch: int) -> list[list[int]]:
    key = (config.pack, config.seed, epoch)
    if key not in _CACHE:
        split = open_pack(config.pack).split("train")
        size, length = config.loader.tasks_per_batch, config.loader.window_batches
        windows = range(-(-split.num_tasks // (size * length)))
        _CACHE[key] = [
            tasks.tolist()
            for window in windows
            for tasks in window_of_batches(
                split.num_tasks,
                split.sizes,
                tasks_per_batch=size,
                window_batches=length,
                seed=config.seed,
                epoch=epoch,
                window=window,
            )
        ]
    return _CACHE[key]


def assert_each_task_once(run_dir: Path) -> None:
    """Every task took effect exactly once in every epoch."""
    config = read_config(run_dir)
    num_tasks = open_pack(config.pack).split("train").num_tasks
    found = effects(run_dir)
    assert sorted(found) == list(range(config.schedule.epochs))
    for epoch, counts in found.items():
        assert {task: n for task, n in counts.items() if n} == dict.fromkeys(range(num_tasks), 1), f"epoch {epoch}"
