"""Events from day to day: what earlier days hand on to a later one, and what is held out of that day.

    increment/events.parquet    user, item, time, place: the last events of every user, `place` 0 being the oldest

Users are dealt to splits by the hash that deals the tasks of every later day (`drawn_split`), and stay where they are.
The day's events of training users are targets of training, those of the others are targets of valid or test. The
history of each is all that its user did before, on this day and on earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gmeta.data.catalogue import catalogue_file
from gmeta.data.events.hold_out import make_task_rows
from gmeta.data.identity import vocabulary_file
from gmeta.data.prepare.history import write_ordered
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.tasks import drawn_split
from gmeta.data.prepare.vocabulary import files_of_values
from gmeta.data.schema import PackSchema
from gmeta.data.sources import Connection, only_file, scalar

EVENTS = "events.parquet"
"""File in `increment/` of a pack of events with times: what a later day needs of them."""
_HELD_OUT = 0.1
"""Share of the users whose events of a day are targets of valid; as many are those of test."""


@dataclass(frozen=True)
class EarlierEvents:
    """What a base of events hands on."""

    schema: PackSchema
    vocabularies: Path
    events: Path
    rows: int  # of a user, at most
    domains: Sequence[str]  # that are kept, all where empty

    def last_time(self, con: Connection) -> int | None:
        """Return the time of the last event."""
        found: int | None = scalar(con, f"SELECT max(time) FROM read_parquet({only_file(self.events)})")
        return found


def know_earlier(con: Connection, earlier: EarlierEvents | None) -> None:
    """Make tables `known_items` (item, domain, title, count), `known_users` and `older` (user, item, domain, time,
    place), the last events of these. All are empty where there is no base.
    """
    con.execute("""
        CREATE TABLE known_items (item VARCHAR, domain VARCHAR, title VARCHAR, count BIGINT);
        CREATE TABLE known_users ("user" VARCHAR);
        CREATE TABLE older ("user" VARCHAR, item VARCHAR, domain VARCHAR, time BIGINT, place BIGINT)""")
    if earlier is None:
        return
    owned, joins = {"domain": "''", "title": "NULL"}, ""
    for name in earlier.schema.catalogue:
        table = earlier.schema.feature(name).table
        found = files_of_values(earlier.vocabularies, table)
        files = ", ".join(map(only_file, found if name == "title" else [vocabulary_file(earlier.vocabularies, table)]))
        joins += f" LEFT JOIN read_parquet([{files}], union_by_name=true) {name} ON {name}.id = c.{name}"
        owned[name] = f"CAST({name}.value AS VARCHAR)"
    events = f"read_parquet({only_file(earlier.events)})"
    con.execute(f"""
        INSERT INTO known_items SELECT c.item, {owned["domain"]}, {owned["title"]}, c.count
        FROM read_parquet({only_file(catalogue_file(earlier.vocabularies))}) c{joins};
        INSERT INTO known_users SELECT DISTINCT "user" FROM {events};
        INSERT INTO older SELECT e."user", e.item, k.domain, e.time, e.place
        FROM {events} e JOIN known_items k USING (item)
        QUALIFY row_number() OVER (PARTITION BY e."user" ORDER BY e.place DESC) <= {earlier.rows}""")


def hold_out_of_day(con: Connection, settings: Settings) -> None:
    """Make tables `placed` and `task_rows` of tables `events`, of the day alone, and `older`.

    A training event that is earlier than one of an earlier day is history, and no target: the state after what came
    later must not find it. A user who has no other event has no task.
    """
    split = drawn_split(replace(settings, valid_fraction=_HELD_OUT, test_fraction=_HELD_OUT), '"user"')
    con.execute(f"""
        CREATE TABLE sequence AS
        SELECT *, {split} AS partition, row_number() OVER (PARTITION BY "user" ORDER BY time, is_new,
                  CASE WHEN is_new THEN domain END, file, row) - 1 AS position
        FROM (SELECT "user", item, domain, time, 0 AS file, place AS row, false AS is_new
              FROM older SEMI JOIN events USING ("user")
              UNION ALL SELECT "user", item, domain, time, file, row, true FROM events);
        CREATE TABLE placed AS SELECT * EXCLUDE (is_new) FROM sequence WHERE is_new""")
    last = 'coalesce(max(position) FILTER (NOT is_new) OVER (PARTITION BY "user"), -1)'
    train = f"""
        SELECT *, "user" AS key FROM (SELECT *, is_new AND position > {last} AS is_query FROM sequence
                                      WHERE partition = 'train')
        QUALIFY bool_or(is_query) OVER (PARTITION BY "user")"""
    make_task_rows(con, train, "sequence", numbered=True, has_time=True)


def write_last_events(con: Connection, path: Path, rows: int, *, later: bool) -> None:
    """Write the last events of every user, `rows` at most, for days to come; of a `later` day those of users that it
    does not have too.
    """
    every = 'SELECT "user", item, time, position FROM placed'
    if later:
        every = """SELECT "user", item, time, position FROM sequence
                   UNION ALL SELECT "user", item, time, place FROM older ANTI JOIN events USING ("user")"""
    place = 'row_number() OVER (PARTITION BY "user" ORDER BY position)'
    write_ordered(
        con,
        f"""SELECT "user", item, CAST(time AS BIGINT) AS time, CAST({place} - 1 AS INTEGER) AS place
            FROM (SELECT * FROM ({every})
                  QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY position DESC) <= {rows})
            ORDER BY "user", place""",
        path,
    )
