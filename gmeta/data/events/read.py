"""Stage 1 of events: files, or a named data set, to tables `events` and `items`, every value in its one form.

`events` (user, item, domain, time, file, row) has a row an event; domain is '' and time 0 where there are none. An id
that is in several domains means another item in each, and gets its domain in front. `texts`
(item, text, place, count) has the texts of items: `place` is -1 for those that earlier days gave them, 0 for those of
the items file, 1 for those of events. An item of earlier days has the name, the domain and the text that it had there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.core.errors import nearest
from gmeta.data.events.columns import EventColumns
from gmeta.data.events.data_sets import EVENT_SETS, chosen_domains, require_files
from gmeta.data.prepare.columns import unfit
from gmeta.data.prepare.read import check_all
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report
from gmeta.data.prepare.values import id_value
from gmeta.data.schema import DataSchema, parse_data_schema
from gmeta.data.sources import (
    Connection,
    RawPart,
    find_files,
    identifier,
    literal,
    open_file,
    open_files,
    reading,
    scalar,
)

_OWN_ITEM = """CASE WHEN concat(domain, '|', item) IN (SELECT item FROM known_items) THEN concat(domain, '|', item)
                    WHEN item IN (FROM ambiguous) AND (item, domain) NOT IN (SELECT (item, domain) FROM known_items)
                    THEN concat(domain, '|', item) ELSE item END"""
_ONE = "__one"
"""Column of the label, which is 1 for every event."""


@dataclass(frozen=True)
class EventSource:
    """Where events come from, and what is in it."""

    columns: EventColumns
    parts: list[RawPart]
    items: RawPart | None
    whole_catalogue: bool  # the items are the catalogue, not only those among them that events have
    has_targets: bool = False
    note: str = ""  # what the summary says of them
    num_empty: int = 0  # files without a byte
    goes_on: bool = False  # earlier days know items, with their domains and texts


def open_events(con: Connection, config: PrepareConfig, columns: EventColumns) -> EventSource:
    """Open the events that a config names. ValueError for files that are missing or cannot be read."""
    if config.dataset is not None:
        data = EVENT_SETS[config.dataset]
        root = require_files(data, config.dataset, config.root)
        parts, items = data.open(con, root, chosen_domains(config.kept_domains, data.domains))
        given = data.has_targets
        return EventSource(columns, parts, items, whole_catalogue=given, has_targets=given, note=data.note)
    opened, empty = open_files(con, find_files(config.inputs))
    item_part = None if config.items is None else open_file(con, only_items_file(config.items))
    goes_on = config.base is not None
    return EventSource(columns, opened, item_part, whole_catalogue=True, num_empty=len(empty), goes_on=goes_on)


def only_items_file(path: str) -> Path:
    """Return the file of items. ValueError where it does not exist."""
    files = find_files([path])
    if len(files) != 1:
        raise ValueError(f"items is {path}, which is {len(files)} files: name one")
    return files[0]


def read_items(con: Connection, source: EventSource) -> None:
    """Make table `items` (item, domain, text) of the items file, empty where there is none.

    ValueError for a column that is missing or unfit, a missing item, and an item of two domains.
    """
    names = {key: getattr(source.columns, key) for key in ("item", "domain", "text")}
    if source.items is None:
        con.execute("CREATE TABLE items (item VARCHAR, domain VARCHAR, text VARCHAR)")
        return
    part = source.items
    found = {}
    for key, column in names.items():
        here = column is not None and column in part.columns
        in_events = key != "item" and column is not None and any(column in p.columns for p in source.parts)
        if column is not None and not here and not (key == "text" and in_events):
            raise ValueError(f"{part.file} has no column {column!r}: {nearest(column, part.columns)}")
        found[key] = _checked_value(con, part, column, missing=key == "text") if here else "NULL"
    selected = ", ".join(f"CAST({value} AS VARCHAR) AS {key}" for key, value in found.items())
    with reading(part.file):
        con.execute(f"CREATE TABLE items AS SELECT {selected} FROM ({part.query})")
    _refuse_broken_lines(con, part.file)


def _refuse_broken_lines(con: Connection, file: str) -> None:
    """Raise ValueError for a line of a CSV file of items that DuckDB could not read."""
    if not scalar(con, "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"):
        return
    found = con.execute("SELECT line, error_message FROM reject_errors ORDER BY line LIMIT 1").fetchone()
    con.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    if found is not None:
        raise ValueError(f"{file}, line {found[0]} is no valid CSV line ({found[1]}): mend it")


def _checked_value(con: Connection, part: RawPart, column: str, *, missing: bool) -> str:
    """Return SQL of the values of a column of items as ids. ValueError for values that are none."""
    value = id_value(identifier(column), part.columns[column], "VARCHAR")
    if value is None:
        raise unfit(part, column, "items", "it needs one text or whole number a row")
    text, checks = value
    for condition, reason in [*checks, *([] if missing else [(f"({text}) IS NULL", "is missing")])]:
        if rows := scalar(con, f"SELECT count(*) FROM ({part.query}) WHERE {condition}"):
            raise ValueError(f"{part.file}: column {column!r} {reason} in {rows:,} rows: mend them or leave them out")
    return text


def read_events(
    con: Connection, config: PrepareConfig, settings: Settings, source: EventSource, scratch: Path, tell: Report
) -> dict[str, Any]:
    """Make tables `events` and `texts`, after `items`; returns the counts of the rows that were read."""
    columns = source.columns
    refuse_text_times(source.parts, columns.time)
    schema, of_items = _reading(source)
    parts = [replace(p, query=f"SELECT *, 1 AS {identifier(_ONE)} FROM ({p.query})") for p in source.parts]
    parts = [replace(part, columns={**part.columns, _ONE: "INTEGER"}) for part in parts]
    plain = replace(settings, task_split="user", split_query="last", roles=None)
    counts = check_all(con, config, schema, plain, scratch, tell, parts)
    counts |= {"empty_files": source.num_empty} if source.num_empty else {}
    index = {feature.name: f"CAST(f{i} AS VARCHAR)" for i, feature in enumerate(schema.features)}
    domain = "''" if columns.domain is None else index.get(columns.domain, "i.domain")
    every = "(SELECT item, domain FROM items UNION ALL SELECT item, domain FROM known_items)"
    of_item = f"(SELECT item, min(domain) AS domain FROM {every} GROUP BY item)"
    join = f"LEFT JOIN {of_item} i ON i.item = CAST(f0 AS VARCHAR)" if of_items else ""
    con.execute(f"""
        CREATE VIEW named AS
        SELECT CAST(task AS VARCHAR) AS "user", CAST(f0 AS VARCHAR) AS item, {domain} AS domain,
               {index.get(columns.text, "NULL") if columns.text else "NULL"} AS text,
               {"0" if columns.time is None else "time"} AS time, r.file, r.row FROM raw_rows r {join}""")
    _part_items(con, columns, every, of_items=of_items)
    con.execute(f"""
        CREATE TABLE events AS SELECT "user", {_OWN_ITEM} AS item, domain, time, file, row FROM named;
        UPDATE items SET item = {_OWN_ITEM};
        CREATE TABLE texts AS
        SELECT item, text, 0 AS place, count(*) AS count FROM items WHERE text IS NOT NULL GROUP BY item, text
        UNION ALL SELECT {_OWN_ITEM} AS item, text, 1, count(*) FROM named WHERE text IS NOT NULL GROUP BY ALL
        UNION ALL SELECT item, title, -1, 1 FROM known_items WHERE title IS NOT NULL""")
    return counts | {"items_of_several_domains": scalar(con, "SELECT count(*) FROM ambiguous")}


def _reading(source: EventSource) -> tuple[DataSchema, bool]:
    """Return the schema that raw events are checked by, and whether their domain is that of their item."""
    columns, there = source.columns, {name for part in source.parts for name in part.columns}
    elsewhere: set[str | None] = set()
    elsewhere |= set() if source.items is None else set(source.items.columns) - there
    elsewhere |= {columns.domain, columns.text} - there if source.goes_on else set()
    features: list[Any] = [columns.item]
    features += [columns.domain] if columns.domain is not None and columns.domain not in elsewhere else []
    if columns.text is not None and columns.text not in elsewhere:
        features.append({"name": columns.text, "text": True, "nulls": "oov"})
    entry = {"task": columns.user, "label": _ONE, "categorical": features}
    entry |= {} if columns.time is None else {"time": columns.time}
    return parse_data_schema(entry), columns.domain is not None and columns.domain in elsewhere


def refuse_text_times(parts: Sequence[RawPart], time: str | None) -> None:
    """Raise ValueError for a Parquet file whose times are texts: sorted as texts, 1000 comes before 999."""
    for part in parts:
        if time is not None and not part.ordered and part.columns.get(time) == "VARCHAR":
            raise ValueError(
                f"{part.file}: the time column {time!r} holds texts: write it as whole numbers or as "
                "timestamps, since texts have another order than the times that they name"
            )


def _part_items(con: Connection, columns: EventColumns, every: str, *, of_items: bool) -> None:
    """Make table `ambiguous` (item) of the items of several domains: each is an item of its own in each of them.
    `every` is SQL of the items and domains that are told of beside events.

    ValueError where the domain of an event is that of its item, and is missing or is several, and where a new id is
    taken already.
    """
    if of_items:
        found = con.execute(f"""
            SELECT item, 'no domain' FROM named WHERE domain IS NULL
            UNION ALL SELECT item, 'several domains' FROM {every} GROUP BY item HAVING count(DISTINCT domain) > 1
            ORDER BY ALL LIMIT 1""").fetchone()
        if found is not None:
            raise ValueError(f"item {found[0]!r} has {found[1]} in column {columns.domain!r} of the items: give it one")
    con.execute(f"""
        CREATE TABLE ambiguous AS SELECT item FROM (SELECT DISTINCT item, domain FROM named
                                                    UNION SELECT item, coalesce(domain, '') FROM {every})
        GROUP BY item HAVING count(*) > 1""")
    taken = con.execute(f"""
        SELECT item FROM (SELECT item, {_OWN_ITEM} AS own FROM named)
        WHERE item = own AND item IN (SELECT {_OWN_ITEM} FROM named WHERE item <> {_OWN_ITEM})
        ORDER BY item LIMIT 1""").fetchone()
    if taken is not None:
        raise ValueError(f"item {taken[0]!r} is named like another one with its domain before it: rename it")


def keep_domains(con: Connection, asked: Sequence[str], *, goes_on: bool) -> None:
    """Remove the events and items of domains that are not asked for. ValueError for one that no event has, unless
    earlier days asked for it.
    """
    known = [domain for (domain,) in con.execute("SELECT DISTINCT domain FROM events ORDER BY domain").fetchall()]
    kept = ", ".join(literal(domain) for domain in (asked if goes_on else chosen_domains(asked, known)))
    con.execute(f"DELETE FROM events WHERE domain NOT IN ({kept}); DELETE FROM items WHERE domain NOT IN ({kept})")
