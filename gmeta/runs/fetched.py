"""Folders of an object store, copied to the cache of fetched versions: what a model is made with may lie in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

from gmeta.core.files import make_folder
from gmeta.runs.folders import making_folder, waiting_lock
from gmeta.runs.store import Listed, Store, open_store

_LEFT_OUT = ("lock", ".partial-")
"""Files of writers: a lock, and what was being written."""


def fetch_folder(url: str, cache: Path, check: Callable[[Path], None]) -> Path:
    """Return a copy, in the cache, of what a folder of an object store holds now.

    It is named by what the store lists, and whole or absent: `check` gets it before it is put in place, and raises
    ValueError for what is damaged. Several processes share a cache: one of them fetches, and the others wait. Copies of
    what a folder held earlier stay until the cache is emptied. ValueError for a folder that is empty, changed
    meanwhile, or cannot be read.
    """
    store = open_store(url)
    listed = [entry for entry in store.list("") if not Path(entry.key).name.startswith(_LEFT_OUT)]
    if not listed:
        raise ValueError(f"{url} holds no files: name the folder of an object store that does")
    told = "\n".join(f"{entry.key} {entry.size} {entry.modified.isoformat()}" for entry in listed)
    home = make_folder("cache", str(cache)) / xxhash.xxh3_128_hexdigest(f"{url}\n{told}".encode())
    with waiting_lock(home.with_name(home.name + ".lock")):
        if not home.exists():
            with making_folder(home, "copy") as folder:
                for entry in listed:
                    _get(store, entry, folder / entry.key)
                try:
                    check(folder)
                except ValueError as error:
                    raise ValueError(f"{url} is not as it was written, copy it there again: {error}") from None
    return home


def _get(store: Store, entry: Listed, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    changed = f"{store.url} was changed while it was read ({entry.key}): try again"
    try:
        store.download(entry.key, target)
    except FileNotFoundError:
        raise ValueError(changed) from None
    if target.stat().st_size != entry.size:
        raise ValueError(changed)
