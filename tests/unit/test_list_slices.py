"""Slices of one long column stand for lists: counts and ids are those of the lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pytest

from gmeta.data.prepare import slices
from gmeta.data.prepare.encode import encode
from gmeta.data.prepare.tasks import row_bytes
from gmeta.data.prepare.vocabulary import counted_values
from gmeta.data.schema import Feature, PackSchema, parse_data_schema
from gmeta.data.sources import Connection

SCHEMA = parse_data_schema({"task": "user", "label": "label", "categorical": ["item"], "multi": [{"name": "words"}]})
STORED = PackSchema(
    features=tuple(
        Feature(name=f.name, kind=f.kind, num_ids=4, table=f.table, pooling=f.pooling) for f in SCHEMA.features
    ),
    numeric=(),
    label="label",
    binary_label=True,
    task="user",
)


@pytest.fixture
def con() -> Iterator[Connection]:
    """Rows of which `listed` has lists and `sliced` slices of `kept`, one entry of which is NULL."""
    with duckdb.connect() as con:
        con.execute("""
            CREATE TABLE kept AS SELECT i AS place, ['a', 'b', NULL, 'c', 'a', 'd'][i + 1] AS value FROM range(6) r(i);
            CREATE TABLE sliced AS SELECT i AS row, 'x' AS f0, {'start': s, 'length': CAST(n AS INTEGER)} AS f1
                FROM (VALUES (0, 3, 3), (1, 0, 2), (2, 5, 0), (3, 0, 6), (4, 0, 2), (5, 2, 1)) v(i, s, n);
            CREATE TABLE listed AS SELECT row, f0, coalesce((SELECT list(value ORDER BY place) FROM kept
                WHERE place >= f1.start AND place < f1.start + f1.length), []) AS f1 FROM sliced;
            CREATE TABLE vocab_0 AS SELECT 'x' AS value, 1 AS id;
            CREATE TABLE vocab_1 AS SELECT * FROM (VALUES ('a', 2), ('b', 1), ('d', 3)) v(value, id)""")
        yield con


def found(con: Connection, relation: str) -> tuple[Any, float, dict[str, list[Any]]]:
    """Counts, bytes and arrays of a relation."""
    counts = con.execute(counted_values(con, SCHEMA, [SCHEMA.features[1]], relation) + " ORDER BY value").fetchall()
    con.execute(f"CREATE OR REPLACE TEMP VIEW raw_rows AS FROM {relation}")
    arrays = encode(con, relation, SCHEMA, STORED, "b.row DESC")
    return counts, row_bytes(con, SCHEMA), {name: array.tolist() for name, array in arrays.items()}


@pytest.mark.parametrize("piece", [2, 1 << 20])
def test_slices_stand_for_lists(con: Connection, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(slices, "_PIECE", piece)
    lists = found(con, "listed")
    assert lists[0] == [("a", 5), ("b", 3), ("c", 2), ("d", 2)]
    assert lists[2]["words.values"] == [0, 2, 1, 2, 1, 0, 0, 2, 3, 2, 1, 0, 2, 3]
    con.execute("CREATE VIEW values_1 AS FROM kept")
    assert slices.sliced_features(con) == {1}
    assert found(con, "sliced") == lists


def test_slices_of_nothing_have_no_ids(con: Connection) -> None:
    con.execute("CREATE VIEW values_1 AS FROM kept")
    none = np.zeros(0, np.int64)
    assert slices.ids_of_slices(con, 1, "vocab_1", none, none).tolist() == []
