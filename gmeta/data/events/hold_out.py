"""Stages 3 and 4 of events: which are held out as targets, and the order of each user's events over all domains.

They leave tables `placed` (the columns of `events`, partition and position) and `task_rows` (user, key, partition,
item, position, time, is_query): the rows of every task. A user's training events are a task of split train. Each target
is one of split valid or test, whose support are the events that may be known before it: training events of the user,
and later ones of the target's own domain; where a time parts the splits, all events. With times only those before the
target are known. Positions are places in the user's interleaved sequence, from 0. Without times nothing says which of a
user's domains came last, so that a target follows the events of its own domain, and these those of others.
"""

from __future__ import annotations

from gmeta.data.prepare.times import from_microseconds, time_unit
from gmeta.data.sources import Connection, literal, scalar

LEAVE_ONE_OUT = "leave_one_out"
LEAVE_LAST_OUT = "leave_last_out"
BY_PLACE = (LEAVE_ONE_OUT, LEAVE_LAST_OUT)
"""What is held out by an event's place among those of its user and domain, and by no time."""


def hold_out(con: Connection, holdout: str, *, has_time: bool) -> None:
    """Make tables `placed` and `task_rows` of table `events`. ValueError for a `holdout` that is none."""
    if not scalar(con, 'SELECT count(*) > count(DISTINCT "user") FROM events'):
        raise ValueError("every user has one event, which nothing follows: is the column user in events.yaml the user?")
    if holdout in BY_PLACE:
        _part_by_place(con, has_time=has_time, has_valid=holdout == LEAVE_ONE_OUT)
    else:
        _part_by_time(con, holdout, has_time=has_time)
    train = """SELECT *, "user" AS key, position = max(position) OVER (PARTITION BY "user") AS is_query
               FROM placed WHERE partition = 'train'"""
    make_task_rows(con, train, "placed", numbered=holdout not in BY_PLACE, has_time=has_time)


def make_task_rows(con: Connection, train: str, sequence: str, *, numbered: bool, has_time: bool) -> None:
    """Make table `task_rows`: the rows that `train` selects, and a task for each target among the `placed` events.

    Targets that are `numbered` have all earlier events of a `sequence` as their history; without, training events and
    those of their own domain. Without times events of the target's domain come behind those of others.
    """
    known, number = "(e.partition = 'train' OR e.domain = t.domain)", "''"
    if numbered:
        in_order = 'PARTITION BY "user", domain, partition ORDER BY position'
        known, number = "true", f"concat('#', row_number() OVER ({in_order}))"
    every = "(SELECT domain FROM placed UNION ALL SELECT domain FROM known_items)"
    several = scalar(con, f"SELECT count(DISTINCT domain) > 1 FROM {every}")
    key = """concat("user", '|', domain)""" if several else '"user"'
    con.execute(f"""
        CREATE TABLE targets AS SELECT *, concat({key}, {number}) AS key FROM placed WHERE partition <> 'train'""")
    _require_own_keys(con)
    columns = '"user", key, partition, item, position, time, is_query'
    behind = 0 if has_time or not several else scalar(con, "SELECT max(position) + 1 FROM placed")
    own = f"if(e.domain = t.domain, {behind}, 0)"
    con.execute(f"""
        CREATE TABLE task_rows AS
        SELECT {columns} FROM ({train})
        UNION ALL SELECT "user", key, partition, item, position + {behind}, time + {behind}, true FROM targets
        UNION ALL SELECT t."user", t.key, t.partition, e.item, e.position + {own}, e.time + {own}, false
                  FROM targets t JOIN {sequence} e ON e."user" = t."user" AND e.position < t.position AND {known}""")


def _part_by_place(con: Connection, *, has_time: bool, has_valid: bool) -> None:
    """Hold out the last event of each user and domain as test, and the one before as valid if there is to be one."""
    held_out = 2 if has_valid else 1
    own = "time, file, row" if has_time else "file, row"
    ranked = f"""
        SELECT *, row_number() OVER (PARTITION BY "user", domain ORDER BY {own}) - 1 AS place,
               count(*) OVER (PARTITION BY "user", domain) AS num_events FROM events"""
    parted = f"""
        SELECT *, CASE WHEN num_events < 3 OR place < num_events - {held_out} THEN 'train'
                       WHEN place = num_events - 2 THEN 'valid' ELSE 'test' END AS partition,
               CASE WHEN num_events < 3 THEN num_events ELSE num_events - {held_out} END AS num_train
        FROM ({ranked})"""
    if has_time:
        position = 'row_number() OVER (PARTITION BY "user" ORDER BY time, domain, file, row) - 1'
    else:
        # The middle of the event's share of its domain. Targets follow all training events.
        share = "(place + 0.5::DOUBLE) / num_train"
        train = f"""row_number() OVER (PARTITION BY "user", partition ORDER BY {share}, domain, place) - 1"""
        size = """count(*) FILTER (partition = 'train') OVER (PARTITION BY "user")"""
        position = f"CASE partition WHEN 'train' THEN {train} WHEN 'valid' THEN {size} ELSE {size} + {held_out - 1} END"
    con.execute(f"""
        CREATE TABLE placed AS
        SELECT * EXCLUDE (place, num_events, num_train, time), position,
               {"time" if has_time else "position"} AS time
        FROM (SELECT *, {position} AS position FROM ({parted}))""")


def _part_by_time(con: Connection, holdout: str, *, has_time: bool) -> None:
    """Hold out the events from a time on: the first half of them as valid, the others as test."""
    if not has_time:
        raise ValueError(f"holdout is {holdout!r}, but the events have no time: name its column in events.yaml")
    first = _as_time(con, holdout)
    later = scalar(con, f"SELECT count(*) FROM events WHERE time >= {first}")
    if later < 2 or later == scalar(con, "SELECT count(*) FROM events"):
        ((low, high),) = con.execute("SELECT min(time), max(time) FROM events").fetchall()
        raise ValueError(
            f"holdout is {holdout!r} ({first} in the unit of the time column), from which on there are {later:,} "
            f"events: name a time between the first, {low}, and the last, {high}"
        )
    rank = f"row_number() OVER (PARTITION BY time >= {first} ORDER BY time, file, row)"
    con.execute(f"""
        CREATE TABLE placed AS
        SELECT * EXCLUDE (rank), CASE WHEN time < {first} THEN 'train' WHEN rank * 2 <= {later} THEN 'valid'
                                      ELSE 'test' END AS partition,
               row_number() OVER (PARTITION BY "user" ORDER BY time, domain, file, row) - 1 AS position
        FROM (SELECT *, {rank} AS rank FROM events)""")


def _as_time(con: Connection, text: str) -> int:
    """Return a time, a whole number or a date, in the unit of column `time`. ValueError for a text that is none."""
    query = f"SELECT TRY_CAST({literal(text)} AS BIGINT), epoch_us(TRY_CAST({literal(text)} AS TIMESTAMP)), max(time)"
    ((number, date, last),) = con.execute(f"{query} FROM events").fetchall()
    unit = time_unit(last)
    if number is None and date is not None and unit is not None:
        return from_microseconds(date, unit)
    if number is None:
        raise ValueError(
            f"holdout is {text!r}: must be {', '.join(BY_PLACE)}, or the time from which on events are targets: a "
            "whole number in the unit of the time column, or a date such as 2024-11-03 where that holds dates"
        )
    return int(number)


def _require_own_keys(con: Connection) -> None:
    """Raise ValueError where two targets would be one task."""
    found = con.execute("""
        SELECT key, min("user"), max("user") FROM targets GROUP BY key, partition HAVING count(*) > 1
        ORDER BY key LIMIT 1""").fetchone()
    if found is not None:
        raise ValueError(
            f"users {found[1]!r} and {found[2]!r} would share the task {found[0]!r}: rename them, so that no user's id "
            "holds | or #"
        )
