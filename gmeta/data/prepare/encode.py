"""Stage 5 of `prepare` makes arrays of a shard of its checked rows; `predict` makes them of two files.

Both share `encode`, so that a value means the same in training and in serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gmeta.data.prepare.check import check, create_checked, describe_rejects, reject_counts
from gmeta.data.prepare.columns import COLUMNS_A_QUERY, batched
from gmeta.data.prepare.vocabulary import load_vocabularies, numeric_values, statistics_join, vocabulary_files
from gmeta.data.schema import OOV, DataSchema, NumericColumn, PackSchema, RawFeature, Role, data_schema_from_json
from gmeta.data.sources import (
    Connection,
    RawPart,
    confine,
    described,
    find_files,
    literal,
    md5_64,
    open_file,
    reading,
    scalar,
)

Array = npt.NDArray[Any]

_LARGEST = float(np.finfo(np.float32).max)
"""A number far outside the training rows' range can pass this when it is divided by their deviation."""
_CELLS_IN_MEMORY = 1 << 20
"""So many raw values are looked up by Arrow. To plan 32 joins takes DuckDB 45 ms, whatever the rows; above this number
of values the joins themselves take longer, and they need less memory."""


def _feature_id(schema: DataSchema, feature: RawFeature, value: str, vocab: str) -> str:
    if feature.hash_buckets is None:
        return f"CAST(coalesce({vocab}.id, 0) AS INTEGER)"
    seed = literal(f"{schema.hash_seed}|{feature.table}")
    hashed = f"1 + {md5_64(seed, value)} % {feature.hash_buckets}"
    return f"CAST(CASE WHEN {value} IS NULL THEN 0 ELSE {hashed} END AS INTEGER)"


def encode(
    con: Connection,
    relation: str,
    schema: DataSchema,
    columns: Sequence[NumericColumn],
    order: str,
    more: Sequence[str] = (),
) -> dict[str, Array]:
    """Encode the checked rows of `relation` in the total order `order`, SQL expressions over `relation` as b.

    `relation` has the columns of `checked`, and `fold` (NULL outside training tasks) where the schema asks for item
    statistics. Returns `ids` int32 [rows, one-valued features], `dense` float32 [rows, F], `<name>.values` int32 and
    `<name>.offsets` int64 [rows + 1] of every many-valued feature, and the columns of `relation` named in `more`.
    """
    tables = list(schema.tables())
    columns_sql: list[tuple[str, str, str]] = [(name, f"b.{name}", "") for name in more]  # name, value, join
    looked_up = [i for i, f in enumerate(schema.features) if f.kind == "categorical" and f.hash_buckets is None]
    found: dict[str, Array] = {}
    if _in_memory(con, relation, looked_up):
        found |= _look_up(con, relation, schema, looked_up, order)
    for i, feature in enumerate(schema.features):
        if feature.kind != "categorical":
            columns_sql.append((f"f{i}", f"len(b.f{i})", ""))
        elif f"f{i}" not in found:
            vocab = f"vocab_{tables.index(feature.table)}"
            join = f"LEFT JOIN {vocab} v{i} ON v{i}.value = b.f{i}" if feature.hash_buckets is None else ""
            columns_sql.append((f"f{i}", _feature_id(schema, feature, f"b.f{i}", f"v{i}"), join))
    values = numeric_values(con, schema)
    for j, (value, column) in enumerate(zip(values, columns, strict=True)):
        scaled = f"coalesce(({value} - {column.mean!r}) / {column.std!r}, 0)"
        limited = f"greatest({-_LARGEST!r}, least({_LARGEST!r}, {scaled}))"
        columns_sql.append((f"n{j}", f"CAST({limited} AS FLOAT)", statistics_join(schema, j)))
    for part in batched(columns_sql):
        select = ", ".join(f"{value} AS {name}" for name, value, _ in part)
        joins = " ".join(dict.fromkeys(join for _, _, join in part))
        found |= con.execute(f"SELECT {select} FROM {relation} b {joins} ORDER BY {order}").fetchnumpy()
    rows = len(next(iter(found.values())))
    arrays: dict[str, Array] = {"ids": np.empty((rows, 0), np.int32), "dense": np.empty((rows, 0), np.float32)}
    ids = [found[f"f{i}"] for i, f in enumerate(schema.features) if f.kind == "categorical"]
    dense = [found[f"n{j}"] for j in range(len(columns))]
    arrays |= {name: np.stack(stack, 1) for name, stack in (("ids", ids), ("dense", dense)) if stack}
    for i, feature in enumerate(schema.features):
        if feature.kind != "categorical":
            arrays[f"{feature.name}.offsets"] = np.concatenate([[0], np.cumsum(found[f"f{i}"])]).astype(np.int64)
            vocab = f"vocab_{tables.index(feature.table)}"
            arrays[f"{feature.name}.values"] = _list_ids(con, relation, schema, i, vocab, order)
    return arrays | {name: np.asarray(found[name]) for name in more}


def _in_memory(con: Connection, relation: str, features: Sequence[int]) -> bool:
    """Return whether features are looked up by Arrow: few joins are planned in no time, many values need memory."""
    if len(features) <= COLUMNS_A_QUERY // 4:
        return False
    rows = int(scalar(con, f"SELECT count(*) FROM {relation}"))
    return rows * len(features) <= _CELLS_IN_MEMORY


def _look_up(
    con: Connection, relation: str, schema: DataSchema, features: Sequence[int], order: str
) -> dict[str, Array]:
    """Return the ids of one-valued features, as the join with their vocabularies gives them."""
    tables = list(schema.tables())
    raw = con.sql(f"SELECT {', '.join(f'f{i}' for i in features)} FROM {relation} b ORDER BY {order}").to_arrow_table()
    found = {}
    for i in features:
        vocab = con.sql(f"SELECT value, id FROM vocab_{tables.index(schema.features[i].table)}").to_arrow_table()
        place = pc.index_in(raw[f"f{i}"], value_set=vocab["value"].combine_chunks())
        ids = np.append(vocab["id"].to_numpy(), OOV).astype(np.int32)
        found[f"f{i}"] = ids[pc.fill_null(place, len(vocab)).to_numpy()]
    return found


def _list_ids(con: Connection, relation: str, schema: DataSchema, index: int, vocab: str, order: str) -> Array:
    feature = schema.features[index]
    join = f"LEFT JOIN {vocab} v ON v.value = b.value" if feature.hash_buckets is None else ""
    elements = f"SELECT *, unnest(f{index}) AS value, generate_subscripts(f{index}, 1) AS place FROM {relation}"
    query = f"""SELECT {_feature_id(schema, feature, "b.value", "v")} AS id
                FROM ({elements}) b {join} ORDER BY {order}, b.place"""
    ids: Array = con.execute(query).fetchnumpy()["id"]
    return ids.astype(np.int32)


@dataclass(frozen=True)
class EncodedTables:
    """The tasks of raw support and query rows, laid out as a shard is."""

    keys: list[str]  # raw key of each task
    arrays: dict[str, Array]  # as a shard's, without time; label is 0 in query rows, item_cold is 0
    query_row: Array  # int64 [rows], row of the query (from 0), -1 for support rows


def encode_tables(
    support_path: str, query_path: str, data_schema_json: dict[str, Any], vocab_dir: Path, pack_schema: PackSchema
) -> EncodedTables:
    """Encode raw support rows (labelled) and query rows (label not needed) with a run's vocabularies and encoding.

    Tasks come in the order in which the query file first names them; tasks that it does not name are left out. A
    task may have no support. Raises ValueError for missing files and columns, and for rows that cannot be used,
    with file, row, column and value.
    """
    with duckdb.connect() as con:
        schema, paths = data_schema_from_json(data_schema_json), (support_path, query_path)
        files = [_only_file(path) for path in paths]
        support, query = (_opened(con, path, file) for path, file in zip(paths, files, strict=True))
        confine(con, [*files, *vocabulary_files(schema, vocab_dir)])
        return _encoded(con, support, query, schema, vocab_dir, pack_schema)


def encode_in_memory(
    table: pa.Table,
    role: Literal["support", "candidates"],
    data_schema_json: dict[str, Any],
    vocab_dir: Path,
    pack_schema: PackSchema,
) -> EncodedTables:
    """Encode one table of raw rows as `encode_tables` does: labelled support rows, or candidates without labels.

    The table has at least one row. Tasks come in the order in which it first names them. Raises ValueError for missing
    columns and rows that cannot be used, with row, column and value.
    """
    schema = data_schema_from_json(data_schema_json)
    numbered = table.append_column("__row", pa.array(np.arange(1, table.num_rows + 1)))
    with duckdb.connect() as con:
        try:
            con.register("given", numbered)
            part = described(con, role, "SELECT * FROM given", ordered=False)
        except duckdb.NotImplementedException as error:
            kinds = ", ".join(f"{field.name} {field.type}" for field in table.schema)
            raise ValueError(
                f"{role} has a column of a type that cannot be read ({kinds}): make it text, or plain numbers"
            ) from error
        confine(con, vocabulary_files(schema, vocab_dir))
        support, query = (part, None) if role == "support" else (None, part)
        return _encoded(con, support, query, schema, vocab_dir, pack_schema)


def _only_file(path: str) -> Path:
    found = find_files([path])
    if len(found) != 1:
        raise ValueError(f"{path} stands for {len(found)} files: give one Parquet or CSV file")
    return found[0]


def _opened(con: Connection, path: str, file: Path) -> RawPart:
    with reading(path):
        return replace(open_file(con, file), file=path)


def _encoded(
    con: Connection,
    support: RawPart | None,
    query: RawPart | None,
    schema: DataSchema,
    vocab_dir: Path,
    pack_schema: PackSchema,
) -> EncodedTables:
    """Encode the rows of one or both; the tasks are those of the query where there is one."""
    roles: list[Role] = ["task", "item"] if schema.item_statistics else ["task"]
    create_checked(con, schema, types={})
    relations = []
    for index, (part, needed) in enumerate(((support, [*roles, "label"]), (query, roles))):
        if part is not None:
            with reading(part.file):
                found = check(con, part, index, schema, needed, types={}, encoding=pack_schema.encoding)
            relations.append(found)
    if counts := reject_counts(con):
        files = ["" if part is None else part.file for part in (support, query)]
        raise ValueError(f"{sum(counts.values())} rows cannot be used:\n{describe_rejects(con, files)}")
    load_vocabularies(con, schema, vocab_dir)
    con.execute(f"CREATE VIEW raw_rows AS {' UNION ALL '.join(dict.fromkeys(relations))}")
    with reading(" or ".join(part.file for part in (support, query) if part is not None)):
        con.execute(f"""
            CREATE TABLE placed AS
            SELECT s.*, NULL::INTEGER AS fold, row_number() OVER (ORDER BY q.first, s.file, s.row) - 1 AS pos
            FROM raw_rows s
            JOIN (SELECT task, min(row) AS first FROM raw_rows WHERE file = {int(query is not None)} GROUP BY task) q
            USING (task)""")
    tasks = con.execute("""
        SELECT task, min(pos) AS row_start, count(*) FILTER (file = 0) AS num_support
        FROM placed GROUP BY task ORDER BY row_start""").fetchnumpy()
    rows = con.execute("""
        SELECT coalesce(label, 0) AS label, CASE file WHEN 1 THEN row - 1 ELSE -1 END AS query_row
        FROM placed ORDER BY pos""").fetchnumpy()
    if query is not None and len(rows["label"]) == 0:
        raise ValueError(f"{query.file} has no rows: there is nothing to score")
    arrays = encode(con, "placed", schema, pack_schema.numeric, order="b.pos")
    arrays |= {
        "label": rows["label"].astype(np.float32),
        "item_cold": np.zeros(len(rows["label"]), np.uint8),
        "task_id": np.arange(len(tasks["task"]), dtype=np.int64),
        "row_start": tasks["row_start"].astype(np.int64),
        "num_support": tasks["num_support"].astype(np.int32),
    }
    return EncodedTables([str(k) for k in tasks["task"]], arrays, rows["query_row"].astype(np.int64))
