"""What an audit of events found, in words. It needs no DuckDB: whoever opens a pack may ask for its warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LONG = 4
"""Sequences of so many events can tell an order: one in 24 of them is sorted by chance."""
_ENOUGH = 10
"""Fewer long sequences than this tell nothing."""
_NEARLY_ALL = 0.8
_LEAK = 0.01
"""A share of targets above this is told of as a leak, where training events have less than half as much of it."""


def mend_cold_tasks(counts: dict[str, Any]) -> None:
    """Set the fraction of cold tasks of each split: those of users without a training event, whatever their key is."""
    for split, sizes in counts["splits"].items():
        sizes["cold_tasks"] = round(counts["audit"]["targets_of_new_users"].get(split, 0) / sizes["tasks"], 4)


def audit_lines(counts: Mapping[str, Any]) -> Iterator[str]:
    """Say what an audit found, warnings first. `counts` are those of a pack's manifest."""
    found = counts["audit"]
    yield from (f"WARNING: {line}" for line in audit_warnings(counts))
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


def audit_warnings(counts: Mapping[str, Any]) -> Iterator[str]:
    """Say what makes numbers that are measured on a pack wrong; nothing where the audit found nothing, or was none."""
    if "audit" not in counts:
        return
    found = counts["audit"]
    for domain, (ascending, sequences) in found.get("sorted_by_item", {}).items():
        if sequences >= _ENOUGH and ascending >= _NEARLY_ALL * sequences:
            yield (
                f"the events{f' of {domain}' if domain else ''} are sorted by item id, not by time: "
                f"{ascending:,} of {sequences:,} sequences of {LONG} events or more ascend. No number that is "
                "measured on them means anything; take files in order of time, or name the column of the time"
            )
    for domain, (ascending, sequences) in found.get("sorted_at_one_time", {}).items():
        if sequences >= _ENOUGH and ascending >= _NEARLY_ALL * sequences:
            yield (
                f"{sequences:,} sequences{f' of {domain}' if domain else ''} have one time for all of their events "
                f"({LONG} or more), and {ascending:,} of them are sorted by item id: they have no order that means "
                "anything; take a time that tells a user's events apart, or files in order of time"
            )
    leaks, events = found["targets_in_user_id"], found["events"]
    num_targets = {split: sum(domains.values()) for split, domains in found["targets"].items()}
    usual = leaks.get("train", 0) / max(1, events - sum(num_targets.values()))
    for split, count in num_targets.items():
        share = leaks.get(split, 0) / count
        if share > max(_LEAK, 2 * usual):
            yield (
                f"the user's id contains the id of the target in {leaks[split]:,} of {count:,} targets of "
                f"{split}: a model that reads ids of users is told what it should find; name users anew"
            )
