"""From fetched rows to the model's inputs: lookups for all features of a table at once, and each task's private rows.

A task that adapts a row does not copy it: as with linear layers, it reads the shared row plus its own change,
`E0[row] + delta[pair]`, where a pair is one (task, row) that occurs in the task's support. Rows of the query that the
support does not hold have no pair and stay E0. All adapted features that share a row share its pair; a feature
that is not adapted reads E0, also where it shares a row with an adapted one.

Looked-up values lie as [examples, slots, d], so that what a model concatenates is a view (`gmeta.meta.views`). A
feature has one slot. A sequence that is not pooled has L, as many as the longest of the side has values, and at least
one. A slot beyond an example's values reads nothing: it holds zeros, and no gradient leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Lookup
from gmeta.core.selection import Ints, Selection, product, select, sort_keys


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """How the n examples of one side, support or query, read the fetched rows. For each table of rows:

    W slots that read it, U fetched rows, P pairs. Tables whose rows no task adapts have neither reads nor pairs.
    """

    features: dict[str, tuple[str, ...]]  # table -> its features, in the order in which their slots lie: sequences last
    lookups: dict[str, Selection]  # table -> [n * W, U]
    reads: dict[str, Selection]  # table -> [n * W, P], which pair's change each entry reads
    pairs: dict[str, Tensor]  # table -> int64 [P, 2]: position of the task, row
    masks: dict[str, Tensor] = field(default_factory=dict)  # sequence -> bool [n, L], which slots hold a value

    def slots(self, names: Sequence[str]) -> list[int]:
        """Return how many slots each feature has."""
        return [self.masks[name].shape[1] if name in self.masks else 1 for name in names]


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries of all slots of a table on one side, example after example."""

    columns: Ints  # [E]
    lengths: Ints | None  # [n * W]; None: one each
    weights: NDArray[np.float64] | None  # [E]; None: all one
    task: Ints  # [E]
    adapted: NDArray[np.bool_] | None  # [E]; None: all

    @property
    def rows(self) -> Ints:
        """Return which of the n * W looked-up values each entry belongs to, [E]."""
        return np.arange(len(self.columns)) if self.lengths is None else _repeat(self.lengths)


def plan_batch(
    support: Mapping[str, Lookup],
    query: Mapping[str, Lookup],
    num_rows: Mapping[str, int],
    features: Sequence[str],
    adapted: Sequence[str],
) -> tuple[GatherPlan, GatherPlan]:
    """Return the gather plans of support and query, from one sort of both. `num_rows[table]` is U.

    A function of lookups alone, so that a loader's thread can do it ahead. The pairs are numbered as in
    `plan_support`, and the query's plan is that of `plan_query` with these pairs.
    """
    first, second = _plan((support, query), num_rows, features, adapted)
    return first, second


def plan_support(
    support: Mapping[str, Lookup], num_rows: Mapping[str, int], features: Sequence[str], adapted: Sequence[str]
) -> GatherPlan:
    """Return the gather plan of a support alone. Its pairs are in ascending order of (task, row)."""
    (plan,) = _plan((support,), num_rows, features, adapted)
    return plan


def plan_query(
    query: Mapping[str, Lookup],
    num_rows: Mapping[str, int],
    features: Sequence[str],
    adapted: Sequence[str],
    pairs: Mapping[str, Tensor],
) -> GatherPlan:
    """Return the gather plan of a query of tasks that were adapted before. Their pairs are given, in any order.

    A pair's row is a position among the rows fetched for this query, -1 where the row is not among them.
    """
    plan = GatherPlan({}, {}, {}, {})
    for table, names, flags in _tables(query, features, adapted):
        side = _entries([query[name] for name in names], flags)
        plan.features[table], plan.lookups[table] = names, _selection(side, num_rows[table])
        plan.masks.update(_masks(query, names))
        if table in pairs:
            plan.reads[table] = _known_pairs(side, num_rows[table], pairs[table].cpu().numpy())
            plan.pairs[table] = pairs[table]
    return plan


def plan_together(
    support: Mapping[str, Lookup], query: Mapping[str, Lookup], num_rows: Mapping[str, int], features: Sequence[str]
) -> GatherPlan:
    """Return one gather plan of all support examples, then all query examples, for plain training, which adapts
    nothing.
    """
    plan = GatherPlan({}, {}, {}, {})
    for table, names, flags in _tables(support, features, ()):
        longest = {name: max(_longest(side[name]) for side in (support, query)) for name in names}
        sides = [_entries([side[name] for name in names], flags, longest.values()) for side in (support, query)]
        plan.features[table], plan.lookups[table] = names, _selection(_joined(*sides), num_rows[table])
        masks = [_masks(side, names, longest) for side in (support, query)]
        plan.masks.update({name: torch.cat([mask[name] for mask in masks]) for name in masks[0]})
    return plan


def rows_among(pairs: Tensor, row_ids: Tensor) -> Tensor:
    """Return pairs [P, 2] whose rows are ids with positions instead: those among the distinct `row_ids` [U], or -1."""
    ids, order = row_ids.sort()
    position = torch.searchsorted(ids, pairs[:, 1].contiguous()).clamp(max=max(len(ids) - 1, 0))
    found = ids[position] == pairs[:, 1] if len(ids) else torch.zeros_like(position, dtype=torch.bool)
    rows = torch.where(found, order[position], -1) if len(ids) else torch.full_like(position, -1)
    return torch.stack([pairs[:, 0], rows], 1)


def _tables(
    lookups: Mapping[str, Lookup], features: Sequence[str], adapted: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...], NDArray[np.bool_]]]:
    """Yield each fused table, the features that read it, and which of those are adapted."""
    for table in dict.fromkeys(lookups[name].table for name in features):
        of_table = [name for name in features if lookups[name].table == table]
        names = tuple(sorted(of_table, key=lambda name: lookups[name].is_sequence))
        yield table, names, np.array([name in adapted for name in names])


def _plan(
    lookups: Sequence[Mapping[str, Lookup]],
    num_rows: Mapping[str, int],
    features: Sequence[str],
    adapted: Sequence[str],
) -> tuple[GatherPlan, ...]:
    plans = tuple(GatherPlan({}, {}, {}, {}) for _ in lookups)
    for table, names, flags in _tables(lookups[0], features, adapted):
        sides = [_entries([side[name] for name in names], flags) for side in lookups]
        for plan, side in zip(plans, sides, strict=True):
            plan.features[table], plan.lookups[table] = names, _selection(side, num_rows[table])
        for plan, looked_up in zip(plans, lookups, strict=True):
            plan.masks.update(_masks(looked_up, names))
        if flags.any():
            reads, keys = _pairs(sides, num_rows[table])
            for plan, read in zip(plans, reads, strict=True):
                plan.reads[table], plan.pairs[table] = read, keys
    return plans


def _entries(lookups: list[Lookup], flags: NDArray[np.bool_], longest: Iterable[int] | None = None) -> _Entries:
    """Return the entries of features of one table; `longest` has their slots, where they are not the side's own."""
    first = lookups[0]
    tasks, length = first.index.shape if first.lengths is None else first.lengths.shape
    num_examples, num_features = tasks * length, len(lookups)
    if all(lookup.lengths is None for lookup in lookups):
        columns = np.stack([lookup.index.cpu().numpy().reshape(-1) for lookup in lookups], 1).reshape(-1)
        task = np.repeat(np.arange(tasks), length * num_features)
        return _Entries(columns, None, None, task, None if flags.all() else np.tile(flags, num_examples))
    sizes = [_lengths(lookup) for lookup in lookups]
    slots = [_longest(lookup) for lookup in lookups] if longest is None else list(longest)
    num_slots, first_slot = sum(slots), np.cumsum(slots) - slots
    blocks = [
        _present(size, width) if lookup.is_sequence else size[:, None]
        for lookup, size, width in zip(lookups, sizes, slots, strict=True)
    ]
    lengths = np.concatenate(blocks, 1, dtype=np.int64).reshape(-1)
    starts = (np.cumsum(lengths) - lengths).reshape(num_examples, num_slots)
    columns, weights = np.empty(int(lengths.sum()), np.int64), np.ones(int(lengths.sum()))
    for i, (lookup, size) in enumerate(zip(lookups, sizes, strict=True)):
        # the values of an example lie behind each other, whether in one slot or in as many
        before = starts[:, first_slot[i]] - (np.cumsum(size) - size)
        position = np.repeat(before, size) + np.arange(int(size.sum()))
        columns[position] = lookup.index.cpu().numpy().reshape(-1)
        if lookup.lengths is not None and lookup.pooling == "mean":
            weights[position] = np.repeat(1.0 / np.maximum(size, 1), size)
    row = _repeat(lengths)
    return _Entries(
        columns,
        lengths,
        weights if (weights != 1).any() else None,
        row // max(length * num_slots, 1),
        None if flags.all() else np.repeat(flags, slots)[row % num_slots],
    )


def _longest(lookup: Lookup) -> int:
    """Return the number of slots of a feature: L of a sequence, 1 of any other."""
    return max(int(_lengths(lookup).max(initial=1)), 1) if lookup.is_sequence else 1


def _present(lengths: Ints, width: int) -> NDArray[np.bool_]:
    """Return which slots of a sequence hold a value, bool [n, width]."""
    present: NDArray[np.bool_] = np.arange(width) < lengths[:, None]
    return present


def _masks(
    lookups: Mapping[str, Lookup], names: Sequence[str], longest: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Return sequence -> which of its slots hold a value, bool [n, L]."""
    return {
        name: torch.from_numpy(
            _present(_lengths(lookups[name]), _longest(lookups[name]) if longest is None else longest[name])
        )
        for name in names
        if lookups[name].is_sequence
    }


def _lengths(lookup: Lookup) -> Ints:
    lengths = torch.ones_like(lookup.index) if lookup.lengths is None else lookup.lengths
    return lengths.cpu().numpy().reshape(-1)


def _repeat(lengths: Ints) -> Ints:
    return np.repeat(np.arange(len(lengths)), lengths)


def _joined(first: _Entries, second: _Entries) -> _Entries:
    """Put both sides together; adaptation is left out."""
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


def _pairs(sides: Sequence[_Entries], num_rows: int) -> tuple[list[Selection], Tensor]:
    """Return which pair each entry of each side reads, and the pairs [P, 2]; those of the first side's adapted entries
    count.

    One sort by (task, row) gives the pairs and all matrices in both orders.
    """
    first, bound = sides[0], max(num_rows, 1)
    keys = np.concatenate([side.task * bound + side.columns for side in sides])
    ordered, order = sort_keys(keys, (int(first.task.max(initial=0)) + 1) * bound)
    is_first = np.empty(len(ordered), bool)
    is_first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    unique = np.cumsum(is_first) - 1
    in_support = order < len(first.columns)
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
    start, selections = 0, []
    for side in sides:
        end = start + len(side.columns)
        own = found if len(sides) == 1 else found & (order >= start) & (order < end)
        selections.append(_pair_selection(side, order[own] - start, pair[own], num_pairs))
        start = end
    chosen = ordered[is_first][touched]
    task = chosen // bound
    return selections, torch.from_numpy(np.stack([task, chosen - task * bound], 1))


def _known_pairs(side: _Entries, num_rows: int, pairs: Ints) -> Selection:
    """Return which of given pairs [P, 2] each entry reads."""
    bound = max(num_rows, 1)
    present = np.flatnonzero(pairs[:, 1] >= 0)
    keys = pairs[present, 0] * bound + pairs[present, 1]
    order = keys.argsort()
    keys, present = keys[order], present[order]
    wanted = side.task * bound + side.columns
    position = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    found = keys[position] == wanted if len(keys) else np.zeros(len(wanted), bool)
    if side.adapted is not None:
        found &= side.adapted
    entry = np.flatnonzero(found)
    pair, by_pair = sort_keys(present[position[entry]], len(pairs))
    return _pair_selection(side, entry[by_pair], pair, len(pairs))


def _pair_selection(side: _Entries, entry: Ints, pair: Ints, num_pairs: int) -> Selection:
    """Return the matrix of entries `entry` that read pairs `pair`, given in the order of the pairs."""
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


def shared_rows(rows: EmbeddedRows, plan: GatherPlan) -> dict[str, Tensor]:
    """Return E0 as the features of each table read it: table -> [n, W, d], pooled where the feature is a bag.

    A plan that has a table's features without their lookup takes the table's weights for these values.
    """
    out = {}
    for table, names in plan.features.items():
        weight = rows.weights[table]
        out[table] = weight
        if table in plan.lookups:
            out[table] = product(weight, plan.lookups[table]).view(-1, sum(plan.slots(names)), weight.shape[1])
    return out


def apply_deltas(values: Mapping[str, Tensor], deltas: Mapping[str, Tensor], plan: GatherPlan) -> dict[str, Tensor]:
    """Return the rows as the tasks see them: shared [n, W, d] plus the tasks' own changes, deltas [P, d]; by table."""
    out = {}
    for table, value in values.items():
        out[table] = value
        if table in deltas and table in plan.reads:
            out[table] = product(deltas[table], plan.reads[table], value.flatten(0, 1)).view(value.shape)
    return out
