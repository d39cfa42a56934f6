"""The meta step of one task: adapt to the support, judge on the query, backward. What a PS worker runs in a loop.

`task_loss` is the textbook inner loop written by hand: all one-valued features in one gather, no padding, no masks.
It took 0.4 to 0.7 of the time of gmeta's `reference` engine on one task (2.2 against 5.2 ms of CPU at 40+10 examples,
8 x 32, 64-64, second order; 5.5 against 8.0 at 10+10, 20 x 16, 256-128). `choose` computes the first task both ways and
takes the engine where they differ: a model that the loop below does not know is slower then, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.meta.dropout import QUERY_PASS, BatchKey, SeededDropout, example_keys
from gmeta.meta.interception import Intercept
from gmeta.meta.learner import MetaLearner
from ps_baseline.plan import Features, Side, Task

Batch = tuple[int, int, int]
"""(epoch, index, tasks of the whole batch)."""
Step = Callable[[Task, Tensor, Batch], tuple[Tensor, Tensor]]
"""(task, its rows [U, d], batch) -> (loss / tasks of the batch, mean support loss before adaptation, detached)."""


def choose(learner: MetaLearner, features: Features, task: Task, rows: Tensor, batch: Batch) -> tuple[Step, str]:
    """Return the step of this run and its name, after computing `task` both ways. It leaves no gradients behind."""
    fast: Step = partial(task_loss, inner_of(learner, features))
    slow: Step = partial(engine_loss, learner, features)
    ours, theirs = (_gradients(learner, step, task, rows, batch) for step in (fast, slow))
    tolerance = 1e-3 if rows.dtype == torch.float32 else 1e-9
    if all((a - b).norm() <= tolerance * (b.norm() + 1e-6) for a, b in zip(ours, theirs, strict=True)):
        return fast, "hand-written inner loop"
    return slow, "gmeta's reference engine (the hand-written inner loop does not know this model)"


def _gradients(learner: MetaLearner, step: Step, task: Task, rows: Tensor, batch: Batch) -> list[Tensor]:
    leaf = rows.detach().clone().requires_grad_()
    loss, support_loss = step(task, leaf, batch)
    leaves = [leaf, *learner.parameters()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), support_loss, *found]


@dataclass(frozen=True)
class Inner:
    """What the hand-written loop looks up once a run: walking the modules took a tenth of a task's time."""

    learner: MetaLearner
    features: Features
    adapted: dict[str, Tensor]  # parameters that a task adapts
    has_dropout: bool


def inner_of(learner: MetaLearner, features: Features) -> Inner:
    """Return the hand-written loop of a learner."""
    parameters = dict(learner.model.named_parameters())
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in learner.model.modules())
    return Inner(learner, features, {name: parameters[name] for name in learner.adapted.parameters}, has_dropout)


def task_loss(inner: Inner, task: Task, rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute `Step`, written by hand. `rows` requires grad, and its first axis is numbered as in `task`."""
    learner = inner.learner
    key = (learner.seed, batch[0], batch[1]) if learner.training else None
    if not learner.adapted:
        return _plain_loss(inner, task, rows, batch, key)
    adapted = learner.adapted
    own = rows.clone() if inner.features.mixed else rows  # features that do not adapt keep reading `rows`
    fast = inner.adapted
    support, query = task.support, task.query
    first = rows.new_zeros(())
    for step in range(learner.inner_loop.steps if len(support.label) else 0):
        changed = fast if step else None
        losses = learner.inner_loss(_logits(inner, support, rows, own, changed, task, key, step + 1), support.label)
        first = losses.detach().mean() if step == 0 else first
        leaves = [own, *fast.values()] if adapted.features else list(fast.values())
        gradients = torch.autograd.grad(
            losses.sum() / (len(losses) + learner.inner_loop.prior),
            leaves,
            create_graph=learner.inner_loop.order == "second",
            allow_unused=True,
            materialize_grads=True,
        )
        if adapted.features:
            own = own - _rate(learner, step, 0) * gradients[0]
            gradients = gradients[1:]
        fast = {
            name: value - _rate(learner, step, adapted.rate_of(name)) * gradient
            for (name, value), gradient in zip(fast.items(), gradients, strict=True)
        }
    if not len(query.label):
        return rows.sum() * 0, first
    logits = _logits(inner, query, rows, own, fast or None, task, key, QUERY_PASS)
    return learner.loss(logits, query.label).mean() / batch[2], first


def _rate(learner: MetaLearner, step: int, group: int) -> float | Tensor:
    return learner.inner_loop.lr if learner.inner_lr is None else learner.inner_lr[step, group]


def _plain_loss(inner: Inner, task: Task, rows: Tensor, batch: Batch, key: BatchKey | None) -> tuple[Tensor, Tensor]:
    """Return the loss of plain training: the mean over support and query rows."""
    learner = inner.learner
    support, query = (
        learner.loss(_logits(inner, side, rows, rows, None, task, key, number), side.label)
        for side, number in ((task.support, QUERY_PASS + 1), (task.query, QUERY_PASS))
    )
    both = torch.cat([support, query])
    first = support.detach().mean() if len(support) else rows.new_zeros(())
    return both.mean() / batch[2], first


def _logits(
    inner: Inner,
    side: Side,
    rows: Tensor,
    own: Tensor,
    fast: dict[str, Tensor] | None,
    task: Task,
    key: BatchKey | None,
    pass_number: int,
) -> Tensor:
    """Return the logits [n] of one side, with the task's rows `own` and parameters `fast` (None: the shared ones)."""
    inputs = (side.dense, _embed(inner.features, side, rows, own))
    keys = None
    if key is not None:
        positions = torch.arange(len(side.label))
        keys = partial(example_keys, key, torch.tensor(task.task_id), pass_number, positions)
    # A function mode costs every operation of the pass; only a model with dropout needs it.
    model = inner.learner.model
    with Intercept(SeededDropout(keys)) if inner.has_dropout else nullcontext():
        out: Tensor = functional_call(model, fast, inputs, tie_weights=False) if fast else model(*inputs)
    return out


def _embed(features: Features, side: Side, rows: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Return feature -> [n, d]."""
    embedded: dict[str, Tensor] = {}
    cut = features.num_adapted
    for table, index, names in (
        (own, side.index[:cut], features.names[:cut]),
        (rows, side.index[cut:], features.names[cut:]),
    ):
        if names:
            values = table.index_select(0, index.reshape(-1)).view(*index.shape, -1)
            embedded.update(zip(names, values.unbind(0), strict=True))
    for bag in side.bags:
        values = (own if bag.feature.adapted else rows).index_select(0, bag.index)
        weighted = values if bag.weight is None else values * bag.weight
        empty = values.new_zeros(len(bag.lengths), values.shape[1])
        embedded[bag.feature.name] = empty.index_add(0, bag.row, weighted)
    return embedded


def engine_loss(
    learner: MetaLearner, features: Features, task: Task, rows: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Compute `Step` through gmeta's engine, on a batch of this task."""
    examples = [_examples(side) for side in (task.support, task.query)]
    task_id = torch.tensor([task.task_id])
    whole = TaskBatch(*examples, task_id=task_id, num_tasks_global=batch[2], epoch=batch[0], index=batch[1])
    lookups = [_lookups(features, side) for side in (task.support, task.query)]
    loss, output = learner(EmbeddedRows({"rows": rows}, *lookups), whole)
    return loss, output.support_loss[0]


def _examples(side: Side) -> Examples:
    mask = torch.ones(1, len(side.label), dtype=torch.bool)
    return Examples({}, {}, side.dense[None], side.label[None], mask, mask.long(), ~mask)


def _lookups(features: Features, side: Side) -> dict[str, Lookup]:
    found = {name: Lookup("rows", index[None]) for name, index in zip(features.names, side.index, strict=True)}
    for bag in side.bags:
        pooling = "mean" if bag.feature.mean else "sum"
        found[bag.feature.name] = Lookup("rows", bag.index, bag.lengths[None], pooling)  # type: ignore[arg-type]
    return found
