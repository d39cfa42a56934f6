"""Row-sharded embedding tables with their optimizer state beside the rows.

Logical tables of one width are fused into one physical table of N rows. The id `i` of a logical table has the key
offset[table] + i. A seeded bijection sends keys to physical rows. Worker r holds the contiguous rows
[r * c, (r + 1) * c) with c = ceil(N / workers), as `DTensor` does with `Shard(0)`. Keys, initial rows and optimizer
steps never depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from gmeta.core.batch import Pooling
from gmeta.embedding.permutation import RowPermutation, normal_rows, table_key
from gmeta.parallel.mesh import Mesh

STATE: dict[str, dict[str, tuple[bool, torch.dtype | None]]] = {
    "sgd": {},
    "rowwise_adagrad": {"sum_squares": (False, None)},
    "adagrad": {"sum_squares": (True, None)},
    "adam": {"exp_avg": (True, None), "exp_avg_sq": (True, None), "steps": (False, torch.int32)},
}
"""Optimizer -> its state by name: whether a row has a value for each column or one in all, and the dtype (None: the
rows' own)."""

_FILL_ROWS = 1 << 12  # rows that are initialised at a time, so that temporaries stay in the cache
_FREE_FRACTION = 0.9  # of the free memory, which tables may take; activations and buffers need the rest


@dataclass(frozen=True)
class TableSpec:
    """A logical table: one vocabulary, and the features that look it up."""

    name: str
    num_ids: int
    dim: int
    features: dict[str, Pooling | None]  # feature -> pooling of a many-valued one, None for a one-valued one


@dataclass(frozen=True, kw_only=True)
class FusedTable:
    """One physical table: the logical tables of one width behind each other, permuted, and split over workers.

    `weight` and `state` hold this worker's rows. Each is allocated when it is first used. Rows start as normal numbers
    of deviation `init_std`; where that is None they hold no numbers yet, and a checkpoint fills them.
    """

    name: str
    specs: tuple[TableSpec, ...]  # the logical tables, all of one width
    mesh: Mesh
    seed: int
    init_std: float | None
    dtype: torch.dtype
    optimizer: str | None
    in_order: bool = False  # requests name rows by key, without the permutation: whoever reads them has them so

    @property
    def dim(self) -> int:
        """Return the width of a row."""
        return self.specs[0].dim

    @cached_property
    def num_rows(self) -> int:
        """Return the number of rows on all workers."""
        return sum(spec.num_ids for spec in self.specs)

    @property
    def rows_per_worker(self) -> int:
        """Return the number of rows of a worker. The last ones may have fewer. This is torch.chunk's rule, which
        Shard(0) follows.
        """
        return -(-self.num_rows // self.mesh.world_size)

    def local_range(self, rank: int) -> range:
        """Return the range of physical rows of worker `rank`, which may be empty."""
        size, total = self.rows_per_worker, self.num_rows
        return range(min(rank * size, total), min((rank + 1) * size, total))

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name of a logical table -> key of its id 0."""
        ends = accumulate((spec.num_ids for spec in self.specs), initial=0)
        return dict(zip((spec.name for spec in self.specs), ends, strict=False))

    @cached_property
    def features(self) -> dict[str, TableSpec]:
        """Return feature -> the logical table that it looks up."""
        return {feature: spec for spec in self.specs for feature in spec.features}

    def pooling(self, feature: str) -> Pooling | None:
        """Return how a many-valued feature is pooled; None for a one-valued feature."""
        return self.features[feature].features[feature]

    def offset(self, feature: str) -> int:
        """Return the key of the feature's id 0."""
        return self.offsets[self.features[feature].name]

    @property
    def permutation(self) -> RowPermutation:
        """Return the permutation between keys and physical rows."""
        return RowPermutation(self.num_rows, self.seed)

    @cached_property
    def weight(self) -> Tensor:
        """Return this worker's rows, [local rows, dim]."""
        rows = self.local_range(self.mesh.rank)
        weight = torch.empty(len(rows), self.dim, dtype=self.dtype, device=self.mesh.device)
        if self.init_std is None:
            return weight
        table_keys = torch.from_numpy(
            np.array([table_key(self.seed, spec.name) for spec in self.specs], np.uint64).view(np.int64)
        )
        for start in range(0, len(rows), _FILL_ROWS):
            end = min(start + _FILL_ROWS, len(rows))
            table, ids = self.local_ids(start, end)
            weight[start:end] = normal_rows(ids, table_keys[table], self.dim) * self.init_std
        return weight

    def local_ids(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return what this worker's rows `start` to `end` stand for, both int64 [n]: position in `specs`, and id."""
        first = self.local_range(self.mesh.rank).start
        offsets = torch.tensor(list(self.offsets.values()))
        keys = self.permutation.inverse(torch.arange(first + start, first + end))
        table = torch.searchsorted(offsets, keys, right=True) - 1
        return table, keys - offsets[table]

    def set_rows(self, table: str, rows: Tensor) -> None:
        """Overwrite the rows of a logical table, [num_ids, dim], on the workers that own them; all give the same."""
        self.set_ids(table, torch.arange(len(rows)), rows)

    def set_ids(self, table: str, ids: Tensor, rows: Tensor) -> None:
        """Overwrite the rows [n, dim] of some ids of a logical table, as `set_rows` does."""
        at = self.permutation.forward(ids + self.offsets[table])
        own = self.local_range(self.mesh.rank)
        mine = (at >= own.start) & (at < own.stop)
        self.weight[(at[mine] - own.start).to(self.weight.device)] = rows[mine].to(self.weight)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's state of this worker's rows, by name: [local rows] or [local rows, dim]; it starts at
        0.
        """
        size = len(self.local_range(self.mesh.rank))
        return {
            name: torch.zeros((size, self.dim) if wide else (size,), dtype=dtype, device=self.mesh.device)
            for name, (wide, dtype) in self._state_columns.items()
        }

    @property
    def _state_columns(self) -> dict[str, tuple[bool, torch.dtype]]:
        columns = STATE[self.optimizer] if self.optimizer is not None else {}
        return {name: (wide, dtype or self.dtype) for name, (wide, dtype) in columns.items()}

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Return the bytes of one row, and of its optimizer state."""
        state = sum((self.dim if wide else 1) * dtype.itemsize for wide, dtype in self._state_columns.values())
        return self.dim * self.dtype.itemsize, state


class ShardedTables:
    """All embedding tables of a model, this worker's part of them.

    `optimizer` is one of `STATE`, or None where rows are only read. Rows and state are allocated when they are first
    used, so that `memory_report()` can be printed before. `init_std` is as in `FusedTable`. ValueError when they cannot
    fit into the free memory, when a feature looks up two tables, or when a table is given twice.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        mesh: Mesh,
        seed: int,
        init_std: float | None,
        dtype: torch.dtype,
        optimizer: str | None,
    ) -> None:
        if optimizer is not None and optimizer not in STATE:
            raise ValueError(f"optimizer is {optimizer!r}: must be one of {', '.join(STATE)}")
        _check_specs(specs)
        self.mesh = mesh
        self.dtype = dtype
        self.optimizer = optimizer
        self.fused = {
            f"d{dim}": FusedTable(
                name=f"d{dim}",
                specs=tuple(spec for spec in specs if spec.dim == dim),
                mesh=mesh,
                seed=seed,
                init_std=init_std,
                dtype=dtype,
                optimizer=optimizer,
            )
            for dim in sorted({spec.dim for spec in specs})
        }
        self._check_memory()

    # memory

    def memory_report(self) -> str:
        """Return the lines for the console: rows, bytes of weights and optimizer state, by fused table and in all."""
        lines, total, local = [], 0, 0
        for table in self.fused.values():
            weight, state = table.row_bytes
            names = ", ".join(f"{spec.name} {spec.num_ids:,}" for spec in table.specs)
            held = f", {self.optimizer} state {human_bytes(table.num_rows * state)}" if self.optimizer else ""
            lines.append(
                f"embedding table {table.name}: {table.num_rows:,} rows ({names}), weights "
                f"{human_bytes(table.num_rows * weight)}{held}"
            )
            total += table.num_rows * (weight + state)
            local += table.rows_per_worker * (weight + state)
        return "\n".join([*lines, f"embeddings in all: {human_bytes(total)}, {human_bytes(local)} on each worker"])

    def _check_memory(self) -> None:
        mesh = self.mesh
        total = sum(table.num_rows * sum(table.row_bytes) for table in self.fused.values())
        local = sum(table.rows_per_worker * sum(table.row_bytes) for table in self.fused.values())
        sharing = 1 if mesh.device.type == "cuda" else mesh.local_world_size
        free = int(_free_bytes(mesh.device) * _FREE_FRACTION)
        if local * sharing <= free:
            return
        machines = -(-total // max(1, free))
        if mesh.device.type == "cuda":
            where, cure = "a CUDA device", f"use at least {machines} workers"
        else:
            where = f"this machine, shared by {sharing} workers"
            cure = f"use at least {machines * sharing} workers on {machines} such machines"
        what = f" and their {self.optimizer} state" if self.optimizer else ""
        raise ValueError(
            f"embedding tables{what} need {total:,} bytes ({human_bytes(total)}), "
            f"{human_bytes(local * sharing)} of it on {where}, which has {human_bytes(free)} to give: {cure}, "
            "a smaller model.embedding_dim, fewer ids (a higher minimum count), or sgd or rowwise_adagrad"
        )

    # state

    def state_dict(self) -> dict[str, Tensor]:
        """Return `<fused table>.weight` and `<fused table>.<optimizer state>`. They are the live rows, so that loading
        may fill them.

        They are DTensors with Shard(0) where there is a process group, and plain tensors of all rows where there is
        none. torch.distributed.checkpoint reshards them between any two numbers of workers.
        """
        out: dict[str, Tensor] = {}
        for name, table in self.fused.items():
            for key, local in (("weight", table.weight), *table.state.items()):
                out[f"{name}.{key}"] = self.as_global(local, table.num_rows)
        return out

    def as_global(self, local: Tensor, num_rows: int) -> Tensor:
        """Return this worker's part of `num_rows` rows as a DTensor with Shard(0), or as it is in a single process."""
        if self.mesh.row_mesh is None:
            return local
        shape = torch.Size((num_rows, *local.shape[1:]))
        return DTensor.from_local(
            local, self.mesh.row_mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride()
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` of the same tables and number of workers into the rows.

        ValueError names a missing tensor or one of another shape.
        """
        for key, ours in self.state_dict().items():
            if key not in state or state[key].shape != ours.shape:
                found = "missing" if key not in state else f"of shape {list(state[key].shape)}"
                raise ValueError(
                    f"embedding state {key!r} is {found}, expected {list(ours.shape)}: it is of another model"
                )
            _local(ours).copy_(_local(state[key]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_specs(specs: Sequence[TableSpec]) -> None:
    """Raise ValueError for a table that is given twice or has no rows or columns, and for a feature of two tables."""
    names: set[str] = set()
    table_of: dict[str, str] = {}
    for spec in specs:
        if spec.name in names:
            raise ValueError(
                f"embedding table {spec.name!r} is given twice: features of one vocabulary share one table"
            )
        if spec.num_ids < 1 or spec.dim < 1:
            raise ValueError(f"embedding table {spec.name!r} is {spec.num_ids} x {spec.dim}: both must be at least 1")
        names.add(spec.name)
        for feature in spec.features:
            if feature in table_of:
                tables = f"{table_of[feature]!r} and {spec.name!r}"
                raise ValueError(f"feature {feature!r} is in the embedding tables {tables}: it can look up only one")
            table_of[feature] = spec.name


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def human_bytes(count: float) -> str:
    """Return a number of bytes in words: 1536 -> '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
