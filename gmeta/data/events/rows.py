"""Events to the rows of a next-item pack, and its catalogue: stages of a module each, run in a database of their own.

    read      events and items, every value in its one form
    core      users and items with few events are left out, where that is asked for
    hold_out  which events are targets, and the order of a user's events over all domains; of a later day `days`
    catalogue what items are there, of which domain, and their titles
    audit     counts of what may be wrong with the events
    rows      (here) a Parquet file of the rows of every task, in order

All of it is SQL that spills to disk, and every order is total: the rows depend neither on threads nor on memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmeta.config.data import HISTORY_ROWS, PrepareConfig
from gmeta.data.catalogue import read_gap_unit
from gmeta.data.events.audit import audit_events
from gmeta.data.events.catalogue import make_catalogue
from gmeta.data.events.columns import GAP, EventColumns, owned_features
from gmeta.data.events.core import keep_core
from gmeta.data.events.days import EarlierEvents, hold_out_of_day, know_earlier, write_last_events
from gmeta.data.events.gaps import gap_sql, unit_of_events
from gmeta.data.events.hold_out import LEAVE_ONE_OUT, hold_out
from gmeta.data.events.read import EventSource, keep_domains, open_events, read_events, read_items
from gmeta.data.prepare.scratch import connect
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report
from gmeta.data.sources import Connection, RawPart, in_order, literal, only_file, open_file


@dataclass(frozen=True)
class EventRows:
    """The rows that events became, and the items they are of; both are Parquet files."""

    rows: Path
    catalogue: Path  # item, domain, title
    owned: tuple[str, ...]  # features that items own
    counts: dict[str, Any]  # of reading, and `audit`
    last: Path | None  # the last events of every user, for later days; None where events have no times
    times: tuple[int, int]  # of the first event and the last one
    gap_unit: str | None = None  # of the times whose gaps rows have; None: they have none
    max_history: int | None = None  # events of a history, at most; None: nothing bounds it

    def part(self, con: Connection) -> RawPart:
        """Open the rows."""
        return open_file(con, self.rows)

    def values(self) -> dict[str, str]:
        """Return SQL of the values that the catalogue has of each feature."""
        source = f"read_parquet({only_file(self.catalogue)})"
        return {
            name: f"SELECT DISTINCT {name} AS value FROM {source} WHERE {name} IS NOT NULL"
            for name in ("item", *self.owned)
        }


def make_event_rows(
    config: PrepareConfig,
    settings: Settings,
    columns: EventColumns,
    scratch: Path,
    tell: Report,
    earlier: EarlierEvents | None = None,
) -> EventRows:
    """Make the rows and the catalogue of the events that a config names, in `scratch`; of a later day's, with what is
    known from `earlier` ones.

    Raises ValueError for all that is the user's to mend.
    """
    folder, has_time = scratch / "events", columns.time is not None
    folder.mkdir()
    with connect(folder, config) as con:
        tell("reading events", 0, 1)
        source = open_events(con, config, columns)
        know_earlier(con, earlier)
        read_items(con, source)
        if source.has_targets:
            counts, left_out = _take_rows(con, source), {}
        else:
            counts = read_events(con, config, settings, source, scratch, tell)
            del counts["files"]
            asked = config.kept_domains if earlier is None else earlier.domains
            if asked and config.dataset is None:
                keep_domains(con, asked, goes_on=earlier is not None)
            left_out = keep_core(con, config.core or 0)
            tell("holding out", 0, 1)
            if earlier is not None:
                hold_out_of_day(con, settings)
            else:
                hold_out(con, LEAVE_ONE_OUT if config.holdout is None else str(config.holdout), has_time=has_time)
        make_catalogue(con, whole=source.whole_catalogue)
        tell("auditing events", 0, 1)
        found = audit_events(con, has_time=has_time, has_text=columns.text is not None)
        counts |= {"note": source.note} if source.note else {}
        counts["audit"] = {**found, "core": {"core": config.core or 0, "left_out": left_out}}
        last = scratch / "last_events.parquet" if has_time else None
        times = con.execute("SELECT min(time), max(time) FROM placed").fetchall()[0]
        files = scratch / "events.parquet", scratch / "catalogue.parquet"
        unit = _gap_unit(con, config, earlier)
        most = None if settings.max_task_rows is None else settings.max_task_rows - 1
        made = EventRows(*files, owned_features(columns), counts, last, times, unit, most)
        _write(con, made)
        if last is not None:
            rows = HISTORY_ROWS if earlier is None else earlier.rows
            write_last_events(con, last, rows, later=earlier is not None)
    (folder / "rows.duckdb").unlink()
    return made


def _gap_unit(con: Connection, config: PrepareConfig, earlier: EarlierEvents | None) -> str | None:
    """Return the unit of the times whose gaps rows get, that of earlier events on a later day; None for no gaps."""
    if earlier is None:
        return unit_of_events(con) if config.gaps else None
    unit = read_gap_unit(earlier.vocabularies)
    if unit is not None and (found := unit_of_events(con)) != unit:
        raise ValueError(f"times of the new events are in {found}, those of the base in {unit}: write them in {unit}")
    return unit


def _take_rows(con: Connection, source: EventSource) -> dict[str, Any]:
    """Make the tables of `hold_out` and `texts` of a named data set whose targets are given."""
    (part,) = source.parts
    con.execute(f"""
        CREATE TABLE task_rows AS SELECT *, position AS time FROM ({part.query});
        CREATE TABLE placed AS SELECT "user", item, '' AS domain, partition, position, time FROM task_rows
                               WHERE partition = 'train' OR is_query;
        CREATE TABLE texts AS SELECT item, text, 0 AS place, count(*) AS count FROM items WHERE text IS NOT NULL
                              GROUP BY item, text""")
    return {"bad_rows": {}}


def _write(con: Connection, made: EventRows) -> None:
    """Write the files: rows by task, each task in the order of its sequence."""
    beside = "".join(f", c.{name}" for name in made.owned)
    if made.gap_unit is not None:
        before = "lag(r.time) OVER (PARTITION BY r.key, r.partition ORDER BY r.position)"
        beside += f", {gap_sql('r.time', before, made.gap_unit)} AS {GAP}"
    with in_order(con):
        con.execute(f"""
            COPY (SELECT r.key AS "user", r.item{beside}, 1 AS label, r.time, r.partition,
                         CASE WHEN r.is_query THEN 'query' ELSE 'support' END AS role
                  FROM task_rows r JOIN catalogue c USING (item) ORDER BY r.key, r.partition, r.position)
            TO {literal(str(made.rows))} (FORMAT parquet);
            COPY (SELECT * FROM catalogue ORDER BY item) TO {literal(str(made.catalogue))} (FORMAT parquet)""")
