"""One unit of time over all files of an input.

Dates and timestamps are microseconds since 1970 UTC. Whole numbers keep their unit, whatever it is. Where any number
has a fraction, all are seconds and become microseconds. Files that do not share a unit are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gmeta.data.prepare.columns import INTEGERS, MISSING_TIME, WIDE_INTEGERS, Checks, is_nested, unfit
from gmeta.data.prepare.values import time_value
from gmeta.data.sources import Connection, RawPart, identifier, scalar

_DATED = ("TIMESTAMP", "DATE")
_WHOLE = (*INTEGERS, *WIDE_INTEGERS, *_DATED)
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_DATES = (315_532_800, 4_102_444_800)
"""1980 and 2100 in seconds since 1970: the last times of all files between them, in any unit, are taken for dates."""
_MAX = 2**63 // 10**6
"""Seconds beyond this do not fit in microseconds."""


def time_columns(con: Connection, part: RawPart, column: str) -> tuple[str, str, Checks]:
    """Return SQL of a part's time in whole units, of the fraction in millionths, and the checks.

    Raises ValueError for a type that is no time.
    """
    as_number = _as_number(con, part, column)
    kind = part.columns[column]
    found = None if is_nested(kind) else time_value(identifier(column), kind, as_number=as_number)
    if found is None:
        raise unfit(part, column, "time", "it needs a number, a date or a timestamp")
    return found


def _as_number(con: Connection, part: RawPart, column: str) -> bool:
    """Return whether a text column holds numbers: its first time decides, the others must be like it."""
    if part.columns[column] != "VARCHAR":
        return False
    value = identifier(column)
    first = f"SELECT {value} FROM ({part.query}) WHERE {value} NOT IN {MISSING_TIME} LIMIT 1"
    return bool(scalar(con, f"SELECT TRY_CAST(({first}) AS DOUBLE) IS NOT NULL OR ({first}) IS NULL"))


@dataclass(frozen=True)
class _Span:
    """What the times of one file are."""

    file: str
    kind: str
    low: int
    high: int
    fractions: bool


def common_time(con: Connection, parts: Sequence[RawPart], column: str | None) -> str:
    """Return SQL of the time of a checked row (BIGINT) in the one unit of all parts, which were checked in this order.

    Raises ValueError, which names two files, where parts hold numbers and dates, or numbers of other units.
    """
    if column is None or (len(parts) == 1 and parts[0].columns[column].startswith(_WHOLE)):
        return "time"
    spans = [span for i, part in enumerate(parts) if (span := _span(con, part, i, column)) is not None]
    for a, b in _that_differ(spans, lambda span: span.kind):
        raise ValueError(
            f"column {column!r} holds a {a.kind} in {a.file}, but a {b.kind} in {b.file}: "
            "one input has one unit of time; convert one of the files"
        )
    if all(_unit(span) for span in spans):
        for a, b in _that_differ(spans, _unit):
            raise ValueError(
                f"column {column!r} counts {_unit(a)} in {a.file} (up to {a.high}), but {_unit(b)} in {b.file} "
                f"(up to {b.high}): one input has one unit of time; convert one of the files"
            )
    if not any(span.fractions for span in spans):
        return "time"
    for span in spans:
        if max(abs(span.low), abs(span.high)) >= _MAX:
            raise ValueError(
                f"column {column!r} has fractions, so that it is taken for seconds, but {span.file} holds "
                f"{max(span.low, span.high, key=abs)}, which is beyond int64 in microseconds: "
                "convert it to seconds or to whole numbers"
            )
    return "time * 1000000 + time_fraction"


def _that_differ(spans: Sequence[_Span], key: Callable[[_Span], str | None]) -> list[tuple[_Span, _Span]]:
    """Return the first span beside the first one of another key; none where all are alike."""
    return [(spans[0], span) for span in spans if key(span) != key(spans[0])][:1]


def _unit(span: _Span) -> str | None:
    """Return the unit in which the last time of a file is a date of our days; None for a counter, and for dates."""
    return time_unit(span.high) if span.kind == "number" else None


def time_unit(time: int) -> str | None:
    """Return the unit in which a time is a date of our days; None for a counter."""
    return next((unit for unit, scale in _UNITS.items() if _DATES[0] * scale <= time < _DATES[1] * scale), None)


def per_second(unit: str) -> int:
    """Return how many of a unit a second has; 1 of one that is not known, a counter."""
    return _UNITS.get(unit, 1)


def to_microseconds(time: int, unit: str) -> int:
    """Return a time of a unit in microseconds."""
    return time * 10**6 // _UNITS[unit]


def from_microseconds(time: int, unit: str) -> int:
    """Return a time in microseconds in a unit."""
    return time * _UNITS[unit] // 10**6


def _span(con: Connection, part: RawPart, file: int, column: str) -> _Span | None:
    """Return what the times of a part are, by its column alone; None where it has none."""
    kind = part.columns[column]
    as_number = _as_number(con, part, column)
    times = f"SELECT time, time_fraction FROM checked WHERE file = {file}"
    if not part.ordered:
        whole, fraction, _ = time_columns(con, part, column)
        times = f"SELECT {whole} AS time, {fraction} AS time_fraction FROM ({part.query})"
    ((low, high, fractions),) = con.execute(
        f"SELECT min(time), max(time), bool_or(time_fraction <> 0) FROM ({times})"
    ).fetchall()
    if low is None:
        return None
    dated = kind.startswith(_DATED) or (kind == "VARCHAR" and not as_number)
    return _Span(part.file, "date or timestamp" if dated else "number", low, high, bool(fractions))
