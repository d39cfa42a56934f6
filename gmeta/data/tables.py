"""Tables in memory: pandas, polars, Arrow or a dict of columns, as one Arrow table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from gmeta.core.errors import nearest

TableLike = Any
"""A pandas or polars DataFrame, an Arrow table or batch, anything else that exports an Arrow stream, or a dict."""


def as_arrow(table: TableLike, name: str, needed: Sequence[str], welcome: Sequence[str] = ()) -> pa.Table:
    """Return the `needed` columns of a table in memory, and the `welcome` ones that it has; others are ignored, and so
    is an index of pandas.

    Categories become the values that they stand for. Raises ValueError that names the table, and the column that is
    missing or cannot be read.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    elif not isinstance(table, Mapping | pa.Table) and not _is_pandas(table) and hasattr(table, "__arrow_c_stream__"):
        table = pa.table(table)
    if isinstance(table, pa.Table):
        given = table.column_names
    elif isinstance(table, Mapping) or _is_pandas(table):
        given = list(table.keys())
    else:
        raise ValueError(
            f"{name} is a {type(table).__name__}: give a pandas or polars DataFrame, an Arrow table, "
            "or a dict of columns"
        )
    for column in needed:
        if column not in given:
            if _is_pandas(table) and column in table.index.names:
                raise ValueError(f"{name} has {column!r} as its index, not as a column: call reset_index()")
            raise ValueError(f"{name} has no column {column!r}: {nearest(column, map(str, given))}")
        if list(given).count(column) > 1:
            raise ValueError(f"{name} has two columns {column!r}: leave one out")
    wanted = dict.fromkeys([*needed, *(column for column in welcome if column in given)])
    columns = {column: _column(table[column], name, column) for column in wanted}
    sizes = {column: len(values) for column, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the columns of {name} have different lengths: {sizes}")
    return pa.table(columns)


def has_no_columns(table: TableLike) -> bool:
    """Whether a table is empty to the point of having no columns: `{}`, or a new DataFrame."""
    columns = table if isinstance(table, Mapping) else getattr(table, "columns", None)
    return columns is not None and len(columns) == 0


def _is_pandas(table: object) -> bool:
    return type(table).__module__.partition(".")[0] == "pandas"


def _array(values: Any) -> pa.Array:
    try:
        return pa.array(values, from_pandas=True)
    except OverflowError:
        return pa.array(values, pa.uint64(), from_pandas=True)


def _types(values: Iterable[Any]) -> str:
    """Tell the first row of each type of value; nothing where there is but one, which is plain."""
    first: dict[str, str] = {}
    for row, value in enumerate(values, 1):
        kind = type(value).__name__
        if isinstance(value, list):
            kind = f"list of {' and '.join(sorted({type(part).__name__ for part in value if part is not None}))}"
        if value is not None and not (isinstance(value, float) and value != value):
            first.setdefault(kind, f"row {row} has {repr(value)[:80]} ({kind})")
    plain = len(first) == 1 and " and " not in next(iter(first))
    return "" if plain else ", ".join(first.values())


def _column(values: Any, name: str, key: str) -> pa.Array | pa.ChunkedArray:
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise ValueError(f"{name}[{key!r}] is {values!r}: must be a list or array of values")
        if getattr(values, "ndim", 1) != 1:
            raise ValueError(
                f"{name}[{key!r}] has {values.ndim} dimensions: must be one value, or one list, for each row"
            )
        try:
            values = _array(values)
        except OverflowError:
            raise ValueError(f"{name}[{key!r}] holds whole numbers beyond 64 bits: make them text") from None
        except (pa.ArrowException, ValueError, TypeError) as error:
            reason = _types(values) or error
            raise ValueError(f"{name}[{key!r}] cannot be read as one type of values: {reason}") from None
    if pa.types.is_float16(values.type):  # DuckDB has no such type
        return values.cast(pa.float32())
    if not pa.types.is_dictionary(values.type):
        return values
    chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
    kind = values.type.value_type
    kind = pa.large_string() if kind == pa.string_view() else kind  # the one text type that take does not know
    return pa.chunked_array([chunk.dictionary.cast(kind).take(chunk.indices) for chunk in chunks], kind)
