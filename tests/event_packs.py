"""Next-item packs of a few events, and what they hold in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.prepare.prepare import prepare


def quiet(*_: object) -> None:
    """A report that says nothing."""


def event_config(
    folder: Path,
    events: Sequence[dict[str, Any]],
    *,
    items: Sequence[dict[str, Any]] | None = None,
    columns: dict[str, str] | None = None,
    **settings: Any,
) -> PrepareConfig:
    """The config of a pack of events, rows of a Parquet file whose columns are called as what they mean."""
    pq.write_table(pa.Table.from_pylist(list(events)), folder / "events.parquet")
    known = ("user", "item", "domain", "time", "text")
    named = {name: name for name in known if any(name in row for row in [*events, *(items or [])])}
    (folder / "events.yaml").write_text(yaml.safe_dump(columns or named))
    if items is not None:
        pq.write_table(pa.Table.from_pylist(list(items)), folder / "items.parquet")
        settings["items"] = str(folder / "items.parquet")
    usual = {"threads": 1, "memory_limit": "400MB", "input": [str(folder / "events.parquet")]}
    return PrepareConfig(out=str(folder / "pack"), events=str(folder / "events.yaml"), **{**usual, **settings})


def event_pack(folder: Path, events: Sequence[dict[str, Any]], **settings: Any) -> TaskPack:
    """The pack of events."""
    config = event_config(folder, events, **settings)
    prepare(config, quiet)
    return open_pack(config.out)


def later_config(folder: Path, base: Path, rows: Sequence[dict[str, Any]], name: str, **settings: Any) -> PrepareConfig:
    """The config of a later day's events."""
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / f"{name}.parquet")
    usual = {"threads": 1, "memory_limit": "400MB", "input": [str(folder / f"{name}.parquet")]}
    return PrepareConfig(out=str(folder / name), base=str(base), **{**usual, **settings})


def later_pack(folder: Path, base: Path, rows: Sequence[dict[str, Any]], name: str, **settings: Any) -> TaskPack:
    """The pack of a later day's events."""
    config = later_config(folder, base, rows, name, **settings)
    prepare(config, quiet)
    return open_pack(config.out)


def sequence(user: str, items: str, domain: str | None = None) -> list[dict[str, Any]]:
    """Events of a user, an item a word."""
    told = {} if domain is None else {"domain": domain}
    return [{"user": user, "item": item, **told} for item in items.split()]


def told_tasks(pack: TaskPack, split: str) -> dict[str, str]:
    """Key of each task of a split -> its support, an arrow and its query, as raw items."""
    names = ["", *pq.read_table(pack.vocab_file("item"))["value"].to_pylist()]
    tasks = pq.read_table(pack.tasks_file()).to_pylist()
    keys = [task["key"] for task in tasks if task["split"] == split]
    rows = pack.split(split).columns(("item",))
    words: list[list[str]] = [[] for _ in keys]
    for task, is_query, item in zip(rows.task.tolist(), rows.is_query.tolist(), rows.ids["item"].tolist(), strict=True):
        words[task] += ["->"] * is_query + [names[item]]
    return {key: " ".join(told) for key, told in zip(keys, words, strict=True)}
