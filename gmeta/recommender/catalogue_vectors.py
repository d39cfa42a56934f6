"""The vectors of a catalogue's items and of users' histories, whose products are the scores of next items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import TaskBatch, map_tensors, to_device
from gmeta.data.candidates import CandidateDraw, catalogue_examples
from gmeta.data.catalogue import Catalogue
from gmeta.data.schema import PackSchema
from gmeta.meta.next_item import NextItemLearner
from gmeta.recommender.system import System

_ITEMS_AT_ONCE = 8192
_USERS_AT_ONCE, _EVENTS_AT_ONCE = 256, 1 << 15
"""So many users are computed together, with so many events, padding included."""


def next_item_learner(system: System) -> NextItemLearner:
    """Return the learner of a system that finds next items. ValueError for one that scores examples."""
    if not isinstance(system.objective, NextItemLearner):
        raise ValueError(
            "the run scores examples, and this is for runs on next items: prepare events with gmeta prepare --events"
        )
    return system.objective


def item_vectors(system: System, catalogue: Catalogue, schema: PackSchema) -> Tensor:
    """Return the vectors of all items, [num_ids, d], zeros for id 0; collective."""
    found = vectors_of_items(system, catalogue, schema, np.arange(1, catalogue.num_ids))
    return torch.cat([torch.zeros_like(found[:1]), found])


@torch.no_grad()
def vectors_of_items(system: System, catalogue: Catalogue, schema: PackSchema, items: NDArray[np.int64]) -> Tensor:
    """Return the vectors of some items, [n, d]; collective.

    A model that knows items by their rows in part has `without_row(vectors)`, for those that no training row has.
    """
    learner = next_item_learner(system)
    parts = []
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        some = catalogue_examples(catalogue, items[start : start + _ITEMS_AT_ONCE], schema)
        examples = system.examples(some)
        request = system.exchange.request(shared=examples)
        rows = system.exchange.fetch(system.exchange.exchange_ids(request))
        with system.precision():
            parts.append(learner.items(rows, to_device(examples, system.mesh.device, system.dtype)).float())
    found = torch.cat(parts)
    new = torch.from_numpy(catalogue.count[items] == 0).to(found.device)
    if hasattr(learner.model, "without_row") and bool(new.any()):
        found[new] = learner.model.without_row(found[new])
    return found


@torch.no_grad()
def user_vectors(
    system: System,
    catalogue: Catalogue,
    schema: PackSchema,
    items: NDArray[np.int64],
    length: NDArray[np.int64],
    draw: CandidateDraw,
    beside: Mapping[str, NDArray[np.int64]],
) -> Tensor:
    """Return the state [U, d] after the last event of each history, zeros of an empty one; there is one at least.
    Where users adapt, it is beside what `draw` draws after training.

    Histories lie behind each other: `items` [N] has their item ids, the oldest event first, and `length` [U] says how
    many each has. `beside` has the ids [N] of features that the item does not own, such as a gap of time.
    """
    learner = next_item_learner(system)
    start, order = np.cumsum(length) - length, np.argsort(length, kind="stable")
    parts: list[Tensor] = []
    begin = 0
    while begin < len(order):
        cells = length[order[begin : begin + _USERS_AT_ONCE]] * np.arange(1, 1 + len(order[begin:][:_USERS_AT_ONCE]))
        end = begin + max(1, int(np.searchsorted(cells, _EVENTS_AT_ONCE, side="right")))
        some = order[begin:end]
        place = np.arange(max(1, length[some].max()))
        mask = place < length[some, None]
        events = (start[some, None] + place)[mask]
        others = {name: ids[events] for name, ids in beside.items()}
        prepared = system.prepare(to_adapt(learner, _histories(catalogue, schema, items[events], others, mask), draw))
        rows = system.exchange.fetch(prepared.routed)
        part = prepared.parts[0]
        with system.precision():
            parts.append(learner.users(part.rows(rows), part.tasks).float())
        begin = end
    found = torch.cat(parts)
    return found[torch.from_numpy(np.argsort(order)).to(found.device)]


def to_adapt(learner: NextItemLearner, batch: TaskBatch, draw: CandidateDraw | None) -> TaskBatch:
    """Return a batch with what its users adapt beside, where they do."""
    return batch if draw is None or learner.inner_loop is None else draw.after_training(batch)


def _histories(
    catalogue: Catalogue,
    schema: PackSchema,
    items: NDArray[np.int64],
    beside: Mapping[str, NDArray[np.int64]],
    mask: NDArray[np.bool_],
) -> TaskBatch:
    """Return tasks whose support are events of items [n], where `mask` [T, S] is true, and whose query is empty."""

    def padded(values: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.zeros(mask.shape, np.int64)
        found[mask] = values
        return found

    flat = catalogue_examples(catalogue, padded(items).reshape(-1), schema)
    support = map_tensors(flat, lambda t: t.view(*mask.shape, *t.shape[2:]))
    ids = {**support.ids, **{name: torch.from_numpy(padded(values)) for name, values in beside.items()}}
    support = replace(support, ids=ids, mask=torch.from_numpy(mask))
    query = map_tensors(support, lambda t: t[:, :0])
    task = torch.arange(len(mask))
    return TaskBatch(
        support, query, task, num_tasks_global=len(mask), epoch=0, index=0, num_rows_global=int(mask.sum())
    )
