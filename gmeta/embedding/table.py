"""Row-sharded embedding tables with their optimizer state beside the rows.

Logical tables of one width are fused into one physical group. Row `id` of a table has the key offset[table] + id;
a seeded bijection sends keys to physical rows, and worker r holds the contiguous rows [r * c, (r + 1) * c) with
c = ceil(N / workers), the placement of `DTensor` with `Shard(0)`. Keys, initial rows and optimizer steps never
depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from gmeta.core.batch import Pooling
from gmeta.embedding.permutation import Permutation, normal_rows, table_key
from gmeta.parallel.mesh import Mesh

# Optimizer state by name: whether a row has one value per column (True) or one in all, and its dtype (None: the rows').
STATE: dict[str, dict[str, tuple[bool, torch.dtype | None]]] = {
    "sgd": {},
    "rowwise_adagrad": {"sum_squares": (False, None)},
    "adam": {"exp_avg": (True, None), "exp_avg_sq": (True, None), "steps": (False, torch.int32)},
}
_FILL_ROWS = 1 << 12  # rows initialised at a time: temporaries stay in the cache
_FREE_SHARE = 0.9  # of free memory that tables may take; activations and buffers need the rest


@dataclass(frozen=True)
class TableSpec:
    """A logical table: one vocabulary, and the features that look it up."""

    name: str
    num_ids: int
    dim: int
    features: dict[str, Pooling | None]  # feature -> pooling of a many-valued one, None for a one-valued one


@dataclass(frozen=True)
class GroupLayout:
    """One physical table: the logical tables of one width behind each other, permuted, cut over workers."""

    name: str
    dim: int
    tables: tuple[TableSpec, ...]
    seed: int
    world_size: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Table name -> first key."""
        out, total = {}, 0
        for table in self.tables:
            out[table.name] = total
            total += table.num_ids
        return out

    @property
    def num_rows(self) -> int:
        """Rows on all workers."""
        return sum(table.num_ids for table in self.tables)

    @property
    def chunk(self) -> int:
        """Rows a worker, the last ones may have fewer: torch.chunk's rule, which Shard(0) follows."""
        return -(-self.num_rows // self.world_size)

    @property
    def permutation(self) -> Permutation:
        """Key <-> physical row."""
        return Permutation(self.num_rows, self.seed)

    def local_range(self, rank: int) -> range:
        """Physical rows of worker `rank`; may be empty."""
        return range(min(rank * self.chunk, self.num_rows), min((rank + 1) * self.chunk, self.num_rows))


@dataclass(frozen=True)
class Slot:
    """Where a feature's ids live."""

    group: str
    offset: int  # key of id 0
    num_ids: int
    table: str
    pooling: Pooling | None


@dataclass(frozen=True)
class TableGroup:
    """This worker's rows of one group, and the optimizer's state for them."""

    weight: Tensor  # [local rows, dim]
    state: dict[str, Tensor]  # [local rows] or [local rows, dim]


class ShardedTables:
    """All embedding tables of a model, this worker's share of them.

    optimizer: sgd, rowwise_adagrad or adam. Rows and state are allocated at the first use of `groups`, so that
    `memory_report()` can be printed before. ValueError when they cannot fit into the free memory.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        mesh: Mesh,
        seed: int,
        init_std: float,
        dtype: torch.dtype,
        optimizer: str,
    ) -> None:
        if optimizer not in STATE:
            raise ValueError(f"optimizer is {optimizer!r}: must be one of {', '.join(STATE)}")
        self.mesh = mesh
        self.seed = seed
        self.init_std = init_std
        self.dtype = dtype
        self.optimizer = optimizer
        self.layouts = _fuse(specs, seed, mesh.world_size)
        self.features = _slots(self.layouts)
        self._check_memory()

    @cached_property
    def groups(self) -> dict[str, TableGroup]:
        """Group name -> this worker's rows."""
        return {layout.name: self._allocate(layout) for layout in self.layouts.values()}

    def _allocate(self, layout: GroupLayout) -> TableGroup:
        rows = layout.local_range(self.mesh.rank)
        weight = torch.empty(len(rows), layout.dim, dtype=self.dtype, device=self.mesh.device)
        offsets = torch.tensor(list(layout.offsets.values()))
        table_keys = torch.from_numpy(
            np.array([table_key(self.seed, t.name) for t in layout.tables], np.uint64).view(np.int64)
        )
        for start in range(0, len(rows), _FILL_ROWS):
            end = min(start + _FILL_ROWS, len(rows))
            keys = layout.permutation.inverse(torch.arange(rows.start + start, rows.start + end))
            table = torch.searchsorted(offsets, keys, right=True) - 1
            weight[start:end] = normal_rows(keys - offsets[table], table_keys[table], layout.dim) * self.init_std
        state = {
            name: torch.zeros(
                (len(rows), layout.dim) if wide else (len(rows),), dtype=dtype or self.dtype, device=self.mesh.device
            )
            for name, (wide, dtype) in STATE[self.optimizer].items()
        }
        return TableGroup(weight, state)

    # memory

    def _row_bytes(self, layout: GroupLayout) -> tuple[int, int]:
        """Bytes of one row, and of its optimizer state."""
        state = sum(
            (layout.dim if wide else 1) * (dtype or self.dtype).itemsize
            for wide, dtype in STATE[self.optimizer].values()
        )
        return layout.dim * self.dtype.itemsize, state

    def memory_report(self) -> str:
        """Lines for the console: rows, bytes of weights and optimizer state, per group and in all."""
        lines, total, local = [], 0, 0
        for layout in self.layouts.values():
            weight, state = self._row_bytes(layout)
            names = ", ".join(f"{t.name} {t.num_ids:,}" for t in layout.tables)
            lines.append(
                f"embedding group {layout.name}: {layout.num_rows:,} rows ({names}), weights "
                f"{human_bytes(layout.num_rows * weight)}, {self.optimizer} state "
                f"{human_bytes(layout.num_rows * state)}"
            )
            total += layout.num_rows * (weight + state)
            local += layout.chunk * (weight + state)
        return "\n".join([*lines, f"embeddings in all: {human_bytes(total)}, {human_bytes(local)} on each worker"])

    def _check_memory(self) -> None:
        mesh = self.mesh
        total = sum(layout.num_rows * sum(self._row_bytes(layout)) for layout in self.layouts.values())
        local = sum(layout.chunk * sum(self._row_bytes(layout)) for layout in self.layouts.values())
        sharing = 1 if mesh.device.type == "cuda" else mesh.local_world_size
        free = int(_free_bytes(mesh.device) * _FREE_SHARE)
        if local * sharing <= free:
            return
        machines = -(-total // max(1, free))
        if mesh.device.type == "cuda":
            where, cure = "a CUDA device", f"use at least {machines} workers"
        else:
            where = f"this machine, shared by {sharing} workers"
            cure = f"use at least {machines * sharing} workers on {machines} such machines"
        raise ValueError(
            f"embedding tables and their {self.optimizer} state need {total:,} bytes ({human_bytes(total)}), "
            f"{human_bytes(local * sharing)} of it on {where}, which has {human_bytes(free)} to give: {cure}, "
            "a smaller model.embedding_dim, fewer ids (a higher minimum count), or sgd or rowwise_adagrad"
        )

    # state

    def state_dict(self) -> dict[str, Tensor]:
        """`<group>.weight` and `<group>.<optimizer state>`: the live rows, not copies, so that loading may fill them.

        DTensors with Shard(0) where there is a process group, plain tensors of all rows where there is none;
        torch.distributed.checkpoint reshards between any two numbers of workers.
        """
        out: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            for key, local in (("weight", group.weight), *group.state.items()):
                out[f"{name}.{key}"] = self._as_global(local, self.layouts[name].num_rows)
        return out

    def _as_global(self, local: Tensor, num_rows: int) -> Tensor:
        if self.mesh.row_mesh is None:
            return local
        shape = torch.Size((num_rows, *local.shape[1:]))
        return DTensor.from_local(
            local, self.mesh.row_mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride()
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` of the same layout and number of workers into the rows.

        ValueError names a missing tensor or one of another shape.
        """
        for key, ours in self.state_dict().items():
            if key not in state or state[key].shape != ours.shape:
                found = "missing" if key not in state else f"of shape {list(state[key].shape)}"
                raise ValueError(
                    f"embedding state {key!r} is {found}, expected {list(ours.shape)}: it is of another model"
                )
            _local(ours).copy_(_local(state[key]))

    def describe(self) -> dict[str, Any]:
        """What decides which row belongs to which id (JSON); rows fit only where this is equal."""
        return {
            name: {"seed": layout.seed, "dim": layout.dim, "tables": {t.name: t.num_ids for t in layout.tables}}
            for name, layout in self.layouts.items()
        }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fuse(specs: Sequence[TableSpec], seed: int, world_size: int) -> dict[str, GroupLayout]:
    names = [spec.name for spec in specs]
    for spec in specs:
        if names.count(spec.name) > 1:
            raise ValueError(
                f"embedding table {spec.name!r} is given twice: features of one vocabulary share one table"
            )
        if spec.num_ids < 1 or spec.dim < 1:
            raise ValueError(f"embedding table {spec.name!r} is {spec.num_ids} x {spec.dim}: both must be at least 1")
    dims = sorted({spec.dim for spec in specs})
    return {
        f"d{dim}": GroupLayout(f"d{dim}", dim, tuple(s for s in specs if s.dim == dim), seed, world_size)
        for dim in dims
    }


def _slots(layouts: Mapping[str, GroupLayout]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for layout in layouts.values():
        for table in layout.tables:
            for feature, pooling in table.features.items():
                if feature in slots:
                    tables = f"{slots[feature].table!r} and {table.name!r}"
                    raise ValueError(
                        f"feature {feature!r} is in the embedding tables {tables}: it can look up only one"
                    )
                slots[feature] = Slot(layout.name, layout.offsets[table.name], table.num_ids, table.name, pooling)
    return slots


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
