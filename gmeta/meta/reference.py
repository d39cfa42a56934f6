"""The textbook inner loop: one task at a time, one adapted copy of every parameter and table. Slow, any module.

It shares nothing with the factored engine but losses and dropout masks, so that agreement means something: padding is
cut off, bags are pooled in a loop, and an adapted feature reads the task's own copy of its whole table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.meta.dropout import QUERY_PASS, SeededDropout, row_keys
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.interception import Intercept
from gmeta.meta.losses import widen
from gmeta.meta.modulation import modulated_parameters

State = dict[tuple[str, str], Tensor]
"""What a task adapts: ("parameter", name) -> value, ("table", group) -> the group's rows [U, d]."""
Start = dict[str, Tensor]
"""A task's modulated parameters before it adapts, by name; without modulation none."""


@dataclass(frozen=True, slots=True)
class _Side:
    """The real rows of one side of one task."""

    examples: Examples
    lookups: dict[str, Lookup]
    task: int

    @property
    def positions(self) -> Tensor:
        return self.examples.mask[self.task].nonzero().squeeze(-1)

    @property
    def label(self) -> Tensor:
        return self.examples.label[self.task, self.positions]


def run(model: nn.Module, loop: InnerLoop, rows: EmbeddedRows, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Adapt to the support, score the query: (logits [T, Q], 0 on padding; first step's support loss [T], detached)."""
    anchor = torch.stack([weight.sum() * 0 for weight in rows.weights.values()]).sum()  # keeps the graph when T = 0
    logits, losses = [], []
    for task in range(batch.num_tasks):
        support, side = _Side(batch.support, rows.support, task), _Side(batch.query, rows.query, task)
        start = _start(model, loop, rows, support)
        state, loss = _adapt(model, loop, rows, batch, support, start)
        scores = _score(model, loop, rows, batch, side, start, state, QUERY_PASS)
        padded = anchor + torch.zeros_like(batch.query.label[task], dtype=scores.dtype)
        logits.append(padded.index_put((side.positions,), scores + anchor))
        losses.append(loss)
    empty = anchor + batch.query.label
    return torch.stack(logits) if logits else empty, torch.stack(losses) if losses else batch.support.label.sum(-1)


def _start(model: nn.Module, loop: InnerLoop, rows: EmbeddedRows, side: _Side) -> Start:
    """The modulated parameters of a task, from its real support rows as a batch of one task."""
    if loop.modulator is None:
        return {}
    embedded = {
        name: _read(rows.weights[lookup.group], lookup, side).unsqueeze(0) for name, lookup in side.lookups.items()
    }
    dense, label = side.examples.dense[side.task, side.positions].unsqueeze(0), side.label.unsqueeze(0)
    loop = loop.modulated(dense, embedded, label, torch.ones_like(label, dtype=torch.bool))
    return modulated_parameters(model, loop.modulation, 0)


def _adapt(
    model: nn.Module, loop: InnerLoop, rows: EmbeddedRows, batch: TaskBatch, side: _Side, start: Start
) -> tuple[State, Tensor]:
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **start}
    state: State = {("parameter", name): parameters[name] for name in loop.adapted.parameters}
    for name in loop.adapted.features:
        group = side.lookups[name].group
        state["table", group] = rows.weights[group].clone()  # features that do not adapt keep reading the original
    state = {key: value if value.requires_grad else value.detach().requires_grad_() for key, value in state.items()}
    first = side.label.new_zeros(())
    if not len(side.positions):
        return state, first
    for step, rates in enumerate(loop.rates):
        logits = _score(model, loop, rows, batch, side, start, state, step + 1)
        with torch.autocast(logits.device.type, enabled=False):
            losses = loop.loss(logits, side.label)
            objective = losses.sum() / (len(losses) + loop.prior)
            grads = torch.autograd.grad(
                objective,
                list(state.values()),
                create_graph=loop.second_order,
                allow_unused=True,
                materialize_grads=True,
            )
        state = {
            key: value - (rates[0] if key[0] == "table" else rates[loop.adapted.rate_of(key[1])]) * grad
            for (key, value), grad in zip(state.items(), grads, strict=True)
        }
        first = losses.detach().mean() if step == 0 else first
    return state, first


def _score(
    model: nn.Module,
    loop: InnerLoop,
    rows: EmbeddedRows,
    batch: TaskBatch,
    side: _Side,
    start: Start,
    state: State,
    pass_number: int,
) -> Tensor:
    """Logits of one task's real rows [n]."""
    embedded = {}
    for name, lookup in side.lookups.items():
        table = rows.weights[lookup.group]
        if name in loop.adapted.features:
            table = state["table", lookup.group]
        embedded[name] = _read(table, lookup, side)
    parameters = {name: value for (kind, name), value in state.items() if kind == "parameter"}
    make_keys = None
    if loop.dropout_key is not None:
        make_keys = partial(row_keys, loop.dropout_key, batch.task_id[side.task], pass_number, side.positions)
    with Intercept(SeededDropout(make_keys)):
        dense = side.examples.dense[side.task, side.positions]
        return widen(functional_call(model, {**start, **parameters}, (dense, embedded)))


def _read(table: Tensor, lookup: Lookup, side: _Side) -> Tensor:
    """Rows of one feature for one task: [n, d]."""
    if lookup.lengths is None:
        return table[lookup.index[side.task, side.positions]]
    ends = lookup.lengths.flatten().cumsum(0).view_as(lookup.lengths)[side.task]
    pooled = [table.new_zeros(0, table.shape[1])]
    for position in side.positions.tolist():
        length = int(lookup.lengths[side.task, position])
        values = table[lookup.index[int(ends[position]) - length : int(ends[position])]]
        total = values.sum(0, keepdim=True)
        pooled.append(total / max(length, 1) if lookup.pooling == "mean" else total)
    return torch.cat(pooled)
