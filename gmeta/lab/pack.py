"""The data of a laboratory run: tasks of equal size, so that every task of a batch is the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gmeta.data.pack import PackWriter
from gmeta.data.schema import Feature, PackSchema, parse_data_schema

NUM_ITEMS = 200
ROWS, SUPPORT = 4, 2
VALID_TASKS = 512
_DIM = 4  # of the taste that clicks follow


def write_lab_pack(path: Path, num_tasks: int, seed: int) -> None:
    """Write `num_tasks` training tasks and `VALID_TASKS` valid ones, each of `ROWS` clicks that follow a taste of its
    own."""
    schema = PackSchema(
        features=(Feature(name="item", kind="categorical", num_ids=NUM_ITEMS, table="item"),),
        numeric=(),
        label="click",
        binary_label=True,
        task="user",
        item="item",
    )
    columns = {"task": "user", "label": "click", "item": "item", "categorical": ["item"]}
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(NUM_ITEMS, _DIM))
    with PackWriter(path, schema, settings={}, data_schema=parse_data_schema(columns).to_json()) as writer:
        values = pa.array([f"i{i}" for i in range(1, NUM_ITEMS)])
        writer.write_vocab("item", values, np.ones(NUM_ITEMS - 1, np.int64))
        first = 0
        for split, count in (("train", num_tasks), ("valid", VALID_TASKS)):
            tasks = np.arange(first, first + count)
            writer.add_shard(split, _arrays(rng, latent, tasks))
            writer.write_tasks(tasks, pa.array([f"u{i}" for i in tasks]), [split] * count)
            first += count
        writer.finish()


def _arrays(
    rng: np.random.Generator, latent: np.ndarray[Any, np.dtype[np.float64]], tasks: np.ndarray[Any, np.dtype[np.int64]]
) -> dict[str, Any]:
    """Return the tensors of a shard."""
    item = rng.integers(1, NUM_ITEMS, len(tasks) * ROWS)
    taste = np.repeat(rng.normal(size=(len(tasks), _DIM)), ROWS, axis=0)
    logit = latent[item, 0] + (latent[item] * taste).sum(1)  # what all like, and what each likes
    return {
        "ids": item[:, None].astype(np.int32),
        "dense": np.zeros((len(item), 0), np.float32),
        "label": (rng.random(len(item)) < 1 / (1 + np.exp(-logit))).astype(np.float32),
        "item_cold": np.zeros(len(item), np.uint8),
        "task_id": tasks,
        "row_start": np.arange(len(tasks)) * ROWS,
        "num_support": np.full(len(tasks), SUPPORT, np.int32),
    }
