"""Requests that wait together are computed together: one queue, one pass after another.

While a pass runs, requests gather for the next one, so that a busy server makes large passes without waiting, and a
request that comes alone is computed at once.

A pass runs on the event loop itself. In a thread beside it, each of a pass's thousand small operations gives Python's
lock away and waits for it while requests are parsed: adapting 64 tasks took eight times as long.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gmeta.serving.refusal import Declined

_TURNS = 4
"""Turns of the event loop from bytes on a socket to a job in the queue."""
T = TypeVar("T")


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A job in the queue."""

    job: T
    size: int  # tasks
    done: asyncio.Future[None]
    since: float = field(default_factory=time.perf_counter)


class Batcher(Generic[T]):
    """Runs jobs by `run(jobs)`, which leaves its results, errors too, in the jobs. `after` follows their answers.

    `observe` is told the seconds that each job waited.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], None],
        after: Callable[[Sequence[T]], None] | None = None,
        *,
        most_tasks: int,
        most_waiting: int,
        wait_s: float,
        observe: Callable[[float], None],
    ) -> None:
        self._run, self._after = run, after
        self._most_tasks, self._most_waiting, self._wait_s, self._observe = most_tasks, most_waiting, wait_s, observe
        self._queue: deque[Waiting[T]] = deque()
        self._filled, self._closed = asyncio.Event(), False
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        """Begin to compute; on the running event loop."""
        self._task = asyncio.create_task(self._compute())

    async def submit(self, job: T, size: int, timeout_s: float) -> None:
        """Have a job of so many tasks computed.

        Raises `Declined`: 503 for a full queue or at the end, 504 when it is late.
        """
        if self._closed:
            raise Declined(503, "shutting_down", "the server is stopping: ask another", retry_after_s=1)
        if len(self._queue) >= self._most_waiting:
            raise Declined(503, "queue_full", f"{len(self._queue)} requests wait already: try again", retry_after_s=1)
        waiting = Waiting(job, size, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._filled.set()
        try:
            await asyncio.wait_for(waiting.done, timeout_s)
        except asyncio.TimeoutError:
            raise Declined(504, "timeout", f"the request was not computed within {timeout_s:g} s: try again") from None

    async def _compute(self) -> None:
        while True:
            await self._filled.wait()
            if self._wait_s and not self._closed:
                await asyncio.sleep(self._wait_s)
            batch = self._next()
            if not batch:
                if self._closed:
                    return
                continue
            jobs = [waiting.job for waiting in batch]
            fault: Exception | None = None
            try:
                self._run(jobs)
            except Exception as error:  # whoever waits is told; the next pass goes on
                fault = error
            for waiting in batch:
                if waiting.done.done():
                    continue
                if fault is None:
                    waiting.done.set_result(None)
                else:
                    waiting.done.set_exception(fault)
            await _others()
            if self._after is not None and fault is None:
                self._after(jobs)

    def _next(self) -> list[Waiting[T]]:
        """Take the jobs of the next pass: those that nobody waits for any more are left out."""
        batch: list[Waiting[T]] = []
        size, now = 0, time.perf_counter()
        while self._queue and (not batch or size + self._queue[0].size <= self._most_tasks):
            waiting = self._queue.popleft()
            if waiting.done.done():
                continue
            self._observe(now - waiting.since)
            batch.append(waiting)
            size += waiting.size
        if not self._queue and not self._closed:
            self._filled.clear()
        return batch

    async def close(self) -> None:
        """Finish what waits, and take nothing more."""
        self._closed = True
        self._filled.set()
        if self._task is not None:
            await self._task


async def _others() -> None:
    """Let answers go out, and requests that came meanwhile come in, before the next pass."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
