"""Masked ids: which, how often, and what goes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from packs import DATA_SCHEMA, ITEMS, SCHEMA, TAGS, USERS, make_pack, values_of

from gmeta.core.batch import Bag, TaskBatch, joined
from gmeta.data.id_dropout import DEFAULT_SHARE, IdDropout, build_id_dropout, default_share
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import PackWriter, TaskPack, open_pack
from gmeta.data.schema import NumericColumn

ALL = ("group", "item", "tags")


def batches(pack: TaskPack, number: int = 4, **how: Any) -> list[TaskBatch]:
    loader: TaskLoader[TaskBatch] = TaskLoader(
        pack.split("train"), **{"tasks_per_batch": 15, "seed": 3, "prefetch": 0, **how}
    )
    return [next(loader) for _ in range(number)]


def dropout(pack: TaskPack, share: float = 0.3, seed: int = 5) -> IdDropout:
    found = build_id_dropout(pack, share, features=ALL, seed=seed)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> TaskPack:
    return open_pack(make_pack(tmp_path_factory.mktemp("masks") / "pack"))


def counted(path: Path, counts: np.ndarray, train_items: np.ndarray, test_items: np.ndarray) -> TaskPack:
    """A pack whose item vocabulary has these counts, with tasks of two rows that hold these items, two by two."""
    with PackWriter(path, SCHEMA, settings={}, data_schema=DATA_SCHEMA.to_json()) as writer:
        for table, num, seen in (("group", USERS, None), ("item", ITEMS, counts), ("tags", TAGS, None)):
            rows = np.full(num - 1, len(train_items)) if seen is None else seen
            writer.write_vocab(table, pa.array(values_of(table, num)), rows)
        first = 0
        for split, items in (("train", train_items), ("test", test_items)):
            rows, tasks = len(items), len(items) // 2
            writer.add_shard(
                split,
                {
                    "ids": np.stack([np.ones(rows, np.int64), items], 1).astype(np.int32),
                    "dense": np.zeros((rows, 2), np.float32),
                    "label": np.zeros(rows, np.float32),
                    "item_cold": np.zeros(rows, np.uint8),
                    "tags.values": np.ones(rows, np.int32),
                    "tags.offsets": np.arange(rows + 1),
                    "task_id": np.arange(first, first + tasks),
                    "row_start": np.arange(0, rows, 2),
                    "num_support": np.ones(tasks, np.int32),
                },
            )
            names = pa.array([f"u{i}" for i in range(first, first + tasks)])
            writer.write_tasks(np.arange(first, first + tasks), names, [split] * tasks)
            first += tasks
        return open_pack(writer.finish())


def test_rare_ids_are_masked_more_and_the_share_is_kept(tmp_path: Path) -> None:
    """Item i has i^2 rows. The probabilities are a / (a + count) for one a."""
    counts = np.arange(1, ITEMS) ** 2
    items = np.repeat(np.arange(1, ITEMS), counts)
    items = items[: len(items) // 2 * 2]
    mask = dropout(counted(tmp_path / "pack", counts, items, items[:2]), 0.1).tables["item"]
    tasks = np.arange(4000, dtype=np.uint64)[:, None] << np.uint64(20)
    often = mask.masked(tasks, np.broadcast_to(np.arange(ITEMS), (4000, ITEMS))).mean(0)
    assert often[0] == 0
    assert (often[1:] * counts).sum() / counts.sum() == pytest.approx(0.1, rel=0.05)
    rate = counts * often[1:] / (1 - often[1:])
    assert rate[1:] == pytest.approx(np.full(ITEMS - 2, rate[1:].mean()), rel=0.35)


def test_one_draw_decides_for_an_id_in_all_rows_of_a_task(pack: TaskPack) -> None:
    """Support, query and lists that share the table: a cold item is cold wherever it stands."""
    whole = batches(pack, 1)[0]
    shared = replace(dropout(pack), tables={name: dropout(pack).tables["item"] for name in ("item", "tags")})
    masked = shared(whole)
    sides = [(getattr(whole, s), getattr(masked, s)) for s in ("support", "query")]
    fates: dict[tuple[int, int], set[bool]] = {}
    for before, after in sides:
        task = torch.arange(whole.num_tasks)[:, None].expand(before.mask.shape)
        in_bags = torch.arange(whole.num_tasks).repeat_interleave(before.bags["tags"].lengths.sum(1))
        for tasks, was, is_now in (
            (task[before.mask], before.ids["item"][before.mask], after.ids["item"][before.mask]),
            (in_bags, before.bags["tags"].values, after.bags["tags"].values),
        ):
            for t, old, new in zip(tasks.tolist(), was.tolist(), is_now.tolist(), strict=True):
                assert new in (0, old)
                if old:
                    fates.setdefault((t, old), set()).add(new == 0)
    assert {fate for found in fates.values() for fate in found} == {False, True}
    assert all(len(found) == 1 for found in fates.values())
    assert any((before.ids["item"] != after.ids["item"]).any() for before, after in sides)


def test_draws_depend_on_task_epoch_and_seed_and_not_on_the_batch(pack: TaskPack) -> None:
    def fate(tasks_per_batch: int, epoch: int, seed: int = 5) -> dict[int, int]:
        number = -(-60 // tasks_per_batch)
        found = {}
        for batch in batches(pack, number * (epoch + 1), tasks_per_batch=tasks_per_batch)[number * epoch :]:
            for side in (dropout(pack, seed=seed)(batch).support, dropout(pack, seed=seed)(batch).query):
                found |= dict(zip(side.row[side.mask].tolist(), side.ids["item"][side.mask].tolist(), strict=True))
        return found

    assert fate(15, 0) == fate(7, 0)
    assert fate(15, 0) != fate(15, 1)
    assert fate(15, 0) != fate(15, 0, seed=6)


def test_parts_of_a_batch_are_masked_as_the_whole(pack: TaskPack) -> None:
    whole, in_parts = batches(pack, 1)[0], batches(pack, 1, max_cells=60)[0]
    assert len(in_parts.parts) > 1
    found, expected = dropout(pack)(in_parts), dropout(pack)(whole)
    for side in ("support", "query"):
        ours, theirs = getattr(found, side), getattr(expected, side)
        assert torch.equal(ours.ids["item"][0], theirs.ids["item"][theirs.mask])
        assert torch.equal(ours.bags["tags"].values, theirs.bags["tags"].values)
    assert torch.equal(joined(found.parts).support.ids["item"], found.support.ids["item"])
    assert found.num_tasks_global == in_parts.num_tasks_global
    assert found.batch_split is in_parts.batch_split


def test_a_batch_without_tasks_and_the_given_tensors_stay(pack: TaskPack) -> None:
    batch = batches(pack, 1)[0]
    copies = {name: ids.clone() for name, ids in batch.query.ids.items()}
    dropout(pack)(batch)
    assert all(torch.equal(batch.query.ids[name], copy) for name, copy in copies.items())
    none = replace(
        batch.support,
        ids={name: ids[:0] for name, ids in batch.support.ids.items()},
        bags={"tags": Bag(batch.support.bags["tags"].values[:0], batch.support.bags["tags"].lengths[:0])},
        mask=batch.support.mask[:0],
    )
    empty = replace(batch, support=none, query=none, task_id=batch.task_id[:0])
    assert dropout(pack)(empty).num_tasks == 0


def test_a_masked_item_has_the_statistics_of_an_unseen_one(tmp_path: Path) -> None:
    columns = (NumericColumn(name="item_mean", mean=0.4, std=0.2), NumericColumn(name="item_log_count", mean=3, std=2))
    schema = replace(SCHEMA, numeric=columns, label_mean=0.6)
    data_schema = replace(DATA_SCHEMA, numeric=(), item_statistics=True)
    totals = pa.table({"value": pa.array([None], pa.string()), "label_sum": [0.6], "count": [1]})
    pack = open_pack(make_pack(tmp_path / "pack", schema=schema, data_schema=data_schema, statistics=totals))
    batch = batches(pack, 1)[0]
    masked = dropout(pack)(batch)
    for before, after in ((batch.support, masked.support), (batch.query, masked.query)):
        hidden = before.ids["item"] != after.ids["item"]
        assert hidden.any()
        assert after.dense[hidden].double().numpy() == pytest.approx(np.tile([1.0, -1.5], (int(hidden.sum()), 1)))
        assert torch.equal(before.dense[~hidden], after.dense[~hidden])


def test_columns_that_only_have_the_name_of_statistics_stay(pack: TaskPack) -> None:
    assert not dropout(pack).statistics


@pytest.mark.parametrize(
    ("train_cold", "test_cold", "share"), [(0, 0, 0.0), (0, 1, 0.0), (0, 2, DEFAULT_SHARE), (4, 4, 0.0)]
)
def test_on_where_held_out_tasks_have_cold_ids(tmp_path: Path, train_cold: int, test_cold: int, share: float) -> None:
    """200 rows of each split: more than 0.5 % beyond what training has. Values that are rare or missing in training
    are OOV there too, and train its row.
    """
    train, test = np.ones(200, np.int64), np.ones(200, np.int64)
    train[:train_cold], test[:test_cold] = 0, 0
    counts = np.zeros(ITEMS - 1, np.int64)
    counts[0] = 200 - train_cold
    pack = counted(tmp_path / "pack", counts, train, test)
    assert default_share(pack, ALL) == share
    assert default_share(pack, ("group", "tags")) == 0


def test_without_a_vocabulary_there_is_nothing_to_mask(tmp_path: Path) -> None:
    """New values of a hashed table read the row of a bucket."""
    hashed = tuple(replace(f, hash_buckets=TAGS - 1) if f.name == "tags" else f for f in DATA_SCHEMA.features)
    pack = open_pack(make_pack(tmp_path / "pack", data_schema=replace(DATA_SCHEMA, features=hashed)))
    assert dropout(pack).tables.keys() == {"group", "item"}
    with pytest.raises(ValueError, match=r"only hashed ones.*set it to 0"):
        build_id_dropout(pack, 0.1, features=("tags",), seed=0)
    assert build_id_dropout(pack, 0.0, features=ALL, seed=0) is None
