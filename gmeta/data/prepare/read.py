"""The whole of stage 1: all files of an input, checked, as view `raw_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gmeta.config.data import PrepareConfig
from gmeta.data.datasets import open_data_set
from gmeta.data.prepare.check import check, create_checked, describe_rejects, id_types, reject_counts
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report
from gmeta.data.prepare.times import common_time
from gmeta.data.schema import DataSchema, Role
from gmeta.data.sources import Connection, RawPart, find_files, in_order, literal, open_files, reading, scalar


@dataclass(frozen=True)
class UnfitRows:
    """Rows that cannot be used for what a data set says of one of its columns."""

    condition: str  # SQL over `raw_rows`; NULL is no
    column: str  # as its files call it
    value: str  # SQL of what stands there
    reason: str


def check_all(
    con: Connection,
    config: PrepareConfig,
    schema: DataSchema,
    settings: Settings,
    scratch: Path,
    tell: Report,
    made: list[RawPart] | None = None,
    *,
    refused: Sequence[UnfitRows] = (),
) -> dict[str, Any]:
    """Check all files, or rows that were `made` of them, and make view `raw_rows` of the rows that can be used, and are
    not `refused`; returns the counts so far.
    """
    roles: list[Role] = ["task", "label", "weight", "time", "item"]
    if settings.task_split == "column":
        roles.append("partition")
    if settings.split_query == "column":
        roles.append("role")
    parts, empty = _parts(con, config) if made is None else (made, [])
    types = id_types(schema, parts) if config.base is None else {}  # what a base knows is text
    create_checked(con, schema, types)
    relations = []
    for index, part in enumerate(parts):
        tell("reading files", index, len(parts))
        with reading(part.file):
            sides = settings.roles
            relations.append(check(con, part, index, schema, roles, types, sides=sides))
    time = common_time(con, parts, schema.time)
    tell("reading files", len(parts), len(parts))
    union = " UNION ALL ".join(dict.fromkeys(relations))
    every = f"SELECT * EXCLUDE (time_fraction) REPLACE ({time} AS time) FROM ({union})"
    skipped = {"empty_files": len(empty)} if empty else {}
    return {**take_rows(con, config, every, [part.file for part in parts], scratch, refused), **skipped}


def take_rows(
    con: Connection,
    config: PrepareConfig,
    every: str,
    files: list[str],
    scratch: Path,
    refused: Sequence[UnfitRows] = (),
) -> dict[str, Any]:
    """Make view `raw_rows` of the checked rows of a query that are not `refused`, whose `file` is a place among
    `files`; returns the counts so far. ValueError where none is left, or rows are set aside that may not be.
    """
    con.execute(f"CREATE TEMP VIEW raw_rows AS {every} WHERE NOT ({_set_aside(con, every, refused)})")
    bad = reject_counts(con)
    if bad and config.on_bad_rows == "fail":
        reasons = "; ".join(f"{count} × {reason}" for reason, count in bad.items())
        raise ValueError(
            f"{sum(bad.values())} rows cannot be used ({reasons}). The first:\n{describe_rejects(con, files)}\n"
            "Mend them, or set them aside with --on_bad_rows quarantine (of deliver: --prepare_with '{on_bad_rows: "
            "quarantine}')"
        )
    if bad:
        _write_rejects(con, files, scratch)
    rows = scalar(con, "SELECT count(*) FROM raw_rows")
    if rows == 0:
        raise ValueError(f"{', '.join(files)}: no row that can be used ({sum(bad.values())} rows were set aside)")
    return {"rows_read": rows + sum(bad.values()), "bad_rows": bad, "files": files}


def _set_aside(con: Connection, every: str, refused: Sequence[UnfitRows]) -> str:
    """Put refused rows of a query into table `rejects`, each for its first reason; return SQL of whether one is."""
    any_of = "false"
    for refusal in refused:
        con.execute(f"""
            INSERT INTO rejects (file, row, reason, bad_column, bad_value)
            SELECT file, row, {literal(refusal.reason)}, {literal(refusal.column)}, CAST({refusal.value} AS VARCHAR)
            FROM ({every}) WHERE ({refusal.condition}) AND NOT ({any_of})""")
        any_of = f"{any_of} OR coalesce({refusal.condition}, false)"
    return any_of


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
