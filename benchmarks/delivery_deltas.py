"""How large deltas are, for delivery.py: of what its warm side published, and of a stream whose days see few items."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Record, median, table
from delivery_days import begins, deliver, synthetic

from gmeta.runs.bundle import manifest_text, read_manifest, without_training
from gmeta.runs.delta import apply_delta, delta_bytes, make_delta

FEW_ITEMS: dict[str, Any] = {"base": 30, "days": 3, "users": 1000, "items": 20_000}
QUICK_ITEMS: dict[str, Any] = {"base": 3, "days": 2, "users": 400, "items": 2000}


@dataclass(frozen=True)
class Measured:
    """The delta to a version from the one that was current before, and the full version. Bytes are what a reader
    fetches: one that serves, and one that trains on from it, with moments and history.
    """

    version: int
    published: bool
    changed: int  # rows of all tables
    rows: int
    delta: dict[str, int]  # reader -> bytes
    full: dict[str, int]
    apply_s: float  # to apply it and verify all files, without moments


def measured(registry: Path) -> list[Measured]:
    """Return the deltas between the versions that were current, in their order; those that were not published too."""
    moves = json.loads((registry / "current.json").read_text())["history"]
    return [_measured(registry, base["version"], move["version"]) for base, move in pairwise(moves)]


def _measured(registry: Path, base: int, version: int) -> Measured:
    old, new = (registry / "versions" / str(number) for number in (base, version))
    with tempfile.TemporaryDirectory() as scratch:
        delta = Path(scratch) / "delta"
        document = make_delta(old, new, delta)
        start = time.perf_counter()
        apply_delta(old, delta, Path(scratch) / "made", training=False)
        seconds = time.perf_counter() - start
    readers = {"serves": False, "trains": True}
    return Measured(
        version,
        (registry / "deltas" / str(version)).exists(),
        sum(one["changed"] for one in document["tables"].values()),
        sum(one["ids"] for one in document["tables"].values()),
        {name: delta_bytes(document, training=training) for name, training in readers.items()},
        {name: _bytes(new, training=training) for name, training in readers.items()},
        seconds,
    )


def _bytes(folder: Path, *, training: bool) -> int:
    """Return the bytes of a version that a reader fetches, with or without what a warm start needs."""
    manifest = read_manifest(folder)
    manifest = manifest if training else without_training(manifest)
    return sum(entry["bytes"] for entry in manifest["files"]) + len(manifest_text(manifest))


def sizes(case: str, found: Sequence[Measured]) -> tuple[list[Record], str]:
    """Return how large deltas are beside full versions, and how long it takes to apply one."""
    if not found:
        return [], "No version followed another, so that there are no deltas."
    ratios = {reader: [one.delta[reader] / one.full[reader] for one in found] for reader in ("serves", "trains")}
    seconds = median([one.apply_s for one in found])
    records = [
        Record(case, "delta", "size_ratio", median(ratios["serves"]), "1"),
        Record(case, "delta", "size_ratio_with_training", median(ratios["trains"]), "1"),
        Record(case, "delta", "changed_rows", median([one.changed / one.rows for one in found]), "1"),
        Record(case, "delta", "apply_ms", 1e3 * seconds, "ms"),
        Record(case, "delta", "published", sum(one.published for one in found) / len(found), "1"),
    ]
    lines = [
        f"{name} {median(values):.2f} ({min(values):.2f} to {max(values):.2f}; full versions have "
        f"{median([one.full[reader] for one in found]) / 1e6:.2f} MB)"
        for name, (reader, values) in zip(("without moments and history", "with them"), ratios.items(), strict=True)
    ]
    return records, (
        f"Bytes of a delta ÷ bytes of the full version: {lines[0]}, {lines[1]}. Medians of {len(found)} versions, of "
        f"which {sum(one.published for one in found)} were published with their deltas; a day changes "
        f"{median([one.changed for one in found]):,.0f} of {median([one.rows for one in found]):,.0f} rows. To apply "
        f"one and verify the result takes {1e3 * seconds:.0f} ms, without moments."
    )


def deliver_few_items(folder: Path, *, quick: bool) -> tuple[list[Record], str]:
    """Deliver a few days of a stream with many items, each a warm start, and measure the deltas between them."""
    size = QUICK_ITEMS if quick else FEW_ITEMS
    log = synthetic(folder / "log", 0, **size)
    registry = folder / "registry"
    rules = folder / "rules.yaml"
    rules.write_text("rules: [{rule: finite}]")  # of a day's few held-out rows the usual rules say nothing
    words: tuple[object, ...] = ("--registry", registry, "--rules", rules, "--work", folder / "work", "--input")
    deliver(*words, json.dumps(log.until(log.base - 1)), *begins(log))
    seconds = []
    for day in range(log.base, log.base + log.days):
        start = time.perf_counter()
        deliver(*words, json.dumps([str(log.day(day))]))
        seconds.append(time.perf_counter() - start)
    found = measured(registry)
    records, text = sizes("items", found)
    rows = [
        [
            str(one.version),
            f"{one.changed:,} of {one.rows:,}",
            *(f"{one.delta[name] / 1e3:,.0f} of {one.full[name] / 1e3:,.0f} KB" for name in ("serves", "trains")),
            f"{1e3 * one.apply_s:.0f} ms",
            "yes" if one.published else "no",
        ]
        for one in found
    ]
    header = ["version", "changed rows", "without moments, history", "with them", "apply", "published"]
    said = f"A day is delivered in {median(seconds):.0f} s (median of {len(seconds)})."
    return records, "\n\n".join([table(header, rows), text, said])
