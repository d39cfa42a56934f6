"""What a data set's columns mean: `DataSchema` for raw columns (from YAML), `PackSchema` for encoded ones.

This module imports neither torch nor DuckDB, so that command lines and error paths stay fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from gmeta.core.errors import nearest, require
from gmeta.core.files import read_mapping
from gmeta.data.entries import (
    as_list,
    is_whole_number,
    require_choice,
    require_column,
    require_count,
    require_keys,
    require_number,
    require_type,
    whole_object,
)
from gmeta.data.raw_columns import (
    FEATURE_KEYS,
    Kind,
    Pooling,
    RawFeature,
    RawNumeric,
    RawNumericSequence,
    poolings_of,
    read_feature,
    read_numeric,
    read_numeric_sequences,
)

ENCODING = 2
"""The version of the rules by which raw values become ids and numbers (gmeta/data/prepare/values.py)."""

LABEL_LOSSES = ("bce", "mse", "l1", "huber")
"""What several labels may be trained with."""

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
    num_texts: int | None = None  # of values that are texts: ids from num_ids on are texts without embedding rows


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """A numeric column as stored: (log1p(x) if log else x, then - mean, then / std)."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """One of several labels. A row may lack it, and then counts for the others only."""

    name: str
    loss: str  # bce, mse, l1 or huber
    weight: float = 1.0  # of its loss in the sum over labels
    mean: float = 0.0  # over training rows that have it; 0 in a schema of raw columns


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
    labels: tuple[LabelColumn, ...] = ()  # several labels, of which `label` is the first; empty: `label` alone
    identity: dict[str, str] | None = (
        None  # of each table's ids (see `data.identity`); None: made before it was recorded
    )
    encoding: int = ENCODING  # packs and runs that record none have 1
    numeric_sequence: tuple[NumericSequence, ...] = ()
    vector: tuple[Vector, ...] = ()
    next_item: bool = False  # rows are events, a query row is the item that follows its task's history
    catalogue: tuple[str, ...] = ()  # of a next-item pack: the features that items own (see `data.catalogue`)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the names of all labels, in stored order."""
        return tuple(label.name for label in self.labels) or (self.label,)

    def losses(self, loss: str) -> tuple[str, ...]:
        """Return the loss of each label; `loss` is that of the one label, where there is one."""
        return tuple(label.loss for label in self.labels) or (loss,)

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
    entry = whole_object(data, PackSchema, "schema")
    encoding = entry.get("encoding", 1)
    if not is_whole_number(encoding) or encoding not in range(1, ENCODING + 1):
        raise ValueError(f"the data have encoding {encoding!r}, this gmeta reads 1 to {ENCODING}: upgrade gmeta")
    for key in ("label", "task"):
        require_type(entry, key, (str,), "schema", "a column name", required=True)
    for key in ("item", "time", "weight", "scenario"):
        require_type(entry, key, (str, type(None)), "schema", "a column name")
    require_type(entry, "binary_label", (bool,), "schema", "true or false", required=True)
    require_number(entry, "label_mean", "schema")
    identity = entry.get("identity")
    if identity is not None and not (
        isinstance(identity, dict) and all(isinstance(text, str) for pair in identity.items() for text in pair)
    ):
        raise ValueError(f"schema.identity is {identity!r}: must map tables to texts")
    features = tuple(_encoded(f, f"schema.features[{i}]") for i, f in enumerate(as_list(entry["features"], "features")))
    numeric = tuple(_scaled(c, f"schema.numeric[{i}]") for i, c in enumerate(as_list(entry["numeric"], "numeric")))
    found = as_list(entry.get("numeric_sequence"), "numeric_sequence")
    sequences = tuple(_scaled_sequence(c, f"schema.numeric_sequence[{i}]") for i, c in enumerate(found))
    _require_scenario(entry.get("scenario"), features)
    labels = _labels(entry.pop("labels", ()), entry["label"])
    return PackSchema(
        **{
            **entry,
            "catalogue": _catalogue(entry, features),
            "features": features,
            "numeric": numeric,
            "encoding": encoding,
            "labels": labels,
            "numeric_sequence": sequences,
            "vector": _vectors(entry),
        }
    )


def _catalogue(entry: dict[str, Any], features: Sequence[Feature]) -> tuple[str, ...]:
    """Return the features that items own. ValueError unless the schema of a next-item pack has them, and an item."""
    require_type(entry, "next_item", (bool,), "schema", "true or false")
    owned = as_list(entry.get("catalogue"), "schema.catalogue")
    known = [feature.name for feature in features if feature.kind == "categorical"]
    if entry.get("next_item") and entry.get("item") not in known:
        raise ValueError(f"schema.item is {entry.get('item')!r}, which is no feature: a next-item pack has one")
    if owned and not entry.get("next_item"):
        raise ValueError(f"schema.catalogue is {owned!r}: only a next-item pack has a catalogue")
    for name in owned:
        if name not in known or name == entry.get("item"):
            raise ValueError(f"schema.catalogue names {name!r}, which is no feature under categorical")
    return tuple(owned)


def _labels(value: Any, first: str) -> tuple[LabelColumn, ...]:
    """Return labels as JSON holds them, of which `first` is the first."""
    found = []
    for i, item in enumerate(as_list(value, "schema.labels")):
        where = f"schema.labels[{i}]"
        entry = whole_object(item, LabelColumn, where)
        require_type(entry, "name", (str,), where, "a column name")
        require_type(entry, "loss", (str,), where, "a loss")
        require_choice(entry, "loss", LABEL_LOSSES, where)
        for key in ("weight", "mean"):
            require_number(entry, key, where)
        found.append(LabelColumn(**entry))
    _require_labels(found, first)
    return tuple(found)


def _require_labels(labels: Sequence[LabelColumn], first: str) -> None:
    names = [label.name for label in labels]
    if labels and (len(names) < 2 or len(set(names)) < len(names) or names[0] != first):
        raise ValueError(f"schema.labels are {names}: must be two or more, each once; write one as label: COLUMN")
    for label in labels:
        if not label.weight > 0:
            raise ValueError(f"schema.label_weights.{label.name} is {label.weight!r}: must be more than 0")


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a schema's JSON without keys that earlier releases did not know, where they say nothing."""
    usual = {"aligned": None, "num_texts": None, "text": False, "vocabulary": "train"}
    features = [{k: v for k, v in f.items() if k not in usual or v != usual[k]} for f in entry["features"]]
    new = ("role", "weight", "scenario", "labels", "numeric_sequence", "vector", "next_item", "catalogue")
    return {key: value for key, value in {**entry, "features": features}.items() if key not in new or value}


def _require_scenario(scenario: str | None, features: Iterable[Feature | RawFeature]) -> None:
    """Raise ValueError, with the nearest name, for a scenario that is no feature of one value a row."""
    known = [feature.name for feature in features if feature.kind == "categorical"]
    if scenario is not None and scenario not in known:
        hint = nearest(scenario, known) if known else "there is none"
        raise ValueError(f"schema.scenario is {scenario!r}, which is no feature under categorical: {hint}")


def _encoded(value: Any, where: str) -> Feature:
    entry = whole_object(value, Feature, where)
    require_type(entry, "name", (str,), where, "a column name")
    require_type(entry, "table", (str,), where, "a table name")
    require_choice(entry, "kind", ("categorical", "multi", "sequence"), where)
    require_choice(entry, "pooling", poolings_of(entry["kind"]), where)
    require_count(entry, "num_ids", where)
    require_type(entry, "aligned", (str, type(None)), where, "the name of a sequence")
    if (texts := entry.get("num_texts")) is not None and not (is_whole_number(texts) and texts >= entry["num_ids"]):
        raise ValueError(f"{where}.num_texts is {texts!r}: must be a whole number of at least num_ids")
    return Feature(**entry)


def _scaled(value: Any, where: str) -> NumericColumn:
    return NumericColumn(**_checked_scale(whole_object(value, NumericColumn, where), where))


def _scaled_sequence(value: Any, where: str) -> NumericSequence:
    entry = whole_object(value, NumericSequence, where)
    require_type(entry, "aligned", (str,), where, "the name of a sequence")
    return NumericSequence(**_checked_scale(entry, where))


def _checked_scale(entry: dict[str, Any], where: str) -> dict[str, Any]:
    require_type(entry, "name", (str,), where, "a column name")
    require_type(entry, "log", (bool,), where, "true or false")
    for key in ("mean", "std"):
        require_number(entry, key, where)
    if entry.get("std", 1.0) <= 0:
        raise ValueError(f"{where}.std is {entry['std']!r}: must be more than 0")
    return entry


# ------------------------------------------------------------------------------------------- raw columns


Role = Literal["task", "label", "weight", "time", "item", "partition", "role"]

ITEM_STATISTICS = "item_statistics"
"""Schema key, and the name of the file beside the vocabularies."""
STATISTICS_COLUMNS = ("item_mean", "item_log_count")


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
    labels: tuple[LabelColumn, ...] = ()  # several labels, of which `label` is the first; empty: `label` alone
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
        _require_labels(self.labels, self.label)
        if self.labels and (threshold is not None or self.item_statistics):
            key = "label_threshold" if threshold is not None else ITEM_STATISTICS
            raise ValueError(f"schema: {key} is of one label, and labels names several: leave {key} out")
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
                if first.vocabulary != other.vocabulary:
                    raise ValueError(
                        f"schema: {first.name!r} and {other.name!r} share table {first.table!r} but differ in "
                        "vocabulary: give both the same value"
                    )
                if first.text != other.text:
                    of_text, plain = (first, other) if first.text else (other, first)
                    raise ValueError(
                        f"schema: {of_text.name!r} and {plain.name!r} share table {first.table!r}, and only the first "
                        "has text: true: say it of both, or give them tables of their own"
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

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the names of all labels, in stored order."""
        return tuple(label.name for label in self.labels) or (self.label,)

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
        names = [n for role in roles for n in (self.label_names if role == "label" else [getattr(self, role)])]
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
    entry = whole_object(data, DataSchema, "schema")
    entry["labels"] = _labels(entry.pop("labels", ()), entry["label"])
    features = []
    for i, value in enumerate(as_list(entry.pop("features", None), "schema.features")):
        where = f"schema.features[{i}]"
        feature = whole_object(value, RawFeature, where)
        require_type(feature, "kind", (str,), where, "text")
        require_choice(feature, "kind", tuple(FEATURE_KEYS), where)
        require_type(feature, "table", (str,), where, "a table name")
        kind = feature.pop("kind")
        features.append(read_feature(_said(feature, RawFeature), kind, where))
    columns = as_list(entry.pop("numeric", None), "schema.numeric")
    numeric = [read_numeric(column, f"schema.numeric[{i}]") for i, column in enumerate(columns)]
    return _data_schema(entry, features, numeric, read_numeric_sequences(entry))


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
    known = (
        *keys,
        "labels",
        "label_weights",
        *FEATURE_KEYS,
        "numeric",
        "numeric_sequence",
        "vector",
        ITEM_STATISTICS,
        "hash_seed",
    )
    entry = require_keys(values, "schema", known)
    entry |= _several_labels(entry)
    features = [
        read_feature(item, kind, f"schema.{kind}[{i}]")
        for kind in FEATURE_KEYS
        for i, item in enumerate(as_list(entry.pop(kind, None), f"schema.{kind}"))
    ]
    numeric = [
        read_numeric(c, f"schema.numeric[{i}]") for i, c in enumerate(as_list(entry.pop("numeric", None), "numeric"))
    ]
    return _data_schema(entry, features, numeric, read_numeric_sequences(entry))


def _several_labels(entry: dict[str, Any]) -> dict[str, Any]:
    """Take the keys `labels` and `label_weights` out of a YAML schema; return what they say, nothing without labels."""
    labels, weights = entry.pop("labels", None), entry.pop("label_weights", None)
    if labels is None:
        if weights is not None:
            raise ValueError("schema.label_weights has no meaning without labels: leave it out")
        return {}
    if entry.get("label") is not None:
        raise ValueError("schema: label and labels are both there: write one label as label, several as labels")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise ValueError(
            f"schema.labels is {labels!r}: must map two columns or more to their losses, as in "
            "{click: bce, pay: bce}; write one label as label: COLUMN"
        )
    weights = require_keys({} if weights is None else weights, "schema.label_weights", [str(name) for name in labels])
    found = []
    for name, loss in labels.items():
        require_type({"name": name}, "name", (str,), "schema.labels", "a column name (a number in quotes)")
        require_choice({name: loss}, name, LABEL_LOSSES, "schema.labels")
        require_number(weights, name, "schema.label_weights")
        found.append(LabelColumn(name=name, loss=loss, weight=float(weights.get(name, 1.0))))
    return {"label": found[0].name, "labels": tuple(found)}


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
        require_type(entry, key, (str, type(None)), "schema", "a column name")
    vectors = _vectors(entry)
    entry.pop("vector", None)
    names = [*(f.name for f in features), *(c.name for c in numeric), *(s.name for s in sequences)]
    read = dict.fromkeys(names, "feature")
    read |= dict.fromkeys((vector.name for vector in vectors), "vector")
    for name in [label.name for label in entry.get("labels", ())] or [entry["label"]]:
        if name == entry.get("weight"):
            raise ValueError(f"schema: {name!r} is the label and the weight: name the column of the weights")
        if name in read:
            raise ValueError(f"schema: {name!r} is the label and a {read[name]}, so models would read it: take it out")
    if entry.get("label_threshold") is not None:
        require_number(entry, "label_threshold", "schema")
    require_type(entry, ITEM_STATISTICS, (bool,), "schema", "true or false")
    require_type(entry, "hash_seed", (int,), "schema", "a whole number")
    lengths = {f.name: f.max_length for f in features}
    features = [
        replace(f, max_length=lengths.get(f.aligned)) if f.aligned is not None and f.max_length is None else f
        for f in features
    ]
    return DataSchema(
        features=tuple(features), numeric=tuple(numeric), numeric_sequence=tuple(sequences), vector=vectors, **entry
    )


def _vectors(entry: Mapping[str, Any]) -> tuple[Vector, ...]:
    """Return the vectors of a schema's mapping."""
    found = []
    for i, value in enumerate(as_list(entry.get("vector"), "schema.vector")):
        where = f"schema.vector[{i}]"
        column = require_column(value, where, [field.name for field in fields(Vector)])
        require_type(column, "name", (str,), where, "a column name", required=True)
        require_type(
            column, "dim", (int,), where, "a whole number of at least 1: how many numbers it has", required=True
        )
        require_count(column, "dim", where)
        require_choice(column, "owner", ("row", "item"), where)
        require_choice(column, "dtype", ("fp32", "fp16"), where)
        found.append(Vector(**column))
    return tuple(found)
