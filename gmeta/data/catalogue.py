"""The catalogue of a next-item pack: all items that have an id, what they own, and how often training rows have them.

`vocab/catalogue.parquet` has a row for each item id, ascending from 1: `id` int32, `item` (the raw value), an int32
column of encoded ids for each feature that items own (`PackSchema.catalogue`), and `count` int64, the rows of split
train with that item. The file's metadata say which columns events had, by what they meant, and where rows have gaps of
time the unit of times. It lies beside the
vocabularies because it means something only with them: what copies, verifies and bundles these takes it along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.data.schema import PackSchema

_CURE = "copy it again from the pack, or prepare the pack again"
_COLUMNS, _UNIT, _LONGEST = b"event_columns", b"gap_unit", b"max_history"


@dataclass(frozen=True)
class Catalogue:
    """All items by id. Position 0, the unknown item, has zeros."""

    item: str  # the item feature
    owned: dict[str, NDArray[np.int64]]  # feature -> [num_ids], its id in rows of the item
    count: NDArray[np.int64]  # [num_ids], rows of split train

    @property
    def num_ids(self) -> int:
        """Return the number of item ids, that of unknown items included."""
        return len(self.count)

    def followed_by(self, owned: Mapping[str, NDArray[np.int64]]) -> Catalogue:
        """Return these items, and behind them others [n] that own this, which no training row has."""
        num = len(next(iter(owned.values())))
        whole = {name: np.concatenate([ids, owned[name]]) for name, ids in self.owned.items()}
        return Catalogue(self.item, whole, np.append(self.count, np.zeros(num, np.int64)))


def catalogue_file(directory: Path) -> Path:
    """Return where a directory of vocabularies holds the catalogue."""
    return directory / "catalogue.parquet"


def write_catalogue(
    directory: Path,
    values: pa.Array | pa.ChunkedArray,
    owned: Mapping[str, NDArray[np.int64]],
    count: NDArray[np.int64],
    event_columns: Mapping[str, str] | None = None,
    gap_unit: str | None = None,
    max_history: int | None = None,
) -> None:
    """Write the catalogue to a directory of vocabularies: item `values[i]` has id i + 1, owns `owned[feature][i]`, and
    was in `count[i]` training rows. `event_columns` are the columns that events had, by what they meant, and `gap_unit`
    is the unit of the times whose gaps rows have, `max_history` how many events a history has at most.
    """
    columns = {"id": pa.array(np.arange(1, len(values) + 1, dtype=np.int32)), "item": values}
    columns |= {name: pa.array(np.asarray(ids, np.int32)) for name, ids in owned.items()}
    columns["count"] = pa.array(np.asarray(count, np.int64))
    table = pa.table(columns)
    if event_columns is not None:
        told: dict[bytes, str] = {_COLUMNS: json.dumps(dict(event_columns))}
        told |= {} if gap_unit is None else {_UNIT: gap_unit}
        told |= {} if max_history is None else {_LONGEST: str(max_history)}
        table = table.replace_schema_metadata(told)
    pq.write_table(table, catalogue_file(directory))


def read_event_columns(vocab_folder: Path) -> dict[str, str]:
    """Return the columns that a pack's events had, by what they meant (`user`, `item`, …); empty where the catalogue
    does not tell. ValueError for a file that is missing or damaged.
    """
    file = catalogue_file(vocab_folder)
    try:
        found = (pq.read_schema(file).metadata or {}).get(_COLUMNS)
        columns = {} if found is None else json.loads(found)
        return {str(key): str(column) for key, column in columns.items()}
    except (OSError, pa.ArrowException, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): {_CURE}") from None


def read_gap_unit(vocab_folder: Path) -> str | None:
    """Return the unit of the times whose gaps a pack's rows have; None where it is not told. ValueError as above."""
    return _told(vocab_folder, _UNIT)


def read_max_history(vocab_folder: Path) -> int:
    """Return how many events a history of a pack has at most; 0 where nothing bounds it. ValueError as above."""
    found = _told(vocab_folder, _LONGEST)
    if found is not None and not found.isdecimal():
        raise ValueError(f"{catalogue_file(vocab_folder)} says that a history has {found!r} events: {_CURE}")
    return int(found or 0)


def _told(vocab_folder: Path, key: bytes) -> str | None:
    file = catalogue_file(vocab_folder)
    try:
        found = (pq.read_schema(file).metadata or {}).get(key)
        return None if found is None else str(found, "utf-8")
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): {_CURE}") from None


def read_item_values(vocab_folder: Path) -> pa.ChunkedArray:
    """Return the raw value of each item, that of id 1 first. ValueError for a file that is missing or damaged."""
    file = catalogue_file(vocab_folder)
    try:
        return pq.read_table(file, columns=["item"])["item"].cast(pa.large_string())
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): {_CURE}") from None


def read_catalogue(vocab_folder: Path, schema: PackSchema) -> Catalogue:
    """Read the catalogue from a directory of vocabularies.

    Raises ValueError where the schema is of no next-item pack, and for a file that is missing, damaged, or not what the
    schema says.
    """
    if not schema.next_item or schema.item is None:
        raise ValueError(
            "the pack has no catalogue: only a next-item pack has one, which `gmeta prepare --events` makes of events"
        )
    file, size = catalogue_file(vocab_folder), schema.feature(schema.item).num_ids
    names = ["id", *schema.catalogue, "count"]
    try:
        table = pq.read_table(file, columns=names)
        found = {name: table[name].to_numpy().astype(np.int64) for name in names}
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): {_CURE}") from None
    ids = found.pop("id")
    if not np.array_equal(ids, np.arange(1, size)):
        raise ValueError(f"{file} has not one row for each of the {size - 1:,} items of {schema.item!r}: {_CURE}")
    for name in schema.catalogue:
        feature = schema.feature(name)
        limit = feature.num_texts or feature.num_ids
        if len(ids) and not 0 <= found[name].min() <= found[name].max() < limit:
            raise ValueError(f"{file} has ids of {name!r} that are not in [0, {limit:,}): {_CURE}")
    whole = {name: np.concatenate([[0], values]) for name, values in found.items()}
    count = whole.pop("count")
    return Catalogue(schema.item, whole, count)
