"""Stage 5 of `prepare` makes arrays of checked rows. `encoder` does it for raw rows of a trained run, by the same code,
so that a value means the same in training and in serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gmeta.data.item_vectors import DTYPE, ItemVectors, array_name
from gmeta.data.prepare.columns import COLUMNS_A_QUERY, batched, label_columns
from gmeta.data.prepare.slices import ids_of_slices, sliced_features
from gmeta.data.prepare.vocabulary import HashedVocabulary, numeric_values, statistics_join
from gmeta.data.raw_columns import RawFeature
from gmeta.data.schema import OOV, DataSchema, NumericColumn, NumericSequence, PackSchema, Vector
from gmeta.data.sources import Connection, literal, md5_64, scalar

Array = npt.NDArray[Any]

LARGEST = float(np.finfo(np.float32).max)
"""A number far outside the training rows' range can pass this when it is divided by their deviation."""
_CELLS_IN_MEMORY = 1 << 20
"""So many raw values are looked up by Arrow. To plan 32 joins takes DuckDB 45 ms, whatever the rows; above this number
of values the joins themselves take longer, and they need less memory."""


def looked_up_in(tables: Sequence[str], feature: RawFeature) -> str:
    """Return the relation of values and ids: `vocab_<index>` of a table, or `texts_<index>` of one of texts."""
    return f"{'texts' if feature.text else 'vocab'}_{tables.index(feature.table)}"


def _id(
    schema: DataSchema,
    feature: RawFeature,
    value: str,
    vocab: tuple[str, str],
    hashed: Mapping[str, HashedVocabulary] | None,
) -> tuple[str, str]:
    """Return SQL of a value's id, or of what `HashedVocabulary` takes for it, and the JOIN clause that it needs.

    `vocab` is the table of the vocabulary, and what it is called in the query.
    """
    if feature.hash_buckets is not None:
        seed = literal(f"{schema.hash_seed}|{feature.table}")
        bucket = f"1 + {md5_64(seed, value)} % {feature.hash_buckets}"
        return f"CAST(CASE WHEN {value} IS NULL THEN {OOV} ELSE {bucket} END AS INTEGER)", ""
    if hashed is not None and not feature.text:
        return hashed[feature.table].hash_of(value), ""
    table, alias = vocab
    join = f"LEFT JOIN {table} {alias} ON {alias}.value = {value}"
    return f"CAST(coalesce({alias}.id, {OOV}) AS INTEGER)", join


def encode(
    con: Connection,
    relation: str,
    schema: DataSchema,
    stored: PackSchema,
    order: str,
    more: Sequence[str] = (),
    hashed: Mapping[str, HashedVocabulary] | None = None,
    item_vectors: Mapping[str, ItemVectors] | None = None,
) -> dict[str, Array]:
    """Encode the checked rows of `relation` in the total order `order`, SQL expressions over `relation` as b.

    Values are looked up in the relations of `looked_up_in` or, but for texts, in `hashed` by table where it is given.

    `relation` has the columns of `checked`, and `fold` (NULL outside training tasks) where the schema asks for item
    statistics; of some lists it may have slices. Numbers become those that `stored` says. Returns `ids` int32
    [rows, one-valued features], `dense` float32 [rows, F], `<name>.values` and `<name>.offsets` int64 [rows + 1] of
    every many-valued feature (int32) and numeric sequence (float32), every vector [rows, dim] that is kept by row, and
    the columns of `relation` named in `more`. With `item_vectors` those that are kept by item come too, by id where a
    row has none.
    """
    tables, labels = list(schema.tables()), label_columns(schema)
    # name, value, join; a number that a row lacks is NaN
    columns_sql: list[tuple[str, str, str]] = [
        (name, f"coalesce(b.{name}, 'nan'::FLOAT)" if schema.labels and name in labels else f"b.{name}", "")
        for name in more
    ]
    looked_up = [i for i, f in enumerate(schema.features) if f.kind == "categorical" and f.hash_buckets is None]
    found: dict[str, Array] = {}
    if hashed is None and _in_memory(con, relation, looked_up):
        found |= _look_up(con, relation, schema, looked_up, order)
    sliced = sliced_features(con) if hashed is None else frozenset()
    columns_sql += [(f"start{i}", f"b.f{i}.start", "") for i in sorted(sliced)]
    for i, feature in enumerate(schema.features):
        if feature.kind != "categorical":
            columns_sql.append((f"f{i}", f"b.f{i}.length" if i in sliced else f"len(b.f{i})", ""))
        elif f"f{i}" not in found:
            vocab = (looked_up_in(tables, feature), f"v{i}")
            columns_sql.append((f"f{i}", *_id(schema, feature, f"b.f{i}", vocab, hashed)))
    columns_sql += [(f"s{i}", f"len(b.s{i})", "") for i in range(len(schema.numeric_sequence))]
    values = numeric_values(con, schema)
    for j, (value, column) in enumerate(zip(values, stored.numeric, strict=True)):
        columns_sql.append((f"n{j}", _scaled(value, column), statistics_join(schema, j)))
    for part in batched(columns_sql):
        select = ", ".join(f"{value} AS {name}" for name, value, _ in part)
        joins = " ".join(dict.fromkeys(join for _, _, join in part))
        found |= con.execute(f"SELECT {select} FROM {relation} b {joins} ORDER BY {order}").fetchnumpy()
    if hashed is not None:
        of_hashes = [i for i in looked_up if not schema.features[i].text]
        found |= {f"f{i}": hashed[schema.features[i].table].ids_of(found[f"f{i}"]) for i in of_hashes}
    rows = len(next(iter(found.values())))
    arrays: dict[str, Array] = {"ids": np.empty((rows, 0), np.int32), "dense": np.empty((rows, 0), np.float32)}
    ids = [found[f"f{i}"] for i, f in enumerate(schema.features) if f.kind == "categorical"]
    dense = [found[f"n{j}"] for j in range(len(values))]
    arrays |= {name: np.stack(stack, 1) for name, stack in (("ids", ids), ("dense", dense)) if stack}
    arrays |= _lists(con, relation, schema, order, hashed, found)
    for i, sequence in enumerate(stored.numeric_sequence):
        arrays[f"{sequence.name}.offsets"] = _offsets(found[f"s{i}"])
        arrays[f"{sequence.name}.values"] = _list_numbers(con, relation, i, sequence, order)
    arrays |= _vectors(con, relation, stored, order, arrays["ids"], item_vectors)
    return arrays | {name: np.asarray(found[name]) for name in more}


def _lists(
    con: Connection,
    relation: str,
    schema: DataSchema,
    order: str,
    hashed: Mapping[str, HashedVocabulary] | None,
    found: Mapping[str, Array],
) -> dict[str, Array]:
    """Return values and offsets of the many-valued features, whose lengths, and starts of slices, were `found`."""
    arrays, tables = {}, list(schema.tables())
    for i, feature in enumerate(schema.features):
        if feature.kind != "categorical":
            length, vocab = found[f"f{i}"], looked_up_in(tables, feature)
            arrays[f"{feature.name}.offsets"] = _offsets(length)
            arrays[f"{feature.name}.values"] = (
                ids_of_slices(con, i, vocab, found[f"start{i}"], length)
                if f"start{i}" in found
                else _list_ids(con, relation, schema, i, vocab, order, hashed)
            )
    return arrays


def _offsets(length: Array) -> Array:
    return np.concatenate([[0], np.cumsum(length)]).astype(np.int64)


def take_labels(schema: DataSchema, arrays: dict[str, Array]) -> Array:
    """Take the labels out of encoded columns: [rows], or [rows, labels] where there are several."""
    columns = [arrays.pop(name) for name in label_columns(schema)]
    return np.stack(columns, 1) if schema.labels else columns[0]


def _vectors(
    con: Connection,
    relation: str,
    stored: PackSchema,
    order: str,
    ids: Array,
    item_vectors: Mapping[str, ItemVectors] | None,
) -> dict[str, Array]:
    """Return the vectors of rows, and with `item_vectors` those of items too."""
    arrays = {}
    for i, vector in enumerate(stored.vector):
        if vector.owner == "row" or item_vectors is not None:
            query = f"SELECT v{i} AS vector FROM {relation} b ORDER BY {order}"
            given = con.sql(query).to_arrow_table()["vector"].combine_chunks()
            arrays[array_name(vector.name)] = with_item_vectors(vector, given, ids, stored, item_vectors or {})
    return arrays


def with_item_vectors(
    vector: Vector, given: pa.Array, ids: Array, stored: PackSchema, item_vectors: Mapping[str, ItemVectors]
) -> Array:
    """Return a list column as [rows, dim], where it is NULL the vectors of the items of `ids` [rows, one-valued]."""
    out = np.zeros((len(given), vector.dim), DTYPE[vector.dtype])
    there = given.is_valid().to_numpy(zero_copy_only=False)
    out[there] = given.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, vector.dim)
    if not there.all():
        column = [f.name for f in stored.features if f.kind == "categorical"].index(str(stored.item))
        items = ids[~there, column]
        known = np.where(items < stored.feature(str(stored.item)).num_ids, items, OOV)  # beyond are texts
        out[~there] = item_vectors[vector.name].rows(known)
    return out


def _scaled(value: str, column: NumericColumn | NumericSequence) -> str:
    """Return SQL of a number as it is stored: standardised, within float32, 0 where it is missing."""
    scaled = f"coalesce(({value} - {column.mean!r}) / {column.std!r}, 0)"
    return f"CAST(greatest({-LARGEST!r}, least({LARGEST!r}, {scaled})) AS FLOAT)"


def _list_numbers(con: Connection, relation: str, index: int, column: NumericSequence, order: str) -> Array:
    elements = f"SELECT *, unnest(s{index}) AS value, generate_subscripts(s{index}, 1) AS place FROM {relation}"
    value = _scaled("ln(1 + b.value)" if column.log else "b.value", column)
    query = f"SELECT {value} AS number FROM ({elements}) b ORDER BY {order}, b.place"
    return np.asarray(con.execute(query).fetchnumpy()["number"], np.float32)


def _in_memory(con: Connection, relation: str, features: Sequence[int]) -> bool:
    """Return whether features are looked up by Arrow: few joins are planned in no time, many values need memory."""
    if len(features) <= COLUMNS_A_QUERY // 4:
        return False
    rows = int(scalar(con, f"SELECT count(*) FROM {relation}"))
    return rows * len(features) <= _CELLS_IN_MEMORY


def _look_up(
    con: Connection, relation: str, schema: DataSchema, features: Sequence[int], order: str
) -> dict[str, Array]:
    """Return the ids of one-valued features, as the join with their vocabularies gives them."""
    tables = list(schema.tables())
    raw = con.sql(f"SELECT {', '.join(f'f{i}' for i in features)} FROM {relation} b ORDER BY {order}").to_arrow_table()
    found = {}
    for i in features:
        vocab = con.sql(f"SELECT value, id FROM {looked_up_in(tables, schema.features[i])}").to_arrow_table()
        place = pc.index_in(raw[f"f{i}"], value_set=vocab["value"].combine_chunks(), skip_nulls=True)
        ids = np.append(vocab["id"].to_numpy(), OOV).astype(np.int32)
        found[f"f{i}"] = ids[pc.fill_null(place, len(vocab)).to_numpy()]
    return found


def _list_ids(
    con: Connection,
    relation: str,
    schema: DataSchema,
    index: int,
    vocab: str,
    order: str,
    hashed: Mapping[str, HashedVocabulary] | None,
) -> Array:
    feature = schema.features[index]
    found, join = _id(schema, feature, "b.value", (vocab, "v"), hashed)
    elements = f"SELECT *, unnest(f{index}) AS value, generate_subscripts(f{index}, 1) AS place FROM {relation}"
    query = f"SELECT {found} AS id FROM ({elements}) b {join} ORDER BY {order}, b.place"
    ids: Array = con.execute(query).fetchnumpy()["id"]
    if hashed is not None and feature.hash_buckets is None and not feature.text:
        return hashed[feature.table].ids_of(ids)
    return ids.astype(np.int32)
