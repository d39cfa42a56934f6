"""From fetched rows to the model's inputs: lookups for all features of a group at once, and each task's private rows.

A task that adapts a row does not copy it: as with linear layers, it reads the shared row plus its own change,
`E0[row] + delta[pair]`, where a pair is one (task, row) that occurs in the task's support. Rows of the query that the
support does not hold have no pair and stay E0. All adapted features that share a row share its pair; a feature
that is not adapted reads E0, also where it shares a row with an adapted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gmeta.batch import EmbeddedRows, Lookup
from gmeta.ops import Selection, bag_weights, product, select


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Index work of one group: F features over T x S support and T x Q query rows, U fetched rows, P pairs."""

    features: tuple[str, ...]
    lookup: Selection  # [F * (T*S + T*Q), U]: per feature, support rows then query rows
    support_pairs: Selection | None  # [F * T*S, P]; None where no feature is adapted
    query_pairs: Selection | None  # [F * T*Q, P]
    support_shape: tuple[int, int]  # T, S
    query_shape: tuple[int, int]  # T, Q


Plan = dict[str, GroupPlan]


@dataclass(frozen=True, slots=True)
class _Entries:
    """The entries of several lookups of one side, feature after feature."""

    columns: Tensor  # int64 [E]
    lengths: Tensor | None  # int64 [F * T*S]; None: one each
    weights: Tensor | None  # float64 [E]; None: all one
    adapted: Tensor | None  # bool [E]; None: all

    @property
    def rows(self) -> Tensor:
        if self.lengths is None:
            return torch.arange(len(self.columns), device=self.columns.device)
        return torch.repeat_interleave(self.lengths, output_size=len(self.columns))


def plan_rows(
    support: Mapping[str, Lookup],
    query: Mapping[str, Lookup],
    num_rows: Mapping[str, int],
    shapes: tuple[tuple[int, int], tuple[int, int]],
    features: Sequence[str],
    adapted: Sequence[str],
) -> Plan:
    """Index work for a batch, a function of lookups alone, so that a loader's thread can do it ahead.

    `num_rows[group]` is U, `shapes` is ((T, S), (T, Q)), `features` are those that the model reads.
    """
    plan: Plan = {}
    for group in dict.fromkeys(support[name].group for name in features):
        names = tuple(name for name in features if support[name].group == group)
        sides = [lookups[name] for name in names for lookups in (support, query)]
        entries = _entries(sides, [True] * len(sides))
        lookup = select(entries.columns, entries.lengths, num_rows[group], entries.weights)
        chosen = [name in adapted for name in names]
        pairs: tuple[Selection | None, Selection | None] = (None, None)
        if any(chosen):
            pairs = _pairs(_entries(sides[::2], chosen), _entries(sides[1::2], chosen), num_rows[group], shapes)
        plan[group] = GroupPlan(names, lookup, *pairs, *shapes)
    return plan


def _entries(lookups: list[Lookup], chosen: list[bool]) -> _Entries:
    columns = torch.cat([lookup.index.reshape(-1) for lookup in lookups])
    lengths = weights = adapted = None
    if any(lookup.lengths is not None for lookup in lookups):
        lengths = torch.cat([_lengths(lookup) for lookup in lookups])
        if any(lookup.lengths is not None and lookup.pooling == "mean" for lookup in lookups):
            weights = torch.cat([_weights(lookup) for lookup in lookups])
    if not all(chosen):
        sizes = torch.tensor([lookup.index.numel() for lookup in lookups], device=columns.device)
        flags = torch.tensor(chosen, device=columns.device)
        adapted = torch.repeat_interleave(flags, sizes, output_size=len(columns))
    return _Entries(columns, lengths, weights, adapted)


def _lengths(lookup: Lookup) -> Tensor:
    return torch.ones_like(lookup.index).reshape(-1) if lookup.lengths is None else lookup.lengths.reshape(-1)


def _weights(lookup: Lookup) -> Tensor:
    if lookup.lengths is None or lookup.pooling == "sum":
        return torch.ones(lookup.index.numel(), dtype=torch.float64, device=lookup.index.device)
    return bag_weights(lookup.lengths.reshape(-1), len(lookup.index))


def _pairs(
    support: _Entries, query: _Entries, num_rows: int, shapes: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[Selection, Selection]:
    """Which pair each support and query entry reads; pairs are numbered over those of the adapted support entries."""
    keys, rows = [], []
    for side, shape in zip((support, query), shapes, strict=True):
        tasks, examples = shape
        rows.append(side.rows)
        task = rows[-1] % max(tasks * examples, 1) // max(examples, 1)
        keys.append(task * num_rows + side.columns)
    _, pair = torch.unique(torch.cat(keys), return_inverse=True)
    in_support, in_query = torch.split(pair, [len(keys[0]), len(keys[1])])
    touched = torch.zeros(len(pair), dtype=torch.bool, device=pair.device)
    touched[in_support if support.adapted is None else in_support[support.adapted]] = True
    number = touched.cumsum(0) - 1
    num_pairs = int(touched.sum())
    selections = []
    for side, row, of in zip((support, query), rows, (in_support, in_query), strict=True):
        found = touched[of] if side.adapted is None else touched[of] & side.adapted
        num_flat_rows = len(side.columns) if side.lengths is None else len(side.lengths)
        lengths = torch.bincount(row[found], minlength=num_flat_rows)
        weights = None if side.weights is None else side.weights[found]
        selections.append(select(number[of[found]], lengths, num_pairs, weights))
    return selections[0], selections[1]


def shared_rows(rows: EmbeddedRows, plan: Plan) -> dict[str, Tensor]:
    """E0 as every feature of a group reads it: [F, T*S + T*Q, d], pooled where the feature is a bag."""
    out = {}
    for group, part in plan.items():
        weight = rows.weights[group]
        out[group] = product(weight, part.lookup).view(len(part.features), _total(part), weight.shape[1])
    return out


def split_sides(shared: dict[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(support [F, T*S, d], query [F, T*Q, d]) of each group."""
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for group, values in shared.items():
        for side, part in zip(sides, torch.split(values, _sizes(plan[group]), 1), strict=True):
            side[group] = part
    return sides


def changed(values: Tensor, delta: Tensor | None, pairs: Selection | None) -> Tensor:
    """Rows as the tasks see them: shared [F, n, d] plus their own change, delta [P, d]."""
    if delta is None or pairs is None:
        return values
    return values + product(delta, pairs).view(values.shape)


def by_feature(values: Mapping[str, Tensor], plan: Plan, leading: tuple[int, ...]) -> dict[str, Tensor]:
    """The model's `embedded`: group -> [F, n, d] becomes feature -> [*leading, d]."""
    embedded: dict[str, Tensor] = {}
    for group, part in plan.items():
        stacked = values[group]
        shaped = stacked.reshape(stacked.shape[0], *leading, stacked.shape[-1])
        embedded.update(zip(part.features, shaped.unbind(0), strict=True))
    return embedded


def _sizes(part: GroupPlan) -> list[int]:
    return [shape[0] * shape[1] for shape in (part.support_shape, part.query_shape)]


def _total(part: GroupPlan) -> int:
    return sum(_sizes(part))
