"""Days of events: users of two domains whose next item follows from the last one, and who meet new items every day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS, ITEMS = 60, 30
"""Users of a day, and items of each domain on day 0."""
NEW = 2
"""Items of each domain that every later day brings."""


def day_of_events(day: int, *, users: int = USERS, shuffled: bool = False) -> list[dict[str, Any]]:
    """Events of a day; item i of its domain is mostly followed by item i + 1. `shuffled`, by any."""
    generator, items = np.random.default_rng(day), ITEMS + NEW * day
    rows: list[dict[str, Any]] = []
    for user in range(users):
        for domain in ("books", "toys"):
            item = int(generator.integers(items))
            shift = 10 if domain == "books" else 0
            for event in range(8 if day == 0 else 3):
                time = 100_000 * day + 1000 * event + user
                words = f"w{4 + item % 50} w{5 + (7 * item + shift) % 50}"  # that tiny encoders know
                named = {"item": f"{domain[0]}{item}", "domain": domain, "title": words}
                rows.append({"user": f"u{user}", **named, "time": time})
                follows = generator.random() < 0.95 and not shuffled
                item = (item + 1) % items if follows else int(generator.integers(items))
    return rows


def write_days(folder: Path, days: int) -> None:
    """Write a folder of events for each day, and `events.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.yaml").write_text("{user: user, item: item, domain: domain, time: time, text: title}")
    for day in range(days):
        write_day(folder / f"day={day:02d}", day_of_events(day))


def write_day(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the events of a day into a folder of their own."""
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder
