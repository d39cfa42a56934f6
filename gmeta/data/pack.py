"""The task pack: whole tasks on disk, support before query, memory-mapped into tensors without a copy.

`PackWriter` writes one, `open_pack` opens one; docs/task-pack.md describes every byte. Writing and reading check
the same layout (`shard_layout`), so that a shard that was accepted once and has its checksum needs no second look.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from gmeta.core.files import sync, sync_folders
from gmeta.data.catalogue import Catalogue, catalogue_file, read_catalogue
from gmeta.data.events.findings import audit_warnings
from gmeta.data.identity import DataIdentity, content_checksum, identity_of, table_identities, vocabulary_file
from gmeta.data.item_vectors import array_name, open_item_vectors
from gmeta.data.layout import (
    CHUNK_BYTES,
    CURE,
    SAFETENSORS_DTYPE,
    Array,
    check_entry,
    check_size,
    checksum_file,
    many_valued,
    one_valued,
    ragged,
    shard_layout,
    verified_file,
)
from gmeta.data.schema import Feature, PackSchema, data_schema_from_json, pack_schema_from_json
from gmeta.data.text_tables import TextTable, open_text_tables

if TYPE_CHECKING:
    from gmeta.data.shards import PackSplit

__all__ = ["PackWriter", "TaskPack", "open_pack", "verify_pack"]

FORMAT = "gmeta-task-pack"
VERSION = 2
SPLITS = ("train", "valid", "test")


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest, but for the one that it holds."""
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
        day: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.schema = schema
        self._settings = dict(settings or {})
        self._data_schema = dict(data_schema or {})
        self._day = {} if day is None else {"day": dict(day)}
        self._shards: list[dict[str, Any]] = []
        self._vocab: dict[str, dict[str, Any]] = {}
        self._tasks: pq.ParquetWriter | None = None
        self._num_listed_tasks = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._refuse_existing()
        with _disk_errors(self._partial):
            self._lock: int | None = lock_directory(self._partial)
            (self._partial / "vocab").mkdir()

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what was written so far. After `finish` this does nothing."""
        if self._lock is None:
            return
        if self._tasks is not None:
            with suppress(OSError):  # a full disk refuses the footer too, of a file that goes anyway
                self._tasks.close()
        if self._partial.exists():
            shutil.rmtree(self._partial)
        os.close(self._lock)
        self._lock = None

    @property
    def directory(self) -> Path:
        """Return the directory in which the pack grows until `finish` renames it. A file put here becomes part of the
        pack.
        """
        return self._partial

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
            checksum = save_file(arrays, path)
        counts = {"rows": len(arrays["label"]), "tasks": len(arrays["task_id"]), "bytes": path.stat().st_size}
        self._shards.append({"split": split, "file": path.name, "xxh3": checksum, **counts})

    def write_vocab(
        self, table: str, values: pa.Array | pa.ChunkedArray, counts: Array, last_day: Array | None = None
    ) -> None:
        """Write the vocabulary of an embedding table: `values[i]` has id i + 1, was seen `counts[i]` times, and last on
        day `last_day[i]`. A value that is NULL is a tombstone: nothing has its id.
        """
        path = vocabulary_file(self._partial / "vocab", table)
        ids = pa.array(np.arange(1, len(values) + 1, dtype=np.int64))
        columns = {"value": values, "id": ids, "count": pa.array(np.asarray(counts, dtype=np.int64))}
        if last_day is not None:
            columns["last_day"] = pa.array(np.asarray(last_day, dtype=np.int32))
        with _disk_errors(path):
            pq.write_table(pa.table(columns), path)
            self._vocab[table] = file_entry(self._partial, path)

    def write_tasks(self, task_id: Array, key: pa.Array | pa.ChunkedArray, split: Sequence[str] | pa.Array) -> None:
        """Append to tasks.parquet, which says what raw key each task id stands for, and its split."""
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
            sync(path)
            sync_folders(self._partial)
            self._refuse_existing()
            os.rename(self._partial, self.path)
            sync(self.path.absolute().parent)
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
        identity = table_identities(self.schema, self._data_schema, self._partial / "vocab")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "schema": replace(self.schema, identity=identity).to_json(),
            "data_schema": self._data_schema,
            "settings": self._settings,
            "counts": dict(counts),
            "splits": splits,
            "vocab": self._vocab,
            "tasks": file_entry(self._partial, self._partial / "tasks.parquet"),
            **self._day,
        }
        listed = (*self._shards, *self._vocab.values(), manifest["tasks"])
        known = {"manifest.json", *(entry["file"] for entry in listed)}
        present = sorted(path for path in self._partial.rglob("*") if path.is_file())
        manifest["others"] = [
            file_entry(self._partial, path)
            for path in present
            if path.relative_to(self._partial).as_posix() not in known
        ]
        return {**manifest, "xxh3": manifest_checksum(manifest)}

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise ValueError(f"{self.path} exists: remove it or choose another path")


def lock_directory(path: Path) -> int:
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
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot write {path}: {reason}; no pack was made: free space there or choose another path"
        ) from error


def save_file(arrays: Mapping[str, Array], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write and sync a safetensors file, the same bytes as its library would; returns its checksum.

    The library copies every array before it writes, and the checksum would take another pass over the file.
    """
    names = sorted(arrays, key=lambda name: (list(SAFETENSORS_DTYPE).index(arrays[name].dtype.name), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        array, start = arrays[name], end
        end += array.nbytes
        dtype = SAFETENSORS_DTYPE[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_64()
    with path.open("wb") as file:
        for data in (np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8), *(arrays[name] for name in names)):
            flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            for at in range(0, len(flat), CHUNK_BYTES):
                chunk = flat[at : at + CHUNK_BYTES].data
                digest.update(chunk)
                file.write(chunk)
    sync(path)
    return digest.hexdigest()


def file_entry(root: Path, path: Path) -> dict[str, Any]:
    """Sync a file just written to disk and return its manifest entry."""
    sync(path)
    return {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "xxh3": checksum_file(path)}


def _check_arrays(schema: PackSchema, arrays: Mapping[str, Array]) -> None:
    """Raise ValueError where the arrays are not a valid shard of `schema`: names, dtypes, shapes, values."""
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
        _check_range(name, arrays["ids"][:, column], _limit(schema.feature(name)))
    for name in ragged(schema):
        values, offsets = arrays[f"{name}.values"], arrays[f"{name}.offsets"]
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{name}.offsets must rise from 0 to the number of values, {len(values)}")
    for name in many_valued(schema):
        _check_range(name, arrays[f"{name}.values"], _limit(schema.feature(name)))
    aligned = [(f.name, f.aligned) for f in schema.features if f.aligned is not None]
    for name, other in (*aligned, *((c.name, c.aligned) for c in schema.numeric_sequence)):
        if not np.array_equal(arrays[f"{name}.offsets"], arrays[f"{other}.offsets"]):
            raise ValueError(f"{name} has not as many values in every row as {other}")
    _check_range("item_cold", arrays["item_cold"], 2)
    checked = ["dense", *["weight"] * (schema.weight is not None), *["label"] * (not schema.labels)]
    checked += [array_name(vector.name) for vector in schema.vector if vector.owner == "row"]
    for name in (*sorted(checked), *(f"{column.name}.values" for column in schema.numeric_sequence)):
        if not np.isfinite(arrays[name]).all():
            bad = ~np.isfinite(arrays[name])
            raise ValueError(f"{name} is {arrays[name][bad][0]} in row {np.argwhere(bad)[0, 0]}: must be finite")
    if schema.weight is not None and (arrays["weight"] < 0).any():
        row = int(np.argmax(arrays["weight"] < 0))
        raise ValueError(f"weight is {arrays['weight'][row]} in row {row}: must not be negative")
    labels = arrays["label"] if schema.labels else arrays["label"][:, None]
    if np.isnan(labels).all(1).any():
        raise ValueError(f"row {np.argmax(np.isnan(labels).all(1))} has no label: it must have one of them")
    for column, label in zip(labels.T, schema.labels or (None,), strict=True):
        binary = schema.binary_label if label is None else label.loss == "bce"
        bad = ~(np.isin(column, (0, 1)) | np.isnan(column)) if binary else np.isinf(column)
        if bad.any():
            name, rule = "label" if label is None else f"label {label.name!r}", "0 or 1" if binary else "finite"
            raise ValueError(f"{name} is {column[bad][0]} in row {np.argmax(bad)}: must be {rule}")


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


def _limit(feature: Feature) -> int:
    return feature.num_ids if feature.num_texts is None else feature.num_texts


def _check_range(name: str, values: Array, limit: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < limit:
        at = int(np.argmax((values < 0) | (values >= limit)))
        raise ValueError(f"{name} is {values[at]} at position {at}: must be in [0, {limit})")


# ---------------------------------------------------------------------------------------------- reading


def open_pack(path: str | Path) -> TaskPack:
    """Open a pack and map its shards into memory; reads headers only.

    Raises ValueError that names the file and the cure where the pack is missing, of a newer format, or where a file
    is missing, of another size, or has a header that the manifest does not describe. Damage inside a file is found
    by its checksum, which is verified when the file is first used (`verify_pack` verifies all).
    """
    from gmeta.data.shards import PackSplit, open_shard  # which import torch

    root = Path(path)
    manifest = _read_manifest(root)
    schema = pack_schema_from_json(manifest["schema"])
    files = {entry["file"]: partial(verified_file, root, entry) for entry in manifest["others"]}
    verify = {file.removeprefix("vocab/"): check for file, check in files.items() if file.startswith("vocab/")}
    vectors = open_item_vectors(root / "vocab", schema, verify)
    splits = {}
    for name, entry in manifest["splits"].items():
        shards = [open_shard(root, shard, schema, vectors) for shard in entry["shards"]]
        splits[name] = PackSplit(name, shards, schema)
    for entry in (*manifest["vocab"].values(), manifest["tasks"], *manifest["others"]):
        check_size(root, entry)
    return TaskPack(root, manifest, schema, splits)


def verify_pack(path: str | Path) -> None:
    """Open a pack and verify the checksum of every file. Raises ValueError with the name of the first damaged one."""
    pack = open_pack(path)
    for split in pack.splits:
        pack.split(split).verify()
    for table in pack.manifest["vocab"]:
        pack.vocab_file(table)
    pack.tasks_file()
    for entry in pack.manifest["others"]:
        verified_file(pack.path, entry)


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
        """Return the names of the splits that have tasks, in the order train, valid, test."""
        return tuple(name for name in SPLITS if name in self._splits)

    def split(self, name: str) -> PackSplit:
        """Return the split called `name`. Raises ValueError where the pack has no task in it."""
        if name not in self._splits:
            told = "; ".join([f"it has: {', '.join(self.splits)}", *self.left_out(name)])
            raise ValueError(f"{self.path} has no tasks in split {name!r}; {told}")
        return self._splits[name]

    def vocab_file(self, table: str) -> Path:
        """Return the Parquet file (value, id, count) of a table's vocabulary, after its checksum was verified."""
        if table not in self.manifest["vocab"]:
            known = ", ".join(self.manifest["vocab"]) or "none"
            raise ValueError(f"{self.path} has no vocabulary {table!r}; it has: {known}")
        return verified_file(self.path, self.manifest["vocab"][table])

    def vocabulary_files(self) -> list[Path]:
        """Return all files that raw rows are encoded with, after their checksums were verified."""
        entries = [*self.manifest["vocab"].values(), *self.manifest["others"]]
        return [verified_file(self.path, entry) for entry in entries if entry["file"].startswith("vocab/")]

    def text_tables(self) -> dict[str, TextTable]:
        """Return the texts of each table of texts, by id. A file is verified when its texts are first read."""
        entries = [*self.manifest["vocab"].values(), *self.manifest["others"]]
        verify = {Path(entry["file"]).name: partial(verified_file, self.path, entry) for entry in entries}
        return open_text_tables(self.path / "vocab", self.schema, verify)

    def catalogue(self) -> Catalogue:
        """Return the catalogue of a next-item pack, after its checksum was verified. ValueError for another pack."""
        name = catalogue_file(Path("vocab")).as_posix()
        for entry in self.manifest["others"]:
            if entry["file"] == name:
                verified_file(self.path, entry)
        return read_catalogue(self.path / "vocab", self.schema)

    def tasks_file(self) -> Path:
        """Return the Parquet file (task_id, key, split), after its checksum was verified."""
        return verified_file(self.path, self.manifest["tasks"])

    @property
    def roles_are_given(self) -> bool:
        """Whether a column of the user's says which rows are support and which are query (`split_query: column`)."""
        by_column = self.manifest.get("settings", {}).get("split_query") == "column"
        return bool(by_column and not self._is_of_log)

    @property
    def query_is_last(self) -> bool:
        """Whether the query of a task are its last rows by time."""
        by_time = self.manifest.get("settings", {}).get("split_query", "last") == "last"
        return (by_time or self._is_of_log) and self.schema.time is not None

    @property
    def _is_of_log(self) -> bool:
        """Whether the roles are those that a log's reader gave: by time, the query last."""
        return "antm2c" in self.manifest["counts"]

    def identity(self) -> DataIdentity:
        """Return what the pack's ids and numbers mean. It is computed from the files where the manifest does not record
        it.
        """
        if self.schema.identity is None:
            self.vocabulary_files()  # verifies their checksums
        return identity_of(self.schema, self.manifest["data_schema"], self.path / "vocab")

    def left_out(self, split: str) -> list[str]:
        """Say what `prepare` left out of a split, one sentence a reason; nothing where it left out nothing.

        Packs of earlier releases count all splits together.
        """
        counts = self.manifest["counts"]
        if "left_out" in counts:
            found = counts["left_out"].get(split, {})
            where = f"split {split}"
        else:
            rows = counts.get("dropped_rows", {})
            found = {reason: [tasks, rows.get(reason, 0)] for reason, tasks in counts.get("dropped_tasks", {}).items()}
            where = "all splits together"
        shortened = counts.get("shortened_tasks", {}).get(split, {})
        return [
            f"the pack left {tasks:,} tasks ({rows:,} rows) of {where} out: {reason}"
            for reason, (tasks, rows) in sorted(found.items())
        ] + [
            f"the pack left {rows:,} rows of {tasks:,} tasks of split {split} out: {reason}"
            for reason, (tasks, rows) in sorted(shortened.items())
        ]

    def warnings(self) -> list[str]:
        """Say what makes every metric on this pack too good, or wrong; nothing where `prepare` found nothing."""
        found = list(audit_warnings(self.manifest["counts"]))
        both = self.manifest["counts"].get("rows_on_both_sides")
        if both is None:
            return found
        return [
            *found,
            f"{both['rows']:,} query rows of {both['tasks']:,} tasks of the pack are in the support too, "
            "label and all, which makes metrics too good",
        ]

    def tasks_checksum(self) -> str:
        """Return the checksum of which tasks there are and in which split each lies. A copy of the pack has the
        same.
        """
        return content_checksum(self.tasks_file(), ("task_id", "key", "split"))

    def rows_checksums(self) -> dict[str, str]:
        """Return split -> checksum of its rows, labels and all, made of the manifest's checksums of its shards. A copy
        of the pack has the same.
        """
        shards = {
            name: "".join(shard["xxh3"] for shard in split["shards"]) for name, split in self.manifest["splits"].items()
        }
        return {name: xxhash.xxh3_64(sums.encode()).hexdigest() for name, sums in shards.items()}


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        name, version = manifest["format"], manifest["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{root} is no task pack (it has no manifest.json): give the directory that `gmeta prepare` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {CURE}") from None
    if name != FORMAT:
        raise ValueError(f"{path} is of format {name!r}, expected {FORMAT!r}: give the directory of a task pack")
    if type(version) is not int or version > VERSION:
        raise ValueError(f"{root} was made by gmeta pack format {version}; this gmeta reads up to {VERSION}: upgrade")
    if manifest.get("xxh3") != manifest_checksum(manifest):
        raise ValueError(f"{path} is damaged (its checksum is not that of its content): {CURE}")
    try:
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of a task pack ({error}): {CURE}") from None
    return manifest  # type: ignore[no-any-return]


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError for what `finish` would not have written: a checksum says
    that a file is whole, not who wrote it.
    """
    pack_schema_from_json(manifest["schema"])
    if manifest["data_schema"] != {}:  # of a pack that was not made of raw rows
        data_schema_from_json(manifest["data_schema"])
    entries = [*manifest["vocab"].values(), manifest["tasks"], *manifest["others"]]
    for name, split in manifest["splits"].items():
        if name not in SPLITS:
            raise ValueError(f"it has a split {name!r}")
        counted = [split, *split["shards"]]
        entries += split["shards"]
        for count in (entry[key] for entry in counted for key in ("tasks", "rows")):
            if type(count) is not int or not 0 <= count < 2**63:
                raise ValueError(f"split {name} has the count {count!r}")
    for entry in entries:
        check_entry(entry)
