"""The task pack: whole tasks on disk, support before query, memory-mapped into tensors without a copy.

`PackWriter` writes one, `open_pack` opens one; docs/task-pack.md describes every byte. Writing and reading check
the same layout (`shard_layout`), so that a shard that was accepted once and has its checksum needs no second look.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from gmeta.batch import Bag, Examples
from gmeta.data.schema import PackSchema, pack_schema_from_json

FORMAT = "gmeta-task-pack"
VERSION = 1
SPLITS = ("train", "valid", "test")
CURE = "run `gmeta prepare` again, or restore the file"

Array = NDArray[Any]
_SAFETENSORS_DTYPE = {"uint8": "U8", "int32": "I32", "int64": "I64", "float32": "F32"}


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
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "xxh3"}, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- writing


class PackWriter:
    """Writes a pack under `<path>.partial` and renames it to `path` in `finish`: a pack is whole or absent.

    Use it as a context manager: leaving it without `finish` removes what was written. What a killed process left
    behind is removed by the next writer of the same path. Same calls, same bytes.

    Raises ValueError where `path` exists, where another process writes it, where arrays do not fit the schema,
    and where the disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        schema: PackSchema,
        settings: Mapping[str, Any] | None = None,
        data_schema: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.schema = schema
        self._settings = dict(settings or {})
        self._data_schema = dict(data_schema or {})
        self._shards: list[dict[str, Any]] = []
        self._vocab: dict[str, dict[str, Any]] = {}
        self._tasks: pq.ParquetWriter | None = None
        self._num_listed_tasks = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._refuse_existing()
        with _disk_errors(self._partial):
            self._lock: int | None = _lock_directory(self._partial)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what was written so far; nothing to do after `finish`."""
        if self._lock is None:
            return
        if self._tasks is not None:
            self._tasks.close()
        shutil.rmtree(self._partial)
        os.close(self._lock)
        self._lock = None

    def add_shard(self, split: str, arrays: Mapping[str, Array]) -> None:
        """Write one shard of whole tasks of `split`; `shard_layout` gives the arrays, their dtypes and shapes.

        Rows of a task are contiguous, support first; `row_start` counts from the shard's first row.
        """
        index = len(self._shards)
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: must be one of {', '.join(SPLITS)}")
        try:
            _check_arrays(self.schema, arrays)
        except ValueError as error:
            raise ValueError(f"shard {index} ({split}): {error}") from None
        path = self._partial / f"shard-{index:05d}.safetensors"
        with _disk_errors(path):
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
            entry = _file_entry(self._partial, path)
        self._shards.append({"split": split, "rows": len(arrays["label"]), "tasks": len(arrays["task_id"]), **entry})

    def write_vocab(self, table: str, values: pa.Array | pa.ChunkedArray, counts: Array) -> None:
        """Write the vocabulary of an embedding table: `values[i]` has id i + 1 and was seen `counts[i]` times."""
        path = self._partial / "vocab" / f"{quote(table, safe='')}.parquet"
        ids = pa.array(np.arange(1, len(values) + 1, dtype=np.int64))
        columns = {"value": values, "id": ids, "count": pa.array(np.asarray(counts, dtype=np.int64))}
        with _disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table(columns), path)
            self._vocab[table] = _file_entry(self._partial, path)

    def write_tasks(self, task_id: Array, key: pa.Array | pa.ChunkedArray, split: Sequence[str] | pa.Array) -> None:
        """Append to tasks.parquet: which raw key each task id stands for, and its split."""
        columns = {"task_id": pa.array(np.asarray(task_id, dtype=np.int64)), "key": key, "split": pa.array(split)}
        table = pa.table(columns)
        path = self._partial / "tasks.parquet"
        with _disk_errors(path):
            if self._tasks is None:
                self._tasks = pq.ParquetWriter(path, table.schema)
            self._tasks.write_table(table)
        self._num_listed_tasks += table.num_rows

    def finish(self, counts: Mapping[str, Any] | None = None) -> Path:
        """Write the manifest (with `counts`, free JSON), sync everything and rename; returns `path`."""
        num_tasks = sum(shard["tasks"] for shard in self._shards)
        if num_tasks == 0:
            raise ValueError(f"{self.path} would hold no task: nothing to write")
        if num_tasks != self._num_listed_tasks:
            raise ValueError(f"shards hold {num_tasks} tasks, tasks.parquet lists {self._num_listed_tasks}")
        path = self._partial / "manifest.json"
        with _disk_errors(path):
            assert self._tasks is not None
            self._tasks.close()
            path.write_text(json.dumps(self._manifest(counts or {}), sort_keys=True, indent=1) + "\n")
            _sync(path)
            for directory in (self._partial / "vocab", self._partial):
                if directory.exists():
                    _sync(directory)
            self._refuse_existing()
            os.rename(self._partial, self.path)
            _sync(self.path.absolute().parent)
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None
        return self.path

    def _manifest(self, counts: Mapping[str, Any]) -> dict[str, Any]:
        splits: dict[str, Any] = {}
        for name in SPLITS:
            shards = [{k: v for k, v in s.items() if k != "split"} for s in self._shards if s["split"] == name]
            if shards:
                total = {key: sum(s[key] for s in shards) for key in ("tasks", "rows")}
                splits[name] = {**total, "shards": shards}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "schema": self.schema.to_json(),
            "data_schema": self._data_schema,
            "settings": self._settings,
            "counts": dict(counts),
            "splits": splits,
            "vocab": self._vocab,
            "tasks": _file_entry(self._partial, self._partial / "tasks.parquet"),
        }
        return {**manifest, "xxh3": _manifest_checksum(manifest)}

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise ValueError(f"{self.path} exists: remove it or choose another path")


def _lock_directory(path: Path) -> int:
    """Make `path` an empty directory that this process alone holds; returns the locked descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between mkdir and flock its owner may have renamed or removed the directory we opened.
        held = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    except BlockingIOError:
        held = False
    if not held:
        os.close(descriptor)
        raise ValueError(f"{path} is being written by another process: wait for it or choose another path")
    for left_behind in path.iterdir():  # by a process that was killed: nobody holds the lock
        shutil.rmtree(left_behind) if left_behind.is_dir() else left_behind.unlink()
    return descriptor


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` (full disk, no permission) into a ValueError that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"cannot write {path}: {reason}; no pack was made: free space there or choose another path"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_entry(root: Path, path: Path) -> dict[str, Any]:
    """Manifest entry of a file just written, which is synced to disk first."""
    _sync(path)
    return {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "xxh3": checksum_file(path)}


def _check_arrays(schema: PackSchema, arrays: Mapping[str, Array]) -> None:
    """ValueError where the arrays are not a valid shard of `schema`: names, dtypes, shapes, values."""
    for name in ("label", "task_id"):
        if name not in arrays:
            raise ValueError(f"array {name!r} is missing")
    layout = shard_layout(schema, len(arrays["label"]), len(arrays["task_id"]))
    if odd := sorted(layout.keys() ^ arrays.keys()):
        raise ValueError(f"array {odd[0]!r} is {'missing' if odd[0] in layout else 'not in the schema'}")
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if array.dtype != dtype or not fits:
            raise ValueError(f"array {name!r} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    _check_tasks(arrays)
    for column, name in enumerate(one_valued(schema)):
        _check_range(name, arrays["ids"][:, column], schema.feature(name).num_ids)
    for name in many_valued(schema):
        values, offsets = arrays[f"{name}.values"], arrays[f"{name}.offsets"]
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{name}.offsets must rise from 0 to the number of values, {len(values)}")
        _check_range(name, values, schema.feature(name).num_ids)
    _check_range("item_cold", arrays["item_cold"], 2)
    for name in ("dense", "label"):
        bad = ~np.isfinite(arrays[name])
        if bad.any():
            raise ValueError(f"{name} is {arrays[name][bad][0]} in row {np.argwhere(bad)[0, 0]}: must be finite")
    if schema.binary_label:
        bad = ~np.isin(arrays["label"], (0, 1))
        if bad.any():
            raise ValueError(f"label is {arrays['label'][bad][0]} in row {np.argmax(bad)}: must be 0 or 1")


def _check_tasks(arrays: Mapping[str, Array]) -> None:
    start, support, rows = arrays["row_start"], arrays["num_support"], len(arrays["label"])
    if len(start) == 0:
        raise ValueError("no task: leave an empty shard out")
    sizes = np.diff(start, append=rows)
    if start[0] != 0 or (sizes < 1).any():
        raise ValueError(f"row_start must rise strictly from 0 and stay below the number of rows, {rows}")
    bad = (support < 0) | (support > sizes)
    if bad.any():
        task = int(np.argmax(bad))
        raise ValueError(f"num_support of task {task} is {support[task]}: the task has {sizes[task]} rows")


def _check_range(name: str, values: Array, limit: int) -> None:
    bad = (values < 0) | (values >= limit)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"{name} is {values[at]} at position {at}: must be in [0, {limit})")


# ---------------------------------------------------------------------------------------------- reading


def open_pack(path: str | Path) -> TaskPack:
    """Open a pack and map its shards into memory; reads headers only.

    Raises ValueError that names the file and the cure where the pack is missing, of a newer format, or where a file
    is missing, of another size, or has a header that the manifest does not describe. Damage inside a file is found
    by its checksum, which is verified when the file is first used (`verify_pack` verifies all).
    """
    root = Path(path)
    manifest = _read_manifest(root)
    schema = pack_schema_from_json(manifest["schema"])
    splits = {}
    for name, entry in manifest["splits"].items():
        splits[name] = PackSplit(name, [_open_shard(root, shard, schema) for shard in entry["shards"]], schema)
    for entry in (*manifest["vocab"].values(), manifest["tasks"]):
        _check_size(root, entry)
    return TaskPack(root, manifest, schema, splits)


def verify_pack(path: str | Path) -> None:
    """Open a pack and verify the checksum of every file; ValueError names the first damaged one."""
    pack = open_pack(path)
    for split in pack.splits:
        pack.split(split).verify()
    for table in pack.manifest["vocab"]:
        pack.vocab_file(table)
    pack.tasks_file()


class TaskPack:
    """An open pack. `manifest` is the parsed manifest.json, `schema` its PackSchema."""

    def __init__(
        self, path: Path, manifest: dict[str, Any], schema: PackSchema, splits: Mapping[str, PackSplit]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.schema = schema
        self._splits = dict(splits)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have tasks, in the order train, valid, test."""
        return tuple(name for name in SPLITS if name in self._splits)

    def split(self, name: str) -> PackSplit:
        """The split called `name`; ValueError where the pack has no task in it."""
        if name not in self._splits:
            raise ValueError(f"{self.path} has no tasks in split {name!r}; it has: {', '.join(self.splits)}")
        return self._splits[name]

    def vocab_file(self, table: str) -> Path:
        """Parquet file (value, id, count) of a table's vocabulary, its checksum verified."""
        if table not in self.manifest["vocab"]:
            known = ", ".join(self.manifest["vocab"]) or "none"
            raise ValueError(f"{self.path} has no vocabulary {table!r}; it has: {known}")
        return _verified(self.path, self.manifest["vocab"][table])

    def tasks_file(self) -> Path:
        """Parquet file (task_id, key, split), its checksum verified."""
        return _verified(self.path, self.manifest["tasks"])


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

    def __init__(self, name: str, shards: Sequence[_Shard], schema: PackSchema) -> None:
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
        return self._side(parts, support_row), self._side(parts, query_row), torch.from_numpy(task_id)

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
            end = np.where(local + 1 < len(row_start), row_start[(local + 1) % len(row_start)], 0)
            end[local + 1 == len(row_start)] = self._shards[shard].num_rows
            start[slots] = row_start[local] + self._row_bounds[shard]
            rows[slots] = end - row_start[local]
            support[slots] = self._shards[shard].numpy("num_support")[local]
        return start, support, rows

    def _side(self, parts: list[_Part], row: Array) -> Examples:
        """Examples of the rows in `row` [T, S], -1 on padding."""
        T, S = row.shape
        mask = torch.from_numpy(row >= 0)
        pad = torch.from_numpy(np.flatnonzero(row < 0))
        pieces = []
        for slots, shard, _ in parts:
            # Padding reads the shard's first row, which is blanked below.
            local = np.maximum(row[slots] - self._row_bounds[shard], 0).reshape(-1)
            cells = None if len(parts) == 1 else torch.from_numpy((slots[:, None] * S + np.arange(S)).reshape(-1))
            slots_in_order = len(parts) == 1  # one shard: the stable sort left the slots as they were
            assert not slots_in_order or (slots == np.arange(T)).all()
            pieces.append((cells, self._shards[shard], torch.from_numpy(local)))

        def take(name: str) -> Tensor:
            return _gather(pieces, self._shards[0].tensors[name], name, T * S).index_fill_(0, pad, 0)

        ids = take("ids").t().to(torch.int64, memory_format=torch.contiguous_format).view(len(self._one_valued), T, S)
        return Examples(
            ids=dict(zip(self._one_valued, ids, strict=True)),
            bags={name: _bag(pieces, name, pad, (T, S)) for name in self._many_valued},
            dense=take("dense").view(T, S, self._num_numeric),
            label=take("label").view(T, S),
            mask=mask,
            row=torch.from_numpy(row),
            item_cold=take("item_cold").view(T, S).bool(),
        )


class _Shard:
    """One mapped shard. Its checksum is verified when its tensors are first read."""

    def __init__(self, path: Path, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path = path
        self.num_rows = int(entry["rows"])
        self.num_tasks = int(entry["tasks"])
        self.tensors = tensors
        self._entry = entry
        self._verified = False

    def verify(self) -> None:
        if not self._verified:
            _verified(self.path.parent, self._entry)
            self._verified = True

    def read(self, name: str) -> Tensor:
        self.verify()
        return self.tensors[name]

    def numpy(self, name: str) -> Array:
        return self.read(name).numpy()


_Part = tuple[Array, int, Array]  # slots of the asked tasks, shard index, tasks within the shard
_Piece = tuple[Tensor | None, _Shard, Tensor]  # cells of [T * S] (None: all), shard, rows within the shard


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
    key = mix64(mix64(mix64(np.array([seed], np.uint64)) + np.uint64(epoch)) + flat.astype(np.uint64))
    by_key = np.lexsort((key, task))
    rank = np.empty_like(flat)
    rank[by_key] = np.arange(len(flat)) - first[task]
    is_support = rank < support[task]
    return _scatter_rows(flat[is_support], support), _scatter_rows(flat[~is_support], rows - support)


def _scatter_rows(flat: Array, count: Array) -> Array:
    out = np.full((len(count), count.max(initial=0)), -1, np.int64)
    out[np.arange(out.shape[1]) < count[:, None]] = flat
    return out


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 output function (Steele, Lea and Flood 2014): a bijection of 64-bit words that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _gather(pieces: list[_Piece], like: Tensor, name: str, num_cells: int) -> Tensor:
    """[num_cells, …]: rows of tensor `name` put where the pieces say."""
    if len(pieces) == 1:
        return pieces[0][1].read(name).index_select(0, pieces[0][2])
    out = like.new_empty((num_cells, *like.shape[1:]))
    for cells, shard, local in pieces:
        out[cells] = shard.read(name).index_select(0, local)
    return out


def _bag(pieces: list[_Piece], name: str, pad: Tensor, shape: tuple[int, int]) -> Bag:
    """A many-valued feature: values flat in cell order, lengths [T, S] with 0 on padding."""
    num_cells = shape[0] * shape[1]
    lengths, source = torch.zeros(2, num_cells, dtype=torch.int64)
    for cells, shard, local in pieces:
        offsets = shard.read(f"{name}.offsets")
        at = slice(None) if cells is None else cells
        source[at] = offsets[local]
        lengths[at] = offsets[local + 1] - offsets[local]
    lengths.index_fill_(0, pad, 0)
    first = lengths.cumsum(0) - lengths
    values = torch.empty(int(lengths.sum()), dtype=torch.int64)
    for cells, shard, _ in pieces:
        at = slice(None) if cells is None else cells
        length = lengths[at]
        step = torch.arange(int(length.sum())) - torch.repeat_interleave(length.cumsum(0) - length, length)
        stored = shard.read(f"{name}.values")[step + torch.repeat_interleave(source[at], length)]
        values[step + torch.repeat_interleave(first[at], length)] = stored.to(torch.int64)
    return Bag(values, lengths.view(shape))


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        name, version = manifest["format"], manifest["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{root} is no task pack (it has no manifest.json): give the directory that `gmeta prepare` wrote"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {CURE}") from None
    if name != FORMAT:
        raise ValueError(f"{path} is of format {name!r}, expected {FORMAT!r}: give the directory of a task pack")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{root} was made by gmeta pack format {version}; this gmeta reads up to {VERSION}: upgrade")
    if manifest.get("xxh3") != _manifest_checksum(manifest):
        raise ValueError(f"{path} is damaged (its checksum is not that of its content): {CURE}")
    return manifest  # type: ignore[no-any-return]


def _check_size(root: Path, entry: Mapping[str, Any]) -> Path:
    path = root / str(entry["file"])
    if not path.is_file():
        raise ValueError(f"{path} is missing: {CURE}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: {CURE}")
    return path


def _verified(root: Path, entry: Mapping[str, Any]) -> Path:
    path = _check_size(root, entry)
    if (found := checksum_file(path)) != entry["xxh3"]:
        raise ValueError(f"{path} is damaged (checksum {found}, the manifest says {entry['xxh3']}): {CURE}")
    return path


def _open_shard(root: Path, entry: Mapping[str, Any], schema: PackSchema) -> _Shard:
    """Map a shard; its header must be the one that the manifest and the schema imply."""
    path = _check_size(root, entry)
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
                if stored.get_dtype() != _SAFETENSORS_DTYPE[dtype] or not fits:
                    raise ValueError(
                        f"{path} does not fit the manifest (tensor {name!r} is {stored.get_dtype()} {found}): {CURE}"
                    )
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {CURE}") from None
    return _Shard(path, entry, tensors)
