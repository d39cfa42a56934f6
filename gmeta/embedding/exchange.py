"""Rows to the workers that need them, gradients back to the workers that own them.

A step makes one fetch and one return, for support and query together, both outside the inner loop (G-Meta,
arXiv 2401.04338). Ids are a function of the batch alone, so their exchange is no part of the step: the loader's thread
does it ahead, on the host. It leaves to the step one AlltoAll of rows and one of gradients, whose sizes are known.
With U unique rows of width d in float32 a worker moves 8U bytes of ids, 4dU of rows and 4dU of gradients, of which
about (N - 1) / N go to other workers.

The exchange is a chain of hops. Each hop is an AlltoAll inside one process group. With one stage there is one hop, to
the owners. With two stages there are two: a worker asks the peer of its own node that has the same position in the
node as the owner has in its own, and that peer asks the owner once for all that its node wants. Rows come back through
the hops in reverse. Gradients follow the ids and are added up at every hop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, RowGradients, to_device
from gmeta.core.selection import Ints, Selection, distinct, product
from gmeta.embedding.lookup import RowRequest, peer_of, request_rows
from gmeta.embedding.table import FusedTable
from gmeta.parallel.collectives import all_to_all, exchange_counts
from gmeta.parallel.mesh import ExchangeStage, Mesh
from gmeta.parallel.traffic import ID_BYTES, CommStats, Traffic, add_all_reduce

_EXPONENT = 1  # columns that fp16 gradients carry besides their own
_MARK = 2.0**-100  # marks a row that was used and has no gradient


@dataclass(frozen=True)
class Hop:
    """What one stage's AlltoAll moves for one fused table."""

    send: list[int]  # rows asked of each peer
    receive: list[int]  # rows that each peer asks of this rank
    merge: Selection | None  # [rows asked of the next stage, sum(receive)]; None at the owners


@dataclass(frozen=True)
class RowRoute:
    """How the rows of one fused table travel between this worker and their owners, for one batch."""

    hops: tuple[Hop, ...]  # one a stage; none in one process
    take: Tensor  # int64, rows of this worker's part that peers ask for in the last hop, in the order of the peers
    owned: Tensor  # int64 [R], rows of this worker's part that anyone asked for, unique, ascending
    merge: Selection | None  # [R, len(take)], adds up gradients; None where they arrive one a row, in this order

    @property
    def num_rows(self) -> int:
        """Return the number of rows that this worker asked for."""
        return sum(self.hops[0].send) if self.hops else len(self.take)


@dataclass(frozen=True)
class RoutedRequest:
    """A `RowRequest` after ids were exchanged: who sends which rows to whom. Tensors are on the mesh's device."""

    routes: dict[str, RowRoute]  # by fused table
    support: dict[str, Lookup]
    query: dict[str, Lookup]
    traffic: CommStats  # what was sent for this batch until now
    shared: dict[str, Lookup] = field(default_factory=dict)


class Exchange(Protocol):
    """How a batch's rows travel. `RowExchange` is the way; benchmarks compare it with others.

    What is learned must not depend on the way: rows are read as their owners hold them (rounded to the wire's type),
    and all gradients of a row reach its owner.
    """

    def request(
        self, support: Examples | None = None, query: Examples | None = None, shared: Examples | None = None
    ) -> RowRequest:
        """Return the rows that a batch needs. Local; the loader's thread calls it."""

    def exchange_ids(self, request: RowRequest) -> RoutedRequest:
        """Tell the owners which rows this worker needs. Collective; the loader's thread calls it ahead of the step."""

    def fetch(self, routed: RoutedRequest) -> EmbeddedRows:
        """Fetch the rows from their owners. Collective.

        A fused table of which nothing is asked gets a leaf of one zero row, so that padded positions have something to
        point at.
        """

    def return_gradients(
        self, routed: RoutedRequest, rows: EmbeddedRows, used: Mapping[str, Tensor] | None = None
    ) -> dict[str, RowGradients]:
        """Send `rows.weights[...].grad` home and add what arrives for one row. Collective, once after each `fetch`."""

    def expected_traffic(
        self, routed: RoutedRequest, *, control_bytes: Sequence[int] = (), marked: bool = False
    ) -> CommStats:
        """Return what the formulas say that a step with these routes sends; `routed.traffic` has what it sent.

        `control_bytes` are the sizes of the step's small AllReduces; `marked` says that `used` was given. Dense layers
        predict what they send themselves (`optim.dense.Dense`).
        """


class RowExchange:
    """One request, one fetch and one return a step, each row once.

    `tables` are a model's fused tables (`ShardedTables.fused`). `wire` is the type of rows and gradients on the way;
    None sends them as the tables hold them. Gradients are always summed in the tables' own type.
    """

    def __init__(self, tables: Mapping[str, FusedTable], mesh: Mesh, wire: torch.dtype | None = None) -> None:
        self._tables = tables
        self._mesh = mesh
        self._wire = wire

    def request(
        self, support: Examples | None = None, query: Examples | None = None, shared: Examples | None = None
    ) -> RowRequest:
        """Return the rows that these sides of a batch need; see `request_rows`."""
        return request_rows(self._tables, support, query, shared)

    def exchange_ids(self, request: RowRequest) -> RoutedRequest:
        """Tell the owners, through every stage, which rows this worker needs, and prepare what will come back.

        Collective, over gloo groups that nothing else uses. A background thread may therefore do it while the step
        runs, as long as all ranks do it for the same batches in the same order. `PeerLost` when a peer is gone.
        """
        mesh, traffic = self._mesh, CommStats(self._mesh.rank)
        rows: dict[str, Ints] = {name: request.rows[name].numpy() for name in self._tables}
        hops: dict[str, list[Hop]] = {name: [] for name in rows}
        for stage in mesh.stages if rows else ():  # a model without tables asks for nothing
            size = len(stage.ranks)
            send = [
                np.bincount(peer_of(rows[name], table, stage), minlength=size).tolist()
                for name, table in self._tables.items()
            ]
            receive = _exchange_counts(send, stage, mesh, traffic)
            arrived = _exchange_rows(list(rows.values()), send, receive, stage, mesh, traffic)
            for name, asked, out, into in zip(rows, arrived, send, receive, strict=True):
                merge = None
                rows[name] = asked
                if stage is not mesh.stages[-1]:
                    rows[name], _, merge = distinct(asked, self._tables[name].num_rows)
                hops[name].append(Hop(out, into, merge))
        routes = {name: self._route(table, rows[name], hops[name]) for name, table in self._tables.items()}
        routes, support, query, shared = to_device(
            (routes, request.support, request.query, request.shared), mesh.device
        )
        return RoutedRequest(routes, support, query, traffic, shared)

    def _route(self, table: FusedTable, asked: Ints, hops: list[Hop]) -> RowRoute:
        """Return the route of a request. `asked` are the physical rows that peers ask of this worker in the last
        hop.
        """
        take = asked - table.local_range(self._mesh.rank).start
        if not hops:  # one worker: what it asked of itself is unique and ascending
            return RowRoute((), torch.from_numpy(take), torch.from_numpy(take), None)
        owned, _, merge = distinct(take, table.num_rows)
        return RowRoute(tuple(hops), torch.from_numpy(take), torch.from_numpy(owned), merge)

    def fetch(self, routed: RoutedRequest) -> EmbeddedRows:
        """Fetch the rows from their owners: an AlltoAll a stage for each fused table. Waits for no device.

        Collective. With a `wire` type rows are rounded to it, also those that stay here, so that what is learned does
        not depend on who owns a row.
        """
        mesh, routes = self._mesh, routed.routes
        values = [
            self._tables[name].weight.index_select(0, route.take).to(self._wire) for name, route in routes.items()
        ]
        for depth, stage in reversed(list(enumerate(mesh.stages))):
            coming = []
            for route, value in zip(routes.values(), values, strict=True):
                hop = route.hops[depth]
                if hop.merge is not None:
                    value = value.index_select(0, hop.merge.rows)
                coming.append(all_to_all(value, hop.receive, hop.send, stage.rows, mesh))
                _count(routed.traffic.rows, coming[-1].result, hop.send, stage)
            values = [pending.wait() for pending in coming]
        leaves = {name: as_leaf(value.to(self._tables[name].dtype)) for name, value in zip(routes, values, strict=True)}
        return EmbeddedRows(leaves, routed.support, routed.query, routed.shared)

    def return_gradients(
        self, routed: RoutedRequest, rows: EmbeddedRows, used: Mapping[str, Tensor] | None = None
    ) -> dict[str, RowGradients]:
        """Send `rows.weights[...].grad` home and add what arrives for one row. Collective, once after each `fetch`.

        Gradients of a row are added in the tables' type, in the order of the ranks they come from, so that runs repeat
        bitwise. A leaf that no graph reached (its grad is None) returns zeros: its rows were fetched, hence took part.

        Where some tasks were left for later, `used[table]` (bool [U]) says on every rank which rows the others read.
        Rows that nobody used did not take part and are not returned. This costs one more column.
        """
        mesh, wire, routes = self._mesh, self._wire, routed.routes
        values = [
            _outgoing(rows.weights[name], route.num_rows, None if used is None else used[name])
            for name, route in routes.items()
        ]
        dtypes = [self._tables[name].dtype for name in routes]
        if not mesh.stages:
            values = [_decode(_encode(value, wire), dtype, wire) for value, dtype in zip(values, dtypes, strict=True)]
        for depth, stage in enumerate(mesh.stages):
            coming = []
            for route, value in zip(routes.values(), values, strict=True):
                hop = route.hops[depth]
                sent = _encode(value, wire)
                coming.append(all_to_all(sent, hop.send, hop.receive, stage.rows, mesh))
                _count(routed.traffic.gradients, sent, hop.send, stage)
            values = [_decode(pending.wait(), dtype, wire) for pending, dtype in zip(coming, dtypes, strict=True)]
            merges = [route.hops[depth].merge for route in routes.values()]
            values = [_added(value, merge) for value, merge in zip(values, merges, strict=True)]
        out = {}
        for (name, route), value in zip(routes.items(), values, strict=True):
            grad = _added(value, route.merge)
            out[name] = RowGradients(route.owned, grad)
            if used is not None:
                took_part = grad[:, -1] > 0
                out[name] = RowGradients(route.owned[took_part], grad[took_part, :-1])
        return out

    def expected_traffic(
        self, routed: RoutedRequest, *, control_bytes: Sequence[int] = (), marked: bool = False
    ) -> CommStats:
        """Return what the formulas say that a step with these routes sends: 8 U, b d U and b d U bytes a stage.

        U is counted by the peer asked. With two stages the second's U is what this rank asks for its whole node.
        """
        expected = CommStats(self._mesh.rank)
        for depth, stage in enumerate(self._mesh.stages if routed.routes else ()):
            expected.counts.add(dict.fromkeys(stage.ranks, ID_BYTES * len(routed.routes)))
            for name, route in routed.routes.items():
                table, asked = self._tables[name], dict(zip(stage.ranks, route.hops[depth].send, strict=True))
                size = (self._wire or table.dtype).itemsize
                sent = table.dim + marked + _EXPONENT * (self._wire == torch.float16)
                expected.ids.add({peer: ID_BYTES * count for peer, count in asked.items()})
                expected.rows.add({peer: size * table.dim * count for peer, count in asked.items()})
                expected.gradients.add({peer: size * sent * count for peer, count in asked.items()})
        for size in control_bytes:
            add_all_reduce(expected.control, size, self._mesh.world_size)
        return expected


def as_leaf(rows: Tensor) -> Tensor:
    """Return the fetched rows [U, d] as a leaf of the graph; one zero row where there is none."""
    return (rows if rows.shape[0] else rows.new_zeros(1, rows.shape[1])).requires_grad_()


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
    """Return the rows that peers ask of this rank, in the order of the peers, for each fused table."""
    coming = []
    for part, out, into in zip(rows, send, receive, strict=True):
        ids = torch.from_numpy(part)
        coming.append(all_to_all(ids, out, into, stage.ids, mesh))
        _count(traffic.ids, ids, out, stage)
    return [pending.wait().numpy() for pending in coming]


def _count(traffic: Traffic, rows: Tensor, counts: Sequence[int], stage: ExchangeStage) -> None:
    """Count `counts` rows, by peer, each of the size that a row of `rows` has."""
    size = rows.nbytes // max(1, rows.shape[0])
    traffic.add({rank: size * n for rank, n in zip(stage.ranks, counts, strict=True)})


def _added(values: Tensor, merge: Selection | None) -> Tensor:
    return values if merge is None else product(values, merge)


def _outgoing(weight: Tensor, num_rows: int, used: Tensor | None) -> Tensor:
    """Return the gradient of a leaf, as it sets off: [num_rows, d], or [num_rows, d + 1] with the mark of used rows."""
    grad = (torch.zeros_like(weight) if weight.grad is None else weight.grad)[:num_rows]
    if used is None:
        return grad
    # the mark is a number of the row's own size, so that fp16's scaling keeps it
    mark = grad.abs().amax(1).clamp(min=_MARK) * used[:num_rows]
    return torch.cat([grad, mark[:, None]], 1)


def _encode(grad: Tensor, wire: torch.dtype | None) -> Tensor:
    """Return the gradients [n, d] as they travel: as they are, in bf16 [n, d], or in fp16 [n, d + 1].

    fp16 spans 6e-8 to 65504, and gradients divided by the global number of tasks are small. So each row is scaled by a
    power of two that brings its largest number into [0.5, 1), and the exponent travels as one more column. Infinite
    and NaN gradients stay so.
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
