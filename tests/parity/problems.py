"""Small random problems for the engines, and an independent textbook implementation through torch.func.

The textbook version reads embeddings as dense products with [T, S, U] matrices, adapts whole tables, and takes inner
gradients by `torch.func.grad`; it shares no code with either engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from gmeta.core.batch import Bag, EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.models.inputs import InputSpec

DIMS = {"wide": 6, "narrow": 3}
NUM_ROWS = {"wide": 9, "narrow": 5}
FEATURES = {  # feature -> (table, pooling of a bag or None); item and history share rows
    "user": ("wide", None),
    "item": ("wide", None),
    "history": ("wide", "mean"),
    "city": ("narrow", None),
    "tags": ("narrow", "sum"),
}
SEQUENCES = {"last": ("wide", "none"), "pages": ("narrow", "none")}
"""Sequences that are not pooled; a problem has them where it is asked for them."""
_ALL = {**FEATURES, **SEQUENCES}
NUM_NUMERIC = 2


Inputs = tuple[dict[str, Tensor], Tensor, Tensor, Tensor]
"""Lookup matrices, dense, label and mask of one side."""

torch.set_num_threads(1)  # tensors of a few numbers


@dataclass(frozen=True)
class Problem:
    rows: EmbeddedRows
    batch: TaskBatch


def make_problem(
    dtype: torch.dtype = torch.float64,
    support: tuple[int, ...] = (4, 2, 0, 3),
    query: tuple[int, ...] = (2, 3, 2, 0),
    seed: int = 0,
    binary: bool = True,
    features: tuple[str, ...] = tuple(FEATURES),
) -> Problem:
    """Ragged tasks (one without support, one without query), few rows, so that tasks and sides share them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        table: torch.randn(NUM_ROWS[table], dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for table, dim in DIMS.items()
        if any(_ALL[name][0] == table for name in features)
    }
    sides = [_side(sizes, features, generator, dtype, binary) for sizes in (support, query)]
    lookups = [
        {
            name: (
                Lookup(_ALL[name][0], side.ids[name])
                if _ALL[name][1] is None
                else Lookup(_ALL[name][0], side.bags[name].values, side.bags[name].lengths, _ALL[name][1])
            )
            for name in features
        }
        for side in sides
    ]
    task_id = torch.arange(len(support)) * 7 + 3
    batch = TaskBatch(*sides, task_id=task_id, num_tasks_global=len(support) + 1, epoch=2, index=5)
    return Problem(EmbeddedRows(weights, *lookups), batch)


def _side(
    sizes: tuple[int, ...],
    features: tuple[str, ...],
    generator: torch.Generator,
    dtype: torch.dtype,
    binary: bool,
) -> Examples:
    tasks, longest = len(sizes), max(sizes, default=0)
    mask = torch.arange(longest).expand(tasks, longest) < torch.tensor(sizes, dtype=torch.int64).unsqueeze(-1)
    ids, bags = {}, {}
    for name in features:
        table, pooling = _ALL[name]
        if pooling is None:
            index = torch.randint(0, NUM_ROWS[table], (tasks, longest), generator=generator)
            ids[name] = torch.where(mask, index, 0)
        else:
            lengths = torch.where(mask, torch.randint(0, 4, (tasks, longest), generator=generator), 0)
            values = torch.randint(0, NUM_ROWS[table], (int(lengths.sum()),), generator=generator)
            bags[name] = Bag(values, lengths)
    dense = torch.randn(tasks, longest, NUM_NUMERIC, generator=generator, dtype=torch.float64).to(dtype)
    label = torch.randn(tasks, longest, generator=generator, dtype=torch.float64).to(dtype)
    label = (label > 0).to(dtype) if binary else label
    return Examples(
        ids,
        bags,
        torch.where(mask.unsqueeze(-1), dense, 0),
        torch.where(mask, label, 0),
        mask,
        torch.where(mask, 0, -1),
        torch.zeros_like(mask),
    )


def leaves(problem: Problem, module: nn.Module) -> dict[str, Tensor]:
    """Everything that receives a gradient, by name."""
    tables = {f"table {table}": weight for table, weight in problem.rows.weights.items()}
    return {**dict(module.named_parameters()), **tables}


def gradients(problem: Problem, module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of `loss` for every leaf; zero where there is none."""
    named = leaves(problem, module)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def poison_padding(problem: Problem) -> Problem:
    """The same problem with other numbers, labels and ids in the padding, which must not matter."""

    def spoil(side: Examples) -> Examples:
        return replace(
            side,
            dense=torch.where(side.mask.unsqueeze(-1), side.dense, 3.0),
            label=torch.where(side.mask, side.label, 1.0),
        )

    batch = replace(problem.batch, support=spoil(problem.batch.support), query=spoil(problem.batch.query))
    return Problem(problem.rows, batch)


def _matrix(lookup: Lookup, num_rows: int, dtype: torch.dtype) -> Tensor:
    """The lookup as a dense matrix [T, S, U], of a sequence [T, S, L, U]."""
    shape = lookup.index.shape if lookup.lengths is None else lookup.lengths.shape
    if lookup.is_sequence:
        shape = (*shape, max(1, int(lookup.lengths.max())))
    matrix = torch.zeros(*shape, num_rows, dtype=dtype)
    start = 0
    for t in range(shape[0]):
        for s in range(shape[1]):
            if lookup.lengths is None:
                matrix[t, s, lookup.index[t, s]] = 1
                continue
            length = int(lookup.lengths[t, s])
            if lookup.is_sequence:
                matrix[t, s, range(length), lookup.index[start : start + length]] = 1
                start += length
                continue
            for u in lookup.index[start : start + length].tolist():
                matrix[t, s, u] += 1 / length if lookup.pooling == "mean" else 1
            start += length
    return matrix


def textbook(
    problem: Problem,
    model: nn.Module,
    parameters: tuple[str, ...],
    features: tuple[str, ...],
    rates: Tensor,
    rate_of: dict[str, int],
    second_order: bool,
    loss: nn.Module,
    inner_loss: nn.Module,
    modulate: Callable[[Inputs], dict[str, Tensor]] = lambda support: {},
) -> Tensor:
    """Sum over tasks of the mean query loss after adaptation / num_tasks_global, as in the papers.

    `modulate` says of one task's support which model parameters start from which values.
    """
    rows, batch = problem.rows, problem.batch
    tables = dict(rows.weights)
    dtype = batch.support.dense.dtype

    def side_inputs(side: Examples, lookups: dict[str, Lookup]) -> Inputs:
        matrices = {n: _matrix(lo, tables[lo.table].shape[0], dtype) for n, lo in lookups.items()}
        return matrices, side.dense, side.label, side.mask.to(dtype)

    def objective(fast: dict[str, Tensor], own: dict[str, Tensor], inputs: Inputs, which: nn.Module):
        matrices, dense, label, mask = inputs
        embedded = {}
        for name, matrix in matrices.items():
            table = rows.support[name].table
            weight = fast.get(f"table {table}", tables[table]) if name in features else tables[table]
            embedded[name] = matrix @ weight
            if rows.support[name].is_sequence:
                embedded[f"{name}.mask"] = matrix.sum(-1) > 0
        values = own | {n: v for n, v in fast.items() if not n.startswith("table ")}
        logits = functional_call(model, values, (dense, embedded))
        return (which(logits, label) * mask).sum() / mask.sum().clamp(min=1)

    start = {name: dict(model.named_parameters())[name] for name in parameters}
    start |= {f"table {rows.support[name].table}": tables[rows.support[name].table] for name in features}

    def task_loss(support, query) -> Tensor:
        own = modulate(support)
        fast = {name: own.get(name, value) for name, value in start.items()}
        for step in range(len(rates)):
            steps = grad(objective)(fast, own, support, inner_loss)
            if not second_order:
                steps = {name: value.detach() for name, value in steps.items()}
            fast = {name: value - rates[step, rate_of[name]] * steps[name] for name, value in fast.items()}
        return objective(fast, own, query, loss)

    support, query = side_inputs(batch.support, rows.support), side_inputs(batch.query, rows.query)
    # A loop and no vmap: vmap over grad of layer_norm has wrong second derivatives (torch 2.13).
    per_task = [task_loss(_task(support, t), _task(query, t)) for t in range(batch.num_tasks)]
    return torch.stack(per_task).sum() / batch.num_tasks_global


def _task(inputs: Inputs, task: int) -> Inputs:
    matrices, dense, label, mask = inputs
    return {name: matrix[task] for name, matrix in matrices.items()}, dense[task], label[task], mask[task]


def inputs_of(features: Iterable[str], dim: int, num_numeric: int) -> InputSpec:
    """The inputs of a model of gmeta/models."""
    return InputSpec(dict.fromkeys(features, dim), tuple(f"x{i}" for i in range(num_numeric)), 0.0)


def tasks_of(batch: TaskBatch, start: int, stop: int) -> TaskBatch:
    """Tasks `start` to `stop` of this rank's, as a micro-batch of the same global batch; views."""
    return replace(
        batch,
        support=_tasks_of(batch.support, start, stop),
        query=_tasks_of(batch.query, start, stop),
        task_id=batch.task_id[start:stop],
    )


def _tasks_of(side: Examples, start: int, stop: int) -> Examples:
    return Examples(
        ids={name: ids[start:stop] for name, ids in side.ids.items()},
        bags={name: Bag(_bag_values(bag, start, stop), bag.lengths[start:stop]) for name, bag in side.bags.items()},
        dense=side.dense[start:stop],
        label=side.label[start:stop],
        mask=side.mask[start:stop],
        row=side.row[start:stop],
        item_cold=side.item_cold[start:stop],
    )


def lookup_of(lookup: Lookup, start: int, stop: int) -> Lookup:
    """A lookup for tasks `start` to `stop`."""
    if lookup.lengths is None:
        return replace(lookup, index=lookup.index[start:stop])
    bag = Bag(lookup.index, lookup.lengths)
    return replace(lookup, index=_bag_values(bag, start, stop), lengths=lookup.lengths[start:stop])


def _bag_values(bag: Bag, start: int, stop: int) -> Tensor:
    first, last = int(bag.lengths[:start].sum()), int(bag.lengths[:stop].sum())
    return bag.values[first:last]
