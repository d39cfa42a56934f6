"""Encoding 2: the one form of every value, whatever file, column type or time zone it comes from.

    ids      text. Whole numbers are their digits (7, 7.0, 1.2E7, DECIMAL 7.00), booleans are true or false, timestamps
             are UTC. Other text is itself: 007 and 1.10 stay.
    numbers  DOUBLE, by the shortest decimal text that gives the value back: a FLOAT 0.1 is 0.1
    labels   FLOAT; a threshold is compared in the column's own type
    times    whole units, and a fraction of a unit in millionths

Functions return SQL of the value and the checks of a raw column: pairs of SQL that is true for a bad value, and the
reason to give. The rules of packs and runs that record no encoding are in `encoding_v1`.
"""

from __future__ import annotations

from gmeta.data.prepare.columns import (
    INTEGERS,
    MISSING_TEXT,
    MISSING_TIME,
    PLAIN,
    TOO_LARGE,
    WIDE_INTEGERS,
    Checks,
    Value,
)
from gmeta.data.schema import FLOAT32_MAX

_EXACT = {"FLOAT": 2**24, "DOUBLE": 2**53}
"""Up to these numbers every whole number has a float of its own."""
BEYOND_FLOAT32 = "is infinite or beyond float32"
_EXACT_DIGITS = 15
"""A DECIMAL of so many digits divides two exact doubles, so that its DOUBLE is the one that its text gives."""

# ------------------------------------------------------------------------------------------------------ ids


def id_value(value: str, kind: str, as_type: str) -> Value | None:
    """Return SQL of an id as `as_type` (NULL where it is missing) and its checks; None for a type that is no id."""
    if kind == '"NULL"':
        return f"CAST(NULL AS {as_type})", []
    if as_type != "VARCHAR":
        return f"CAST({value} AS {as_type})", []
    if kind == "VARCHAR":
        return _text_id(value)
    if kind.startswith("ENUM"):
        return _text_id(f"CAST({value} AS VARCHAR)")
    if kind in PLAIN:
        return f"CAST({value} AS VARCHAR)", []
    if kind.startswith("TIMESTAMP"):
        return f"CAST(make_timestamp({_microseconds(value, kind)}) AS VARCHAR)", []
    if kind in WIDE_INTEGERS:
        return f"CAST({value} AS VARCHAR)", [
            (f"{value} IS NOT NULL AND TRY_CAST({value} AS BIGINT) IS NULL", TOO_LARGE)
        ]
    if kind in _EXACT:
        known = f"({value} IS NOT NULL AND NOT isnan({value}))"
        exact = f"({value} = floor({value}) AND abs({value}) <= {_EXACT[kind]})"
        text = f"CASE WHEN {known} AND {exact} THEN CAST(TRY_CAST({value} AS BIGINT) AS VARCHAR) END"
        power = _EXACT[kind].bit_length() - 1
        return text, [(f"{known} AND NOT {exact}", f"is a fraction, or beyond 2^{power} where floats are no exact ids")]
    if kind.startswith("DECIMAL"):
        whole = f"TRY_CAST({value} AS BIGINT)"
        return f"CAST({whole} AS VARCHAR)", [
            (f"{value} <> floor({value})", "is a fraction, which is no id"),
            (f"{value} IS NOT NULL AND {whole} IS NULL", TOO_LARGE),
        ]
    return None


def _text_id(text: str) -> Value:
    """Return SQL of a text as an id. Cheap tests come first, so that regular expressions see little text."""
    # Spark writes doubles from 10^7 on as 1.2345678E7. Without a decimal point it could be a hexadecimal id.
    double = f"TRY_CAST({text} AS DOUBLE)"
    number = f"""CASE
        WHEN ends_with({text}, '0') AND regexp_full_match({text}, '-?(0|[1-9][0-9]*)[.]0+')
            THEN CASE WHEN regexp_full_match({text}, '-0[.]0+') THEN '0' ELSE split_part({text}, '.', 1) END
        WHEN contains({text}, 'E') AND regexp_full_match({text}, '-?[1-9][.][0-9]+E[0-9]+')
             AND {double} = floor({double})
             AND abs({double}) <= {_EXACT["DOUBLE"]} THEN CAST(TRY_CAST({double} AS BIGINT) AS VARCHAR)
        ELSE {text} END"""
    # Digits come before letters, so that two comparisons tell most values from all that have another form.
    plain = f"({text} > 'nan' OR ({text} < 'FALSE' AND {text} <> '')) AND NOT contains({text}, '.')"
    value = f"""CASE WHEN {plain} THEN {text} WHEN {text} IN {MISSING_TEXT} THEN NULL
        WHEN contains({text}, '.') THEN {number}
        WHEN {text} IN ('True', 'TRUE', 'False', 'FALSE') THEN lower({text}) ELSE {text} END"""
    digits = f"strlen({text}) >= 19 AND regexp_full_match({text}, '[+-]?[0-9]+([.]0+)?')"
    return value, [(f"{digits} AND TRY_CAST(split_part({text}, '.', 1) AS BIGINT) IS NULL", TOO_LARGE)]


# -------------------------------------------------------------------------------------------------- numbers


def number_value(value: str, kind: str) -> Value | None:
    """Return SQL of a number as DOUBLE (NULL where it is missing) and its checks; None for a type that is no number."""
    if kind == '"NULL"':
        return "CAST(NULL AS DOUBLE)", []
    if kind == "VARCHAR":
        boolean = f"CASE lower({value}) WHEN 'true' THEN 1 WHEN 'false' THEN 0 END"
        number = f"coalesce(TRY_CAST({value} AS DOUBLE), {boolean})"
    elif kind == "FLOAT" or (kind.startswith("DECIMAL") and _digits(kind) > _EXACT_DIGITS):
        number = f"TRY_CAST(CAST({value} AS VARCHAR) AS DOUBLE)"
    elif kind in (*INTEGERS, *WIDE_INTEGERS, "BOOLEAN", "DOUBLE") or kind.startswith("DECIMAL"):
        number = f"TRY_CAST({value} AS DOUBLE)"
    else:
        return None
    empty = f"{value} <> '' AND " if kind == "VARCHAR" else ""
    return number, [
        (f"{empty}{value} IS NOT NULL AND {number} IS NULL", "is no number"),
        (f"NOT isnan({number}) AND abs({number}) > {FLOAT32_MAX!r}", BEYOND_FLOAT32),
    ]


def _digits(decimal: str) -> int:
    return int(decimal.removeprefix("DECIMAL(").split(",")[0])


def label_value(value: str, kind: str, threshold: float | None) -> Value | None:
    """Return SQL of a label as FLOAT and its checks; None for a type that is no number."""
    found = number_value(value, kind)
    if found is None:
        return None
    number, checks = found
    checks = [*checks, (f"({number} IS NULL OR isnan({number}))", "is missing")]
    if threshold is None:
        return f"TRY_CAST({number} AS FLOAT)", checks
    reached = f"{value} >= CAST({threshold!r} AS FLOAT)" if kind == "FLOAT" else f"{number} >= {threshold!r}::DOUBLE"
    return f"CAST(CASE WHEN {reached} THEN 1 ELSE 0 END AS FLOAT)", checks


# ---------------------------------------------------------------------------------------------------- times

_CLOCK = ":[0-9]{2}([.][0-9]+)?"
_ZONE = " *(Z|UTC|GMT|[+-][0-9]{2}(:?[0-9]{2})?)"
_LOCAL = "[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([T ][0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?)?"


def time_value(value: str, kind: str, *, as_number: bool) -> tuple[str, str, Checks] | None:
    """Return SQL of a time's whole units and of its fraction in millionths, and the checks; None for another type.

    Dates and timestamps are whole microseconds since 1970 UTC. Numbers keep their unit here: whether all files
    together have fractions decides it. Text is a number where `as_number`, else a date or a timestamp in ISO 8601,
    UTC where it names no offset.
    """
    if kind == '"NULL"':
        return "CAST(NULL AS BIGINT)", "0", [("true", "is missing")]
    missing = (f"{value} IS NULL", "is missing")
    if kind == "VARCHAR":
        missing = (f"({value} IS NULL OR {value} IN {MISSING_TIME})", "is missing")
    if kind in ("FLOAT", "DOUBLE"):
        missing = (f"({value} IS NULL OR isnan({value}))", "is missing")
    if kind in (*INTEGERS, *WIDE_INTEGERS):
        whole, fraction, what = f"TRY_CAST({value} AS BIGINT)", "0", "a time within int64"
    elif (kind == "VARCHAR" and as_number) or kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        # By the text, so that a DOUBLE, a DECIMAL and the CSV that holds either are one time.
        text = value if kind == "VARCHAR" or kind.startswith("DECIMAL") else f"CAST({value} AS VARCHAR)"
        number = f"TRY_CAST({text} AS DECIMAL(38, 6))"
        whole = f"TRY_CAST(floor({number}) AS BIGINT)"
        fraction = f"CAST(({number} - floor({number})) * 1000000 AS INTEGER)"
        what = "a time within int64"
        if kind == "VARCHAR":  # nearly all are plain digits, for which DECIMAL would take longer than all the rest
            plain = f"NOT (contains({value}, '.') OR contains({value}, 'e'))"
            whole = f"CASE WHEN {plain} THEN TRY_CAST({value} AS BIGINT) ELSE {whole} END"
            fraction = f"CASE WHEN {plain} THEN 0 ELSE {fraction} END"
            what = "a number like the first time of the file"
    elif kind == "VARCHAR":
        whole, fraction = _text_microseconds(value), "0"
        what = "a date or time in ISO 8601 (a zone is Z or an offset such as +0200)"
    elif kind.startswith(("TIMESTAMP", "DATE")):
        whole, fraction, what = _microseconds(value, kind), "0", "a time within int64"
    else:
        return None
    return whole, fraction, [missing, (f"({whole}) IS NULL", f"is not {what}")]


def _microseconds(value: str, kind: str) -> str:
    """Return SQL of microseconds since 1970 UTC of a DATE or of a timestamp of any unit, with a zone or without."""
    if kind in ("TIMESTAMP_NS", "TIMESTAMPTZ_NS"):  # casts round; the text of a timestamp is cut, in every reader
        nanoseconds = f"epoch_ns({value})"
        return f"(({nanoseconds} - (({nanoseconds} % 1000) + 1000) % 1000) // 1000)"
    return f"epoch_us({value})"


def _text_microseconds(text: str) -> str:
    """Return SQL of microseconds since 1970 UTC of ISO text. DuckDB's cast ignores offsets and names of zones."""
    zone = f"regexp_extract({text}, '{_CLOCK}{_ZONE}$', 2)"
    local = f"CASE WHEN {zone} = '' THEN {text} ELSE rtrim(left({text}, length({text}) - length({zone}))) END"
    digits = f"replace({zone}, ':', '')"
    minutes = f"(TRY_CAST(substr({digits}, 2, 2) AS INTEGER) * 60 + TRY_CAST('0' || substr({digits}, 4, 2) AS INTEGER))"
    offset = f"""CASE left({zone}, 1) WHEN '+' THEN {minutes} WHEN '-' THEN -{minutes} ELSE 0 END"""
    micros = f"epoch_us(TRY_CAST(({local}) AS TIMESTAMP)) - CAST({offset} AS BIGINT) * 60000000"
    return f"CASE WHEN regexp_full_match({local}, '{_LOCAL}') THEN {micros} END"
