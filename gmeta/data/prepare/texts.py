"""A part of stage 4 of `prepare`: texts that are in no vocabulary get ids too, behind those of the vocabulary.

An embedding row needs training rows, and a text can be read without: so that items without a training row have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.data.prepare.deal import dealt
from gmeta.data.prepare.tasks import ShardJob
from gmeta.data.prepare.vocabulary import HashedVocabulary, counted_values, files_of_values
from gmeta.data.schema import OOV, DataSchema, PackSchema
from gmeta.data.sources import Connection, identifier, only_file, scalar
from gmeta.data.text_tables import further_texts_file

Array = NDArray[Any]


def find_older_texts(con: Connection, schema: DataSchema, before: PackSchema, vocabularies: Path) -> None:
    """Make `older_texts_<index>` (value, id) of each table of texts: those without a row that the history reads, with
    the ids that it has of them. `vocabularies` are the base's, and `before` is its schema.
    """
    there = scalar(con, "SELECT count(*) FROM duckdb_views() WHERE view_name = 'history'")
    one = [f.name for f in before.features if f.kind == "categorical"]
    for index, (table, features) in enumerate(schema.tables().items()):
        if not features[0].text:
            continue
        used = "SELECT 0 AS id WHERE false"
        if there:
            kept = """(SELECT h.* FROM history h JOIN known_tasks k USING (key)
                       WHERE h.place >= k.num_history - k.num_known)"""
            columns = [
                f"ids[{one.index(f.name) + 1}]" if f.name in one else f"unnest({identifier(f'{f.name}.values')})"
                for f in features
            ]
            used = " UNION ".join(f"SELECT {column} AS id FROM {kept}" for column in columns)
        files = ", ".join(map(only_file, files_of_values(vocabularies, table)))
        con.execute(f"""
            CREATE TABLE older_texts_{index} AS
            SELECT t.value, t.id FROM read_parquet([{files}], union_by_name=true) t JOIN ({used}) u USING (id)
            WHERE t.value IS NOT NULL AND (t.id >= {before.feature(features[0].name).num_ids}
                                           OR t.id IN (SELECT id FROM vocab_{index} WHERE value IS NULL))""")


def ids_today(con: Connection, schema: DataSchema, before: PackSchema, gone: Mapping[str, Array]) -> dict[str, Array]:
    """Return feature -> the id that each id of the base's rows has today, int64 [ids]; features whose ids all stay are
    left out. `gone` says which stand for nothing: of these, texts that the history reads have ids of texts alone.
    """
    out = {name: np.where(flags, OOV, np.arange(len(flags))) for name, flags in gone.items()}
    for index, features in enumerate(schema.tables().values()):
        if not features[0].text:
            continue
        found = con.execute(f"""SELECT o.id AS before, t.id AS now
                                FROM older_texts_{index} o JOIN texts_{index} t USING (value)""").fetchnumpy()
        for feature in features if len(found["now"]) else ():
            stored = before.feature(feature.name)
            ids = np.zeros(max(stored.num_ids, stored.num_texts or 0), np.int64)
            ids[: stored.num_ids] = out.get(feature.name, np.arange(stored.num_ids))[: stored.num_ids]
            ids[found["before"]] = found["now"]
            out[feature.name] = ids
    return out


def learn_texts(
    con: Connection,
    schema: DataSchema,
    pack_schema: PackSchema,
    scratch: Path,
    shards: Sequence[ShardJob],
    *,
    goes_on: bool = False,
    known: Mapping[str, str] | None = None,
) -> PackSchema:
    """Make `further_texts_<index>` (value, id) of each table of texts, sorted, of what these shards hold and its
    vocabulary does not, and view `texts_<index>` of both. Return the pack schema with the numbers of texts. A day that
    `goes_on` has those of `find_older_texts` too, and `known` has SQL of further texts by feature.
    """
    num_texts: dict[str, int] = {}
    for index, (table, features) in enumerate(schema.tables().items()):
        if not features[0].text:
            continue
        num_ids = pack_schema.feature(features[0].name).num_ids
        vocabulary = f"(SELECT value, id FROM vocab_{index} WHERE value IS NOT NULL)"
        values = f"SELECT value FROM ({counted_values(con, schema, features, dealt(schema, scratch, shards))})"
        values += f" UNION SELECT value FROM older_texts_{index}" if goes_on else ""
        values += "".join(f" UNION {query}" for f in features if (query := (known or {}).get(f.name)))
        con.execute(f"""
            CREATE TABLE further_texts_{index} AS
            SELECT value, {num_ids} - 1 + row_number() OVER (ORDER BY CAST(value AS VARCHAR)) AS id
            FROM ({values})
            ANTI JOIN {vocabulary} USING (value);
            CREATE VIEW texts_{index} AS FROM {vocabulary} UNION ALL FROM further_texts_{index}""")
        num_texts[table] = num_ids + int(scalar(con, f"SELECT count(*) FROM further_texts_{index}"))
    found = (replace(feature, num_texts=num_texts.get(feature.table)) for feature in pack_schema.features)
    return replace(pack_schema, features=tuple(found))


def place_texts(
    con: Connection, schema: DataSchema, stored: PackSchema, relation: str, known: Mapping[str, HashedVocabulary]
) -> dict[str, list[str]]:
    """Make `texts_<index>` (value, id) of each table of texts, of what a relation of raw rows holds. Return table ->
    the texts that are not `known`, whose ids go on from the number of texts.
    """
    new: dict[str, list[str]] = {}
    for index, (table, features) in enumerate(schema.tables().items()):
        if not features[0].text:
            continue
        values = f"({counted_values(con, schema, features, relation)})"
        query = f"SELECT value, {known[table].hash_of('value')} AS hash FROM {values} ORDER BY value"
        found = con.sql(query).to_arrow_table()
        ids = known[table].ids_of(found["hash"].to_numpy())
        unknown = ids == OOV
        num_texts = stored.feature(features[0].name).num_texts
        assert num_texts is not None, "the schemas of a run are of one pack"
        ids[unknown] = num_texts + np.arange(int(unknown.sum()))
        con.register("placed_texts", pa.table({"value": found["value"], "id": ids}))
        con.execute(f"CREATE TEMP TABLE texts_{index} AS SELECT value, id FROM placed_texts")
        con.unregister("placed_texts")
        new[table] = found["value"].filter(pa.array(unknown)).to_pylist()
    return new


def write_further_texts(con: Connection, schema: DataSchema, directory: Path) -> None:
    """Write the texts that are in no vocabulary to a directory of vocabularies, where a table has some."""
    for index, (table, features) in enumerate(schema.tables().items()):
        if features[0].text and scalar(con, f"SELECT count(*) FROM further_texts_{index}"):
            query = f"SELECT CAST(value AS VARCHAR) AS value, id FROM further_texts_{index} ORDER BY id"
            pq.write_table(con.sql(query).to_arrow_table(), further_texts_file(directory, table))
