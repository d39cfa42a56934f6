"""Small packs of next items: users of two domains whose next item follows from the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import gmeta
from gmeta.config.data import PrepareConfig
from gmeta.data.prepare.prepare import prepare
from gmeta.data.schema import PackSchema
from gmeta.data.shards import PackSplit, one_valued, split_in_memory

ITEMS = 12
"""Of each domain; item i is mostly followed by item i + 1."""


def event_rows(users: int = 40, events: int = 9, seed: int = 0) -> dict[str, list[Any]]:
    """Events of two domains, a few users of one alone."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"user": [], "item": [], "domain": [], "title": []}
    for user in range(users):
        for domain in ("books", "toys")[: 1 if user % 4 == 0 else 2]:
            item = int(generator.integers(ITEMS))
            for _ in range(int(generator.integers(3, events))):
                rows["user"].append(f"u{user}")
                rows["item"].append(f"{domain[0]}{item}")
                rows["domain"].append(domain)
                rows["title"].append(f"{domain} of part {item} and {item * item}")
                item = (item + (1 if generator.random() < 0.9 else 5)) % ITEMS
    return rows


def timed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Events with times of their own, in which the domains of a user mix."""
    order = np.random.default_rng(5).permutation(len(rows["user"]))
    return {**rows, "time": (1000 + order).tolist()}


def next_item_pack(folder: Path, rows: dict[str, list[Any]] | None = None, **settings: Any) -> Path:
    """The pack of such events."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows or event_rows()
    pq.write_table(pa.table(rows), folder / "events.parquet")
    names = {"user": "user", "item": "item", "domain": "domain", "text": "title", "time": "time"}
    (folder / "events.yaml").write_text("".join(f"{key}: {name}\n" for key, name in names.items() if name in rows))
    out = folder / "pack"
    config = PrepareConfig(
        input=[str(folder / "events.parquet")], events=str(folder / "events.yaml"), out=str(out), **settings
    )
    prepare(config, report=lambda *_: None)
    return out


def next_item_run(
    pack: Path,
    run_dir: Path,
    *,
    most: int = 6,
    adapt: Sequence[str] = (),
    next_item: Mapping[str, Any] | None = None,
    **model: Any,
) -> Path:
    """A run on a pack, of two epochs, whose users read their last `most` events."""
    values = {"name": "sasrec", "embedding_dim": 8, "args": {"heads": 2, "blocks": 1, "positions": 8}}
    config = {"pack": str(pack), "run_dir": str(run_dir), "model": {**values, **model}, "meta": {"adapt": [*adapt]}}
    config |= {"schedule": {"epochs": 2}, "loader": {"tasks_per_batch": 20, "max_support_rows": most}}
    config |= {"embedding": {"init_std": 0.5}, "next_item": next_item or {}}
    return gmeta.train(config).path


def split_of_events(histories: Sequence[Sequence[int]], schema: PackSchema, owned: Mapping[str, Any]) -> PackSplit:
    """A split in memory whose tasks are histories of item ids, the last of which is the query."""
    items, length = np.concatenate(histories), np.array([len(history) for history in histories])
    columns = [
        items if name == schema.item else owned.get(name, 0 * owned["domain"])[items] for name in one_valued(schema)
    ]
    arrays = {
        "ids": np.stack(columns, 1).astype(np.int32),
        "dense": np.zeros((len(items), 0), np.float32),
        "label": np.ones(len(items), np.float32),
        "item_cold": np.zeros(len(items), np.uint8),
        "task_id": np.arange(len(length)),
        "row_start": np.cumsum(length) - length,
        "num_support": (length - 1).astype(np.int32),
    }
    return split_in_memory(arrays, schema)
