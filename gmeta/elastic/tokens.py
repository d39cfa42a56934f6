"""The shared secret of a job's processes, kept in a file that only its owner may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def make_token(path: Path | str) -> str:
    """Return the token in the file. Where there is no file, a new token goes into a new file of mode 600."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    except OSError as error:
        raise ValueError(
            f"token file {path} cannot be made ({error.strerror}): name one in a folder of yours"
        ) from None
    with os.fdopen(file, "w") as out:
        token = secrets.token_urlsafe(32)
        out.write(token + "\n")
    return token


def read_token(path: Path | str) -> str:
    """Return the token in the file. ValueError says that there is none, or that others may read it."""
    try:
        mode, lines = Path(path).stat().st_mode, Path(path).read_text(errors="replace").split()
    except OSError as error:
        raise ValueError(
            f"token file {path} cannot be read ({error.strerror}): name the file that the coordinator has"
        ) from error
    if mode & 0o077:
        raise ValueError(f"token file {path} may be read by others (mode {mode & 0o777:o}): chmod 600 it")
    if len(lines) != 1 or len(lines[0]) < 16 or not lines[0].isascii():
        raise ValueError(
            f"token file {path} holds no token of 16 ASCII characters or more: remove it, a new one is made"
        )
    return lines[0]
