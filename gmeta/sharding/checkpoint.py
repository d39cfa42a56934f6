"""Partitions of tensors for torch.distributed.checkpoint.

A partition may be any contiguous range of a flattened tensor. So what was saved under one strategy, or unsharded, loads
under every other strategy and on any number of ranks.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from io import FileIO
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.futures import Future

from gmeta.core.modules import persistent_buffers

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a box in a tensor."""

_PIECE_BYTES = 1 << 23  # what is read at a time, where it cannot be read into its place


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the elements `start` to `stop` of a flattened tensor, as at most 2 x dimensions - 1 boxes of it, in
    order.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, within = divmod(start, inner)
        if within or stop - start < inner:
            end = min(stop, (row + 1) * inner)
            for offsets, sizes in boxes(shape[1:], within, end - row * inner):
                yield (row, *offsets), (1, *sizes)
        else:
            rows = (stop - start) // inner
            end = start + rows * inner
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
        start = end


class PartitionTensor(Tensor):
    """Stands for a tensor of which this rank has the elements from `start` on, in the one-dimensional `local`.

    It has the full tensor's shape and no storage. torch.distributed.checkpoint saves from `local` and loads into it.
    """

    local: Tensor
    start: int
    saved: bool  # whether this rank saves it; all ranks load it

    @staticmethod
    def of(local: Tensor, shape: torch.Size, start: int, saved: bool = True) -> PartitionTensor:
        """Return a partition of a tensor of `shape`. That of a scalar is saved with shape [1]."""
        full = tuple(shape) or (1,)
        found: PartitionTensor = Tensor._make_wrapper_subclass(
            PartitionTensor, full, dtype=local.dtype, device=local.device
        )
        found.local, found.start, found.saved = local.detach(), start, saved
        return found

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> PartitionTensor:
        """Return itself, since `local` is contiguous."""
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func in (torch.ops.aten.new_empty.default, torch.ops.aten.zeros_like.default):  # async_save's copy on CPU
            device = (kwargs or {}).get("device")
            return PartitionTensor.of(args[0].local.to(device, copy=True), args[0].shape, args[0].start, args[0].saved)
        if func is torch.ops.aten.copy_.default and isinstance(args[1], PartitionTensor):
            args[0].local.copy_(args[1].local)
            return args[0]
        raise TypeError(f"{func}: a partition of a tensor can be saved and loaded, nothing else; use its `local`")

    def _boxes(self) -> list[Box]:
        return list(boxes(tuple(self.shape), self.start, self.start + self.local.numel()))

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        if not self.saved:
            return []
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(offsets, sizes), properties, self.shape),
            )
            for offsets, sizes in self._boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offsets, sizes) for offsets, sizes in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        at = 0
        for offsets, sizes in self._boxes():
            length = math.prod(sizes)
            if torch.Size(offsets) == index.offset:
                return self.local[at : at + length].view(sizes)
            at += length
        raise ValueError(f"{index.fqn} has no part at {index.offset} here")


def fill(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor, or the partition of one, by a full value of its shape."""
    if isinstance(tensor, PartitionTensor):
        tensor.local.copy_(value.reshape(-1)[tensor.start : tensor.start + tensor.local.numel()])
    else:
        tensor.copy_(value)


class PartitionWriter(HuggingFaceStorageWriter):
    """Writes safetensors files, in which a name can stand once: the k-th box of a name on a rank goes to its k-th
    file."""

    def __init__(self, path: str) -> None:
        super().__init__(path, save_distributed=True)

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        seen: Counter[str] = Counter()
        files: dict[int, list[WriteItem]] = {}
        for item in items:
            seen[item.index.fqn] += 1
            files.setdefault(seen[item.index.fqn], []).append(item)
        return files


class StreamReader(HuggingFaceStorageReader):
    """Reads boxes of safetensors files straight into the tensors to fill, so that loading needs no memory beside them.

    The reader of torch maps the files: all that it has read counts as memory of the process, a second time.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the boxes that `plan` names, and nothing else of the files."""
        items: defaultdict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            items[self.storage_data[item.storage_index].relative_path].append(item)
        for name, boxes_of_file in items.items():
            with open(name, "rb", buffering=0) as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
                for item in boxes_of_file:
                    stored = self.storage_data[item.storage_index]
                    start = 8 + header_bytes + header[item.storage_index.fqn]["data_offsets"][0]
                    target = planner.resolve_tensor(item).detach()
                    box = (tuple(item.storage_offsets), tuple(item.lengths))
                    _read_box(file, start, tuple(stored.shape), stored.dtype, box, target)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_box(file: FileIO, start: int, shape: tuple[int, ...], dtype: torch.dtype, box: Box, target: Tensor) -> None:
    """Fill `target` with a box of a tensor of `shape` that lies in `file` from byte `start` on, in row-major order."""
    offsets, sizes = box
    if not shape:
        shape, offsets, sizes, target = (1,), (0,), (1,), target.view(1)
    inner = len(shape) - 1  # the last dimension of which the box has a part: from there on it lies in one run
    while inner > 0 and sizes[inner] == shape[inner]:
        inner -= 1
    row_bytes = math.prod(shape[inner + 1 :]) * dtype.itemsize
    rows = max(1, _PIECE_BYTES // max(1, row_bytes))
    for outer in product(*(range(size) for size in sizes[:inner])):
        at = 0
        for index, offset, length in zip((*outer, 0), offsets, shape, strict=False):
            at = at * length + offset + index
        file.seek(start + at * row_bytes)
        run = target[outer]
        for first in range(0, len(run), rows):
            piece = run[first : first + rows]
            if piece.device.type == "cpu" and piece.dtype == dtype and piece.is_contiguous() and piece.stride(-1) == 1:
                _read_into(file, piece)
            else:
                staged = torch.empty(piece.shape, dtype=dtype)
                _read_into(file, staged)
                piece.copy_(staged)


def _read_into(file: FileIO, tensor: Tensor) -> None:
    """Fill a contiguous tensor in CPU memory with the next bytes of a file. Raises OSError where they are too few."""
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    while len(left):
        count = file.readinto(left)
        if not count:
            raise OSError(f"{file.name} ends {len(left)} bytes too early")
        left = left[count:]


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def metadata_differences(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Say for a message how a checkpoint's metadata differ from the tensors to load; empty where they fit."""
    saved = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    found = [
        f"{name} is missing" if name not in saved else f"{name} is {list(saved[name].size)}, expected {list(t.shape)}"
        for name, t in tensors.items()
        if name not in saved or tuple(saved[name].size) != tuple(t.shape)
    ]
    return "; ".join(found[:5]) + ("; …" if len(found) > 5 else "")


def buffer_tensors(module: nn.Module, saved: bool) -> dict[str, Tensor]:
    """Return the persistent buffers of `module`, to be saved by the one rank that is told `saved`.

    Ranks may have different values, such as BatchNorm's statistics; after loading all have those of that rank.
    """
    found: dict[str, Tensor] = {}
    for name, buffer in persistent_buffers(module):
        if not buffer.is_contiguous():  # loading fills it through a flat view
            buffer.data = buffer.contiguous()
        found[name] = PartitionTensor.of(buffer.detach().view(-1), buffer.shape, 0, saved)
    return found


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Have the optimizer create its state, as in its first step, with all zeros, for the parameters that have none yet,
    and return those; nothing else is changed.
    """
    every = [param for group in optimizer.param_groups for param in group["params"] if param.numel()]
    params = [param for param in every if not optimizer.state.get(param)]
    if not params:
        return params
    before = [param.detach().clone() for param in params]
    options = [dict(group) for group in optimizer.param_groups]
    gradients = [param.grad for param in every]  # those of a step that has begun must move nothing, and must stay
    for param in every:
        param.grad = None
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)
    for param, gradient in zip(every, gradients, strict=True):
        param.grad = gradient
    with torch.no_grad():
        for param, value in zip(params, before, strict=True):
            param.copy_(value)
            for state in optimizer.state[param].values():
                if isinstance(state, Tensor):
                    state.zero_()
    return params
