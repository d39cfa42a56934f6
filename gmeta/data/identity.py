"""The identity of data: what must be equal for two packs to mean the same by an id or a number.

An id is a position in a vocabulary or a seeded hash, and a number is a distance from a mean. Neither means anything
without them. Two packs of equal sizes therefore look alike, and a model reads the wrong one without complaint. The
identity of data is the pack schema, with the means and deviations of its numeric columns. For each embedding table it
has a checksum of the vocabulary (values and order) or the hash seed. The item statistics have a checksum too. A pack's
manifest and a run's schema.json record it (`PackSchema.identity`). Where it was not recorded, it is computed from the
files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from gmeta.data.schema import ITEM_STATISTICS, OOV, PackSchema
from gmeta.data.schema_difference import schema_difference

_STATISTICS = ("value", "label_sum", "count")
_SAME_VALUES = "no value differs, so one of the two files is not what was recorded: copy it again"


@dataclass(frozen=True)
class DataIdentity:
    """The identity of a pack's data, or of the data that a run was trained on."""

    schema: PackSchema  # with its `identity`
    label_threshold: float | None  # label >= threshold was made 1
    vocabularies: Path  # the directory of vocabulary files; they are read only to say what differs


def identity_of(schema: PackSchema, data_schema: Mapping[str, Any], vocabularies: Path) -> DataIdentity:
    """Return the identity of what was encoded with `schema` and the files of a directory of vocabularies.

    Args:
        schema: the pack schema; its `identity` is computed from the files where it was not recorded.
        data_schema: the raw data schema as JSON, for the hash seed and the label's threshold.
        vocabularies: directory of `<table>.parquet` and `item_statistics.parquet`.

    Raises:
        ValueError: a file is damaged.
    """
    if schema.identity is None:
        schema = replace(schema, identity=table_identities(schema, data_schema, vocabularies))
    return DataIdentity(schema, data_schema.get("label_threshold"), vocabularies)


def table_identities(schema: PackSchema, data_schema: Mapping[str, Any], vocabularies: Path) -> dict[str, str]:
    """Map each embedding table to the checksum of its vocabulary, or `hash seed N`, and `item_statistics` to theirs.

    A table without a vocabulary file is left out, so that it differs from one that has a file.
    """
    hashed = {f["table"] for f in data_schema.get("features", ()) if f.get("hash_buckets") is not None}
    out = {}
    for table in dict.fromkeys(feature.table for feature in schema.features):
        file = vocabulary_file(vocabularies, table)
        if table in hashed:
            out[table] = f"hash seed {data_schema.get('hash_seed', 0)}"
        elif file.exists():
            out[table] = content_checksum(file, ("value", "id"))
    file = vocabulary_file(vocabularies, ITEM_STATISTICS)
    if file.exists():
        out[ITEM_STATISTICS] = content_checksum(file, _STATISTICS)
    return out


def vocabulary_file(directory: Path, table: str) -> Path:
    """Return where a directory of vocabularies holds that of `table`."""
    return directory / f"{quote(table, safe='')}.parquet"


def vocabulary_values(file: Path, cure: str) -> pa.Array:
    """Return the values of a vocabulary file, that of id 1 first, NULL for tombstones. ValueError names a file that is
    missing or damaged, and `cure`.
    """
    try:
        return pq.read_table(file, columns=["value"])["value"].combine_chunks()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): {cure}") from None


def ids_of_values(asked: pa.Array, known: pa.Array, missing: int) -> NDArray[np.int64]:
    """Return for each id of a vocabulary with the values `asked` the id of the same value in one with the values
    `known`, int64 [1 + len(asked)]: the first is out of vocabulary in both. A value that is not known, or is none, has
    `missing`.
    """
    place = pc.index_in(asked, value_set=known, skip_nulls=True)
    found = pc.fill_null(pc.add(place.cast(pa.int64()), 1), missing).to_numpy(zero_copy_only=False)
    return np.concatenate([[OOV], found]).astype(np.int64)


def identity_difference(ours: DataIdentity, theirs: DataIdentity) -> list[str]:
    """Say what makes `theirs` other than `ours`, which is expected, one line each; empty where both mean the same."""
    lines = schema_difference(ours.schema, theirs.schema)
    if ours.label_threshold != theirs.label_threshold:
        lines.append(f"label_threshold is {theirs.label_threshold}, expected {ours.label_threshold}")
    mine, other = ours.schema.identity or {}, theirs.schema.identity or {}
    for table in dict.fromkeys([*mine, *other]):
        if mine.get(table) != other.get(table):
            lines.append(_table_difference(table, ours, theirs))
    return lines


def _table_difference(table: str, ours: DataIdentity, theirs: DataIdentity) -> str:
    sides = [(side, (side.schema.identity or {}).get(table, "")) for side in (ours, theirs)]
    if any(value.startswith("hash seed") for _, value in sides):
        expected, found = (v if v.startswith("hash") else "a vocabulary" if v else "nothing" for _, v in sides)
        return f"table {table!r} is encoded with {found}, expected {expected}"
    what = "the item statistics" if table == ITEM_STATISTICS else f"vocabulary {table!r}"
    for side, value in sides:
        file = vocabulary_file(side.vocabularies, table)
        if not value or not file.exists():
            return f"{what} differs, and there is no {file} to say how"
    files = [vocabulary_file(side.vocabularies, table) for side, _ in sides]
    return f"{what}: " + (_statistics_difference if table == ITEM_STATISTICS else _vocabulary_difference)(*files)


def _vocabulary_difference(*files: Path) -> str:
    pairs = list(zip_longest(*([value for (value,) in _entries(file, ("value",))] for file in files)))
    changed = [(index, pair) for index, pair in enumerate(pairs, start=1) if pair[0] != pair[1]]
    if not changed:
        return _SAME_VALUES
    first, (ours, theirs) = changed[0]
    return (
        f"{len(changed):,} of {len(pairs):,} ids stand for another value; id {first} is {theirs!r}, expected {ours!r}"
    )


def _statistics_difference(*files: Path) -> str:
    ours, theirs = ({item: tuple(sums) for item, *sums in _entries(file, _STATISTICS)} for file in files)
    items = list(dict.fromkeys([*ours, *theirs]))
    changed = [item for item in items if ours.get(item) != theirs.get(item)]
    if not changed:
        return _SAME_VALUES
    first = changed[0]
    name = "all items" if first is None else f"item {first!r}"
    return (
        f"{len(changed):,} of {len(items):,} entries differ; "
        f"{name} has (label sum, rows) {theirs.get(first)}, expected {ours.get(first)}"
    )


def _entries(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Return the rows of a Parquet file, as tuples."""
    table = pq.read_table(file, columns=list(columns))
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def content_checksum(file: Path, columns: Sequence[str]) -> str:
    """Return the XXH3-64 of the values of a Parquet file's columns in their order, as 16 hex digits.

    It does not depend on the file's encoding, compression or row groups, so that files written by another release of
    a library are equal. Memory does not grow with the file.

    Raises:
        ValueError: the file is missing or damaged, or lacks a column.
    """
    digests = {name: (xxhash.xxh3_64(), xxhash.xxh3_64()) for name in columns}
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(columns=list(columns)):
                for name, (sizes, data) in digests.items():
                    _digest(batch.column(name), sizes, data)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(
            f"{file} is missing or damaged ({error}): copy it again from the pack, or train again"
        ) from None
    return xxhash.xxh3_64(b"".join(d.digest() for pair in digests.values() for d in pair)).hexdigest()


def _digest(column: pa.Array, sizes: Any, data: Any) -> None:
    """Feed a column to two digests: of texts their lengths (-1: missing) and their bytes, of numbers the numbers."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        sizes.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)))
        return
    text = column.cast(pa.large_string())
    sizes.update(pc.fill_null(pc.binary_length(text), -1).to_numpy(zero_copy_only=False))
    text = pc.fill_null(text, "")
    _, offsets, content = text.buffers()
    if content is not None and len(text):
        bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
        data.update(memoryview(content)[bounds[0] : bounds[-1]])
