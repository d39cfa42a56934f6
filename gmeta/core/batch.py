"""The types that cross rooms: a batch of tasks, and the embedding rows fetched for it.

Shapes use T tasks on this rank, S support or query examples per task (padded), F numeric columns,
U fetched rows, d embedding dimension. Padding is marked by `mask`; padded ids are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """How a global batch of G tasks is split over N ranks, and each rank's tasks into micro-batches."""

    tasks: NDArray[np.int64]  # [G] positions in the pack's split, in the batch's order
    ends: tuple[tuple[int, ...], ...]  # [N]: where each rank's micro-batches end, counted from the rank's first task
    drop_after_s: float | None  # a rank begins no further micro-batch so long after its first; None: never
    work: float  # of this rank: its fraction of the batch's rows, times G

    @property
    def tasks_per_rank(self) -> tuple[int, ...]:
        """Number of tasks of each rank; ranks take them one after the other."""
        return tuple(ends[-1] for ends in self.ends)

    @property
    def in_parts(self) -> bool:
        """Whether some rank has several micro-batches; all ranks agree on it."""
        return any(len(ends) > 1 for ends in self.ends)

    def unfinished(self, finished: Sequence[int]) -> NDArray[np.int64]:
        """Return the tasks (positions in the split) left over when rank r finished `finished[r]` micro-batches."""
        left, first = [], 0
        for ends, done in zip(self.ends, finished, strict=True):
            left.append(self.tasks[first + (0, *ends)[done] : first + ends[-1]])
            first += ends[-1]
        return np.concatenate(left)


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """The tasks of one global batch that this rank computes. T may be 0: the rank still takes part.

    A batch that is computed in several micro-batches has them as `parts`, each padded on its own. Its own support and
    query then hold the same rows without padding, as if they were of one task: [1, all rows].
    """

    support: Examples
    query: Examples
    task_id: Tensor  # int64 [T]
    num_tasks_global: int  # tasks of the whole batch, over all ranks: the divisor of every sum
    epoch: int
    index: int  # batch number inside the epoch
    batch_split: BatchSplit | None = None  # None: about equal over the ranks, each part computed at once
    parts: tuple[TaskBatch, ...] = ()  # micro-batches, where there are several

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


def joined(parts: Sequence[TaskBatch]) -> TaskBatch:
    """Make the batch whose micro-batches are `parts`: see `TaskBatch`."""
    return replace(
        parts[0],
        support=_without_padding([part.support for part in parts]),
        query=_without_padding([part.query for part in parts]),
        task_id=torch.cat([part.task_id for part in parts]),
        parts=tuple(parts),
    )


def _without_padding(sides: Sequence[Examples]) -> Examples:
    def rows(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t[side.mask] for t, side in zip(tensors, sides, strict=True)])[None]

    return Examples(
        ids={name: rows([side.ids[name] for side in sides]) for name in sides[0].ids},
        bags={
            name: Bag(
                torch.cat([side.bags[name].values for side in sides]), rows([side.bags[name].lengths for side in sides])
            )
            for name in sides[0].bags
        },
        dense=rows([side.dense for side in sides]),
        label=rows([side.label for side in sides]),
        mask=rows([side.mask for side in sides]),
        row=rows([side.row for side in sides]),
        item_cold=rows([side.item_cold for side in sides]),
    )


def lookups_of_parts(found: Mapping[str, Lookup], sides: Sequence[Examples]) -> list[dict[str, Lookup]]:
    """Cut the lookups of one side of a batch that was `joined`: feature -> lookup, for that side of each part."""
    parts: list[dict[str, Lookup]] = [{} for _ in sides]
    for name, lookup in found.items():
        if lookup.lengths is not None:
            lengths = [side.bags[name].lengths for side in sides]
            pieces = torch.split(lookup.index, [int(length.sum()) for length in lengths])
            for part, piece, length in zip(parts, pieces, lengths, strict=True):
                part[name] = replace(lookup, index=piece, lengths=length)
            continue
        pieces = torch.split(lookup.index[0], [int(side.mask.sum()) for side in sides])
        for part, piece, side in zip(parts, pieces, sides, strict=True):
            index = piece.new_zeros(side.mask.shape)
            index[side.mask] = piece
            part[name] = replace(lookup, index=index)
    return parts


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
