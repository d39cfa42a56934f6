"""Stage 6 of `prepare` puts each shard in order, encodes it, and saves it while the next one is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gmeta.data.identity import vocabulary_file
from gmeta.data.pack import SPLITS, PackWriter
from gmeta.data.prepare.columns import label_columns
from gmeta.data.prepare.deal import dealt, item_vocabulary
from gmeta.data.prepare.encode import encode, take_labels
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report, split_summary
from gmeta.data.prepare.tasks import LEFT_OUT, ShardJob
from gmeta.data.schema import ITEM_STATISTICS, OOV, DataSchema, PackSchema
from gmeta.data.sources import Connection, in_order, literal, md5_64, scalar

Array = npt.NDArray[Any]


class Day(Protocol):
    """What a day does with a shard's arrays before they are written (`increment`)."""

    def add(self, con: Connection, shard: ShardJob, arrays: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays with older rows."""
        ...


def write_vocabularies(con: Connection, writer: PackWriter, schema: DataSchema, totals: str | None = None) -> None:
    """Write the vocabularies and item statistics that `learn` made; or those of `grow`, whose `totals` are a table."""
    last_day = "" if totals is None else ", last_day"
    for index, (table, features) in enumerate(schema.tables().items()):
        if features[0].hash_buckets is None:
            query = f"SELECT CAST(value AS VARCHAR) AS value, count{last_day} FROM vocab_{index} ORDER BY id"
            found = con.sql(query).to_arrow_table()
            days = None if totals is None else found["last_day"].to_numpy()
            writer.write_vocab(table, found["value"], found["count"].to_numpy(), days)
    if schema.item_statistics:
        file = vocabulary_file(writer.directory / "vocab", ITEM_STATISTICS)
        source = totals or "item_totals"
        with in_order(con):
            con.execute(f"""COPY (SELECT CAST(value AS VARCHAR) AS value, label_sum, count FROM {source}
                                  ORDER BY value NULLS FIRST) TO {literal(str(file))} (FORMAT parquet)""")


def write_shards(
    con: Connection,
    writer: PackWriter,
    schema: DataSchema,
    pack_schema: PackSchema,
    settings: Settings,
    scratch: Path,
    shards: Sequence[ShardJob],
    counts: dict[str, Any],
    tell: Report,
    day: Day | None = None,
) -> None:
    """Write all shards and the list of tasks; puts the sizes of the splits and the number of cold items in `counts`.

    A `day` adds the older rows of the tasks, and keeps the last rows of each for later days.
    """
    cold = dict.fromkeys(SPLITS, 0)
    with ThreadPoolExecutor(1) as background:
        saved: Future[None] | None = None
        for done, shard in enumerate(shards):
            tell("writing shards", done, len(shards))
            arrays = _shard_arrays(con, schema, pack_schema, settings, scratch, shard)
            if day is not None:
                arrays = day.add(con, shard, arrays)
            if shard.split == LEFT_OUT:
                continue
            cold[shard.split] += int(arrays["item_cold"].sum())
            if saved is not None:
                saved.result()
            saved = background.submit(writer.add_shard, shard.split, arrays)
            keys = con.sql(f"SELECT key FROM tasks WHERE shard = {shard.index} ORDER BY task_id").to_arrow_table()[
                "key"
            ]
            writer.write_tasks(arrays["task_id"], keys, [shard.split] * len(keys))
        if saved is not None:
            saved.result()
    tell("writing shards", len(shards), len(shards))
    counts["splits"] = {
        name: split_summary(con, name, cold[name]) for name in SPLITS if any(s.split == name for s in shards)
    }
    counts["cold_items"] = _cold_items(con, schema, scratch, shards)


def _in_order(con: Connection, rows: str, settings: Settings) -> tuple[str, str]:
    """Return a shard's rows and their order: by task, support first, each by time."""
    if settings.split_query == "column":
        return rows, "b.task_id, b.is_query, b.time, b.file, b.row"
    if settings.split_query == "last":
        return rows, "b.task_id, b.time, b.file, b.row"
    drawn = md5_64(literal(f"query|{settings.seed}"), "file", "row")
    con.execute(f"""
        CREATE OR REPLACE TEMP TABLE ranked AS
        SELECT *, row_number() OVER (PARTITION BY task_id ORDER BY {drawn}, file, row) AS rank FROM {rows}""")
    return "ranked", "b.task_id, b.rank > b.num_support, b.time, b.rank"


def _shard_arrays(
    con: Connection, schema: DataSchema, pack_schema: PackSchema, settings: Settings, scratch: Path, shard: ShardJob
) -> dict[str, Array]:
    known = item_vocabulary(schema) is not None
    dealt_rows = dealt(schema, scratch, [shard], item=schema.item_statistics or not known)
    rows, order = _in_order(con, dealt_rows, settings)
    more = label_columns(schema) + ["weight"] * (schema.weight is not None) + ["time"] * (schema.time is not None)
    if schema.item is not None and not known:
        rows = f"""(SELECT r.*, CAST(i.value IS NULL AS UTINYINT) AS item_cold
                    FROM {rows} r LEFT JOIN seen_items i ON i.value = r.item)"""
        more.append("item_cold")
    arrays = encode(con, rows, schema, pack_schema, order, more)
    arrays["label"] = take_labels(schema, arrays)
    if known:
        one_valued = [f.name for f in schema.features if f.kind == "categorical"]
        ids = arrays["ids"][:, one_valued.index(str(schema.item))]
        arrays["item_cold"] = ((ids == OOV) | (ids >= pack_schema.feature(str(schema.item)).num_ids)).astype(np.uint8)
    arrays.setdefault("item_cold", np.zeros(len(arrays["label"]), np.uint8))
    tasks = con.execute(f"""
        SELECT task_id, CAST(sum(num_rows) OVER (ORDER BY task_id) AS BIGINT) - num_rows AS row_start,
               CAST(num_support AS INTEGER) AS num_support, num_rows
        FROM tasks WHERE shard = {shard.index} ORDER BY task_id""").fetchnumpy()
    if tasks.pop("num_rows").sum() != len(arrays["label"]):
        raise ValueError("the input changed while it was read: no pack was made; run again when nothing writes to it")
    return arrays | {name: np.asarray(array) for name, array in tasks.items()}


def _cold_items(con: Connection, schema: DataSchema, scratch: Path, shards: Sequence[ShardJob]) -> int:
    """Count the items that no training row has."""
    if schema.item is None:
        return 0
    held_out = [shard for shard in shards if shard.split not in ("train", LEFT_OUT)]
    if not held_out:
        return 0
    rows = dealt(schema, scratch, held_out, item=True)
    query = f"SELECT count(DISTINCT item) FROM {rows} WHERE item NOT IN (FROM seen_items)"
    return int(scalar(con, query))
