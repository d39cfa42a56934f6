"""A pack of synthetic tasks, each of as many rows, for benchmarks that train on ids of their own drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gmeta.data.pack import PackWriter
from gmeta.data.schema import Feature, PackSchema, parse_data_schema


def write_tasks(
    path: Path, ids: NDArray[np.integer], label: NDArray[np.generic], num_ids: int, num_support: int
) -> None:
    """Write one training shard: ids [tasks, rows, features] below `num_ids`, features f0, f1, …; label [tasks *
    rows].
    """
    num_tasks, rows, features = ids.shape
    names = [f"f{i}" for i in range(features)]
    schema = PackSchema(
        features=tuple(Feature(name=n, kind="categorical", num_ids=num_ids, table=n) for n in names),
        numeric=(),
        label="click",
        binary_label=True,
        task="user",
        item=names[-1],
    )
    data_schema = parse_data_schema({"task": "user", "label": "click", "item": names[-1], "categorical": names})
    tasks = np.arange(num_tasks, dtype=np.int64)
    values = pa.array([str(i) for i in range(1, num_ids)])
    with PackWriter(path, schema, settings={}, data_schema=data_schema.to_json()) as writer:
        for name in names:
            writer.write_vocab(name, values, np.ones(num_ids - 1, np.int64))
        writer.add_shard(
            "train",
            {
                "ids": ids.reshape(-1, features).astype(np.int32),
                "dense": np.zeros((num_tasks * rows, 0), np.float32),
                "label": label.astype(np.float32),
                "item_cold": np.zeros(num_tasks * rows, np.uint8),
                "task_id": tasks,
                "row_start": tasks * rows,
                "num_support": np.full(num_tasks, num_support, np.int32),
            },
        )
        writer.write_tasks(tasks, pa.array([f"u{i}" for i in tasks]), ["train"] * num_tasks)
        writer.finish()
