"""Stage 2 of events: users and items with too few events are left out, over all domains together, until none is."""

from __future__ import annotations

from typing import Any

from gmeta.data.sources import Connection, scalar


def keep_core(con: Connection, core: int) -> dict[str, Any]:
    """Leave the events of users and items with fewer than `core` events out of table `events`; return how many.

    A user's events of all domains count together. What is left is the largest part in which all have so many.
    """
    before = _sizes(con)
    while core > 1:
        ((removed,),) = con.execute(f"""
            DELETE FROM events
            WHERE "user" IN (SELECT "user" FROM events GROUP BY "user" HAVING count(*) < {core})
               OR item IN (SELECT item FROM events GROUP BY item HAVING count(*) < {core})""").fetchall()
        if not removed:
            break
    after = _sizes(con)
    if not after["events"]:
        raise ValueError(f"core is {core}: no user and item of {before['events']:,} events has so many; lower it")
    return {key: before[key] - after[key] for key in before}


def _sizes(con: Connection) -> dict[str, int]:
    query = 'SELECT struct_pack(users := count(DISTINCT "user"), items := count(DISTINCT item), events := count(*))'
    found: dict[str, int] = scalar(con, f"{query} FROM events")
    return found
