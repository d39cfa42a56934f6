"""Tables in memory: pandas, polars, Arrow or a dict of columns, as one Arrow table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

TableLike = Any
"""A pandas or polars DataFrame, an Arrow table or batch, anything else that exports an Arrow stream, or a dict."""


def as_arrow(table: TableLike, name: str) -> pa.Table:
    """Return the columns of a table in memory; an index of pandas is no column.

    Raises ValueError that names the table, and the column where one cannot be read.
    """
    if isinstance(table, pa.Table):
        found = table
    elif isinstance(table, pa.RecordBatch):
        found = pa.Table.from_batches([table])
    elif isinstance(table, Mapping):
        found = _from_columns(table, name)
    elif hasattr(table, "index") and hasattr(table, "columns") and hasattr(table, "dtypes"):
        found = _from_pandas(table, name)
    elif hasattr(table, "__arrow_c_stream__"):
        found = pa.table(table)
    else:
        raise ValueError(
            f"{name} is a {type(table).__name__}: give a pandas or polars DataFrame, an Arrow table, "
            "or a dict of columns"
        )
    if len(set(found.column_names)) != found.num_columns:
        raise ValueError(f"{name} has two columns of one name: {', '.join(found.column_names)}")
    return pa.table({column: _decoded(found[column]) for column in found.column_names})


def _from_columns(columns: Mapping[str, Any], name: str) -> pa.Table:
    found = {}
    for key, values in columns.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise ValueError(f"{name}[{key!r}] is {values!r}: must be a list or array of values")
        found[str(key)] = _column(values, name, key)
    sizes = {key: len(values) for key, values in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the columns of {name} have different lengths: {sizes}")
    return pa.table(found)


def _from_pandas(frame: Any, name: str) -> pa.Table:
    for column in frame.columns:
        if not isinstance(column, str):
            raise ValueError(f"{name} has a column named {column!r}: names must be text")
    indexed = [level for level in frame.index.names if level is not None and level not in frame.columns]
    columns = {column: _column(frame[column], name, column) for column in frame.columns}
    table = pa.table(columns) if columns else pa.table({})
    return table.replace_schema_metadata({"index": ", ".join(map(str, indexed))} if indexed else None)


def _column(values: Any, name: str, key: Any) -> pa.Array | pa.ChunkedArray:
    try:
        if isinstance(values, pa.Array | pa.ChunkedArray):
            return values
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ValueError(f"{name}[{key!r}] holds values of several types ({error}): convert it to one") from None


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return categories (pandas, polars) as the values that they stand for."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
