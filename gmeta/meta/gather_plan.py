"""From fetched rows to the model's inputs: lookups for all features of a group at once, and each task's private rows.

A task that adapts a row does not copy it: as with linear layers, it reads the shared row plus its own change,
`E0[row] + delta[pair]`, where a pair is one (task, row) that occurs in the task's support. Rows of the query that the
support does not hold have no pair and stay E0. All adapted features that share a row share its pair; a feature
that is not adapted reads E0, also where it shares a row with an adapted one.

Looked-up values lie as [examples, features, d], so that what a model concatenates is a view (`gmeta.meta.views`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Lookup
from gmeta.core.selection import Ints, Selection, product, select, sort_keys

Shapes = tuple[tuple[int, int], tuple[int, int]]
"""((T, S), (T, Q))."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Index work of one group: F features over n examples, U fetched rows, P pairs.

    Where features are adapted, `lookups` and `pairs` have two parts, support (n = T*S) and query (n = T*Q).
    Where none is, `lookups` has one, n = T*S + T*Q.
    """

    features: tuple[str, ...]
    lookups: tuple[Selection, ...]  # each [n * F, U]
    pairs: tuple[Selection, ...]  # each [n * F, P]; empty where no feature is adapted


Plan = dict[str, GroupPlan]


@dataclass(frozen=True, slots=True)
class _Entries:
    """The entries of all features of a group on one side, example after example."""

    columns: Ints  # [E]
    lengths: Ints | None  # [n * F]; None: one each
    weights: NDArray[np.float64] | None  # [E]; None: all one
    task: Ints  # [E]
    adapted: NDArray[np.bool_] | None  # [E]; None: all

    @property
    def rows(self) -> Ints:
        """Which of the n * F an entry belongs to, [E]."""
        return np.arange(len(self.columns)) if self.lengths is None else _repeat(self.lengths)


def plan_rows(
    support: Mapping[str, Lookup],
    query: Mapping[str, Lookup],
    num_rows: Mapping[str, int],
    shapes: Shapes,
    features: Sequence[str],
    adapted: Sequence[str],
    split: bool = True,
) -> Plan:
    """Index work for a batch, a function of lookups alone, so that a loader's thread can do it ahead.

    `num_rows[group]` is U, `features` are those that the model reads. Without `split`, for plain training, support
    and query are one side, and no feature is adapted.
    """
    plan: Plan = {}
    for group in dict.fromkeys(support[name].group for name in features):
        names = tuple(name for name in features if support[name].group == group)
        flags = np.array([name in adapted for name in names])
        sides = [
            _entries([side[name] for name in names], shape, flags)
            for side, shape in zip((support, query), shapes, strict=True)
        ]
        parts = sides if split else [_joined(*sides)]
        lookups = tuple(_selection(part, num_rows[group]) for part in parts)
        pairs = _pairs(sides[0], sides[1], num_rows[group]) if flags.any() else ()
        plan[group] = GroupPlan(names, lookups, pairs)
    return plan


def _entries(lookups: list[Lookup], shape: tuple[int, int], flags: NDArray[np.bool_]) -> _Entries:
    tasks, length = shape
    num_examples, num_features = tasks * length, len(lookups)
    if all(lookup.lengths is None for lookup in lookups):
        columns = np.stack([lookup.index.cpu().numpy().reshape(-1) for lookup in lookups], 1).reshape(-1)
        task = np.repeat(np.arange(tasks), length * num_features)
        return _Entries(columns, None, None, task, None if flags.all() else np.tile(flags, num_examples))
    sizes = [_lengths(lookup) for lookup in lookups]
    lengths = np.stack(sizes, 1).reshape(-1)
    starts = (np.cumsum(lengths) - lengths).reshape(num_examples, num_features)
    columns, weights = np.empty(int(lengths.sum()), np.int64), np.ones(int(lengths.sum()))
    for i, (lookup, size) in enumerate(zip(lookups, sizes, strict=True)):
        place = np.repeat(starts[:, i] - (np.cumsum(size) - size), size) + np.arange(int(size.sum()))
        columns[place] = lookup.index.cpu().numpy().reshape(-1)
        if lookup.lengths is not None and lookup.pooling == "mean":
            weights[place] = np.repeat(1.0 / np.maximum(size, 1), size)
    row = _repeat(lengths)
    return _Entries(
        columns,
        lengths,
        weights if (weights != 1).any() else None,
        row // max(length * num_features, 1),
        None if flags.all() else flags[row % num_features],
    )


def _lengths(lookup: Lookup) -> Ints:
    lengths = torch.ones_like(lookup.index) if lookup.lengths is None else lookup.lengths
    return lengths.cpu().numpy().reshape(-1)


def _repeat(lengths: Ints) -> Ints:
    return np.repeat(np.arange(len(lengths)), lengths)


def _joined(first: _Entries, second: _Entries) -> _Entries:
    """Both sides as one; adaptation is left out."""
    pieces = (first, second)
    lengths = weights = None
    if any(piece.lengths is not None for piece in pieces):
        lengths = np.concatenate([np.ones_like(p.columns) if p.lengths is None else p.lengths for p in pieces])
    if any(piece.weights is not None for piece in pieces):
        weights = np.concatenate([np.ones(len(p.columns)) if p.weights is None else p.weights for p in pieces])
    columns, task = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("columns", "task"))
    return _Entries(columns, lengths, weights, task, None)


def _selection(side: _Entries, num_columns: int) -> Selection:
    lengths = None if side.lengths is None else torch.from_numpy(side.lengths)
    weights = None if side.weights is None else torch.from_numpy(side.weights)
    return select(torch.from_numpy(side.columns), lengths, num_columns, weights)


def _pairs(support: _Entries, query: _Entries, num_rows: int) -> tuple[Selection, Selection]:
    """Which pair each entry reads; pairs are numbered over those of the adapted support entries.

    One sort by (task, row) gives the pairs and both matrices in both orders.
    """
    sides = (support, query)
    keys = np.concatenate([side.task * num_rows + side.columns for side in sides])
    ordered, order = sort_keys(keys, (int(support.task.max(initial=0)) + 1) * max(num_rows, 1))
    is_first = np.empty(len(ordered), bool)
    is_first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    unique = np.cumsum(is_first) - 1
    in_support = order < len(support.columns)
    counted = in_support
    if any(side.adapted is not None for side in sides):
        adapted = np.concatenate([np.ones(len(s.columns), bool) if s.adapted is None else s.adapted for s in sides])
        adapted = adapted[order]
        counted = in_support & adapted
    touched = np.zeros(int(is_first.sum()), bool)
    touched[unique[counted]] = True
    number = np.cumsum(touched) - 1
    found = touched[unique] if counted is in_support else touched[unique] & adapted
    pair, num_pairs = number[unique], int(touched.sum())
    return (
        _pair_selection(support, order[found & in_support], pair[found & in_support], num_pairs),
        _pair_selection(query, order[found & ~in_support] - len(support.columns), pair[found & ~in_support], num_pairs),
    )


def _pair_selection(side: _Entries, entry: Ints, pair: Ints, num_pairs: int) -> Selection:
    """The matrix of entries `entry` that read pairs `pair`, given in the order of the pairs."""
    of_entry = np.full(len(side.columns), -1, np.int64)
    of_entry[entry] = pair
    reads = of_entry >= 0
    row = side.rows
    if side.lengths is None:
        row_offsets = np.concatenate([[0], np.cumsum(reads)])
    else:
        counts = np.bincount(row[reads], minlength=len(side.lengths))
        row_offsets = np.concatenate([[0], np.cumsum(counts)])
    column_offsets = np.concatenate([[0], np.cumsum(np.bincount(pair, minlength=num_pairs))])
    arrays = (of_entry[reads], row_offsets, row[entry], column_offsets)
    weights = () if side.weights is None else (side.weights[reads], side.weights[entry])
    return Selection(
        *(torch.from_numpy(np.asarray(array, np.int64)) for array in arrays), *map(torch.from_numpy, weights)
    )


def shared_rows(rows: EmbeddedRows, plan: Plan, side: int = 0) -> dict[str, Tensor]:
    """E0 as the features of each group read it on a side: group -> [n, F, d], pooled where the feature is a bag."""
    out = {}
    for group, part in plan.items():
        weight = rows.weights[group]
        out[group] = product(weight, part.lookups[side]).view(-1, len(part.features), weight.shape[1])
    return out


def changed(values: Tensor, delta: Tensor | None, pairs: Selection | None) -> Tensor:
    """Rows as the tasks see them: shared [n, F, d] plus their own change, delta [P, d]."""
    if delta is None or pairs is None:
        return values
    return product(delta, pairs, values.flatten(0, 1)).view(values.shape)
