"""Vectors of items: found in the raw rows once for each item, and written by id when the vocabulary is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gmeta.data.item_vectors import DTYPE, vector_file
from gmeta.data.prepare.deal import item_feature
from gmeta.data.schema import DataSchema, PackSchema, Vector
from gmeta.data.sources import Connection

_ROWS = 1 << 14


def find_item_vectors(
    con: Connection, schema: DataSchema, files: Sequence[str], known: Mapping[str, str] | None = None
) -> None:
    """Make table `item_vectors_<index>` (value, vector) of each vector that is kept by item, from all rows that can be
    used, whatever their split: a vector says nothing of labels. `known` has SQL of those that are told by item.

    Of an item with several vectors the last by time counts. ValueError where there is no time to tell, with two rows.
    """
    for index, vector in enumerate(schema.vector):
        if vector.owner != "item":
            continue
        if known and vector.name in known:
            con.execute(f"CREATE TABLE item_vectors_{index} AS {known[vector.name]}")
            continue
        value = f"f{item_feature(schema)}"
        if schema.time is None:
            _refuse_several(con, schema, vector, index, value, files)
        con.execute(f"""
            CREATE TABLE item_vectors_{index} AS SELECT {value} AS value, v{index} AS vector FROM raw_rows
            WHERE {value} IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY {value} ORDER BY time DESC, file DESC, row DESC) = 1""")


def _refuse_several(
    con: Connection, schema: DataSchema, vector: Vector, index: int, value: str, files: Sequence[str]
) -> None:
    found = con.execute(f"""
        SELECT a.{value}, a.file, a.row, b.file, b.row
        FROM (SELECT *, first_value(v{index}) OVER w AS first, first_value(file) OVER w AS file_0,
                     first_value(row) OVER w AS row_0
              FROM raw_rows WINDOW w AS (PARTITION BY {value} ORDER BY file, row)) a
        JOIN LATERAL (SELECT a.file_0 AS file, a.row_0 AS row) b ON true
        WHERE a.{value} IS NOT NULL AND a.v{index} <> a.first ORDER BY a.file, a.row LIMIT 1""").fetchone()
    if found is not None:
        item, file, row, first_file, first_row = found
        raise ValueError(
            f"item {item!r} has two vectors {vector.name!r}: {files[first_file]}, row {first_row} and {files[file]}, "
            f"row {row}. Name the time in the schema, so that the last one counts, or say owner: row"
        )


def write_item_vectors(
    con: Connection, schema: DataSchema, pack_schema: PackSchema, directory: Path, base: Path | None = None
) -> None:
    """Write the vectors by the ids of `vocab_<index of the items' table>` to a directory of vocabularies.

    Those that a base's directory has stay, where these rows have none of the item; tombstones get zeros.
    """
    tables = list(schema.tables())
    for index, vector in enumerate(schema.vector):
        if vector.owner != "item":
            continue
        feature = pack_schema.feature(str(schema.item))
        rows = np.lib.format.open_memmap(
            vector_file(directory, vector.name),
            mode="w+",
            dtype=DTYPE[vector.dtype],
            shape=(feature.num_ids, vector.dim),
        )
        vocab = f"vocab_{tables.index(feature.table)}"
        if base is not None:
            before = np.load(vector_file(base, vector.name), mmap_mode="r", allow_pickle=False)
            rows[: len(before)] = before
            rows[con.execute(f"SELECT id FROM {vocab} WHERE value IS NULL").fetchnumpy()["id"]] = 0
        reader = con.sql(f"""SELECT v.id, i.vector FROM item_vectors_{index} i
                             JOIN {vocab} v ON CAST(v.value AS VARCHAR) = CAST(i.value AS VARCHAR)""")
        for batch in reader.to_arrow_reader(_ROWS):
            rows[batch["id"].to_numpy()] = batch["vector"].flatten().to_numpy().reshape(-1, vector.dim)
        rows.flush()
        del rows
        con.execute(f"DROP TABLE item_vectors_{index}")
