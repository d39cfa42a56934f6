"""Stage 1 of `prepare`, and of encoding a file for `predict`: raw rows to checked rows, every value in its one form.

`check` puts rows that cannot be used into table `rejects` with their reason, and gives a relation of the others.
Where every file holds a key or id as whole numbers, these stand in for their text, which is then made of the distinct
ones alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TypeAlias

from gmeta.core.errors import nearest
from gmeta.data.prepare import encoding_v1, values
from gmeta.data.prepare.columns import INTEGERS, SMALL_INTEGERS, Checks, Value, is_nested, label_columns, unfit
from gmeta.data.prepare.times import time_columns
from gmeta.data.raw_columns import RawFeature, RawNumeric, RawNumericSequence
from gmeta.data.schema import ENCODING, DataSchema, LabelColumn, Role, Vector
from gmeta.data.sources import Connection, RawPart, identifier, in_order, literal, scalar

SHOWN_REJECTS = 5
LARGEST_FP16 = 65504.0

TypeKey: TypeAlias = str | tuple[str, str]
"""A table's name, or ("role", role)."""

_RULES: Mapping[int, ModuleType] = {1: encoding_v1, 2: values}
_PLACES = "file INTEGER, row BIGINT, reason VARCHAR, bad_column VARCHAR, bad_value VARCHAR"


def id_types(schema: DataSchema, parts: Sequence[RawPart]) -> dict[TypeKey, str]:
    """Return the SQL type of each table's ids and of the roles task and item: INTEGER or BIGINT where all parts fit."""
    columns = {table: [f.name for f in features] for table, features in schema.tables().items()}
    types: dict[TypeKey, str] = {table: _common_type(parts, names) for table, names in columns.items()}
    for role, name in (("task", schema.task), ("item", schema.item)):
        if name is not None:
            types["role", role] = _common_type(parts, [name])
    return types


def _common_type(parts: Sequence[RawPart], columns: Sequence[str]) -> str:
    kinds = {part.columns.get(column, "VARCHAR").removesuffix("[]") for part in parts for column in columns}
    kinds.discard('"NULL"')  # a column without a value fits any other
    if not kinds or not kinds <= set(INTEGERS):
        return "VARCHAR"
    return "INTEGER" if kinds <= set(SMALL_INTEGERS) else "BIGINT"


def create_checked(con: Connection, schema: DataSchema, types: Mapping[TypeKey, str]) -> None:
    """Create the empty temporary tables `rejects` (file, row, reason, bad_column, bad_value) and `checked`.

    `checked` has the columns of `rejects`, then those of `checked_columns`. `types` is what `id_types` gives. Other
    cursors of the connection do not see them.
    """
    # Temporary tables are not compressed, which takes as long as to read and check the rows; they spill to disk alike.
    columns = [f"{name} {kind}" for name, kind in checked_columns(schema, types).items()]
    con.execute(f"CREATE TEMP TABLE checked ({', '.join([_PLACES, *columns])})")
    con.execute(f"CREATE TEMP TABLE rejects ({_PLACES})")
    con.execute("SET TimeZone='UTC'")  # values do not depend on it; what a rejected time looks like does
    # A Parquet file's minimum and maximum pass over NaN; DuckDB 2.0 concludes that there is none and drops isnan().
    con.execute("SET preserve_insertion_order=false")  # elsewhere than `in_order`
    con.execute("SET disabled_optimizers='statistics_propagation'")


def checked_columns(schema: DataSchema, types: Mapping[TypeKey, str]) -> dict[str, str]:
    """Return column -> SQL type of a checked row: the roles, f0 … (features), n0 … (numeric columns), s0 … (numeric
    sequences) and v0 … (vectors).
    """
    task, item = (types.get(("role", role), "VARCHAR") for role in ("task", "item"))
    columns = {"task": task, "label": "FLOAT", "time": "BIGINT", "time_fraction": "INTEGER"}
    columns |= dict.fromkeys(label_columns(schema)[1:], "FLOAT")
    columns |= {} if schema.weight is None else {"weight": "FLOAT"}
    columns |= {"item": item, "partition": "VARCHAR", "is_query": "BOOLEAN"}
    for i, feature in enumerate(schema.features):
        columns[f"f{i}"] = types.get(feature.table, "VARCHAR") + ("" if feature.kind == "categorical" else "[]")
    columns |= {f"n{i}": "DOUBLE" for i in range(len(schema.numeric))}
    columns |= {f"s{i}": "DOUBLE[]" for i in range(len(schema.numeric_sequence))}
    return columns | {f"v{i}": "FLOAT[]" for i in range(len(schema.vector))}


def check(
    con: Connection,
    part: RawPart,
    file: int,
    schema: DataSchema,
    roles: Sequence[Role],
    types: Mapping[TypeKey, str],
    encoding: int = ENCODING,
    sides: Mapping[str, str] | None = None,
    *,
    known_items: bool = False,
) -> str:
    """Check the rows of `part`, which is file number `file`; returns SQL of its rows that can be used.

    Their columns are file, row, and those of `checked_columns`; roles that are not asked for are NULL. `sides` says of
    each value of the role column whether it stands for `support` or `query`. With `known_items`, vectors that are kept
    by item may be left out. Rows of a part that must be read in order are copied to `checked`; the others are read
    from the file each time, which is cheaper than to write them. Raises ValueError for a column that is missing or
    whose type cannot hold what the schema says of it.
    """
    for name in [*schema.columns(roles), *([] if known_items else schema.item_vectors())]:
        if name not in part.columns:
            own = [column for column in part.columns if not column.startswith("__")]
            raise ValueError(f"{part.file} has no column {name!r}: {nearest(name, own)}")
    columns = checked_columns(schema, types)
    found, checks = _Columns(con, part, schema, types, encoding, sides or {}).all(roles)
    selected = [f"CAST({found[name]} AS {kind}) AS {name}" for name, kind in columns.items()]
    place = f"{file} AS file, __row AS row"
    problem = f"CASE {' '.join(f'WHEN {condition} THEN {i}' for i, (_, condition, _) in enumerate(checks, 1))} END"
    why = f"SELECT {place}, {_why(checks)}"
    source = f"(SELECT *, {problem} AS __problem FROM ({part.query}))"
    if part.ordered:
        with in_order(con):
            con.execute(f"INSERT INTO checked {why}, {', '.join(selected)} FROM {source}")
        con.execute(f"""INSERT INTO rejects SELECT file, row, reason, bad_column, bad_value FROM checked
                        WHERE file = {file} AND reason IS NOT NULL""")
        _reject_broken_lines(con, file)
        return "SELECT * EXCLUDE (reason, bad_column, bad_value) FROM checked WHERE reason IS NULL"
    usable = f"SELECT {place}, {', '.join(selected)} FROM ({part.query})"
    # Nearly always no row is bad, and to ask only that is cheaper than to ask why.
    bad = " OR ".join(f"({condition})" for _, condition, _ in checks)
    if not scalar(con, f"SELECT count(*) FROM ({part.query}) WHERE {bad}"):
        return usable
    con.execute(f"INSERT INTO rejects {why} FROM {source} WHERE __problem IS NOT NULL")
    return f"{usable} WHERE {problem} IS NULL"


def _why(checks: Sequence[tuple[str, str, str]]) -> str:
    """Return SQL of the reason, column and value of the check that `__problem` (from 1) names; NULL for none."""
    columns = list(dict.fromkeys(column for column, _, _ in checks))
    reasons = ", ".join(literal(reason) for _, _, reason in checks)
    names = ", ".join(literal(column) for column, _, _ in checks)
    numbers = ", ".join(str(columns.index(column)) for column, _, _ in checks)
    shown = " ".join(f"WHEN {i} THEN CAST({identifier(column)} AS VARCHAR)" for i, column in enumerate(columns))
    return f"[{reasons}][__problem], [{names}][__problem], CASE [{numbers}][__problem] {shown} END"


def _reject_broken_lines(con: Connection, file: int) -> None:
    """Move the CSV lines that DuckDB could not read to `rejects`."""
    if not scalar(con, "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"):
        return
    con.execute(f"""
        INSERT INTO rejects (file, row, reason, bad_value)
        SELECT {file}, line, 'is no valid CSV line: ' || any_value(error_message), any_value(csv_line)
        FROM reject_errors GROUP BY line""")
    con.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")


class _Columns:
    """Makes the SQL of a part's values by the rules of an encoding."""

    def __init__(
        self,
        con: Connection,
        part: RawPart,
        schema: DataSchema,
        types: Mapping[TypeKey, str],
        encoding: int,
        sides: Mapping[str, str],
    ) -> None:
        self.con, self.part, self.schema, self.types, self.sides = con, part, schema, types, sides
        self.rules = _RULES[encoding]

    def all(self, roles: Sequence[Role]) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
        """Return column of `checked_columns` -> SQL, and (raw column, condition, reason) of every check."""
        found: dict[str, str] = dict.fromkeys(checked_columns(self.schema, self.types), "NULL")
        checks: list[tuple[str, str, str]] = []

        def add(name: str, column: str, value: Value) -> None:
            found[name] = value[0]
            checks.extend((column, condition, reason) for condition, reason in value[1])

        for role in roles:
            column = getattr(self.schema, role)
            if column is None:
                continue
            if role == "label" and self.schema.labels:
                for name, label in zip(label_columns(self.schema), self.schema.labels, strict=True):
                    add(name, label.name, self._one_of_several(label))
                none = " AND ".join(f"({found[name]}) IS NULL" for name in label_columns(self.schema))
                checks.append((column, none, "is missing, as all labels of the row are"))
            elif role == "label":
                add(role, column, self._label(column))
            elif role == "weight":
                add(role, column, self._weight(column))
            elif role == "time":
                whole, fraction, bad = time_columns(self.con, self.part, column)
                add(role, column, (whole, bad))
                found["time_fraction"] = fraction
            elif role == "role":
                add("is_query", column, self._side(column))
            else:
                as_type = self.types.get(("role", role), "VARCHAR")
                add(role, column, self._id(column, as_type, nulls="error", used_as=role))
        for i, feature in enumerate(self.schema.features):
            as_type = self.types.get(feature.table, "VARCHAR")
            one = feature.kind == "categorical"
            value = (
                self._id(feature.name, as_type, feature.nulls, feature.kind) if one else self._list(feature, as_type)
            )
            add(f"f{i}", feature.name, value)
        for i, numeric in enumerate(self.schema.numeric):
            add(f"n{i}", numeric.name, self._number(numeric))
        for i, sequence in enumerate(self.schema.numeric_sequence):
            add(f"s{i}", sequence.name, self._numbers(sequence))
        for i, vector in enumerate(self.schema.vector):
            if vector.name in self.part.columns:
                add(f"v{i}", vector.name, self._vector(vector))
        return found, checks

    def _vector(self, vector: Vector) -> Value:
        value, kind = identifier(vector.name), self.part.columns[vector.name]
        inner = kind[: kind.rindex("[")] if kind.endswith("]") else "VARCHAR"
        found = None if is_nested(inner) or inner == "VARCHAR" else self.rules.number_value("x", inner)
        if found is None:
            raise unfit(self.part, vector.name, "vector", f"it needs a list of {vector.dim} numbers a row")
        number, bad = found
        bad = [(condition, f"has an element that {reason}") for condition, reason in bad]
        bad.append((f"({number} IS NULL OR isnan({number}))", "has a missing element"))
        if vector.dtype == "fp16":
            bad.append((f"abs({number}) > {LARGEST_FP16!r}", "has an element beyond fp16: store it as fp32"))
        listed = f"CAST({value} AS {inner}[])"
        checks = [
            (f"{value} IS NULL", "is missing"),
            (f"len({listed}) <> {vector.dim}", f"has not {vector.dim} numbers"),
        ]
        checks += [(f"len(list_filter({listed}, lambda x: {condition})) > 0", reason) for condition, reason in bad]
        return f"list_transform({listed}, lambda x: TRY_CAST({number} AS FLOAT))", checks

    def _id(self, column: str, as_type: str, nulls: str, used_as: str) -> Value:
        kind = self.part.columns[column]
        found = None if is_nested(kind) else self.rules.id_value(identifier(column), kind, as_type)
        if found is None:
            cure = "it needs one text or whole number a row (lists go under multi or sequence)"
            raise unfit(self.part, column, used_as, cure)
        text, checks = found
        return text, checks + ([(f"({text}) IS NULL", "is missing")] if nulls == "error" else [])

    def _side(self, column: str) -> Value:
        text, checks = self._id(column, "VARCHAR", nulls="error", used_as="role")
        names = " ".join(f"WHEN {literal(name)} THEN {side == 'query'}" for name, side in self.sides.items())
        side = f"CASE {text} {names} END"
        return side, [*checks, (f"({side}) IS NULL", f"is no role: roles names {', '.join(map(repr, self.sides))}")]

    def _elements(self, column: RawFeature | RawNumericSequence) -> tuple[str, str]:
        """Return SQL of the raw values of a many-valued column as a list, and their type."""
        value, kind, separator = identifier(column.name), self.part.columns[column.name], column.separator
        if kind == '"NULL"':
            return "CAST([] AS VARCHAR[])", "VARCHAR"
        if kind == "VARCHAR" and separator is not None:
            # A CSV file cannot tell an empty list from none.
            elements = (
                f"list_filter(string_split(coalesce({value}, ''), {literal(separator)}), lambda x: trim(x) <> '')"
            )
            return f"list_transform({elements}, lambda x: trim(x))", "VARCHAR"
        if kind.endswith("[]"):
            return value, kind.removesuffix("[]")
        used_as = column.kind if isinstance(column, RawFeature) else "numeric_sequence"
        raise unfit(self.part, column.name, used_as, "it needs a list column, or text and the key separator")

    def _of_list(self, column: RawFeature | RawNumericSequence, elements: str) -> Checks:
        """Return the checks of a many-valued column as a whole."""
        checks: Checks = []
        kind = self.part.columns[column.name]
        if column.nulls == "error" and kind == '"NULL"':
            checks.append(("true", "is missing"))
        elif column.nulls == "error" and kind.endswith("[]"):
            checks.append((f"{identifier(column.name)} IS NULL", "is missing"))
        if column.aligned is not None:
            other = next(feature for feature in self.schema.features if feature.name == column.aligned)
            mine, theirs = (f"coalesce(len({listed}), 0)" for listed in (elements, self._elements(other)[0]))
            reason = f"has not as many values as {column.aligned!r}, which it is aligned with"
            checks.append((f"{mine} <> {theirs}", reason))
        return checks

    def _kept(self, column: RawFeature | RawNumericSequence, values: str) -> str:
        """Return SQL of the values that a many-valued column keeps of a list."""
        length = self.schema.length_of(column)
        return f"coalesce({values if length is None else f'({values})[-{length}:]'}, [])"

    def _numbers(self, column: RawNumericSequence) -> Value:
        elements, kind = self._elements(column)
        found = None if is_nested(kind) else self.rules.number_value("x", kind)
        if found is None:
            raise unfit(self.part, column.name, "numeric_sequence", "its elements must be numbers")
        number, bad = found
        bad = [(condition, f"has an element that {reason}") for condition, reason in bad]
        if column.nulls == "error":
            bad.append((f"({number} IS NULL OR isnan({number}))", "has a missing element"))
        if column.log:
            bad.append((f"{number} < 0", "has a negative element, and the schema takes its logarithm"))
        checks = self._of_list(column, elements)
        checks += [(f"len(list_filter({elements}, lambda x: {condition})) > 0", reason) for condition, reason in bad]
        number = f"CASE WHEN NOT isnan({number}) THEN {number} END"
        return self._kept(column, f"list_transform({elements}, lambda x: {number})"), checks

    def _list(self, feature: RawFeature, as_type: str) -> Value:
        elements, kind = self._elements(feature)
        checks = self._of_list(feature, elements)
        if self.part.columns[feature.name] == '"NULL"':
            return f"CAST([] AS {as_type}[])", checks
        found = None if is_nested(kind) else self.rules.id_value("x", kind, as_type)
        if found is None:
            raise unfit(self.part, feature.name, feature.kind, "its elements must be texts or whole numbers")
        text, element_checks = found
        bad = element_checks
        if not feature.may_lack_elements:
            bad = [*element_checks, (f"({text}) IS NULL", "has a missing element")]
        checks += [(f"len(list_filter({elements}, lambda x: {condition})) > 0", reason) for condition, reason in bad]
        return self._kept(feature, f"list_transform({elements}, lambda x: {text})"), checks

    def _label(self, column: str) -> Value:
        kind, threshold = self.part.columns[column], self.schema.label_threshold
        found: Value | None = None if is_nested(kind) else self.rules.label_value(identifier(column), kind, threshold)
        if found is None:
            raise unfit(self.part, column, "label", "it needs a number")
        return found

    def _one_of_several(self, label: LabelColumn) -> Value:
        kind = self.part.columns[label.name]
        found = None if is_nested(kind) else self.rules.number_value(identifier(label.name), kind)
        if found is None:
            raise unfit(self.part, label.name, "label", "it needs a number")
        number, checks = found
        value = f"CASE WHEN NOT isnan({number}) THEN TRY_CAST({number} AS FLOAT) END"
        if label.loss == "bce":
            checks = [*checks, (f"({value}) NOT IN (0, 1)", "is not 0 or 1, which its loss bce needs")]
        return value, checks

    def _weight(self, column: str) -> Value:
        kind = self.part.columns[column]
        found = None if is_nested(kind) else self.rules.number_value(identifier(column), kind)
        if found is None:
            raise unfit(self.part, column, "weight", "it needs a number")
        number, checks = found
        bad = [(f"({number} IS NULL OR isnan({number}))", "is missing"), (f"{number} < 0", "is negative, as a weight")]
        return f"TRY_CAST({number} AS FLOAT)", [*checks, *bad]

    def _number(self, numeric: RawNumeric) -> Value:
        kind = self.part.columns[numeric.name]
        found = None if is_nested(kind) else self.rules.number_value(identifier(numeric.name), kind)
        if found is None:
            raise unfit(self.part, numeric.name, "numeric", "it needs a number")
        number, checks = found
        if numeric.nulls == "error":
            checks = [*checks, (f"({number} IS NULL OR isnan({number}))", "is missing")]
        if numeric.log:
            checks = [*checks, (f"{number} < 0", "is negative, and the schema takes its logarithm")]
        return f"CASE WHEN NOT isnan({number}) THEN {number} END", checks


# ---------------------------------------------------------------------------------------------- rejects


def reject_counts(con: Connection) -> dict[str, int]:
    """Return reason -> number of rows, most frequent first."""
    query = """SELECT coalesce(bad_column || ' ', 'line ') || regexp_replace(reason, ':.*', '') AS why, count(*)
               FROM rejects GROUP BY why ORDER BY count(*) DESC, why"""
    return dict(con.execute(query).fetchall())


def describe_rejects(con: Connection, files: Sequence[str]) -> str:
    """Describe the first few rows that cannot be used, one a line: file, row, column, value and reason."""
    query = f"SELECT file, row, bad_column, bad_value, reason FROM rejects ORDER BY file, row LIMIT {SHOWN_REJECTS}"
    lines = []
    for file, row, column, value, reason in con.execute(query).fetchall():
        shown = "" if value is None else repr(value if len(value) <= 80 else value[:77] + "...") + " "
        where = f"row {row}, column {column!r}" if column is not None else f"line {row}"
        lines.append(f"  {files[file]}, {where}: {shown}{reason}")
    return "\n".join(lines)
