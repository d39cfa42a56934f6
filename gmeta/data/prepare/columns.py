"""What the stages share: DuckDB's types, what a rule for a value returns, and how many columns a query takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar

from gmeta.data.schema import DataSchema
from gmeta.data.sources import RawPart

T = TypeVar("T")

SMALL_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "UTINYINT", "USMALLINT")
INTEGERS = (*SMALL_INTEGERS, "UINTEGER", "BIGINT")
PLAIN = (*INTEGERS, "BOOLEAN", "DATE", "UUID", "TIME")
"""Types whose text, as DuckDB makes it, is the id."""
WIDE_INTEGERS = ("UBIGINT", "HUGEINT", "UHUGEINT")
MISSING_TEXT = "('', 'nan', 'NaN')"
MISSING_TIME = "('', 'nan', 'NaN', 'NaT')"
TOO_LARGE = "is a whole number beyond int64: put a letter before it to keep it as text"

Checks: TypeAlias = list[tuple[str, str]]
"""Each check is SQL that is true for a bad value, and the reason to give."""
Value: TypeAlias = tuple[str, Checks]
"""A value is its SQL (NULL where it is missing) and its checks."""

COLUMNS_A_QUERY = 32
"""Every join copies all columns of its query: with all features in one query the work grows with their square."""


def unfit(part: RawPart, column: str, used_as: str, cure: str) -> ValueError:
    """Return the error for a column whose type cannot hold what the schema says of it."""
    return ValueError(f"{part.file}: column {column!r} has type {part.columns[column]}, unfit for {used_as}: {cure}")


def label_columns(schema: DataSchema) -> list[str]:
    """Return the columns of a checked row that hold its labels: `label` alone, or `label`, `y1`, … where there are
    several, of which a row may lack some (NULL).
    """
    return ["label", *(f"y{i}" for i in range(1, len(schema.labels)))]


def is_nested(kind: str) -> bool:
    """Tell whether a value of a DuckDB type holds others."""
    return kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))


def value_columns(schema: DataSchema) -> list[str]:
    """Return the columns of checked rows that hold values: f0 … (features), n0 … (numeric columns) and s0 … (numeric
    sequences), and of the vectors those that are kept by row.
    """
    counts = {"f": len(schema.features), "n": len(schema.numeric), "s": len(schema.numeric_sequence)}
    names = [f"{kind}{i}" for kind, count in counts.items() for i in range(count)]
    return names + [f"v{i}" for i, vector in enumerate(schema.vector) if vector.owner == "row"]


def batched(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut `items` into parts of at most COLUMNS_A_QUERY."""
    return (items[start : start + COLUMNS_A_QUERY] for start in range(0, len(items), COLUMNS_A_QUERY))
