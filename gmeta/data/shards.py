"""One split of a task pack: mapped shards, and the padded examples gathered from them.

Everything a batch needs is index arithmetic over the shards' arrays: no Python per task or row, nothing read but the
rows asked for. Anonymous memory does not grow with the pack: shards stay mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmeta.core.batch import Examples, text_ids_of
from gmeta.data.cells import CellBags, joined_arrays, padded, padded_ids, ranges
from gmeta.data.item_vectors import ItemVectors, array_name
from gmeta.data.layout import (
    CURE,
    SAFETENSORS_DTYPE,
    Array,
    check_size,
    many_valued,
    one_valued,
    ragged,
    shard_layout,
    verified_file,
)
from gmeta.data.row_matrix import redrawn_rows, row_matrix
from gmeta.data.schema import OOV, PackSchema


def open_shard(
    root: Path, entry: Mapping[str, Any], schema: PackSchema, vectors: Mapping[str, ItemVectors] | None = None
) -> Shard:
    """Map a shard; its header must be the one that the manifest and the schema imply. `vectors` are by its ids."""
    path = check_size(root, entry)
    layout = shard_layout(schema, entry["rows"], entry["tasks"])
    arrays = {}
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
                arrays[name] = file.get_tensor(name).numpy()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {CURE}") from None
    return Shard(path, entry, arrays, vectors)


class Shard:
    """One mapped shard. Its checksum is verified when it is first read."""

    def __init__(
        self,
        path: Path,
        entry: Mapping[str, Any],
        arrays: dict[str, Array],
        vectors: Mapping[str, ItemVectors] | None = None,
    ) -> None:
        self.path = path
        self.vectors = dict(vectors or {})
        self.num_rows = int(entry["rows"])
        self.num_tasks = int(entry["tasks"])
        self.arrays = arrays
        self.raised: dict[str | int, tuple[int, int]] = {}
        self._entry = entry
        self._verified = False

    def verify(self) -> None:
        """Verify the checksum, once. Raises ValueError with the file's name."""
        if not self._verified:
            verified_file(self.path.parent, self._entry)
            self._verified = True

    def read(self, name: str) -> Array:
        """Return a mapped array, after verification."""
        self.verify()
        return self.arrays[name]

    def beside(self, raised: dict[str | int, tuple[int, int]]) -> Shard:
        """Return the shard as it is read beside another pack: feature, or column of ids -> (first, by): ids from
        `first` on, texts that no vocabulary has, grow by so many.
        """
        shard = copy(self)
        shard.raised = raised
        return shard

    def numbered(self, feature: str | int, ids: Array) -> Array:
        """Return ids that were read as `beside` says."""
        first, by = self.raised.get(feature, (0, 0))
        return np.where(ids >= first, ids + by, ids).astype(ids.dtype) if by else ids


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Where tasks lie in their split, one entry a task, all int64 [T]."""

    task_id: Array
    shard: Array
    start: Array  # first row, numbered through the split
    num_support: Array
    num_rows: Array  # support and query

    def __len__(self) -> int:
        return len(self.task_id)

    def __getitem__(self, tasks: slice | Array) -> TaskRows:
        return TaskRows(
            self.task_id[tasks], self.shard[tasks], self.start[tasks], self.num_support[tasks], self.num_rows[tasks]
        )

    @property
    def num_query(self) -> Array:
        """Return the number of query rows of each task, int64 [T]."""
        return self.num_rows - self.num_support

    def last_support(self, max_rows: int) -> TaskRows:
        """Keep the last `max_rows` support rows of every task, in stored order; 0 keeps all."""
        if max_rows == 0:
            return self
        left_out = np.maximum(self.num_support - max_rows, 0)
        return replace(
            self,
            start=self.start + left_out,
            num_support=self.num_support - left_out,
            num_rows=self.num_rows - left_out,
        )


@dataclass(frozen=True, slots=True)
class SplitColumns:
    """Columns of a whole split, one entry a row in stored order."""

    task: Array  # int64 [rows], position of the row's task in the split
    is_query: Array  # bool [rows]
    label: Array  # float32 [rows], of the label that was asked for; NaN where the row lacks it
    weight: Array | None  # float32 [rows]; None where rows have none
    item_cold: Array  # bool [rows]
    ids: dict[str, Array]  # one-valued feature -> int32 [rows]


class PackSplit:
    """The tasks of one split, numbered 0 .. num_tasks - 1 in stored order; rows are numbered the same way."""

    def __init__(self, name: str, shards: Sequence[Shard], schema: PackSchema) -> None:
        self.name = name
        self._shards = list(shards)
        self._schema = schema
        self._one_valued = one_valued(schema)
        self._many_valued = many_valued(schema)
        self._texts = {f.name: f.num_ids for f in schema.features if f.num_texts is not None}
        self._sequences = tuple(f.name for f in schema.features if f.pooling == "none")
        self._task_bounds = np.cumsum([0, *(shard.num_tasks for shard in shards)])
        self._row_bounds = np.cumsum([0, *(shard.num_rows for shard in shards)])
        self.num_tasks = int(self._task_bounds[-1])
        self.num_rows = int(self._row_bounds[-1])

    @property
    def schema(self) -> PackSchema:
        """Return the schema of the pack."""
        return self._schema

    @cached_property
    def task_id(self) -> Array:
        """Return the pack-wide id of each task, int64 [num_tasks]."""
        return self._column("task_id")

    @cached_property
    def num_support(self) -> Array:
        """Return the number of support rows of each task, int64 [num_tasks]."""
        return self._column("num_support").astype(np.int64)

    @cached_property
    def num_task_rows(self) -> Array:
        """Return the number of support and query rows of each task, int64 [num_tasks]."""
        sizes = [np.diff(shard.read("row_start"), append=shard.num_rows) for shard in self._shards]
        return np.concatenate(sizes)

    def unverified_sizes(self) -> tuple[Array, Array]:
        """Return (support rows, query rows) of all tasks, each int64 [num_tasks], from files that are not verified yet.

        This reads some bytes a task; `num_task_rows` would read every shard whole, to verify it.
        """
        support = [shard.arrays["num_support"].astype(np.int64) for shard in self._shards]
        rows = [np.diff(shard.arrays["row_start"], append=shard.num_rows) for shard in self._shards]
        return np.concatenate(support), np.concatenate(rows) - np.concatenate(support)

    def sizes(self, tasks: Array) -> tuple[Array, Array]:
        """Return (support rows, query rows) of tasks at these positions, each int64 [T]; reads their shards only."""
        at = self.locate(tasks)
        return at.num_support, at.num_query

    def columns(self, features: Sequence[str] = (), label: int = 0) -> SplitColumns:
        """Return whole columns, with the ids of the one-valued `features`: views, where the split has one shard.

        `label` is the number of the label, where there are several.
        """
        for name in features:
            if name not in self._one_valued:
                known = ", ".join(self._one_valued)
                raise ValueError(f"feature {name!r} is no one-valued feature of the pack; those are: {known}")
        sizes = self.num_task_rows
        task = np.repeat(np.arange(self.num_tasks), sizes)
        query_start = np.cumsum(sizes) - sizes + self.num_support
        return SplitColumns(
            task=task,
            is_query=np.arange(self.num_rows) >= query_start[task],
            label=self._column("label")[:, label] if self._schema.labels else self._column("label"),
            weight=None if self._schema.weight is None else self._column("weight"),
            item_cold=self._column("item_cold").astype(bool),
            ids={name: self.feature_ids(name) for name in features},
        )

    def times(self) -> Array | None:
        """Return the time of all rows, int64 [rows]; None where the schema names none."""
        return None if self._schema.time is None else self._column("time")

    def feature_ids(self, name: str) -> Array:
        """Return all ids of one feature: int32 [rows], or [values] of a many-valued one."""
        if name in self._many_valued:
            return self._known(name, self._column(f"{name}.values"))
        column = self._one_valued.index(name)
        return self._known(name, joined_arrays([shard.read("ids")[:, column] for shard in self._shards]))

    def _known(self, name: str, ids: Array) -> Array:
        """Return a feature's ids as an embedding table has them: a text that has no row there is unknown."""
        return np.where(ids < self._texts[name], ids, OOV).astype(ids.dtype) if name in self._texts else ids

    def numeric_column(self, number: int) -> Array:
        """Return one standardised numeric column, float32 [rows], in the order of the schema's columns."""
        return joined_arrays([shard.read("dense")[:, number] for shard in self._shards])

    def lengths(self, name: str) -> Array | None:
        """Return how many ids each row has of a many-valued feature, int64 [rows]; None of a one-valued one."""
        if name not in self._many_valued:
            return None
        return np.concatenate([np.diff(shard.read(f"{name}.offsets")) for shard in self._shards])

    def num_values(self, name: str) -> int:
        """Return how many ids a feature has in all; of a many-valued one it reads a number of each file, unverified."""
        if name in self._many_valued:
            return sum(int(shard.arrays[f"{name}.offsets"][-1]) for shard in self._shards)
        return self.num_rows

    def shard_arrays(self) -> Iterator[dict[str, Array]]:
        """Give the mapped arrays of one shard after the other, after verification."""
        for shard in self._shards:
            shard.verify()
            yield shard.arrays

    def first_shard(self) -> PackSplit:
        """Return the tasks of the first shard as a split of their own: a sample, where tasks lie in random order."""
        return PackSplit(self.name, self._shards[:1], self._schema)

    def followed_by(self, other: PackSplit) -> PackSplit:
        """Return these tasks, and behind them in the numbering those of another pack of the same columns; its texts
        without an embedding row are numbered behind all of this one's.
        """
        raised: dict[str | int, tuple[int, int]] = {}
        for name, first in other._texts.items():
            key = self._one_valued.index(name) if name in self._one_valued else name
            raised[key] = (first, (self._schema.feature(name).num_texts or 0) - first)
        return PackSplit(self.name, [*self._shards, *(s.beside(raised) for s in other._shards)], self._schema)

    def sample(self, num_tasks: int, most_rows: int) -> dict[str, Array]:
        """Return the first tasks of the first shard that have at most so many rows each, as the arrays of a shard."""
        if not self._shards:
            return {}
        shard = self._shards[0]
        start = shard.read("row_start")
        size = np.diff(start, append=shard.num_rows)
        tasks = np.flatnonzero(size <= most_rows)[:num_tasks]
        rows = ranges(start[tasks], size[tasks])
        vectors = {array_name(v.name): self._vectors_of(shard, v.name, rows) for v in self._schema.vector}
        stored = ("ids", "dense", "label", "weight", "item_cold")
        arrays = vectors | {name: shard.read(name)[rows] for name in stored if name in shard.arrays}
        arrays |= {name: shard.read(name)[tasks] for name in ("task_id", "num_support")}
        arrays["row_start"] = np.cumsum(size[tasks]) - size[tasks]
        for name in ragged(self._schema):
            offsets = shard.read(f"{name}.offsets")
            length = offsets[rows + 1] - offsets[rows]
            arrays[f"{name}.values"] = shard.read(f"{name}.values")[ranges(offsets[rows], length)]
            arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        return arrays

    def vectors(self, name: str, most: int) -> Array:
        """Return a vector of rows, [n, dim]: at most so many of a split of one shard, spread evenly."""
        step = max(1, -(-self.num_rows // most))
        parts = [self._vectors_of(shard, name, np.arange(0, shard.num_rows, step)) for shard in self._shards]
        return joined_arrays(parts)

    def verify(self) -> None:
        """Verify every shard's checksum. Raises ValueError with the name of a damaged one."""
        for shard in self._shards:
            shard.verify()

    def locate(self, tasks: Array) -> TaskRows:
        """Look up where the tasks at these positions lie; touches their shards only. Do it once for many batches."""
        if len(tasks) and (tasks.min() < 0 or tasks.max() >= self.num_tasks):
            raise IndexError(f"tasks {tasks.min()} to {tasks.max()} asked of split {self.name!r} of {self.num_tasks}")
        shard_of = np.searchsorted(self._task_bounds, tasks, side="right") - 1
        task_id, start, support, rows = np.empty((4, len(tasks)), np.int64)
        for index in np.unique(shard_of):
            here = np.flatnonzero(shard_of == index)
            shard, local = self._shards[index], tasks[here] - self._task_bounds[index]
            row_start = shard.read("row_start")
            is_last = local == len(row_start) - 1
            end = np.where(is_last, shard.num_rows, row_start[np.where(is_last, 0, local + 1)])
            task_id[here] = shard.read("task_id")[local]
            start[here] = row_start[local] + self._row_bounds[index]
            support[here] = shard.read("num_support")[local]
            rows[here] = end - row_start[local]
        return TaskRows(task_id, shard_of, start, support, rows)

    def cells_per_row(self, at: TaskRows) -> Array:
        """Return what a padded row of each task counts, int64 [T]: 1, and one more for each value of its longest row in
        sequences that are not pooled, since a model holds a vector of each.
        """
        cells = np.ones(len(at), np.int64)
        for name in self._sequences:
            for index in np.unique(at.shard):
                here = np.flatnonzero((at.shard == index) & (at.num_rows > 0))
                if not len(here):
                    continue
                offsets = self._shards[index].read(f"{name}.offsets")
                rows = ranges(at.start[here] - self._row_bounds[index], at.num_rows[here])
                first = np.cumsum(at.num_rows[here]) - at.num_rows[here]
                cells[here] += np.maximum.reduceat(offsets[rows + 1] - offsets[rows], first)
        return cells

    def rows_apart(self, rows: Array) -> TaskRows:
        """Return rows of the split, int64 [n], as tasks that have one of them as their query each."""
        shard = np.searchsorted(self._row_bounds, rows, side="right") - 1
        nothing = np.zeros_like(rows)
        return TaskRows(nothing, shard, rows, nothing, nothing + 1)

    def examples(self, tasks: Array, redraw: tuple[int, int] | None = None) -> tuple[Examples, Examples, Tensor]:
        """Locate the tasks at these positions and `gather` them."""
        return self.gather(self.locate(tasks), redraw)

    def gather(self, at: TaskRows, redraw: tuple[int, int] | None = None) -> tuple[Examples, Examples, Tensor]:
        """Return support, query and task ids [T] of located tasks, each side padded to its longest task.

        `redraw=(seed, epoch)` draws each task's support anew, at random and with the stored size, as a function of
        (seed, epoch, row) alone; rows keep their stored order within either side.
        """
        if redraw is None:
            support_row = row_matrix(at.start, at.num_support)
            query_row = row_matrix(at.start + at.num_support, at.num_query)
        else:
            support_row, query_row = redrawn_rows(at.start, at.num_support, at.num_rows, *redraw)
        cells = self._cells(at.shard, np.concatenate([support_row, query_row], axis=1))
        ids, dense, label, item_cold = (cells.column(name) for name in ("ids", "dense", "label", "item_cold"))
        bags = {name: cells.bag(name) for name in self._many_valued}
        texts = self._take_texts(ids, bags)
        weight = None if self._schema.weight is None else cells.column("weight")
        numbers = {column.name: cells.bag(column.name) for column in self._schema.numeric_sequence}
        vectors = {
            vector.name: cells.vector(partial(self._vectors_of, name=vector.name), vector.dim)
            for vector in self._schema.vector
        }

        def side(rows: Array, columns: slice) -> Examples:
            by_feature = torch.from_numpy(ids[:, columns].transpose(2, 0, 1).astype(np.int64, order="C"))
            return Examples(
                ids=dict(zip(self._one_valued, by_feature.unbind(), strict=True)),
                bags={name: bag.cut(columns) for name, bag in bags.items()},
                dense=torch.from_numpy(dense[:, columns].copy()),
                label=torch.from_numpy(label[:, columns].copy()),
                mask=torch.from_numpy(rows >= 0),
                row=torch.from_numpy(rows),
                item_cold=torch.from_numpy(item_cold[:, columns].astype(bool)),
                weight=None if weight is None else torch.from_numpy(weight[:, columns].copy()),
                given=padded({name: bag.cut(columns) for name, bag in numbers.items()})
                | {name: torch.from_numpy(vector[:, columns].copy()) for name, vector in vectors.items()}
                | {text_ids_of(name): padded_ids(found, columns) for name, found in texts.items()},
            )

        S = support_row.shape[1]
        return side(support_row, slice(0, S)), side(query_row, slice(S, None)), torch.from_numpy(at.task_id.copy())

    def _take_texts(self, ids: Array, bags: dict[str, CellBags]) -> dict[str, Array | CellBags]:
        """Return the texts of ids [T, W, features] and of bags, where both then hold what an embedding table has."""
        texts: dict[str, Array | CellBags] = {}
        for name in self._texts:
            if name in bags:
                texts[name] = bags[name]
                bags[name] = replace(bags[name], values=self._known(name, bags[name].values))
            else:
                column = self._one_valued.index(name)
                texts[name] = ids[..., column].copy()
                ids[..., column] = self._known(name, ids[..., column])
        return texts

    def _vectors_of(self, shard: Shard, name: str, rows: Array) -> Array:
        """Return a vector of rows of a shard, [n, dim]: its own, or that of its item."""
        if array_name(name) in shard.arrays:
            return shard.read(array_name(name))[rows]
        item = self._one_valued.index(str(self._schema.item))
        return shard.vectors[name].rows(self._known(self._one_valued[item], shard.read("ids")[rows, item]))

    def _column(self, name: str) -> Array:
        return joined_arrays([shard.read(name) for shard in self._shards])

    def _cells(self, shard_of: Array, row: Array) -> _Cells:
        """Return the cells of `row` [T, W]: row numbers of tasks that lie in `shard_of` [T], -1 on padding."""
        order = np.argsort(shard_of, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        by_shard, row = shard_of[order], row[order]
        # Padding reads the shard's first row, which is blanked when all are gathered.
        local = np.maximum(row - self._row_bounds[by_shard][:, None], 0)
        first = np.flatnonzero(np.diff(by_shard, prepend=-1)).tolist()
        W = row.shape[1]
        runs = [
            (self._shards[by_shard[a]], slice(a * W, b * W), local[a:b].reshape(-1))
            for a, b in pairwise([*first, len(order)])
        ]
        return _Cells(row.shape, self._shards[0], runs, back, np.flatnonzero(row < 0))


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of a [T, W] matrix of rows, tasks sorted by shard: each shard then fills one run of the flat cells.

    Each shard is gathered straight into its run, then whole tasks are gathered back into the batch's order. numpy does
    it, because its calls cost less than torch's on some hundred rows of a shard.
    """

    shape: tuple[int, ...]
    like: Shard  # any shard, for the columns' types
    runs: list[tuple[Shard, slice, Array]]  # shard, its flat cells, the rows in it that they read
    back: Array  # int64 [T]: where the batch's tasks are in the sorted order
    pad: Array  # flat cells that are padding

    def column(self, name: str) -> Array:
        """Return tensor `name` of the cells, [T, W, …] in the batch's order, 0 on padding."""
        like = self.like.arrays[name]
        out = np.empty((self.shape[0] * self.shape[1], *like.shape[1:]), like.dtype)
        if out.size:
            for shard, run, local in self.runs:
                shard.read(name).take(local, 0, out[run], "clip")  # "raise" would go through a buffer
                for column in (key for key in shard.raised if name == "ids" and isinstance(key, int)):
                    out[run, column] = shard.numbered(column, out[run, column])
            if len(self.pad):
                out[self.pad] = 0
        return out.reshape(*self.shape, *like.shape[1:])[self.back]

    def vector(self, read: Callable[..., Array], dim: int) -> Array:
        """Return float32 [T, W, dim] of the cells, 0 on padding; `read(shard, rows=…)` gives those of a shard."""
        out = np.zeros((self.shape[0] * self.shape[1], dim), np.float32)
        for shard, run, local in self.runs:
            out[run] = read(shard, rows=local)
        out[self.pad] = 0
        return out.reshape(*self.shape, dim)[self.back]

    def bag(self, name: str) -> CellBags:
        """Return a many-valued feature of the cells."""
        first, length = np.zeros((2, *self.shape), np.int64)
        flat_first, flat_length = first.reshape(-1), length.reshape(-1)
        for shard, run, local in self.runs:
            offsets = shard.read(f"{name}.offsets")
            flat_first[run] = offsets[local]
            flat_length[run] = offsets[local + 1] - offsets[local]
        flat_length[self.pad] = 0
        values = [
            shard.numbered(name, shard.read(f"{name}.values")[ranges(flat_first[run], flat_length[run])])
            for shard, run, _ in self.runs
        ]
        flat_first[:] = np.cumsum(flat_length) - flat_length
        return CellBags(joined_arrays(values or [np.empty(0, np.int32)]), first[self.back], length[self.back])


def split_in_memory(arrays: Mapping[str, Array], schema: PackSchema) -> PackSplit:
    """Make a split of one shard that lies in memory, as if it had been written and opened; `time` is not needed."""
    entry = {"rows": len(arrays["label"]), "tasks": len(arrays["task_id"])}
    shard = Shard(Path("memory"), entry, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    shard._verified = True
    return PackSplit("memory", [shard], schema)
