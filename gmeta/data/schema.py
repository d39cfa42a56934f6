"""What a data set's columns mean: `DataSchema` for raw columns (from YAML), `PackSchema` for encoded ones.

This module imports neither torch nor DuckDB, so that command lines and error paths stay fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["categorical", "multi", "sequence"]
Pooling = Literal["sum", "mean"]

OOV = 0
"""The id of values that are not in the vocabulary (and of padding)."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An encoded categorical feature of a pack: ids are in [0, num_ids), 0 is out-of-vocabulary."""

    name: str
    kind: Kind
    num_ids: int
    table: str  # features of one table share vocabulary and embedding rows
    pooling: Pooling = "mean"  # of many-valued features


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """A numeric column as stored: (log1p(x) if log else x, then - mean, then / std)."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    log: bool = False


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

    def feature(self, name: str) -> Feature:
        """The feature called `name`; ValueError naming the known ones otherwise."""
        for feature in self.features:
            if feature.name == name:
                return feature
        known = ", ".join(f.name for f in self.features)
        raise ValueError(f"feature {name!r} is not in the pack; it has: {known}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict; `pack_schema_from_json` reads it back."""
        return asdict(self)


def pack_schema_from_json(data: dict[str, Any]) -> PackSchema:
    """Inverse of `PackSchema.to_json`."""
    features = tuple(Feature(**f) for f in data["features"])
    numeric = tuple(NumericColumn(**c) for c in data["numeric"])
    return PackSchema(**{**data, "features": features, "numeric": numeric})


def schema_difference(ours: PackSchema, theirs: PackSchema) -> list[str]:
    """Human-readable differences that make two packs incompatible; empty when they fit."""
    mine = {f.name: f for f in ours.features}
    other = {f.name: f for f in theirs.features}
    lines = [f"feature {n!r} is missing" for n in mine if n not in other]
    lines += [f"feature {n!r} is new" for n in other if n not in mine]
    lines += [
        f"feature {n!r}: {field} is {getattr(other[n], field)!r}, expected {getattr(mine[n], field)!r}"
        for n in mine
        if n in other
        for field in ("kind", "num_ids", "table", "pooling")
        if getattr(mine[n], field) != getattr(other[n], field)
    ]
    if [c.name for c in ours.numeric] != [c.name for c in theirs.numeric]:
        lines.append(
            f"numeric columns are {[c.name for c in theirs.numeric]}, expected {[c.name for c in ours.numeric]}"
        )
    if ours.binary_label != theirs.binary_label:
        lines.append(f"binary_label is {theirs.binary_label}, expected {ours.binary_label}")
    return lines
