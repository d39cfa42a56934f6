"""One form of every value: whatever tool wrote a table, in whatever types, files and time zone, rows are the same."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import open_pack, verify_pack
from gmeta.data.prepare.check import check, create_checked, describe_rejects, id_types, reject_counts
from gmeta.data.prepare.encoder import encode_tables
from gmeta.data.prepare.prepare import prepare
from gmeta.data.prepare.times import common_time
from gmeta.data.prepare.vocabulary import HashedVocabulary, hashed_vocabulary
from gmeta.data.schema import ENCODING, OOV, Feature, PackSchema, pack_schema_from_json, parse_data_schema
from gmeta.data.schema_difference import schema_difference
from gmeta.data.sources import open_file

OLD = Path(__file__).resolve().parents[1] / "data" / "encoding_1"
SCHEMA = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": [
        "item",
        {"name": "shop", "nulls": "oov"},
        {"name": "flag", "nulls": "oov"},
        "code",
        {"name": "bucket", "hash_buckets": 13},
    ],
    "multi": [{"name": "tags", "separator": "|", "nulls": "oov"}],
    "numeric": [{"name": "price", "nulls": "mean"}],
}
GENERATED = (Phase.explicit, Phase.generate)
"""Tables are small as they are: to shrink them takes longer than to read them."""
Table = dict[str, list[Any]]
Writer = Callable[[Table, Path], None]
CODES = ["007", "1.10", "1.1", "x", "E", "1e5", "a.0", "+7", "v1.0E7b"]
"""Texts that are no numbers, or whose spelling tells ids apart: they stay as they are."""


def quiet(*_: object) -> None:
    """A report that says nothing."""


# ------------------------------------------------------------------------------------------------- writers


def optional(column: str, table: Table) -> bool:
    return any(value is None for value in table[column])


def write_rows(path: Path, table: Table, text: Callable[[str, Any], str], quoting: int = csv.QUOTE_MINIMAL) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=quoting)  # type: ignore[arg-type]
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow([text(name, value) for name, value in zip(table, row, strict=True)])


def iso(micros: int, form: str) -> str:
    moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=micros)
    if form == "spark":
        return moment.strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"
    if form == "offset":  # New York, which changes its offset within the table
        hours = -4 if micros < 1_730_613_600_000_000 else -5
        return moment.astimezone(timezone(timedelta(hours=hours))).isoformat()
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f") + ("+00:00" if form == "pandas" else "")


def pandas_csv(table: Table, path: Path) -> None:
    """Whole numbers beside a missing one are floats, booleans are True and False, floats are the shortest text."""

    def text(name: str, value: Any) -> str:
        if value is None:
            return ""
        if name == "tags":
            return "|".join(f"{t}.0" for t in value)
        if name == "at":
            return iso(value, "pandas")
        as_float = isinstance(value, int) and not isinstance(value, bool) and optional(name, table)
        return repr(float(value)) if as_float else str(value)

    write_rows(path, table, text)


def spark_csv(table: Table, path: Path) -> None:
    """Booleans are lower case, whole numbers here DOUBLE: from 10^7 on with an exponent, as Java writes them."""

    def text(name: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        if name == "tags":
            return "|".join(str(t) for t in value)
        if name == "at":
            return iso(value, "spark")
        if isinstance(value, int) and abs(value) >= 10**7:
            digits = str(abs(value))
            return f"{'-' if value < 0 else ''}{digits[0]}.{digits[1:].rstrip('0') or '0'}E{len(digits) - 1}"
        return f"{float(value)!r}" if isinstance(value, int) else str(value)

    write_rows(path, table, text, csv.QUOTE_ALL)


def upper_csv(table: Table, path: Path) -> None:
    """Booleans are upper case, as spreadsheets and R write them; times have offsets of their own."""

    def text(name: str, value: Any) -> str:
        if value is None:
            return "NaN" if name == "price" else ""
        if isinstance(value, bool):
            return str(value).upper()
        if name == "at":
            return iso(value, "offset")
        return "|".join(str(t) for t in value) if name == "tags" else str(value)

    write_rows(path, table, text, csv.QUOTE_NONNUMERIC)


def arrow(table: Table, types: dict[str, pa.DataType]) -> pa.Table:
    columns = {}
    for name, values in table.items():
        kind = types.get(name)
        if name == "at":
            columns[name] = pa.array(values, pa.timestamp("us")).cast(kind or pa.timestamp("us", "UTC"), safe=False)
        elif kind is not None and pa.types.is_decimal(kind):
            columns[name] = pa.array([None if v is None else Decimal(str(v)) for v in values], kind)
        elif kind is not None and pa.types.is_string(kind):
            columns[name] = pa.array([None if v is None else str(v) for v in values], kind)
        elif kind is not None and pa.types.is_floating(kind):
            columns[name] = pa.array([None if v is None else float(v) for v in values], kind)
        elif kind is not None and pa.types.is_boolean(kind):
            columns[name] = pa.array([None if v is None else bool(v) for v in values], kind)
        else:
            columns[name] = pa.array(values, kind)
    return pa.table(columns)


def parquet(**types: pa.DataType) -> Writer:
    return lambda table, path: pq.write_table(arrow(table, types), path)


def duckdb_file(options: str) -> Writer:
    def write(table: Table, path: Path) -> None:
        with duckdb.connect() as con:
            con.register("t", arrow(table, {"at": pa.timestamp("us")}))
            tags = "* REPLACE (array_to_string(tags, '|') AS tags)" if "CSV" in options else "*"
            con.execute(f"COPY (SELECT {tags} FROM t) TO '{path}' ({options})")

    return write


DOUBLES = {name: pa.float64() for name in ("user", "item", "shop", "bucket", "click")} | {
    "tags": pa.list_(pa.float64())
}
DECIMALS = {name: pa.decimal128(38, 2) for name in ("user", "item", "shop", "bucket", "click", "price")}
TEXTS = {name: pa.string() for name in ("user", "item", "shop", "flag", "bucket", "click", "price")}
SMALL = {"user": pa.uint32(), "item": pa.int32(), "shop": pa.int32(), "bucket": pa.uint32(), "click": pa.uint8()}
WRITERS: dict[str, tuple[str, Writer]] = {
    "pandas": ("csv", pandas_csv),
    "spark": ("csv", spark_csv),
    "upper": ("csv", upper_csv),
    "duckdb csv": ("csv", duckdb_file("FORMAT CSV, HEADER")),
    "duckdb parquet": ("parquet", duckdb_file("FORMAT PARQUET")),
    "doubles": ("parquet", parquet(**DOUBLES, at=pa.timestamp("ns"))),
    "decimals": ("parquet", parquet(**DECIMALS, at=pa.timestamp("ns", "America/New_York"))),
    "texts": ("parquet", parquet(**TEXTS, at=pa.timestamp("us", "Asia/Shanghai"))),
    "small": ("parquet", parquet(**SMALL, price=pa.float32(), code=pa.dictionary(pa.int32(), pa.string()))),
    "booleans": ("parquet", parquet(click=pa.bool_(), code=pa.large_string())),
}
PLAIN: Writer = parquet()


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Rows of a few users over the hour that New York has twice; times differ, so that their order is total."""
    rows = draw(st.integers(8, 14))
    scale = draw(st.sampled_from([1, 20_000_003]))  # from 10^7 on Java writes an exponent
    # A float32 or a double holds each of these exactly, and its shortest text is short.
    price = st.sampled_from([0.1, 0.25, 1.5, 3.3, 7.0, 19.99, 1024.0])

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=rows, max_size=rows))

    start = 1_730_611_200_000_000
    return {
        "user": [1 + i % 2 for i in range(rows)],
        "item": [scale * x for x in column(st.integers(0, 5))],
        "shop": [None if x == 0 else x for x in column(st.integers(0, 3))],
        "flag": column(st.sampled_from([True, False, None])),
        "code": column(st.sampled_from(CODES)),
        "bucket": column(st.integers(1, 9)),
        "tags": column(st.lists(st.integers(1, 4), max_size=3)),
        "price": column(st.none() | price),
        "at": [start + i * 540_000_000 + x for i, x in enumerate(column(st.integers(0, 999_999)))],
        "click": column(st.integers(0, 1)),
    }


# ------------------------------------------------------------------------------------------ checked rows


def write(folder: Path, name: str, table: Table, writer: str) -> Path:
    suffix, function = WRITERS[writer]
    path = folder / f"{name}.{suffix}"
    function(table, path)
    return path


def checked(paths: list[Path], schema: dict[str, Any] = SCHEMA, zone: str = "UTC") -> list[tuple[Any, ...]]:
    """The checked rows of some files, ids as text, in the order of the files."""
    data = parse_data_schema(schema)
    with duckdb.connect() as con:
        parts = [open_file(con, path) for path in paths]
        types = id_types(data, parts)
        create_checked(con, data, types)
        con.execute(f"SET TimeZone='{zone}'")
        relations = [check(con, p, i, data, ["task", "label", "time", "item"], types) for i, p in enumerate(parts)]
        time = common_time(con, parts, data.time)
        assert not reject_counts(con), describe_rejects(con, [p.file for p in parts])
        union = " UNION ALL ".join(dict.fromkeys(relations))
        lists = {f"f{i}" for i, f in enumerate(data.features) if f.kind != "categorical"}
        columns = [f"f{i}" for i in range(len(data.features))]
        ids = ", ".join(f"CAST({c} AS VARCHAR{'[]' if c in lists else ''})" for c in ["task", "item", *columns])
        numbers = ", ".join(f"n{i}" for i in range(len(data.numeric))) or "NULL"
        query = f"SELECT {ids}, {numbers}, label, {time} AS time FROM ({union}) ORDER BY file, row"
        return con.execute(query).fetchall()


@settings(max_examples=3, phases=GENERATED)
@given(table=tables())
def test_all_writers_give_the_same_rows(tmp_path_factory: pytest.TempPathFactory, table: Table):
    folder = tmp_path_factory.mktemp("written")
    PLAIN(table, folder / "plain.parquet")
    expected = checked([folder / "plain.parquet"])
    assert [row[2] for row in expected] == [str(x) for x in table["item"]]
    assert [row[4] for row in expected] == [None if x is None else str(x).lower() for x in table["flag"]]
    assert [row[5] for row in expected] == table["code"]
    assert [row[-1] for row in expected] == table["at"]
    for writer in WRITERS:
        assert checked([write(folder, writer, table, writer)]) == expected, writer


@settings(max_examples=10, phases=GENERATED)
@given(table=tables(), pair=st.lists(st.sampled_from(sorted(WRITERS)), min_size=2, max_size=2, unique=True))
def test_files_of_other_writers_give_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, table: Table, pair: list[str]
):
    folder = tmp_path_factory.mktemp("written")
    PLAIN(table, folder / "plain.parquet")
    halves = [{k: v[:5] for k, v in table.items()}, {k: v[5:] for k, v in table.items()}]
    paths = [
        write(folder, f"part-{i}", half, writer) for i, (half, writer) in enumerate(zip(halves, pair, strict=True))
    ]
    assert checked(paths, zone="America/New_York") == checked([folder / "plain.parquet"])


# -------------------------------------------------------------------------------------------------- packs


def log(users: int = 8, rows: int = 6, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    n = users * rows
    return {
        "user": [i % users for i in range(n)],
        "item": rng.integers(0, 9, n).tolist(),
        "shop": [None if x == 0 else x for x in rng.integers(0, 4, n).tolist()],
        "flag": [[True, False, None][x] for x in rng.integers(0, 3, n)],
        "code": [CODES[x] for x in rng.integers(0, len(CODES), n)],
        "bucket": rng.integers(0, 30, n).tolist(),
        "tags": [rng.integers(1, 5, k).tolist() for k in rng.integers(0, 3, n)],
        "price": [None if x > 50 else x for x in rng.gamma(2, 10, n).round(2).tolist()],
        "at": [1_730_611_200_000_000 + 60_500_000 * i for i in range(n)],
        "click": rng.integers(0, 2, n).tolist(),
    }


def prepared(folder: Path, paths: list[Path], schema: dict[str, Any] = SCHEMA, name: str = "pack") -> dict[str, bytes]:
    """The files of the pack that `paths` give, but for the manifest, which names the paths."""
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    config = PrepareConfig(
        out=str(folder / name),
        input=[str(p) for p in paths],
        schema=str(folder / "schema.yaml"),
        query_size=2,
        threads=1,
        memory_limit="300MB",
    )
    prepare(config, quiet)
    files = sorted(p for p in (folder / name).rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder / name).as_posix(): p.read_bytes() for p in files}


def test_packs_are_byte_identical_over_writers_files_and_zones(tmp_path: Path):
    table = log()
    halves = [{k: v[:20] for k, v in table.items()}, {k: v[20:] for k, v in table.items()}]
    PLAIN(table, tmp_path / "plain.parquet")
    expected = prepared(tmp_path, [tmp_path / "plain.parquet"])
    assert len(expected) > 5
    one = [write(tmp_path, "one", table, "pandas")]
    assert prepared(tmp_path, one, name="one") == expected
    two = [write(tmp_path, "a", halves[0], "doubles"), write(tmp_path, "b", halves[1], "spark")]
    assert prepared(tmp_path, two, name="two") == expected
    source = "import sys; from gmeta.__main__ import main; sys.argv[0] = 'gmeta'; main()"
    words = ["prepare", "--input", str(tmp_path / "plain.parquet"), "--schema", str(tmp_path / "schema.yaml")]
    words += ["--out", str(tmp_path / "zone"), "--query_size", "2"]
    zone = {**os.environ, "TZ": "America/New_York"}
    subprocess.run([sys.executable, "-c", source, *words], env=zone, check=True, capture_output=True, timeout=120)
    assert {name: (tmp_path / "zone" / name).read_bytes() for name in expected} == expected


def test_predict_reads_values_as_prepare_does(tmp_path: Path):
    table = log()
    PLAIN(table, tmp_path / "plain.parquet")
    prepared(tmp_path, [tmp_path / "plain.parquet"])
    pack = open_pack(tmp_path / "pack")
    assert pack.schema.encoding == pack.manifest["schema"]["encoding"] == ENCODING
    halves = [{k: v[:24] for k, v in table.items()}, {k: v[24:] for k, v in table.items()}]
    found = []
    for support, query in (("booleans", "decimals"), ("pandas", "doubles"), ("texts", "spark"), ("small", "upper")):
        paths = [write(tmp_path, support, halves[0], support), write(tmp_path, query, halves[1], query)]
        schema = pack.manifest["data_schema"]
        encoded = encode_tables(*[str(p) for p in paths], schema, pack.path / "vocab", pack.schema)
        found.append(encoded)
        assert encoded.keys == found[0].keys
        for name, array in found[0].arrays.items():
            np.testing.assert_array_equal(encoded.arrays[name], array, err_msg=f"{support}, {query}: {name}")
    assert (found[0].arrays["ids"][:, 0] > 0).any()


# -------------------------------------------------------------------------------------- ids and labels


def one_column(folder: Path, values: pa.Array, name: str = "a.parquet") -> Path:
    rows = len(values)
    columns = {"user": [1] * rows, "click": [0, 1] * (rows // 2) + [0] * (rows % 2), "c": values}
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


COLUMN = {"task": "user", "label": "click", "categorical": [{"name": "c", "nulls": "oov"}]}


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (pa.array([-0.0, 0.0, 7.0]), ["0", "0", "7"]),
        (pa.array(["-0.0", "7.000", "-7.0"]), ["0", "7", "-7"]),
        (pa.array(["1.0E7", "-1.2345678E7", "9.007199254740992E15"]), ["10000000", "-12345678", "9007199254740992"]),
        (pa.array(["1.5E0", "1E7", "1.0e7", "1.0E17"]), ["1.5E0", "1E7", "1.0e7", "1.0E17"]),
        (pa.array(["007", "007.0", "1.10", "0.50", "7.", "0x10"]), ["007", "007.0", "1.10", "0.50", "7.", "0x10"]),
        (pa.array(["True", "FALSE", "true", "Truth", "t"]), ["true", "false", "true", "Truth", "t"]),
        (pa.array([10**17 + 1, None]).cast(pa.decimal128(38, 0)), ["100000000000000001", None]),
        (pa.array([Decimal("3.00"), Decimal("-4.00")]), ["3", "-4"]),
        (pa.nulls(3), [None, None, None]),
        (pa.array([float("nan"), 1.0]), [None, "1"]),
        (pa.array([0, 1], pa.timestamp("s")), ["1970-01-01 00:00:00", "1970-01-01 00:00:01"]),
        (pa.array([0, 1], pa.timestamp("ms", "Asia/Tokyo")), ["1970-01-01 00:00:00", "1970-01-01 00:00:00.001"]),
        (pa.array([0, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
    ],
)
def test_ids_have_one_text(tmp_path: Path, values: pa.Array, ids: list[str | None]):
    assert [row[2] for row in checked([one_column(tmp_path, values)], COLUMN, zone="America/New_York")] == ids


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (pa.array([1.0, 2.5]), "'2.5' is a fraction"),
        (pa.array([1.0, 2.0**53 + 2]), "beyond 2^53"),
        (pa.array([1.0, 2.0**24 + 2], pa.float32()), "beyond 2^24"),
        (pa.array([Decimal("1.5"), Decimal("2.00")]), "'1.50' is a fraction"),
        (pa.array([Decimal(10**19)]), "beyond int64"),
        (pa.array(["99999999999999999999.0"]), "beyond int64"),
        (pa.array([2**63], pa.uint64()), "beyond int64"),
    ],
)
def test_numbers_that_are_no_exact_ids_are_refused(tmp_path: Path, values: pa.Array, says: str):
    with pytest.raises(AssertionError, match=re.escape(says)):
        checked([one_column(tmp_path, values)], COLUMN)


@pytest.mark.parametrize("nulls", ["oov", "error"])
def test_a_column_of_type_null_is_all_missing(tmp_path: Path, nulls: str):
    schema: dict[str, Any] = {
        "task": "user",
        "label": "click",
        "categorical": [{"name": "c", "nulls": nulls}],
        "multi": [{"name": "m", "nulls": nulls}],
        "numeric": [{"name": "n", "nulls": "mean" if nulls == "oov" else "error"}],
    }
    columns = {"user": pa.array([1, 2]), "click": pa.array([0, 1])}
    full = {"c": pa.array([5, 6]), "m": pa.array([[1], [2]]), "n": pa.array([0.5, 1.5])}
    for lists in (pa.nulls(2), pa.array([None, None], pa.list_(pa.null()))):
        pq.write_table(pa.table({**columns, "c": pa.nulls(2), "m": lists, "n": pa.nulls(2)}), tmp_path / "a.parquet")
        pq.write_table(pa.table({**columns, **full}), tmp_path / "b.parquet")
        paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
        if nulls == "error":
            with pytest.raises(AssertionError, match="'c': is missing"):
                checked(paths, schema)
            continue
        rows = [row[2:5] for row in checked(paths, schema)]
        assert rows == [(None, [], None), (None, [], None), ("5", ["1"], 0.5), ("6", ["2"], 1.5)]


LABELS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "float32": (pa.float32(), [0.5, 0.7, 0.9]),
    "float64": (pa.float64(), [0.5, 0.7, 0.9]),
    "text": (pa.string(), ["0.5", "0.70", "0.9"]),
    "decimal": (pa.decimal128(9, 2), [Decimal("0.5"), Decimal("0.7"), Decimal("0.9")]),
    "wide decimal": (pa.decimal128(38, 20), [Decimal("0.5"), Decimal("0.7"), Decimal("0.9")]),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("threshold", [None, 0.5, 0.7, 0.9])
def test_labels_and_thresholds_in_every_type(tmp_path: Path, kind: str, threshold: float | None):
    dtype, values = LABELS[kind]
    columns = {"user": pa.array([1, 1, 2]), "c": pa.array([1, 2, 3]), "click": pa.array(values, dtype)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pa.csv.write_csv(pa.table(columns), tmp_path / "a.csv")
    truth = np.array([0.5, 0.7, 0.9])
    want = truth.astype(np.float32) if threshold is None else (truth >= threshold).astype(np.float32)
    for file in ("a.parquet", "a.csv"):
        rows = checked([tmp_path / file], {**COLUMN, "label_threshold": threshold})
        assert [row[-2] for row in rows] == want.tolist(), file


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.string()])
def test_a_threshold_on_parquet_alone_makes_the_pack_of_csv(tmp_path: Path, kind: pa.DataType):
    table = {name: values for name, values in log(rows=4).items() if name in ("user", "item", "at")}
    table["rate"] = [i % 5 + 1 for i in range(len(table["user"]))]
    schema = {"task": "user", "label": "rate", "label_threshold": 4, "time": "at", "categorical": ["item"]}
    pq.write_table(arrow(table, {"rate": kind}), tmp_path / "a.parquet")
    pandas_csv(table, tmp_path / "a.csv")
    first = prepared(tmp_path, [tmp_path / "a.parquet"], schema)
    assert first == prepared(tmp_path, [tmp_path / "a.csv"], schema, name="csv")


# -------------------------------------------------------------------------------------------------- times

TIMED = {**COLUMN, "time": "at"}


def times(folder: Path, *files: pa.Array | list[str]) -> list[int]:
    """The times of Parquet files (arrays) and CSV files (texts), as checked."""
    paths = []
    for i, values in enumerate(files):
        table = pa.table({"user": [1] * len(values), "c": [1] * len(values), "click": [1] * len(values), "at": values})
        paths.append(folder / f"part-{i}.{'csv' if isinstance(values, list) else 'parquet'}")
        (pa.csv.write_csv if isinstance(values, list) else pq.write_table)(table, paths[-1])
    return [row[-1] for row in checked(paths, TIMED, zone="America/New_York")]


START = 1_730_611_200
"""2024-11-03 05:20 UTC, shortly before New York's clocks go back."""


@pytest.mark.parametrize(
    "text",
    [
        "2024-11-03T05:20:00Z",
        "2024-11-03 05:20:00",
        "2024-11-03 05:20",
        "2024/11/3 5:20:00",
        "2024-11-03 05:20:00.000000999",
        "2024-11-03 05:20:00 UTC",
        "2024-11-03 05:20:00 GMT",
        "2024-11-03T01:20:00-04:00",
        "2024-11-03T00:20:00.000-05",
        "2024-11-03 10:50:00 +0530",
        "2024-11-03T13:20+08:00",
    ],
)
def test_iso_texts_are_instants(tmp_path: Path, text: str):
    assert times(tmp_path, [text, "2024-11-03", "1970-01-01T00:00:00.000001Z"]) == [
        START * 10**6,
        1_730_592_000 * 10**6,
        1,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "2024-11-03 00:20:00 EST",
        "2024-11-03 00:20:00 America/New_York",
        "2024-11-03 00:20:00 +05:00:00",
        "03/11/2024 05:20",
        "2024-13-03",
        "1730611200",
        "noon",
    ],
)
def test_times_that_are_not_understood_are_refused(tmp_path: Path, text: str):
    with pytest.raises(AssertionError, match="is not a date or time in ISO 8601"):
        times(tmp_path, ["2024-11-03", text])


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_timestamps_of_every_unit_and_zone(tmp_path: Path, unit: str, zone: str | None):
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    values = [START * scale, (START + 3600) * scale, -scale]
    assert times(tmp_path, pa.array(values, pa.timestamp(unit, zone))) == [
        START * 10**6,
        (START + 3600) * 10**6,
        -(10**6),
    ]


def test_nanoseconds_are_cut_as_their_text_is(tmp_path: Path):
    assert times(tmp_path, pa.array([1999, -1, 10**9 - 1], pa.timestamp("ns"))) == [1, -1, 999_999]
    assert times(tmp_path, ["1970-01-01 00:00:00.000001999"]) == [1]
    table = pa.table({"user": [1], "c": [1], "click": [1], "at": pa.array([START * 10**9], pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "old.parquet", use_deprecated_int96_timestamps=True)
    assert checked([tmp_path / "old.parquet"], TIMED)[0][-1] == START * 10**6


SECONDS = [START + 0.25, START + 0.3, START + 0.000001, float(START)]
MICROS = [START * 10**6 + 250_000, START * 10**6 + 300_000, START * 10**6 + 1, START * 10**6]


def test_seconds_keep_their_fraction(tmp_path: Path):
    decimals = pa.array([Decimal(repr(x)) for x in SECONDS], pa.decimal128(20, 9))
    assert times(tmp_path, pa.array(SECONDS)) == MICROS
    assert times(tmp_path, decimals) == MICROS
    assert times(tmp_path, [repr(x) for x in SECONDS]) == MICROS
    assert times(tmp_path, pa.array([0.5, 1.25], pa.float32())) == [500_000, 1_250_000]
    assert times(tmp_path, pa.array([-0.25, 0.0])) == [-250_000, 0]
    # One file has fractions, so all files are seconds.
    assert times(tmp_path, pa.array([START]), ["1730611200", "1730611200.5"], decimals) == [
        START * 10**6,
        START * 10**6,
        START * 10**6 + 500_000,
        *MICROS,
    ]


@pytest.mark.parametrize("value", [7, START, START * 1000, START * 10**6, 2**62 + 1])
def test_whole_numbers_keep_their_unit(tmp_path: Path, value: int):
    assert times(tmp_path, pa.array([value]), [str(value)], pa.array([Decimal(value)])) == [value] * 3
    if value < 2**53:
        assert times(tmp_path, pa.array([float(value)]), pa.array([value], pa.uint64())) == [value] * 2


STAMPS = pa.array([START * 10**6], pa.timestamp("us"))


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (STAMPS, pa.array([START]), "date or timestamp in .*part-0.*number in .*part-1"),
        (["2024-11-03 05:20:00"], [str(START)], "date or timestamp in .*part-0.*number in .*part-1"),
        (pa.array([START + 0.5]), STAMPS, "number in .*part-0.*date or timestamp in .*part-1"),
        (pa.array([START]), pa.array([START * 1000]), "seconds in .*part-0.*milliseconds in .*part-1"),
        ([str(START * 1000)], pa.array([START * 10**6]), "milliseconds in .*part-0.*microseconds in .*part-1"),
        (pa.array([0.5]), pa.array([START * 10**6]), "fractions.*part-1.parquet holds 1730611200000000"),
    ],
)
def test_files_of_other_units_are_refused_by_name(tmp_path: Path, first: Any, second: Any, says: str):
    with pytest.raises(ValueError, match=says):
        times(tmp_path, first, second)


def test_a_first_time_that_is_missing_decides_nothing(tmp_path: Path):
    """pandas writes NaT for a missing time."""
    (tmp_path / "a.csv").write_text("user,c,click,at\n" + "".join(f"1,1,0,{at}\n" for at in ("NaT", 1, 2, 3)))
    with duckdb.connect() as con:
        part = open_file(con, tmp_path / "a.csv")
        create_checked(con, parse_data_schema(TIMED), {})
        check(con, part, 0, parse_data_schema(TIMED), ["task", "label", "time"], {})
        assert reject_counts(con) == {"at is missing": 1}


def test_files_without_a_time_or_with_counters_agree_with_all(tmp_path: Path):
    (tmp_path / "b").mkdir()
    assert times(tmp_path, STAMPS, pa.array([], pa.int64())) == [START * 10**6]
    assert times(tmp_path / "b", pa.array([5, 10]), pa.array([START * 1000])) == [5, 10, START * 1000]


# ---------------------------------------------------------------------------------------------- versions


def test_an_old_pack_is_read_and_encoded_by_the_rules_that_made_it():
    """The fixture was made by a gmeta that recorded no encoding: values that are equal today were not then."""
    verify_pack(OLD / "pack")
    pack = open_pack(OLD / "pack")
    assert "encoding" not in pack.manifest["schema"]
    assert pack.schema.encoding == 1
    data = pack.manifest["data_schema"]
    found = encode_tables(str(OLD / "support.csv"), str(OLD / "query.parquet"), data, OLD / "pack/vocab", pack.schema)
    wanted = json.loads((OLD / "encoded.json").read_text())
    assert found.keys == wanted["keys"]
    assert found.query_row.tolist() == wanted["query_row"]
    assert found.arrays.keys() == wanted["arrays"].keys()
    for name, values in wanted["arrays"].items():
        np.testing.assert_array_equal(found.arrays[name], np.array(values, found.arrays[name].dtype), err_msg=name)
    today = replace(pack.schema, encoding=ENCODING)
    other = encode_tables(str(OLD / "support.csv"), str(OLD / "query.parquet"), data, OLD / "pack/vocab", today)
    assert (other.arrays["ids"] != found.arrays["ids"]).any()


def test_versions_are_recorded_and_not_mixed():
    new = PackSchema(features=(), numeric=(), label="y", binary_label=True, task="t")
    assert pack_schema_from_json(json.loads(json.dumps(new.to_json()))) == new
    old = pack_schema_from_json({k: v for k, v in new.to_json().items() if k != "encoding"})
    assert old.encoding == 1
    assert any("encoding is 2, expected 1" in line for line in schema_difference(old, new))
    with pytest.raises(ValueError, match="have encoding 3, this gmeta reads 1 to 2: upgrade"):
        pack_schema_from_json({**new.to_json(), "encoding": 3})


@pytest.mark.parametrize(
    ("seed", "value", "bucket"),
    [(0, "7", 5076), (0, "true", 6021), (0, "Oslo", 1272), (5, "7", 7740), (0, "b|c", 5701)],
)
def test_hash_values_never_change(tmp_path: Path, seed: int, value: str, bucket: int):
    schema = {**COLUMN, "categorical": [{"name": "c", "hash_buckets": 10_000}], "hash_seed": seed}
    pq.write_table(pa.table({"user": [1], "click": [1], "c": [value]}), tmp_path / "a.parquet")
    pack = PackSchema(
        features=(Feature(name="c", kind="categorical", num_ids=10_001, table="c"),),
        numeric=(),
        label="click",
        binary_label=True,
        task="user",
    )
    file, data = str(tmp_path / "a.parquet"), parse_data_schema(schema).to_json()
    for encoding in (1, 2):
        encoded = encode_tables(file, file, data, tmp_path, replace(pack, encoding=encoding))
        assert encoded.arrays["ids"][:, 0].tolist() == [bucket] * 2


# ------------------------------------------------------------------------------------- columns, many or odd


def test_few_columns_a_query_give_the_pack_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Work that is linear in the features comes from queries of few columns each; how many changes nothing."""
    table = log()
    PLAIN(table, tmp_path / "a.parquet")
    schema = {**SCHEMA, "item_statistics": True, "sequence": [{"name": "bag", "table": "item"}]}
    table["bag"] = table["tags"]
    PLAIN(table, tmp_path / "a.parquet")
    many = prepared(tmp_path, [tmp_path / "a.parquet"], schema, name="many")
    monkeypatch.setattr("gmeta.data.prepare.columns.COLUMNS_A_QUERY", 2)
    assert prepared(tmp_path, [tmp_path / "a.parquet"], schema, name="few") == many


def test_hashed_vocabularies_part_all_values(tmp_path: Path) -> None:
    """A salt under which two values collide is passed over; what is unknown or missing is out of vocabulary."""
    values = [f"item{i}" for i in range(1000)]
    pq.write_table(pa.table({"value": values, "id": np.arange(1, 1001)}), tmp_path / "vocab.parquet")
    with duckdb.connect() as con:
        con.execute("""CREATE MACRO hash(value, salt) AS
                       CASE WHEN salt < 2 THEN length(value)::UBIGINT ELSE md5_number_lower(value) END""")
        found = hashed_vocabulary(con, f"read_parquet('{tmp_path / 'vocab.parquet'}')")
        asked = con.execute(
            f"SELECT {found.hash_of('value')} AS h FROM (VALUES ('item7'), (NULL), ('item999')) t(value)"
        )
        assert found.salt == 2
        np.testing.assert_array_equal(found.ids_of(asked.fetchnumpy()["h"].filled(7)), [8, OOV, 1000])
        twice = "(SELECT 'item7' AS value, unnest([1, 2]) AS id)"
        with pytest.raises(ValueError, match="holds a value twice: copy it again"):
            hashed_vocabulary(con, twice)
    assert HashedVocabulary(0, found.hashes[:0], found.ids[:0]).ids_of(found.hashes[:3]).tolist() == [OOV] * 3
