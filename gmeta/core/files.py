"""Small files. They are written completely or not at all, and errors in reading name them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`. It is renamed to `path` when the block ends without an error, and removed
    otherwise.

    Raises ValueError naming `path` where the disk refuses.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; free space there or name another path"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
