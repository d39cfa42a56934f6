"""The history of tasks: the last rows of each, encoded, which the support of a later day holds.

    increment/tasks.parquet             key, split and last day of every task that was ever seen
    increment/history/00000.parquet …   the last rows of each task, `place` 0 being the oldest

A first pack has no history: one is made of its shards when a later day needs it. But rows of tasks that it leaves out
are in no shard, so that it keeps the last ones:

    increment/left_out.parquet          key and split of every task that is left out
    increment/left_out/00003.parquet …  their rows, as in a history

A day's history has one part for each of its shards, whose tasks' older rows are read beside it, and one for the tasks
that have no row on the day: memory holds a shard, whatever the number of tasks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gmeta.config.data import HISTORY_ROWS
from gmeta.data.item_vectors import DTYPE, array_name
from gmeta.data.layout import one_valued, ragged, verified_file
from gmeta.data.pack import TaskPack
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.tasks import LEFT_OUT, ShardJob, drawn_split
from gmeta.data.schema import PackSchema, Vector
from gmeta.data.sources import Connection, in_order, literal, only_file, scalar

Array = npt.NDArray[Any]

INCREMENT = "increment"
"""The folder of a pack with what later days need of it."""
TASKS = "tasks.parquet"
PARTS = "history"
LEFT_OUT_TASKS, LEFT_OUT_PARTS = "left_out.parquet", "left_out"
_FLAT = ("time", "label", "item_cold", "weight")
"""Columns of one number a row; some packs have no time and no weight."""
_GROUP_ROWS = 1 << 16
"""Rows of a row group. What a reader holds at once is one group."""
_FORMAT: dict[str, Any] = {"use_dictionary": ["key"], "write_statistics": ["time", "key"]}
"""Dictionaries of ids and numbers take longer than all else, and keep few bytes."""


@dataclass(frozen=True)
class TaskHistory:
    """What a day knows of its tasks' earlier rows, and keeps for the days after it."""

    schema: PackSchema
    day: int
    rows: int  # a task's most
    older: Path  # of `deal_history`
    out: Path  # folder of the parts
    today: Mapping[str, Array]  # feature -> the id that each id of the base has now, of those where some differ

    def add(self, con: Connection, shard: ShardJob, arrays: dict[str, Array]) -> dict[str, Array]:
        """Write a shard's part; returns its arrays with the older rows of its tasks in front of their support."""
        tasks = con.sql(
            f"SELECT key, num_older FROM tasks WHERE shard = {shard.index} ORDER BY task_id"
        ).to_arrow_table()
        rows, task, day, is_query = self._rows(con, shard, arrays)
        # Older rows come first, in their order, so that of one time the older ones stay first.
        by_time = np.lexsort((rows.get("time", np.zeros(len(task), np.int64)), task))
        kept = by_time[_from_end(task[by_time]) < self.rows]
        _write_part(self.out / f"{shard.index:05d}.parquet", _table(self.schema, rows, tasks["key"], task, day, kept))
        old = np.flatnonzero(day < self.day)
        in_pack = np.ones(len(task), bool)
        in_pack[old[_from_end(task[old]) >= tasks["num_older"].to_numpy()[task[old]]]] = False
        order = by_time[np.lexsort((is_query[by_time], task[by_time]))]
        order = order[in_pack[order]]
        sizes = np.bincount(task[order], minlength=len(tasks))
        return take(self.schema, rows, order) | {
            "task_id": arrays["task_id"],
            "row_start": np.cumsum(sizes) - sizes,
            "num_support": np.bincount(task[order][~is_query[order]], minlength=len(tasks)).astype(np.int32),
        }

    def _rows(
        self, con: Connection, shard: ShardJob, arrays: dict[str, Array]
    ) -> tuple[dict[str, Array], Array, Array, Array]:
        """Return older rows and then new ones, and of each its task in the shard, its day, and whether it is query."""
        sizes = np.diff(arrays["row_start"], append=len(arrays["label"]))
        task = np.repeat(np.arange(len(sizes)), sizes)
        is_query = np.arange(len(task)) >= (arrays["row_start"] + arrays["num_support"])[task]
        folder = self.older / f"shard={shard.index}"
        if not folder.exists():
            return arrays, task, np.full(len(task), self.day), is_query
        files = literal(f"{folder}/*.parquet")
        found = con.sql(f"SELECT * FROM read_parquet({files}, hive_partitioning=false) ORDER BY task_id, place")
        table = found.to_arrow_table()
        old_task = np.searchsorted(arrays["task_id"], table["task_id"].to_numpy())
        return (
            _joined(self.schema, _arrays(self.schema, table, self.today), arrays),
            np.concatenate([old_task, task]),
            np.concatenate([table["day"].to_numpy(), np.full(len(task), self.day)]),
            np.concatenate([np.zeros(len(old_task), bool), is_query]),
        )


@dataclass(frozen=True)
class LeftOutRows:
    """What a first pack does with the arrays of each shard: it keeps those of tasks that are left out."""

    history: TaskHistory

    def add(self, con: Connection, shard: ShardJob, arrays: dict[str, Array]) -> dict[str, Array]:
        """Write a shard's part where its tasks are left out; returns its arrays."""
        return self.history.add(con, shard, arrays) if shard.split == LEFT_OUT else arrays


def keep_left_out(con: Connection, schema: PackSchema, folder: Path, scratch: Path) -> LeftOutRows:
    """Write which tasks a first pack leaves out, and return what keeps their rows in `folder`."""
    (folder / LEFT_OUT_PARTS).mkdir(parents=True)
    query = "SELECT key, min(split) AS split FROM split_tasks WHERE dropped IS NOT NULL GROUP BY key ORDER BY key"
    write_ordered(con, query, folder / LEFT_OUT_TASKS)
    return LeftOutRows(TaskHistory(schema, 0, HISTORY_ROWS, scratch / "older", folder / LEFT_OUT_PARTS, {}))


def know_tasks(con: Connection, folder: Path, rows: int, settings: Settings) -> None:
    """Make table `known_tasks` (key, split, last_day, num_history, num_known) and view `history` of a base's folder.

    A task has `num_history` rows there, of which the last `num_known` count: at most `rows`.
    """
    sizes = "(SELECT NULL::VARCHAR AS key, 0 AS n WHERE false)"
    if parts := _parts(folder):
        con.execute(f"CREATE VIEW history AS SELECT * FROM {parts}")
        sizes = "(SELECT key, count(*) AS n FROM history GROUP BY key)"
    # With a partition column a key may be held out and be trained on; the column itself says where.
    drawn = "WHERE split <> 'test'" if settings.task_split == "column" else ""
    con.execute(f"""
        CREATE TABLE known_tasks AS
        SELECT key, min(split) AS split, max(last_day) AS last_day, CAST(max(coalesce(n, 0)) AS BIGINT) AS num_history,
               least(num_history, {rows}) AS num_known
        FROM read_parquet({only_file(folder / TASKS)}) LEFT JOIN {sizes} USING (key) {drawn} GROUP BY key""")


def last_time(con: Connection, folder: Path) -> int | None:
    """Return the last time of the rows of a base's folder; None where it has no rows."""
    parts = _parts(folder)
    return scalar(con, f"SELECT max(time) FROM {parts}") if parts else None


def _parts(folder: Path) -> str | None:
    """Return SQL of the rows of a base's folder; None where it has none."""
    files = ", ".join(only_file(part) for part in sorted((folder / PARTS).glob("*.parquet")))
    return f"read_parquet([{files}], hive_partitioning=false)" if files else None


def deal_history(con: Connection, scratch: Path) -> Path:
    """Deal the older rows of the day's tasks to one folder of Parquet files a shard; returns the folder of these."""
    folder = scratch / "older"
    if scalar(con, "SELECT count(*) FROM tasks WHERE num_known > 0"):
        con.execute(f"""
            COPY (SELECT h.*, CAST(t.task_id AS BIGINT) AS task_id, t.shard
                  FROM history h JOIN known_tasks k USING (key) JOIN tasks t USING (key)
                  WHERE h.place >= k.num_history - k.num_known)
            TO {literal(str(folder))} (FORMAT parquet, PARTITION_BY (shard))""")
    return folder


def carry_history(con: Connection, history: TaskHistory, number: int, evict_after_days: int | None) -> None:
    """Write part `number`: the rows of the tasks that have none on the day, but for those that are evicted by age."""
    if not scalar(con, "SELECT count(*) FROM known_tasks WHERE num_known > 0"):
        return
    young = _young(history.day, evict_after_days)
    query = f"""SELECT h.* REPLACE (CAST(place - num_history + num_known AS INTEGER) AS place)
                FROM history h JOIN (SELECT * FROM known_tasks WHERE {young}) k USING (key)
                WHERE place >= num_history - num_known AND key NOT IN (SELECT key FROM tasks) ORDER BY key, place"""
    schema = history.schema

    def forgotten(table: pa.Table) -> pa.Table:
        rows = _arrays(schema, table, history.today)
        columns = {name: table[name] for name in ("key", "day", "place")}
        return pa.table({**columns, **_columns(schema, rows)})

    write_ordered(con, query, history.out / f"{number:05d}.parquet", forgotten)


def write_tasks(con: Connection, path: Path, settings: Settings, day: int, evict_after_days: int | None) -> None:
    """Write `tasks.parquet` of a day. Of evicted tasks those stay that would be dealt to another split if they came
    back: what was trained on never becomes a test.
    """
    dealt = "WHERE mapped = 'train'" if settings.task_split == "column" else ""
    query = f"""
        SELECT key, split, last_day FROM (
            SELECT coalesce(d.key, k.key) AS key, coalesce(d.split, k.split) AS split,
                   CAST(CASE WHEN d.key IS NULL THEN k.last_day ELSE {day} END AS INTEGER) AS last_day
            FROM known_tasks k FULL JOIN (SELECT key, min(split) AS split FROM split_tasks {dealt} GROUP BY key) d
            ON d.key = k.key)
        WHERE {_young(day, evict_after_days)} OR split <> {drawn_split(settings, "key")} ORDER BY key"""
    write_ordered(con, query, path)


def _young(day: int, evict_after_days: int | None) -> str:
    return "true" if evict_after_days is None else f"{day} - last_day < {evict_after_days}"


def history_of_pack(pack: TaskPack, folder: Path, rows: int) -> None:
    """Make the history of a first pack, from its shards and the rows of tasks that it left out, in a new folder."""
    (folder / PARTS).mkdir(parents=True)
    left_out = {
        entry["file"]: verified_file(pack.path, entry)
        for entry in pack.manifest["others"]
        if entry["file"].startswith(f"{INCREMENT}/{LEFT_OUT_PARTS}")
    }
    listed = pack.tasks_file()
    unkept = left_out.pop(f"{INCREMENT}/{LEFT_OUT_TASKS}", None)
    tasks = pa.schema([("key", pa.string()), ("split", pa.string()), ("last_day", pa.int32())])
    with pq.ParquetWriter(folder / TASKS, tasks) as writer:
        for source in (listed, *([] if unkept is None else [unkept])):
            with pq.ParquetFile(source) as file:
                for batch in file.iter_batches(_GROUP_ROWS):
                    days = pa.array(np.zeros(len(batch), np.int32))
                    writer.write_table(pa.table([batch["key"], batch["split"], days], schema=tasks))
    if not rows:
        return
    shards = [arrays for name in pack.splits for arrays in pack.split(name).shard_arrays()]
    for number, arrays in enumerate(shards):
        ids = arrays["task_id"]
        within = [("task_id", ">=", int(ids[0])), ("task_id", "<=", int(ids[-1]))]
        keys = pq.read_table(listed, columns=["key", "task_id"], filters=within).sort_by("task_id")["key"]
        sizes = np.diff(arrays["row_start"], append=len(arrays["label"]))
        task = np.repeat(np.arange(len(sizes)), sizes)
        order = np.lexsort((arrays.get("time", np.zeros(len(task), np.int64)), task))
        kept = order[_from_end(task[order]) < rows]
        table = _table(pack.schema, arrays, keys, task, np.zeros(len(task), np.int32), kept)
        _write_part(folder / PARTS / f"{number:05d}.parquet", table)
    for number, file in enumerate(left_out.values(), start=len(shards)):
        shutil.copyfile(file, folder / PARTS / f"{number:05d}.parquet")


# ------------------------------------------------------------------------------------------------- rows


def take(schema: PackSchema, rows: Mapping[str, Array], index: Array) -> dict[str, Array]:
    """Return the columns of rows at `index` int64 [n]: those of `_FLAT`, ids, dense, vectors, and many-valued
    features.
    """
    out = {name: rows[name][index] for name in _plain(schema) if name in rows}
    for name in ragged(schema):
        values, offsets = rows[f"{name}.values"], rows[f"{name}.offsets"]
        length = np.diff(offsets)[index]
        end = np.cumsum(length)
        at = np.arange(int(length.sum())) + np.repeat(offsets[index] - (end - length), length)
        out |= {f"{name}.values": values[at], f"{name}.offsets": np.concatenate([[0], end]).astype(np.int64)}
    return out


def _joined(schema: PackSchema, first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
    """Return the rows of both, one after the other."""
    out = {name: np.concatenate([first[name], second[name]]) for name in _plain(schema) if name in first}
    for name in ragged(schema):
        offsets = [side[f"{name}.offsets"] for side in (first, second)]
        out[f"{name}.values"] = np.concatenate([side[f"{name}.values"] for side in (first, second)])
        out[f"{name}.offsets"] = np.concatenate([offsets[0], offsets[1][1:] + offsets[0][-1]])
    return out


def _plain(schema: PackSchema) -> list[str]:
    """Return the arrays that have one entry a row."""
    return ["ids", "dense", *_FLAT, *_row_vectors(schema)]


def _row_vectors(schema: PackSchema) -> dict[str, Vector]:
    return {array_name(vector.name): vector for vector in schema.vector if vector.owner == "row"}


def _from_end(task: Array) -> Array:
    """Return how many rows of the same task follow each row; tasks are contiguous."""
    last = np.flatnonzero(np.diff(task, append=-1))
    return np.repeat(last, np.diff(last, prepend=-1)) - np.arange(len(task))


def _table(
    schema: PackSchema, arrays: Mapping[str, Array], keys: pa.ChunkedArray, task: Array, day: Array, kept: Array
) -> pa.Table:
    """Return the rows `kept`, the tasks' last ones in their order, as a table of the history."""
    after = _from_end(task[kept])
    sizes = np.bincount(task[kept], minlength=len(keys))
    columns = {
        "key": keys.take(pa.array(task[kept])),
        "day": pa.array(day[kept].astype(np.int32)),
        "place": pa.array((sizes[task[kept]] - 1 - after).astype(np.int32)),
    }
    return pa.table({**columns, **_columns(schema, take(schema, arrays, kept))})


def _columns(schema: PackSchema, rows: Mapping[str, Array]) -> dict[str, pa.Array]:
    columns = {name: pa.array(rows[name]) for name in _FLAT if name in rows and rows[name].ndim == 1}
    for name in ("ids", "dense", *(["label"] if schema.labels else []), *_row_vectors(schema)):
        if width := rows[name].shape[1]:
            ends = pa.array(np.arange(0, rows[name].size + 1, width, dtype=np.int32))
            columns[name] = pa.ListArray.from_arrays(ends, pa.array(rows[name].reshape(-1)))
    for name in ragged(schema):
        ends = pa.array(rows[f"{name}.offsets"].astype(np.int32))
        columns[f"{name}.values"] = pa.ListArray.from_arrays(ends, pa.array(rows[f"{name}.values"]))
    return columns


def _arrays(schema: PackSchema, table: pa.Table, today: Mapping[str, Array]) -> dict[str, Array]:
    """Return the rows of a table of the history as a shard has them, with the ids of `today`."""
    flat_columns = [name for name in _FLAT if name in table.column_names and not (schema.labels and name == "label")]
    rows = {name: table[name].to_numpy() for name in flat_columns}
    wide: list[tuple[str, int, Any]] = [
        ("ids", len(one_valued(schema)), np.int32),
        ("dense", len(schema.numeric), np.float32),
        *[("label", len(schema.labels), np.float32)] * bool(schema.labels),
        *((name, vector.dim, DTYPE[vector.dtype]) for name, vector in _row_vectors(schema).items()),
    ]
    for name, width, kind in wide:
        flat = table[name].combine_chunks().flatten().to_numpy() if width else np.empty(0, kind)
        rows[name] = flat.astype(kind).reshape(len(table), width)  # a copy, which may be written to
    for column, name in enumerate(one_valued(schema)):
        if name in today:
            rows["ids"][:, column] = today[name][rows["ids"][:, column]]
    for name, dtype in ragged(schema).items():
        lists = table[f"{name}.values"].combine_chunks()
        values = lists.flatten().to_numpy().astype(dtype)
        if name in today:
            values = today[name][values].astype(dtype)
        length = lists.value_lengths().to_numpy()
        rows |= {f"{name}.values": values, f"{name}.offsets": np.concatenate([[0], np.cumsum(length)]).astype(np.int64)}
    return rows


# ------------------------------------------------------------------------------------------------- files


def _write_part(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=_GROUP_ROWS, **_FORMAT)


def write_ordered(
    con: Connection, query: str, path: Path, change: Callable[[pa.Table], pa.Table] = lambda table: table
) -> None:
    """Write the rows of an ordered query to a Parquet file, the same bytes whatever pieces they come in; `change` may
    change the columns of some rows.
    """
    with in_order(con):
        reader = con.sql(query).to_arrow_reader(_GROUP_ROWS)
        groups = _groups(reader)
        first = change(next(groups))
        with pq.ParquetWriter(path, first.schema, **_FORMAT) as writer:
            writer.write_table(first)
            for group in groups:
                writer.write_table(change(group))


def _groups(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Cut what a reader gives to tables of _GROUP_ROWS rows, at least one."""
    waiting: list[pa.RecordBatch] = []
    rows, given = 0, 0
    for batch in reader:
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= _GROUP_ROWS:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _GROUP_ROWS).combine_chunks()
            given += 1
            rest = table.slice(_GROUP_ROWS)
            waiting, rows = rest.to_batches(), len(rest)
    if rows or not given:
        yield pa.Table.from_batches(waiting, schema=reader.schema).combine_chunks()
