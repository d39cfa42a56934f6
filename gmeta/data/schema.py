"""What a data set's columns mean: `DataSchema` for raw columns (from YAML), `PackSchema` for encoded ones.

This module imports neither torch nor DuckDB, so that command lines and error paths stay fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from gmeta.core.errors import nearest, require
from gmeta.core.files import read_mapping
from gmeta.data.entries import check_choice_key as _choice
from gmeta.data.entries import check_count_key as _check_count
from gmeta.data.entries import check_key as _check
from gmeta.data.entries import check_number_key as _check_number
from gmeta.data.entries import column_entry as _column
from gmeta.data.entries import is_whole_number as _is_int
from gmeta.data.entries import list_entry as _list
from gmeta.data.entries import mapping_entry as _mapping

Kind = Literal["categorical", "multi", "sequence"]
Pooling = Literal["sum", "mean", "none"]

ENCODING = 2
"""The version of the rules by which raw values become ids and numbers (gmeta/data/prepare/values.py)."""

FLOAT32_MAX = 3.4e38
"""Labels and numbers are at most this."""

OOV = 0
"""The id of values that are not in the vocabulary (and of padding)."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An encoded categorical feature of a pack: ids are in [0, num_ids), 0 is out-of-vocabulary."""

    name: str
    kind: Kind
    num_ids: int
    table: str  # features of one table share vocabulary and embedding rows
    pooling: Pooling = "mean"  # of many-valued features; none: a model reads every value of a sequence
    aligned: str | None = None  # the sequence that it has as many values as, in every row


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """A numeric column as stored: (log1p(x) if log else x, then - mean, then / std)."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class NumericSequence:
    """Numbers beside the values of a sequence, stored as `NumericColumn` says."""

    name: str
    aligned: str  # the sequence
    mean: float = 0.0
    std: float = 1.0
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A list of `dim` numbers of each row, or of each item; the same in raw data and in a pack."""

    name: str
    dim: int
    owner: Literal["row", "item"] = "row"  # item: kept once for each item id, and found by it
    dtype: Literal["fp32", "fp16"] = "fp32"  # as stored; models get float32


@dataclass(frozen=True, kw_only=True)
class PackSchema:
    """The schema of a task pack: what training, evaluation and checkpoints need to know of the data."""

    features: tuple[Feature, ...]
    numeric: tuple[NumericColumn, ...]
    label: str
    binary_label: bool  # every label is 0 or 1
    task: str
    item: str | None = None
    time: str | None = None
    label_mean: float = 0.0  # over training rows: where a model's output starts
    weight: str | None = None  # the column of the rows' weights
    scenario: str | None = None  # the one-valued feature that slices reports
    identity: dict[str, str] | None = (
        None  # of each table's ids (see `data.identity`); None: made before it was recorded
    )
    encoding: int = ENCODING  # packs and runs that record none have 1
    numeric_sequence: tuple[NumericSequence, ...] = ()
    vector: tuple[Vector, ...] = ()

    def feature(self, name: str) -> Feature:
        """Return the feature called `name`. ValueError lists the known names."""
        for feature in self.features:
            if feature.name == name:
                return feature
        known = ", ".join(f.name for f in self.features)
        raise ValueError(f"feature {name!r} is not in the pack; it has: {known}")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict, which `pack_schema_from_json` reads back.

        What is not named is left out, as in what earlier releases wrote, so that packs keep their bytes.
        """
        return _told(asdict(self))


def pack_schema_from_json(data: dict[str, Any]) -> PackSchema:
    """Return the schema that `PackSchema.to_json` wrote.

    Every value is checked as those of YAML are: a file may come from anyone, and some go into SQL. ValueError names
    what is wrong, or says that a newer gmeta encoded the data.
    """
    entry = _whole(data, PackSchema, "schema")
    encoding = entry.get("encoding", 1)
    if not _is_int(encoding) or encoding not in range(1, ENCODING + 1):
        raise ValueError(f"the data have encoding {encoding!r}, this gmeta reads 1 to {ENCODING}: upgrade gmeta")
    for key in ("label", "task"):
        _check(entry, key, (str,), "schema", "a column name", required=True)
    for key in ("item", "time", "weight", "scenario"):
        _check(entry, key, (str, type(None)), "schema", "a column name")
    _check(entry, "binary_label", (bool,), "schema", "true or false", required=True)
    _check_number(entry, "label_mean", "schema")
    identity = entry.get("identity")
    if identity is not None and not (
        isinstance(identity, dict) and all(isinstance(text, str) for pair in identity.items() for text in pair)
    ):
        raise ValueError(f"schema.identity is {identity!r}: must map tables to texts")
    features = tuple(_encoded(f, f"schema.features[{i}]") for i, f in enumerate(_list(entry["features"], "features")))
    numeric = tuple(_scaled(c, f"schema.numeric[{i}]") for i, c in enumerate(_list(entry["numeric"], "numeric")))
    found = _list(entry.get("numeric_sequence"), "numeric_sequence")
    sequences = tuple(_scaled_sequence(c, f"schema.numeric_sequence[{i}]") for i, c in enumerate(found))
    _require_scenario(entry.get("scenario"), features)
    return PackSchema(
        **{
            **entry,
            "features": features,
            "numeric": numeric,
            "encoding": encoding,
            "numeric_sequence": sequences,
            "vector": _vectors(entry),
        }
    )


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a schema's JSON without keys that earlier releases did not know, where they say nothing."""
    features = [{k: v for k, v in f.items() if k != "aligned" or v is not None} for f in entry["features"]]
    new = ("role", "weight", "scenario", "numeric_sequence", "vector")
    return {key: value for key, value in {**entry, "features": features}.items() if key not in new or value}


def _require_scenario(scenario: str | None, features: Iterable[Feature | RawFeature]) -> None:
    """Raise ValueError, with the nearest name, for a scenario that is no feature of one value a row."""
    known = [feature.name for feature in features if feature.kind == "categorical"]
    if scenario is not None and scenario not in known:
        hint = nearest(scenario, known) if known else "there is none"
        raise ValueError(f"schema.scenario is {scenario!r}, which is no feature under categorical: {hint}")


def _encoded(value: Any, where: str) -> Feature:
    entry = _whole(value, Feature, where)
    _check(entry, "name", (str,), where, "a column name")
    _check(entry, "table", (str,), where, "a table name")
    _choice(entry, "kind", ("categorical", "multi", "sequence"), where)
    _choice(entry, "pooling", _poolings(entry["kind"]), where)
    _check_count(entry, "num_ids", where)
    _check(entry, "aligned", (str, type(None)), where, "the name of a sequence")
    return Feature(**entry)


def _scaled(value: Any, where: str) -> NumericColumn:
    return NumericColumn(**_checked_scale(_whole(value, NumericColumn, where), where))


def _scaled_sequence(value: Any, where: str) -> NumericSequence:
    entry = _whole(value, NumericSequence, where)
    _check(entry, "aligned", (str,), where, "the name of a sequence")
    return NumericSequence(**_checked_scale(entry, where))


def _checked_scale(entry: dict[str, Any], where: str) -> dict[str, Any]:
    _check(entry, "name", (str,), where, "a column name")
    _check(entry, "log", (bool,), where, "true or false")
    for key in ("mean", "std"):
        _check_number(entry, key, where)
    if entry.get("std", 1.0) <= 0:
        raise ValueError(f"{where}.std is {entry['std']!r}: must be more than 0")
    return entry


def _whole(value: Any, kind: type, where: str) -> dict[str, Any]:
    """Return a JSON object that has fields of a dataclass only, and all that have no default."""
    known = fields(kind)
    entry = _mapping(value, where, [field.name for field in known])
    for field in known:
        if field.default is MISSING and field.name not in entry:
            raise ValueError(f"{where}: key {field.name!r} is missing")
    return entry


def without_sizes(schema: PackSchema) -> PackSchema:
    """Return a schema without what grows from day to day: numbers of ids, and the vocabularies that they are of."""
    return replace(schema, features=tuple(replace(feature, num_ids=1) for feature in schema.features), identity=None)


def schema_difference(ours: PackSchema, theirs: PackSchema) -> list[str]:
    """Return why encoded data of schema `theirs` do not fit `ours`, one line for each difference. The list is empty
    when they fit.

    It compares features and sizes, the numeric columns with their means, deviations and logarithms, and the columns
    that are task, item, label and weight. `identity_difference` compares the vocabularies too.
    """
    mine = {f.name: f for f in ours.features}
    other = {f.name: f for f in theirs.features}
    lines = [f"feature {n!r} is missing" for n in mine if n not in other]
    lines += [f"feature {n!r} is new" for n in other if n not in mine]
    lines += [
        f"feature {n!r}: {field} is {getattr(other[n], field)!r}, expected {getattr(mine[n], field)!r}"
        for n in mine
        if n in other
        for field in ("kind", "num_ids", "table", "pooling", "aligned")
        if getattr(mine[n], field) != getattr(other[n], field)
    ]
    lines += _columns_difference(ours.numeric, theirs.numeric, "numeric column")
    lines += _columns_difference(ours.numeric_sequence, theirs.numeric_sequence, "numeric sequence")
    lines += _columns_difference(ours.vector, theirs.vector, "vector")
    lines += [
        f"{field} is {getattr(theirs, field)!r}, expected {getattr(ours, field)!r}"
        for field in ("task", "item", "label", "binary_label", "weight")
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if ours.encoding != theirs.encoding:
        lines.append(
            f"encoding is {theirs.encoding}, expected {ours.encoding}: prepare the raw rows again and train anew"
        )
    return lines


def _columns_difference(ours: Sequence[Any], theirs: Sequence[Any], what: str) -> list[str]:
    """Return where two lists of dataclasses with names differ, in words."""
    if [column.name for column in ours] != [column.name for column in theirs]:
        return [f"{what}s are {[column.name for column in theirs]}, expected {[column.name for column in ours]}"]
    return [
        f"{what} {a.name!r}: {field.name} is {getattr(b, field.name)!r}, expected {getattr(a, field.name)!r}"
        for a, b in zip(ours, theirs, strict=True)
        for field in fields(a)
        if getattr(a, field.name) != getattr(b, field.name)
    ]


# ------------------------------------------------------------------------------------------- raw columns


Role = Literal["task", "label", "weight", "time", "item", "partition", "role"]

ITEM_STATISTICS = "item_statistics"
"""Schema key, and the name of the file beside the vocabularies."""
STATISTICS_COLUMNS = ("item_mean", "item_log_count")

_MANY = ("name", "table", "min_count", "hash_buckets", "nulls", "separator")
_FEATURE_KEYS: dict[Kind, tuple[str, ...]] = {
    "categorical": ("name", "table", "min_count", "hash_buckets", "nulls"),
    "multi": (*_MANY, "pooling"),
    "sequence": (*_MANY, "pooling", "max_length", "aligned"),
}
_NUMERIC_KEYS = ("name", "log", "nulls")
_NUMERIC_SEQUENCE_KEYS = ("name", "aligned", "log", "nulls", "separator")


@dataclass(frozen=True, kw_only=True)
class RawFeature:
    """A raw column that becomes embedding ids."""

    name: str
    kind: Kind
    table: str  # features of one table share one vocabulary
    min_count: int = 1  # rarer values are out of vocabulary
    hash_buckets: int | None = None  # hash into this many ids in place of a vocabulary
    nulls: Literal["error", "oov"] = "error"  # oov: out of vocabulary, or an empty list
    separator: str | None = None  # splits a text column into many values
    pooling: Pooling = "mean"
    max_length: int | None = None  # keeps the last values of a sequence
    aligned: str | None = None  # another sequence, which has as many values in every row


@dataclass(frozen=True, kw_only=True)
class RawNumeric:
    """A raw numeric column; it is stored standardised by the training rows' mean and standard deviation."""

    name: str
    log: bool = False  # log1p first
    nulls: Literal["error", "mean"] = "error"


@dataclass(frozen=True, kw_only=True)
class RawNumericSequence:
    """A raw column of numbers beside the values of the sequence `aligned`: as many in every row, and cut as it is."""

    name: str
    aligned: str
    log: bool = False  # log1p first
    nulls: Literal["error", "mean"] = "error"  # of single numbers
    separator: str | None = None  # splits a text column into many values


@dataclass(frozen=True, kw_only=True)
class DataSchema:
    """What the raw columns mean; `gmeta prepare --help` shows every key."""

    task: str
    label: str
    time: str | None = None
    item: str | None = None
    partition: str | None = None
    role: str | None = None  # says which rows are support and which are query
    weight: str | None = None  # how much a row counts in losses and metrics
    scenario: str | None = None  # the feature under categorical that slices reports
    label_threshold: float | None = None  # label >= threshold becomes 1, other labels 0
    features: tuple[RawFeature, ...] = ()
    numeric: tuple[RawNumeric, ...] = ()
    item_statistics: bool = False  # adds STATISTICS_COLUMNS, from training rows
    hash_seed: int = 0  # of every feature with hash_buckets
    numeric_sequence: tuple[RawNumericSequence, ...] = ()
    vector: tuple[Vector, ...] = ()

    def __post_init__(self) -> None:
        threshold = self.label_threshold
        finite = threshold is None or abs(threshold) <= FLOAT32_MAX
        require(finite, "label_threshold", threshold, "must be a finite number, within float32")
        if self.item_statistics and (taken := [c.name for c in self.numeric if c.name in STATISTICS_COLUMNS]):
            raise ValueError(f"schema: item_statistics adds a column {taken[0]!r} itself: rename yours")
        sequences = [*(column.name for column in self.numeric_sequence), *(vector.name for vector in self.vector)]
        for names in ([*(f.name for f in self.features), *sequences], self.numeric_names()):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"schema: feature {name!r} is listed twice")
        if not self.features:
            raise ValueError("schema: no feature is listed: name columns under categorical, multi or sequence")
        if self.item_statistics and self.item is None:
            raise ValueError("schema: item_statistics needs the key item: name the item column")
        _require_scenario(self.scenario, self.features)
        if any(f.name == self.scenario and f.hash_buckets is not None for f in self.features):
            raise ValueError(
                f"schema.scenario is {self.scenario!r}, which is hashed, and reports name its values: "
                "leave hash_buckets out"
            )
        for feature in self.features:
            if feature.table == ITEM_STATISTICS:
                raise ValueError(f"schema: table {ITEM_STATISTICS!r} is a reserved name: choose another")
        aligned: list[RawFeature | RawNumericSequence] = [*self.features, *self.numeric_sequence]
        for column in aligned:
            if column.aligned is not None:
                self._check_aligned(column, column.aligned)
        for vector in self.vector:
            one_valued = {f.name: f for f in self.features if f.kind == "categorical"}
            if vector.owner == "item" and (self.item not in one_valued or one_valued[self.item].hash_buckets):
                raise ValueError(
                    f"schema: vector {vector.name!r} is kept by the item's id, and the item ({self.item!r}) is no "
                    "categorical feature with a vocabulary: add it, or say owner: row"
                )
        for first, *others in self.tables().values():
            for other in others:
                if (first.min_count, first.hash_buckets) != (other.min_count, other.hash_buckets):
                    raise ValueError(
                        f"schema: {first.name!r} and {other.name!r} share table {first.table!r} but differ in "
                        "min_count or hash_buckets: give both the same values"
                    )

    def _check_aligned(self, column: RawFeature | RawNumericSequence, to: str) -> None:
        """Raise ValueError unless a column may be aligned with a sequence of this name."""
        whole = {f.name: f for f in self.features if f.kind == "sequence" and f.aligned is None}
        what = f"schema: {column.name!r} is aligned with {to!r}"
        if to not in whole or to == column.name:
            known = nearest(to, [name for name in whole if name != column.name])
            raise ValueError(f"{what}, which is no sequence that is aligned with no other: {known}")
        if whole[to].pooling != "none" or (isinstance(column, RawFeature) and column.pooling != "none"):
            raise ValueError(f"{what}, but one of them is pooled, which has no order: give both `pooling: none`")
        if isinstance(column, RawFeature) and column.max_length != whole[to].max_length:
            raise ValueError(
                f"{what}, but keeps {column.max_length} values and not {whole[to].max_length}: leave its max_length out"
            )

    def length_of(self, column: RawFeature | RawNumericSequence) -> int | None:
        """Return how many values a many-valued column keeps; None: all."""
        if isinstance(column, RawFeature):
            return column.max_length
        return next(f.max_length for f in self.features if f.name == column.aligned)

    def numeric_names(self) -> list[str]:
        """Return the names of the stored numeric columns, in stored order."""
        return [c.name for c in self.numeric] + (list(STATISTICS_COLUMNS) if self.item_statistics else [])

    def item_vectors(self) -> list[str]:
        """Return the names of the vectors that are kept by the item's id."""
        return [vector.name for vector in self.vector if vector.owner == "item"]

    def tables(self) -> dict[str, list[RawFeature]]:
        """Return table -> the features that share it."""
        out: dict[str, list[RawFeature]] = {}
        for feature in self.features:
            out.setdefault(feature.table, []).append(feature)
        return out

    def columns(self, roles: Iterable[Role]) -> list[str]:
        """Return the raw columns that must exist for the features and these roles, each once.

        Vectors of items are not among them: where their items are known, so are they (`item_vectors`).
        """
        names = [getattr(self, role) for role in roles]
        names += [f.name for f in self.features] + [c.name for c in self.numeric]
        names += [column.name for column in self.numeric_sequence]
        names += [vector.name for vector in self.vector if vector.owner == "row"]
        return list(dict.fromkeys(n for n in names if n is not None))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict, which `data_schema_from_json` reads back.

        What is not named is left out, as in what earlier releases wrote, so that packs keep their bytes.
        """
        return _told(asdict(self))


def data_schema_from_json(data: Mapping[str, Any]) -> DataSchema:
    """Return the schema that `DataSchema.to_json` wrote, checked as one in YAML is. ValueError names the key."""
    entry = _whole(data, DataSchema, "schema")
    features = []
    for i, value in enumerate(_list(entry.pop("features", None), "schema.features")):
        where = f"schema.features[{i}]"
        feature = _whole(value, RawFeature, where)
        _check(feature, "kind", (str,), where, "text")
        _choice(feature, "kind", tuple(_FEATURE_KEYS), where)
        _check(feature, "table", (str,), where, "a table name")
        kind = feature.pop("kind")
        features.append(_feature(_said(feature, RawFeature), kind, where))
    columns = _list(entry.pop("numeric", None), "schema.numeric")
    numeric = [_numeric(column, f"schema.numeric[{i}]") for i, column in enumerate(columns)]
    return _data_schema(entry, features, numeric, _numeric_sequences(entry))


def _said(entry: dict[str, Any], kind: type) -> dict[str, Any]:
    """Return a JSON object without defaults, which may have no meaning for this kind of entry."""
    defaults = {field.name: field.default for field in fields(kind)}
    return {key: value for key, value in entry.items() if value is not defaults[key] and value != defaults[key]}


def load_data_schema(path: str | Path) -> DataSchema:
    """Read a schema from YAML. ValueError names the file, the key and the cure."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"schema file {file} does not exist: `gmeta prepare --help` ends with a schema that has all keys"
        )
    values = read_mapping(file, "write it as `gmeta prepare --help` shows, in UTF-8")
    try:
        return parse_data_schema(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply: correct it, `gmeta prepare --help` shows a schema") from None


def parse_data_schema(values: Any) -> DataSchema:
    """Return the DataSchema that the mapping of a YAML schema describes. ValueError names the key and the cure."""
    keys = ("task", "label", "time", "item", "partition", "role", "weight", "scenario", "label_threshold")
    known = (*keys, *_FEATURE_KEYS, "numeric", "numeric_sequence", "vector", ITEM_STATISTICS, "hash_seed")
    entry = _mapping(values, "schema", known)
    features = [
        _feature(item, kind, f"schema.{kind}[{i}]")
        for kind in _FEATURE_KEYS
        for i, item in enumerate(_list(entry.pop(kind, None), f"schema.{kind}"))
    ]
    numeric = [_numeric(c, f"schema.numeric[{i}]") for i, c in enumerate(_list(entry.pop("numeric", None), "numeric"))]
    return _data_schema(entry, features, numeric, _numeric_sequences(entry))


def _data_schema(
    entry: dict[str, Any],
    features: list[RawFeature],
    numeric: list[RawNumeric],
    sequences: list[RawNumericSequence],
) -> DataSchema:
    """Return the schema of these columns; `entry` has the other keys, which are checked."""
    for key in ("task", "label"):
        if entry.get(key) is None:
            raise ValueError(f"schema: key {key!r} is missing: name the column")
    for key in ("task", "label", "time", "item", "partition", "role", "weight", "scenario"):
        _check(entry, key, (str, type(None)), "schema", "a column name")
    if entry.get("weight") is not None and entry["weight"] == entry["label"]:
        raise ValueError(f"schema: {entry['label']!r} is the label and the weight: name the column of the weights")
    if entry["label"] in [*(f.name for f in features), *(c.name for c in numeric), *(s.name for s in sequences)]:
        raise ValueError(f"schema: {entry['label']!r} is the label and a feature, so models would read it: take it out")
    if entry.get("label_threshold") is not None:
        _check_number(entry, "label_threshold", "schema")
    _check(entry, ITEM_STATISTICS, (bool,), "schema", "true or false")
    _check(entry, "hash_seed", (int,), "schema", "a whole number")
    vectors = _vectors(entry)
    entry.pop("vector", None)
    if entry["label"] in [vector.name for vector in vectors]:
        raise ValueError(f"schema: {entry['label']!r} is the label and a vector, so models would read it: take it out")
    lengths = {f.name: f.max_length for f in features}
    features = [
        replace(f, max_length=lengths.get(f.aligned)) if f.aligned is not None and f.max_length is None else f
        for f in features
    ]
    return DataSchema(
        features=tuple(features), numeric=tuple(numeric), numeric_sequence=tuple(sequences), vector=vectors, **entry
    )


def _feature(value: Any, kind: Kind, where: str) -> RawFeature:
    entry = _column(value, where, _FEATURE_KEYS[kind])
    _check(entry, "name", (str,), where, "a column name", required=True)
    _check(entry, "table", (str,), where, "a table name")
    for key in ("min_count", "hash_buckets", "max_length"):
        _check_count(entry, key, where)
    if "hash_buckets" in entry and "min_count" in entry:
        raise ValueError(f"{where}: min_count has no effect with hash_buckets: remove one")
    _check(entry, "separator", (str,), where, "a text such as '|'")
    _choice(entry, "nulls", ("error", "oov"), where)
    _check(entry, "aligned", (str,), where, "the name of a sequence")
    if "aligned" in entry:
        entry.setdefault("pooling", "none")
    _choice(entry, "pooling", _poolings(kind), where)
    return RawFeature(**{"kind": kind, "table": entry["name"], **entry})


def _vectors(entry: Mapping[str, Any]) -> tuple[Vector, ...]:
    """Return the vectors of a schema's mapping."""
    found = []
    for i, value in enumerate(_list(entry.get("vector"), "schema.vector")):
        where = f"schema.vector[{i}]"
        column = _column(value, where, [field.name for field in fields(Vector)])
        _check(column, "name", (str,), where, "a column name", required=True)
        _check(column, "dim", (int,), where, "a whole number of at least 1: how many numbers it has", required=True)
        _check_count(column, "dim", where)
        _choice(column, "owner", ("row", "item"), where)
        _choice(column, "dtype", ("fp32", "fp16"), where)
        found.append(Vector(**column))
    return tuple(found)


def _numeric_sequences(entry: dict[str, Any]) -> list[RawNumericSequence]:
    """Return the numeric sequences of a schema's mapping, which they are taken out of."""
    found = []
    for i, value in enumerate(_list(entry.pop("numeric_sequence", None), "schema.numeric_sequence")):
        where = f"schema.numeric_sequence[{i}]"
        column = _column(value, where, _NUMERIC_SEQUENCE_KEYS)
        _check(column, "name", (str,), where, "a column name", required=True)
        _check(
            column, "aligned", (str,), where, "the name of the sequence whose values it stands beside", required=True
        )
        _check(column, "log", (bool,), where, "true or false")
        _check(column, "separator", (str, type(None)), where, "a text such as '|'")
        _choice(column, "nulls", ("error", "mean"), where)
        found.append(RawNumericSequence(**column))
    return found


def _poolings(kind: str) -> tuple[str, ...]:
    return ("mean", "sum", "none") if kind == "sequence" else ("mean", "sum")


def _numeric(value: Any, where: str) -> RawNumeric:
    entry = _column(value, where, _NUMERIC_KEYS)
    _check(entry, "name", (str,), where, "a column name", required=True)
    _check(entry, "log", (bool,), where, "true or false")
    _choice(entry, "nulls", ("error", "mean"), where)
    return RawNumeric(**entry)
