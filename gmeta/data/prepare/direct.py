"""Raw rows in the encoding of a trained run without a database: what a request takes a millisecond for, not forty.

It reads plain rows alone: columns of the common types whose values can all be used. `direct_rows` returns None for any
other table, and `encoder` then reads it with DuckDB, which knows every type and names every bad value. So there is one
home of the rules (`values.py`), and what is here repeats the common part of them; a test compares the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import md5
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from gmeta.data.identity import vocabulary_file
from gmeta.data.item_vectors import ItemVectors, array_name
from gmeta.data.prepare.check import LARGEST_FP16
from gmeta.data.prepare.encode import LARGEST, Array, with_item_vectors
from gmeta.data.prepare.new_texts import NewTexts
from gmeta.data.prepare.vocabulary import PRIOR_ROWS, SALTS, files_of_values
from gmeta.data.raw_columns import RawFeature, RawNumeric, RawNumericSequence
from gmeta.data.schema import FLOAT32_MAX, ITEM_STATISTICS, OOV, DataSchema, PackSchema, Role, Vector
from gmeta.data.sources import Connection, scalar

MISSING, BAD = -1, -2
"""What stands for the id of a missing value, and of one that the rules refuse or that is left to DuckDB."""
_REMEMBERED = 1 << 16
"""Values whose ids are remembered: those of popular items cost one look into a dict."""
_LONGEST = 64
_MOST_ROWS = 1 << 16
"""More rows go to DuckDB: Python objects for their values take memory that it does not need, and 40 ms are nothing."""
_CURE = "copy it again from the pack, or train again"
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)[.]0+")
_EXPONENT = re.compile(r"-?[1-9][.][0-9]+E[0-9]+")
_MANY_DIGITS = re.compile(r"[+-]?[0-9]+([.]0+)?")
_TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}


def text_of(value: str | int | None) -> str | int:
    """Return the text of an id as `values.id_value` gives it; `MISSING` or `BAD` where it has none."""
    if value is None:
        return MISSING
    if not isinstance(value, str):
        return str(value)
    if value in ("", "nan", "NaN"):
        return MISSING
    if len(value) >= 19 and _MANY_DIGITS.fullmatch(value):
        return BAD  # it may be beyond int64
    if "." in value:
        if _DECIMAL.fullmatch(value):
            whole = value.partition(".")[0]
            return "0" if whole == "-0" else whole
        if _EXPONENT.fullmatch(value):
            number = float(value)
            return str(int(number)) if abs(number) <= 2**53 and number.is_integer() else value
        return value
    return _TRUTH.get(value, value)


class Ids(dict[Any, int]):
    """Raw value -> id, of the values that were asked for lately; `find` tells the id of a text.

    Whole numbers and texts are keys of it. A boolean is no key, because it equals a number: give its text.
    """

    def __init__(self, find: Callable[[str], int]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, value: str | int | None) -> int:
        text = text_of(value)
        found = text if isinstance(text, int) else self._find(text)
        if not isinstance(value, str) or len(value) <= _LONGEST:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[value] = found
        return found


@dataclass(frozen=True)
class Hashes:
    """Texts, of which only 64-bit hashes are in memory, with a number each: 12 bytes a text whatever its length."""

    salt: int
    hashes: NDArray[np.uint64]  # ascending
    ids: NDArray[np.int32]

    def find(self, text: str) -> int:
        """Return the number of a text, `OOV` for one that is not there."""
        wanted = np.uint64(xxhash.xxh3_64_intdigest(text.encode(), self.salt))
        place = int(self.hashes.searchsorted(wanted))
        return int(self.ids[place]) if place < len(self.hashes) and self.hashes[place] == wanted else OOV


def hash_texts(parts: Callable[[], Iterable[tuple[list[str | None], NDArray[np.int32]]]], what: str) -> Hashes:
    """Hash texts, which come in parts with their numbers, with the first salt by which all differ. A missing text
    stands for nothing. ValueError where a text stands there twice.
    """
    for salt in range(SALTS):
        hashes, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        for texts, numbers in parts():
            held = [text is not None for text in texts]
            found = [xxhash.xxh3_64_intdigest(text.encode(), salt) for text in texts if text is not None]
            hashes.append(np.array(found, np.uint64))
            ids.append(numbers[held])
        all_hashes, all_ids = np.concatenate(hashes), np.concatenate(ids)
        order = all_hashes.argsort()
        all_hashes = all_hashes[order]
        if (all_hashes[1:] != all_hashes[:-1]).all():
            return Hashes(salt, all_hashes, all_ids[order])
    raise ValueError(f"{what} holds a value twice: {_CURE}")


@dataclass(frozen=True)
class _Numeric:
    """A stored numeric column, with the very numbers that DuckDB computes with."""

    mean: float
    std: float


@dataclass(frozen=True)
class _Items:
    """Item statistics: of each item, 0 for one that was never seen."""

    ids: Ids
    label_sum: NDArray[np.float64]
    count: NDArray[np.float64]
    prior: float  # label sum of the pseudo-rows

    def columns(self, values: Sequence[Any]) -> tuple[Array, Array] | None:
        """Return the two columns of item statistics; None for an item that cannot be read."""
        found = np.fromiter(map(self.ids.__getitem__, values), np.int64, len(values))
        if (found < 0).any():
            return None
        count = self.count[found]
        return (self.label_sum[found] + self.prior) / (count + PRIOR_ROWS), _log1p(count)


@dataclass(frozen=True)
class DirectRows:
    """Encoded rows in the order of tasks, and what each is."""

    keys: list[str]
    arrays: dict[str, Array]
    row: Array  # int64 [rows]: the row of the table, from 0
    group: list[int]  # of each task
    texts: dict[str, list[str]]  # table -> texts that the run does not know


class DirectEncoder:
    """Reads the plain rows of a run's encoding. Several threads may use it at once.

    `con` is asked once for the numbers that its SQL would compute with. ValueError for a vocabulary file that is
    missing or damaged.
    """

    def __init__(
        self,
        con: Connection,
        schema: DataSchema,
        vocab_dir: Path,
        pack_schema: PackSchema,
        item_vectors: Mapping[str, ItemVectors] | None = None,
    ) -> None:
        self._schema, self._stored, self._vectors = schema, pack_schema, item_vectors or {}
        self._ids: dict[str, Ids] = {}
        for table, features in schema.tables().items():
            first = features[0]
            if first.hash_buckets is not None:
                self._ids[table] = Ids(_bucket(schema.hash_seed, table, first.hash_buckets))
            else:
                self._ids[table] = Ids(_read_hashes(files_of_values(vocab_dir, table)).find)
        self._numeric = [_Numeric(*_as_sql(con, [c.mean, c.std])) for c in pack_schema.numeric]
        self._sequences = [_Numeric(*_as_sql(con, [c.mean, c.std])) for c in pack_schema.numeric_sequence]
        self._threshold = None if schema.label_threshold is None else _as_sql(con, [schema.label_threshold])[0]
        self._items = _read_items(con, vocabulary_file(vocab_dir, ITEM_STATISTICS)) if schema.item_statistics else None

    def rows(self, table: pa.Table, *, support: bool, group: Sequence[int] | None = None) -> DirectRows | None:
        """Return the rows of a table as `Encoder.table` lays them out, without query rows' labels; None where a value,
        or a column's type, is not a plain one.

        With `group`, of each row, rows of one key in two groups are two tasks.
        """
        schema = self._schema
        roles: list[Role] = ["task", *["item"] * schema.item_statistics, *["label"] * support]  # type: ignore[list-item]
        if table.num_rows > _MOST_ROWS or not set(schema.columns(roles)) <= set(table.column_names):
            return None
        tasks = _values(table[schema.task])
        if tasks is None:
            return None
        of_task: dict[tuple[int, Any], int] = {}
        codes, sizes = [], []
        for name, run in groupby(zip(repeat(0, len(tasks)) if group is None else group, tasks, strict=True)):
            codes.append(of_task.setdefault(name, len(of_task)))
            sizes.append(len(list(run)))  # rows of a task mostly lie behind each other
        code = np.repeat(np.array(codes, np.int64), sizes)
        names: dict[tuple[int, str | int], int] = {}  # two spellings may be one task: 7 and 7.0
        first = [names.setdefault((number, text_of(value)), len(names)) for number, value in of_task]
        if any(isinstance(text, int) for _, text in names):
            return None
        if len(names) != len(of_task):
            code = np.array(first)[code]
        order = self._order(table, code, support=support)
        new = NewTexts(self._stored)
        arrays = None if order is None else self._arrays(table, order, new, support=support)
        if order is None or arrays is None:
            return None
        size = np.bincount(code, minlength=len(names))
        arrays |= {
            "item_cold": np.zeros(len(code), np.uint8),
            "task_id": np.arange(len(names)),
            "row_start": np.cumsum(size) - size,
            "num_support": (size if support else np.zeros_like(size)).astype(np.int32),
        }
        keys, groups = [str(text) for _, text in names], [number for number, _ in names]
        return DirectRows(keys, arrays, order, groups, new.lists())

    def _order(self, table: pa.Table, code: Array, *, support: bool) -> Array | None:
        """Return the rows by task, then by time where a support has it, then as they come."""
        if not (support and self._schema.time in table.column_names):
            return code.argsort(kind="stable")
        time = _times(table[self._schema.time])
        return None if time is None else np.lexsort((time, code))

    def _arrays(self, table: pa.Table, order: Array, new: NewTexts, *, support: bool) -> dict[str, Array] | None:
        several = (len(order), len(self._schema.labels)) if self._schema.labels else len(order)
        label = self._labels(table) if support else np.zeros(several, np.float32)
        weight, dense = self._weight(table, support=support), self._dense(table)
        if label is None or weight is None or dense is None:
            return None
        one_valued: list[Array] = []
        arrays: dict[str, Array] = {"dense": dense[order], "label": label[order]}
        if self._schema.weight is not None:
            arrays["weight"] = weight[order]
        for feature in self._schema.features:
            column = table[feature.name]
            if feature.kind == "categorical":
                if (ids := self._one(feature, column, new)) is None:
                    return None
                one_valued.append(ids)
            else:
                if (bag := self._many(feature, column, order, new)) is None:
                    return None
                arrays[f"{feature.name}.values"], arrays[f"{feature.name}.offsets"] = bag
        for sequence, stored in zip(self._schema.numeric_sequence, self._sequences, strict=True):
            numbers = self._numbers_of(sequence, stored, table[sequence.name], order)
            if numbers is None:
                return None
            arrays[f"{sequence.name}.values"], arrays[f"{sequence.name}.offsets"] = numbers
        if not self._are_aligned(table):
            return None
        ids = np.stack(one_valued, 1)[order] if one_valued else np.empty((len(order), 0), np.int32)
        for vector in self._stored.vector:
            given = self._vector(vector, table)
            if given is None:
                return None
            found = with_item_vectors(vector, given.take(order), ids, self._stored, self._vectors)
            arrays[array_name(vector.name)] = found
        return {"ids": ids, **arrays}

    def _vector(self, vector: Vector, table: pa.Table) -> pa.Array | None:
        """Return a column of vectors, NULL where it is left out; None where it is left to DuckDB."""
        if vector.name not in table.column_names:
            return pa.nulls(table.num_rows, pa.list_(pa.float64()))
        column = table[vector.name].combine_chunks()
        kind = column.type
        fixed = pa.types.is_fixed_size_list(kind) and kind.list_size == vector.dim
        if column.null_count or not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return None
        values = _numbers(pa.chunked_array([column.flatten()]))
        if values is None or not (fixed or set(column.value_lengths().to_pylist()) <= {vector.dim}):
            return None
        most = LARGEST_FP16 if vector.dtype == "fp16" else FLOAT32_MAX
        if not (np.abs(values) <= most).all():
            return None
        return pa.FixedSizeListArray.from_arrays(pa.array(values), vector.dim)

    def _are_aligned(self, table: pa.Table) -> bool:
        """Say whether every row has as many values of a sequence as of the one that it is aligned with."""
        features = {feature.name: feature for feature in self._schema.features}
        pairs: list[tuple[RawFeature | RawNumericSequence, str | None]] = [
            *((feature, feature.aligned) for feature in self._schema.features),
            *((sequence, sequence.aligned) for sequence in self._schema.numeric_sequence),
        ]
        for column, other in pairs:
            if other is not None:
                sizes = (_sizes(column, table[column.name]), _sizes(features[other], table[other]))
                if sizes[0] is None or sizes[0] != sizes[1]:
                    return False
        return True

    def _numbers_of(
        self, sequence: RawNumericSequence, stored: _Numeric, column: pa.ChunkedArray, order: Array
    ) -> tuple[Array, Array] | None:
        """Return values and offsets of a numeric sequence, rows in `order`; None where it is left to DuckDB."""
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return None
        if column.null_count and sequence.nulls == "error":
            return None
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        values = _numbers(pa.chunked_array([whole.flatten()]))
        values = None if values is None else self._checked(sequence, values)
        if values is None:
            return None
        size = np.array([length or 0 for length in whole.value_lengths().to_pylist()], np.int64)
        kept = np.minimum(size, self._schema.length_of(sequence) or size.max(initial=0))
        last = np.cumsum(size)
        rows = [values[end - count : end] for end, count in zip(last[order], kept[order], strict=True)]
        return _stored(np.concatenate([np.zeros(0), *rows]), stored), np.cumsum([0, *kept[order]])

    def _checked(self, numeric: RawNumeric | RawNumericSequence, values: Array) -> Array | None:
        """Return numbers before they are standardised, NaN where missing; None where one cannot be used."""
        if (np.isnan(values).any() and numeric.nulls == "error") or (np.abs(values) > FLOAT32_MAX).any():
            return None
        if not numeric.log:
            return values
        return None if (values < 0).any() else _log1p(values)

    def _one(self, feature: RawFeature, column: pa.ChunkedArray, new: NewTexts) -> Array | None:
        values = _values(column)
        return None if values is None else self._found(feature, values, new, oov=feature.nulls == "oov")

    def _found(self, feature: RawFeature, values: Sequence[Any], new: NewTexts, *, oov: bool) -> Array | None:
        """Return the ids of raw values; where `oov`, a missing one is out of vocabulary. `new` gives texts ids."""
        found = np.fromiter(map(self._ids[feature.table].__getitem__, values), np.int32, len(values))
        if feature.text:
            for place in np.flatnonzero(found == OOV).tolist():
                found[place] = new.id_of(feature.table, str(text_of(values[place])))
        if len(found) and (lowest := found.min()) < 0:
            if not oov or lowest != MISSING:
                return None
            found[found == MISSING] = OOV
        return found

    def _many(
        self, feature: RawFeature, column: pa.ChunkedArray, order: Array, new: NewTexts
    ) -> tuple[Array, Array] | None:
        """Return values and offsets of a many-valued feature, rows in `order`."""
        lists = _lists(feature, column)
        if lists is None:
            return None
        if feature.max_length is not None:
            lists = [values[-feature.max_length :] for values in lists]
        lists = [lists[row] for row in order.tolist()]
        values = [value for of_row in lists for value in of_row]
        found = self._found(feature, values, new, oov=feature.may_lack_elements)
        offsets = np.cumsum([0, *map(len, lists)])
        return None if found is None else (found, offsets)

    def _dense(self, table: pa.Table) -> Array | None:
        columns: list[Array] = []
        for numeric in self._schema.numeric:
            values = _numbers(table[numeric.name])
            values = None if values is None else self._checked(numeric, values)
            if values is None:
                return None
            columns.append(values)
        if self._items is not None:
            items = _values(table[self._schema.item or ""])
            found = None if items is None else self._items.columns(items)
            if found is None:
                return None
            columns += found
        dense = np.empty((table.num_rows, len(columns)), np.float32)
        for place, (values, stored) in enumerate(zip(columns, self._numeric, strict=True)):
            dense[:, place] = _stored(values, stored)
        return dense

    def _weight(self, table: pa.Table, *, support: bool) -> Array | None:
        """Return the rows' weights, 1 where the table has none."""
        if not (support and self._schema.weight in table.column_names):
            return np.ones(table.num_rows, np.float32)
        values = _numbers(table[self._schema.weight])
        if values is None or not ((values >= 0) & (values <= FLOAT32_MAX)).all():
            return None
        return values.astype(np.float32)

    def _labels(self, table: pa.Table) -> Array | None:
        """Return the labels [rows], or [rows, labels] of several, NaN where a row lacks one."""
        if not self._schema.labels:
            return self._label(table[self._schema.label])
        columns = []
        for label in self._schema.labels:
            values = _numbers(table[label.name])
            if values is None or (np.abs(values) > FLOAT32_MAX).any():
                return None
            if label.loss == "bce" and not (np.isin(values, (0, 1)) | np.isnan(values)).all():
                return None
            columns.append(values.astype(np.float32))
        found = np.stack(columns, 1)
        return None if np.isnan(found).all(1).any() else found

    def _label(self, column: pa.ChunkedArray) -> Array | None:
        values = _numbers(column)
        if values is None or not (np.abs(values) <= FLOAT32_MAX).all():
            return None
        if self._threshold is None:
            return values.astype(np.float32)
        single = pa.types.is_float32(column.type)  # which is compared in its own type
        reached: Array = (
            values.astype(np.float32) >= np.float32(self._threshold) if single else values >= self._threshold
        )
        return reached.astype(np.float32)


# --------------------------------------------------------------------------------------------- columns


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any] | None:
    """Return a column of ids as whole numbers and texts, None where missing; None for another type, and for what is no
    whole number.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_whole(kind) or pa.types.is_null(kind):
        return list(column.to_pylist())
    if pa.types.is_boolean(kind):
        return [None if value is None else "true" if value else "false" for value in column.to_pylist()]
    if pa.types.is_float32(kind) or pa.types.is_float64(kind):
        exact = 2**24 if pa.types.is_float32(kind) else 2**53
        values = [None if value is None or value != value else value for value in column.to_pylist()]
        if all(value is None or (abs(value) <= exact and value.is_integer()) for value in values):
            return [None if value is None else int(value) for value in values]
    return None


def _is_whole(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) and not pa.types.is_uint64(kind)


def _lists(feature: RawFeature, column: pa.ChunkedArray) -> list[list[Any]] | None:
    """Return the raw values of each row of a many-valued feature; None where it is left to DuckDB."""
    kind, separator = column.type, feature.separator
    if separator is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        texts = [text or "" for text in column.to_pylist()]
        parts = [text.split(separator) if separator else list(text) for text in texts]
        return [[word for part in found if (word := part.strip(" "))] for found in parts]
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    if column.null_count and feature.nulls == "error":
        return None
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = _values(whole.flatten())
    if values is None:
        return None
    ends = np.cumsum([length or 0 for length in whole.value_lengths().to_pylist()]).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _numbers(column: pa.ChunkedArray) -> Array | None:
    """Return a column as float64, NaN where missing; None for a type that is not a plain number's."""
    kind = column.type
    if pa.types.is_float32(kind):  # by the shortest decimal text that gives the value back
        decimal: Array = column.cast(pa.string()).cast(pa.float64()).to_numpy()  # NaN where missing
        return decimal
    if pa.types.is_null(kind):
        return np.full(len(column), math.nan)
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_float64(kind)):
        return None
    values = [math.nan if v is None else v for v in column.to_pylist()] if column.null_count else column.to_numpy()
    return np.asarray(values, np.float64)


def _stored(values: Array, column: _Numeric) -> Array:
    """Return numbers as they are stored, 0 where they are missing."""
    scaled = np.nan_to_num((values - column.mean) / column.std, nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    return np.asarray(scaled.clip(-LARGEST, LARGEST), np.float32)


def _sizes(column: RawFeature | RawNumericSequence, raw: pa.ChunkedArray) -> list[int] | None:
    """Return how many values each row has, None where this is left to DuckDB."""
    if column.separator is not None and not (pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type)):
        lists = _lists(column, raw) if isinstance(column, RawFeature) else None
        return None if lists is None else [len(values) for values in lists]
    return [length or 0 for length in raw.combine_chunks().value_lengths().to_pylist()]


def _times(column: pa.ChunkedArray) -> Array | None:
    """Return what orders a column of times; None for text and fractions, which are left to DuckDB."""
    kind = column.type
    if column.null_count or not (_is_whole(kind) or pa.types.is_timestamp(kind) or pa.types.is_date32(kind)):
        return None
    if pa.types.is_timestamp(kind):
        moments: Array = column.cast(pa.int64()).to_numpy()
        return moments // 1000 if kind.unit == "ns" else moments
    return np.asarray(column.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64()).to_numpy())


def _log1p(values: Array) -> Array:
    """Return ln(1 + x) by the C library, as DuckDB does: numpy's own logarithm may round otherwise."""
    return np.fromiter((math.log(1 + x) for x in values.tolist()), np.float64, len(values))


# ------------------------------------------------------------------------------------------ vocabularies


def _bucket(seed: int, table: str, buckets: int) -> Callable[[str], int]:
    """Return what `encode` computes for a feature with `hash_buckets`."""
    start = f"{seed}|{table}|"

    def find(text: str) -> int:
        return 1 + int.from_bytes(md5((start + text).encode(), usedforsecurity=False).digest()[8:], "little") % buckets

    return find


def _read_hashes(files: Sequence[Path]) -> Hashes:
    return hash_texts(lambda: _parts(files), str(files[0]))


def _parts(files: Sequence[Path]) -> Iterator[tuple[list[str | None], NDArray[np.int32]]]:
    for file in files:
        with _opened(file) as parquet:
            for part in parquet.iter_batches(columns=["value", "id"]):
                yield part["value"].to_pylist(), part["id"].to_numpy().astype(np.int32)


def _read_items(con: Connection, file: Path) -> _Items:
    with _opened(file) as parquet:
        table = parquet.read(["value", "label_sum", "count"])
        values, sums, counts = (table[name].to_pylist() for name in ("value", "label_sum", "count"))
        if None not in values:
            raise KeyError("it has no row of all items")
        whole = values.index(None)
        prior = PRIOR_ROWS * (sums[whole] / counts[whole])
        numbers = np.arange(1, len(values) + 1, dtype=np.int32)
        ids = Ids(hash_texts(lambda: [(values, numbers)], str(file)).find)
    return _Items(ids, np.array([0.0, *sums]), np.array([0.0, *counts]), _as_sql(con, [prior])[0])


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    """Open a vocabulary, and turn what cannot be read of it into a ValueError."""
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, KeyError, ZeroDivisionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is missing or damaged ({reason}): {_CURE}") from None


def _as_sql(con: Connection, numbers: Sequence[float]) -> list[float]:
    """Return numbers as DuckDB reads them in SQL: a literal is a DECIMAL, whose DOUBLE may differ in the last bit."""
    return [float(scalar(con, f"SELECT CAST({number!r} AS DOUBLE)")) for number in numbers]
