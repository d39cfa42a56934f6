"""`gmeta prepare`: raw rows to a task pack, in memory that does not grow with the data.

    stage    check every file's rows; those that cannot be used apart. CSV goes to a table, Parquet stays where it is
    plan     rows to tasks: which are kept, their split, support size, place and shard
    deal     rows to one Parquet file a shard; from here on a shard is an independent job
    learn    vocabularies, item statistics, means and deviations, all of training rows only
    write    a shard: sort and encode in one query; save while the next one is encoded

Everything random is a seeded MD5 of (key) or (file, row), every order is total, and sums are exact, so that the pack
depends neither on threads nor on the memory limit.
"""

from __future__ import annotations

import errno
import glob
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gmeta.config.data import PrepareConfig
from gmeta.data.datasets import open_data_set
from gmeta.data.order import bucket_by_size
from gmeta.data.pack import SPLITS, PackWriter, lock_directory
from gmeta.data.prepare.encode import (
    create_staged,
    describe_rejects,
    encode,
    id_types,
    numeric_values,
    reject_counts,
    stage,
    with_statistics,
)
from gmeta.data.prepare.tasks import Settings, ShardPlan, plan_tasks, resolve, row_bytes
from gmeta.data.schema import ITEM_STATISTICS, OOV, DataSchema, Feature, NumericColumn, PackSchema, Role
from gmeta.data.sources import Connection, RawPart, find_files, literal, md5_64, open_files, reading, scalar

Array = npt.NDArray[Any]
Report = Callable[[str, int, int], None]
"""Told (stage, done, total) as work goes on."""

BATCH_TASKS = 64
"""Tasks a batch for which the summary states the expected padding."""


def prepare(config: PrepareConfig, report: Report | None = None) -> dict[str, Any]:
    """Make the task pack `config.out`; returns the summary that `print_summary` prints.

    Raises ValueError for everything that is the user's to mend: files, columns, rows that cannot be used, settings
    that do not go together, tasks that are too few, a full disk. No pack is left behind then.
    """
    out = Path(config.out)
    schema, settings = resolve(config)
    reporting = console_report() if report is None else nullcontext(report)
    with reporting as tell, _scratch(out) as scratch, _disk_errors(scratch), _connect(scratch, config) as con:
        counts = _stage_all(con, config, schema, settings, scratch, tell)
        tell("planning tasks", 0, 1)
        shards = plan_tasks(con, schema, settings, counts)
        _require_space(out, con, schema)
        _deal(con, schema, settings, scratch, tell)
        pack_schema = _learn(con, schema, scratch, shards, tell)
        counts["vocab"] = {f.table: f.num_ids for f in pack_schema.features}
        made_with = {**asdict(settings), "input": config.inputs, "dataset": config.dataset}
        with PackWriter(out, pack_schema, settings=made_with, data_schema=schema.to_json()) as writer:
            _write_vocabularies(con, writer, schema)
            _write_shards(con, writer, schema, pack_schema, settings, scratch, shards, counts, tell)
            if counts["bad_rows"]:
                shutil.copyfile(scratch / "rejects.parquet", writer.directory / "rejects.parquet")
            writer.finish(counts=counts)
    return {"out": str(out), **counts}


# --------------------------------------------------------------------------------------- places and limits


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A directory beside `out` for what does not fit in memory, held by this process alone, removed at the end."""
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another out")
    path = out.with_name(out.name + ".scratch")
    stale = path.exists()
    with _disk_errors(path):
        lock = lock_directory(path)
    if stale:
        print(f"prepare: removed {path}, which an interrupted prepare left behind", file=sys.stderr)
    try:
        yield path
    finally:
        shutil.rmtree(path)
        os.close(lock)


@contextmanager
def _connect(scratch: Path, config: PrepareConfig) -> Iterator[Connection]:
    settings: dict[str, Any] = {"memory_limit": config.memory_limit, "temp_directory": str(scratch / "spill")}
    if config.threads:
        settings["threads"] = config.threads
    con = duckdb.connect(scratch / "rows.duckdb", config=settings)
    try:
        yield con
    finally:
        con.close()


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full disk, or a memory limit that is too low, into a ValueError that says what to do."""
    try:
        yield
    except duckdb.Error as error:
        text = str(error)
        if any(sign in text for sign in ("max_temp_directory_size", "No space left", "File too large", "Disk quota")):
            raise _no_space(directory, text.splitlines()[0]) from error
        if not isinstance(error, duckdb.OutOfMemoryException):
            raise
        raise ValueError(
            f"memory_limit is too low ({text.splitlines()[0]}): raise it, or lower threads or shard_mb"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _no_space(directory, str(error.strerror)) from error


def _no_space(directory: Path, reason: str, needed: int | None = None) -> ValueError:
    parent = directory.absolute().parent
    free = shutil.disk_usage(parent).free if parent.exists() else 0
    need = f"about {needed:,} bytes are needed and " if needed else ""
    return ValueError(
        f"{parent} has no space for the pack ({reason}): {need}{free:,} bytes are free. "
        "No pack was made; free space there or choose another out"
    )


def _require_space(out: Path, con: Connection, schema: DataSchema) -> None:
    """Refuse early where the pack and the dealt rows cannot fit."""
    rows = scalar(con, "SELECT coalesce(sum(num_rows), 0)::BIGINT FROM tasks")
    needed = int(2 * rows * row_bytes(con, schema))
    if needed > shutil.disk_usage(out.absolute().parent).free:
        raise _no_space(out, "too little is free", needed)


@contextmanager
def console_report() -> Iterator[Report]:
    """Progress on stderr: a bar on a terminal, a line a stage elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("prepare", total=None)
        last = ""

        def report(name: str, done: int, total: int) -> None:
            nonlocal last
            progress.update(task, description=name, completed=done, total=total)
            if name != last and not console.is_terminal:
                print(f"prepare: {name} ({total})", file=sys.stderr)
            last = name

        yield report


# ------------------------------------------------------------------------------------------------- stage


def _stage_all(
    con: Connection, config: PrepareConfig, schema: DataSchema, settings: Settings, scratch: Path, tell: Report
) -> dict[str, Any]:
    """Make view `raw_rows`, the rows that can be used; returns the counts so far."""
    roles: list[Role] = ["task", "label", "time", "item"]
    if settings.task_split == "column":
        roles.append("partition")
    parts, empty = _parts(con, config)
    types = id_types(schema, parts)
    create_staged(con, schema, types)
    relations = []
    for index, part in enumerate(parts):
        tell("reading files", index, len(parts))
        with reading(part.file):
            relations.append(stage(con, part, index, schema, roles, types))
    tell("reading files", len(parts), len(parts))
    files = [part.file for part in parts]
    bad = reject_counts(con)
    if bad and config.on_bad_rows == "fail":
        reasons = "; ".join(f"{count} × {reason}" for reason, count in bad.items())
        raise ValueError(
            f"{sum(bad.values())} rows cannot be used ({reasons}). The first:\n{describe_rejects(con, files)}\n"
            "Mend them, or set them aside with --on_bad_rows quarantine"
        )
    if bad:
        _write_rejects(con, files, scratch)
    con.execute(f"CREATE VIEW raw_rows AS {' UNION ALL '.join(dict.fromkeys(relations))}")
    rows = scalar(con, "SELECT count(*) FROM raw_rows")
    if rows == 0:
        raise ValueError(f"{', '.join(files)}: no row that can be used ({sum(bad.values())} rows were set aside)")
    skipped = {"empty_files": len(empty)} if empty else {}
    return {"rows_read": rows + sum(bad.values()), "bad_rows": bad, **skipped}


def _parts(con: Connection, config: PrepareConfig) -> tuple[list[RawPart], list[Path]]:
    """Open the input: its rows, and its files that are empty."""
    if config.dataset is not None:
        return [open_data_set(con, config.dataset, config.root)], []
    if config.root is not None:
        raise ValueError("root has no effect without dataset: leave it out")
    return open_files(con, find_files(config.inputs))


def _write_rejects(con: Connection, files: list[str], scratch: Path) -> None:
    con.register("file_names", pa.table({"file": pa.array(range(len(files)), pa.int32()), "name": files}))
    con.execute("SET preserve_insertion_order=true")
    con.execute(f"""
        COPY (SELECT name AS file, row, bad_column AS "column", bad_value AS value, reason
              FROM rejects JOIN file_names USING (file) ORDER BY file, row)
        TO {literal(str(scratch / "rejects.parquet"))} (FORMAT parquet)""")
    con.execute("SET preserve_insertion_order=false")
    con.unregister("file_names")


# -------------------------------------------------------------------------------------------------- deal


def _deal(con: Connection, schema: DataSchema, settings: Settings, scratch: Path, tell: Report) -> None:
    """Deal the rows of kept tasks to one folder of Parquet files a shard, and let go of the staged rows."""
    tell("dealing rows to shards", 0, 1)
    columns = ["s.file", "s.row", "s.label", "CAST(t.task_id AS INTEGER) AS task_id"]
    columns += [f"s.f{i}" for i in range(len(schema.features))] + [f"s.n{i}" for i in range(len(schema.numeric))]
    optional = {
        "s.time": True,
        "s.item": _item_feature(schema) is None,
        "t.num_support": settings.split_query == "random",
        "t.fold": schema.item_statistics,
    }
    columns += [column for column, needed in optional.items() if needed]
    partition = "AND t.partition = s.partition" if settings.task_split == "column" else ""
    # Version 2's delta encoding halves the bytes. Dictionaries and compression would take longer than the writing.
    con.execute(f"""
        COPY (SELECT {", ".join(columns)}, t.shard FROM raw_rows s JOIN tasks t ON t.task = s.task {partition})
        TO {literal(str(scratch / "rows"))} (FORMAT parquet, PARQUET_VERSION v2, COMPRESSION uncompressed,
                                             DICTIONARY_SIZE_LIMIT 1, PARTITION_BY (shard))""")
    con.execute("DROP VIEW raw_rows; DROP TABLE staged; CHECKPOINT; SET disabled_optimizers=''")
    tell("dealing rows to shards", 1, 1)


def _dealt(schema: DataSchema, scratch: Path, shards: list[ShardPlan]) -> str:
    """SQL that reads the dealt rows of some shards."""
    folders = [scratch / "rows" / f"shard={s.index}" for s in shards]
    files = ", ".join(literal(f"{glob.escape(str(folder))}/*.parquet") for folder in folders)
    rows = f"read_parquet([{files}], hive_partitioning=false)"
    feature = _item_feature(schema)
    return rows if feature is None else f"(SELECT *, f{feature} AS item FROM {rows})"


def _item_feature(schema: DataSchema) -> int | None:
    """Index of the feature that is the item column too, so that its rows need not hold it twice."""
    found = [i for i, f in enumerate(schema.features) if f.name == schema.item and f.kind == "categorical"]
    return found[0] if found else None


def _item_vocabulary(schema: DataSchema) -> int | None:
    """Index of the embedding table whose vocabulary is the items of training rows, all of them and nothing else."""
    feature = _item_feature(schema)
    for index, members in enumerate(schema.tables().values()):
        alone = feature is not None and members == [schema.features[feature]]
        if alone and members[0].min_count == 1 and members[0].hash_buckets is None:
            return index
    return None


# ------------------------------------------------------------------------------------------------- learn


def _learn(con: Connection, schema: DataSchema, scratch: Path, shards: list[ShardPlan], tell: Report) -> PackSchema:
    """Make vocabularies and statistics from training rows, and the pack schema."""
    tables = schema.tables()
    train = _dealt(schema, scratch, [s for s in shards if s.split == "train"])
    num_ids = {}
    for index, (table, features) in enumerate(tables.items()):
        tell("building vocabularies", index, len(tables))
        if features[0].hash_buckets is not None:
            num_ids[table] = features[0].hash_buckets + 1
            continue
        members = [(schema.features.index(f), f.kind) for f in features]
        values = " UNION ALL ".join(
            f"SELECT {f'f{i}' if kind == 'categorical' else f'unnest(f{i})'} AS value FROM {train}"
            for i, kind in members
        )
        con.execute(f"""
            CREATE TABLE vocab_{index} AS SELECT value, count,
                row_number() OVER (ORDER BY count DESC, CAST(value AS VARCHAR)) AS id
            FROM (SELECT value, count(*) AS count FROM ({values}) WHERE value IS NOT NULL GROUP BY value)
            WHERE count >= {features[0].min_count}""")
        size = scalar(con, f"SELECT count(*) FROM vocab_{index}")
        num_ids[table] = size + 1
    tell("building vocabularies", len(tables), len(tables))
    if (vocabulary := _item_vocabulary(schema)) is not None:
        con.execute(f"CREATE VIEW seen_items AS SELECT value FROM vocab_{vocabulary}")
    elif schema.item is not None:
        con.execute(f"CREATE TABLE seen_items AS SELECT DISTINCT item AS value FROM {train}")
    if schema.item_statistics:
        _item_statistics(con, train)
    return PackSchema(
        features=tuple(
            Feature(name=f.name, kind=f.kind, num_ids=num_ids[f.table], table=f.table, pooling=f.pooling)
            for f in schema.features
        ),
        numeric=_numeric_columns(con, schema, train),
        label=schema.label,
        binary_label=scalar(con, f"SELECT bool_and(label IN (0, 1)) FROM {_dealt(schema, scratch, shards)}"),
        task=schema.task,
        item=schema.item,
        time=schema.time,
        label_mean=_label_mean(con, train),
    )


def _label_mean(con: Connection, train: str) -> float:
    """Mean training label, the same bits whatever order the rows come in."""
    scale = _label_scale(con, train)
    query = f"SELECT {_exact_sum('CAST(label AS DOUBLE)', scale)}, count(*) FROM {train}"
    total, count = con.execute(query).fetchall()[0]
    return float(total or 0) / scale / max(int(count), 1)


def _item_statistics(con: Connection, train: str) -> None:
    """Tables `item_folds` and `item_totals`: rows and label sum of every item, by fold and in all (NULL: all items)."""
    scale = _label_scale(con, train)
    con.execute(f"""
        CREATE TABLE item_sums AS SELECT item AS value, fold, {_exact_sum("CAST(label AS DOUBLE)", scale)} AS total,
            count(*) AS count FROM {train} GROUP BY ALL""")
    sums = f"CAST(sum(total) AS DOUBLE) / {scale!r} AS label_sum, CAST(sum(count) AS BIGINT) AS count FROM item_sums"
    con.execute(f"CREATE TABLE item_folds AS SELECT value, fold, {sums} GROUP BY value, fold")
    con.execute(f"""CREATE TABLE item_totals AS SELECT value, {sums} GROUP BY value
                    UNION ALL SELECT NULL, {sums}""")


def _label_scale(con: Connection, train: str) -> float:
    return _fixed_point(float(scalar(con, f"SELECT max(abs(CAST(label AS DOUBLE))) FROM {train}") or 0.0))


def _fixed_point(largest: float | None) -> float:
    """Power of two that turns values up to `largest` into integers of 52 bits, whose sums do not depend on order."""
    return 2.0 ** min(52 - math.frexp(largest)[1], 1000) if largest else 1.0


def _exact_sum(value: str, scale: float) -> str:
    return f"sum(CAST(round({value} * {scale!r}) AS BIGINT))"


def _numeric_columns(con: Connection, schema: DataSchema, train: str) -> tuple[NumericColumn, ...]:
    """Mean and standard deviation of every numeric column over the training rows that have it."""
    relation = with_statistics(train, schema)

    def one_row(expressions: list[str]) -> list[Any]:
        return list(con.execute(f"SELECT {', '.join(expressions)} FROM {relation}").fetchall()[0])

    def means_of(values: list[str], scales: list[float]) -> list[float]:
        sums = one_row([_exact_sum(value, scale) for value, scale in zip(values, scales, strict=True)])
        return [float(total or 0) / scale / max(n, 1) for total, scale, n in zip(sums, scales, counts, strict=True)]

    values = numeric_values(con, schema)
    if not values:
        return ()
    found = one_row([f"count({value})" for value in values] + [f"max(abs({value}))" for value in values])
    counts, largest = found[: len(values)], [float(x or 0) for x in found[len(values) :]]
    means = means_of(values, [_fixed_point(x) for x in largest])
    squares = [f"(({value}) - {mean!r}) * (({value}) - {mean!r})" for value, mean in zip(values, means, strict=True)]
    variances = means_of(squares, [_fixed_point((2 * x) ** 2) for x in largest])
    logs = [c.log for c in schema.numeric] + [False] * (len(values) - len(schema.numeric))
    return tuple(
        NumericColumn(name=name, mean=mean, std=math.sqrt(variance) or 1.0, log=log)
        for name, mean, variance, log in zip(schema.numeric_names(), means, variances, logs, strict=True)
    )


# ------------------------------------------------------------------------------------------------- write


def _write_vocabularies(con: Connection, writer: PackWriter, schema: DataSchema) -> None:
    for index, (table, features) in enumerate(schema.tables().items()):
        if features[0].hash_buckets is None:
            query = f"SELECT CAST(value AS VARCHAR) AS value, count FROM vocab_{index} ORDER BY id"
            found = con.sql(query).to_arrow_table()
            writer.write_vocab(table, found["value"], found["count"].to_numpy())
    if schema.item_statistics:
        file = writer.directory / "vocab" / f"{ITEM_STATISTICS}.parquet"
        con.execute("SET preserve_insertion_order=true")
        con.execute(f"""COPY (SELECT CAST(value AS VARCHAR) AS value, label_sum, count FROM item_totals
                              ORDER BY value NULLS FIRST) TO {literal(str(file))} (FORMAT parquet)""")
        con.execute("SET preserve_insertion_order=false")


def _write_shards(
    con: Connection,
    writer: PackWriter,
    schema: DataSchema,
    pack_schema: PackSchema,
    settings: Settings,
    scratch: Path,
    shards: list[ShardPlan],
    counts: dict[str, Any],
    tell: Report,
) -> None:
    cold = dict.fromkeys(SPLITS, 0)
    with ThreadPoolExecutor(1) as background:
        saved: Future[None] | None = None
        for done, shard in enumerate(shards):
            tell("writing shards", done, len(shards))
            arrays = _shard_arrays(con, schema, pack_schema, settings, scratch, shard)
            cold[shard.split] += int(arrays["item_cold"].sum())
            if saved is not None:
                saved.result()
            saved = background.submit(writer.add_shard, shard.split, arrays)
            keys = con.sql(f"SELECT key FROM tasks WHERE shard = {shard.index} ORDER BY task_id").to_arrow_table()[
                "key"
            ]
            writer.write_tasks(arrays["task_id"], keys, [shard.split] * len(keys))
        if saved is not None:
            saved.result()
    tell("writing shards", len(shards), len(shards))
    counts["splits"] = {
        name: _split_summary(con, name, cold[name]) for name in SPLITS if any(s.split == name for s in shards)
    }
    counts["cold_items"] = _cold_items(con, schema, scratch, shards)


def _in_order(con: Connection, rows: str, settings: Settings) -> tuple[str, str]:
    """A shard's rows and their order: by task, support first, each by time."""
    if settings.split_query == "last":
        return rows, "b.task_id, b.time, b.file, b.row"
    drawn = md5_64(literal(f"query|{settings.seed}"), "file", "row")
    con.execute(f"""
        CREATE OR REPLACE TEMP TABLE ranked AS
        SELECT *, row_number() OVER (PARTITION BY task_id ORDER BY {drawn}, file, row) AS rank FROM {rows}""")
    return "ranked", "b.task_id, b.rank > b.num_support, b.time, b.rank"


def _shard_arrays(
    con: Connection, schema: DataSchema, pack_schema: PackSchema, settings: Settings, scratch: Path, shard: ShardPlan
) -> dict[str, Array]:
    rows, order = _in_order(con, _dealt(schema, scratch, [shard]), settings)
    more = ["label"] + ["time"] * (schema.time is not None)
    known = _item_vocabulary(schema) is not None
    if schema.item is not None and not known:
        rows = f"""(SELECT r.*, CAST(i.value IS NULL AS UTINYINT) AS item_cold
                    FROM {rows} r LEFT JOIN seen_items i ON i.value = r.item)"""
        more.append("item_cold")
    arrays = encode(con, rows, schema, pack_schema.numeric, order, more)
    if known:
        one_valued = [f.name for f in schema.features if f.kind == "categorical"]
        arrays["item_cold"] = (arrays["ids"][:, one_valued.index(str(schema.item))] == OOV).astype(np.uint8)
    arrays.setdefault("item_cold", np.zeros(len(arrays["label"]), np.uint8))
    tasks = con.execute(f"""
        SELECT task_id, CAST(sum(num_rows) OVER (ORDER BY task_id) AS BIGINT) - num_rows AS row_start,
               CAST(num_support AS INTEGER) AS num_support, num_rows
        FROM tasks WHERE shard = {shard.index} ORDER BY task_id""").fetchnumpy()
    if tasks.pop("num_rows").sum() != len(arrays["label"]):
        raise ValueError("the input changed while it was read: no pack was made; run again when nothing writes to it")
    return arrays | {name: np.asarray(array) for name, array in tasks.items()}


# ----------------------------------------------------------------------------------------------- summary


def _split_summary(con: Connection, split: str, cold_rows: int) -> dict[str, Any]:
    where = f"WHERE split = {literal(split)}"
    sizes = con.execute(f"SELECT num_support, num_rows FROM tasks {where} ORDER BY task_id").fetchnumpy()
    support = sizes["num_support"].astype(np.int64)
    query = sizes["num_rows"].astype(np.int64) - support
    seen = f"SELECT count(*) FROM tasks {where} AND key IN (SELECT key FROM tasks WHERE split = 'train')"
    warm = scalar(con, seen)
    rows = int(support.sum() + query.sum())
    return {
        "tasks": len(support),
        "rows": rows,
        "support": [int(support.min()), float(np.median(support)), int(support.max())],
        "query": [int(query.min()), float(np.median(query)), int(query.max())],
        "padding": round(_expected_padding(support, query), 4),
        "cold_tasks": round(1 - warm / len(support), 4),
        "cold_item_rows": round(cold_rows / rows, 4),
    }


def _expected_padding(support: Array, query: Array) -> float:
    """Share of cells that is padding when tasks are bucketed by size into batches of BATCH_TASKS."""
    cells = sum(
        len(slots) * int(support[slots].max() + query[slots].max())
        for slots in bucket_by_size(support, query, BATCH_TASKS)
    )
    return 1 - int(support.sum() + query.sum()) / cells


def _cold_items(con: Connection, schema: DataSchema, scratch: Path, shards: list[ShardPlan]) -> int:
    """Items that no training row has."""
    if schema.item is None:
        return 0
    held_out = [shard for shard in shards if shard.split != "train"]
    if not held_out:
        return 0
    query = f"SELECT count(DISTINCT item) FROM {_dealt(schema, scratch, held_out)} WHERE item NOT IN (FROM seen_items)"
    return int(scalar(con, query))


def print_summary(summary: dict[str, Any]) -> None:
    """Print what `prepare` returned as tables."""
    console = Console()
    table = Table(title=f"task pack {summary['out']}")
    table.add_column("split")
    for name in ("tasks", "rows", "support", "query", "padding", "cold tasks", "rows of cold items"):
        table.add_column(name, justify="right")
    for name, s in summary["splits"].items():
        sizes = [f"{low} / {middle:g} / {high}" for low, middle, high in (s["support"], s["query"])]
        shares = [f"{s[key]:.1%}" for key in ("padding", "cold_tasks", "cold_item_rows")]
        table.add_row(name, f"{s['tasks']:,}", f"{s['rows']:,}", *sizes, *shares)
    console.print(table)
    console.print(f"support and query: min / median / max rows of a task; padding at {BATCH_TASKS} tasks a batch")
    console.print(f"items in no training row: {summary['cold_items']:,}")
    console.print("ids: " + ", ".join(f"{name} {size:,}" for name, size in summary["vocab"].items()))
    if summary.get("empty_files"):
        console.print(f"skipped: {summary['empty_files']:,} empty files")
    for reason, tasks in summary["dropped_tasks"].items():
        console.print(f"left out: {tasks:,} tasks ({summary['dropped_rows'][reason]:,} rows): {reason}")
    for reason, rows in summary["bad_rows"].items():
        console.print(f"in rejects.parquet: {rows:,} rows: {reason}")
