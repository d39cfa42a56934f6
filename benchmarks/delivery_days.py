"""Days for delivery.py: the rows of a synthetic stream, or of a real log cut by time; how they are delivered, and what
a version scores on them.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, here
from numpy.typing import NDArray

from gmeta.cli import run as run_command
from gmeta.parallel.launch import EXIT_REFUSED
from gmeta.recommender.recommender import load

QUERY_ROWS, HISTORY_ROWS = 10, 50
SLICES = ("warm", "user_cold", "item_cold", "both_cold")


@dataclass(frozen=True)
class Stream:
    """Days of rows on disk: those of `base` come first, then `days` more, and one that is only predicted."""

    name: str
    root: Path
    base: int
    days: int
    features: tuple[str, ...]  # raw columns besides task, item, time and label
    task: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    label: str = "label"

    @property
    def schema(self) -> Path:
        """Return the file that says what the columns mean."""
        return self.root / "schema.yaml"

    def day(self, number: int) -> Path:
        """Return the folder of a day's rows."""
        return self.root / f"day={number:02d}"

    def until(self, number: int) -> list[str]:
        """Return the folders of all days up to this one."""
        return [str(self.day(day)) for day in range(number + 1)]

    def next_rows(self, number: int) -> tuple[pa.Table, pa.Table, NDArray[np.str_]]:
        """Return what is to be predicted of day `number`: the last rows of each task as query, what came before as
        support, and each query row's slice, by what the days before have shown.
        """
        files = [f"'{folder}/*.parquet'" for folder in self.until(number)]
        earlier, today = ", ".join(files[:-1]), files[-1]
        with duckdb.connect() as con:
            con.execute("SET threads=1")
            con.execute(f"CREATE TABLE today AS SELECT * FROM read_parquet([{today}])")
            con.execute(f"""
                CREATE TABLE before AS SELECT * FROM read_parquet([{earlier}])
                WHERE {self.task} IN (SELECT {self.task} FROM today)""")
            con.execute(f"CREATE TABLE items AS SELECT DISTINCT {self.item} FROM read_parquet([{earlier}])")
            con.execute(f"""
                CREATE TABLE ranked AS SELECT *, row_number() OVER (
                    PARTITION BY {self.task} ORDER BY today, {self.time}, {self.item}) AS place,
                    count(*) OVER (PARTITION BY {self.task}) AS rows
                FROM (SELECT *, 1 AS today FROM today UNION ALL SELECT *, 0 AS today FROM before)""")
            query = f"today = 1 AND place > rows - {QUERY_ROWS}"
            found = con.sql(f"""
                SELECT r.* EXCLUDE (today, place, rows), CASE
                    WHEN {self.task} IN (SELECT {self.task} FROM before)
                        THEN CASE WHEN {self.item} IN (FROM items) THEN 'warm' ELSE 'item_cold' END
                    ELSE CASE WHEN {self.item} IN (FROM items) THEN 'user_cold' ELSE 'both_cold' END END AS slice
                FROM ranked r WHERE {query} ORDER BY {self.task}, place""").to_arrow_table()
            support = con.sql(f"""
                SELECT * EXCLUDE (today, place, rows) FROM ranked
                WHERE NOT ({query}) AND place > rows - {QUERY_ROWS + HISTORY_ROWS}
                ORDER BY {self.task}, place""").to_arrow_table()
        return support, found.drop_columns("slice"), np.array(found["slice"].to_pylist())


def begins(stream: Stream) -> tuple[object, ...]:
    """Return the words of a first or full version. Its held-out tasks are enough for the gate's rules on a day."""
    return "--schema", stream.schema, "--prepare_with", json.dumps({"test_fraction": 0.15})


def deliver(*words: object) -> None:
    """Run `gmeta deliver` in this process; a candidate that the gate refuses is no failure."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = run_command(["deliver", *map(str, words)])
    if code not in (0, EXIT_REFUSED):
        raise RuntimeError(f"gmeta deliver {' '.join(map(str, words))} ended with {code}:\n{said.getvalue()}")


def synthetic(root: Path, seed: int, *, base: int, days: int, users: int, items: int = 500) -> Stream:
    """Make the stream of a seed, with one day more, which is only predicted."""
    if not root.exists():
        size = ("--users", users, "--items", items)
        here("synth", "--out", root, "--days", base + days + 1, *size, "--seed", seed)
    features = ("gender", "age", "city", "category", "brand", "price")
    return Stream("stream", root, base, days, features)


def movielens(root: Path, *, base: int, days: int) -> Stream:
    """Cut MovieLens-100K, ratings of 4 and more as clicks, into days of equal numbers of rows by its time stamps."""
    if not root.exists():
        partial = root.with_name(root.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        log = DATA / "ml-100k" / "ml-100k.inter"
        with duckdb.connect() as con:
            rows = con.sql(f"""
                SELECT column0 AS user_id, column1 AS item_id, CAST(column2 >= 4 AS INTEGER) AS label,
                       CAST(column3 AS BIGINT) AS timestamp
                FROM read_csv('{log}', delim='\\t', header=false, skip=1)
                ORDER BY timestamp, user_id, item_id""").to_arrow_table()
        # The base has three quarters of the rows, as 30 of 40 days would.
        first = rows.num_rows * 3 // 4
        cuts = np.linspace(first, rows.num_rows, days + 2).astype(int)
        parts = [np.linspace(0, first, base + 1).astype(int), cuts[1:]]
        edges = np.concatenate(parts)
        for day, (start, end) in enumerate(pairwise(edges)):
            folder = partial / f"day={day:02d}"
            folder.mkdir(parents=True)
            pq.write_table(rows.slice(start, end - start), folder / "rows.parquet")
        schema = "task: user_id\nlabel: label\nitem: item_id\ntime: timestamp\ncategorical: [item_id]\n"
        (partial / "schema.yaml").write_text(schema)
        partial.rename(root)
    return Stream("ml-100k", root, base, days, ())


def scored(version: Path | str, support: pa.Table, query: pa.Table) -> NDArray[np.float64]:
    """Return what a version predicts of the query rows, [N], as one that serves would."""
    return load(version, device="cpu").adapt(support).predict(query)


def columns(stream: Stream, query: pa.Table, slices: NDArray[np.str_]) -> dict[str, Any]:
    """Return task, label and slice of the query rows."""
    return {
        "task": query[stream.task].to_numpy(),
        "label": query[stream.label].to_numpy().astype(np.float64),
        "slice": slices,
    }
