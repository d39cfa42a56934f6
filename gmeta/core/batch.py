"""The types that cross rooms: a batch of tasks, and the embedding rows fetched for it.

Shapes use T tasks on this rank, S support or query examples per task (padded), F numeric columns,
U fetched rows, d embedding dimension. Padding is marked by `mask`; padded ids are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pooling = Literal["sum", "mean", "none"]
_T = TypeVar("_T")


def mask_of(sequence: str) -> str:
    """Return under which name a model finds the mask of a sequence that is not pooled."""
    return f"{sequence}.mask"


def text_ids_of(name: str) -> str:
    """Return under which name a model finds which texts a feature or a sequence of texts has."""
    return f"{name}.text"


def id_of(name: str) -> str:
    """Return under which name a model finds the id of a feature that it routes examples by."""
    return f"{name}.id"


@dataclass(frozen=True, slots=True)
class Bag:
    """The values of a many-valued feature. An empty bag pools to the zero vector. Sequences keep their order, and those
    that are not pooled are padded where they are read.
    """

    values: Tensor  # int64 [N], example after example, task after task
    lengths: Tensor  # int64 [T, S], 0 on padding; sums to N


@dataclass(frozen=True, slots=True)
class Examples:
    """One side (support or query) of every task of a batch, padded over tasks."""

    ids: dict[str, Tensor]  # feature -> int64 [T, S]
    bags: dict[str, Bag]  # many-valued feature -> Bag
    dense: Tensor  # float32 [T, S, F]
    label: Tensor  # float32 [T, S], 0 on padding; [T, S, K] where there are K labels, NaN where the example lacks one
    mask: Tensor  # bool [T, S], False on padding
    row: Tensor  # int64 [T, S], position of the example in its split of the pack, -1 on padding
    item_cold: Tensor  # bool [T, S], item never seen in a training task; False where unknown
    weight: Tensor | None = None  # float32 [T, S], how much the example counts, 0 on padding; None: all count alike
    given: dict[str, Tensor] = field(default_factory=dict)
    """What a model reads as it is, by name, [T, S, ...], zeros on padding. A batch in parts has it in these alone."""


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How a global batch of G tasks is split over N ranks, and each rank's tasks into micro-batches."""

    tasks: NDArray[np.int64]  # [G] positions in the pack's split, in the batch's order
    ends: tuple[tuple[int, ...], ...]  # [N]: where each rank's micro-batches end, counted from the rank's first task
    drop_after_s: float | None  # a rank begins no further micro-batch so long after its first; None: never
    work: float  # this rank's fraction of the batch's examples, times G

    @property
    def tasks_per_rank(self) -> tuple[int, ...]:
        """Return how many tasks each rank computes. Rank 0 takes the first ones, rank 1 the next, and so on."""
        return tuple(ends[-1] for ends in self.ends)

    @property
    def in_parts(self) -> bool:
        """Say whether some rank has several micro-batches. All ranks give the same answer."""
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
    """The tasks of one global batch that this rank computes. T may be 0: the rank still takes part in the step.

    A batch that is computed in several micro-batches holds them in `parts`, each padded on its own. Its own support and
    query then hold the same examples without padding, in the shape of one task: [1, examples].
    """

    support: Examples
    query: Examples
    task_id: Tensor  # int64 [T]
    num_tasks_global: int  # tasks of the whole batch, over all ranks: the divisor of every sum
    epoch: int
    index: int  # batch number inside the epoch
    batch_split: BatchSplit | None = None  # None: about equal over the ranks, in one micro-batch each
    parts: tuple[TaskBatch, ...] = ()  # micro-batches, where there are several
    num_rows_global: int = 0  # support and query rows of the whole batch, over all ranks
    shared: Examples | None = None  # what all tasks are compared with, the same on every rank: [1, C]
    stretches: NDArray[np.int64] | None = None  # [2, G] first row in the split and rows of each task, over all ranks

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks on this rank."""
        return int(self.task_id.shape[0])

    @property
    def drop_after_s(self) -> float | None:
        """Return the batch split's deadline. None means that every task of the batch is computed."""
        return None if self.batch_split is None else self.batch_split.drop_after_s


@dataclass(frozen=True, slots=True)
class Lookup:
    """Which of the fetched rows of its fused table one feature reads."""

    table: str  # name of the fused table, a key of EmbeddedRows.weights
    index: Tensor  # int64, positions among the rows fetched from the table: [T, S], or [N] for a bag
    lengths: Tensor | None = None  # int64 [T, S] for a bag, None for a one-valued feature
    pooling: Pooling = "mean"  # none: a model gets all values of a bag, in their order

    @property
    def is_sequence(self) -> bool:
        """Say whether a model reads a vector for each value, and not one for the example."""
        return self.lengths is not None and self.pooling == "none"


@dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """The deduplicated rows that a batch needs, and how each feature of each side looks them up.

    `weights[table]` [U, d] is a leaf that requires grad. After the backward pass its `.grad` goes to the owners of the
    rows.
    """

    weights: dict[str, Tensor]
    support: dict[str, Lookup]
    query: dict[str, Lookup]
    shared: dict[str, Lookup] = field(default_factory=dict)  # of `TaskBatch.shared`


@dataclass(frozen=True, slots=True)
class RowGradients:
    """The summed gradients of the rows of one fused table that took part in a step, at the rank that owns them."""

    rows: Tensor  # int64 [R], positions in this rank's part of the table, unique, ascending
    grad: Tensor  # [R, d]


def map_tensors(value: _T, function: Callable[[Tensor], Tensor]) -> _T:
    """Return a copy of a nested dataclass, dict, list or tuple, with `function` applied to every tensor."""
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
    """Return the batch whose micro-batches are `parts`; see `TaskBatch`."""
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

    weights = [side.weight for side in sides if side.weight is not None]
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
        weight=rows(weights) if weights else None,
    )


def lookups_of_parts(found: Mapping[str, Lookup], sides: Sequence[Examples]) -> list[dict[str, Lookup]]:
    """Split the lookups of one side of a `joined` batch: for that side of each part, feature -> lookup."""
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
    """Return a nested batch on `device`, with its floating-point tensors cast to `dtype`. The copies are then complete.

    CUDA copies go through pinned memory, on a stream of their own. A loader's thread can therefore copy while the
    kernels of earlier steps run, and it waits only for its own copies. The tensors are used on the default stream.
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
        # the memory returns to this stream's pool, but only after its readers on the default stream have run
        out.record_stream(torch.cuda.default_stream(device))
        return out

    with torch.cuda.stream(stream):
        copied = map_tensors(value, copy)
    stream.synchronize()
    return copied


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
