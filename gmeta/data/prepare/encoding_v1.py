"""Encoding 1: how packs and runs that record no encoding read ids, numbers and labels.

These rules are kept as they were, faults included: 7.0 in CSV is another id than 7, True another than true. A run
that was trained by them must be asked by them. Nothing new is encoded so; `values` holds the rules of today.
"""

from __future__ import annotations

from gmeta.data.prepare.columns import (
    INTEGERS,
    MISSING_TEXT,
    PLAIN,
    TOO_LARGE,
    WIDE_INTEGERS,
    Value,
)
from gmeta.data.schema import FLOAT32_MAX


def id_value(value: str, kind: str, as_type: str) -> Value | None:
    """Return SQL of an id as `as_type` (NULL where it is missing) and its checks; None for a type that is no id."""
    if as_type != "VARCHAR":
        return f"CAST({value} AS {as_type})", []
    if kind in PLAIN or kind.startswith(("TIMESTAMP", "ENUM")):
        return f"CAST({value} AS VARCHAR)", []
    if kind in WIDE_INTEGERS:
        return f"CAST({value} AS VARCHAR)", [
            (f"{value} IS NOT NULL AND TRY_CAST({value} AS BIGINT) IS NULL", TOO_LARGE)
        ]
    if kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        known = f"({value} IS NOT NULL AND NOT isnan(CAST({value} AS DOUBLE)))"
        exact = f"({value} = floor({value}) AND abs({value}) <= 9007199254740992)"
        text = f"CASE WHEN {known} AND {exact} THEN CAST(TRY_CAST({value} AS BIGINT) AS VARCHAR) END"
        return text, [(f"{known} AND NOT {exact}", "is a fraction, or beyond 2^53 where floats are no exact ids")]
    if kind == "VARCHAR":
        digits = f"length({value}) >= 19 AND regexp_full_match({value}, '[+-]?[0-9]+')"
        text = f"CASE WHEN {value} NOT IN {MISSING_TEXT} THEN {value} END"
        return text, [(f"{digits} AND TRY_CAST({value} AS BIGINT) IS NULL", TOO_LARGE)]
    return None


def number_value(value: str, kind: str) -> Value | None:
    """Return SQL of a number as DOUBLE (NULL where it is missing) and its checks; None for a type that is no number."""
    if kind not in (*INTEGERS, *WIDE_INTEGERS, "BOOLEAN", "FLOAT", "DOUBLE", "VARCHAR") and "DECIMAL" not in kind:
        return None
    number = f"TRY_CAST({value} AS DOUBLE)"
    empty = f"{value} <> '' AND " if kind == "VARCHAR" else ""
    return number, [
        (f"{empty}{value} IS NOT NULL AND {number} IS NULL", "is no number"),
        (f"NOT isnan({number}) AND abs({number}) > {FLOAT32_MAX!r}", "is infinite or beyond float32"),
    ]


def label_value(value: str, kind: str, threshold: float | None) -> Value | None:
    """Return SQL of a label as FLOAT and its checks; None for a type that is no number."""
    found = number_value(value, kind)
    if found is None:
        return None
    number, checks = found
    checks = [*checks, (f"({number} IS NULL OR isnan({number}))", "is missing")]
    if threshold is None:
        return f"TRY_CAST({number} AS FLOAT)", checks
    return f"CASE WHEN {number} >= {threshold!r} THEN 1 ELSE 0 END", checks
