"""What a reader of results wants to know of events before: is the order time's, do targets leak, how much is cold."""

from __future__ import annotations

from typing import Any

from gmeta.data.events.findings import LONG
from gmeta.data.sources import Connection, scalar


def audit_events(con: Connection, *, has_time: bool, has_text: bool) -> dict[str, Any]:
    """Return the counts of an audit of tables `placed`, `task_rows`, `catalogue` and `texts`; of a later day's events,
    what earlier days know of items and users is in `known_items` and `known_users`.

    `targets`, `cold_targets` and others have a number for each split and domain ('' where there are no domains).
    """
    per_split = "GROUP BY partition ORDER BY partition"
    found: dict[str, Any] = {
        "users": scalar(con, 'SELECT count(DISTINCT "user") FROM placed'),
        "items": scalar(con, "SELECT count(DISTINCT item) FROM placed"),
        "events": scalar(con, "SELECT count(*) FROM placed"),
        "catalogue": scalar(con, "SELECT count(*) FROM catalogue"),
        "users_of_one_event": scalar(
            con, 'SELECT count(*) FROM (SELECT 1 FROM placed GROUP BY "user" HAVING count(*) = 1)'
        ),
        "users_by_domains": _counts(
            con,
            """SELECT n, count(*) FROM (SELECT count(DISTINCT domain) AS n FROM placed GROUP BY "user")
               GROUP BY n ORDER BY n""",
        ),
        "repeated_events": scalar(
            con, 'SELECT coalesce(sum(n - 1), 0)::BIGINT FROM (SELECT count(*) AS n FROM placed GROUP BY "user", item)'
        ),
        "targets": _by_domain(con, "true"),
        "cold_targets": _by_domain(
            con,
            """item NOT IN (SELECT item FROM placed WHERE partition = 'train'
                            UNION ALL SELECT item FROM known_items WHERE count > 0)""",
        ),
        "targets_in_history": _counts(
            con,
            f"""SELECT partition, count(*) FROM (
                    SELECT partition FROM task_rows WHERE partition <> 'train' GROUP BY key, partition, item
                    HAVING bool_or(is_query) AND NOT bool_and(is_query)) {per_split}""",
        ),
        "targets_in_user_id": _counts(
            con, f"""SELECT partition, count(*) FROM placed WHERE contains("user", item) {per_split}"""
        ),
        "targets_of_new_users": _counts(
            con,
            f"""SELECT partition, count(*) FROM placed WHERE partition <> 'train' AND "user" NOT IN
                (SELECT "user" FROM placed WHERE partition = 'train' UNION ALL FROM known_users) {per_split}""",
        ),
    }
    sorted_by_item = _sorted_by_item(con, one_time=has_time)
    if sorted_by_item or not has_time:
        found["sorted_at_one_time" if has_time else "sorted_by_item"] = sorted_by_item
    if has_text:
        found["events_without_text"] = scalar(
            con, "SELECT count(*) FROM placed p JOIN catalogue c USING (item) WHERE c.title IS NULL"
        )
        found["items_of_several_texts"] = scalar(
            con,
            """SELECT count(*) FROM (SELECT item FROM texts SEMI JOIN catalogue USING (item)
                                     WHERE place >= 0 GROUP BY item HAVING count(DISTINCT text) > 1)""",
        )
    return found


def _counts(con: Connection, query: str) -> dict[str, int]:
    return {str(key): count for key, count in con.execute(query).fetchall()}


def _by_domain(con: Connection, condition: str) -> dict[str, dict[str, int]]:
    """Return split -> domain -> targets that fulfil a condition."""
    found: dict[str, dict[str, int]] = {}
    query = f"""SELECT partition, domain, count(*) FILTER ({condition}) FROM placed WHERE partition <> 'train'
                GROUP BY ALL ORDER BY ALL"""
    for partition, domain, count in con.execute(query).fetchall():
        found.setdefault(partition, {})[domain] = count
    return found


def _sorted_by_item(con: Connection, *, one_time: bool) -> dict[str, list[int]]:
    """Return domain -> the sequences that ascend by item id, as text or as number, and all, of those that are long;
    with `one_time` of those alone whose events all have the same time, so that nothing tells their order.
    """
    tied = "AND count(DISTINCT time) = 1" if one_time else ""
    before = 'OVER (PARTITION BY "user", domain ORDER BY position)'
    found = con.execute(f"""
        SELECT domain, count(*) FILTER (by_text OR by_number), count(*) FROM (
            SELECT domain, bool_and(coalesce(item >= text_before, true)) AS by_text,
                   bool_and(number IS NOT NULL AND coalesce(number >= number_before, true)) AS by_number
            FROM (SELECT *, lag(item) {before} AS text_before, lag(number) {before} AS number_before
                  FROM (SELECT *, TRY_CAST(item AS HUGEINT) AS number FROM placed))
            GROUP BY "user", domain HAVING count(*) >= {LONG} {tied})
        GROUP BY domain ORDER BY domain""")
    return {domain: [ascending, sequences] for domain, ascending, sequences in found.fetchall()}
