"""The textbook inner loop: one task at a time, one adapted copy of every parameter and table. Slow, any module.

It shares nothing with the factored engine but losses and dropout masks, so that agreement means something: padding is
left out, bags are pooled in a loop, and an adapted feature reads the task's own copy of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, mask_of
from gmeta.meta.dropout import QUERY_PASS, SeededDropout
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.gather_plan import GatherPlan
from gmeta.meta.inner_loop import InnerPass
from gmeta.meta.interception import Intercept
from gmeta.meta.losses import widen
from gmeta.meta.modulation import modulated_parameters
from gmeta.meta.unfused import unfused_attention


@dataclass(frozen=True, slots=True)
class _Side:
    """The real examples of one side of one task."""

    examples: Examples
    lookups: dict[str, Lookup]
    task: int

    @property
    def positions(self) -> Tensor:
        return self.examples.mask[self.task].nonzero().squeeze(-1)

    @property
    def label(self) -> Tensor:
        return self.examples.label[self.task, self.positions]

    @property
    def weight(self) -> Tensor:
        """How much each example counts [n], or [n, K] for each of several labels."""
        own = self.examples.weight
        weight = (
            torch.ones_like(self.positions, dtype=self.label.dtype) if own is None else own[self.task, self.positions]
        )
        return weight if self.label.dim() == 1 else torch.where(self.label.isnan(), 0, weight.unsqueeze(-1))


def pairs_of(support: Mapping[str, Lookup], adapted: Sequence[str]) -> dict[str, Tensor]:
    """Return table -> the (task, row) pairs [P, 2] of a support, in ascending order: all the index work of this engine.

    It reads rows by the lookups themselves.
    """
    found: dict[str, list[Tensor]] = {}
    for name in adapted:
        lookup = support[name]
        index, lengths = lookup.index.cpu(), lookup.lengths
        if lengths is None:
            task = torch.arange(len(index)).repeat_interleave(index.shape[1])
        else:
            task = torch.arange(len(lengths)).repeat_interleave(lengths.cpu().sum(1))
        found.setdefault(lookup.table, []).append(torch.stack([task, index.reshape(-1)], 1))
    return {table: torch.unique(torch.cat(keys), dim=0) for table, keys in found.items()}


def adapt(inner: InnerPass, rows: EmbeddedRows, support: Examples, plan: GatherPlan) -> tuple[FastWeights, Tensor]:
    """Adapt every task to its support; return the fast weights, and the loss [T] before the first step, detached.

    Their `values` hold every adapted or modulated parameter in full.
    """
    num_tasks = len(support.mask)
    sides = [_Side(support, rows.support, task) for task in range(num_tasks)]
    starts = [_modulated(inner, rows, side) for side in sides]
    parameters = dict(inner.model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys([*(starts[0] if starts else ()), *inner.adapted.parameters])
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    deltas: dict[str, list[Tensor]] = {table: [] for table in plan.pairs}
    losses = []
    for task, (side, start) in enumerate(zip(sides, starts, strict=True)):
        own = {**parameters, **start}
        state, loss = _adapt_task(inner, rows, side, {name: own[name] for name in names})
        for name in names:
            values[name].append(state["parameter", name])
        for table, pairs in plan.pairs.items():
            rows_of_task = pairs[pairs[:, 0] == task, 1]
            deltas[table].append(state["table", table][rows_of_task] - rows.weights[table][rows_of_task])
        losses.append(loss)
    fast = FastWeights(
        num_tasks,
        values={
            n: torch.stack(v) if v else parameters[n].new_zeros(0, *parameters[n].shape) for n, v in values.items()
        },
        deltas={g: torch.cat(d) if d else rows.weights[g][:0] for g, d in deltas.items()},
        pairs=plan.pairs,
    )
    return fast, torch.stack(losses) if losses else support.label.new_zeros(0)


def score(inner: InnerPass, fast: FastWeights, rows: EmbeddedRows, query: Examples, plan: GatherPlan) -> Tensor:
    """Return the logits [T, Q] of examples of tasks that either engine adapted; they are 0 on padding."""
    anchor = query.label.new_zeros(())
    for weight in rows.weights.values():  # keeps the graph when T = 0
        anchor = anchor + weight.sum() * 0
    logits = []
    for task in range(fast.num_tasks):
        side = _Side(query, rows.query, task)
        tables = {}
        for table, pairs in plan.pairs.items():
            weight = rows.weights[table]
            tables[table] = weight
            if table in fast.deltas:
                own = (pairs[:, 0] == task) & (pairs[:, 1] >= 0)
                tables[table] = weight.index_put((pairs[own, 1],), fast.deltas[table][own], accumulate=True)
        scores = _score_task(inner, rows, side, own_parameters(inner.model, fast, task), tables, QUERY_PASS)
        padded = anchor + torch.zeros_like(query.label[task], dtype=scores.dtype)
        logits.append(padded.index_put((side.positions,), scores + anchor))
    return torch.stack(logits) if logits else anchor + query.label


def own_parameters(model: nn.Module, fast: FastWeights, task: int) -> dict[str, Tensor]:
    """Return one task's own parameters by name, from fast weights of either engine."""
    own = modulated_parameters(model, fast.modulation, task)
    shared = dict(model.named_parameters(remove_duplicate=False))
    for site, steps in fast.updates.items():
        for step in steps:
            inputs, gradients = step.inputs[task], step.gradients[task]
            if site.weight is not None:
                own[site.weight] = own.get(site.weight, shared[site.weight]) + gradients.mT @ inputs
            if site.bias is not None:
                own[site.bias] = own.get(site.bias, shared[site.bias]) + gradients.sum(0)
    return {**own, **{name: value[task] for name, value in fast.values.items()}}


@contextmanager
def substituted(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model compute with `values` instead of these parameters, under all their names.

    Afterwards it is as it was, also after an exception. (`torch.func.functional_call` leaves a module that has two
    names with the values, as of torch 2.13.)
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    by_id = {id(named[name]): value for name, value in values.items()}
    owners = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in by_id
    ]
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    try:
        for module, name, parameter in owners:
            module._parameters[name] = by_id[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in owners:
            module._parameters[name] = parameter
        for layer in recurrent:
            layer._update_flat_weights()  # torch keeps a list of the parameters beside them


def _modulated(inner: InnerPass, rows: EmbeddedRows, side: _Side) -> dict[str, Tensor]:
    """Return a task's modulated parameters, from its real support examples as a batch of one task."""
    if inner.modulator is None:
        return {}
    found = _embedded({name: rows.weights[lookup.table] for name, lookup in side.lookups.items()}, side)
    embedded = {name: value.unsqueeze(0) for name, value in found.items()}
    dense, label = side.examples.dense[side.task, side.positions].unsqueeze(0), side.label.unsqueeze(0)
    modulation = inner.modulation(dense, embedded, label, torch.ones_like(label, dtype=torch.bool))
    return modulated_parameters(inner.model, modulation, 0)


def _adapt_task(
    inner: InnerPass, rows: EmbeddedRows, side: _Side, own: dict[str, Tensor]
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Take SGD steps on one task's support, from parameters `own`. Those that do not adapt stay as they are.

    Returns ("parameter", name) -> value and ("table", table) -> the table's rows [U, d]; the first step's mean loss.
    """
    fixed = {name: value for name, value in own.items() if name not in inner.adapted.parameters}
    state = {("parameter", name): own[name] for name in inner.adapted.parameters}
    for name in inner.adapted.features:
        table = side.lookups[name].table
        state["table", table] = rows.weights[table].clone()  # features that do not adapt keep reading the original
    state = {key: value if value.requires_grad else value.detach().requires_grad_() for key, value in state.items()}
    first = side.label.new_zeros(())
    for step, rates in enumerate(inner.rates if len(side.positions) else ()):
        parameters = {name: value for (kind, name), value in state.items() if kind == "parameter"}
        tables = {name: value for (kind, name), value in state.items() if kind == "table"}
        with unfused_attention() if inner.second_order else nullcontext():
            logits = _score_task(inner, rows, side, {**fixed, **parameters}, tables, step + 1)
        with torch.autocast(logits.device.type, enabled=False):
            losses = side.weight * inner.loss(logits, side.label)
            total = side.weight.sum(0)
            objective = (losses.sum(0) / _or_one(total + inner.prior)).sum()
            grads = torch.autograd.grad(
                objective,
                list(state.values()),
                create_graph=inner.second_order,
                allow_unused=True,
                materialize_grads=True,
            )
        state = {
            key: value - (rates[0] if key[0] == "table" else rates[inner.adapted.rate_of(key[1])]) * grad
            for (key, value), grad in zip(state.items(), grads, strict=True)
        }
        first = (losses.detach().sum(0) / _or_one(total)).sum() if step == 0 else first
    return {**{("parameter", name): value for name, value in fixed.items()}, **state}, first


def _or_one(total: Tensor) -> Tensor:
    """Return what a sum of losses of this weight is divided by: without weight it is 0 anyway."""
    return torch.where(total > 0, total, 1)


def _score_task(
    inner: InnerPass,
    rows: EmbeddedRows,
    side: _Side,
    parameters: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    pass_number: int,
) -> Tensor:
    """Return the logits of one task's real examples [n], with its own parameters and, for adapted features, tables."""
    own = {
        name: tables[lookup.table] if name in inner.adapted.features else rows.weights[lookup.table]
        for name, lookup in side.lookups.items()
    }
    embedded = _embedded(own, side)
    make_keys = None
    if inner.keys is not None:
        keys = inner.keys
        make_keys = partial(lambda positions: keys(pass_number, positions)[side.task], side.positions)
    with Intercept(SeededDropout(make_keys)), substituted(inner.model, parameters):
        return widen(inner.model(side.examples.dense[side.task, side.positions], embedded))


def _embedded(tables: Mapping[str, Tensor], side: _Side) -> dict[str, Tensor]:
    """Return what the model reads of one task's n examples: [n, d] of a feature, [n, L, d] of a sequence and its
    mask, and what the examples carry. `tables` has the rows that each feature reads.
    """
    embedded = {name: value[side.task, side.positions] for name, value in side.examples.given.items()}
    for name, lookup in side.lookups.items():
        table = tables[name]
        if lookup.lengths is None:
            embedded[name] = table[lookup.index[side.task, side.positions]]
            continue
        bags = [table[index] for index in _bags(lookup, lookup.lengths, side)]
        if lookup.is_sequence:
            longest = max(int(lookup.lengths.max()) if lookup.lengths.numel() else 1, 1)
            padded = [torch.cat([bag, bag.new_zeros(longest - len(bag), bag.shape[1])]) for bag in bags]
            embedded[name] = torch.stack(padded) if padded else table.new_zeros(0, longest, table.shape[1])
            lengths = lookup.lengths[side.task, side.positions]
            embedded[mask_of(name)] = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(-1)
            continue
        totals = [bag.sum(0) / (max(len(bag), 1) if lookup.pooling == "mean" else 1) for bag in bags]
        embedded[name] = torch.stack(totals) if totals else table.new_zeros(0, table.shape[1])
    return embedded


def _bags(lookup: Lookup, lengths: Tensor, side: _Side) -> Iterator[Tensor]:
    """Yield which rows each example of one task reads, int64 [length]."""
    ends = lengths.flatten().cumsum(0).view_as(lengths)[side.task]
    for position in side.positions.tolist():
        end = int(ends[position])
        yield lookup.index[end - int(lengths[side.task, position]) : end]
