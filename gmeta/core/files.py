"""Small files. They are written completely or not at all, and errors in reading name them."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TOKEN_BYTES = 4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`: an empty file, which is this writer's alone. It is renamed to `path` when
    the block ends without an error, and removed otherwise.

    Of several writers the last one counts, and a reader finds a whole file. What a killed writer left is removed by the
    next one. Raises ValueError naming `path` where the disk refuses.
    """
    try:
        _remove_leftovers(path)
        partial, lock = _locked_partial(path)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; free space there or name another path"
        ) from error


def _locked_partial(path: Path) -> tuple[Path, int]:
    """Create a temporary file beside `path`. Return it with its descriptor, whose lock dies with this process."""
    while True:
        partial = path.with_name(f".partial-{secrets.token_hex(_TOKEN_BYTES)}-{path.name}")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(handle, fcntl.LOCK_EX)
        if partial.exists():  # else another writer took it for a leftover before it was locked
            return partial, handle
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that no living writer holds."""
    length = len(".partial--") + 2 * _TOKEN_BYTES + len(path.name)
    with os.scandir(path.parent) as entries:
        names = [e.name for e in entries if e.name.startswith(".partial-") and e.name.endswith(f"-{path.name}")]
    for leftover in (path.with_name(name) for name in names if len(name) == length):
        try:
            handle = os.open(leftover, os.O_WRONLY)
        except OSError:  # removed meanwhile, or somebody else's
            continue
        try:
            if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                leftover.unlink(missing_ok=True)
        finally:
            os.close(handle)


@contextmanager
def only_writer(file: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file, made where it is missing, while the block runs. It dies with this process.

    Raises ValueError at once, which says `what` is being written, where another process holds it.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise ValueError(f"{what} is being written by another process: wait for it")
        yield
    finally:
        os.close(handle)


def _lock(handle: int, operation: int) -> bool:
    """Lock an open file. Return False where another holds it, or the file system has no locks."""
    try:
        fcntl.flock(handle, operation)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """fsync a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folders(path: Path) -> None:
    """fsync every folder below `path`, then `path` itself."""
    for entry in path.rglob("*"):
        if entry.is_dir():
            sync(entry)
    sync(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_url(name: str) -> bool:
    """Say whether a name is a URL of an object store, and no path."""
    return "://" in name


def make_folder(key: str, path: str) -> Path:
    """Return the folder at `path`, made where it is missing. ValueError names `key`, the setting that asked for it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key} is {path}: no folder can be made there ({error.strerror}); name another") from None
    return folder


def read_mapping(path: Path, cure: str) -> dict[str, Any]:
    """Return the mapping in a .json or .yaml file. ValueError names the file, what is wrong with it, and `cure`."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({reason}): {cure}") from None
    except RecursionError:
        raise ValueError(f"{path} cannot be read (it is nested too deeply): {cure}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping: {cure}")
    return values
