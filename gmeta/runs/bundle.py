"""A bundle: one version of a model, in files that need nothing else. `gmeta.delivery.bundle` makes one of a run.

    manifest.json                       what it is, and size and checksum of every other file
    config.yaml  schema.json  vocab/    as in the run directory
    dense.safetensors                   dense layers, learned rates, buffers
    tables/<table>-00000.safetensors …  an embedding table's rows, in the order of ids
    assets/                             optional: what else the model is made with
    training/                           optional: moments and positions, which a warm start goes on with

Rows lie in the order of ids, whatever workers a run had, so that versions can be compared, grown, and taken apart. A
bundle that is only served may hold them in fewer bytes (`rows` in the manifest); they are turned back as they are read.
Nothing is unpickled. Loading a model never opens `training/`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gmeta.core.files import read_mapping, sync, sync_folders
from gmeta.data.layout import check_entry, check_size, verified_file
from gmeta.data.pack import file_entry, lock_directory, manifest_checksum
from gmeta.embedding.table import FusedTable, ShardedTables
from gmeta.runs.folders import folder_errors, put_in_place, refuse_existing
from gmeta.runs.small_rows import RowFormat, packed, unpacked

FORMAT, VERSION = "gmeta-bundle", 2
MANIFEST = "manifest.json"
DENSE = "dense.safetensors"
TRAINING = "training/"
ASSETS = "assets"
CURE = "make the bundle again, or copy it again"
PART_BYTES = 1 << 28
"""A table's file holds at most so many bytes of rows: a part is written, sent and mapped as one."""
_FILL_ROWS = 1 << 16

ROWS = "rows"
"""Name of the rows themselves in a table's files; those of training/ have the names of the optimizer's state."""


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, and no run directory: it has a manifest of this format."""
    file = path / MANIFEST
    try:
        return file.is_file() and json.loads(file.read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def open_bundle(path: Path, *, training: bool = False) -> Bundle:
    """Open a bundle once its manifest and the checksum of every file are verified; of `training/` only with `training`.

    Raises ValueError that names the file and the cure: missing, damaged, of a newer format, without what was asked for.
    """
    manifest = read_manifest(path)
    for entry in manifest["files"]:
        if training or not entry["file"].startswith(TRAINING):
            verified_file(path, entry, CURE)
        else:
            check_size(path, entry, CURE)
    # those beside dense.safetensors would be read with it
    tensors = {file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")}
    if strays := tensors - {entry["file"] for entry in manifest["files"]}:
        raise ValueError(f"bundle {path} was not made with {min(strays)}: remove that file")
    if training and not manifest["training"]:
        raise ValueError(f"{path} has no {TRAINING} part: make the bundle with --training true")
    return Bundle(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a bundle's manifest. ValueError where it is missing, damaged, or of a newer format."""
    file = path / MANIFEST
    if not file.exists():
        raise ValueError(f"{path} is no bundle (it has no {MANIFEST}): give the folder that `gmeta bundle` made")
    return check_manifest(read_mapping(file, CURE), str(file))


def check_manifest(manifest: dict[str, Any], file: str, cure: str = CURE) -> dict[str, Any]:
    """Return a manifest that is sound. ValueError names `file`, where it was read, and the cure of damage."""
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is of format {manifest.get('format')!r}, expected {FORMAT!r}: give a bundle")
    version = manifest.get("version")
    if type(version) is not int or version > VERSION:
        raise ValueError(f"{file} is of a bundle of format {version}; this gmeta reads up to {VERSION}: upgrade")
    if manifest.get("xxh3") != manifest_checksum(manifest):
        raise ValueError(f"{file} is damaged (its checksum is not that of its content): {cure}")
    try:
        for entry in manifest["files"]:
            check_entry(entry)
        for table in manifest["tables"].values():
            if any(type(table[key]) is not int or table[key] < 1 for key in ("ids", "dim", "part_rows")):
                raise ValueError(f"a table has the sizes {table}")
        for key, kind in (("id", str), ("step", int), ("training", bool)):
            if not isinstance(manifest[key], kind):
                raise ValueError(f"{key} is {manifest[key]!r}")
        for file in manifest.get(ASSETS, {}).values():
            if file:  # of nothing the empty text
                check_entry({"file": file, "bytes": 0, "xxh3": ""})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no manifest of a bundle ({error}): {cure}") from None
    return manifest


def assets_of(path: Path) -> dict[str, str]:
    """Return the arguments of a bundle's model that name what the bundle holds for it, as absolute paths; none of a run
    directory.
    """
    found = read_manifest(path).get(ASSETS, {}) if is_bundle(path) else {}
    return {key: str((path / file).absolute()) if file else "" for key, file in found.items()}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its own checksum, after a change to it."""
    return {**manifest, "xxh3": manifest_checksum(manifest)}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Return what manifest.json holds."""
    return json.dumps(manifest, sort_keys=True, indent=1) + "\n"


def without_training(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of the same version without its `training/`."""
    files = [entry for entry in manifest["files"] if not entry["file"].startswith(TRAINING)]
    return sealed({**manifest, "training": False, "files": files})


@dataclass(frozen=True)
class Bundle:
    """An open bundle. `manifest` is the parsed manifest.json."""

    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """Return the version: the run's id and the step."""
        return str(self.manifest["id"])

    @property
    def step(self) -> int:
        """Return the training step that it was saved after."""
        return int(self.manifest["step"])

    @cached_property
    def _mapped(self) -> dict[tuple[str, int, str], dict[str, Tensor]]:
        return {}

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Return the mapped tensors of `dense.safetensors`, by name: `dense.NAME` and `buffers.NAME`."""
        return _read(self.path / DENSE)

    def rows(self, table: str, ids: Tensor, name: str = ROWS) -> Tensor:
        """Return rows of an embedding table, [n, dim], or with `name` the optimizer's state for them."""
        entry = self.manifest["tables"][table]
        size = entry["part_rows"]
        if size >= entry["ids"]:
            return self._part(table, 0, name, ids)
        part = ids // size
        found: Tensor | None = None
        for number in part.unique().tolist():
            here = part == number
            values = self._part(table, number, name, ids[here] - number * size)
            found = values.new_empty(len(ids), *values.shape[1:]) if found is None else found
            found[here] = values
        return self._part(table, 0, name, ids[:0]) if found is None else found

    def _part(self, table: str, number: int, name: str, ids: Tensor) -> Tensor:
        part = table, number, name
        if part not in self._mapped:
            self._mapped[part] = _read(self.path / part_name(*part))
        try:
            return unpacked(self._mapped[part], name, ids)
        except KeyError:
            raise ValueError(f"{self.path / part_name(*part)} has no {name!r}: {CURE}") from None

    def fill_tables(self, tables: ShardedTables) -> None:
        """Fill this worker's rows. ValueError where a table is missing, or of another size."""
        for fused in tables.fused.values():
            self.require_tables(fused)
            self.fill_rows(fused)

    def require_tables(self, fused: FusedTable) -> None:
        """Raise ValueError where a table of one width is missing, or of another size."""
        for spec in fused.specs:
            entry = self.manifest["tables"].get(spec.name)
            found = None if entry is None else [entry["ids"], entry["dim"]]
            if found != [spec.num_ids, spec.dim]:
                raise ValueError(
                    f"{self.path} is of another model: table {spec.name} is {found or 'missing'}, expected "
                    f"{[spec.num_ids, spec.dim]}"
                )

    def fill_rows(
        self,
        fused: FusedTable,
        sources: Mapping[str, tuple[str, Tensor]] | None = None,
        *,
        moments: bool = False,
    ) -> None:
        """Fill this worker's rows of one width, and with `moments` the optimizer's state.

        `sources[table]` has the bundle's table, and its id of each id, int64 [num_ids], negative where it has none:
        such rows stay, and so do those of tables that have no entry. Without `sources` tables and ids are the bundle's.
        """
        held = {ROWS: fused.weight, **(fused.state if moments else {})}
        for start in range(0, len(fused.weight), _FILL_ROWS):
            of_table, ids = fused.local_ids(start, min(start + _FILL_ROWS, len(fused.weight)))
            for number, spec in enumerate(fused.specs):
                if sources is not None and spec.name not in sources:
                    continue
                at = (of_table == number).nonzero()[:, 0]
                table, source = (spec.name, None) if sources is None else sources[spec.name]
                source = ids[at] if source is None else source[ids[at]]
                at, source = start + at[source >= 0], source[source >= 0]
                for name, values in held.items():
                    values[at.to(values.device)] = self.rows(table, source, name).to(values)


def part_name(table: str, number: int, name: str = ROWS) -> str:
    """Return the file of a part of a table's rows, or of the optimizer's state for them."""
    folder = "tables/" if name == ROWS else f"{TRAINING}tables/"
    return f"{folder}{quote(table, safe='')}-{number:05d}.safetensors"


def mapped_tensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file. SafetensorError or OSError where it cannot be read."""
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return mapped_tensors(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): {CURE}") from None


class BundleWriter:
    """Writes a bundle under `<path>.partial` and renames it to `path` in `finish`: a bundle is whole or absent. Rows of
    tables are stored as `rows` says.

    Raises ValueError where `path` exists, where another process writes it, and where the disk is full.
    """

    def __init__(self, path: Path, rows: RowFormat = "exact") -> None:
        self.path, self.row_format = path, rows
        self.directory = path.with_name(path.name + ".partial")
        self._tables: dict[str, dict[str, int]] = {}
        self._entries: dict[Path, dict[str, Any]] = {}  # of files whose checksum is known
        refuse_existing(path)
        with folder_errors(self.path, "bundle"):
            self._lock: int | None = lock_directory(self.directory)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def add_file(self, source: Path, name: str) -> None:
        """Copy a file."""
        with folder_errors(self.path, "bundle"):
            shutil.copyfile(source, self._place(name))

    def add_made(self, name: str, make: Callable[[Path], None]) -> None:
        """Have `make` write a file or a folder."""
        with folder_errors(self.path, "bundle"):
            make(self._place(name))

    def add_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file."""
        with folder_errors(self.path, "bundle"):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self._place(name))

    def add_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        with folder_errors(self.path, "bundle"):
            self._place(name).write_text(json.dumps(values, indent=1) + "\n")

    def add_table(self, table: str, num_ids: int, dim: int, rows: Mapping[str, Any]) -> None:
        """Write the rows of a table: `rows` has functions from ids int64 [n] to what they hold, [n, …], by name."""
        sample = {name: read(torch.zeros(1, dtype=torch.int64)) for name, read in rows.items()}
        part_rows = max(1, min(num_ids, PART_BYTES // max(1, sample[ROWS].nbytes)))
        for number in range(-(-num_ids // part_rows)):
            ids = torch.arange(number * part_rows, min((number + 1) * part_rows, num_ids))
            self.add_tensors(part_name(table, number), packed(rows[ROWS](ids), ROWS, self.row_format))
            state = {name: read(ids) for name, read in rows.items() if name != ROWS}
            if state:
                self.add_tensors(part_name(table, number, next(iter(state))), state)
        self._tables[table] = {"ids": num_ids, "dim": dim, "part_rows": part_rows}

    def finish(self, manifest: Mapping[str, Any]) -> Bundle:
        """Write the manifest, sync everything and rename."""
        with folder_errors(self.path, "bundle"):
            whole = self._write_manifest(manifest)
            sync(self.directory / MANIFEST)
            sync_folders(self.directory)
            put_in_place(self.directory, self.path)
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None
        return Bundle(self.path, json.loads(json.dumps(whole)))

    def preview(self, manifest: Mapping[str, Any]) -> Path:
        """Return the folder of the bundle as it is now, which can be opened until more is added."""
        with folder_errors(self.path, "bundle"):
            self._write_manifest(manifest)
        return self.directory

    def _write_manifest(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        path = self.directory / MANIFEST
        path.unlink(missing_ok=True)
        present = sorted(file for file in self.directory.rglob("*") if file.is_file())
        self._entries |= {file: file_entry(self.directory, file) for file in present if file not in self._entries}
        files = [self._entries[file] for file in present]
        small = self.row_format != "exact"
        whole = {
            "format": FORMAT,
            "version": VERSION if small else 1,  # earlier releases would take steps for rows
            **manifest,
            **({"rows": self.row_format} if small else {}),
            "tables": self._tables,
            "training": any(entry["file"].startswith(TRAINING) for entry in files),
            "files": files,
        }
        whole["xxh3"] = manifest_checksum(whole)
        path.write_text(manifest_text(whole))
        return whole

    def _place(self, name: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
