"""From raw rows to encoded arrays: the SQL that `prepare` and `predict` share.

Two steps. `stage` checks a file's rows, puts those that cannot be used into table `rejects` with their reason, and
gives a relation of the others, every value in its canonical form: numbers as DOUBLE; keys, ids and list elements as
text, so that CSV and Parquet agree. Where every file holds a key or id as whole numbers, these stand in for their
text, which is then made of the distinct ones alone. `encode` turns such rows into the arrays of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import numpy as np
import numpy.typing as npt

from gmeta.core.errors import nearest
from gmeta.data.schema import (
    ITEM_STATISTICS,
    DataSchema,
    NumericColumn,
    PackSchema,
    RawFeature,
    RawNumeric,
    Role,
    data_schema_from_json,
)
from gmeta.data.sources import (
    Connection,
    RawPart,
    find_files,
    identifier,
    literal,
    md5_64,
    only_file,
    open_file,
    reading,
    scalar,
)

Array = npt.NDArray[Any]

FOLDS = 10
"""Folds of the training tasks: an item's statistics in a training row leave the row's own fold out."""
PRIOR_ROWS = 10.0
"""Rows' worth of the global mean that an item's mean is smoothed with."""
SHOWN_REJECTS = 5

_SMALL_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "UTINYINT", "USMALLINT")
_INTEGERS = (*_SMALL_INTEGERS, "UINTEGER", "BIGINT")
_WIDE_INTEGERS = ("UBIGINT", "HUGEINT", "UHUGEINT")
_PLAIN = (*_INTEGERS, "BOOLEAN", "DATE", "UUID", "TIME")
_MISSING_TEXT = "('', 'nan', 'NaN')"
_TOO_LARGE = "is a whole number beyond int64: put a letter before it to keep it as text"
_FLOAT32_MAX = "3.4e38"

_ROLE_TYPES = {"label": "FLOAT", "time": "BIGINT", "partition": "VARCHAR"}

_Checks = list[tuple[str, str]]  # (SQL that is true for a bad value, reason)


# ---------------------------------------------------------------------------------------------- staging


def id_types(schema: DataSchema, parts: Sequence[RawPart]) -> dict[str, str]:
    """SQL type of the ids of a table, and of the roles task and item: INTEGER or BIGINT where all parts hold such."""
    columns = {table: [f.name for f in features] for table, features in schema.tables().items()}
    types = {table: _common_type(parts, names) for table, names in columns.items()}
    roles = {f"role {role}": name for role, name in (("task", schema.task), ("item", schema.item)) if name is not None}
    return types | {role: _common_type(parts, [name]) for role, name in roles.items()}


def _common_type(parts: Sequence[RawPart], columns: Sequence[str]) -> str:
    kinds = {part.columns.get(column, "VARCHAR").removesuffix("[]") for part in parts for column in columns}
    if kinds <= set(_SMALL_INTEGERS):
        return "INTEGER"
    return "BIGINT" if kinds <= set(_INTEGERS) else "VARCHAR"


def create_staged(con: Connection, schema: DataSchema, types: Mapping[str, str]) -> None:
    """Create the empty tables `rejects` (file, row, reason, bad_column, bad_value) and `staged`, which has these
    columns, then the roles, f0 …, n0 …. `types` is what `id_types` gives; what it leaves out is text."""
    features = [
        f"f{i} {types.get(f.table, 'VARCHAR')}" + ("" if f.kind == "categorical" else "[]")
        for i, f in enumerate(schema.features)
    ]
    numeric = [f"n{i} DOUBLE" for i in range(len(schema.numeric))]
    task, item = (types.get(f"role {role}", "VARCHAR") for role in ("task", "item"))
    roles = [f"task {task}", "label FLOAT", "time BIGINT", f"item {item}", "partition VARCHAR"]
    places = "file INTEGER, row BIGINT, reason VARCHAR, bad_column VARCHAR, bad_value VARCHAR"
    con.execute(f"CREATE TABLE staged ({', '.join([places, *roles, *features, *numeric])})")
    con.execute(f"CREATE TABLE rejects ({places})")
    # A Parquet file's minimum and maximum pass over NaN; DuckDB 2.0 concludes that there is none and drops isnan().
    con.execute("SET disabled_optimizers='statistics_propagation'")


def stage(
    con: Connection, part: RawPart, file: int, schema: DataSchema, roles: Sequence[Role], types: Mapping[str, str]
) -> str:
    """Check the rows of `part`, which is file number `file`; returns SQL of its rows that can be used.

    Their columns are those of `staged` without reason, bad_column and bad_value; roles that are not asked for are
    NULL. Rows of a part that must be read in order are copied to `staged`; the others are read from the file each
    time, which is cheaper than to write them. Raises ValueError for a column that is missing or whose type cannot hold
    what the schema says of it.
    """
    for name in schema.columns(roles):
        if name not in part.columns:
            raise ValueError(f"{part.file} has no column {name!r}: {nearest(name, part.columns)}")
    values, checks = _staged_columns(con, part, schema, roles, types)
    cases = " ".join(f"WHEN {condition} THEN {i}" for i, (_, condition, _) in enumerate(checks))
    problem = f"CASE {cases} END"
    reason = " ".join(f"WHEN {i} THEN {literal(reason)}" for i, (_, _, reason) in enumerate(checks))
    column = " ".join(f"WHEN {i} THEN {literal(column)}" for i, (column, _, _) in enumerate(checks))
    value = " ".join(f"WHEN {i} THEN CAST({identifier(column)} AS VARCHAR)" for i, (column, _, _) in enumerate(checks))
    place = f"{file} AS file, __row AS row"
    why = f"CASE __problem {reason} END, CASE __problem {column} END, CASE __problem {value} END"
    checked = f"(SELECT *, {problem} AS __problem FROM ({part.query}))"
    if part.ordered:
        con.execute("SET preserve_insertion_order=true")
        con.execute(f"INSERT INTO staged SELECT {place}, {why}, {', '.join(values)} FROM {checked}")
        con.execute("SET preserve_insertion_order=false")
        con.execute(f"""INSERT INTO rejects SELECT file, row, reason, bad_column, bad_value FROM staged
                        WHERE file = {file} AND reason IS NOT NULL""")
        _stage_broken_lines(con, file)
        return "SELECT * EXCLUDE (reason, bad_column, bad_value) FROM staged WHERE reason IS NULL"
    ((bad,),) = con.execute(
        f"INSERT INTO rejects SELECT {place}, {why} FROM {checked} WHERE __problem IS NOT NULL"
    ).fetchall()
    names = [name for (name,) in con.execute("SELECT column_name FROM (DESCRIBE staged) OFFSET 5").fetchall()]
    named = ", ".join(f"{value} AS {name}" for value, name in zip(values, names, strict=True))
    return f"SELECT {place}, {named} FROM ({part.query}){f' WHERE {problem} IS NULL' if bad else ''}"


def _stage_broken_lines(con: Connection, file: int) -> None:
    """Move the CSV lines that DuckDB could not read to `rejects`."""
    if not scalar(con, "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"):
        return
    con.execute(f"""
        INSERT INTO rejects (file, row, reason, bad_value)
        SELECT {file}, line, 'is no valid CSV line: ' || any_value(error_message), any_value(csv_line)
        FROM reject_errors GROUP BY line""")
    con.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")


def _staged_columns(
    con: Connection, part: RawPart, schema: DataSchema, roles: Sequence[Role], types: Mapping[str, str]
) -> tuple[list[str], list[tuple[str, str, str]]]:
    """SQL of every value of `staged` after bad_value, and (column, condition, reason) of every check."""
    values: list[str] = []
    checks: list[tuple[str, str, str]] = []

    def add(column: str, staged: tuple[str, _Checks]) -> None:
        values.append(staged[0])
        checks.extend((column, condition, reason) for condition, reason in staged[1])

    for role in ("task", "label", "time", "item", "partition"):
        column = getattr(schema, role)
        if role not in roles or column is None:
            values.append(f"NULL::{_ROLE_TYPES.get(role, types.get(f'role {role}', 'VARCHAR'))}")
        elif role == "label":
            add(column, _label(part, column, schema.label_threshold))
        elif role == "time":
            add(column, _time(con, part, column))
        else:
            add(column, _id(part, column, types.get(f"role {role}", "VARCHAR"), nulls="error", used_as=role))
    for feature in schema.features:
        as_type = types.get(feature.table, "VARCHAR")
        if feature.kind == "categorical":
            add(feature.name, _id(part, feature.name, as_type, feature.nulls, feature.kind))
        else:
            add(feature.name, _list(part, feature, as_type))
    for numeric in schema.numeric:
        add(numeric.name, _number(part, numeric))
    return values, checks


def _unfit(part: RawPart, column: str, used_as: str, cure: str) -> ValueError:
    return ValueError(f"{part.file}: column {column!r} has type {part.columns[column]}, unfit for {used_as}: {cure}")


def _id_value(value: str, kind: str, as_type: str) -> tuple[str, _Checks] | None:
    """SQL of an id (NULL where missing) and its checks; None for a type that is no id."""
    if as_type != "VARCHAR":
        return f"CAST({value} AS {as_type})", []
    if kind in _PLAIN or kind.startswith(("TIMESTAMP", "ENUM")):
        return f"CAST({value} AS VARCHAR)", []
    if kind in _WIDE_INTEGERS:
        return f"CAST({value} AS VARCHAR)", [
            (f"{value} IS NOT NULL AND TRY_CAST({value} AS BIGINT) IS NULL", _TOO_LARGE)
        ]
    if kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        known = f"({value} IS NOT NULL AND NOT isnan(CAST({value} AS DOUBLE)))"
        exact = f"({value} = floor({value}) AND abs({value}) <= 9007199254740992)"
        text = f"CASE WHEN {known} AND {exact} THEN CAST(TRY_CAST({value} AS BIGINT) AS VARCHAR) END"
        return text, [(f"{known} AND NOT {exact}", "is a fraction, or beyond 2^53 where floats are no exact ids")]
    if kind == "VARCHAR":
        digits = f"length({value}) >= 19 AND regexp_full_match({value}, '[+-]?[0-9]+')"
        text = f"CASE WHEN {value} NOT IN {_MISSING_TEXT} THEN {value} END"
        return text, [(f"{digits} AND TRY_CAST({value} AS BIGINT) IS NULL", _TOO_LARGE)]
    return None


def _id(part: RawPart, column: str, as_type: str, nulls: str, used_as: str) -> tuple[str, _Checks]:
    kind = part.columns[column]
    found = None if kind.endswith("[]") else _id_value(identifier(column), kind, as_type)
    if found is None:
        raise _unfit(
            part, column, used_as, "it needs one text or whole number a row (lists go under multi or sequence)"
        )
    text, checks = found
    return text, checks + ([(f"({text}) IS NULL", "is missing")] if nulls == "error" else [])


def _list(part: RawPart, feature: RawFeature, as_type: str) -> tuple[str, _Checks]:
    value, kind, separator = identifier(feature.name), part.columns[feature.name], feature.separator
    checks: _Checks = []
    if kind == "VARCHAR" and separator is not None:
        # A CSV file cannot tell an empty list from none.
        elements = f"list_filter(string_split(coalesce({value}, ''), {literal(separator)}), lambda x: trim(x) <> '')"
        elements, kind = f"list_transform({elements}, lambda x: trim(x))", "VARCHAR"
    elif kind.endswith("[]"):
        elements, kind = value, kind.removesuffix("[]")
        checks = [(f"{value} IS NULL", "is missing")] if feature.nulls == "error" else []
    else:
        cure = "it needs a list column, or text and the key separator"
        raise _unfit(part, feature.name, feature.kind, cure)
    found = _id_value("x", kind, as_type)
    if found is None:
        raise _unfit(part, feature.name, feature.kind, "its elements must be texts or whole numbers")
    text, element_checks = found
    bad = [*element_checks, (f"({text}) IS NULL", "has a missing element")]
    checks += [(f"len(list_filter({elements}, lambda x: {condition})) > 0", reason) for condition, reason in bad]
    ids = f"list_transform({elements}, lambda x: {text})"
    if feature.max_length is not None:
        ids = f"({ids})[-{feature.max_length}:]"
    return f"coalesce({ids}, [])", checks


def _number_value(part: RawPart, column: str, used_as: str) -> tuple[str, _Checks]:
    value, kind = identifier(column), part.columns[column]
    if kind not in (*_INTEGERS, *_WIDE_INTEGERS, "BOOLEAN", "FLOAT", "DOUBLE", "VARCHAR") and "DECIMAL" not in kind:
        raise _unfit(part, column, used_as, "it needs a number")
    number = f"TRY_CAST({value} AS DOUBLE)"
    empty = f"{value} <> '' AND " if kind == "VARCHAR" else ""
    return number, [
        (f"{empty}{value} IS NOT NULL AND {number} IS NULL", "is no number"),
        (f"NOT isnan({number}) AND abs({number}) > {_FLOAT32_MAX}", "is infinite or beyond float32"),
    ]


def _label(part: RawPart, column: str, threshold: float | None) -> tuple[str, _Checks]:
    number, checks = _number_value(part, column, "label")
    missing = (f"({number} IS NULL OR isnan({number}))", "is missing")
    value = f"TRY_CAST({number} AS FLOAT)"
    if threshold is not None:
        value = f"CASE WHEN {number} >= {threshold!r} THEN 1 ELSE 0 END"
    return value, [*checks, missing]


def _number(part: RawPart, numeric: RawNumeric) -> tuple[str, _Checks]:
    number, checks = _number_value(part, numeric.name, "numeric")
    if numeric.nulls == "error":
        checks.append((f"({number} IS NULL OR isnan({number}))", "is missing"))
    if numeric.log:
        checks.append((f"{number} < 0", "is negative, and the schema takes its logarithm"))
    return f"CASE WHEN NOT isnan({number}) THEN {number} END", checks


def _time(con: Connection, part: RawPart, column: str) -> tuple[str, _Checks]:
    value, kind = identifier(column), part.columns[column]
    if kind == "VARCHAR":
        first = f"SELECT {value} FROM ({part.query}) WHERE {value} IS NOT NULL LIMIT 1"
        as_number = scalar(con, f"SELECT TRY_CAST(({first}) AS DOUBLE) IS NOT NULL OR ({first}) IS NULL")
        kind = "DOUBLE" if as_number else "TIMESTAMP"
        what = "a number like the first time of the file" if as_number else "a date or time"
    else:
        what = "a time within int64"
    if kind.startswith(("TIMESTAMP", "DATE")):
        time = f"epoch_us(TRY_CAST({value} AS TIMESTAMP))"
    elif kind in (*_INTEGERS, *_WIDE_INTEGERS):
        time = f"TRY_CAST({value} AS BIGINT)"
    elif kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        # Through DOUBLE only where there is a fraction to cut: whole numbers above 2^53 stay exact.
        whole = f"TRY_CAST(floor(TRY_CAST({value} AS DOUBLE)) AS BIGINT)"
        time = f"CASE WHEN {value} LIKE '%.%' THEN {whole} ELSE coalesce(TRY_CAST({value} AS BIGINT), {whole}) END"
    else:
        raise _unfit(part, column, "time", "it needs a whole number, a date or a timestamp")
    return time, [(f"{value} IS NULL", "is missing"), (f"({time}) IS NULL", f"is not {what}")]


# ---------------------------------------------------------------------------------------------- rejects


def reject_counts(con: Connection) -> dict[str, int]:
    """Reason -> number of rows, most frequent first."""
    query = """SELECT coalesce(bad_column || ' ', 'line ') || regexp_replace(reason, ':.*', '') AS why, count(*)
               FROM rejects GROUP BY why ORDER BY count(*) DESC, why"""
    return dict(con.execute(query).fetchall())


def describe_rejects(con: Connection, files: Sequence[str]) -> str:
    """The first few rows that cannot be used, one a line: file, row, column, value and reason."""
    query = f"SELECT file, row, bad_column, bad_value, reason FROM rejects ORDER BY file, row LIMIT {SHOWN_REJECTS}"
    lines = []
    for file, row, column, value, reason in con.execute(query).fetchall():
        shown = "" if value is None else repr(value if len(value) <= 80 else value[:77] + "...") + " "
        where = f"row {row}, column {column!r}" if column is not None else f"line {row}"
        lines.append(f"  {files[file]}, {where}: {shown}{reason}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- encoding


def load_vocabularies(con: Connection, schema: DataSchema, vocab_dir: Path) -> None:
    """Load what `encode` looks values up in from a run's vocabulary directory.

    Raises ValueError for a file that is missing or damaged, with its name.
    """
    for index, (table, features) in enumerate(schema.tables().items()):
        if features[0].hash_buckets is None:
            _load(con, f"vocab_{index}", "value, id", vocab_dir / f"{quote(table, safe='')}.parquet")
    if schema.item_statistics:
        _load(con, "item_totals", "value, label_sum, count", vocab_dir / f"{ITEM_STATISTICS}.parquet")
        con.execute("CREATE TABLE item_folds (value VARCHAR, fold INTEGER, label_sum DOUBLE, count BIGINT)")


def _load(con: Connection, table: str, columns: str, file: Path) -> None:
    try:
        con.execute(f"CREATE TABLE {table} AS SELECT {columns} FROM read_parquet({only_file(file)})")
    except duckdb.Error as error:
        cure = "copy it again from the pack, or train again"
        raise ValueError(f"{file} is missing or damaged ({error}): {cure}") from None


def numeric_values(con: Connection, schema: DataSchema) -> list[str]:
    """SQL of the numeric columns before standardisation, over the relation of `with_statistics`."""
    values = [f"ln(1 + n{i})" if c.log else f"n{i}" for i, c in enumerate(schema.numeric)]
    if schema.item_statistics:
        mean = scalar(con, "SELECT label_sum / count FROM item_totals WHERE value IS NULL")
        total, count = (
            "(coalesce(t.label_sum, 0) - coalesce(o.label_sum, 0))",
            "(coalesce(t.count, 0) - coalesce(o.count, 0))",
        )
        values.append(f"({total} + {PRIOR_ROWS * mean!r}) / ({count} + {PRIOR_ROWS!r})")
        # A training row sees the other folds only; scaled up, its count means what it means elsewhere.
        values.append(f"ln(1 + {count} * CASE WHEN b.fold IS NULL THEN 1 ELSE {FOLDS / (FOLDS - 1)!r} END)")
    return values


def with_statistics(relation: str, schema: DataSchema) -> str:
    """FROM clause: `relation` as b, joined with the statistics of its items where the schema asks for them."""
    if not schema.item_statistics:
        return f"{relation} b"
    return f"""{relation} b LEFT JOIN item_totals t ON t.value = b.item
               LEFT JOIN item_folds o ON o.value = b.item AND o.fold = b.fold"""


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
    """Encode the staged rows of `relation` in the total order `order`, SQL expressions over `relation` as b.

    `relation` has the columns of `staged`, and `fold` (NULL outside training tasks) where the schema asks for item
    statistics. Returns `ids` int32 [rows, one-valued features], `dense` float32 [rows, F], `<name>.values` int32 and
    `<name>.offsets` int64 [rows + 1] of every many-valued feature, and the columns of `relation` named in `more`.
    """
    tables = list(schema.tables())
    one_valued = [(i, f) for i, f in enumerate(schema.features) if f.kind == "categorical"]
    many_valued = [(i, f) for i, f in enumerate(schema.features) if f.kind != "categorical"]
    select = [f"{_feature_id(schema, f, f'b.f{i}', f'v{i}')} AS f{i}" for i, f in one_valued]
    select += [f"len(b.f{i}) AS f{i}" for i, _ in many_valued]
    for j, (value, column) in enumerate(zip(numeric_values(con, schema), columns, strict=True)):
        select.append(f"CAST(coalesce(({value} - {column.mean!r}) / {column.std!r}, 0) AS FLOAT) AS n{j}")
    select += [f"b.{name}" for name in more]
    joins = [
        f"LEFT JOIN vocab_{tables.index(f.table)} v{i} ON v{i}.value = b.f{i}"
        for i, f in one_valued
        if f.hash_buckets is None
    ]
    query = f"SELECT {', '.join(select)} FROM {with_statistics(relation, schema)} {' '.join(joins)} ORDER BY {order}"
    found = con.execute(query).fetchnumpy()
    rows = len(next(iter(found.values())))
    ids = [found.pop(f"f{i}") for i, _ in one_valued]
    dense = [found.pop(f"n{j}") for j in range(len(columns))]
    arrays: dict[str, Array] = {
        "ids": np.stack(ids, 1) if ids else np.empty((rows, 0), np.int32),
        "dense": np.stack(dense, 1) if dense else np.empty((rows, 0), np.float32),
    }
    for i, feature in many_valued:
        arrays[f"{feature.name}.offsets"] = np.concatenate([[0], np.cumsum(found[f"f{i}"])]).astype(np.int64)
        vocab = f"vocab_{tables.index(feature.table)}"
        arrays[f"{feature.name}.values"] = _list_ids(con, relation, schema, i, vocab, order)
    return arrays | {name: np.asarray(found[name]) for name in more}


def _list_ids(con: Connection, relation: str, schema: DataSchema, index: int, vocab: str, order: str) -> Array:
    feature = schema.features[index]
    join = f"LEFT JOIN {vocab} v ON v.value = b.value" if feature.hash_buckets is None else ""
    elements = f"SELECT *, unnest(f{index}) AS value, generate_subscripts(f{index}, 1) AS place FROM {relation}"
    query = f"""SELECT {_feature_id(schema, feature, "b.value", "v")} AS id
                FROM ({elements}) b {join} ORDER BY {order}, b.place"""
    ids: Array = con.execute(query).fetchnumpy()["id"]
    return ids.astype(np.int32)


# ---------------------------------------------------------------------------------------------- predict


@dataclass(frozen=True)
class EncodedTables:
    """Tasks of a support and a query file, in the layout of a shard."""

    keys: list[str]  # raw key of each task
    arrays: dict[str, Array]  # as a shard's, without time; label is 0 in query rows, item_cold is 0
    query_row: Array  # int64 [rows], row of the query file (from 0), -1 for support rows


def encode_tables(
    support_path: str, query_path: str, data_schema_json: dict[str, Any], vocab_dir: Path, pack_schema: PackSchema
) -> EncodedTables:
    """Encode raw support rows (labelled) and query rows (label not needed) with a run's vocabularies.

    Tasks come in the order in which the query file first names them; tasks that it does not name are left out. A
    task may have no support. Raises ValueError for missing files and columns, and for rows that cannot be used,
    with file, row, column and value.
    """
    schema = data_schema_from_json(data_schema_json)
    roles: list[Role] = ["task", "item"] if schema.item_statistics else ["task"]
    with duckdb.connect() as con:
        create_staged(con, schema, types={})
        relations, files = [], []
        for index, (path, needed) in enumerate(((support_path, [*roles, "label"]), (query_path, roles))):
            found = find_files([path])
            if len(found) != 1:
                raise ValueError(f"{path} stands for {len(found)} files: give one Parquet or CSV file")
            files.append(path)
            with reading(path):
                relations.append(stage(con, open_file(con, found[0]), index, schema, needed, types={}))
        if counts := reject_counts(con):
            raise ValueError(f"{sum(counts.values())} rows cannot be used:\n{describe_rejects(con, files)}")
        load_vocabularies(con, schema, vocab_dir)
        con.execute(f"CREATE VIEW raw_rows AS {' UNION ALL '.join(dict.fromkeys(relations))}")
        con.execute("""
            CREATE TABLE placed AS
            SELECT s.*, NULL::INTEGER AS fold, row_number() OVER (ORDER BY q.first, s.file, s.row) - 1 AS pos
            FROM raw_rows s
            JOIN (SELECT task, min(row) AS first FROM raw_rows WHERE file = 1 GROUP BY task) q USING (task)""")
        tasks = con.execute("""
            SELECT task, min(pos) AS row_start, count(*) FILTER (file = 0) AS num_support
            FROM placed GROUP BY task ORDER BY row_start""").fetchnumpy()
        rows = con.execute("""
            SELECT coalesce(label, 0) AS label, CASE file WHEN 1 THEN row - 1 ELSE -1 END AS query_row
            FROM placed ORDER BY pos""").fetchnumpy()
        if len(rows["label"]) == 0:
            raise ValueError(f"{query_path} has no rows: there is nothing to score")
        arrays = encode(con, "placed", schema, pack_schema.numeric, order="b.pos")
    arrays |= {
        "label": rows["label"].astype(np.float32),
        "item_cold": np.zeros(len(rows["label"]), np.uint8),
        "task_id": np.arange(len(tasks["task"]), dtype=np.int64),
        "row_start": tasks["row_start"].astype(np.int64),
        "num_support": tasks["num_support"].astype(np.int32),
    }
    return EncodedTables([str(k) for k in tasks["task"]], arrays, rows["query_row"].astype(np.int64))
