"""What a server remembers of tasks: adapted states, and the support rows that clients asked it to keep.

Everything is in one cache with a budget in bytes, of which the least used goes first. An adapted state is found by
(version, task, checksum of the support), so that versions never mix. Kept rows are found by an id: 128 random bits, the
worker that has them, and a code that only this server can make for only this client. An id with a good code whose rows
are gone has expired; any other id is unknown, also that of another client.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from threading import Lock

import pyarrow as pa
from cachetools import TTLCache

from gmeta.recommender.tasks import TaskState
from gmeta.serving.refusal import Declined

_ID = re.compile(r"[0-9a-f]{2}[0-9a-f]{32}[0-9a-f]{32}")
_OVERHEAD = 512
"""Bytes that an entry takes beside its numbers: objects, keys, the place in the cache."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The support rows of a task, as they came."""

    key: str
    support: pa.Table
    digests: dict[str, bytes] = field(default_factory=dict)  # version -> checksum of the rows in its encoding

    @property
    def nbytes(self) -> int:
        """Return the bytes of its rows."""
        return int(self.support.nbytes)


_ERASED, _ERASED_S = 100_000, 60.0
"""So many erased ids are remembered, for longer than any computation takes."""

Entry = tuple[str, ...]
"""Key of the cache: ("state", owner, task, version, checksum) or ("kept", owner, id)."""


class States:
    """The states of one worker. Threads may share it."""

    def __init__(self, *, worker: int, secret: bytes, most_bytes: int, ttl_s: float) -> None:
        self._worker, self._secret = worker, secret
        self._lock = Lock()
        self._cache: TTLCache[Entry, Kept | TaskState] = TTLCache(
            most_bytes, ttl_s, getsizeof=lambda entry: entry.nbytes + _OVERHEAD
        )
        self._erased: TTLCache[str, bool] = TTLCache(_ERASED, _ERASED_S)

    def new_id(self, owner: str) -> str:
        """Return an id that nobody can guess, for a client."""
        head = f"{self._worker:02x}{secrets.token_hex(16)}"
        return head + self._code(owner, head)

    def worker_of(self, owner: str, state_id: str) -> int:
        """Return which worker made an id. Raises `Declined` (404) for one that was not made here for this client."""
        head, code = state_id[:34], state_id[34:]
        if not _ID.fullmatch(state_id) or not hmac.compare_digest(code, self._code(owner, head)):
            raise Declined(404, "unknown_state", "there is no such state: adapt again, and use the id that is returned")
        return int(state_id[:2], 16)

    def _code(self, owner: str, head: str) -> str:
        return hmac.new(self._secret, f"{owner}|{head}".encode(), hashlib.sha256).hexdigest()[:32]

    def keep(self, owner: str, state_id: str, kept: Kept) -> None:
        """Keep the support rows of a task. Raises `Declined` where they are larger than the budget."""
        self._put(("kept", owner, state_id), kept)

    def find(self, owner: str, state_id: str) -> Kept:
        """Return kept rows. Raises `Declined`: 404 for an unknown id, 410 for one whose rows are gone."""
        self.worker_of(owner, state_id)
        with self._lock:
            found = self._cache.get(("kept", owner, state_id))
        if not isinstance(found, Kept):
            raise Declined(410, "state_expired", "the state has expired: send the support rows again")
        return found

    def state(self, owner: str, key: str, version: str, digest: bytes) -> TaskState | None:
        """Return an adapted state that is there."""
        with self._lock:
            found = self._cache.get(("state", owner, key, version, digest.hex()))
        return found if isinstance(found, TaskState) else None

    def put(self, owner: str, key: str, version: str, digest: bytes, state: TaskState, of: str = "") -> None:
        """Remember an adapted state, where it fits. `of` is the id of the kept rows that it was adapted to."""
        if of in self._erased:  # while it was computed
            return
        try:
            self._put(("state", owner, key, version, digest.hex()), state)
        except Declined:
            return

    def _put(self, entry: Entry, value: Kept | TaskState) -> None:
        with self._lock:
            try:
                self._cache[entry] = value
            except ValueError:
                raise Declined(
                    413, "state_too_large", "the support rows are larger than what a state may take"
                ) from None

    def erase(self, owner: str, state_id: str, key: str) -> None:
        """Erase kept rows, where they are here, and every adapted state of their task."""
        with self._lock:
            self._erased[state_id] = True
            self._cache.pop(("kept", owner, state_id), None)
            for entry in [e for e in self._cache if e[0] == "state" and e[1:3] == (owner, key)]:
                self._cache.pop(entry, None)

    @property
    def nbytes(self) -> int:
        """Return the bytes that are in use."""
        with self._lock:
            return int(self._cache.currsize)
