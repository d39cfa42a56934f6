"""Plain rows are encoded without a database, and mean what they mean with one."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmeta.data.prepare.direct import DirectEncoder
from gmeta.data.prepare.encoder import EncodedTables, Encoder
from gmeta.data.schema import Feature, NumericColumn, NumericSequence, PackSchema, parse_data_schema

RAW: dict[str, Any] = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": [
        "item",
        {"name": "shop", "nulls": "oov"},
        {"name": "flag", "nulls": "oov"},
        {"name": "bucket", "hash_buckets": 13, "nulls": "oov"},
    ],
    "multi": [{"name": "tags", "separator": "|", "nulls": "oov"}],
    "sequence": [
        {"name": "last", "table": "item", "max_length": 3, "pooling": "none"},
        {"name": "kinds", "table": "shop", "aligned": "last", "nulls": "oov"},
    ],
    "numeric_sequence": [{"name": "gaps", "aligned": "last", "log": True, "nulls": "mean"}],
    "numeric": [{"name": "price", "nulls": "mean"}, {"name": "age", "log": True}],
    "item_statistics": True,
}
TABLES = {
    "item": ["1", "2", "3", "4", "x", "1.10", None, "true"],  # None: an evicted id
    "shop": ["1", "2", "007", "3"],
    "flag": ["true", "false"],
    "tags": ["a", "b", "7", "true"],
}
ITEMS = {"value": [None, "1", "2", "x"], "label_sum": [17.0, 3.0, 10.0, 4.0], "count": [41, 7, 23, 11]}
NUMERIC = {"price": (10.123456789012345, 3.3333333333333335), "age": (0.1, 7.0)}
STATISTICS = {"item_mean": (0.41463414634146345, 0.08), "item_log_count": (2.1, 1.3)}


def make_encoder(folder: Path, change: dict[str, Any] | None = None) -> Encoder:
    schema = parse_data_schema(RAW | (change or {}))
    for table, values in TABLES.items():
        ids = pa.array(range(1, len(values) + 1), pa.int32())
        pq.write_table(pa.table({"value": values, "id": ids, "count": [1] * len(values)}), folder / f"{table}.parquet")
    pq.write_table(pa.table(ITEMS), folder / "item_statistics.parquet")
    features = [
        Feature(name=f.name, kind=f.kind, num_ids=1 + (f.hash_buckets or len(TABLES[f.table])), table=f.table)
        for f in schema.features
    ]
    scales = NUMERIC | STATISTICS
    numeric = [NumericColumn(name=n, mean=scales[n][0], std=scales[n][1]) for n in schema.numeric_names()]
    pack = PackSchema(
        features=tuple(features),
        numeric=tuple(numeric),
        label="click",
        binary_label=False,
        task="user",
        item="item",
        numeric_sequence=(NumericSequence(name="gaps", aligned="last", mean=1.3, std=0.7, log=True),),
    )
    return Encoder(schema.to_json(), folder, pack)


def draw(rng: np.random.Generator, rows: int) -> pa.Table:
    """A table whose columns have types, spellings and gaps that tools give them."""

    def some(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    def many(*choices: Any) -> list[Any]:
        return [some(*choices) for _ in range(rows)]

    start = datetime(2024, 11, 3, tzinfo=timezone.utc)
    times = [start + timedelta(seconds=int(x)) for x in rng.integers(0, 50, rows)]
    texts = ("1", "2.0", "-0.0", "1.10", "x", "1.2E1", "1.5E0", "True", "FALSE", "007", "1.25E9", "a.0", "é", "9" * 18)
    columns = {
        "user": some(
            pa.array(many(1, 2, 3)),
            pa.array(many("1", "1.0", "b", "2")),
            pa.array(many(1.0, 2.0)),
            pa.array(many(True, False)),
        ),
        "item": some(
            pa.array(many(1, 2, 9), pa.uint8()), pa.array(many(*texts)), pa.array(many(*texts), pa.large_string())
        ),
        "shop": some(
            pa.array(many(1, 2, None, 5)),
            pa.array(many("1", "", "nan", None, "007", *texts)),
            pa.array(many(1.0, float("nan"), None, -0.0), pa.float32()),
            pa.nulls(rows),
        ),
        "flag": some(pa.array(many(True, False, None)), pa.array(many("True", "false", "TRUE", None))),
        "bucket": some(
            pa.array(many(-1, 5, 2**53, None)), pa.array(many("a", "b", "1.0", None)), pa.array(many(1.0, 7.0))
        ),
        "tags": some(
            pa.array(many("a|b", "", None, " a | 7.0 ||c")),
            pa.array(many(["a", "b"], [], None, ["True", "7.0"])),
            pa.array(many([7], [], [1, 2, 3])),
            pa.array(many([True], [True, False])),
        ),
        "price": some(
            pa.array(many(1.5, None, float("nan"), 3e38, -0.1)),
            pa.array(many(0.1, 3.3, 1e-7, 16777217.0, None), pa.float32()),
            pa.array(many(1, 2, 3), pa.int16()),
            pa.array(many(True, False)),
            pa.nulls(rows),
        ),
        "age": some(pa.array(many(0.0, 1.0, 33.3, 1e300 / 1e270)), pa.array(many(0, 1, 2**40))),
        "click": some(
            pa.array(many(0, 1)),
            pa.array(many(0.5, 1.0, 4.3)),
            pa.array(many(0.1, 3.9), pa.float32()),
            pa.array(many(True)),
        ),
        "at": some(
            pa.array(times, pa.timestamp("us", "UTC")),
            pa.array(times, pa.timestamp("ns")),
            pa.array(times, pa.timestamp("s")),
            pa.array([t.date() for t in times]),
            pa.array(rng.integers(0, 9, rows)),
        ),
    }
    lengths = rng.integers(0, 6, rows).tolist()
    columns["last"] = pa.array([[some("1", "2.0", "x", "1.10") for _ in range(n)] for n in lengths])
    columns["kinds"] = pa.array([[some("1", "007", "z") for _ in range(n)] if n else some([], None) for n in lengths])
    gaps = [[some(0.0, 3.7, 1e-7, None) for _ in range(n)] if n else some([], None) for n in lengths]
    columns["gaps"] = some(pa.array(gaps, pa.list_(pa.float64())), pa.array(gaps, pa.large_list(pa.float32())))
    return pa.table({name: column for name, column in columns.items() if name != "at" or rng.random() < 0.7})


def same(found: EncodedTables, expected: EncodedTables) -> None:
    assert found.keys == expected.keys
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, name)
        assert found.arrays[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found.query_row, expected.query_row)


@pytest.mark.parametrize(
    ("change", "tables"), [({}, 25), ({"label_threshold": 3.9}, 8), ({"item_statistics": False}, 8)]
)
def test_plain_rows_are_encoded_as_the_database_does(tmp_path: Path, change: dict[str, Any], tables: int) -> None:
    direct, by_database = make_encoder(tmp_path, change), make_encoder(tmp_path, change)
    by_database._direct = None
    rng = np.random.default_rng(7)
    for _ in range(tables):
        table = draw(rng, int(rng.integers(1, 12)))
        for role, rows in (("support", table), ("candidates", table.drop_columns("click"))):
            assert direct._direct is not None
            assert direct._direct.rows(rows, support=role == "support") is not None, table.schema
            same(direct.table(rows, role), by_database.table(rows, role))


ROW = {"user": ["u"], "item": ["1"], "shop": ["1"], "flag": [True], "bucket": [1], "tags": ["a"], "last": [["1"]]}
ROW |= {"price": [1.0], "age": [1.0], "click": [1.0], "kinds": [["1"]], "gaps": [[0.5]]}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("user", None, "column 'user': is missing"),
        ("item", "", "column 'item': '' is missing"),
        ("item", "12345678901234567890", "is a whole number beyond int64"),
        ("item", 1.5, "column 'item': '1.5' is a fraction"),
        ("last", ["1", None], "has a missing element"),
        ("last", None, "column 'last': is missing"),
        ("kinds", ["1", "2"], "column 'kinds': '[1, 2]' has not as many values as 'last', which it is aligned with"),
        ("kinds", None, "column 'kinds': has not as many values as 'last'"),
        ("gaps", [1.0, 2.0], "column 'gaps': '[1.0, 2.0]' has not as many values as 'last'"),
        ("gaps", [-1.0], "has a negative element, and the schema takes its logarithm"),
        ("gaps", [float("inf")], "has an element that is infinite or beyond float32"),
        ("age", None, "column 'age': is missing"),
        ("age", -1.0, "is negative, and the schema takes its logarithm"),
        ("price", float("inf"), "is infinite or beyond float32"),
        ("click", float("nan"), "column 'click': 'nan' is missing"),
        ("click", "x", "is no number"),
    ],
)
def test_bad_values_are_named_as_the_database_names_them(tmp_path: Path, column: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match="1 rows cannot be used") as error:
        make_encoder(tmp_path).table(pa.table(ROW | {column: [value]}), "support")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("item", pa.array([Decimal("2.00")])),
        ("price", pa.array(["1.5"])),
        ("at", pa.array(["2024-11-03T10:00:00Z"])),
        ("at", pa.array([1.5])),
        ("item", pa.array([2], pa.uint64())),
        ("gaps", pa.array([[1]], pa.list_(pa.decimal128(3, 1)))),
    ],
)
def test_other_types_are_left_to_the_database(tmp_path: Path, column: str, value: pa.Array) -> None:
    encoder, table = make_encoder(tmp_path), pa.table(ROW | {column: value})
    assert encoder._direct is not None
    assert encoder._direct.rows(table, support=True) is None
    assert encoder.table(table, "support").keys == ["u"]


def test_large_tables_are_left_to_the_database(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path)
    assert encoder._direct is not None
    for rows, direct in ((1 << 16, True), ((1 << 16) + 1, False)):
        table = pa.table({name: pa.array(values).take(pa.array([0] * rows)) for name, values in ROW.items()})
        assert (encoder._direct.rows(table, support=True) is not None) == direct


def test_an_evicted_id_is_matched_by_nothing(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path)
    table = pa.table(ROW | {"item": ["7"]})
    expected = encoder.table(table, "candidates").arrays["ids"][0, 0]
    encoder._direct = None
    assert encoder.table(table, "candidates").arrays["ids"][0, 0] == expected == 0


@pytest.mark.parametrize("damage", ["missing", "cut", "column"])
def test_damaged_vocabularies_are_named(tmp_path: Path, damage: str) -> None:
    make_encoder(tmp_path)
    for name in ("shop", "item_statistics"):
        file = tmp_path / f"{name}.parquet"
        whole = file.read_bytes()
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(whole[:50])
        else:
            pq.write_table(pa.table({"value": ["1"]}), file)
        with pytest.raises(ValueError, match=rf"{name}.parquet is missing or damaged"):
            _reopen(tmp_path)
        file.write_bytes(whole)


def _reopen(folder: Path) -> None:
    """Open the folder as it is."""
    schema = parse_data_schema(RAW)
    scales = NUMERIC | STATISTICS
    numeric = tuple(NumericColumn(name=n, mean=scales[n][0], std=scales[n][1]) for n in schema.numeric_names())
    pack = PackSchema(features=(), numeric=numeric, label="click", binary_label=False, task="user")
    DirectEncoder(duckdb.connect(), schema, folder, pack)
