"""Rows to the workers that need them, gradients back to the workers that own them.

One fetch and one return a step, for support and query together, both outside the inner loop (G-Meta,
arXiv 2401.04338). For U unique rows of width d in float32 a worker moves 8U bytes of ids, 4dU of rows and
4dU of gradients, of which about (N - 1) / N go to other workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gmeta.batch import EmbeddedRows, Examples, Lookup, TaskBatch, map_tensors
from gmeta.batch import RowGradients as RowGradients
from gmeta.embedding.table import GroupLayout, ShardedTables, Slot
from gmeta.parallel.collectives import CommStats, Pending, all_to_all, exchange_counts
from gmeta.parallel.mesh import Mesh


@dataclass(frozen=True)
class GroupPlan:
    """The unique rows that this worker needs of one group."""

    rows: Tensor  # int64 [U] physical rows, ascending, hence ordered by owner
    counts: list[int]  # rows to ask of each owner; sums to U


@dataclass(frozen=True)
class Asked:
    """What the other workers asked of this one: the way back for their gradients."""

    rows: Tensor  # int64 [R] positions in this worker's shard, in the order of the asking ranks
    counts: list[int]  # rows asked by each rank


@dataclass(frozen=True)
class LookupPlan:
    """All that can be prepared without talking to other workers. `fetch` notes in `asked` where gradients must go."""

    groups: dict[str, GroupPlan]
    support: dict[str, Lookup]
    query: dict[str, Lookup]
    asked: dict[str, Asked] = field(default_factory=dict)


def plan_lookup(tables: ShardedTables, batch: TaskBatch) -> LookupPlan:
    """Deduplicate the rows that support and query need; local, safe in a background thread.

    Padded positions ask for nothing: their index is 0, and the mask keeps their gradient zero.
    ValueError names a feature that the batch lacks, or an id outside its table.
    """
    sides = {"support": batch.support, "query": batch.query}
    lookups: dict[str, dict[str, Lookup]] = {name: {} for name in sides}
    groups = {}
    for layout in tables.layouts.values():
        slots = {feature: slot for feature, slot in tables.features.items() if slot.group == layout.name}
        pieces = [(name, feature, ids) for name, side in sides.items() for feature, ids in _keys(side, slots)]
        keys = torch.cat([keys for _, _, keys in pieces]) if pieces else torch.zeros(0, dtype=torch.int64)
        groups[layout.name], index = _unique_rows(keys, layout)
        for (name, feature, _), part in zip(pieces, torch.split(index, [k.numel() for _, _, k in pieces]), strict=True):
            lookups[name][feature] = _lookup(sides[name], feature, slots[feature], part)
    return LookupPlan(groups, lookups["support"], lookups["query"])


def _keys(side: Examples, slots: dict[str, Slot]) -> Iterator[tuple[str, Tensor]]:
    """(feature, keys int64 [n]) of the positions that are not padding."""
    for feature, slot in slots.items():
        if slot.pooling is None:
            if feature not in side.ids:
                raise ValueError(
                    f"the batch has no one-valued feature {feature!r}; it has: {', '.join(side.ids) or 'none'}"
                )
            ids = side.ids[feature][side.mask]
        else:
            if feature not in side.bags:
                raise ValueError(
                    f"the batch has no many-valued feature {feature!r}; it has: {', '.join(side.bags) or 'none'}"
                )
            ids = side.bags[feature].values
        if ids.numel() and (ids.min() < 0 or ids.max() >= slot.num_ids):
            wrong = ids[(ids < 0) | (ids >= slot.num_ids)]
            raise ValueError(
                f"feature {feature!r} has the id {wrong[0].item()}, but its table {slot.table!r} has the ids 0 to "
                f"{slot.num_ids - 1}: the pack does not fit the model, prepare the data and train again together"
            )
        yield feature, ids.long() + slot.offset


def _unique_rows(keys: Tensor, layout: GroupLayout) -> tuple[GroupPlan, Tensor]:
    """The rows of `keys` int64 [K], and where each key is among them, int64 [K]."""
    unique, inverse = torch.unique(keys, return_inverse=True)
    rows, order = layout.permutation.forward(unique).sort()
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    bounds = torch.arange(1, layout.world_size) * layout.chunk
    cuts = [0, *torch.searchsorted(rows, bounds).tolist(), rows.numel()]
    return GroupPlan(rows, [end - start for start, end in pairwise(cuts)]), position[inverse]


def _lookup(side: Examples, feature: str, slot: Slot, index: Tensor) -> Lookup:
    if slot.pooling is not None:
        return Lookup(slot.group, index, side.bags[feature].lengths, slot.pooling)
    padded = torch.zeros(side.mask.shape, dtype=torch.int64)
    padded[side.mask] = index
    return Lookup(slot.group, padded)


def fetch(
    tables: ShardedTables, plan: LookupPlan, mesh: Mesh, stop: bool = False, stats: CommStats | None = None
) -> tuple[EmbeddedRows, bool]:
    """Fetch the plan's rows from their owners: AlltoAll of counts, ids, rows. Collective.

    `stop` rides on the counts: the second value is True on all ranks when it was given on any. A group
    of which nothing is asked gets one zero row, so that padded positions have something to point at.
    """
    stats = stats or CommStats()
    counts = torch.tensor([group.counts for group in plan.groups.values()], dtype=torch.int64)
    counts = counts.reshape(len(plan.groups), mesh.world_size).T
    received, flags = exchange_counts(counts, [int(stop)], mesh)
    stats.counts.add(8 * (len(plan.groups) + 1), [1] * mesh.world_size, mesh.rank)

    asking: dict[str, Pending] = {}
    for (name, group), asked in zip(plan.groups.items(), received, strict=True):
        asking[name] = all_to_all(group.rows.to(mesh.device), group.counts, asked, mesh)
        stats.ids.add(8, group.counts, mesh.rank)

    coming: dict[str, Pending] = {}
    for (name, group), asked in zip(plan.groups.items(), received, strict=True):
        rows = asking[name].wait() - tables.layouts[name].local_range(mesh.rank).start
        plan.asked[name] = Asked(rows, asked)
        weight = tables.groups[name].weight
        coming[name] = all_to_all(weight.index_select(0, rows), asked, group.counts, mesh)
        stats.rows.add(weight.shape[1] * weight.element_size(), group.counts, mesh.rank)

    weights = {name: _leaf(pending.wait()) for name, pending in coming.items()}
    support, query = map_tensors((plan.support, plan.query), lambda t: t.to(mesh.device, non_blocking=True))
    return EmbeddedRows(weights, support, query), bool(flags[0])


def _leaf(rows: Tensor) -> Tensor:
    return (rows if rows.shape[0] else rows.new_zeros(1, rows.shape[1])).requires_grad_()


def return_gradients(
    tables: ShardedTables, plan: LookupPlan, rows: EmbeddedRows, mesh: Mesh, stats: CommStats | None = None
) -> dict[str, RowGradients]:
    """Send `rows.weights[...].grad` home and add what arrives for one row; collective, once after each `fetch`.

    Gradients of a row are added in the order of the ranks they come from, so that runs repeat bitwise. Rows
    that no graph reached (grad is None) return zeros: they were fetched, hence took part in the step.
    """
    stats = stats or CommStats()
    coming: dict[str, Pending] = {}
    for name, group in plan.groups.items():
        weight = rows.weights[name]
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        coming[name] = all_to_all(grad[: group.rows.numel()], group.counts, plan.asked[name].counts, mesh)
        stats.gradients.add(weight.shape[1] * weight.element_size(), group.counts, mesh.rank)
    return {name: _merge(plan.asked[name], pending.wait()) for name, pending in coming.items()}


def _merge(asked: Asked, grad: Tensor) -> RowGradients:
    """Sum the gradients grad [R, d] of equal rows."""
    unique, inverse = torch.unique(asked.rows, return_inverse=True)
    total = grad.new_zeros(unique.numel(), grad.shape[1])
    # One source's rows are unique: no index occurs twice in an index_add_, so that its order cannot matter.
    for part, index in zip(torch.split(grad, asked.counts), torch.split(inverse, asked.counts), strict=True):
        total.index_add_(0, index, part)
    return RowGradients(unique, total)
