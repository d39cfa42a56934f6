"""What the columns of events mean: `events.yaml`, and the data schema of the rows that are made of events."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gmeta.core.files import read_mapping
from gmeta.data.catalogue import catalogue_file, read_event_columns
from gmeta.data.entries import require_keys, require_type
from gmeta.data.schema import DataSchema, parse_data_schema

GAP = "gap"
"""The feature of rows that has the gap of time before an event."""
_CURE = "write it as `gmeta prepare --help` shows, in UTF-8"


@dataclass(frozen=True, kw_only=True)
class EventColumns:
    """The columns of events. Those of items are called the same."""

    user: str
    item: str
    domain: str | None = None
    time: str | None = None
    text: str | None = None

    def by_meaning(self) -> dict[str, str]:
        """Return the columns that there are, by what they mean."""
        return {key: column for key, column in asdict(self).items() if column is not None}


def load_event_columns(path: Path) -> EventColumns:
    """Read `events.yaml`. ValueError names the file, the key and the cure."""
    if not path.is_file():
        raise ValueError(
            f"events file {path} does not exist: it maps user and item, and domain, time, text, to columns"
        )
    try:
        return _parse(read_mapping(path, _CURE))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def event_columns_of(vocab_folder: Path) -> EventColumns:
    """Return the columns that the events of a run had. ValueError where its pack was not made of events."""
    found = read_event_columns(vocab_folder)
    if not found:
        raise ValueError(
            f"{catalogue_file(vocab_folder)} does not say which columns events have: prepare the pack again, with "
            "gmeta prepare --events, and train on that"
        )
    try:
        return _parse(found)
    except ValueError as error:
        raise ValueError(f"{catalogue_file(vocab_folder)}: {error}") from None


def _parse(values: Any) -> EventColumns:
    known = [field.name for field in fields(EventColumns)]
    entry = require_keys(values, "events", known)
    entry = {key: value for key, value in entry.items() if value is not None}
    for key in known:
        required = key in ("user", "item")
        require_type(entry, key, (str,), "events", "a column name (a number in quotes)", required=required)
    keys: dict[str, str] = {}
    for key, column in entry.items():
        if column.lower() in keys:
            raise ValueError(f"events.{keys[column.lower()]} and events.{key} are both {column!r}: name two columns")
        keys[column.lower()] = key
    return EventColumns(**entry)


def schema_of_rows(columns: EventColumns, *, gaps: bool = False) -> DataSchema:
    """Return the schema of the rows that are made of events with these columns, with `gaps` of their gaps too."""
    features: list[Any] = [{"name": "item", "vocabulary": "all"}]
    if columns.domain is not None:
        features.append({"name": "domain", "vocabulary": "all"})
    if columns.text is not None:
        features.append({"name": "title", "text": True, "nulls": "oov"})
    if gaps:
        features.append({"name": GAP, "nulls": "oov"})
    return parse_data_schema(
        {
            "task": "user",
            "label": "label",
            "time": "time",
            "item": "item",
            "partition": "partition",
            "role": "role",
            **({"scenario": "domain"} if columns.domain is not None else {}),
            "categorical": features,
        }
    )


def owned_features(columns: EventColumns) -> tuple[str, ...]:
    """Return the features that items own."""
    named = {"domain": columns.domain, "title": columns.text}
    return tuple(name for name, column in named.items() if column is not None)
