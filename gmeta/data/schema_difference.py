"""Whether encoded data of one schema fit a model that was made for another, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from gmeta.data.schema import PackSchema


def without_sizes(schema: PackSchema) -> PackSchema:
    """Return a schema without what grows from day to day: numbers of ids, and the vocabularies that they are of."""
    features = (replace(f, num_ids=1, num_texts=None if f.num_texts is None else 1) for f in schema.features)
    return replace(schema, features=tuple(features), identity=None)


def schema_difference(ours: PackSchema, theirs: PackSchema) -> list[str]:
    """Return why encoded data of schema `theirs` do not fit `ours`, one line for each difference. The list is empty
    when they fit.

    It compares features and sizes, the numeric columns with their means, deviations and logarithms, and the columns
    that are task, item, label and weight. `identity_difference` compares the vocabularies too.
    """
    lines = _label_difference(ours, theirs)
    mine = {f.name: f for f in ours.features}
    other = {f.name: f for f in theirs.features}
    lines += [f"feature {n!r} is missing" for n in mine if n not in other]
    lines += [f"feature {n!r} is new" for n in other if n not in mine]
    lines += [
        f"feature {n!r}: {field} is {getattr(other[n], field)!r}, expected {getattr(mine[n], field)!r}"
        for n in mine
        if n in other
        for field in ("kind", "num_ids", "table", "pooling", "aligned")
        if getattr(mine[n], field) != getattr(other[n], field)
    ]
    lines += [
        f"feature {n!r} {'has no texts' if other[n].num_texts is None else 'has texts'}, expected the contrary"
        for n in mine
        if n in other and (mine[n].num_texts is None) != (other[n].num_texts is None)
    ]
    lines += _columns_difference(ours.numeric, theirs.numeric, "numeric column")
    lines += _columns_difference(ours.numeric_sequence, theirs.numeric_sequence, "numeric sequence")
    lines += _columns_difference(ours.vector, theirs.vector, "vector")
    lines += [
        f"{field} is {getattr(theirs, field)!r}, expected {getattr(ours, field)!r}"
        for field in ("task", "item", "label", "binary_label", "weight", "next_item", "catalogue")
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if ours.encoding != theirs.encoding:
        lines.append(
            f"encoding is {theirs.encoding}, expected {ours.encoding}: prepare the raw rows again and train anew"
        )
    return lines


def _label_difference(ours: PackSchema, theirs: PackSchema) -> list[str]:
    mine, other = ([(label.name, label.loss) for label in schema.labels] for schema in (ours, theirs))
    if mine == other:
        return []
    told = [", ".join(f"{name}: {loss}" for name, loss in labels) or "one label" for labels in (other, mine)]
    return [f"labels are {told[0]}, expected {told[1]}"]


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
