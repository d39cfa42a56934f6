"""Publish versions to a registry, move its pointer, remove what is old. Readers see a whole version or the one before.

A version's number is claimed by a conditional write, its manifest is written last, also conditionally, and the pointer
moves by compare-and-swap. So of several publishers, and whoever is killed, no one overwrites what another wrote.
"""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gmeta.data.schema import NumericColumn, PackSchema
from gmeta.data.schema_difference import schema_difference
from gmeta.runs.bundle import MANIFEST, TRAINING, Bundle, manifest_text, open_bundle, read_manifest, sealed
from gmeta.runs.delta import DELTA, delta_bytes, make_delta
from gmeta.runs.directory import read_schema
from gmeta.runs.registry import (
    ABANDONED,
    BEGUN,
    FORMAT,
    FORMAT_VERSION,
    POINTER,
    Pointer,
    Registry,
    VersionRecord,
    delta_folder,
    version_cure,
    version_folder,
)
from gmeta.runs.store import Folder, Listed, require_conditions

CLAIM = "claim.json"
VERDICT = "verdict.json"
"""The gate's whole verdict, beside the manifest of a version, for people alone: no reader fetches it."""
MAX_HISTORY = 100
MAX_DELTA_SHARE = 0.5
"""A delta is published where it is smaller than this share of the full version, with or without `training/`."""
_LEFT_BEHIND = timedelta(days=1)
"""What a publisher wrote nothing to for so long, `prune` removes."""


def publish(
    registry: Registry,
    bundle: Path,
    *,
    verdict: dict[str, Any] | None,
    metrics: dict[str, Any] | None = None,
    delivered: Sequence[str] | None = None,
    make_current: bool = True,
    cache: Path | None = None,
) -> int:
    """Store a bundle as the registry's next version, and make it current. Return its number.

    A version that its gate refused is stored, and never current. Neither becomes current what comes while the pointer
    is pinned. The manifest gets the gate's verdict. To go on where a publisher was killed, publish the same again.

    Args:
        registry: where to.
        bundle: folder of the bundle.
        verdict: the gate's document; None where none judged it: one that the bundle was stored with before is dropped.
        metrics: what the version scored on its own day, for the manifest; None: as the verdict says.
        delivered: checksums of the files that it and the versions before it were trained on, for the manifest.
        make_current: whether to move the pointer.
        cache: folder with versions fetched from an object store, where the delta's base is looked for; None fetches it.

    Raises:
        ValueError: the bundle is damaged, was delivered already, is of another model than the registry's, or was judged
            against another version than the current one; the store fails, or ignores conditions. Where another
            publisher moved the pointer meanwhile the version is stored, and the message says its number.
    """
    source = _checked(bundle)
    manifest = _told(source, verdict, metrics)
    if delivered is not None:
        manifest = sealed({**manifest, "delivered": list(delivered)})
    require_conditions(registry.store)
    pointer = registry.current()
    if pointer is not None:
        _require_same_model(registry, pointer, source)
        if not _follows(manifest, verdict, pointer, first=True):
            raise ValueError(
                f"version {source.id} was judged against another version than {pointer.version} ({pointer.id}), which "
                f"is current in {registry.url}: judge it against that"
            )
    number = _stored(registry, manifest, pointer)
    if number is None:
        number = _store(registry, bundle, manifest, pointer, verdict)
    if verdict is not None and not verdict["passed"]:
        return number
    if pointer is not None and pointer.version != number:
        try:
            _publish_delta(registry, pointer, number, bundle, manifest, cache)
        except ValueError as error:
            warnings.warn(f"version {number} has no delta, and is fetched in full: {error}", stacklevel=2)
    if make_current:
        _make_current(registry, number, manifest, verdict, pointer)
    return number


def _told(source: Bundle, verdict: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a bundle's manifest with what was found out about it."""
    told = {key: value for key, value in source.manifest.items() if key != "gate"}
    if verdict is not None:
        told.update(gate=_fitting(verdict, source), metrics=verdict.get("metrics"))
    if metrics is not None:
        told["metrics"] = dict(metrics)
    return sealed(told)


def _checked(bundle: Path) -> Bundle:
    """Return a bundle whose files are all verified, and are files of its own."""
    manifest = read_manifest(bundle)
    for entry in manifest["files"]:
        path = bundle / entry["file"]
        for part in (path, *path.parents):
            if part == bundle:
                break
            if part.is_symlink():
                raise ValueError(f"{part} is a symbolic link, which may change behind a version: put the file there")
    return open_bundle(bundle, training=manifest["training"])


def _fitting(verdict: Mapping[str, Any], source: Bundle) -> dict[str, Any]:
    if verdict.get("format") != "gmeta-gate" or not isinstance(verdict.get("passed"), bool):
        raise ValueError("the verdict is none of `gmeta gate`: give the JSON file that it wrote")
    if verdict.get("candidate") != source.id:
        raise ValueError(
            f"the verdict is of version {verdict.get('candidate')!r}, and {source.path} is {source.id!r}: give the "
            "verdict of this bundle"
        )
    # Its evaluation has half a megabyte, and all who look at a version read its manifest.
    return {key: value for key, value in verdict.items() if key != "evaluation"}


def _require_same_model(registry: Registry, pointer: Pointer, source: Bundle) -> None:
    """Raise ValueError with what differs, where the registry's current version is of another model."""
    current = registry.manifest(pointer.version)
    lines = [
        f"model is {source.manifest['model']['name']}, expected {current['model']['name']}"
        for _ in range(source.manifest["model"]["name"] != current["model"]["name"])
    ]
    with TemporaryDirectory(prefix="gmeta-") as folder:
        try:
            registry.store.download(version_folder(pointer.version) + "schema.json", Path(folder) / "schema.json")
        except FileNotFoundError:
            raise ValueError(
                f"version {pointer.version} of {registry.url} is damaged: its schema.json is missing; "
                f"{version_cure(pointer.version)}"
            ) from None
        before, _ = read_schema(Path(folder))
    ours, _ = read_schema(source.path)
    lines += schema_difference(_kind(before), _kind(ours))
    if lines:
        raise ValueError(
            f"{registry.url} is a registry of another model than {source.path}: {'; '.join(lines)}. Publish it to a "
            "registry of its own"
        )


def _kind(schema: PackSchema) -> PackSchema:
    """Return a schema without what a new day, or a full training, may change."""
    return replace(
        schema,
        features=tuple(replace(feature, num_ids=1) for feature in schema.features),
        numeric=tuple(NumericColumn(name=column.name) for column in schema.numeric),
        numeric_sequence=tuple(replace(column, mean=0.0, std=1.0, log=False) for column in schema.numeric_sequence),
        encoding=0,
    )


def _follows(
    manifest: Mapping[str, Any], verdict: Mapping[str, Any] | None, pointer: Pointer, *, first: bool = False
) -> bool:
    """Whether a version may take the place of the current one: its gate compared the two, or it was made of it.

    Without a verdict the version that is current when publishing begins, `first`, may be any.
    """
    if pointer.id == manifest["id"]:
        return True
    if verdict is not None and verdict.get("current") is not None:
        return bool(verdict["current"] == pointer.id)
    return first or manifest.get("parent") == pointer.id


def _stored(registry: Registry, manifest: Mapping[str, Any], pointer: Pointer | None) -> int | None:
    """Return the number of this very version where a publisher was killed before he moved the pointer; None where the
    registry does not have it. ValueError where it was delivered already.
    """
    for record in registry.versions():
        if record.id != manifest["id"]:
            continue
        served = pointer is not None and any(entry["version"] == record.number for entry in pointer.history)
        newer = pointer is None or record.number > pointer.version
        if record.manifest["xxh3"] == manifest["xxh3"] and newer and not served and not record.refused:
            return record.number
        cure = "train another" if record.refused else f"`gmeta registry rollback --to {record.number}` makes it current"
        raise ValueError(
            f"version {record.id} was delivered already, as number {record.number} of {registry.url}: {cure}"
        )
    return None


def _store(
    registry: Registry,
    bundle: Path,
    manifest: Mapping[str, Any],
    pointer: Pointer | None,
    verdict: Mapping[str, Any] | None,
) -> int:
    """Store a version under a number of its own, and return it. What was written is removed where this fails."""
    store = registry.store
    number = _claim(registry, str(manifest["id"]), pointer)
    folder = version_folder(number)
    try:
        for entry in manifest["files"]:
            store.upload(bundle / entry["file"], folder + entry["file"])
        if verdict is not None:
            store.create(folder + VERDICT, (json.dumps(verdict, indent=1) + "\n").encode())
        sizes = {listed.key: listed.size for listed in store.list(folder)}
        for entry in manifest["files"]:
            if folder + MANIFEST not in sizes and sizes.get(folder + entry["file"]) != entry["bytes"]:
                raise ValueError(f"{registry.url}/{folder}{entry['file']} is not what was written: publish again")
        if not store.create(folder + MANIFEST, manifest_text(manifest).encode()):
            raise ValueError(
                f"version {manifest['id']} is published by another process too, which took over: `gmeta registry list` "
                "shows what it did"
            )
    except ValueError:
        with suppress(ValueError):  # it may fail for the same reason, of which is to be told
            _give_up(registry, number)
        raise
    return number


def _claim(registry: Registry, version_id: str, pointer: Pointer | None) -> int:
    """Claim the next number, and give up older claims of the same version: their publishers died, or lose."""
    claim = {"id": version_id, "at": _now(), "token": secrets.token_hex(8)}
    served = [] if pointer is None else [entry["version"] for entry in pointer.history]  # perhaps removed by hand
    number = max([*registry.keys(), *served], default=0) + 1
    while not registry.store.create(version_folder(number) + CLAIM, json.dumps(claim).encode()):
        number += 1
    for other, listed in registry.keys().items():
        if other >= number:
            continue
        held = registry.store.read(version_folder(other) + CLAIM)
        same = held is not None and _value(held.data, "id") == version_id
        if same and not _give_up(registry, other, listed):
            _give_up(registry, number)
            raise ValueError(
                f"version {version_id} was delivered already, as number {other} of {registry.url}: `gmeta registry "
                f"list` shows it; where it is damaged, {version_cure(other)}"
            )
    return number


def _give_up(registry: Registry, number: int, listed: Sequence[Listed] | None = None) -> bool:
    """See to it that no version will have this number, and remove its files. Return False where it has one already."""
    folder = version_folder(number)
    document = {"format": ABANDONED, "at": _now(), "token": secrets.token_hex(8)}
    if not registry.store.create(folder + MANIFEST, json.dumps(document).encode()):
        held = registry.store.read(folder + MANIFEST)
        if held is not None and _value(held.data, "format") != ABANDONED:
            return False
    for entry in registry.store.list(folder) if listed is None else listed:
        if entry.key not in (folder + MANIFEST, folder + CLAIM):
            registry.store.delete(entry.key)
    return True


def _value(data: bytes, key: str) -> object:
    """Return a value of a small JSON file; None where it is damaged."""
    try:
        values = json.loads(data)
    except ValueError:
        return None
    return values.get(key) if isinstance(values, dict) else None


def _publish_delta(
    registry: Registry, pointer: Pointer, number: int, bundle: Path, manifest: Mapping[str, Any], cache: Path | None
) -> None:
    """Add what makes the version of the current one, where that is much smaller."""
    store, folder = registry.store, delta_folder(number)
    if store.read(folder + DELTA) is not None:
        return
    with TemporaryDirectory(prefix="gmeta-") as scratch:
        if isinstance(store, Folder):
            base = store.path / version_folder(pointer.version)
        else:
            base = registry.fetch(pointer.version, cache or Path(scratch) / "cache")
        out = Path(scratch) / "delta"
        document = make_delta(base, bundle, out, manifest=manifest, base_version=pointer.version)
        if not any(_is_small(document, manifest, training=training) for training in (False, True)):
            return
        for entry in document["files"]:
            store.upload(out / entry["file"], folder + entry["file"])
        store.upload(out / DELTA, folder + DELTA)  # last: the delta exists once this does


def _is_small(document: Mapping[str, Any], manifest: Mapping[str, Any], *, training: bool) -> bool:
    """Whether a delta is worth its place for readers that serve, or for those that train on: tasks' older rows lie in
    `training/` and are nearly all new each day, so that a delta may be of use to the former alone.
    """
    full = sum(entry["bytes"] for entry in manifest["files"] if training or not entry["file"].startswith(TRAINING))
    return bool(delta_bytes(document, training=training) < MAX_DELTA_SHARE * full)


def _make_current(
    registry: Registry,
    number: int,
    manifest: Mapping[str, Any],
    verdict: Mapping[str, Any] | None,
    pointer: Pointer | None,
) -> None:
    while pointer is None or not pointer.pinned:
        if _move(registry, pointer, number, manifest, by="publish"):
            return
        before, pointer = pointer, registry.current()
        moved = pointer is not None and (before is None or pointer.version != before.version)
        if pointer is not None and moved and not _follows(manifest, verdict, pointer):
            raise ValueError(
                f"version {manifest['id']} is stored as number {number} and is not current: another publisher made "
                f"version {pointer.version} ({pointer.id}) current meanwhile, which it was not judged against. Judge "
                f"it again, or make it current with `gmeta registry rollback --to {number}`"
            )


def _move(
    registry: Registry,
    pointer: Pointer | None,
    number: int,
    manifest: Mapping[str, Any],
    *,
    by: str,
    pinned: bool = False,
) -> bool:
    """Point at a version, unless somebody changed the pointer since it was read: then return False."""
    if pointer is not None and number in pointer.removed:
        raise ValueError(f"version {number} of {registry.url} is being removed: name another")
    names = {"version": number, "id": manifest["id"]}
    history = [] if pointer is None else list(pointer.history)
    if not history or history[-1]["version"] != number:
        history.append({**names, "at": _now(), "by": by})
    document = {**names, "xxh3": manifest["xxh3"], "pinned": pinned, "history": history[-MAX_HISTORY:]}
    return _swap(registry, pointer, {**document, "removed": [] if pointer is None else list(pointer.removed)})


def _swap(registry: Registry, pointer: Pointer | None, document: Mapping[str, Any]) -> bool:
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **document, "token": secrets.token_hex(8)}
    data = (json.dumps(whole, indent=1) + "\n").encode()
    store = registry.store
    moved = store.create(POINTER, data) if pointer is None else store.replace(POINTER, data, pointer.etag)
    if moved:
        with suppress(ValueError):  # the pointer did move; the next move writes it
            store.create(BEGUN, data)
    return moved


def roll_back(registry: Registry, to: int | None = None) -> int:
    """Make the version current that was current before this one, or the one named. Return its number.

    Where the pointer is missing, naming a version makes one. ValueError where there is no such version, where its gate
    refused it, where its files are missing or of another size, and where the pointer is pinned.
    """
    while True:
        pointer = _current(registry) if to is None else registry.pointer()
        if pointer is not None and pointer.pinned:
            raise ValueError(
                f"version {pointer.version} of {registry.url} is pinned: `gmeta registry unpin` first, or pin another"
            )
        number = to if to is not None or pointer is None else _previous(registry, pointer)
        assert number is not None
        if _move(registry, pointer, number, _servable(registry, number), by="rollback"):
            return number


def _previous(registry: Registry, pointer: Pointer) -> int:
    """Return what was current before the current version was published, so that rolling back twice goes back two."""
    history = list(pointer.history)
    while history and (history[-1]["version"] != pointer.version or history[-1]["by"] == "rollback"):
        history.pop()
    stored = {record.number for record in registry.versions() if not record.damage} - set(pointer.removed)
    for entry in reversed(history[:-1]):
        if entry["version"] != pointer.version and entry["version"] in stored:
            return int(entry["version"])
    raise ValueError(f"{registry.url} has no version that was current before: name one, `rollback --to N`")


def pin(registry: Registry, number: int | None = None) -> int:
    """Make a version current, by default the one that is, and hold the pointer there. Return its number.

    Where the pointer is missing, naming a version makes one. ValueError as of `roll_back`.
    """
    while True:
        pointer = _current(registry) if number is None else registry.pointer()
        wanted = number if number is not None or pointer is None else pointer.version
        assert wanted is not None
        if _move(registry, pointer, wanted, _servable(registry, wanted), by="pin", pinned=True):
            return wanted


def unpin(registry: Registry) -> int:
    """Let the pointer move again. Return the current version's number."""
    while True:
        pointer = _current(registry)
        if _move(registry, pointer, pointer.version, {"id": pointer.id, "xxh3": pointer.xxh3}, by="unpin"):
            return pointer.version


def _current(registry: Registry) -> Pointer:
    pointer = registry.current()
    if pointer is None:
        raise ValueError(
            f"{registry.url} has no current version: `gmeta publish` makes one, and of a stored version `gmeta "
            "registry rollback --to N`"
        )
    return pointer


def _servable(registry: Registry, number: int) -> dict[str, Any]:
    manifest = registry.manifest(number)
    if (gate := manifest.get("gate")) is not None and not gate["passed"]:
        raise ValueError(f"version {number} of {registry.url} was refused by its gate: it cannot be current")
    sizes = {listed.key: listed.size for listed in registry.store.list(version_folder(number))}
    for entry in manifest["files"]:
        size = sizes.get(version_folder(number) + entry["file"])
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, its manifest says {entry['bytes']}"
            raise ValueError(
                f"version {number} of {registry.url} is damaged: its {entry['file']} {found}; name another "
                f"version, or {version_cure(number)}"
            )
    return manifest


def prune_versions(registry: Registry, keep: int) -> list[int]:
    """Remove all but the newest `keep` versions, and the current one; return the numbers.

    A version's delta goes with it. So does what publishers left behind a day ago or earlier. Numbers are never used
    again. Refused and damaged versions stay while they are newer than the oldest that stays.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: must be at least 1")
    while True:
        pointer = _current(registry)
        gone = _removable(registry.versions(), keep, pointer)
        # Marked first: a rollback to one of them, decided at this moment, then finds another pointer.
        marked = {
            "version": pointer.version,
            "id": pointer.id,
            "xxh3": pointer.xxh3,
            "pinned": pointer.pinned,
            "history": list(pointer.history),
            "removed": gone,
        }
        if _swap(registry, pointer, marked):
            break
    for number in gone:
        listed = registry.store.list(version_folder(number))
        for entry in sorted(listed, key=lambda entry: not entry.key.endswith("/" + MANIFEST)):
            if entry.key != version_folder(number) + CLAIM:
                registry.store.delete(entry.key)
    _remove_left_behind(registry)
    return gone


def _removable(records: Sequence[VersionRecord], keep: int, pointer: Pointer) -> list[int]:
    """Return what is to go. What is marked goes in any case: another `prune` is at it, or was killed at it."""
    marked = set(pointer.removed)
    sound = {record.number for record in records if not record.refused and not record.damage}
    newest = sorted(sound - marked)[-keep:]
    oldest = min(newest, default=0)
    stays = {*newest, pointer.version}
    return [
        record.number
        for record in records
        if record.number not in stays and (record.number in marked or record.number < oldest or record.number in sound)
    ]


def _remove_left_behind(registry: Registry) -> None:
    for number, listed in registry.keys().items():
        whole = any(entry.key == version_folder(number) + MANIFEST for entry in listed)
        if not whole and max(entry.modified for entry in listed) < datetime.now(timezone.utc) - _LEFT_BEHIND:
            _give_up(registry, number, listed)
    of_deltas = registry.store.list("deltas/")
    stored = {record.number for record in registry.versions()}  # read later: a version comes before its delta
    for entry in of_deltas:
        number_of = re.match(r"deltas/(\d+)/", entry.key)
        if number_of and int(number_of[1]) not in stored:
            registry.store.delete(entry.key)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
