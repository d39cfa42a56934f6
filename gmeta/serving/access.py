"""Who may ask: tokens, and without one only programs on this machine."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from fastapi import Request

from gmeta.elastic.service import is_local
from gmeta.elastic.tokens import make_token
from gmeta.serving.refusal import Declined

ANYONE = "local"


def read_tokens(path: str) -> list[str]:
    """Return the tokens of a file, one a line. Where there is no file, it is made with a new token.

    ValueError where others may read the file, or a line is no token.
    """
    file = Path(path)
    if not file.exists():
        return [make_token(file)]
    try:
        mode, lines = file.stat().st_mode, file.read_text(errors="replace").split("\n")
    except OSError as error:
        raise ValueError(f"token file {file} cannot be read ({error.strerror}): name another") from None
    if mode & 0o077:
        raise ValueError(f"token file {file} may be read by others (mode {mode & 0o777:o}): chmod 600 it")
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens or any(len(token) < 16 or not token.isascii() or " " in token for token in tokens):
        raise ValueError(f"token file {file} must have a token of 16 ASCII characters or more on each line")
    return tokens


class Access:
    """Tells the owner of a request: a checksum of its token, under which its states are kept."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(f"Bearer {token}".encode()).digest() for token in tokens]

    def owner(self, request: Request) -> str:
        """Return the owner. Raises `Declined`: 401 for a token that is missing or wrong, 403 for a foreign page.

        All tokens are compared, each in constant time.
        """
        if not self._digests:
            if is_local(request):
                return ANYONE
            raise Declined(403, "not_local", "without a token, Host and Origin must be of this machine")
        given = hashlib.sha256(request.headers.get("authorization", "").encode()).digest()
        if not any([hmac.compare_digest(given, digest) for digest in self._digests]):  # noqa: C419
            raise Declined(401, "unauthorized", "the token is missing or wrong: send Authorization: Bearer TOKEN")
        return given.hex()
