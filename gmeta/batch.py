"""The types that cross rooms: a batch of tasks, and the embedding rows fetched for it.

Shapes use T tasks on this rank, S support or query examples per task (padded), F numeric columns,
U fetched rows, d embedding dimension. Padding is marked by `mask`; padded ids are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar

import torch
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
class TaskBatch:
    """The slots of one global batch that this rank computes. T may be 0: the rank still takes part."""

    support: Examples
    query: Examples
    task_id: Tensor  # int64 [T]
    num_tasks_global: int  # tasks of the whole batch, over all ranks: the divisor of every sum
    epoch: int
    index: int  # batch number inside the epoch

    @property
    def num_tasks(self) -> int:
        """Tasks on this rank."""
        return int(self.task_id.shape[0])


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
