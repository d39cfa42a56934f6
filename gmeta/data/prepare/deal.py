"""Stage 3 of `prepare` deals the rows of kept tasks to one folder of Parquet files a shard.

From here on a shard is an independent job.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from gmeta.data.prepare.columns import label_columns, value_columns
from gmeta.data.prepare.cut import choose_rows
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.tasks import ShardJob
from gmeta.data.schema import DataSchema
from gmeta.data.sources import Connection, literal


def deal(con: Connection, schema: DataSchema, settings: Settings, scratch: Path) -> None:
    """Deal the rows of kept tasks to one folder of Parquet files a shard, and drop the checked ones."""
    labels = [f"s.{name}" for name in label_columns(schema)]
    columns = ["s.file", "s.row", *labels, "CAST(t.task_id AS INTEGER) AS task_id"]
    columns += [f"s.{name}" for name in value_columns(schema)]
    optional = {
        "s.weight": schema.weight is not None,
        "s.time": True,
        "s.item": item_feature(schema) is None,
        "s.is_query": settings.split_query == "column",
        "t.num_support": settings.split_query == "random",
        "t.fold": schema.item_statistics,
    }
    columns += [column for column, needed in optional.items() if needed]
    partition = "AND t.partition = s.partition" if settings.task_split == "column" else ""
    chosen = ""
    if choose_rows(con, settings):
        chosen = """LEFT JOIN chosen c ON c.file = s.file AND c.row = s.row
                    WHERE t.num_rows = t.num_found OR c.row IS NOT NULL"""
    # Version 2's delta encoding halves the bytes. Dictionaries and compression would take longer than the writing.
    con.execute(f"""
        COPY (SELECT {", ".join(columns)}, t.shard FROM raw_rows s JOIN tasks t ON t.task = s.task {partition} {chosen})
        TO {literal(str(scratch / "rows"))} (FORMAT parquet, PARQUET_VERSION v2, COMPRESSION uncompressed,
                                             DICTIONARY_SIZE_LIMIT 1, PARTITION_BY (shard))""")
    con.execute("DROP VIEW raw_rows; DROP TABLE checked; CHECKPOINT; SET disabled_optimizers=''")
    # The dealt files never change, and each of the many queries would read the metadata of all their columns.
    con.execute("SET parquet_metadata_cache=true")


def dealt(schema: DataSchema, scratch: Path, shards: Sequence[ShardJob], *, item: bool = False) -> str:
    """Return SQL that reads the dealt rows of some shards, with column `item` where it is asked for."""
    folders = [scratch / "rows" / f"shard={s.index}" for s in shards]
    files = ", ".join(literal(f"{glob.escape(str(folder))}/*.parquet") for folder in folders)
    rows = f"read_parquet([{files}], hive_partitioning=false)"
    feature = item_feature(schema)
    # With many features a star takes longer than the query, so that it is left out where it may be.
    return rows if feature is None or not item else f"(SELECT *, f{feature} AS item FROM {rows})"


def item_feature(schema: DataSchema) -> int | None:
    """Return the index of the feature that is the item column too, so that its rows need not hold it twice."""
    found = [i for i, f in enumerate(schema.features) if f.name == schema.item and f.kind == "categorical"]
    return found[0] if found else None


def item_vocabulary(schema: DataSchema) -> int | None:
    """Return the index of the embedding table whose vocabulary is exactly the items of training rows."""
    feature = item_feature(schema)
    for index, members in enumerate(schema.tables().values()):
        alone = feature is not None and members == [schema.features[feature]]
        if alone and members[0].min_count == 1 and members[0].hash_buckets is None and members[0].vocabulary == "train":
            return index
    return None
