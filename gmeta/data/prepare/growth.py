"""Stage 4 of `prepare --base`: the base's vocabularies and statistics go on, and its means and deviations stay.

A value keeps its id. A value that was seen `min_count` times over all days gets the next one; until then it is
pending. One that was not seen for long becomes a tombstone: nothing has its id any more, and statistics of an item go
with its id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from gmeta.data.identity import vocabulary_file
from gmeta.data.prepare.columns import batched
from gmeta.data.prepare.deal import dealt, item_vocabulary
from gmeta.data.prepare.history import write_ordered
from gmeta.data.prepare.summary import Report
from gmeta.data.prepare.tasks import ShardJob
from gmeta.data.prepare.vocabulary import (
    RawTable,
    exact_sum,
    further_values,
    label_scale,
    make_vocabularies,
    mean_label,
    moments_of,
    numeric_values,
    statistics_join,
)
from gmeta.data.schema import ITEM_STATISTICS, OOV, DataSchema, PackSchema
from gmeta.data.sources import Connection, only_file, scalar

PENDING = "pending"


@dataclass(frozen=True)
class Eviction:
    """Which values become tombstones: those not seen for so many days, and with `below` seen fewer times in all."""

    after_days: int | None
    below: int | None


def grow(
    con: Connection,
    base: tuple[PackSchema, Path, Path],
    schema: DataSchema,
    scratch: Path,
    shards: Sequence[ShardJob],
    day: int,
    eviction: Eviction,
    tell: Report,
    known: Mapping[str, str] | None = None,
) -> PackSchema:
    """Make the day's vocabularies and statistics, and its pack schema. `base`: pack schema, vocabularies, pending ones.

    Of rows that are made of events, `known` has SQL of all values of the catalogue by feature, and counts are of the
    day's events alone, which are the query of their tasks.

    Tables: `vocab_<index>` (value, count, id, last_day), `pending_<index>` (value, count, last_day), and, of item
    statistics, `item_totals` of all earlier days, which the day's rows see, and `totals_after` with the day.
    """
    before, vocabularies, pending = base
    train_shards = [s for s in shards if s.split == "train"]
    train = dealt(schema, scratch, train_shards)
    further = {} if known is None else further_values(con, schema, None, known)
    of_base = partial(_grow_vocabulary, vocabularies=vocabularies, pending=pending)
    grown = partial(of_base, day=day, eviction=eviction, further=further)
    counted = train if known is None else f"(SELECT * FROM {train} WHERE is_query)"
    num_ids = make_vocabularies(con, schema, counted, tell, grown)
    with_item = dealt(schema, scratch, train_shards, item=True)
    if schema.item_statistics:
        kept = _kept_items(schema) if eviction.after_days is not None else "true"
        _add_statistics(con, vocabulary_file(vocabularies, ITEM_STATISTICS), with_item, kept)
    if schema.item is not None:
        con.execute(f"CREATE TABLE seen_items AS {_seen_items(schema, with_item)}")
    if (
        before.binary_label
        and not schema.labels
        and not scalar(con, f"SELECT bool_and(label IN (0, 1)) FROM {dealt(schema, scratch, shards)}")
    ):
        raise ValueError(
            f"label {schema.label!r} has values other than 0 and 1, which the base's are: a model of clicks cannot go "
            "on with them; correct them, or prepare all days anew"
        )
    features = tuple(replace(f, num_ids=num_ids[f.table]) for f in before.features)
    return replace(before, features=features, identity=None)


def _grow_vocabulary(
    con: Connection,
    raw: RawTable,
    *,
    vocabularies: Path,
    pending: Path,
    day: int,
    eviction: Eviction,
    further: Mapping[str, Sequence[str]],
) -> int:
    """Make `vocab_<index>` and `pending_<index>` of an embedding table; returns its size, tombstones included.
    `further` has by table the values that get ids too, with a count of 0.
    """
    old = _stored(vocabulary_file(vocabularies, raw.name), "value, id, count")
    waiting = vocabulary_file(pending, raw.name)
    pending_sql = (
        _stored(waiting, "value, count")
        if waiting.exists()
        else "(SELECT '' AS value, 0 AS count, 0 AS last_day WHERE false)"
    )
    gone, young = "false", "true"
    if eviction.after_days is not None:
        gone = f"s.count IS NULL AND b.value IS NOT NULL AND {day} - b.last_day >= {eviction.after_days}"
        gone += "" if eviction.below is None else f" AND b.count < {eviction.below}"
        young = f"{day} - last_day < {eviction.after_days}"
    new = f"WHERE value NOT IN (SELECT value FROM {old} WHERE value IS NOT NULL)"
    more = "".join(f" UNION ALL SELECT value, 0 FROM ({values}) {new}" for values in further.get(raw.name, ()))
    counted = f"SELECT value, CAST(sum(count) AS BIGINT) AS count FROM (FROM ({raw.counted}){more}) GROUP BY value"
    min_count = 0 if raw.name in further else raw.min_count
    con.execute(f"""
        CREATE OR REPLACE TEMP TABLE seen AS {counted if more else raw.counted};
        CREATE TABLE vocab_{raw.index} AS
        SELECT CASE WHEN NOT gone THEN value END AS value, CASE WHEN gone THEN 0 ELSE count END AS count, id, last_day
        FROM (SELECT b.value, b.id, b.count + coalesce(s.count, 0) AS count, {gone} AS gone,
                     CASE WHEN s.count IS NULL THEN b.last_day ELSE {day} END AS last_day
              FROM {old} b LEFT JOIN seen s ON s.value = b.value);
        CREATE OR REPLACE TEMP TABLE waiting AS
        SELECT coalesce(s.value, p.value) AS value, coalesce(s.count, 0) + coalesce(p.count, 0) AS count,
               CASE WHEN s.value IS NULL THEN p.last_day ELSE {day} END AS last_day
        FROM {pending_sql} p
        FULL JOIN (SELECT * FROM seen {new}) s
        ON s.value = p.value;
        INSERT INTO vocab_{raw.index} BY NAME
        SELECT value, count, last_day, (SELECT coalesce(max(id), 0) FROM vocab_{raw.index})
               + row_number() OVER (ORDER BY count DESC, value) AS id
        FROM waiting WHERE count >= {min_count};
        CREATE TABLE pending_{raw.index} AS SELECT * FROM waiting WHERE count < {min_count} AND {young}""")
    return int(scalar(con, f"SELECT count(*) FROM vocab_{raw.index}"))


def _stored(file: Path, columns: str) -> str:
    """Return SQL of a stored vocabulary: the columns, and `last_day`, which a first pack leaves out."""
    last_day = "last_day" if "last_day" in pq.read_schema(file).names else "0 AS last_day"
    return f"(SELECT {columns}, {last_day} FROM read_parquet({only_file(file)}))"


def _kept_items(schema: DataSchema) -> str:
    """Return SQL of whether a value of the item statistics stays: NULL, which stands for all items, and what has an id
    or waits for one. Items without a vocabulary stay for good: nothing notes when they were last seen.
    """
    for index, members in enumerate(schema.tables().values()):
        if members[0].hash_buckets is None and schema.item in [f.name for f in members]:
            known = f"(SELECT value FROM vocab_{index} UNION ALL SELECT value FROM pending_{index})"
            return f"(value IS NULL OR value IN (SELECT value FROM {known} WHERE value IS NOT NULL))"
    return "true"


def _add_statistics(con: Connection, file: Path, train: str, kept: str) -> None:
    """Make `item_totals` of all earlier days, an empty `item_folds`, and `totals_after`: with the day's."""
    scale = label_scale(con, train)
    sums = f"CAST({exact_sum('CAST(label AS DOUBLE)', scale)} AS DOUBLE) / {scale!r} AS label_sum, count(*) AS count"
    con.execute(f"""
        CREATE TABLE item_totals AS
        SELECT value, label_sum, count FROM read_parquet({only_file(file)}) WHERE {kept};
        CREATE TABLE item_folds (value VARCHAR, fold INTEGER, label_sum DOUBLE, count BIGINT);
        CREATE TABLE totals_after AS
        SELECT value, sum(label_sum) AS label_sum, CAST(sum(count) AS BIGINT) AS count FROM (
            FROM item_totals UNION ALL SELECT item, {sums} FROM {train} GROUP BY item
            UNION ALL SELECT NULL, {sums} FROM {train}) GROUP BY value""")


def _seen_items(schema: DataSchema, train: str) -> str:
    """Return SQL of the items that a training row of this day or an earlier one has, as far as the base knows them."""
    if (vocabulary := item_vocabulary(schema)) is not None:
        return f"SELECT value FROM vocab_{vocabulary} WHERE value IS NOT NULL"
    known = [f"SELECT DISTINCT item AS value FROM {train}"]
    if schema.item_statistics:
        known.append("SELECT value FROM item_totals WHERE value IS NOT NULL")
    for index, members in enumerate(schema.tables().values()):
        if members[0].hash_buckets is None and schema.item in [f.name for f in members]:
            known += [f"SELECT value FROM {name}_{index} WHERE count > 0" for name in ("vocab", "pending")]
    return " UNION ".join(known)


def write_pending(con: Connection, schema: DataSchema, folder: Path) -> None:
    """Write the values that are too rare for the vocabularies, where a table has a `min_count` above 1."""
    for index, (table, features) in enumerate(schema.tables().items()):
        if features[0].hash_buckets is None and features[0].min_count > 1:
            (folder / PENDING).mkdir(parents=True, exist_ok=True)
            query = f"""SELECT CAST(value AS VARCHAR) AS value, CAST(count AS BIGINT) AS count,
                               CAST(last_day AS INTEGER) AS last_day FROM pending_{index}
                        ORDER BY CAST(value AS VARCHAR)"""
            write_ordered(con, query, vocabulary_file(folder / PENDING, table))


def tombstones(con: Connection, schema: DataSchema, pack_schema: PackSchema) -> dict[str, npt.NDArray[np.bool_]]:
    """Return feature -> bool [num_ids], true for the ids that stand for nothing; features without any are left out."""
    out: dict[str, npt.NDArray[np.bool_]] = {}
    for index, (table, features) in enumerate(schema.tables().items()):
        if features[0].hash_buckets is None:
            ids = con.execute(f"SELECT id FROM vocab_{index} WHERE value IS NULL").fetchnumpy()["id"]
            gone = np.zeros(next(f.num_ids for f in pack_schema.features if f.table == table), bool)
            gone[ids] = True
            out |= {f.name: gone for f in features if len(ids)}
    return out


# ---------------------------------------------------------------------------------------------- drift


def drift(
    con: Connection, schema: DataSchema, before: PackSchema, scratch: Path, shards: Sequence[ShardJob]
) -> dict[str, Any]:
    """Return how the day's rows differ from what the base's means and deviations were made of.

    `numeric`: column -> the day's mean, as a distance from the base's in units of its deviation, and its deviation in
    these units. `label_mean`: the base's, and that of the day's training rows.
    """
    rows = dealt(schema, scratch, shards, item=schema.item_statistics)
    found = [
        moment
        for part in batched(list(enumerate(numeric_values(con, schema))))
        for moment in moments_of(con, rows, dict.fromkeys(statistics_join(schema, i) for i, _ in part), part)
    ]
    numeric = {
        column.name: {"mean": (mean - column.mean) / column.std, "std": std / column.std}
        for column, (mean, std) in zip(before.numeric, found, strict=True)
    }
    train = dealt(schema, scratch, [s for s in shards if s.split == "train"])
    return {"numeric": numeric, "label_mean": {"base": before.label_mean, "day": mean_label(con, train)}}


class UnknownCounts:
    """Counts the values of the day's rows that the base has no id for, feature by feature."""

    def __init__(self, before: PackSchema) -> None:
        self._sizes = {f.name: f.num_ids for f in before.features}
        self._one_valued = [f.name for f in before.features if f.kind == "categorical"]
        self._counts = {name: [0, 0] for name in self._sizes}

    def add(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Count the values of a shard's new rows."""
        for name, size in self._sizes.items():
            known = self._one_valued
            ids = arrays["ids"][:, known.index(name)] if name in known else arrays[f"{name}.values"]
            unknown = (ids == OOV) | (ids >= size)
            self._counts[name][0] += int(unknown.sum())
            self._counts[name][1] += len(ids)

    def shares(self) -> dict[str, float]:
        """Return feature -> share of its values."""
        return {name: unknown / max(1, of) for name, (unknown, of) in self._counts.items()}
