"""What a reader of results wants to know of events before: is the order time's, do targets leak, how much is cold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gmeta.data.sources import Connection, scalar

_LONG = 4
"""Sequences of so many events can tell an order: one in 24 of them is sorted by chance."""
_ENOUGH = 10
"""Fewer long sequences than this tell nothing."""
_NEARLY_ALL = 0.8
_LEAK = 0.01
"""A share of targets above this is told of as a leak, where training events have less than half as much of it."""


def audit_events(con: Connection, *, has_time: bool, has_text: bool) -> dict[str, Any]:
    """Return the counts of an audit of tables `placed`, `task_rows`, `catalogue` and `texts`.

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
        "cold_targets": _by_domain(con, "item NOT IN (SELECT item FROM placed WHERE partition = 'train')"),
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
                (SELECT "user" FROM placed WHERE partition = 'train') {per_split}""",
        ),
    }
    if not has_time:
        found["sorted_by_item"] = _sorted_by_item(con)
    if has_text:
        found["events_without_text"] = scalar(
            con, "SELECT count(*) FROM placed p JOIN catalogue c USING (item) WHERE c.title IS NULL"
        )
        found["items_of_several_texts"] = scalar(
            con,
            """SELECT count(*) FROM (SELECT item FROM texts SEMI JOIN catalogue USING (item)
                                     GROUP BY item HAVING count(DISTINCT text) > 1)""",
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


def _sorted_by_item(con: Connection) -> dict[str, list[int]]:
    """Return domain -> the sequences that ascend by item id, as text or as number, and all, of those that are long."""
    before = 'OVER (PARTITION BY "user", domain ORDER BY position)'
    found = con.execute(f"""
        SELECT domain, count(*) FILTER (by_text OR by_number), count(*) FROM (
            SELECT domain, bool_and(coalesce(item >= text_before, true)) AS by_text,
                   bool_and(number IS NOT NULL AND coalesce(number >= number_before, true)) AS by_number
            FROM (SELECT *, lag(item) {before} AS text_before, lag(number) {before} AS number_before
                  FROM (SELECT *, TRY_CAST(item AS HUGEINT) AS number FROM placed))
            GROUP BY "user", domain HAVING count(*) >= {_LONG})
        GROUP BY domain ORDER BY domain""")
    return {domain: [ascending, sequences] for domain, ascending, sequences in found.fetchall()}


def mend_cold_tasks(counts: dict[str, Any]) -> None:
    """Set the fraction of cold tasks of each split: those of users without a training event, whatever their key is."""
    for split, sizes in counts["splits"].items():
        sizes["cold_tasks"] = round(counts["audit"]["targets_of_new_users"].get(split, 0) / sizes["tasks"], 4)


def audit_lines(counts: Mapping[str, Any]) -> Iterator[str]:
    """Say what an audit found, warnings first. `counts` are those of a pack's manifest."""
    found = counts["audit"]
    yield from _warnings(found)
    if "note" in counts:
        yield counts["note"]
    several = sum(count for domains, count in found["users_by_domains"].items() if int(domains) > 1)
    yield (
        f"events: {found['events']:,} of {found['users']:,} users ({several:,} of several domains, "
        f"{found['users_of_one_event']:,} of one event) and {found['items']:,} items; the catalogue has "
        f"{found['catalogue']:,} items"
    )
    if (left := found["core"]["left_out"]) and left["events"]:
        yield (
            f"left out by core {found['core']['core']}: {left['events']:,} events, {left['users']:,} users, "
            f"{left['items']:,} items"
        )
    if counts.get("items_of_several_domains"):
        yield (
            f"ids that are in several domains, and mean another item in each: {counts['items_of_several_domains']:,}"
        )
    for split, domains in found["targets"].items():
        told = [
            f"{domain or 'all'} {count:,} (cold {found['cold_targets'][split][domain]:,})"
            for domain, count in domains.items()
        ]
        yield f"targets of {split} (cold: no training event has their item): {', '.join(told)}"
    if found["repeated_events"]:
        yield f"events whose user had their item before: {found['repeated_events']:,}"
    for split, count in found["targets_in_history"].items():
        yield f"targets of {split} that are in their history: {count:,}"
    for split, count in found["targets_of_new_users"].items():
        yield f"targets of {split} whose user has no training event: {count:,}"
    if found.get("events_without_text"):
        yield f"events without a text: {found['events_without_text']:,}"
    if found.get("items_of_several_texts"):
        yield f"items of several texts, of which the most frequent counts: {found['items_of_several_texts']:,}"


def _warnings(found: Mapping[str, Any]) -> Iterator[str]:
    for domain, (ascending, sequences) in found.get("sorted_by_item", {}).items():
        if sequences >= _ENOUGH and ascending >= _NEARLY_ALL * sequences:
            yield (
                f"WARNING: the events{f' of {domain}' if domain else ''} are sorted by item id, not by time: "
                f"{ascending:,} of {sequences:,} sequences of {_LONG} events or more ascend. No number that is "
                "measured on them means anything; take files in order of time, or name the column of the time"
            )
    leaks, events = found["targets_in_user_id"], found["events"]
    num_targets = {split: sum(domains.values()) for split, domains in found["targets"].items()}
    usual = leaks.get("train", 0) / max(1, events - sum(num_targets.values()))
    for split, count in num_targets.items():
        share = leaks.get(split, 0) / count
        if share > max(_LEAK, 2 * usual):
            yield (
                f"WARNING: the user's id contains the id of the target in {leaks[split]:,} of {count:,} targets of "
                f"{split}: a model that reads ids of users is told what it should find; name users anew"
            )
