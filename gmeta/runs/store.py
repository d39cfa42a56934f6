"""Where a registry lies: a folder, or a prefix of an object store. Few operations, and what each of them promises.

A key is a path with slashes below the registry. `create` and `replace` are conditional: of several writers one wins.
What was written is whole or absent, whoever is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import xxhash

from gmeta.core.files import replacing, sync

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_SCHEMES = ("s3", "gs", "az", "file")
CHUNK_BYTES = 1 << 25
"""An object store is read in requests of so many bytes: one that is lost is made again."""


class Held(NamedTuple):
    """The bytes of a key, and the tag of this state of it, which `replace` compares."""

    data: bytes
    tag: str


class Listed(NamedTuple):
    """A key with its size and when it was written."""

    key: str
    size: int
    modified: datetime


class Store(Protocol):
    """The operations of both kinds. A failure of the disk or of the network is a ValueError that names the store."""

    @property
    def url(self) -> str:
        """Return where the store is, for messages."""

    def read(self, key: str) -> Held | None:
        """Return what a key holds; None where there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a key that does not exist. Return False, and write nothing, where another writer was first."""

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        """Write a key whose state is still that of `tag`. Return False, and write nothing, where it is another."""

    def upload(self, source: Path, key: str) -> None:
        """Write the bytes of a file, whatever the key held."""

    def download(self, key: str, target: Path) -> None:
        """Write the bytes of a key to a new file. Raises FileNotFoundError where there is no such key."""

    def delete(self, key: str) -> None:
        """Remove a key, where it exists."""

    def list(self, prefix: str) -> list[Listed]:
        """Return all keys below a folder; `prefix` ends with a slash."""


def open_store(url: str) -> Store:
    """Return the store at a folder's path, or at `s3://bucket/prefix`, `gs://…`, `az://…`. ValueError for any other."""
    scheme, found, rest = url.partition("://")
    if not found:
        return Folder(Path(url))
    if scheme not in _SCHEMES:
        raise ValueError(f"{url!r} is of no known kind: give a folder, or a URL that starts with s3://, gs:// or az://")
    if scheme == "file":
        return Folder(Path("/" + rest.lstrip("/")))
    return Bucket(url, _object_store(url))


def _object_store(url: str) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise ValueError(f"{url} is in an object store, which needs obstore: pip install 'gmeta[registry]'") from None
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {_first_line(error)}") from None


def require_conditions(store: Store) -> None:
    """Raise ValueError for a store that ignores conditions: there two publishers would overwrite each other."""
    key = f"probe-{secrets.token_hex(8)}"
    try:
        obeys = (
            store.create(key, b"1")
            and not store.create(key, b"2")
            and (held := store.read(key)) is not None
            and store.replace(key, b"3", held.tag)
            and not store.replace(key, b"4", held.tag)
        )
    finally:
        store.delete(key)
    if not obeys:
        raise ValueError(
            f"{store.url} ignores conditional writes (If-None-Match, If-Match), without which two publishers would "
            "overwrite each other: use a store that has them, or a folder"
        )


@dataclass(frozen=True)
class Folder:
    """A folder. New files appear by link or rename, once they are whole and on the disk; a lock guards the rest."""

    path: Path

    @property
    def url(self) -> str:
        """Return the folder's path."""
        return str(self.path)

    def read(self, key: str) -> Held | None:
        """Return what a key holds; None where there is none."""
        with self._errors("read", key):
            try:
                data = (self.path / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Held(data, xxhash.xxh3_64(data).hexdigest())

    def create(self, key: str, data: bytes) -> bool:
        """Write a key that does not exist; `link` fails where another writer was first."""
        with self._errors("write", key), self._new_file(key) as partial:
            partial.write_bytes(data)
            sync(partial)
            try:
                os.link(partial, self.path / key)
            except FileExistsError:
                return False
            sync((self.path / key).parent)
            return True

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        """Write a key whose content is still that of `tag`, under a lock."""
        with self._errors("write", key), self._lock():
            held = self.read(key)
            if held is None or held.tag != tag:
                return False
            with replacing(self.path / key) as partial:
                partial.write_bytes(data)
            sync((self.path / key).parent)
            return True

    def upload(self, source: Path, key: str) -> None:
        """Write the bytes of a file."""
        path = self.path / key
        with self._errors("write", key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                shutil.copyfile(source, partial)
            sync(path.parent)

    def download(self, key: str, target: Path) -> None:
        """Write the bytes of a key to a new file."""
        with self._errors("read", key):
            shutil.copyfile(self.path / key, target)

    def delete(self, key: str) -> None:
        """Remove a key, and folders that are then empty."""
        with self._errors("remove", key):
            path = self.path / key
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if self.path in (folder, folder.parent):
                    break
                try:
                    folder.rmdir()
                except OSError:  # not empty, or already gone
                    break

    def list(self, prefix: str) -> list[Listed]:
        """Return all keys below a folder, with what killed writers left there."""
        found = []
        with self._errors("read", prefix):
            for path in sorted((self.path / prefix).rglob("*")):
                try:
                    if path.is_file():
                        stat = path.stat()
                        modified = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
                        found.append(Listed(path.relative_to(self.path).as_posix(), stat.st_size, modified))
                except FileNotFoundError:  # removed meanwhile
                    continue
        return found

    @contextmanager
    def _new_file(self, key: str) -> Iterator[Path]:
        """Give the path of a new file beside a key, which is removed afterwards where it is still there."""
        folder = (self.path / key).parent
        partial = folder / f".partial-{secrets.token_hex(8)}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the folder's lock, which dies with this process. OSError where the file system has no locks."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot {doing} {self.path / key}: {error.strerror or error}; free space there, or allow it"
            ) from error


@dataclass(frozen=True)
class Bucket:
    """A prefix of an object store, by obstore, which retries what the network lost.

    A conditional write whose answer was lost is tried again, and then refused for what it wrote itself. So a refusal
    counts only where the key holds something else. Writers make what they write their own by a token.
    """

    url: str
    store: ObjectStore

    def read(self, key: str) -> Held | None:
        """Return what a key holds; None where there is none."""
        import obstore

        with self._errors("read", key):
            try:
                found = obstore.get(self.store, key)
                data = bytes(found.bytes())
            except FileNotFoundError:
                return None
        tag = {name: value for name in ("e_tag", "version") if (value := found.meta.get(name))}
        return Held(data, json.dumps(tag, sort_keys=True))

    def create(self, key: str, data: bytes) -> bool:
        """Write a key that does not exist."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._errors("write", key):
            try:
                obstore.put(self.store, key, data, mode="create")
                return True
            except (AlreadyExistsError, PreconditionError):
                return self._holds(key, data)

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        """Write a key whose state is still that of `tag`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._errors("write", key):
            try:
                obstore.put(self.store, key, data, mode=json.loads(tag))
                return True
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return self._holds(key, data)

    def _holds(self, key: str, data: bytes) -> bool:
        held = self.read(key)
        return held is not None and held.data == data

    def upload(self, source: Path, key: str) -> None:
        """Write the bytes of a file, in parts where it is large."""
        import obstore

        with self._errors("write", key):
            obstore.put(self.store, key, source)

    def download(self, key: str, target: Path) -> None:
        """Write the bytes of a key to a new file."""
        import obstore

        with self._errors("read", key):
            size = obstore.head(self.store, key)["size"]
            try:
                with target.open("wb") as file:
                    for start in range(0, size, CHUNK_BYTES):  # each request ends long before its time is out
                        length = min(CHUNK_BYTES, size - start)
                        file.write(obstore.get_range(self.store, key, start=start, length=length))
            except OSError as error:
                raise ValueError(f"cannot write {target}: {error.strerror or error}; free space there") from error

    def delete(self, key: str) -> None:
        """Remove a key, where it exists."""
        import obstore

        with self._errors("remove", key):
            try:
                obstore.delete(self.store, key)
            except FileNotFoundError:
                return

    def list(self, prefix: str) -> list[Listed]:
        """Return all keys below a folder."""
        import obstore

        with self._errors("list", prefix):
            entries = [entry for batch in obstore.list(self.store, prefix) for entry in batch]
        found = [Listed(entry["path"], entry["size"], entry["last_modified"]) for entry in entries]
        return sorted(found, key=lambda listed: listed.key)

    @contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, PermissionError) as error:
            raise ValueError(f"cannot {doing} {key} of {self.url}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return an error's message without the library's debugging output."""
    return next(iter(str(error).splitlines()), type(error).__name__)
