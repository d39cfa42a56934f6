"""The types that cross rooms: a batch of tasks, and the embedding rows fetched for it.

Shapes use T tasks on this rank, S support or query examples per task (padded), F numeric columns,
U fetched rows, d embedding dimension. Padding is marked by `mask`; padded ids are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pooling = Literal["sum", "mean"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bag:
    """A many-valued feature. An empty bag pools to the zero vector; sequences keep their order."""

    values: Tensor  # int64 [N], flat in row order (task, then example)
    lengths: Tensor  # int64 [T, S], 0 on padding; sums to N


@dataclass(frozen=True, slots=True)
class Examples:
    """One side (support or query) of every task of a batch, padded over tasks."""

    ids: dict[str, Tensor]  # feature -> int64 [T, S]
    bags: dict[str, Bag]  # many-valued feature -> Bag
    dense: Tensor  # float32 [T, S, F]
    label: Tensor  # float32 [T, S], 0 on padding
    mask: Tensor  # bool [T, S], False on padding
    row: Tensor  # int64 [T, S], position of the row in its pack split, -1 on padding
    item_cold: Tensor  # bool [T, S], item never seen in a training task; False where unknown


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How a global batch of G tasks is divided over N ranks, and each rank's slots into micro-batches."""

    tasks: NDArray[np.int64]  # [G] positions in the split, in the order of the slots
    cuts: tuple[int, ...]  # [N + 1]: rank r has slots cuts[r] to cuts[r + 1]
    micro_batches: tuple[int, ...]  # [N], each at least 1
    drop_after_s: float | None  # a rank begins no further micro-batch so long after its first; None: never
    work: float  # of this rank: its share of the batch's rows, in slots

    @property
    def in_parts(self) -> bool:
        """Whether some rank has several micro-batches."""
        return max(self.micro_batches) > 1

    def ends(self, rank: int) -> tuple[int, ...]:
        """Where a rank's micro-batches end, counted from its first slot; none is empty unless the rank has no slot."""
        size = self.cuts[rank + 1] - self.cuts[rank]
        parts = min(self.micro_batches[rank], max(1, size))
        return tuple(size * (i + 1) // parts for i in range(parts))

    def unfinished(self, finished: Sequence[int]) -> NDArray[np.int64]:
        """Tasks left over when rank r finished `finished[r]` micro-batches: positions in the split."""
        left = [
            self.tasks[self.cuts[rank] + (0, *self.ends(rank))[done] : self.cuts[rank + 1]]
            for rank, done in enumerate(finished)
        ]
        return np.concatenate(left)


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """The slots of one global batch that this rank computes. T may be 0: the rank still takes part."""

    support: Examples
    query: Examples
    task_id: Tensor  # int64 [T]
    num_tasks_global: int  # tasks of the whole batch, over all ranks: the divisor of every sum
    epoch: int
    index: int  # batch number inside the epoch
    batch_split: BatchSplit | None = None  # None: equal parts, each computed as one

    @property
    def num_tasks(self) -> int:
        """Tasks on this rank."""
        return int(self.task_id.shape[0])

    @property
    def drop_after_s(self) -> float | None:
        """The batch split's deadline; None: every task of the batch is computed."""
        return None if self.batch_split is None else self.batch_split.drop_after_s


@dataclass(frozen=True, slots=True)
class Lookup:
    """Where the values of one feature sit among the fetched rows of its group."""

    group: str  # key into EmbeddedRows.weights
    index: Tensor  # int64 into the group's rows: [T, S], or [N] for a bag
    lengths: Tensor | None = None  # int64 [T, S] for a bag, None for a one-valued feature
    pooling: Pooling = "mean"


@dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """The deduplicated rows that support and query need, and how each feature looks them up.

    `weights[group]` is a leaf [U, d] that requires grad; after backward its `.grad` goes home.
    """

    weights: dict[str, Tensor]
    support: dict[str, Lookup]
    query: dict[str, Lookup]


@dataclass(frozen=True, slots=True)
class RowGradients:
    """Summed gradients of the rows of one group that took part in a step, at the worker that owns them."""

    rows: Tensor  # int64 [R] positions in the worker's shard, unique, ascending
    grad: Tensor  # [R, d]


def map_tensors(value: _T, function: Callable[[Tensor], Tensor]) -> _T:
    """Copy of a (nested) dataclass, dict, list or tuple with `function` applied to every tensor."""
    out: Any
    if isinstance(value, Tensor):
        out = function(value)
    elif isinstance(value, dict):
        out = {key: map_tensors(item, function) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        out = type(value)(map_tensors(item, function) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        out = replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    else:
        out = value
    return out  # type: ignore[no-any-return]


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


def to_device(value: _T, device: torch.device, dtype: torch.dtype | None = None) -> _T:
    """A (nested) batch on `device`, its floating-point tensors cast to `dtype`; ready when this returns.

    CUDA copies go through pinned memory on a stream of their own, so that a loader's thread makes them beside the
    kernels of earlier steps, and waits for its copies only. Tensors are used on the device's default stream.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype=dtype) if dtype is not None and tensor.is_floating_point() else tensor

    if device.type != "cuda":
        return map_tensors(value, lambda t: cast(t).to(device))
    stream = _copy_stream(device)

    def copy(tensor: Tensor) -> Tensor:
        tensor = cast(tensor)
        if tensor.device.type == "cuda":
            return tensor
        out = tensor.contiguous().pin_memory().to(device, non_blocking=True)
        # its memory goes back to this stream's pool: not before what reads it elsewhere has run
        out.record_stream(torch.cuda.default_stream(device))
        return out

    with torch.cuda.stream(stream):
        copied = map_tensors(value, copy)
    stream.synchronize()
    return copied


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
