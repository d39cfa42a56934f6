"""A parameter server: a share of the rows and of the dense parameters, and their optimizers.

It answers pulls as they come. A push is kept until every worker has pushed; then gradients are summed in worker order
(so that runs repeat bitwise), each dense parameter and each touched row takes one step of gmeta's own optimizers, and
every worker is answered with the new dense weights. No worker can pull rows of the next batch before.
"""

from __future__ import annotations

import math
import selectors
from dataclasses import dataclass

import torch
from torch import Tensor

from gmeta.core.batch import RowGradients
from gmeta.optim.dense import clip_scale, dense_optimizer, dense_step, lr_scale
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import PeerLost
from ps_baseline import wire
from ps_baseline.plan import only_table
from ps_baseline.session import ANSWER, STATS, Flat, Session, flatten, tables_state
from ps_baseline.wire import Links, Wire


@dataclass
class Push:
    """What one worker has computed of a batch."""

    stats: Tensor  # float64 [STATS]
    dense: Tensor  # [n], this server's dense parameters
    rows: Tensor  # int64 [R] positions in this server's share, unique
    grads: Tensor  # [R, d]


@dataclass
class Shard:
    """The state of a server."""

    session: Session
    flat: Flat
    dense: torch.optim.AdamW | None  # None: this server holds no dense parameter
    sparse: SparseOptimizer
    first_row: int
    weight: Tensor  # [local rows, d]
    table: str  # name of the fused table
    step: int = 0


def open_shard(session: Session) -> Shard:
    """Allocate this server's rows and make its optimizers."""
    config, system, server = session.config, session.system, session.place.server
    for p in system.learner.parameters():
        p.requires_grad_(False)
    mine = session.parameters(server)
    for p in mine:
        p.requires_grad_(True)
    flat = flatten(mine, system.dtype)
    rates = {"lr": config.dense.lr, "inner_lr_lr": config.dense.inner_lr_lr}
    dense = dense_optimizer(system.learner, **rates, weight_decay=config.dense.weight_decay) if mine else None
    embedding = config.embedding
    table = only_table(system.tables)
    return Shard(
        session=session,
        flat=flat,
        dense=dense,
        sparse=SparseOptimizer(embedding.optimizer, lr=embedding.lr, weight_decay=embedding.weight_decay),
        first_row=table.local_range(server).start,
        weight=table.weight,
        table=table.name,
    )


def serve(session: Session, links: Links) -> None:
    """Answer the workers until all have said goodbye. PeerLost when one is gone, or all are silent too long.

    ValueError, after every worker has been told, when loss or gradients are not finite; nothing is updated then.
    """
    shard = open_shard(session)
    pushed: dict[int, Push] = {}
    leaving = 0
    with selectors.DefaultSelector() as selector, torch.no_grad():
        for number, worker in enumerate(links.workers):
            selector.register(worker, selectors.EVENT_READ, number)
        while leaving < len(links.workers):
            ready = selector.select(session.place.timeout_s)
            if not ready:
                silent = ", ".join(worker.peer for n, worker in enumerate(links.workers) if n not in pushed)
                raise PeerLost(
                    f"{session.place.name} lost {silent} (no message in {session.place.timeout_s:g} s): it hangs. "
                    "Nothing was saved, start again"
                )
            for found, _ in ready:
                number = found.data
                worker = links.workers[number]
                kind, count = worker.header()
                if kind == wire.PUSH:
                    pushed[number] = _receive_push(shard, worker, count)
                elif kind == wire.END:
                    leaving += 1
                    selector.unregister(worker)
                else:
                    _answer(shard, worker, kind, count)
            if len(pushed) == len(links.workers):
                _finish_batch(shard, [pushed[number] for number in sorted(pushed)], links)
                pushed.clear()


def _answer(shard: Shard, worker: Wire, kind: int, count: int) -> None:
    if kind == wire.DENSE:
        worker.reply(shard.flat.values)
    elif kind == wire.ROWS:
        rows = torch.empty(count, dtype=torch.int64)
        worker.fill(rows)
        worker.reply(shard.weight.index_select(0, rows - shard.first_row))
    else:
        assert kind == wire.STATE, kind
        worker.reply(*tables_state(shard.session))


def _receive_push(shard: Shard, worker: Wire, count: int) -> Push:
    push = Push(
        stats=torch.empty(STATS, dtype=torch.float64),
        dense=torch.empty_like(shard.flat.grads),
        rows=torch.empty(count, dtype=torch.int64),
        grads=shard.weight.new_empty(count, shard.weight.shape[1]),
    )
    worker.fill(push.stats, push.dense, push.rows, push.grads)
    push.rows -= shard.first_row
    return push


def _finish_batch(shard: Shard, pushes: list[Push], links: Links) -> None:
    """Make the outer update of a batch, then send the answers."""
    config = shard.session.config
    shard.flat.grads.copy_(pushes[0].dense)
    for push in pushes[1:]:
        shard.flat.grads.add_(push.dense)
    rows = _merge(pushes)
    stats = torch.stack([push.stats for push in pushes]).sum(0)
    squares = rows.grad.double().square().sum() + shard.flat.grads.double().square().sum()
    norm = math.sqrt(_sum_over_servers(float(squares), shard, links))
    finite = math.isfinite(norm) and math.isfinite(float(stats[0]))
    lr = lr_scale(shard.step, config.dense.warmup_steps, shard.session.total_steps, config.dense.decay)
    if finite:
        clip_norm = config.dense.clip_norm
        clip = clip_scale(torch.tensor(norm, dtype=torch.float64), clip_norm) if clip_norm else None
        _apply(shard, rows, clip, lr)
        shard.step += 1
    answer = torch.empty(ANSWER, dtype=torch.float64)
    answer[:STATS], answer[STATS], answer[STATS + 1] = stats, norm, config.dense.lr * lr
    for worker in links.workers:
        worker.reply(answer, shard.flat.values)
    require_finite(shard.step, float(stats[0]), norm)


def require_finite(step: int, loss: float, norm: float) -> None:
    """Raise ValueError where a loss or a gradient is not finite. Every process finds the same."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: loss is {loss}, gradient norm is {norm}; no weights were changed. "
            "Lower meta.inner_lr, dense.lr or embedding.lr, or set dense.clip_norm, and start again"
        )


def _merge(pushes: list[Push]) -> RowGradients:
    """Sum the gradients of equal rows, in worker order."""
    if len(pushes) == 1:
        return RowGradients(pushes[0].rows, pushes[0].grads)
    rows, inverse = torch.unique(torch.cat([push.rows for push in pushes]), return_inverse=True)
    total = pushes[0].grads.new_zeros(len(rows), pushes[0].grads.shape[1])
    for push, index in zip(pushes, inverse.split([len(push.rows) for push in pushes]), strict=True):
        total.index_add_(0, index, push.grads)
    return RowGradients(rows, total)


def _sum_over_servers(value: float, shard: Shard, links: Links) -> float:
    """Add the servers' numbers at server 0, and tell them the sum. The gradient's norm is that of all its parts."""
    if not links.servers:
        return value
    number = torch.tensor([value], dtype=torch.float64)
    if shard.session.place.server == 0:
        for fellow in links.servers:
            part = torch.empty_like(number)
            fellow.fill(part)
            number += part
        for fellow in links.servers:
            fellow.reply(number)
    else:
        links.servers[0].reply(number)
        links.servers[0].fill(number)
    return float(number)


def _apply(shard: Shard, rows: RowGradients, clip: Tensor | None, lr: float) -> None:
    if shard.dense is not None:
        dense_step(shard.dense, lr_scale=lr, grad_scale=clip)
    shard.sparse.step(shard.session.system.tables.fused, {shard.table: rows}, lr_scale=lr, grad_scale=clip)
