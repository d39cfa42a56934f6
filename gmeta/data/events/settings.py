"""Which settings of `gmeta prepare` make it one of events, and which have no effect then."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.data.events.columns import EventColumns, load_event_columns
from gmeta.data.events.data_sets import EVENT_SETS
from gmeta.data.events.hold_out import BY_PLACE

OF_EVENTS = ("events", "items", "core", "holdout", "domains", "gaps")
"""Settings that only a pack of events has."""
_OF_ROWS = (
    "schema",
    "label_threshold",
    "split_query",
    "roles",
    "support_size",
    "query_size",
    "query_ratio",
    "min_task_rows",
    "task_split",
    "partitions",
    "valid_fraction",
    "test_fraction",
)
"""Settings that say what events have already: what a task is, its support and query, its split."""


def event_columns(config: PrepareConfig) -> EventColumns | None:
    """Return the columns of the events that a config names; None where it names rows.

    Raises ValueError for a setting that has no effect, by name.
    """
    given = [field.name for field in fields(config) if getattr(config, field.name) not in (None, [], {})]
    if config.events is None and config.dataset not in EVENT_SETS:
        for key in (key for key in OF_EVENTS if key in given):
            raise ValueError(f"{key} has no effect without events: name the columns of events with --events")
        return None
    for key in (key for key in _OF_ROWS if key in given):
        raise ValueError(
            f"{key} has no effect on events: a task is a user, its support the history and its query the next item; "
            "core and holdout choose users and targets"
        )
    if config.max_task_rows_keep == "random":
        raise ValueError("max_task_rows_keep is 'random': a history of events keeps its last ones; say last or drop")
    if config.dataset in EVENT_SETS:
        return _of_data_set(config, str(config.dataset), given)
    if config.dataset is not None:
        raise ValueError(f"dataset {config.dataset} comes with its files and schema: leave events out")
    if not config.input:
        raise ValueError("name the files of events with --input")
    if config.root is not None:
        raise ValueError("root has no effect without dataset: leave it out")
    columns = load_event_columns(Path(str(config.events)))
    if columns.domain is None and config.domains:
        raise ValueError(f"domains has no effect: {config.events} names no domain column")
    if columns.time is None and config.gaps:
        raise ValueError(f"gaps is true, but {config.events} names no time column: name it, or leave gaps out")
    return columns


def _of_data_set(config: PrepareConfig, name: str, given: list[str]) -> EventColumns:
    for key in ("events", "items", "input"):
        if key in given:
            raise ValueError(f"dataset {name} comes with its files and columns: leave {key} out")
    data = EVENT_SETS[name]
    if data.has_targets:
        for key in (key for key in OF_EVENTS if key in given):
            raise ValueError(f"{key} has no effect with dataset {name}, whose targets are given: leave it out")
    if data.columns.time is None and config.holdout not in (None, *BY_PLACE):
        raise ValueError(f"holdout is {config.holdout!r}, but dataset {name} has no time: leave it out")
    if data.columns.time is None and config.gaps:
        raise ValueError(f"gaps is true, but dataset {name} has no time: leave it out")
    return data.columns


def settings_of_events(config: PrepareConfig) -> dict[str, Any]:
    """Return what the manifest of a pack of events records of its settings."""
    found = {key: getattr(config, key) for key in OF_EVENTS} | {"domains": config.kept_domains}
    found["holdout"] = None if config.holdout is None else str(config.holdout)
    return {key: value for key, value in found.items() if value not in (None, [])}
