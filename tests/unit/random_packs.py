"""Random packs and a slow reader of them: per-task Python lists, no shards, no padding tricks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from gmeta.data.pack import PackWriter
from gmeta.data.raw_columns import RawFeature
from gmeta.data.schema import DataSchema, Feature, NumericColumn, PackSchema


def schema(one: int = 2, many: int = 1, numeric: int = 1, time: bool = False) -> PackSchema:
    kinds = ["categorical"] * one + ["multi", "sequence"][:many]
    return PackSchema(
        features=tuple(Feature(name=f"f{i}", kind=k, num_ids=50, table=f"f{i}") for i, k in enumerate(kinds)),  # type: ignore[arg-type]
        numeric=tuple(NumericColumn(name=f"x{i}") for i in range(numeric)),
        label="y",
        binary_label=False,
        task="u",
        time="t" if time else None,
    )


@dataclass
class Row:
    ids: list[int]
    bags: list[list[int]]
    dense: list[float]
    label: float
    item_cold: bool


@dataclass
class Task:
    task_id: int
    num_support: int
    rows: list[Row] = field(default_factory=list)


def random_tasks(
    rng: np.random.Generator, of: PackSchema, count: int, first_id: int = 0, max_rows: int = 6
) -> list[Task]:
    one = sum(f.kind == "categorical" for f in of.features)
    many = len(of.features) - one
    tasks = []
    for i in range(count):
        size = int(rng.integers(1, max_rows + 1))
        task = Task(first_id + i, int(rng.integers(0, size + 1)))
        for _ in range(size):
            task.rows.append(
                Row(
                    ids=rng.integers(0, 50, one).tolist(),
                    bags=[rng.integers(0, 50, rng.integers(0, 4)).tolist() for _ in range(many)],
                    dense=rng.normal(size=len(of.numeric)).astype(np.float32).tolist(),
                    label=float(np.float32(rng.normal())),
                    item_cold=bool(rng.integers(0, 2)),
                )
            )
        tasks.append(task)
    return tasks


def arrays_of(of: PackSchema, tasks: list[Task]) -> dict[str, np.ndarray]:
    rows = [row for task in tasks for row in task.rows]
    one = [f.name for f in of.features if f.kind == "categorical"]
    many = [f.name for f in of.features if f.kind != "categorical"]
    arrays = {
        "ids": np.array([r.ids for r in rows], np.int32).reshape(len(rows), len(one)),
        "dense": np.array([r.dense for r in rows], np.float32).reshape(len(rows), len(of.numeric)),
        "label": np.array([r.label for r in rows], np.float32),
        "item_cold": np.array([r.item_cold for r in rows], np.uint8),
        "task_id": np.array([t.task_id for t in tasks], np.int64),
        "row_start": np.cumsum([0] + [len(t.rows) for t in tasks])[:-1].astype(np.int64),
        "num_support": np.array([t.num_support for t in tasks], np.int32),
    }
    if of.time is not None:
        arrays["time"] = np.arange(len(rows), dtype=np.int64)
    for j, name in enumerate(many):
        arrays[f"{name}.values"] = np.array([v for r in rows for v in r.bags[j]], np.int32)
        arrays[f"{name}.offsets"] = np.cumsum([0] + [len(r.bags[j]) for r in rows]).astype(np.int64)
    return arrays


def write_pack(path: Path, of: PackSchema, shards: list[tuple[str, list[Task]]]) -> Path:
    columns = DataSchema(task="t", label="y", features=(RawFeature(name="f", kind="categorical", table="f"),))
    with PackWriter(path, of, settings={"b": 1, "a": 2}, data_schema=columns.to_json()) as writer:
        for split, tasks in shards:
            writer.add_shard(split, arrays_of(of, tasks))
            ids = [t.task_id for t in tasks]
            writer.write_tasks(np.array(ids), pa.array([f"u{i}" for i in ids]), [split] * len(ids))
        for feature in of.features:
            writer.write_vocab(feature.table, pa.array([f"v{i}" for i in range(1, 50)]), np.arange(49))
        return writer.finish({"dropped": 3})
