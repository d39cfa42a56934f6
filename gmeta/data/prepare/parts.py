"""Raw rows in any number: checked once, and dealt to parts on disk that hold whole tasks and fit in memory each.

`Encoder.dealt` encodes a part. Which part a task is in depends on its key and the number of rows alone, so that several
processes may share the parts out, and come to what one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from gmeta.data.prepare.encoder import check_rows, only_table, opened_table
from gmeta.data.schema import PackSchema, data_schema_from_json
from gmeta.data.sources import Connection, confine, database, is_full_disk, literal, reading, scalar

PART_ROWS = 1 << 18
"""Rows of a part, about. A task is divided only where its query has more, and its support never."""
_ROWS = "rows"


@dataclass(frozen=True)
class DealtParts:
    """The parts that `deal_tasks` made in a folder, by number. A part without tasks to compute has no number."""

    folder: Path
    numbers: tuple[int, ...]
    first_continued: int  # parts from this number on hold more query rows of tasks that other parts began

    def files(self, number: int) -> list[Path]:
        """Return the files of a part, for `Encoder.dealt`."""
        return sorted((self.folder / _ROWS / f"part={number}").glob("*.parquet"))

    def all_files(self) -> list[Path]:
        """Return the files of all parts, for `Encoder`."""
        return [file for number in self.numbers for file in self.files(number)]


def deal_tasks(
    support: str,
    query: str | None,
    data_schema_json: dict[str, Any],
    pack_schema: PackSchema,
    folder: Path,
    *,
    memory_limit: str,
) -> None:
    """Check the rows of a support file and, where there is one, of a query file, and deal them to parts in `folder`.
    `open_parts` finds these. DuckDB uses no more than `memory_limit`.

    Raises ValueError for what `Encoder.parts` refuses, for files without rows to compute, and for a full disk.
    """
    schema, paths = data_schema_from_json(data_schema_json), [support, *([] if query is None else [query])]
    files = [only_table(path) for path in paths]
    with limit_errors(folder), database(**_limits(folder, memory_limit)) as con:
        opened = [opened_table(con, path, file) for path, file in zip(paths, files, strict=True)]
        confine(con, files, [folder])
        check_rows(con, schema, pack_schema, opened[0], opened[1] if query is not None else None)
        with reading(" or ".join(paths)):
            counts = dict(con.execute("SELECT file, count(*) FROM raw_rows GROUP BY file").fetchall())
        if not counts.get(len(paths) - 1):
            raise ValueError(f"{paths[-1]} has no rows: there is nothing to {'adapt to' if query is None else 'score'}")
        num_parts = -(-sum(counts.values()) // PART_ROWS)
        con.execute("SET preserve_insertion_order=false")
        with reading(" or ".join(paths)):
            con.execute(f"""
                COPY ({_with_part(con, num_parts)}) TO {literal(str(folder / _ROWS))}
                (FORMAT parquet, COMPRESSION lz4, PARTITION_BY (part))""")
        # The tasks of a part are those of its query, or without one those of its support.
        dealt = f"read_parquet({literal(str(folder / _ROWS / '*' / '*.parquet'))}, hive_partitioning=true)"
        found = con.execute(f"SELECT DISTINCT part FROM {dealt} WHERE file = {len(paths) - 1} ORDER BY part").fetchall()
    (folder / "parts").write_text(" ".join(map(str, [num_parts, *(number for (number,) in found)])))


def _with_part(con: Connection, num_parts: int) -> str:
    """Return SQL of the rows with their part. A query of more than PART_ROWS rows goes on in parts of its own, which
    are numbered from `num_parts` on, and have the task's support too.
    """
    con.execute(f"""
        CREATE TEMP TABLE long_tasks AS
        SELECT task, more, CAST({num_parts} + sum(more) OVER (ORDER BY task) - more AS BIGINT) AS first FROM (
            SELECT task, (count(*) - 1) // {PART_ROWS} AS more FROM raw_rows WHERE file = 1 GROUP BY task)
        WHERE more > 0""")
    part = f"CAST(hash(r.task) % {num_parts} AS BIGINT)"
    whole = f"SELECT r.*, {part} AS part FROM raw_rows r"
    if not scalar(con, "SELECT count(*) FROM long_tasks"):
        return whole
    joined = "FROM raw_rows r JOIN long_tasks l ON l.task = r.task"
    return f"""
        {whole} WHERE r.file = 0 OR r.task NOT IN (SELECT task FROM long_tasks)
        UNION ALL SELECT r.*, l.first + unnest(range(l.more)) AS part {joined} WHERE r.file = 0
        UNION ALL SELECT r.* EXCLUDE (first, place),
                  CASE WHEN r.place < {PART_ROWS} THEN {part} ELSE r.first - 1 + r.place // {PART_ROWS} END AS part
        FROM (SELECT r.*, l.first, row_number() OVER (PARTITION BY r.task ORDER BY r.row) - 1 AS place
              {joined} WHERE r.file = 1) r"""


def open_parts(folder: Path) -> DealtParts:
    """Return the parts that `deal_tasks` made."""
    num_parts, *numbers = map(int, (folder / "parts").read_text().split())
    return DealtParts(folder, tuple(numbers), num_parts)


@contextmanager
def joined_with_results(folder: Path, results: Path, *, memory_limit: str) -> Iterator[Connection]:
    """Give a connection with view `results` of all Parquet files in a folder."""
    with limit_errors(folder), database(**_limits(folder, memory_limit)) as con:
        con.execute(f"CREATE VIEW results AS SELECT * FROM read_parquet({literal(str(results / '*.parquet'))})")
        yield con


@contextmanager
def limit_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, or a memory limit that is too low, into a ValueError that says what to do."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise ValueError(f"memory_limit is too low ({str(error).splitlines()[0]}): raise it") from error
    except duckdb.Error as error:
        if not is_full_disk(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{folder.parent} has no space for what does not fit in memory ({reason}): free space there or choose "
            "another out"
        ) from error


def _limits(folder: Path, memory_limit: str) -> dict[str, Any]:
    return {"memory_limit": memory_limit, "temp_directory": str(folder / "spill")}
