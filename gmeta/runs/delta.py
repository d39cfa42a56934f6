"""A delta: what makes one bundle of another, `base`, bit for bit.

    delta.json      base and result by id and checksum, how each file of the result is made, and what is in here
    result.json     the manifest of the result
    rows/           rows of tables, of their moments and of vocabularies that are new or changed, in the result's ids
    files/          other files that differ, whole

Rows are aligned by the raw values of ids, so that numbers may change; without a vocabulary they are aligned by id. Of a
tombstone zeros are expected. One part of a table is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gmeta.core.files import read_mapping
from gmeta.data.identity import ids_of_values, vocabulary_file
from gmeta.data.layout import check_entry, checksum_file, verified_file
from gmeta.data.pack import file_entry, manifest_checksum
from gmeta.data.schema import OOV
from gmeta.runs.bundle import (
    MANIFEST,
    ROWS,
    TRAINING,
    Bundle,
    check_manifest,
    manifest_text,
    mapped_tensors,
    part_name,
    read_manifest,
    sealed,
    without_training,
)
from gmeta.runs.folders import making_folder

FORMAT, VERSION = "gmeta-delta", 1
DELTA, RESULT = "delta.json", "result.json"
CURE = "make the delta again, or take the full version"
_CHANGED, _WHOLE = "rows/", "files/"
_POSITION = "__position"
_GONE = -1
"""Source of an id that the base does not have, and of tombstones: zeros are expected there."""


def make_delta(
    base: Path,
    result: Path,
    out: Path,
    *,
    training: bool = True,
    manifest: Mapping[str, Any] | None = None,
    base_version: int | None = None,
) -> dict[str, Any]:
    """Write the delta from one bundle to another, and return what delta.json holds.

    Args:
        base: folder of the bundle that a consumer has.
        result: folder of the bundle that he is to have.
        out: folder to make.
        training: whether the result has the `training/` of the bundle.
        manifest: the manifest that the result is to have, where it is not the one that lies in its folder.
        base_version: the base's number in its registry.

    Raises:
        ValueError: a bundle is damaged, `out` exists, or the disk refuses.
    """
    old = Bundle(base, read_manifest(base))
    wanted = dict(manifest) if manifest is not None else read_manifest(result)
    text = manifest_text(wanted) if manifest is not None else (result / MANIFEST).read_text(encoding="utf-8")
    if not training:
        wanted = without_training(wanted)
        text = manifest_text(wanted)
    with making_folder(out, "delta") as folder:
        (folder / RESULT).write_text(text, encoding="utf-8")
        writer = _Writer(old, result, wanted, folder)
        how = {entry["file"]: writer.add(entry) for entry in wanted["files"]}
        document = sealed(
            {
                "format": FORMAT,
                "version": VERSION,
                "base": {**_names(old.manifest), "version": base_version},
                "result": _names(wanted),
                "training": bool(wanted["training"]),
                "how": how,
                "tables": writer.counts,
                "files": [file_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()],
            }
        )
        (folder / DELTA).write_text(manifest_text(document), encoding="utf-8")
    return document


def _names(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a version's id, and its checksums with and without `training/`."""
    return {"id": manifest["id"], "xxh3": manifest["xxh3"], "without_training": without_training(manifest)["xxh3"]}


def apply_delta(base: Path, delta: Path, out: Path, *, training: bool = True) -> Bundle:
    """Make the bundle `out` of `base` and a delta: the same bytes as the full version has.

    Without `training` the result has no `training/`, and what the delta holds of it is not read.
    ValueError where the delta goes on from another version, where it or the base is damaged, and where the disk
    refuses.
    """
    document = read_delta(delta)
    training = training and document["training"]
    for entry in document["files"]:
        if training or not is_of_training(entry["file"]):
            verified_file(delta, entry, CURE)
    manifest = read_manifest(base)
    expected = document["base"]
    if checksum_of(_names(manifest), training) != checksum_of(expected, training):
        raise ValueError(
            f"{delta} goes on from version {expected['id']}, and {base} is version {manifest['id']}, or another bundle "
            "of it: give that version, or take the full one"
        )
    text = (delta / RESULT).read_text(encoding="utf-8")
    wanted = check_manifest(read_mapping(delta / RESULT, CURE), str(delta / RESULT))
    if not training:
        wanted = without_training(wanted)
        text = manifest_text(wanted) if document["training"] else text
    if wanted["xxh3"] != checksum_of(document["result"], training):
        raise ValueError(f"{delta / RESULT} is not the manifest of version {document['result']['id']}: {CURE}")
    with making_folder(out, "bundle") as folder:
        _apply(Bundle(base, manifest), delta, document["how"], wanted, folder)
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return Bundle(out, wanted)


def checksum_of(names: Mapping[str, Any], training: bool) -> str:
    """Return the checksum of a version's manifest, as delta.json names it, with or without `training/`."""
    return str(names["xxh3" if training else "without_training"])


def is_of_training(file: str) -> bool:
    """Whether a file of a delta belongs to the result's `training/`."""
    return file.startswith((_CHANGED + TRAINING, _WHOLE + TRAINING))


def read_delta(delta: Path) -> dict[str, Any]:
    """Return what delta.json holds. ValueError where it is missing, damaged, or of a newer format."""
    if not (delta / DELTA).exists():
        raise ValueError(f"{delta} is no delta (it has no {DELTA}): give the folder that `gmeta delta` made")
    return check_delta(read_mapping(delta / DELTA, CURE), str(delta / DELTA))


def check_delta(document: dict[str, Any], file: str) -> dict[str, Any]:
    """Return what a sound delta.json holds. ValueError names `file`, where it was read."""
    if document.get("format") != FORMAT:
        raise ValueError(f"{file} is of format {document.get('format')!r}, expected {FORMAT!r}: give a delta")
    version = document.get("version")
    if type(version) is not int or version > VERSION:
        raise ValueError(f"{file} is of format {version}; this gmeta reads up to {VERSION}: upgrade")
    if document.get("xxh3") != manifest_checksum(document):
        raise ValueError(f"{file} is damaged (its checksum is not that of its content): {CURE}")
    for entry in document["files"]:
        check_entry(entry)
    return document


@dataclass(frozen=True)
class _Part:
    """One file of a table: its rows, or the optimizer's state for them. `ids` are the result's."""

    table: str
    name: str
    ids: range


def _parts(manifest: Mapping[str, Any]) -> dict[str, _Part]:
    """Return the files of a bundle's tables."""
    found = {}
    for table, entry in manifest["tables"].items():
        size, num_ids = entry["part_rows"], entry["ids"]
        for number in range(-(-num_ids // size)):
            ids = range(number * size, min((number + 1) * size, num_ids))
            for name in (ROWS, TRAINING):
                found[part_name(table, number, name)] = _Part(table, name, ids)
    return found


class _Expected:
    """What the rows of the result would be if nothing had changed since the base."""

    def __init__(self, base: Bundle, vocabularies: Path) -> None:
        self._base = base
        self._vocabularies = vocabularies
        self._sources: tuple[str, Tensor] = ("", torch.empty(0))

    def rows(self, part: _Part, names: list[str]) -> dict[str, Tensor]:
        """Return them by name, each [len(part.ids), …]."""
        if self._sources[0] != part.table:  # parts come table by table
            self._sources = (part.table, self._align(part.table))
        known = self._sources[1]
        source = torch.full((len(part.ids),), _GONE)
        here = known[part.ids.start : part.ids.stop]
        source[: len(here)] = here
        out = {}
        for name in names:
            out[name] = self._base.rows(part.table, source.clamp(min=0), name)
            out[name][source < 0] = 0
        return out

    def _align(self, table: str) -> Tensor:
        """Return for the result's ids the base's of the same raw value, or _GONE; int64 [ids that have a value]."""
        num_ids = self._base.manifest["tables"][table]["ids"]
        files = [vocabulary_file(folder, table) for folder in (self._base.path / "vocab", self._vocabularies)]
        if not all(file.exists() for file in files):  # hashed
            return torch.arange(num_ids)
        known, asked = (_read_table(file)["value"].combine_chunks() for file in files)
        if known.type != asked.type:
            return torch.tensor([OOV])
        found = ids_of_values(asked, known, _GONE)
        return torch.from_numpy(np.where(found < num_ids, found, _GONE))


class _Writer:
    """Adds to a delta what makes each file of the result."""

    def __init__(self, base: Bundle, result: Path, manifest: Mapping[str, Any], out: Path) -> None:
        self._base = base
        self._result = result
        self._out = out
        self._old = {entry["file"]: entry for entry in base.manifest["files"]}
        self._old_parts = _parts(base.manifest)
        self._parts = _parts(manifest)
        self._expected = _Expected(base, result / "vocab")
        self.counts: dict[str, dict[str, int]] = {}

    def add(self, entry: Mapping[str, Any]) -> str:
        """Add a file, and return how it is made: `same`, by `rows`, of `values` of a vocabulary, or `whole`."""
        name = entry["file"]
        path = verified_file(self._result, entry)
        part = self._parts.get(name)
        if part is not None and part.name == ROWS:
            self.counts.setdefault(part.table, {"changed": 0, "ids": 0})["ids"] += len(part.ids)
        if self._old.get(name, {}).get("xxh3") == entry["xxh3"]:
            return "same"
        if part is not None and self._add_rows(path, part, self._out / _CHANGED / name):
            return "rows"
        if (
            name.startswith("vocab/")
            and name.endswith(".parquet")
            and name in self._old
            and self._add_values(path, name, entry)
        ):
            return "values"
        self._place(self._out / _WHOLE / name)
        shutil.copyfile(path, self._out / _WHOLE / name)
        return "whole"

    def _add_rows(self, path: Path, part: _Part, out: Path) -> bool:
        """Write the rows of a part that differ. Return False where the base's are of another kind."""
        first = part_name(part.table, 0, part.name)
        if first not in self._old:
            return False
        found, before = mapped_tensors(path), mapped_tensors(self._base.path / first)
        if {n: (t.dtype, t.shape[1:]) for n, t in found.items()} != {
            n: (t.dtype, t.shape[1:]) for n, t in before.items()
        }:
            return False
        expected = self._expected.rows(part, list(found))
        differs = torch.zeros(len(part.ids), dtype=torch.bool)
        for name, values in found.items():
            differs |= (_bits(values) != _bits(expected[name])).any(1)
        at = differs.nonzero()[:, 0]
        if part.name == ROWS:
            self.counts[part.table]["changed"] += len(at)
        if len(at):
            self._place(out)
            save_file({"ids": at + part.ids.start, **{name: values[at] for name, values in found.items()}}, out)
        return True

    def _add_values(self, path: Path, name: str, entry: Mapping[str, Any]) -> bool:
        """Write the rows of a vocabulary that differ. Return False where they do not give the same bytes, or are no
        fewer.
        """
        old = _read_table(self._base.path / name)
        changes = _changed_values(old, _read_table(path))
        if changes is None:
            return False
        out, trial = self._out / _CHANGED / name, self._out / "trial"
        self._place(out)
        pq.write_table(changes, out)
        pq.write_table(_with_changes(old, changes), trial)
        good = bool(checksum_file(trial) == entry["xxh3"] and out.stat().st_size < entry["bytes"])
        trial.unlink()
        if not good:
            out.unlink()
        return good

    @staticmethod
    def _place(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)


def _apply(base: Bundle, delta: Path, how: Mapping[str, str], manifest: Mapping[str, Any], out: Path) -> None:
    """Write the files of the result, vocabularies first: rows are aligned by them."""
    parts = _parts(manifest)
    expected = _Expected(base, out / "vocab")
    for entry in sorted(manifest["files"], key=lambda entry: (not entry["file"].startswith("vocab/"), entry["file"])):
        name = entry["file"]
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            match how.get(name):
                case "same":
                    shutil.copyfile(base.path / name, target)
                case "whole":
                    shutil.copyfile(delta / _WHOLE / name, target)
                case "values":
                    old, changes = _read_table(base.path / name), _read_table(delta / _CHANGED / name)
                    pq.write_table(_with_changes(old, changes), target)
                case "rows":
                    _write_rows(base, expected, parts[name], delta / _CHANGED / name, target)
                case other:
                    raise ValueError(f"{delta / DELTA} says {other!r} of {name}: {CURE}")
        except (FileNotFoundError, KeyError, IndexError, SafetensorError, pa.ArrowException) as error:
            raise ValueError(f"{name} cannot be made of {base.path} and {delta} ({error}): {CURE}") from None
        verified_file(out, entry, f"{base.path} or {delta} is damaged; take the full version")


def _write_rows(base: Bundle, expected: _Expected, part: _Part, changes: Path, target: Path) -> None:
    names = list(mapped_tensors(base.path / part_name(part.table, 0, part.name)))
    rows = expected.rows(part, names)
    if changes.exists():
        changed = mapped_tensors(changes)
        at = changed.pop("ids") - part.ids.start
        for name, values in changed.items():
            rows[name][at] = values
    save_file(rows, target)


def _bits(values: Tensor) -> Tensor:
    """Return rows as bytes, uint8 [n, …]: of two zeros or two nan the bits count."""
    rows = values.contiguous().reshape(len(values), -1)
    return rows.view(torch.uint8)


def _read_table(file: Path) -> pa.Table:
    return pq.read_table(file)


def _changed_values(old: pa.Table, new: pa.Table) -> pa.Table | None:
    """Return the rows of a table that are new or changed, with their positions; None where it did not just grow."""
    if not old.schema.equals(new.schema, check_metadata=True) or len(new) < len(old):
        return None
    differs = np.ones(len(new), dtype=bool)
    differs[: len(old)] = False
    for name in old.column_names:
        before, after = old[name], new[name].slice(0, len(old))
        try:
            equal = pc.fill_null(pc.equal(before, after), False)
        except pa.ArrowNotImplementedError:
            return None
        both_null = pc.and_(pc.is_null(before), pc.is_null(after))
        differs[: len(old)] |= ~pc.or_(equal, both_null).to_numpy()
    positions = pa.array(differs.nonzero()[0])
    return new.take(positions).append_column(_POSITION, positions)


def _with_changes(old: pa.Table, changes: pa.Table) -> pa.Table:
    """Return a table with changed rows in their positions, and new ones behind."""
    positions = changes[_POSITION].to_numpy()
    at = np.arange(max(len(old), int(positions.max(initial=-1)) + 1))
    at[positions] = len(old) + np.arange(len(positions))
    return pa.concat_tables([old, changes.drop_columns([_POSITION])]).take(pa.array(at)).combine_chunks()


def delta_bytes(document: Mapping[str, Any], *, training: bool = True) -> int:
    """Return how many bytes a consumer fetches, with or without what belongs to `training/`."""
    sizes = [entry["bytes"] for entry in document["files"] if training or not is_of_training(entry["file"])]
    return int(sum(sizes)) + len(manifest_text(document))
