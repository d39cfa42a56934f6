"""A registry: the versions of a model, and a pointer to the one that serves. A folder, or a prefix of an object store.

    versions/<n>/   a bundle, immutable. It exists once its manifest does, which is written last.
    deltas/<n>/     what makes it of the version that was current before (see `gmeta.runs.delta`)
    current.json    the pointer, replaced by compare-and-swap
    begun.json      says that there was a pointer: where it is missing since, it was lost

This is what readers need; `gmeta.delivery.registry` publishes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gmeta.core.files import is_url, make_folder
from gmeta.data.layout import verified_file
from gmeta.runs.bundle import MANIFEST, check_manifest, manifest_text, read_manifest, without_training
from gmeta.runs.delta import DELTA, apply_delta, check_delta, checksum_of, delta_bytes, is_of_training
from gmeta.runs.folders import making_folder, waiting_lock
from gmeta.runs.store import Listed, Store, open_store

CACHE = "~/.cache/gmeta"
"""Folder of fetched versions, where none is named."""
FORMAT, FORMAT_VERSION = "gmeta-registry", 1
POINTER = "current.json"
BEGUN = "begun.json"
ABANDONED = "gmeta-abandoned"
"""Format of a manifest that stands where no version will ever be: its publisher gave up, or was given up."""
_CURE = "fetch it again; where that does not help, restore the version's files"
_POINTER_CURE = "restore it, or remove it and make another with `gmeta registry rollback --to N`"


@dataclass(frozen=True)
class Pointer:
    """Which version serves. `etag` is the state of the pointer that a change to it compares."""

    version: int
    id: str
    xxh3: str  # of the version's manifest
    pinned: bool
    history: tuple[dict[str, Any], ...]  # version, id, at, by; the newest last
    removed: tuple[int, ...]  # versions that are being removed, or were
    etag: str


@dataclass(frozen=True)
class VersionRecord:
    """A version that is stored. `created` is when the store got its manifest.

    Where the manifest cannot be read, `damage` says why, and the manifest is empty.
    """

    number: int
    manifest: dict[str, Any]
    created: datetime
    damage: str = ""

    @property
    def id(self) -> str:
        """Return the version's id: a run's, and the step; nothing where it is damaged."""
        return str(self.manifest.get("id", ""))

    @property
    def bytes(self) -> int:
        """Return the size of its files; 0 where it is damaged."""
        return sum(entry["bytes"] for entry in self.manifest.get("files", ()))

    @property
    def refused(self) -> bool:
        """Return whether its gate refused it."""
        gate = self.manifest.get("gate")
        return gate is not None and not gate["passed"]


def open_registry(url: str) -> Registry:
    """Return the registry at a folder's path or at a URL of an object store. It may be empty. ValueError for a URL that
    is none, and where obstore is not installed.
    """
    return Registry(open_store(str(url)))


def fetch_named(name: str, cache: Path) -> Path | None:
    """Return a folder with the version `REGISTRY/current` or `REGISTRY/<n>`, to serve; None where `name` is no such
    name. It has no `training/`. ValueError where the registry has no such version.
    """
    url, _, which = name.rpartition("/")
    if not url or not (which == "current" or which.isdecimal()):
        return None
    if not is_url(url) and (Path(name).exists() or not any((Path(url) / key).exists() for key in (POINTER, BEGUN))):
        return None
    registry = open_registry(url)
    if which != "current":
        return registry.fetch(int(which), cache, training=False)
    pointer = registry.current()
    if pointer is None:
        raise ValueError(f"{url} has no current version: `gmeta publish` makes one")
    return registry.fetch(pointer.version, cache, training=False)


def version_folder(version: int) -> str:
    """Return the keys' prefix of a version."""
    return f"versions/{version}/"


def version_cure(version: int) -> str:
    """Return what to do about a version that is damaged."""
    return f"restore its files, or remove versions/{version} (where it is current, after `gmeta registry rollback`)"


def delta_folder(version: int) -> str:
    """Return the keys' prefix of the delta that leads to a version."""
    return f"deltas/{version}/"


@dataclass(frozen=True)
class Registry:
    """The reader's side. ValueError for what is missing, damaged, of a newer gmeta, or cannot be reached."""

    store: Store

    @property
    def url(self) -> str:
        """Return the folder's path, or the URL."""
        return self.store.url

    def current(self) -> Pointer | None:
        """Return which version serves; None where none was made current yet. ValueError where the pointer was lost."""
        pointer = self.pointer()
        if pointer is not None or self.store.read(BEGUN) is None:
            return pointer
        if (pointer := self.pointer()) is not None:  # made between the two
            return pointer
        raise ValueError(
            f"{self.url}/{POINTER} is missing, and was there: restore it, or make another with `gmeta registry "
            "rollback --to N`; `gmeta registry list` shows the versions"
        )

    def pointer(self) -> Pointer | None:
        """Return the pointer; None where there is none, lost or not yet made."""
        held = self.store.read(POINTER)
        if held is None:
            return None
        where = f"{self.url}/{POINTER}"
        values = _mapping(held.data, where, _POINTER_CURE)
        if values.get("format") != FORMAT:
            raise ValueError(f"{where} is of format {values.get('format')!r}, expected {FORMAT!r}: give a registry")
        known = values.get("format_version")
        if type(known) is not int or known > FORMAT_VERSION:
            raise ValueError(f"{where} is of format {known}; this gmeta reads up to {FORMAT_VERSION}: upgrade")
        try:
            return Pointer(
                int(values["version"]),
                str(values["id"]),
                str(values["xxh3"]),
                bool(values["pinned"]),
                tuple(
                    {**entry, "version": int(entry["version"]), "by": str(entry["by"])} for entry in values["history"]
                ),
                tuple(int(number) for number in values["removed"]),
                held.tag,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is damaged ({error!r}): {_POINTER_CURE}") from None

    def manifest(self, version: int) -> dict[str, Any]:
        """Return the manifest of a version."""
        held = self.store.read(version_folder(version) + MANIFEST)
        found = None if held is None else self._checked(version, held.data)
        if found is None:
            raise ValueError(f"{self.url} has no version {version}: `gmeta registry list` shows those that it has")
        return found

    def _checked(self, version: int, data: bytes) -> dict[str, Any] | None:
        """Return what a version's manifest says; None where none will ever be there. ValueError where it is damaged."""
        where, cure = f"{self.url}/{version_folder(version)}{MANIFEST}", version_cure(version)
        values = _mapping(data, where, cure)
        return None if values.get("format") == ABANDONED else check_manifest(values, where, cure)

    def versions(self) -> list[VersionRecord]:
        """Return the versions that are stored in the order of their numbers, those that were refused or damaged too."""
        found = []
        for number, listed in self.keys().items():
            manifest = next((entry for entry in listed if entry.key == version_folder(number) + MANIFEST), None)
            held = None if manifest is None else self.store.read(manifest.key)
            if manifest is None or held is None:
                continue
            try:
                values = self._checked(number, held.data)
            except ValueError as error:
                found.append(VersionRecord(number, {}, manifest.modified, str(error)))
                continue
            if values is not None:
                found.append(VersionRecord(number, values, manifest.modified))
        return found

    def keys(self) -> dict[int, list[Listed]]:
        """Return the keys below versions/ by number, in its order."""
        found: dict[int, list[Listed]] = {}
        for listed in self.store.list("versions/"):
            if number := re.match(r"versions/(\d+)/", listed.key):
                found.setdefault(int(number[1]), []).append(listed)
        return dict(sorted(found.items()))

    def fetch(self, version: int, cache: Path, *, training: bool = True) -> Path:
        """Return a folder of the cache with this version, verified; without `training` it has no `training/`.

        Of a version that the cache has, deltas make the new one where they are all there and smaller; else the full
        version comes. Several processes may share a cache. A folder of it is whole or absent, and is named by the
        checksum of its manifest.
        """
        make_folder("cache", str(cache))
        manifest = self.manifest(version)
        wanted = manifest if training else without_training(manifest)
        home = cache / str(wanted["xxh3"])
        if not _is_sound(home, wanted):
            chain = self._chain(version, wanted, cache, training)
            try:
                for number, document in chain:
                    self._follow(number, document, cache, training)
            except ValueError:  # damaged or removed meanwhile: what deltas do not give is asked for in full
                chain = []
            if not chain:
                _cache(home, wanted, lambda out: self._download(version, wanted, out))
        return home

    def download(self, version: int, out: Path) -> None:
        """Make the folder `out` of this version, in full and verified. ValueError where it exists."""
        self._download(version, self.manifest(version), out)

    def _chain(
        self, version: int, wanted: Mapping[str, Any], cache: Path, training: bool
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return the deltas from a version in the cache to this one; none where one is missing, or all are larger."""
        left = sum(entry["bytes"] for entry in wanted["files"])
        chain: list[tuple[int, dict[str, Any]]] = []
        checksum, number = wanted["xxh3"], version
        while True:
            key = delta_folder(number) + DELTA
            held = self.store.read(key)
            if held is None:
                return []
            try:
                document = check_delta(_mapping(held.data, f"{self.url}/{key}", _CURE), f"{self.url}/{key}")
            except ValueError:
                return []
            left -= delta_bytes(document, training=training)
            if left <= 0 or checksum_of(document["result"], training) != checksum:
                return []
            chain.insert(0, (number, document))
            checksum, base = checksum_of(document["base"], training), document["base"]["version"]
            if (cache / checksum / MANIFEST).exists():
                return chain
            if base is None:
                return []
            number = base

    def _follow(self, number: int, document: Mapping[str, Any], cache: Path, training: bool) -> None:
        """Make a version in the cache of its base there and of the delta to it."""
        base = cache / checksum_of(document["base"], training)
        home = cache / checksum_of(document["result"], training)

        def make(out: Path) -> None:
            with TemporaryDirectory(dir=cache, prefix="delta-") as folder:
                (Path(folder) / DELTA).write_text(manifest_text(document), encoding="utf-8")
                files = [entry["file"] for entry in document["files"]]
                for file in files if training else [file for file in files if not is_of_training(file)]:
                    self._get(delta_folder(number) + file, Path(folder) / file)
                apply_delta(base, Path(folder), out, training=training)

        _cache(home, None, make)

    def _download(self, version: int, wanted: Mapping[str, Any], out: Path) -> None:
        with making_folder(out, "bundle") as folder:
            for entry in wanted["files"]:
                self._get(version_folder(version) + entry["file"], folder / entry["file"])
                verified_file(folder, entry, _CURE)
            (folder / MANIFEST).write_text(manifest_text(wanted), encoding="utf-8")

    def _get(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.store.download(key, target)
        except FileNotFoundError:
            raise ValueError(f"{self.url} has no {key}: it was removed meanwhile, or is damaged; {_CURE}") from None


def _cache(home: Path, wanted: Mapping[str, Any] | None, make: Callable[[Path], None]) -> None:
    """Make a folder of the cache, one process at a time; one that is there and sound stays."""
    with waiting_lock(home.with_name(home.name + ".lock")):
        if _is_sound(home, wanted):
            return
        if home.exists():
            shutil.rmtree(home)
        make(home)


def _is_sound(home: Path, wanted: Mapping[str, Any] | None) -> bool:
    """Whether a folder of the cache holds what its name says, byte for byte."""
    if not (home / MANIFEST).exists():
        return False
    try:
        manifest = read_manifest(home)
        for entry in manifest["files"]:
            verified_file(home, entry)
    except ValueError:
        return False
    return bool(manifest["xxh3"] == (home.name if wanted is None else wanted["xxh3"]))


def _mapping(data: bytes, where: str, cure: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read ({error}): {cure}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds no mapping: {cure}")
    return values
