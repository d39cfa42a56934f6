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
from gmeta.data.layout import one_valued
from gmeta.data.pack import open_pack
from gmeta.data.prepare.prepare import prepare
from gmeta.data.schema import PackSchema
from gmeta.data.shards import PackSplit, split_in_memory
from gmeta.evaluation.rank_split import candidates_of, rank_split
from gmeta.recommender.build import candidate_draw, domain_of
from gmeta.recommender.next_items import NextItems

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


def words_of(item: str) -> str:
    """A title in the words of the tiny tokenizer, another one for each item."""
    number = 4 + 12 * "bt".index(item[0]) + int(item[1:])
    return f"w{number} w{number * number % 50 + 4} w{number * 7 % 50 + 4}"


def in_words(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The events with such titles."""
    return {**rows, "title": [words_of(item) for item in rows["item"]]}


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


def histories_of_split(run: Path, name: str) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The histories of a split as events of users called 0, 1, …, and the target of each with its domain."""
    split = open_pack(run.parent / "pack").split(name)
    values = pq.read_table(run / "vocab/catalogue.parquet")
    items = ["", *values["item"].to_pylist()]
    domains = ["", *pq.read_table(run / "vocab/domain.parquet")["value"].to_pylist()]
    columns = split.columns(("item", "domain"))
    rows: dict[str, list[Any]] = {"user": [], "item": [], "domain": [], "time": []}
    targets = []
    for task, is_query, item, domain, time in zip(
        columns.task, columns.is_query, columns.ids["item"], columns.ids["domain"], split.times(), strict=True
    ):
        if is_query:
            targets.append((items[item], domains[domain]))
            continue
        for key, value in (("user", str(task)), ("item", items[item]), ("domain", domains[domain]), ("time", time)):
            rows[key].append(value)
    return pa.table(rows), targets


def require_equal_places(run: Path, rec: NextItems, split: str, most: int) -> None:
    """Compare the place of every target that is new to its user in the list with its rank."""
    events, targets = histories_of_split(run, split)
    pack = open_pack(run.parent / "pack")
    catalogue = pack.catalogue()
    ranked = rank_split(
        rec.system,
        pack.split(split),
        catalogue,
        candidates_of(catalogue, domain_of(pack.schema)),
        max_support_rows=most,
        draw=candidate_draw(rec.config, catalogue, pack.schema),
    )
    assert ranked is not None

    found = rec.recommend(events, k=ITEMS).to_pylist()

    place = {(row["user"], row["item"]): row["rank"] for row in found}
    seen = set(zip(events["user"].to_pylist(), events["item"].to_pylist(), strict=True))
    compared = 0
    for task, (item, domain) in enumerate(targets):
        if (str(task), item) in seen:
            assert (str(task), item) not in place
            continue
        assert place[str(task), item] == ranked.rank[task]
        ours = [row for row in found if row["user"] == str(task) and row["domain"] == domain]
        assert len(ours) == ranked.candidates[task]
        compared += 1
    assert compared > 20


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
