"""Stage 4 of `prepare` learns vocabularies, item statistics, means and deviations, all from training rows alone.

They are tables of the connection (`vocab_<index of the embedding table>`, `item_totals`, `item_folds`), which `encode`
looks values up in. `encoder` loads those of a trained run, the vocabularies as hashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from gmeta.data.identity import vocabulary_file
from gmeta.data.prepare.columns import batched, label_columns
from gmeta.data.prepare.deal import dealt, item_vocabulary
from gmeta.data.prepare.slices import counted_slices, sliced_features
from gmeta.data.prepare.summary import Report
from gmeta.data.prepare.tasks import FOLDS, ShardJob
from gmeta.data.raw_columns import RawFeature
from gmeta.data.schema import ITEM_STATISTICS, OOV, DataSchema, Feature, NumericColumn, NumericSequence, PackSchema
from gmeta.data.sources import Connection, only_file, scalar
from gmeta.data.text_tables import further_texts_file

PRIOR_ROWS = 10.0
"""An item's mean label is smoothed with so many rows of the global mean."""
SALTS = 8
"""Two of a hundred million values have one hash once in 3,700 vocabularies; a second salt then parts them."""


@dataclass(frozen=True)
class RawTable:
    """An embedding table whose vocabulary is to be made."""

    index: int  # among the tables of the schema
    name: str
    min_count: int
    counted: str  # SQL of value and count


def learn(
    con: Connection,
    schema: DataSchema,
    scratch: Path,
    shards: Sequence[ShardJob],
    tell: Report,
    known: Mapping[str, str] | None = None,
) -> PackSchema:
    """Make vocabularies and statistics from training rows, and the pack schema. `known` has SQL of further values by
    feature, which get ids where its vocabulary is of all values.
    """
    train_shards = [s for s in shards if s.split == "train"]
    train = dealt(schema, scratch, train_shards)
    rest = [s for s in shards if s.split != "train"]
    further = further_values(con, schema, dealt(schema, scratch, rest) if rest else None, known or {})
    num_ids = make_vocabularies(con, schema, train, tell, partial(_make_vocabulary, further=further))
    with_item = dealt(schema, scratch, train_shards, item=True)
    if (vocabulary := item_vocabulary(schema)) is not None:
        con.execute(f"CREATE VIEW seen_items AS SELECT value FROM vocab_{vocabulary}")
    elif schema.item is not None:
        con.execute(f"CREATE TABLE seen_items AS SELECT DISTINCT item AS value FROM {with_item}")
    if schema.item_statistics:
        _item_statistics(con, with_item)
    return PackSchema(
        features=tuple(
            Feature(name=f.name, kind=f.kind, num_ids=num_ids[f.table], table=f.table, pooling=f.pooling)
            for f in schema.features
        ),
        numeric=_numeric_columns(con, schema, with_item if schema.item_statistics else train),
        label=schema.label,
        binary_label=schema.labels[0].loss == "bce"
        if schema.labels
        else scalar(con, f"SELECT bool_and(label IN (0, 1)) FROM {dealt(schema, scratch, shards)}"),
        task=schema.task,
        item=schema.item,
        time=schema.time,
        label_mean=mean_label(con, train),
        weight=schema.weight,
        scenario=schema.scenario,
        labels=tuple(
            replace(label, mean=mean_label(con, train, name))
            for name, label in zip(label_columns(schema), schema.labels, strict=False)
        ),
        numeric_sequence=_numeric_sequences(con, schema, train),
        vector=schema.vector,
    )


def make_vocabularies(
    con: Connection, schema: DataSchema, train: str, tell: Report, make: Callable[[Connection, RawTable], int]
) -> dict[str, int]:
    """Make table `vocab_<index>` (value, count, id) of every embedding table; returns their numbers of ids by name.

    `make` makes one of them, of the values in a relation, and returns its size.
    """
    tables = list(enumerate(schema.tables().items()))
    num_ids = {}
    con.execute("BEGIN")  # one commit, not one for each vocabulary
    for some in batched(tables):
        source = train
        if len(tables) > len(some):  # a query a vocabulary over files of all columns grows with their square
            columns = [f"f{schema.features.index(f)}" for _, (_, features) in some for f in features]
            con.execute(f"CREATE OR REPLACE TEMP TABLE some_columns AS SELECT {', '.join(columns)} FROM {train}")
            source = "some_columns"
        for index, (table, features) in some:
            tell("building vocabularies", index, len(tables))
            first = features[0]
            raw = RawTable(index, table, first.min_count, counted_values(con, schema, features, source))
            num_ids[table] = 1 + (first.hash_buckets or make(con, raw))
    con.execute("DROP TABLE IF EXISTS some_columns; COMMIT")
    tell("building vocabularies", len(tables), len(tables))
    return num_ids


def counted_values(con: Connection, schema: DataSchema, features: Sequence[RawFeature], source: str) -> str:
    """Return SQL of value and count: how often `source` holds each value that `features` have."""
    sliced, parts = sliced_features(con), []
    for feature in features:
        i = schema.features.index(feature)
        value = f"f{i}" if feature.kind == "categorical" else f"unnest(f{i})"
        parts.append(counted_slices(i, source) if i in sliced else f"SELECT {value} AS value, 1 AS n FROM {source}")
    return f"""SELECT value, CAST(sum(n) AS BIGINT) AS count FROM ({" UNION ALL ".join(parts)})
               WHERE value IS NOT NULL GROUP BY value"""


def further_values(
    con: Connection, schema: DataSchema, rest: str | None, known: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return table -> SQL of the values that get ids besides those of training rows: what `rest`, a relation of other
    rows, holds of a table whose vocabulary is of all values, and what is `known` of its features.
    """
    out: dict[str, list[str]] = {}
    for table, features in schema.tables().items():
        if features[0].vocabulary == "all":
            rows = [] if rest is None else [f"SELECT value FROM ({counted_values(con, schema, features, rest)})"]
            out[table] = rows + [known[f.name] for f in features if f.name in known]
    return out


def _make_vocabulary(con: Connection, raw: RawTable, further: Mapping[str, list[str]]) -> int:
    """Make `vocab_<index>` of an embedding table, and `pending_<index>` of the values that are too rare for it.
    `further` has by table the values that get ids too, with a count of 0.
    """
    counted = f"({raw.counted})"
    if raw.name in further:
        more = "".join(f" UNION ALL SELECT value, 0 FROM ({values})" for values in further[raw.name])
        counted = f"""(SELECT value, CAST(sum(count) AS BIGINT) AS count FROM (SELECT * FROM {counted}{more})
                       GROUP BY value)"""
    if raw.min_count > 1:
        con.execute(f"CREATE OR REPLACE TEMP TABLE counted AS {raw.counted}")
        con.execute(f"""CREATE TABLE pending_{raw.index} AS SELECT value, count, 0 AS last_day FROM counted
                        WHERE count < {raw.min_count}""")
        counted = "counted"
    ((size,),) = con.execute(f"""
        CREATE TABLE vocab_{raw.index} AS SELECT value, count,
            row_number() OVER (ORDER BY count DESC, CAST(value AS VARCHAR)) AS id
        FROM {counted}{"" if raw.name in further else f" WHERE count >= {raw.min_count}"}""").fetchall()
    return int(size)


def mean_label(con: Connection, train: str, label: str = "label") -> float:
    """Return the mean training label, the same bits whatever order the rows come in."""
    scale = label_scale(con, train, label)
    query = f"SELECT {exact_sum(f'CAST({label} AS DOUBLE)', scale)}, count({label}) FROM {train}"
    total, count = con.execute(query).fetchall()[0]
    return float(total or 0) / scale / max(int(count), 1)


def _item_statistics(con: Connection, train: str) -> None:
    """Make tables `item_folds` and `item_totals`: rows and label sum of every item (NULL: all items)."""
    scale = label_scale(con, train)
    con.execute(f"""
        CREATE TABLE item_sums AS SELECT item AS value, fold, {exact_sum("CAST(label AS DOUBLE)", scale)} AS total,
            count(*) AS count FROM {train} GROUP BY ALL""")
    sums = f"CAST(sum(total) AS DOUBLE) / {scale!r} AS label_sum, CAST(sum(count) AS BIGINT) AS count FROM item_sums"
    con.execute(f"CREATE TABLE item_folds AS SELECT value, fold, {sums} GROUP BY value, fold")
    con.execute(f"""CREATE TABLE item_totals AS SELECT value, {sums} GROUP BY value
                    UNION ALL SELECT NULL, {sums}""")


def label_scale(con: Connection, train: str, label: str = "label") -> float:
    """Return the power of two by which labels become integers whose sums are exact."""
    return _fixed_point(float(scalar(con, f"SELECT max(abs(CAST({label} AS DOUBLE))) FROM {train}") or 0.0))


def _fixed_point(largest: float | None) -> float:
    """Return the power of two that makes integers of 52 bits of values up to `largest`: their sums are exact."""
    return 2.0 ** min(52 - math.frexp(largest)[1], 1000) if largest else 1.0


def exact_sum(value: str, scale: float) -> str:
    """Return SQL of the sum of a value, in integers of 1 / scale: the same bits whatever order the rows come in."""
    return f"sum(CAST(round({value} * {scale!r}) AS BIGINT))"


def _numeric_columns(con: Connection, schema: DataSchema, train: str) -> tuple[NumericColumn, ...]:
    """Return mean and standard deviation of every numeric column over the training rows that have it."""
    values = numeric_values(con, schema)
    logs = [c.log for c in schema.numeric] + [False] * (len(values) - len(schema.numeric))
    moments = [
        moment
        for part in batched(list(enumerate(values)))
        for moment in moments_of(con, train, dict.fromkeys(statistics_join(schema, i) for i, _ in part), part)
    ]
    return tuple(
        NumericColumn(name=name, mean=mean, std=std, log=log)
        for name, (mean, std), log in zip(schema.numeric_names(), moments, logs, strict=True)
    )


def _numeric_sequences(con: Connection, schema: DataSchema, train: str) -> tuple[NumericSequence, ...]:
    """Return mean and standard deviation of every numeric sequence over the values of training rows."""
    found = []
    for i, column in enumerate(schema.numeric_sequence):
        values = f"(SELECT unnest(s{i}) AS value FROM {train})"
        ((mean, std),) = moments_of(con, values, (), [(i, "ln(1 + value)" if column.log else "value")])
        found.append(NumericSequence(name=column.name, aligned=column.aligned, mean=mean, std=std, log=column.log))
    return tuple(found)


def moments_of(
    con: Connection, train: str, joins: Iterable[str], columns: Sequence[tuple[int, str]]
) -> list[tuple[float, float]]:
    """Return mean and standard deviation (1 where it is 0) of SQL expressions, by sums that do not depend on order."""
    relation, values = f"{train} b {' '.join(joins)}", [value for _, value in columns]

    def one_row(expressions: list[str]) -> list[Any]:
        return list(con.execute(f"SELECT {', '.join(expressions)} FROM {relation}").fetchall()[0])

    def means_of(values: list[str], scales: list[float]) -> list[float]:
        sums = one_row([exact_sum(value, scale) for value, scale in zip(values, scales, strict=True)])
        return [float(total or 0) / scale / max(n, 1) for total, scale, n in zip(sums, scales, counts, strict=True)]

    found = one_row([f"count({value})" for value in values] + [f"max(abs({value}))" for value in values])
    counts, largest = found[: len(values)], [float(x or 0) for x in found[len(values) :]]
    means = means_of(values, [_fixed_point(x) for x in largest])
    squares = [f"(({value}) - {mean!r}) * (({value}) - {mean!r})" for value, mean in zip(values, means, strict=True)]
    variances = means_of(squares, [_fixed_point((2 * x) ** 2) for x in largest])
    return [(mean, math.sqrt(variance) or 1.0) for mean, variance in zip(means, variances, strict=True)]


def numeric_values(con: Connection, schema: DataSchema) -> list[str]:
    """Return SQL of the numeric columns before standardisation, over a relation b and what `statistics_join` joins."""
    values = [f"ln(1 + n{i})" if c.log else f"n{i}" for i, c in enumerate(schema.numeric)]
    if schema.item_statistics:
        mean = scalar(con, "SELECT label_sum / count FROM item_totals WHERE value IS NULL")
        total, count = (
            "(coalesce(t.label_sum, 0) - coalesce(o.label_sum, 0))",
            "(coalesce(t.count, 0) - coalesce(o.count, 0))",
        )
        values.append(f"({total} + {PRIOR_ROWS * mean!r}) / ({count} + {PRIOR_ROWS!r})")
        # A training row sees the other folds only; scaled up, its count means what it means elsewhere.
        values.append(f"ln(1 + {count} * CASE WHEN b.fold IS NULL THEN 1 ELSE {FOLDS / (FOLDS - 1)!r} END)")
    return values


def statistics_join(schema: DataSchema, column: int) -> str:
    """Return the JOIN clause that stored numeric column number `column` needs: item statistics need their tables."""
    if column < len(schema.numeric):
        return ""
    return """LEFT JOIN item_totals t ON t.value = b.item
              LEFT JOIN item_folds o ON o.value = b.item AND o.fold = b.fold"""


def vocabulary_files(schema: DataSchema, vocab_dir: Path) -> list[Path]:
    """Return the files that `load_vocabularies` reads."""
    tables = [table for table, features in schema.tables().items() if features[0].hash_buckets is None]
    files = [vocabulary_file(vocab_dir, name) for name in [*tables, *[ITEM_STATISTICS] * schema.item_statistics]]
    return files + [file for table in tables if (file := further_texts_file(vocab_dir, table)).exists()]


@dataclass(frozen=True)
class HashedVocabulary:
    """A vocabulary of which only 64-bit hashes are in memory, 12 bytes a value whatever its length.

    All hashes of its values differ. A value that it does not hold is taken for one that it does with a probability of
    (number of values) / 2^64.
    """

    salt: int
    hashes: NDArray[np.uint64]  # ascending
    ids: NDArray[np.int32]

    def hash_of(self, value: str) -> str:
        """Return SQL of the hash of a VARCHAR."""
        return f"hash({value}, {self.salt})"

    def ids_of(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return the ids of hashed values, the out-of-vocabulary id for others; of a missing value's hash too."""
        if not len(self.hashes):
            return np.full(len(hashes), OOV, np.int32)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[place] == hashes, self.ids[place], OOV).astype(np.int32)


def load_vocabularies(con: Connection, schema: DataSchema, vocab_dir: Path) -> dict[str, HashedVocabulary]:
    """Load what `encode` looks values up in from a run's vocabulary directory; returns the vocabularies by table.

    Raises ValueError for a file that is missing or damaged, with its name.
    """
    found = {}
    for table, features in schema.tables().items():
        if features[0].hash_buckets is None:
            with _loading(*files_of_values(vocab_dir, table)) as source:
                found[table] = hashed_vocabulary(con, source)
    if schema.item_statistics:
        with _loading(vocabulary_file(vocab_dir, ITEM_STATISTICS)) as source:
            con.execute(f"CREATE TABLE item_totals AS SELECT value, label_sum, count FROM {source}")
        con.execute("CREATE TABLE item_folds (value VARCHAR, fold INTEGER, label_sum DOUBLE, count BIGINT)")
    return found


def hashed_vocabulary(con: Connection, source: str) -> HashedVocabulary:
    """Hash the values of a vocabulary with the first salt by which all of them differ; evicted ones have no value.

    ValueError where no salt is found: then a value stands there twice.
    """
    for salt in range(SALTS):
        found = con.execute(
            f"SELECT hash(value, {salt}) AS hash, id FROM {source} WHERE value IS NOT NULL ORDER BY hash"
        ).fetchnumpy()
        hashes = found["hash"]
        if (hashes[1:] != hashes[:-1]).all():
            return HashedVocabulary(salt, hashes, found["id"].astype(np.int32))
    raise ValueError(f"{source} holds a value twice: copy it again from the pack, or train again")


def files_of_values(vocab_dir: Path, table: str) -> list[Path]:
    """Return the files that say which value of a table has which id: its vocabulary, and its further texts."""
    further = further_texts_file(vocab_dir, table)
    return [vocabulary_file(vocab_dir, table), *[further] * further.exists()]


@contextmanager
def _loading(*files: Path) -> Iterator[str]:
    """Give SQL that reads files of one kind, and turn what DuckDB cannot read of them into a ValueError."""
    try:
        yield f"read_parquet([{', '.join(map(only_file, files))}], union_by_name=true)"
    except duckdb.Error as error:
        cure = "copy it again from the pack, or train again"
        raise ValueError(f"{' or '.join(map(str, files))} is missing or damaged ({error}): {cure}") from None
