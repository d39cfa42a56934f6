"""Raw columns that become ids and numbers, as a schema in YAML or JSON names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gmeta.data.entries import as_list, require_choice, require_column, require_count, require_type

Kind = Literal["categorical", "multi", "sequence"]
Pooling = Literal["sum", "mean", "none"]

_MANY = ("name", "table", "min_count", "hash_buckets", "nulls", "separator", "vocabulary")
FEATURE_KEYS: dict[Kind, tuple[str, ...]] = {
    "categorical": ("name", "table", "min_count", "hash_buckets", "nulls", "text", "vocabulary"),
    "multi": (*_MANY, "pooling"),
    "sequence": (*_MANY, "pooling", "max_length", "aligned", "text"),
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
    text: bool = False  # its values are texts, which a model may read
    vocabulary: Literal["train", "all"] = (
        "train"  # the rows whose values get ids: training rows, or those of all splits
    )

    @property
    def may_lack_elements(self) -> bool:
        """Say whether an element of a list may be missing: an item without a text is a part of a history too."""
        return self.text and self.nulls == "oov"


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


def read_feature(value: Any, kind: Kind, where: str) -> RawFeature:
    """Return a feature as YAML names it. ValueError says `where` it is wrong."""
    entry = require_column(value, where, FEATURE_KEYS[kind])
    require_type(entry, "name", (str,), where, "a column name", required=True)
    require_type(entry, "table", (str,), where, "a table name")
    for key in ("min_count", "hash_buckets", "max_length"):
        require_count(entry, key, where)
    if "hash_buckets" in entry and "min_count" in entry:
        raise ValueError(f"{where}: min_count has no effect with hash_buckets: remove one")
    require_type(entry, "separator", (str,), where, "a text such as '|'")
    require_choice(entry, "nulls", ("error", "oov"), where)
    require_type(entry, "aligned", (str,), where, "the name of a sequence")
    if "aligned" in entry:
        entry.setdefault("pooling", "none")
    require_choice(entry, "pooling", poolings_of(kind), where)
    require_type(entry, "text", (bool,), where, "true or false")
    require_choice(entry, "vocabulary", ("train", "all"), where)
    for key in ("min_count", "hash_buckets"):
        if entry.get("vocabulary") == "all" and key in entry:
            raise ValueError(f"{where}: {key} has no effect with `vocabulary: all`, which gives every value an id")
    if entry.get("text") and "hash_buckets" in entry:
        raise ValueError(f"{where}: text needs a vocabulary, which holds the texts: leave hash_buckets out")
    if entry.get("text") and kind == "sequence" and entry.get("pooling") != "none":
        raise ValueError(f"{where}: text needs `pooling: none`: a model reads the texts of a sequence one by one")
    return RawFeature(**{"kind": kind, "table": entry["name"], **entry})


def read_numeric_sequences(entry: dict[str, Any]) -> list[RawNumericSequence]:
    """Return the numeric sequences of a schema's mapping, which they are taken out of."""
    found = []
    for i, value in enumerate(as_list(entry.pop("numeric_sequence", None), "schema.numeric_sequence")):
        where = f"schema.numeric_sequence[{i}]"
        column = require_column(value, where, _NUMERIC_SEQUENCE_KEYS)
        require_type(column, "name", (str,), where, "a column name", required=True)
        require_type(
            column, "aligned", (str,), where, "the name of the sequence whose values it stands beside", required=True
        )
        require_type(column, "log", (bool,), where, "true or false")
        require_type(column, "separator", (str, type(None)), where, "a text such as '|'")
        require_choice(column, "nulls", ("error", "mean"), where)
        found.append(RawNumericSequence(**column))
    return found


def poolings_of(kind: str) -> tuple[str, ...]:
    """Return how values of a kind of feature may be pooled."""
    return ("mean", "sum", "none") if kind == "sequence" else ("mean", "sum")


def read_numeric(value: Any, where: str) -> RawNumeric:
    """Return a numeric column as YAML names it. ValueError says `where` it is wrong."""
    entry = require_column(value, where, _NUMERIC_KEYS)
    require_type(entry, "name", (str,), where, "a column name", required=True)
    require_type(entry, "log", (bool,), where, "true or false")
    require_choice(entry, "nulls", ("error", "mean"), where)
    return RawNumeric(**entry)
