"""Raw rows in the encoding of a trained run: those of two files, for `predict`, and those of tables in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from gmeta.data.item_vectors import open_item_vectors
from gmeta.data.prepare.check import check, create_checked, describe_rejects, reject_counts
from gmeta.data.prepare.columns import label_columns
from gmeta.data.prepare.direct import DirectEncoder
from gmeta.data.prepare.encode import Array, encode, take_labels
from gmeta.data.prepare.texts import place_texts
from gmeta.data.prepare.vocabulary import HashedVocabulary, load_vocabularies, vocabulary_files
from gmeta.data.schema import ENCODING, DataSchema, PackSchema, Role, data_schema_from_json
from gmeta.data.sources import (
    Connection,
    RawPart,
    confine,
    database,
    described,
    find_files,
    only_file,
    open_file,
    reading,
)


@dataclass(frozen=True)
class EncodedTables:
    """The tasks of raw support and query rows, laid out as a shard is."""

    keys: list[str]  # raw key of each task
    arrays: dict[str, Array]  # as a shard's, without time; label is 0 in query rows, weight 1, item_cold is 0
    query_row: Array  # int64 [rows], row of the query (from 0), -1 for support rows
    texts: dict[str, list[str]] = field(default_factory=dict)  # table -> texts that the run lacks; ids from num_texts


class Encoder:
    """A run's encoding, with its vocabularies in memory. Several threads may use it at once.

    `files` are those that `parts` will read; without them the encoder is for tables, which it reads directly where it
    can. ValueError for a vocabulary file that is missing or damaged.
    """

    def __init__(
        self, data_schema_json: dict[str, Any], vocab_dir: Path, pack_schema: PackSchema, files: Sequence[Path] = ()
    ) -> None:
        self._schema, self._pack_schema, self._vocab_dir = (
            data_schema_from_json(data_schema_json),
            pack_schema,
            vocab_dir,
        )
        self._vectors = open_item_vectors(vocab_dir, pack_schema)
        self._con, self._lock = database(), Lock()
        confine(self._con, [*files, *vocabulary_files(self._schema, vocab_dir)])
        self._direct: DirectEncoder | None = None
        if files or pack_schema.encoding != ENCODING:
            _ = self._vocabularies
        else:
            self._direct = DirectEncoder(self._con, self._schema, vocab_dir, pack_schema, self._vectors)

    @cached_property
    def _vocabularies(self) -> dict[str, HashedVocabulary]:
        """Return what DuckDB looks values up in. An encoder of plain tables never needs it."""
        return load_vocabularies(self._con, self._schema, self._vocab_dir)

    def table(self, table: pa.Table, role: Literal["support", "candidates"]) -> EncodedTables:
        """Encode one table of raw rows: labelled support rows, or candidates without labels.

        The table has at least one row. Tasks come in the order in which it first names them. Raises ValueError for
        missing columns and rows that cannot be used, with row, column and value.
        """
        found = None if self._direct is None else self._direct.rows(table, support=role == "support")
        if found is not None:
            query_row = np.full(table.num_rows, -1) if role == "support" else found.row
            return EncodedTables(found.keys, found.arrays, query_row, found.texts)
        numbered = table.append_column("__row", pa.array(np.arange(1, table.num_rows + 1)))
        with self._con.cursor() as con:
            try:
                con.register("given", numbered)
                part = described(con, role, "SELECT * FROM given", ordered=False)
            except duckdb.NotImplementedException as error:
                kinds = ", ".join(f"{field.name} {field.type}" for field in table.schema)
                raise ValueError(
                    f"{role} has a column of a type that cannot be read ({kinds}): make it text, or plain numbers"
                ) from error
            return self._encoded(con, part, None) if role == "support" else self._encoded(con, None, part)

    def together(
        self, table: pa.Table, role: Literal["support", "candidates"], group: Sequence[int]
    ) -> tuple[EncodedTables, list[int]] | None:
        """Encode the rows of several tables that are one, where `group` says which each row is of; None where `table`
        would need the database. Return them with the group of each task: rows of one key in two groups are two tasks.
        """
        found = None if self._direct is None else self._direct.rows(table, support=role == "support", group=group)
        if found is None:
            return None
        query_row = np.full(table.num_rows, -1) if role == "support" else found.row
        return EncodedTables(found.keys, found.arrays, query_row, found.texts), found.group

    def parts(self, support: RawPart, query: RawPart) -> EncodedTables:
        """Encode raw rows as `encode_tables` does, of files that the encoder was made for."""
        with self._con.cursor() as con:
            return self._encoded(con, support, query)

    def dealt(self, files: Sequence[Path], *, query: bool) -> EncodedTables:
        """Encode a part that `deal_tasks` wrote, of files that the encoder was made for. The tasks are those of the
        query, or without one those of the support; the part has at least one of them.
        """
        with self._con.cursor() as con:
            rows = f"read_parquet([{', '.join(map(only_file, files))}], hive_partitioning=false)"
            con.execute(f"CREATE TEMP VIEW raw_rows AS SELECT * FROM {rows}")
            return self._laid_out(con, query=query)

    def _encoded(self, con: Connection, support: RawPart | None, query: RawPart | None) -> EncodedTables:
        """Encode the rows of one or both; the tasks are those of the query where there is one."""
        check_rows(con, self._schema, self._pack_schema, support, query)
        with reading(" or ".join(part.file for part in (support, query) if part is not None)):
            found = self._laid_out(con, query=query is not None)
        if query is not None and not found.keys:
            raise ValueError(f"{query.file} has no rows: there is nothing to score")
        return found

    def _laid_out(self, con: Connection, *, query: bool) -> EncodedTables:
        """Encode the rows of view `raw_rows`, task by task."""
        con.execute(f"""
            CREATE TEMP TABLE placed AS
            SELECT s.*, NULL::INTEGER AS fold,
                   row_number() OVER (ORDER BY q.first, s.file, s.time, s.time_fraction, s.row) - 1 AS pos
            FROM raw_rows s JOIN (
                SELECT task, min(row) AS first FROM raw_rows WHERE file = {int(query)} GROUP BY task
            ) q USING (task)""")
        tasks = con.execute("""
            SELECT task, min(pos) AS row_start, count(*) FILTER (file = 0) AS num_support
            FROM placed GROUP BY task ORDER BY row_start""").fetchnumpy()
        missing = "CASE b.file WHEN 0 THEN 'nan'::FLOAT ELSE 0 END" if self._schema.labels else "0"
        of_rows = [f"coalesce(b.{name}, {missing}) AS {name}" for name in label_columns(self._schema)]
        of_rows.append("CASE b.file WHEN 1 THEN b.row - 1 ELSE -1 END AS query_row")
        of_rows += [] if self._schema.weight is None else ["coalesce(b.weight, 1) AS weight"]
        rows = con.execute(f"SELECT {', '.join(of_rows)} FROM placed b ORDER BY b.pos").fetchnumpy()
        with self._lock:
            vocabularies = self._vocabularies
        texts = place_texts(con, self._schema, self._pack_schema, "placed", vocabularies)
        arrays = encode(
            con,
            "placed",
            self._schema,
            self._pack_schema,
            order="b.pos",
            hashed=vocabularies,
            item_vectors=self._vectors,
        )
        arrays |= {
            "label": take_labels(self._schema, rows).astype(np.float32),
            "item_cold": np.zeros(len(rows["query_row"]), np.uint8),
            "task_id": np.arange(len(tasks["task"]), dtype=np.int64),
            "row_start": tasks["row_start"].astype(np.int64),
            "num_support": tasks["num_support"].astype(np.int32),
        }
        if "weight" in rows:
            arrays["weight"] = rows["weight"].astype(np.float32)
        return EncodedTables([str(k) for k in tasks["task"]], arrays, rows["query_row"].astype(np.int64), texts)


def check_rows(
    con: Connection, schema: DataSchema, pack_schema: PackSchema, support: RawPart | None, query: RawPart | None
) -> None:
    """Make the temporary view `raw_rows` of the checked rows: of the support, file 0, and of the query, file 1.

    Raises ValueError for missing columns and rows that cannot be used, with file, row, column and value.
    """
    relations = []
    roles: list[Role] = ["task", "item"] if schema.item_statistics else ["task"]
    of_support: list[Role] = [*roles, "label"]
    if support is not None and schema.time in support.columns:
        of_support.append("time")  # a level that drifts, and the last rows of a support, need their order
    if support is not None and schema.weight in support.columns:
        of_support.append("weight")  # rows without one count 1
    create_checked(con, schema, types={})
    for index, (part, needed) in enumerate(((support, of_support), (query, roles))):
        if part is not None:
            with reading(part.file):
                encoding = pack_schema.encoding
                relations.append(check(con, part, index, schema, needed, {}, encoding, known_items=True))
    if counts := reject_counts(con):
        files = ["" if part is None else part.file for part in (support, query)]
        raise ValueError(f"{sum(counts.values())} rows cannot be used:\n{describe_rejects(con, files)}")
    con.execute(f"CREATE TEMP VIEW raw_rows AS {' UNION ALL '.join(dict.fromkeys(relations))}")


def encode_tables(
    support_path: str, query_path: str, data_schema_json: dict[str, Any], vocab_dir: Path, pack_schema: PackSchema
) -> EncodedTables:
    """Encode raw support rows (labelled) and query rows (label not needed) with a run's vocabularies and encoding.

    Tasks come in the order in which the query file first names them; tasks that it does not name are left out. A
    task may have no support; its rows come by time where the file has the schema's time column, else as they are.
    Raises ValueError for missing files and columns, and for rows that cannot be used, with file, row, column and value.
    """
    paths = (support_path, query_path)
    files = [only_table(path) for path in paths]
    with database() as con:
        support, query = (opened_table(con, path, file) for path, file in zip(paths, files, strict=True))
    return Encoder(data_schema_json, vocab_dir, pack_schema, files).parts(support, query)


def only_table(path: str) -> Path:
    """Return the one file that a path or pattern stands for. ValueError where there are several, or none."""
    found = find_files([path])
    if len(found) != 1:
        raise ValueError(f"{path} stands for {len(found)} files: give one Parquet or CSV file")
    return found[0]


def opened_table(con: Connection, path: str, file: Path) -> RawPart:
    """Open a file as raw rows that messages call as the user did."""
    with reading(path):
        return replace(open_file(con, file), file=path)
