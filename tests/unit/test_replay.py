"""Replay: older tasks among the new ones, as a function of (seed, epoch, number), whatever the number of workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import DATA_SCHEMA, ITEMS, SCHEMA, make_pack, values_of

from gmeta.core.batch import TaskBatch
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.replay import Evicted, Replay, evicted_ids, require_older

NEW, OLD, DRAWN = 24, 50, 6


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskPack, TaskPack]:
    """A new pack, and an older one with other tasks."""
    place = tmp_path_factory.mktemp("packs")
    return open_pack(make_pack(place / "new", NEW)), open_pack(make_pack(place / "old", OLD, seed=2))


def loader(packs: tuple[TaskPack, TaskPack], **changes: Any) -> TaskLoader[TaskBatch]:
    new, old = (pack.split("train") for pack in packs)
    settings = {"tasks_per_batch": 7, "seed": 3, "window_batches": 2, "prefetch": 0, "replay": (old, 0.2)}
    return TaskLoader(new, **{**settings, **changes})


def labels(batch: TaskBatch) -> list[tuple[float, ...]]:
    """What tells the tasks of a batch apart: the numbers of their query rows."""
    return [
        tuple(dense[mask].flatten().tolist()) for dense, mask in zip(batch.query.dense, batch.query.mask, strict=True)
    ]


def tasks_of(pack: TaskPack) -> set[tuple[float, ...]]:
    split = pack.split("train")
    _, query, task_id = split.examples(np.arange(split.num_tasks))
    return set(labels(TaskBatch(query, query, task_id, len(task_id), 0, 0)))


def test_an_epoch_has_all_new_tasks_and_a_share_of_older_ones(packs: tuple[TaskPack, TaskPack]) -> None:
    batches = loader(packs)
    assert (batches.num_tasks, batches.batches_per_epoch) == (NEW + DRAWN, 5)
    new, old = (tasks_of(pack) for pack in packs)
    drawn = []
    for _ in range(3):
        epoch = [task for batch in islice(batches, 5) for task in labels(batch)]
        assert len(set(epoch)) == len(epoch) == NEW + DRAWN
        assert new < set(epoch)
        drawn.append(set(epoch) - new)
        assert drawn[-1] <= old
    assert len(set.union(*drawn)) > DRAWN


@pytest.mark.parametrize("num_old", [3, 6, 50, 1000])
def test_older_tasks_come_equally_often(num_old: int) -> None:
    replay = Replay(5, NEW, num_old, 0.2)
    assert replay.num_drawn == min(num_old, DRAWN)
    tasks, count = np.arange(replay.num_tasks), Counter[int]()
    for epoch in range(400):
        found = replay.positions(tasks, epoch)
        np.testing.assert_array_equal(found[:NEW], tasks[:NEW])
        assert (np.diff(found[NEW:]) > 0).all()
        assert NEW <= found[NEW] <= found[-1] < NEW + num_old
        count.update(found[NEW:].tolist())
    expected = 400 * replay.num_drawn / num_old
    assert all(abs(count[NEW + i] - expected) < 5 * expected**0.5 + 1 for i in range(num_old))


@pytest.mark.parametrize("changes", [{}, {"episode_rows": 4}, {"resample": True, "max_support_rows": 3}])
def test_workers_have_the_tasks_of_one(packs: tuple[TaskPack, TaskPack], changes: dict[str, Any]) -> None:
    alone = loader(packs, **changes)
    for world_size in (2, 4):
        ranks = [loader(packs, rank=rank, world_size=world_size, **changes) for rank in range(world_size)]
        alone.load_state_dict({"epoch": 0, "index": 0})
        for _ in range(2 * alone.batches_per_epoch):
            together = [task for rank in ranks for task in labels(next(rank))]
            assert together == labels(next(alone))


def test_it_resumes_at_every_step(packs: tuple[TaskPack, TaskPack]) -> None:
    batches = loader(packs, prefetch=2)
    with batches:
        states, found = [], []
        for _ in range(11):
            states.append(batches.state_dict())
            found.append(labels(next(batches)))
    for at, state in enumerate(states):
        again = loader(packs)
        again.load_state_dict(state)
        assert [labels(next(again)) for _ in found[at:]] == found[at:]


def test_ids_may_grow_and_be_evicted(packs: tuple[TaskPack, TaskPack], tmp_path: Path) -> None:
    """An id that was evicted since is unknown in rows that are replayed."""

    def values(table: str, num_ids: int) -> list[str | None]:
        found: list[str | None] = list(values_of(table, num_ids))
        return [None if value in ("item5", "tags2") else value for value in found]

    grown = open_pack(make_pack(tmp_path / "grown", NEW, values=values))  # type: ignore[arg-type]
    require_older(grown, packs[1])
    assert evicted_ids(packs[0]) is None
    evicted = evicted_ids(grown)
    assert isinstance(evicted, Evicted)
    batch = next(loader((grown, packs[1]), tasks_per_batch=NEW + DRAWN))
    masked = evicted(batch)
    for side, before in ((masked.support, batch.support), (masked.query, batch.query)):
        assert torch.equal(side.ids["item"], torch.where(before.ids["item"] == 5, 0, before.ids["item"]))
        assert torch.equal(side.ids["group"], before.ids["group"])
        tags = before.bags["tags"].values
        assert torch.equal(side.bags["tags"].values, torch.where(tags == 2, 0, tags))
    assert (batch.query.ids["item"] == 5).any()


def shifted(table: str, num_ids: int) -> list[str]:
    return values_of(table, num_ids) if table != "item" else [f"item{i}" for i in range(2, ITEMS + 1)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"values": shifted}, "id 1 of vocabulary 'item' is 'item2', expected 'item1'"),
        ({"data_schema": "threshold"}, "label_threshold is 0.5, expected None"),
        ({"schema": "price"}, "numeric column 'price': mean is 1.0, expected 0.0"),
    ],
)
def test_an_older_pack_of_other_ids_or_numbers_is_refused(
    packs: tuple[TaskPack, TaskPack], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    if "schema" in changes:
        changes = {"schema": replace(SCHEMA, numeric=(SCHEMA.numeric[0], replace(SCHEMA.numeric[1], mean=1.0)))}
    if "data_schema" in changes:
        changes = {"data_schema": replace(DATA_SCHEMA, label_threshold=0.5)}
    other = open_pack(make_pack(tmp_path / "other", 10, **changes))
    with pytest.raises(ValueError, match="cannot be replayed beside") as caught:
        require_older(packs[0], other)
    assert told in str(caught.value)
