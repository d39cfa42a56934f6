"""One split of a task pack: mapped shards, and the padded examples gathered from them.

Everything a batch needs is index arithmetic over the shards' arrays: no Python per task or row, nothing read but the
rows asked for. Anonymous memory does not grow with the pack: shards stay mapped files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmeta.batch import Bag, Examples
from gmeta.data.order import keyed_hash
from gmeta.data.schema import PackSchema

CURE = "run `gmeta prepare` again, or restore the file"

Array = NDArray[Any]
SAFETENSORS_DTYPE = {"int64": "I64", "float32": "F32", "int32": "I32", "uint8": "U8"}
"""In the order in which a safetensors file stores them: the widest first, so that each starts aligned."""
CHUNK_BYTES = 1 << 20


def shard_layout(schema: PackSchema, rows: int, tasks: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Name -> (numpy dtype, shape) of every tensor of a shard; None is a length that the shard decides."""
    layout: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "ids": ("int32", (rows, len(one_valued(schema)))),
        "dense": ("float32", (rows, len(schema.numeric))),
        "label": ("float32", (rows,)),
        "item_cold": ("uint8", (rows,)),
        "task_id": ("int64", (tasks,)),
        "row_start": ("int64", (tasks,)),
        "num_support": ("int32", (tasks,)),
    }
    if schema.time is not None:
        layout["time"] = ("int64", (rows,))
    for name in many_valued(schema):
        layout[f"{name}.values"] = ("int32", (None,))
        layout[f"{name}.offsets"] = ("int64", (rows + 1,))
    return layout


def one_valued(schema: PackSchema) -> tuple[str, ...]:
    """Features that are columns of `ids`, in column order."""
    return tuple(f.name for f in schema.features if f.kind == "categorical")


def many_valued(schema: PackSchema) -> tuple[str, ...]:
    """Features stored as `<name>.values` and `<name>.offsets`."""
    return tuple(f.name for f in schema.features if f.kind != "categorical")


def checksum_file(path: Path) -> str:
    """xxh3-64 of a file's bytes, 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_size(root: Path, entry: Mapping[str, Any]) -> Path:
    """Path of a manifest entry's file; ValueError where it is missing or of another size."""
    path = root / str(entry["file"])
    if not path.is_file():
        raise ValueError(f"{path} is missing: {CURE}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: {CURE}")
    return path


def verified_file(root: Path, entry: Mapping[str, Any]) -> Path:
    """Path of a manifest entry's file; ValueError where its bytes are not those that were written."""
    path = check_size(root, entry)
    if (found := checksum_file(path)) != entry["xxh3"]:
        raise ValueError(f"{path} is damaged (checksum {found}, the manifest says {entry['xxh3']}): {CURE}")
    return path


def open_shard(root: Path, entry: Mapping[str, Any], schema: PackSchema) -> Shard:
    """Map a shard; its header must be the one that the manifest and the schema imply."""
    path = check_size(root, entry)
    layout = shard_layout(schema, entry["rows"], entry["tasks"])
    tensors = {}
    try:
        # torch keeps the mapping alive without a descriptor, so the number of shards has no limit.
        with safe_open(path, framework="pt") as file:
            if odd := sorted(layout.keys() ^ set(file.keys())):
                raise ValueError(f"{path} does not fit the manifest (tensor {odd[0]!r}): {CURE}")
            for name, (dtype, shape) in layout.items():
                stored = file.get_slice(name)
                found = stored.get_shape()
                fits = len(found) == len(shape) and all(n in (None, m) for n, m in zip(shape, found, strict=True))
                if stored.get_dtype() != SAFETENSORS_DTYPE[dtype] or not fits:
                    raise ValueError(
                        f"{path} does not fit the manifest (tensor {name!r} is {stored.get_dtype()} {found}): {CURE}"
                    )
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {CURE}") from None
    return Shard(path, entry, tensors)


class Shard:
    """One mapped shard. Its checksum is verified when its tensors are first read."""

    def __init__(self, path: Path, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path = path
        self.num_rows = int(entry["rows"])
        self.num_tasks = int(entry["tasks"])
        self.tensors = tensors
        self._entry = entry
        self._verified = False

    def verify(self) -> None:
        """Verify the checksum, once; ValueError names the file."""
        if not self._verified:
            verified_file(self.path.parent, self._entry)
            self._verified = True

    def read(self, name: str) -> Tensor:
        """A mapped tensor, after verification."""
        self.verify()
        return self.tensors[name]

    def numpy(self, name: str) -> Array:
        """The same as a numpy view."""
        return self.read(name).numpy()


_Part = tuple[Array, int, Array]  # slots of the asked tasks, shard index, tasks within the shard
_Piece = tuple[Tensor, Shard, Tensor]  # cells of the flat [T * S], shard, rows within the shard


@dataclass(frozen=True, slots=True)
class SplitColumns:
    """Columns of a whole split, one entry a row in stored order."""

    task: Array  # int64 [rows], position of the row's task in the split
    is_query: Array  # bool [rows]
    label: Array  # float32 [rows]
    item_cold: Array  # bool [rows]
    ids: dict[str, Array]  # one-valued feature -> int32 [rows]


class PackSplit:
    """The tasks of one split, numbered 0 .. num_tasks - 1 in stored order; rows are numbered the same way."""

    def __init__(self, name: str, shards: Sequence[Shard], schema: PackSchema) -> None:
        self.name = name
        self._shards = list(shards)
        self._one_valued = one_valued(schema)
        self._many_valued = many_valued(schema)
        self._num_numeric = len(schema.numeric)
        self._task_bounds = np.cumsum([0, *(shard.num_tasks for shard in shards)])
        self._row_bounds = np.cumsum([0, *(shard.num_rows for shard in shards)])
        self.num_tasks = int(self._task_bounds[-1])
        self.num_rows = int(self._row_bounds[-1])

    @cached_property
    def task_id(self) -> Array:
        """int64 [num_tasks], the pack-wide id of each task."""
        return self._column("task_id")

    @cached_property
    def num_support(self) -> Array:
        """int64 [num_tasks], support rows of each task."""
        return self._column("num_support").astype(np.int64)

    @cached_property
    def num_task_rows(self) -> Array:
        """int64 [num_tasks], support and query rows of each task."""
        sizes = [np.diff(shard.numpy("row_start"), append=shard.num_rows) for shard in self._shards]
        return np.concatenate(sizes)

    def sizes(self, tasks: Array) -> tuple[Array, Array]:
        """(support rows, query rows), each int64 [T], of the tasks at these positions; touches their shards only."""
        _, support, rows = self._task_rows(tasks, self._locate(tasks))
        return support, rows - support

    def columns(self, features: Sequence[str] = ()) -> SplitColumns:
        """Whole columns, with the ids of the one-valued `features`; views where the split has one shard."""
        for name in features:
            if name not in self._one_valued:
                known = ", ".join(self._one_valued)
                raise ValueError(f"feature {name!r} is no one-valued feature of the pack; those are: {known}")
        sizes = self.num_task_rows
        task = np.repeat(np.arange(self.num_tasks), sizes)
        query_start = np.cumsum(sizes) - sizes + self.num_support
        ids = {
            name: _joined([shard.numpy("ids")[:, self._one_valued.index(name)] for shard in self._shards])
            for name in features
        }
        return SplitColumns(
            task=task,
            is_query=np.arange(self.num_rows) >= query_start[task],
            label=self._column("label"),
            item_cold=self._column("item_cold").astype(bool),
            ids=ids,
        )

    def verify(self) -> None:
        """Verify every shard's checksum; ValueError names the damaged one."""
        for shard in self._shards:
            shard.verify()

    def examples(self, tasks: Array, redraw: tuple[int, int] | None = None) -> tuple[Examples, Examples, Tensor]:
        """Support, query and task ids [T] of the tasks at these positions, each side padded to its longest task.

        `redraw=(seed, epoch)` draws each task's support anew, at random and with the stored size, as a function of
        (seed, epoch, row) alone; rows keep their stored order within either side.
        """
        parts = self._locate(tasks)
        start, support, rows = self._task_rows(tasks, parts)
        if redraw is None:
            support_row, query_row = _row_matrix(start, support), _row_matrix(start + support, rows - support)
        else:
            support_row, query_row = _redraw(start, support, rows, *redraw)
        task_id = np.empty(len(tasks), np.int64)
        for slots, shard, local in parts:
            task_id[slots] = self._shards[shard].numpy("task_id")[local]
        support_side, query_side = self._sides(parts, support_row, query_row)
        return support_side, query_side, torch.from_numpy(task_id)

    def _column(self, name: str) -> Array:
        return _joined([shard.numpy(name) for shard in self._shards])

    def _locate(self, tasks: Array) -> list[_Part]:
        """The shards that hold the tasks, each with the slots of `tasks` it fills."""
        if len(tasks) and (tasks.min() < 0 or tasks.max() >= self.num_tasks):
            raise IndexError(f"tasks {tasks.min()} to {tasks.max()} asked of split {self.name!r} of {self.num_tasks}")
        shard_of = np.searchsorted(self._task_bounds, tasks, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        shards, first = np.unique(shard_of[order], return_index=True)
        groups = np.split(order, first[1:]) if len(shards) else []
        return [
            (slots, int(shard), tasks[slots] - self._task_bounds[shard])
            for shard, slots in zip(shards, groups, strict=True)
        ]

    def _task_rows(self, tasks: Array, parts: list[_Part]) -> tuple[Array, Array, Array]:
        """(first row in the split, support rows, rows), each int64 [T]."""
        start, support, rows = (np.empty(len(tasks), np.int64) for _ in range(3))
        for slots, shard, local in parts:
            row_start = self._shards[shard].numpy("row_start")
            is_last = local == len(row_start) - 1
            end = np.where(is_last, self._shards[shard].num_rows, row_start[np.where(is_last, 0, local + 1)])
            start[slots] = row_start[local] + self._row_bounds[shard]
            rows[slots] = end - row_start[local]
            support[slots] = self._shards[shard].numpy("num_support")[local]
        return start, support, rows

    def _sides(self, parts: list[_Part], support_row: Array, query_row: Array) -> tuple[Examples, Examples]:
        """Examples of the rows in `support_row` [T, S] and `query_row` [T, Q], -1 on padding.

        Both are gathered at once: their cells, T * S of support and T * Q of query, form one flat line.
        """
        T, S = support_row.shape
        Q = query_row.shape[1]
        row = np.concatenate([support_row.reshape(-1), query_row.reshape(-1)])
        pieces: list[_Piece] = []
        for slots, shard, _ in parts:
            cells = np.concatenate([_cells_of(slots, S), T * S + _cells_of(slots, Q)])
            # Padding reads the shard's first row, which is blanked when all are gathered.
            local = np.maximum(row[cells] - self._row_bounds[shard], 0)
            pieces.append((torch.from_numpy(cells), self._shards[shard], torch.from_numpy(local)))
        pad = torch.from_numpy(np.flatnonzero(row < 0))
        ids, dense, label, item_cold = (
            _gather(pieces, self._shards[0].tensors[name], name, len(row)).index_fill_(0, pad, 0)
            for name in ("ids", "dense", "label", "item_cold")
        )
        bags = {name: _gather_bags(pieces, name, pad, len(row)) for name in self._many_valued}

        def side(rows: Array, cells: slice) -> Examples:
            shape = rows.shape
            by_feature = ids[cells].t().to(torch.int64, memory_format=torch.contiguous_format)
            return Examples(
                ids=dict(zip(self._one_valued, by_feature.view(len(self._one_valued), *shape), strict=True)),
                bags={name: _cut_bag(*bag, cells, shape) for name, bag in bags.items()},
                dense=dense[cells].view(*shape, self._num_numeric),
                label=label[cells].view(shape),
                mask=torch.from_numpy(rows >= 0),
                row=torch.from_numpy(rows),
                item_cold=item_cold[cells].view(shape).bool(),
            )

        return side(support_row, slice(0, T * S)), side(query_row, slice(T * S, len(row)))


def _cells_of(slots: Array, width: int) -> Array:
    """Flat cells of whole tasks in a [T, width] matrix."""
    cells: Array = (slots[:, None] * width + np.arange(width)).reshape(-1)
    return cells


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _row_matrix(start: Array, count: Array) -> Array:
    """int64 [T, max(count)]: task t's row holds start[t], start[t] + 1, … and -1 beyond count[t]."""
    column = np.arange(count.max(initial=0))
    return np.where(column < count[:, None], start[:, None] + column, -1)


def _redraw(start: Array, support: Array, rows: Array, seed: int, epoch: int) -> tuple[Array, Array]:
    """Support and query row matrices after a new draw of each task's support."""
    first = np.cumsum(rows) - rows
    task = np.repeat(np.arange(len(rows)), rows)
    flat = np.arange(int(rows.sum())) - first[task] + start[task]
    by_key = np.lexsort((keyed_hash(flat, seed, epoch), task))
    rank = np.empty_like(flat)
    rank[by_key] = np.arange(len(flat)) - first[task]
    is_support = rank < support[task]
    return _scatter_rows(flat[is_support], support), _scatter_rows(flat[~is_support], rows - support)


def _scatter_rows(flat: Array, count: Array) -> Array:
    """int64 [T, max(count)]: the first count[0] of `flat` in task 0's row, and so on; -1 beyond."""
    out = np.full((len(count), count.max(initial=0)), -1, np.int64)
    out[np.arange(out.shape[1]) < count[:, None]] = flat
    return out


def _gather(pieces: list[_Piece], like: Tensor, name: str, num_cells: int) -> Tensor:
    """[num_cells, …]: rows of tensor `name` put where the pieces say."""
    if len(pieces) == 1:  # its cells are all, in order
        return pieces[0][1].read(name).index_select(0, pieces[0][2])
    out = like.new_empty((num_cells, *like.shape[1:]))
    for cells, shard, local in pieces:
        out.index_copy_(0, cells, shard.read(name).index_select(0, local))
    return out


def _gather_bags(pieces: list[_Piece], name: str, pad: Tensor, num_cells: int) -> tuple[Array, Array]:
    """A many-valued feature: (values flat in cell order, lengths [num_cells], 0 on padding).

    In numpy, because torch.repeat_interleave wakes all threads however small its input (5 ms on a busy machine).
    """
    lengths, source = np.zeros((2, num_cells), np.int64)
    for cells, shard, local in pieces:
        offsets, row = shard.numpy(f"{name}.offsets"), local.numpy()
        source[cells.numpy()] = offsets[row]
        lengths[cells.numpy()] = offsets[row + 1] - offsets[row]
    lengths[pad.numpy()] = 0
    first = np.cumsum(lengths) - lengths
    values = np.empty(int(lengths.sum()), np.int64)
    for cells, shard, _ in pieces:
        at = cells.numpy()
        length = lengths[at]
        step = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        stored = shard.numpy(f"{name}.values")[step + np.repeat(source[at], length)]
        values[step + np.repeat(first[at], length)] = stored
    return values, lengths


def _cut_bag(values: Array, lengths: Array, cells: slice, shape: tuple[int, ...]) -> Bag:
    """The bag of a run of cells."""
    first = int(lengths[: cells.start].sum())
    own = lengths[cells]
    return Bag(torch.from_numpy(values[first : first + int(own.sum())]), torch.from_numpy(own).view(shape))


def split_in_memory(arrays: Mapping[str, Array], schema: PackSchema) -> PackSplit:
    """A split of one shard that lies in memory, as if it had been written and opened; `time` is not needed."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    shard = Shard(Path("memory"), {"rows": len(arrays["label"]), "tasks": len(arrays["task_id"])}, tensors)
    shard._verified = True
    return PackSplit("memory", [shard], schema)
