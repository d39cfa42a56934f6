"""`gmeta prepare`: raw rows to a task pack, in memory that does not grow with the data.

    check       every file's rows; those that cannot be used apart. CSV goes to a table, Parquet stays where it is
    tasks       rows to tasks: which are kept, their split, support size, place and shard
    deal        rows to one Parquet file a shard; from here on a shard is an independent job
    vocabulary  vocabularies, item statistics, means and deviations, all of training rows only
    encode      a shard's rows to arrays, sorted
    write       a shard, while the next one is encoded

Each stage is a module of this name beside this one. Everything random is a seeded MD5 of (key) or (file, row), every
order is total, and sums are exact, so that the pack depends neither on threads nor on the memory limit.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from gmeta.config.data import PrepareConfig
from gmeta.data.datasets import open_data_set
from gmeta.data.pack import PackWriter
from gmeta.data.prepare.check import check, create_checked, describe_rejects, id_types, reject_counts
from gmeta.data.prepare.cut import rows_on_both_sides
from gmeta.data.prepare.deal import deal
from gmeta.data.prepare.scratch import connect, disk_errors, require_space, scratch_directory
from gmeta.data.prepare.settings import Settings, resolve_settings
from gmeta.data.prepare.summary import Report, console_report, print_summary
from gmeta.data.prepare.tasks import make_tasks, row_bytes
from gmeta.data.prepare.times import common_time
from gmeta.data.prepare.vocabulary import learn
from gmeta.data.prepare.write import write_shards, write_vocabularies
from gmeta.data.schema import DataSchema, Role
from gmeta.data.sources import Connection, RawPart, find_files, in_order, literal, open_files, reading, scalar

__all__ = ["prepare", "print_summary"]


def prepare(config: PrepareConfig, report: Report | None = None) -> dict[str, Any]:
    """Make the task pack `config.out`; returns the summary that `print_summary` prints.

    Raises ValueError for everything that is the user's to mend: files, columns, rows that cannot be used, settings
    that do not go together, tasks that are too few, a full disk. No pack is left behind then.
    """
    out = Path(config.out)
    schema, settings = resolve_settings(config)
    reporting = console_report() if report is None else nullcontext(report)
    with reporting as tell, scratch_directory(out) as scratch, disk_errors(scratch), connect(scratch, config) as con:
        counts = _check_all(con, config, schema, settings, scratch, tell)
        tell("making tasks", 0, 1)
        shards = make_tasks(con, schema, settings, counts)
        rows = scalar(con, "SELECT coalesce(sum(num_rows), 0)::BIGINT FROM tasks")
        require_space(out, needed=int(2 * rows * row_bytes(con, schema)))
        if settings.split_query == "column" and (both := rows_on_both_sides(con, schema, settings)):
            counts["rows_on_both_sides"] = both
        tell("dealing rows to shards", 0, 1)
        deal(con, schema, settings, scratch)
        pack_schema = learn(con, schema, scratch, shards, tell)
        counts["vocab"] = {f.table: f.num_ids for f in pack_schema.features}
        if pack_schema.binary_label and pack_schema.label_mean in (0, 1):
            counts["only_label"] = pack_schema.label_mean
        made_with = {**settings.to_json(), "input": config.inputs, "dataset": config.dataset}
        with PackWriter(out, pack_schema, settings=made_with, data_schema=schema.to_json()) as writer:
            write_vocabularies(con, writer, schema)
            write_shards(con, writer, schema, pack_schema, settings, scratch, shards, counts, tell)
            if counts["bad_rows"]:
                shutil.copyfile(scratch / "rejects.parquet", writer.directory / "rejects.parquet")
            writer.finish(counts=counts)
    return {"out": str(out), **counts}


def _check_all(
    con: Connection, config: PrepareConfig, schema: DataSchema, settings: Settings, scratch: Path, tell: Report
) -> dict[str, Any]:
    """Check all files and make view `raw_rows` of the rows that can be used; returns the counts so far."""
    roles: list[Role] = ["task", "label", "time", "item"]
    if settings.task_split == "column":
        roles.append("partition")
    if settings.split_query == "column":
        roles.append("role")
    parts, empty = _parts(con, config)
    types = id_types(schema, parts)
    create_checked(con, schema, types)
    relations = []
    for index, part in enumerate(parts):
        tell("reading files", index, len(parts))
        with reading(part.file):
            relations.append(check(con, part, index, schema, roles, types, sides=settings.roles))
    time = common_time(con, parts, schema.time)
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
    union = " UNION ALL ".join(dict.fromkeys(relations))
    con.execute(f"CREATE VIEW raw_rows AS SELECT * EXCLUDE (time_fraction) REPLACE ({time} AS time) FROM ({union})")
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
    with in_order(con):
        con.execute(f"""
            COPY (SELECT name AS file, row, bad_column AS "column", bad_value AS value, reason
                  FROM rejects JOIN file_names USING (file) ORDER BY file, row)
            TO {literal(str(scratch / "rejects.parquet"))} (FORMAT parquet)""")
    con.unregister("file_names")
