"""The base of `prepare --base`: a pack, or a bundle of a run that was trained on one, whose ids a new day continues.

Only what the day needs is read and verified: vocabularies, and the folder `increment/`. A first pack has no history
there; it is made from its shards, and from the rows of tasks that it left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.core.files import read_mapping
from gmeta.data.antm2c.tasks import OF_LOGS
from gmeta.data.events.days import EVENTS
from gmeta.data.events.settings import OF_EVENTS
from gmeta.data.layout import CURE, check_entry, checksum_file, verified_file
from gmeta.data.pack import TaskPack, manifest_checksum, open_pack
from gmeta.data.prepare.history import INCREMENT, TASKS, history_of_pack
from gmeta.data.prepare.settings import Settings, as_ids, settings_from_json
from gmeta.data.schema import (
    ENCODING,
    DataSchema,
    PackSchema,
    data_schema_from_json,
    load_data_schema,
    pack_schema_from_json,
)

CHAIN = "chain.json"
FIRST_INPUTS = "input_xxh3"
"""Setting in the manifest of a first pack: the checksums of its files."""
IN_BUNDLE = f"training/{INCREMENT}"
"""Where a bundle keeps what a pack has in `increment/`, with the pack's manifest."""

_FREE = {"out", "base", "input", "on_bad_rows", "memory_limit", "threads", "shard_mb"} | {
    "history_rows",
    "evict_after_days",
    "evict_below",
}
"""Settings that change nothing of what a pack of the base means."""


@dataclass(frozen=True)
class Base:
    """An open base, whose files are verified."""

    path: Path
    manifest: dict[str, Any]  # of its pack
    vocabularies: Path
    increment: Path | None  # the folder `increment/`, where it has one
    pack: TaskPack | None  # None where the base is a bundle
    schema: DataSchema
    pack_schema: PackSchema
    settings: Settings

    @property
    def day(self) -> int:
        """Return the day that this base makes: the one after its own."""
        return int(self.manifest.get("day", {}).get("number", 0)) + 1

    def chain(self) -> list[dict[str, Any]]:
        """Return the days so far: `number`, and `inputs`, the checksums of the day's files. The first one, 0, is left
        out where it was made of a named data set, or by gmeta before it noted them.
        """
        file = None if self.increment is None else self.increment / CHAIN
        if file is not None and file.exists():
            return list(read_mapping(file, CURE)["days"])
        found = self.manifest["settings"].get(FIRST_INPUTS)
        return [{"number": 0, "inputs": found}] if isinstance(found, list) else []

    def history(self, scratch: Path, rows: int) -> Path:
        """Return the folder of its history; that of a first pack is made in `scratch`, with `rows` of each task."""
        if self.increment is not None and (self.increment / TASKS).exists():
            return self.increment
        assert self.pack is not None, "a bundle has its history"
        history_of_pack(self.pack, scratch / "history_of_base", rows)
        return scratch / "history_of_base"


def open_base(config: PrepareConfig) -> Base:
    """Open `config.base`, and refuse settings that differ from its own.

    Raises ValueError for a base that is missing or damaged, with the file's name, that was not made of raw rows, or by
    an older encoding, and for settings or a schema that differ, by name.
    """
    path = Path(str(config.base))
    file = path / "manifest.json"
    found = read_mapping(file, CURE) if file.is_file() else {}
    base = _bundle(path, found) if found.get("format") == "gmeta-bundle" else _pack(path)
    if base.pack_schema.next_item and (base.increment is None or not (base.increment / EVENTS).exists()):
        raise ValueError(
            f"base {path} was made of events without times, or by an older gmeta: a later day's events go on from "
            "those that have times; prepare the events of all days anew"
        )
    if base.pack_schema.encoding != ENCODING:
        raise ValueError(
            f"base {path} has ids of encoding {base.pack_schema.encoding}, this gmeta makes {ENCODING}: prepare all "
            "days anew"
        )
    _refuse_other_settings(config, base)
    return base


def input_checksums(files: Sequence[Path]) -> dict[str, Path]:
    """Return the checksum of each input file that has bytes.

    It reads them once more than DuckDB does, at 3 GB/s where they are in memory, and first, so that DuckDB finds them
    there. Of 50 million rows, which `prepare` takes 70 s for, files have 1.3 GB.
    """
    return {checksum_file(file): file for file in files if file.stat().st_size}


def refuse_delivered(base: Base, files: Sequence[Path]) -> list[str]:
    """Return the checksums of input files. Raises ValueError where an earlier day of the base had one of them."""
    sums = input_checksums(files)
    for day in base.chain():
        for known in day["inputs"]:
            if known in sums:
                raise ValueError(
                    f"{sums[known]} was delivered already, with day {day['number']} of base {base.path}: leave it out"
                )
    return sorted(sums)


def write_chain(base: Base, folder: Path, inputs: Sequence[str]) -> None:
    """Write the days of the base, and this one."""
    days = [*base.chain(), {"number": base.day, "inputs": list(inputs)}]
    (folder / CHAIN).write_text(json.dumps({"days": days}, indent=1) + "\n")


def _pack(path: Path) -> Base:
    pack = open_pack(path)
    pack.vocabulary_files()  # verifies them
    entries = [entry for entry in pack.manifest["others"] if entry["file"].startswith(f"{INCREMENT}/")]
    for entry in entries:
        verified_file(path, entry)
    return _opened(path, pack.manifest, path / "vocab", path / INCREMENT if entries else None, pack)


def _bundle(path: Path, manifest: Mapping[str, Any]) -> Base:
    cure = "make the bundle again, or copy it again"
    if manifest.get("xxh3") != manifest_checksum(manifest):
        raise ValueError(f"{path / 'manifest.json'} is damaged (its checksum is not that of its content): {cure}")
    try:
        entries = list(manifest["files"])
        for entry in entries:
            check_entry(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'manifest.json'} is no manifest of a bundle ({error}): {cure}") from None
    if f"{IN_BUNDLE}/manifest.json" not in {entry["file"] for entry in entries}:
        raise ValueError(
            f"bundle {path} holds nothing that a pack could continue: make it with --training true while the pack "
            "of its run is in place, or give that pack as base"
        )
    for entry in entries:
        if entry["file"].startswith(("vocab/", f"{IN_BUNDLE}/")):
            verified_file(path, entry, cure)
    of_pack = read_mapping(path / IN_BUNDLE / "manifest.json", cure)
    return _opened(path, of_pack, path / "vocab", path / IN_BUNDLE, None)


def _opened(path: Path, manifest: dict[str, Any], vocab: Path, increment: Path | None, pack: TaskPack | None) -> Base:
    stored = manifest.get("settings", {})
    if not manifest.get("data_schema") or "split_query" not in stored:
        raise ValueError(f"base {path} was not made by `gmeta prepare`: only a pack of raw rows can be continued")
    return Base(
        path,
        manifest,
        vocab,
        increment,
        pack,
        data_schema_from_json(manifest["data_schema"]),
        pack_schema_from_json(manifest["schema"]),
        settings_from_json(stored),
    )


def _refuse_other_settings(config: PrepareConfig, base: Base) -> None:
    usual = {f.name: f.default for f in fields(PrepareConfig)}
    for key in ("dataset", "root"):
        if getattr(config, key) is not None:
            raise ValueError(f"{key} has no effect with base: name the day's files with --input")
    for key in OF_LOGS:
        if getattr(config, key) not in (None, []):
            raise ValueError(f"{key} has no effect with base: it is for --dataset antm2c; leave it out")
    next_item = base.pack_schema.next_item
    for key in OF_EVENTS:
        if getattr(config, key) not in (None, []) and not (next_item and key == "items"):
            raise ValueError(f"{key} has no effect with base: only a first pack of events asks for it")
    if next_item and config.evict_after_days is not None:
        raise ValueError("evict_after_days has no effect on a base of events: items of its catalogue keep their ids")
    if not config.input:
        raise ValueError("name the day's files with --input: a pack that continues a base is made of new rows")
    if config.schema is not None:
        schema = load_data_schema(config.schema)
        if config.label_threshold is not None:
            schema = replace(schema, label_threshold=float(config.label_threshold))
        elif schema.label_threshold is None:
            schema = replace(schema, label_threshold=base.schema.label_threshold)
        if lines := _difference(base.schema, schema):
            raise ValueError(
                f"{config.schema} differs from the schema of base {base.path}: {'; '.join(lines)}. Leave --schema out "
                "to continue the base with its own, or prepare all days anew"
            )
    theirs = {"label_threshold": base.schema.label_threshold, **asdict(base.settings)}
    elsewhere = _FREE | {"schema", "dataset", "root", *OF_EVENTS, *OF_LOGS}
    for key in (f.name for f in fields(PrepareConfig) if f.name not in elsewhere):
        given = getattr(config, key)
        if key in ("partitions", "roles"):
            given = as_ids(given) or None
        if given is not None and given not in (usual[key], theirs[key]):
            raise ValueError(
                f"{key} is {given!r}, and {theirs[key]!r} in base {base.path}: a pack that continues a base has its "
                f"settings; leave {key} out, or prepare all days anew"
            )
    if not next_item and base.settings.task_split == "column" and config.history_rows not in (usual["history_rows"], 0):
        raise ValueError(
            "history_rows has no effect with task_split column: a task's older rows may lie in another split"
        )


def _difference(ours: DataSchema, theirs: DataSchema) -> list[str]:
    """Say where two data schemas differ, column by column."""
    mine, other = asdict(ours), asdict(theirs)
    lines = []
    kinds = [("features", "feature"), ("numeric", "numeric column"), ("numeric_sequence", "numeric sequence")]
    kinds.append(("vector", "vector"))
    for kind, name in kinds:
        left, right = ({column["name"]: column for column in side.pop(kind)} for side in (mine, other))
        lines += [f"{name} {column!r} is missing" for column in left if column not in right]
        lines += [f"{name} {column!r} is new" for column in right if column not in left]
        lines += [
            f"{name} {column!r} has {key} {right[column][key]!r}, the base's has {value!r}"
            for column in left
            if column in right
            for key, value in left[column].items()
            if right[column][key] != value
        ]
        if not lines and list(left) != list(right):
            lines.append(f"the {name}s are in another order")
    return lines + [
        f"{key} is {other[key]!r}, the base's is {value!r}" for key, value in mine.items() if other[key] != value
    ]
