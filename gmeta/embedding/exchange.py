"""Rows to the workers that need them, gradients back to the workers that own them.

One fetch and one return a step, for support and query together, both outside the inner loop (G-Meta,
arXiv 2401.04338). Ids are a function of the batch alone, so their exchange is no part of the step: it runs ahead, on
the host, in the loader's thread, and leaves to the step an AlltoAll of rows and one of gradients, all sizes known.
With U unique rows of width d in float32 a worker moves 8U bytes of ids, 4dU of rows and 4dU of gradients, of which
about (N - 1) / N go to other workers.

The exchange is a chain of hops, each an AlltoAll inside one process group. One stage is one hop, to the owners. Two
stages are two: a worker asks inside its node, of the peer that has there the place that the owner has in its own; that
peer asks the owner once for what its whole node wants of it. Rows come back through the hops in reverse, gradients
follow the ids and are added up at every hop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Lookup, to_device
from gmeta.core.batch import RowGradients as RowGradients
from gmeta.core.selection import Ints, Selection, distinct, product
from gmeta.embedding.lookup import LookupPlan, peer_of
from gmeta.embedding.table import ShardedTables
from gmeta.parallel.collectives import all_to_all, exchange_counts
from gmeta.parallel.mesh import ExchangeStage, Mesh
from gmeta.parallel.traffic import Asked, CommStats, Traffic, predicted_traffic

_EXPONENT = 1  # columns that fp16 gradients carry besides their own
_MARK = 2.0**-100  # of a row that was used and has no gradient


@dataclass(frozen=True)
class Hop:
    """What one stage's AlltoAll moves for one `Ask`."""

    send: list[int]  # rows asked of each peer
    receive: list[int]  # rows that each peer asks of this rank
    merge: Selection | None  # [rows asked of the next stage, sum(receive)]; None at the owners


@dataclass(frozen=True)
class Leg:
    """One `Ask` from here to the owners."""

    group: str
    hops: tuple[Hop, ...]  # one a stage
    take: Tensor  # int64, rows of this worker's shard that peers ask for in the last hop


@dataclass(frozen=True)
class Owned:
    """Rows of this worker's shard that anyone asked for."""

    rows: Tensor  # int64 [R] positions in the shard, unique, ascending
    merge: Selection | None  # [R, gradients that arrive]; None where they arrive in this order, one a row


@dataclass(frozen=True)
class Routes:
    """A `LookupPlan` after ids were exchanged: who sends which rows to whom. Tensors are on the mesh's device."""

    num_rows: dict[str, int]
    legs: tuple[Leg, ...]
    first: dict[str, Tensor | None]
    owned: dict[str, Owned]
    support: dict[str, Lookup]
    query: dict[str, Lookup]
    traffic: CommStats  # of this batch; `fetch` and `return_gradients` add theirs


def exchange_ids(tables: ShardedTables, plan: LookupPlan, mesh: Mesh) -> Routes:
    """Tell the owners, through every stage, which rows this worker needs, and plan what will come back.

    Collective over gloo groups that nothing else uses, so that a background thread may do it while the step runs, as
    long as all ranks do it for the same batches in the same order. `PeerLost` when a peer is gone.
    """
    traffic = CommStats(mesh.rank)
    rows: list[Ints] = [ask.rows.numpy() for ask in plan.asks]
    hops: list[list[Hop]] = [[] for _ in rows]
    for stage in mesh.stages:
        layouts = [tables.layouts[ask.group] for ask in plan.asks]
        send = [
            np.bincount(peer_of(part, layout, stage), minlength=len(stage.ranks)).tolist()
            for part, layout in zip(rows, layouts, strict=True)
        ]
        receive = _exchange_counts(send, stage, mesh, traffic)
        rows = _exchange_rows(rows, send, receive, stage, mesh, traffic)
        for i, layout in enumerate(layouts):
            merge = None
            if stage is not mesh.stages[-1]:
                rows[i], _, merge = distinct(rows[i], layout.num_rows)
            hops[i].append(Hop(send[i], receive[i], merge))
    legs, owned = [], {}
    for ask, part, chain in zip(plan.asks, rows, hops, strict=True):
        start = tables.layouts[ask.group].local_range(mesh.rank).start
        legs.append(Leg(ask.group, tuple(chain), torch.from_numpy(part - start if start else part)))
    for name, layout in tables.layouts.items():
        arriving = _joined([leg.take for leg in legs if leg.group == name])
        if not mesh.stages and plan.first[name] is None:
            owned[name] = Owned(arriving, None)  # one worker: what it asked of itself is unique and ascending
        else:
            unique, _, matrix = distinct(arriving.numpy(), layout.num_rows)
            owned[name] = Owned(torch.from_numpy(unique), matrix)
    moved = to_device((tuple(legs), plan.first, owned, plan.support, plan.query), mesh.device)
    return Routes(plan.num_rows, *moved, traffic)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _exchange_counts(send: list[list[int]], stage: ExchangeStage, mesh: Mesh, traffic: CommStats) -> list[list[int]]:
    message = torch.tensor(send, dtype=torch.int64)
    traffic.counts.add(dict.fromkeys(stage.ranks, message[:, 0].nbytes))
    return exchange_counts(message, stage.ids, mesh)


def _exchange_rows(
    rows: list[Ints],
    send: list[list[int]],
    receive: list[list[int]],
    stage: ExchangeStage,
    mesh: Mesh,
    traffic: CommStats,
) -> list[Ints]:
    """What peers ask of this rank, in the order of the peers, for each `Ask`."""
    coming = []
    for part, out, into in zip(rows, send, receive, strict=True):
        ids = torch.from_numpy(part)
        coming.append(all_to_all(ids, out, into, stage.ids, mesh))
        _count(traffic.ids, ids, out, stage)
    return [pending.wait().numpy() for pending in coming]


def _count(traffic: Traffic, rows: Tensor, counts: Sequence[int], stage: ExchangeStage) -> None:
    """Book `counts` rows, of the size that those of `rows` have, by peer."""
    size = rows.nbytes // max(1, rows.shape[0])
    traffic.add({rank: size * n for rank, n in zip(stage.ranks, counts, strict=True)})


def fetch(tables: ShardedTables, routes: Routes, mesh: Mesh, wire: torch.dtype | None = None) -> EmbeddedRows:
    """Fetch the rows from their owners: an AlltoAll a stage. Collective; waits for no device.

    With a `wire` type rows are rounded to it, also those that stay here, so that what is learned does not depend on
    who owns a row. A group of which nothing is asked gets one zero row, so that padded positions have something to
    point at.
    """
    weights = [tables.groups[leg.group].weight for leg in routes.legs]
    values = [w.index_select(0, leg.take).to(wire) for w, leg in zip(weights, routes.legs, strict=True)]
    for depth, stage in reversed(list(enumerate(mesh.stages))):
        coming = []
        for leg, value in zip(routes.legs, values, strict=True):
            hop = leg.hops[depth]
            if hop.merge is not None:
                value = value.index_select(0, hop.merge.rows)
            coming.append(all_to_all(value, hop.receive, hop.send, stage.rows, mesh))
            _count(routes.traffic.rows, coming[-1].result, hop.send, stage)
        values = [pending.wait() for pending in coming]
    leaves = {}
    for name, parts in groupby(zip(routes.legs, values, strict=True), lambda item: item[0].group):
        leaves[name] = _leaf([value for _, value in parts], routes.first[name], tables.dtype)
    return EmbeddedRows(leaves, routes.support, routes.query)


def _leaf(parts: list[Tensor], first: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = _joined(parts)
    rows = (rows if first is None else rows.index_select(0, first)).to(dtype)
    return (rows if rows.shape[0] else rows.new_zeros(1, rows.shape[1])).requires_grad_()


def return_gradients(
    tables: ShardedTables,
    routes: Routes,
    rows: EmbeddedRows,
    mesh: Mesh,
    wire: torch.dtype | None = None,
    *,
    used: Mapping[str, Tensor] | None = None,
) -> dict[str, RowGradients]:
    """Send `rows.weights[...].grad` home and add what arrives for one row; collective, once after each `fetch`.

    Gradients of a row are added in the table's type, in the order of the ranks they come from, so that runs repeat
    bitwise. Rows that no graph reached (grad is None) return zeros: they were fetched, hence took part in the step. Of
    a row that was fetched more than once the first copy carries the gradient, and the others zeros.

    Where some tasks were left for later, `used[group]` (bool [U]) says which rows the others read, on every rank: rows
    that nobody used did not take part, and are not returned. This costs one more column.
    """
    values: list[Tensor] = []
    for name, weight in rows.weights.items():
        values += _outgoing(name, routes, weight, None if used is None else used[name], mesh)
    if not mesh.stages:
        values = [_decode(_encode(value, wire), tables.dtype, wire) for value in values]
    for depth, stage in enumerate(mesh.stages):
        coming = []
        for leg, value in zip(routes.legs, values, strict=True):
            hop = leg.hops[depth]
            sent = _encode(value, wire)
            coming.append(all_to_all(sent, hop.send, hop.receive, stage.rows, mesh))
            _count(routes.traffic.gradients, sent, hop.send, stage)
        values = [_decode(pending.wait(), tables.dtype, wire) for pending in coming]
        merges = [leg.hops[depth].merge for leg in routes.legs]
        values = [v if m is None else product(v, m) for v, m in zip(values, merges, strict=True)]
    out = {}
    for name, owned in routes.owned.items():
        grad = _joined([value for leg, value in zip(routes.legs, values, strict=True) if leg.group == name])
        grad = grad if owned.merge is None else product(grad, owned.merge)
        out[name] = RowGradients(owned.rows, grad)
        if used is not None:
            took_part = grad[:, -1] > 0
            out[name] = RowGradients(owned.rows[took_part], grad[took_part, :-1])
    return out


def _outgoing(name: str, routes: Routes, weight: Tensor, used: Tensor | None, mesh: Mesh) -> Sequence[Tensor]:
    """The gradients that each leg of a group sends off."""
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    grad = grad[: routes.num_rows[name]]
    if used is not None:  # marked by a number of the row's own size, which fp16's scaling keeps
        mark = grad.abs().amax(1).clamp(min=_MARK) * used[: grad.shape[0]]
        grad = torch.cat([grad, mark[:, None]], 1)
    first = routes.first[name]
    if first is None:
        return [grad]
    sizes = [sum(leg.hops[0].send) if mesh.stages else len(leg.take) for leg in routes.legs if leg.group == name]
    copies = grad.new_zeros(sum(sizes), grad.shape[1]).index_copy_(0, first, grad)
    return torch.split(copies, sizes)


def _encode(grad: Tensor, wire: torch.dtype | None) -> Tensor:
    """Gradients [n, d] as they travel: as they are, in bf16 [n, d], or in fp16 [n, d + 1].

    fp16 spans 6e-8 to 65504 and gradients divided by the global number of tasks are small, so that each row is scaled
    by a power of two, which brings its largest number into [0.5, 1) and travels as one more column. Infinite and NaN
    gradients stay so.
    """
    if wire != torch.float16:
        return grad.to(wire)
    exponent = torch.frexp(grad.abs().amax(1, keepdim=True)).exponent.clamp(-126, 126).to(grad.dtype)
    return torch.cat([grad * torch.exp2(-exponent), exponent], 1).to(wire)


def _decode(values: Tensor, dtype: torch.dtype, wire: torch.dtype | None) -> Tensor:
    if wire != torch.float16:
        return values.to(dtype)
    values = values.to(dtype)
    return values[:, :-_EXPONENT] * torch.exp2(values[:, -_EXPONENT:])


def expected_traffic(
    tables: ShardedTables,
    routes: Routes,
    mesh: Mesh,
    wire: torch.dtype | None = None,
    *,
    control_bytes: Sequence[int] = (),
    marked: bool = False,
) -> CommStats:
    """What the formulas of `predicted_traffic` say about a step with these routes; `marked`: which rows were used."""
    size = (wire or tables.dtype).itemsize
    stages = []
    for depth, stage in enumerate(mesh.stages):
        asked = []
        for leg in routes.legs:
            dim = tables.layouts[leg.group].dim
            rows: Mapping[int, int] = dict(zip(stage.ranks, leg.hops[depth].send, strict=True))
            asked.append(Asked(rows, dim * size, (dim + marked + _EXPONENT * (wire == torch.float16)) * size))
        stages.append(asked)
    return predicted_traffic(mesh.rank, mesh.world_size, stages, control_bytes=control_bytes)
