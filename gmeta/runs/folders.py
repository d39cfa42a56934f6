"""Folders that are whole or absent: they are written beside their place, and renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gmeta.core.files import sync, sync_folders
from gmeta.data.pack import lock_directory


@contextmanager
def making_folder(path: Path, what: str) -> Iterator[Path]:
    """Give an empty folder beside `path`, which becomes `path` when the block ends without an error.

    Else it is removed. What a killed process left is removed by the next one. ValueError, which names `what` is made,
    where `path` exists, where another process makes it, and where the disk is full.
    """
    refuse_existing(path)
    partial = path.with_name(path.name + ".partial")
    with folder_errors(path, what):
        lock = lock_directory(partial)
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    sync(file)
            sync_folders(partial)
            put_in_place(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a folder whose content is on the disk. ValueError where `path` exists."""
    refuse_existing(path)
    os.rename(partial, path)
    sync(path.absolute().parent)


@contextmanager
def folder_errors(path: Path, what: str) -> Iterator[None]:
    """Turn what a disk refuses while `what` is written at `path` into a ValueError that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {path}: {error}; no {what} was made: free space there or name another folder"
        ) from error


def refuse_existing(path: Path) -> None:
    """Raise ValueError where a folder that is to be made exists."""
    if path.exists():
        raise ValueError(f"out {path} exists: remove it or name another folder")


@contextmanager
def waiting_lock(file: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of this file, and hold it. It dies with this process."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
