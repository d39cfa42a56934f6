"""Small task packs with a learnable per-task truth, for tests of what is built on packs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmeta.config.train import ModelConfig
from gmeta.data.pack import PackWriter
from gmeta.data.schema import DataSchema, Feature, NumericColumn, PackSchema, parse_data_schema

USERS, ITEMS, TAGS = 7, 40, 9

DATA_SCHEMA = parse_data_schema(
    {
        "task": "user",
        "label": "click",
        "item": "item",
        "categorical": ["group", "item"],
        "multi": ["tags"],
        "numeric": ["age", "price"],
    }
)

SCHEMA = PackSchema(
    features=(
        Feature(name="group", kind="categorical", num_ids=USERS, table="group"),
        Feature(name="item", kind="categorical", num_ids=ITEMS, table="item"),
        Feature(name="tags", kind="multi", num_ids=TAGS, table="tags"),
    ),
    numeric=(NumericColumn(name="age"), NumericColumn(name="price")),
    label="click",
    binary_label=True,
    task="user",
    item="item",
)


def _arrays(rng: np.random.Generator, num_tasks: int, first_task: int) -> dict[str, np.ndarray]:
    """Ragged tasks of 3 to 14 rows whose clicks follow a taste of their own."""
    latent = np.random.default_rng(0).normal(size=(ITEMS, 3))
    sizes = rng.integers(3, 15, num_tasks)
    support = rng.integers(1, sizes)
    rows = int(sizes.sum())
    task = np.repeat(np.arange(num_tasks), sizes)
    item = rng.integers(0, ITEMS, rows)
    taste = rng.normal(size=(num_tasks, 3)) * 2
    click = rng.random(rows) < 1 / (1 + np.exp(-(latent[item] * taste[task]).sum(1)))
    tags = rng.integers(0, 4, rows)
    return {
        "ids": np.stack([rng.integers(0, USERS, num_tasks)[task], item], 1).astype(np.int32),
        "dense": rng.normal(size=(rows, 2)).astype(np.float32),
        "label": click.astype(np.float32),
        "item_cold": (item < 4).astype(np.uint8),
        "tags.values": rng.integers(0, TAGS, int(tags.sum())).astype(np.int32),
        "tags.offsets": np.concatenate([[0], np.cumsum(tags)]).astype(np.int64),
        "task_id": np.arange(first_task, first_task + num_tasks, dtype=np.int64),
        "row_start": (np.cumsum(sizes) - sizes).astype(np.int64),
        "num_support": support.astype(np.int32),
    }


def values_of(table: str, num_ids: int) -> list[str]:
    """Vocabulary of a table: item1, item2, …"""
    return [f"{table}{i}" for i in range(1, num_ids)]


def make_pack(
    path: Path,
    train: int = 60,
    valid: int = 20,
    test: int = 20,
    seed: int = 1,
    *,
    schema: PackSchema = SCHEMA,
    data_schema: DataSchema = DATA_SCHEMA,
    values: Callable[[str, int], list[str]] = values_of,
    statistics: pa.Table | None = None,
    counts: int = 1,
    change: Callable[[dict[str, np.ndarray]], object] = lambda arrays: None,
) -> Path:
    """Write a pack of three splits at `path`; hashed tables of `data_schema` get no vocabulary.

    `change` may change a shard's arrays in place. Vocabularies say that each value was seen `counts` times.
    """
    rng = np.random.default_rng(seed)
    with PackWriter(path, schema, settings={}, data_schema=data_schema.to_json()) as writer:
        hashed = {f.table for f in data_schema.features if f.hash_buckets is not None}
        for table, num in (("group", USERS), ("item", ITEMS), ("tags", TAGS)):
            if table not in hashed:
                writer.write_vocab(table, pa.array(values(table, num)), np.full(num - 1, counts))
        if statistics is not None:
            pq.write_table(statistics, writer.directory / "vocab" / "item_statistics.parquet")
        first = 0
        for split, count in (("train", train), ("valid", valid), ("test", test)):
            if count == 0:
                continue
            ids = np.arange(first, first + count)
            arrays = _arrays(rng, count, first)
            change(arrays)
            writer.add_shard(split, arrays)
            writer.write_tasks(ids, pa.array([f"u{i}" for i in ids]), [split] * count)
            first += count
        return writer.finish()


def raw_rows(third_group: str = "new") -> dict[str, list[Any]]:
    """Three raw rows of two tasks without labels, which fit a pack of `make_pack`; by default one group is unknown."""
    return {
        "user": ["a", "a", "b"],
        "group": ["group1", "group2", third_group],
        "item": ["item1", "item2", "item3"],
        "tags": [["tags1"], [], ["tags2", "tags3"]],
        "age": [0.1, 0.2, 0.3],
        "price": [1.0, 2.0, 3.0],
    }


def small_model(name: str, **args: Any) -> ModelConfig:
    """A model of each name with the same small sizes; arguments that it does not take are left out."""
    wanted = {"hidden": [6], "bottom": [6], "dropout": 0.1, "task_features": ["group"], **args}
    return ModelConfig(name=name, embedding_dim=4, args={k: v for k, v in wanted.items() if k in _TAKES[name]})


_TAKES = {
    "melu": ("hidden", "layer_norm", "dropout"),
    "dlrm": ("hidden", "bottom", "layer_norm", "dropout"),
    "taste": ("hidden", "bottom", "dropout", "task_features"),
}


def user_rows(num_tasks: int, each: int, seed: int, *, label: bool) -> pa.Table:
    """Raw rows of users, interleaved; some values are in no vocabulary."""
    rng = np.random.default_rng(seed)
    total = num_tasks * each
    tags = [[f"tags{i}" for i in rng.integers(0, TAGS, n)] for n in rng.integers(0, 4, total)]
    columns: dict[str, Any] = {
        "user": [f"new{i % num_tasks}" for i in range(total)],
        "group": [f"group{i}" for i in rng.integers(0, USERS, total)],
        "item": [f"item{i}" for i in rng.integers(0, ITEMS, total)],
        "tags": tags,
        "age": rng.normal(size=total),
        "price": rng.normal(size=total),
    }
    if label:
        columns["click"] = rng.integers(0, 2, total)
    return pa.table(columns)
