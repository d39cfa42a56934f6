"""Keep a coordinator within its descriptors, whoever connects: silent connections end, and its log stays short."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from typing import Any

OWED_S = 30.0
"""Seconds that a connection may take to send the headers of a request, and as many for its body."""
BACKLOG = 128
"""Connections that are accepted at a time, before any of them can be judged."""
_KEPT = 128
"""Descriptors for the journal, the trace and the like."""
_SELDOM_S = 60.0


def most_connections() -> int:
    """Raise the soft limit of descriptors to the hard one, and return how many connections they are enough for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**20 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass  # what there is has to do
    soft = wanted if soft == resource.RLIM_INFINITY else soft
    return max(16, soft - BACKLOG - _KEPT)


class Guard:
    """Ends connections that wait too long, and the oldest of those that wait where there are too many.

    `connections` is uvicorn's own set of its connections, which it keeps up to date.
    """

    def __init__(self, connections: set[Any], most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._connections, self._most, self._clock = connections, most, clock
        self._since: dict[Any, tuple[Any, float]] = {}  # connection -> its last request, since when it owes more

    def sweep(self) -> None:
        """Look at all connections. To be called once a second."""
        now = self._clock()
        before, self._since = self._since, {}
        for one in [one for one in self._connections if _owes(one)]:
            request, since = before.get(one, (None, now))
            self._since[one] = (one.cycle, since if request is one.cycle else now)
        for one in [one for one, (_, since) in self._since.items() if now - since > OWED_S]:
            self._end(one)

    def admit(self) -> None:
        """Make room for one connection more: who owes something goes first, then who is between two requests."""
        if len(self._connections) < self._most:
            return
        for one in [*(one for one in self._since if one in self._connections), *self._connections]:
            if _is_waiting(one):
                self._end(one)
                return

    def _end(self, connection: Any) -> None:
        self._since.pop(connection, None)
        self._connections.discard(connection)
        connection.transport.abort()


def _is_waiting(connection: Any) -> bool:
    """Whether no request is being answered."""
    return connection.cycle is None or connection.cycle.response_complete


def _owes(connection: Any) -> bool:
    """Whether headers or a body are due: no request has come yet, or one has begun to. Between two requests uvicorn's
    own timer runs.
    """
    if _is_waiting(connection):
        return connection.timeout_keep_alive_task is None
    return bool(connection.cycle.more_body)


def speak_seldom(clock: Callable[[], float] = time.monotonic) -> None:
    """Let the loggers of the web server say the same thing once a minute: strangers can make them say it at will."""
    said: dict[str, float] = {}

    def is_due(record: logging.LogRecord) -> bool:
        now, kind = clock(), f"{record.name} {str(record.msg)[:60]}"
        if now - said.get(kind, -_SELDOM_S) < _SELDOM_S:
            return False
        if len(said) >= 100:
            said.clear()
        said[kind] = now
        return True

    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(is_due)
