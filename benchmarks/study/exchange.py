"""Naive ways for rows to travel, made of the product's own parts. None of them changes what is learned.

They lose: they are here to measure by how much. Each satisfies `gmeta.embedding.exchange.Exchange`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, RowGradients, to_device
from gmeta.core.selection import distinct, product
from gmeta.embedding.exchange import Exchange, RoutedRequest, RowExchange, RowRoute, as_leaf
from gmeta.embedding.lookup import RowRequest, request_rows
from gmeta.embedding.table import FusedTable
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import CommStats


class NaiveExchange:
    """Fetches rows more often than needed.

    With `separate` the rows of support and query are asked for, fetched and returned each on their own. Without
    `dedup` every lookup asks for its row and returns it. Learning works on one copy of each row: the first copy that
    arrives is read and carries the gradient home, the others carry zeros.

    Each fetch is a route of its own, named `<fused table>/<fetch>`, and the product's exchange carries them all. The
    route of the fused table itself is local: `take` is the first copy of each row among all that arrive, `owned` and
    `merge` join what the fetches bring back to the owner.
    """

    def __init__(
        self,
        tables: Mapping[str, FusedTable],
        mesh: Mesh,
        wire: torch.dtype | None = None,
        *,
        separate: bool = False,
        dedup: bool = True,
    ) -> None:
        fetches = ("support", "query") if separate else ("both",)
        self._tables, self._mesh, self._dedup = tables, mesh, dedup
        self._fetches = {name: [f"{name}/{fetch}" for fetch in fetches] for name in tables}
        carried = {fetch: tables[name] for name, found in self._fetches.items() for fetch in found}
        self._exchange = RowExchange(carried, mesh, wire)

    def request(
        self, support: Examples | None = None, query: Examples | None = None, shared: Examples | None = None
    ) -> RowRequest:
        """Return the rows of the product's request, and beside them, by fetch, the rows to ask for."""
        assert shared is None, "the study is of runs that score examples"
        request = request_rows(self._tables, support, query)
        rows = dict(request.rows)
        for name, fetches in self._fetches.items():
            reads = [_reads(support, request.support, name), _reads(query, request.query, name)]
            for fetch, read in zip(fetches, reads if len(fetches) > 1 else [torch.cat(reads)], strict=True):
                times = torch.bincount(read, minlength=len(rows[name]))
                rows[fetch] = torch.repeat_interleave(rows[name], times.clamp(max=1) if self._dedup else times)
        return replace(request, rows=rows)

    def exchange_ids(self, request: RowRequest) -> RoutedRequest:
        """Return the routes of all fetches, and a local one for each fused table."""
        routed = self._exchange.exchange_ids(request)
        local = {}
        for name, fetches in self._fetches.items():
            arriving = torch.cat([request.rows[fetch] for fetch in fetches]).numpy()
            unique, first = np.unique(arriving, return_index=True)
            take = first[np.searchsorted(unique, request.rows[name].numpy())]
            returned = torch.cat([routed.routes[fetch].owned for fetch in fetches]).cpu()
            owned, _, merge = distinct(returned.numpy(), self._tables[name].num_rows)
            local[name] = RowRoute((), torch.from_numpy(take), torch.from_numpy(owned), merge)
        return replace(routed, routes=routed.routes | to_device(local, self._mesh.device))

    def _carried(self, routed: RoutedRequest) -> RoutedRequest:
        fetches = [fetch for found in self._fetches.values() for fetch in found]
        return replace(routed, routes={fetch: routed.routes[fetch] for fetch in fetches})

    def fetch(self, routed: RoutedRequest) -> EmbeddedRows:
        """Make all fetches, of which the first copy of each row is kept."""
        rows = self._exchange.fetch(self._carried(routed))
        leaves = {}
        for name, fetches in self._fetches.items():
            arrived = [rows.weights[fetch].detach()[: routed.routes[fetch].num_rows] for fetch in fetches]
            leaves[name] = as_leaf(torch.cat(arrived).index_select(0, routed.routes[name].take))
        return EmbeddedRows(leaves, routed.support, routed.query)

    def return_gradients(
        self, routed: RoutedRequest, rows: EmbeddedRows, used: Mapping[str, Tensor] | None = None
    ) -> dict[str, RowGradients]:
        """Make all returns: the first copy of each row carries its gradient, the others zeros."""
        if used is not None:
            raise ValueError("the study's exchanges return all rows: late tasks cannot be dropped with them")
        copies = {}
        for name, fetches in self._fetches.items():
            take, sizes = routed.routes[name].take, [routed.routes[fetch].num_rows for fetch in fetches]
            weight = rows.weights[name]
            sent = weight.new_zeros(sum(sizes), weight.shape[1])
            if weight.grad is not None:
                sent.index_copy_(0, take, weight.grad[: len(take)])
            for fetch, part in zip(fetches, torch.split(sent, sizes), strict=True):
                copies[fetch] = part.detach().requires_grad_()
                copies[fetch].grad = part
        home = self._exchange.return_gradients(self._carried(routed), EmbeddedRows(copies, {}, {}))
        out = {}
        for name, fetches in self._fetches.items():
            route, grad = routed.routes[name], torch.cat([home[fetch].grad for fetch in fetches])
            assert route.merge is not None
            out[name] = RowGradients(route.owned, product(grad, route.merge))
        return out

    def expected_traffic(
        self, routed: RoutedRequest, *, control_bytes: Sequence[int] = (), marked: bool = False
    ) -> CommStats:
        """Return the product's formulas, with the rows that each fetch asks for in place of U."""
        return self._exchange.expected_traffic(self._carried(routed), control_bytes=control_bytes, marked=marked)


def _reads(side: Examples | None, lookups: Mapping[str, Lookup], table: str) -> Tensor:
    """Return the position among a table's rows of every lookup of a side, padding left out; int64 [lookups]."""
    found = [lookup for lookup in lookups.values() if lookup.table == table]
    if side is None or not found:
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat([lookup.index if lookup.lengths is not None else lookup.index[side.mask] for lookup in found])


@dataclass
class Unrouted:
    """A request whose ids wait for the step, in place of a `RoutedRequest`."""

    request: RowRequest
    routed: RoutedRequest | None = None

    @property
    def traffic(self) -> CommStats:
        """Return what was sent for the batch, once it was fetched."""
        assert self.routed is not None
        return self.routed.traffic


class IdsInStep:
    """Another exchange, whose ids travel in the step, just before the rows, and not ahead of it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.request = exchange.request

    def exchange_ids(self, request: RowRequest) -> Unrouted:
        """Do nothing yet: `fetch` exchanges the ids."""
        return Unrouted(request)

    def fetch(self, waiting: Unrouted) -> EmbeddedRows:
        """Exchange the ids, then fetch the rows."""
        waiting.routed = self._exchange.exchange_ids(waiting.request)
        return self._exchange.fetch(waiting.routed)

    def return_gradients(
        self, waiting: Unrouted, rows: EmbeddedRows, used: Mapping[str, Tensor] | None = None
    ) -> dict[str, RowGradients]:
        """Do what the other exchange does."""
        assert waiting.routed is not None
        return self._exchange.return_gradients(waiting.routed, rows, used)

    def expected_traffic(
        self, waiting: Unrouted, *, control_bytes: Sequence[int] = (), marked: bool = False
    ) -> CommStats:
        """Return what the other exchange predicts."""
        assert waiting.routed is not None
        return self._exchange.expected_traffic(waiting.routed, control_bytes=control_bytes, marked=marked)
