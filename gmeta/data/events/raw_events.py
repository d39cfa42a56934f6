"""Events of users that a trained model is asked about, in raw values: checked as `prepare` checks events, and read some
users at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gmeta.data.events.columns import EventColumns
from gmeta.data.events.read import refuse_text_times
from gmeta.data.prepare.check import check, create_checked, describe_rejects, reject_counts
from gmeta.data.prepare.times import common_time
from gmeta.data.schema import Role, parse_data_schema
from gmeta.data.sources import Connection, RawPart, in_order, open_file, reading, scalar

_USERS, _EVENTS = 4096, 1 << 18
"""So many users, with so many events, are read at a time; a user's events are never parted."""
_FILE = 1 << 40
"""Rows of a file, at most."""


@dataclass(frozen=True)
class RawEvents:
    """All events of some users, one user behind the other; those of a user as they were given."""

    users: list[str]  # [U]
    user: NDArray[np.int64]  # [N], position in `users`, ascending
    item: list[str]  # [N]
    domain: list[str | None]  # [N]
    text: list[str | None]  # [N]
    time: NDArray[np.int64] | None = None  # [N]; None: a user's events have no time, their order in a domain counts


@dataclass(frozen=True)
class RawItems:
    """Items that are told of beside events."""

    item: list[str]
    domain: list[str | None]
    text: list[str | None]


class EventReader:
    """Reads the events of `parts`, in tables of the database `con`.

    With `users` there are these alone, each once, events or not. Users come in the order in which events first name
    them, those without an event at the end. ValueError for missing columns, and for rows that cannot be used.
    """

    def __init__(
        self, con: Connection, parts: Sequence[RawPart], columns: EventColumns, users: Sequence[str] | None = None
    ) -> None:
        self._con, self._has_time = con, columns.time is not None
        refuse_text_times(parts, columns.time)
        there = {name for part in parts for name in part.columns}
        given = [columns.item, *(name for name in (columns.domain, columns.text) if name is not None and name in there)]
        features = [_feature(name, columns, text_nulls="oov") for name in given]
        rows = _checked(con, parts, {"task": columns.user, "categorical": features, "time": columns.time})
        place = {name: f"f{number}" for number, name in enumerate(given)}
        domain, text = (place.get(name or "", "NULL") for name in (columns.domain, columns.text))
        con.execute(f"""
            CREATE TEMP TABLE read AS SELECT task AS "user", f0 AS item, CAST({domain} AS VARCHAR) AS domain,
                   CAST({text} AS VARCHAR) AS text, time, file * {_FILE}::BIGINT + row AS place FROM ({rows})""")
        if not scalar(con, "SELECT count(*) FROM read"):
            raise ValueError(f"{', '.join(part.file for part in parts)}: there are no events, so that nothing follows")
        wanted = 'SELECT DISTINCT "user" FROM read'
        if users is not None:
            con.register("wanted", pa.table({"user": pa.array(dict.fromkeys(users), pa.string())}))
            wanted = 'SELECT "user" FROM wanted'
        with in_order(con):
            con.execute(f"""
                CREATE TEMP TABLE users AS
                SELECT row_number() OVER (ORDER BY first NULLS LAST, "user") - 1 AS number, "user", num
                FROM ({wanted}) LEFT JOIN (SELECT "user", min(place) AS first, count(*) AS num FROM read GROUP BY ALL)
                USING ("user") ORDER BY number;
                CREATE TEMP TABLE events AS SELECT number, read.* EXCLUDE ("user") FROM read JOIN users USING ("user")
                ORDER BY number, place;
                DROP TABLE read""")
        found = con.execute("SELECT coalesce(num, 0) AS num FROM users ORDER BY number").fetchnumpy()["num"]
        self._ends = np.cumsum(found.astype(np.int64))

    @property
    def num_users(self) -> int:
        """Return how many users there are."""
        return len(self._ends)

    def chunks(self) -> Iterator[RawEvents]:
        """Yield the events of all users, some users at a time."""
        begin = 0
        while begin < len(self._ends):
            before = self._ends[begin - 1] if begin else 0
            end = int(np.searchsorted(self._ends, before + _EVENTS, side="right"))
            end = min(max(end, begin + 1), begin + _USERS)
            yield self._read(begin, end)
            begin = end

    def _read(self, begin: int, end: int) -> RawEvents:
        some = f"number >= {begin} AND number < {end}"
        users = self._con.execute(f'SELECT "user" FROM users WHERE {some} ORDER BY number').fetchall()
        rows = self._con.sql(f"SELECT * FROM events WHERE {some} ORDER BY number, place").to_arrow_table()
        item, domain, text = (rows[name].to_pylist() for name in ("item", "domain", "text"))
        time = rows["time"].to_numpy().astype(np.int64) if self._has_time else None
        return RawEvents([name for (name,) in users], rows["number"].to_numpy() - begin, item, domain, text, time)


def read_raw_items(con: Connection, part: RawPart, columns: EventColumns) -> RawItems:
    """Read items with their domains and texts, where events have these. ValueError as for events, and for an item
    without a text.
    """
    owned = [name for name in (columns.domain, columns.text) if name is not None]
    features = [_feature(name, columns, text_nulls="error") for name in owned]
    rows = _checked(con, [part], {"task": columns.item, "categorical": features or [columns.item], "time": None})
    place = {name: f"f{number}" for number, name in enumerate(owned)}
    domain, text = (place.get(name or "", "NULL") for name in (columns.domain, columns.text))
    found = con.execute(f"""
        SELECT task, CAST({domain} AS VARCHAR), CAST({text} AS VARCHAR) FROM ({rows}) ORDER BY row""").fetchall()
    return RawItems(*([row[place] for row in found] for place in range(3)))


def read_raw_users(con: Connection, file: Path, columns: EventColumns) -> list[str]:
    """Read the users that a file names in the column of users of events. ValueError as for events."""
    rows = _checked(con, [open_file(con, file)], {"task": columns.user, "categorical": [columns.user], "time": None})
    return [user for (user,) in con.execute(f"SELECT task FROM ({rows}) ORDER BY row").fetchall()]


def _feature(name: str, columns: EventColumns, *, text_nulls: str) -> Any:
    return {"name": name, "text": True, "nulls": text_nulls} if name == columns.text else name


def _checked(con: Connection, parts: Sequence[RawPart], schema: dict[str, Any]) -> str:
    """Return SQL of the checked rows of all parts, by the entries of a data schema. ValueError for rows that cannot be
    used, with file, row, column and value.
    """
    entries = {key: value for key, value in schema.items() if value is not None}
    parsed = parse_data_schema({**entries, "label": "__one"})  # events have no label, and schemas must have one
    con.execute("DROP TABLE IF EXISTS checked; DROP TABLE IF EXISTS rejects")
    create_checked(con, parsed, {})
    roles: list[Role] = ["task", "time"] if parsed.time is not None else ["task"]
    relations = []
    for number, part in enumerate(parts):
        with reading(part.file):
            relations.append(check(con, part, number, parsed, roles, {}))
    if counts := reject_counts(con):
        told = describe_rejects(con, [part.file for part in parts])
        raise ValueError(f"{sum(counts.values())} rows cannot be used:\n{told}\nMend them, or leave them out")
    time = common_time(con, parts, parsed.time)
    union = " UNION ALL ".join(dict.fromkeys(relations))
    return f"SELECT * EXCLUDE (time_fraction) REPLACE ({time} AS time) FROM ({union})"
