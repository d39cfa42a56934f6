"""Embedding rows of a bundle, read from its mapped files when a batch asks for them.

Nothing is copied when a bundle is opened, and processes that serve one share its pages. Rows lie there in the order of
ids, so that requests need no permutation either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gmeta.core.batch import Bag, EmbeddedRows, Examples, RowGradients, to_device
from gmeta.core.selection import offsets_of
from gmeta.embedding.exchange import RoutedRequest, RowRoute, as_leaf
from gmeta.embedding.lookup import RowRequest, check_ids, request_rows
from gmeta.embedding.table import FusedTable
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import CommStats
from gmeta.runs.bundle import Bundle


class MappedRows:
    """An `Exchange` of one process that reads rows and never changes them.

    `tables` are a model's fused tables (`ShardedTables.fused`), of which the rows are never allocated. `wire` is the
    type that training rounded rows to on their way. ValueError for a bundle of another model.
    """

    def __init__(
        self, bundle: Bundle, tables: Mapping[str, FusedTable], mesh: Mesh, wire: torch.dtype | None = None
    ) -> None:
        self._bundle, self._mesh, self._wire = bundle, mesh, wire
        for fused in tables.values():
            bundle.require_tables(fused)
        self._tables = {name: replace(fused, in_order=True) for name, fused in tables.items()}

    def request(
        self, support: Examples | None = None, query: Examples | None = None, shared: Examples | None = None
    ) -> RowRequest:
        """Return the rows that these sides of a batch need; their numbers are keys."""
        return request_rows(self._tables, support, query, shared)

    def exchange_ids(self, request: RowRequest) -> RoutedRequest:
        """Return the request: there is nobody to exchange with."""
        routes = {name: RowRoute((), rows, rows, None) for name, rows in request.rows.items()}
        support, query, shared = to_device((request.support, request.query, request.shared), self._mesh.device)
        return RoutedRequest(routes, support, query, CommStats(self._mesh.rank), shared)

    def fetch(self, routed: RoutedRequest) -> EmbeddedRows:
        """Read the rows; a table of which nothing is asked gets a leaf of one zero row."""
        leaves = {}
        for name, route in routed.routes.items():
            table = self._tables[name]
            rows = _rows(self._bundle, table, route.take)
            leaves[name] = as_leaf(rows.to(self._mesh.device, self._wire or rows.dtype).to(table.dtype))
        return EmbeddedRows(leaves, routed.support, routed.query, routed.shared)

    def features(self, order: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the features that read each table, in this order."""
        wanted = tuple(order)
        read = {name: tuple(f for f in wanted if f in table.features) for name, table in self._tables.items()}
        return {name: features for name, features in read.items() if features}

    def look_up(self, side: Examples, tables: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Return what the features of each table read of n examples, [n, F, d]; `tables` names the features.

        They are the values that `request`, `fetch` and a gather plan lead to, without the search for equal ids, which
        only pays where rows travel or change.
        """
        out = {}
        for name, features in tables.items():
            table, ids = self._tables[name], {}
            if one := [feature for feature in features if table.pooling(feature) is None]:
                block = torch.stack([side.ids[feature].reshape(-1) for feature in one])
                check_ids(block, table, one)
                ids = dict(zip(one, block, strict=True))
            read = [
                self._rows_of(table, feature, ids[feature])
                if feature in ids
                else self._pooled(table, feature, side.bags[feature])
                for feature in features
            ]
            out[name] = torch.stack(read, 1)
        return out

    def _rows_of(self, table: FusedTable, feature: str, ids: Tensor) -> Tensor:
        rows = self._bundle.rows(table.features[feature].name, ids)
        return rows.to(self._mesh.device, self._wire or rows.dtype).to(table.dtype)

    def _pooled(self, table: FusedTable, feature: str, bag: Bag) -> Tensor:
        check_ids(bag.values[None], table, [feature])
        rows, mode = self._rows_of(table, feature, bag.values), table.pooling(feature) or "mean"
        places = torch.arange(len(rows), device=rows.device)
        return F.embedding_bag(places, rows, offsets_of(bag.lengths), mode=mode, include_last_offset=True)

    def return_gradients(
        self, routed: RoutedRequest, rows: EmbeddedRows, used: Mapping[str, Tensor] | None = None
    ) -> dict[str, RowGradients]:
        """Refuse: a bundle's rows do not change."""
        raise NotImplementedError("a bundle's mapped rows take no gradients: load it without mapped")

    def expected_traffic(
        self, routed: RoutedRequest, *, control_bytes: Sequence[int] = (), marked: bool = False
    ) -> CommStats:
        """Return no traffic."""
        return CommStats(self._mesh.rank)


def _rows(bundle: Bundle, table: FusedTable, keys: Tensor) -> Tensor:
    """Return the rows [U, dim] of ascending keys int64 [U]."""
    starts = torch.tensor([*table.offsets.values(), table.num_rows])
    cuts = torch.searchsorted(keys, starts).tolist()
    parts = [
        bundle.rows(spec.name, keys[begin:end] - table.offsets[spec.name])
        for spec, begin, end in zip(table.specs, cuts, cuts[1:], strict=False)
        if end > begin
    ]
    return torch.cat(parts) if parts else torch.zeros(0, table.dim, dtype=table.dtype)
