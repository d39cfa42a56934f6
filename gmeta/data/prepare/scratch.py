"""`prepare` works in a scratch directory beside the pack, and says what to do when the disk or memory is full."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import lock_directory
from gmeta.data.sources import Connection, database, is_damage, is_full_disk


@contextmanager
def scratch_directory(out: Path) -> Iterator[Path]:
    """Give a directory beside `out` for what does not fit in memory, to this process alone; remove it at the end."""
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another out")
    path = out.with_name(out.name + ".scratch")
    stale = path.exists()
    with disk_errors(path):
        try:
            lock = lock_directory(path)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; choose another out") from error
    if stale:
        print(f"prepare: removed {path}, which an interrupted prepare left behind", file=sys.stderr)
    try:
        yield path
    finally:
        shutil.rmtree(path)
        os.close(lock)


@contextmanager
def connect(scratch: Path, config: PrepareConfig) -> Iterator[Connection]:
    """Open a database in `scratch`, within the limits of the config."""
    settings: dict[str, Any] = {"memory_limit": config.memory_limit, "temp_directory": str(scratch / "spill")}
    if config.threads:
        settings["threads"] = config.threads
    con = database(scratch / "rows.duckdb", **settings)
    try:
        yield con
    finally:
        con.close()


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full disk, a memory limit that is too low, or a damaged file into a ValueError that says what to do."""
    try:
        yield
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        if is_full_disk(error):
            raise _no_space(directory, reason) from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise ValueError(f"memory_limit is too low ({reason}): raise it, or lower threads or shard_mb") from error
        if is_damage(error):
            raise ValueError(f"the input cannot be read ({reason}): write the file again") from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _no_space(directory, str(error.strerror)) from error


def _no_space(directory: Path, reason: str, needed: int | None = None) -> ValueError:
    parent = directory.absolute().parent
    free = shutil.disk_usage(parent).free if parent.exists() else 0
    need = f"about {needed:,} bytes are needed and " if needed else ""
    return ValueError(
        f"{parent} has no space for the pack ({reason}): {need}{free:,} bytes are free. "
        "No pack was made; free space there or choose another out"
    )


def require_space(out: Path, needed: int) -> None:
    """Refuse early where `needed` bytes, of the pack and the dealt rows, cannot fit beside `out`."""
    if needed > shutil.disk_usage(out.absolute().parent).free:
        raise _no_space(out, "too little is free", needed)
