"""The Python client of a coordinator, for any training loop. It is thread-safe; a forked process needs one of its own.

    client = Client("http://127.0.0.1:7070", read_token("job.token"), run="tonight")
    client.open_job(pack="clicks-2024-05", job=JobSpec(num_samples=10**6, work_item_size=1000))
    for lease in client.work_items(worker="w0"):
        for position in lease.positions:
            ...

A coordinator that is away delays the loop and loses nothing: a message is sent again, with the same request number,
until it is answered or `patience_s` have passed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import urllib3

from gmeta.elastic.ledger import JobSpec
from gmeta.elastic.tokens import make_token, read_token
from gmeta.elastic.wire import from_wire, to_wire

__all__ = ["Client", "HeldWorkItem", "Refused", "Unreachable", "make_token", "read_token"]

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_ANSWER_S = 30.0
"""Seconds without a word after which a coordinator is asked again."""
_LEAVE_S = 5.0
"""Seconds for which a loop that is left tries to give its work items back."""


class Refused(ValueError):
    """The coordinator refuses a message. `stale` says that the sender lost its lease, or that its generation is over.

    `lost` are those of the message's (epoch, work item, attempt) that are no longer the sender's.
    """

    def __init__(self, message: str, stale: bool = False, lost: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(message)
        self.stale = stale
        self.lost = [(epoch, work_item, attempt) for epoch, work_item, attempt in lost]


class Unreachable(ConnectionError):
    """No coordinator answered for `patience_s`."""


class Client:
    """A connection to the coordinator at `url`, as part of `run`."""

    def __init__(self, url: str, token: str | None = None, *, run: str, patience_s: float = 120.0) -> None:
        self.url, self.run, self.patience_s = url.rstrip("/"), run, patience_s
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}: must be that of a coordinator, such as http://127.0.0.1:7070")
        self.generation = 0
        self.job: JobSpec | None = None
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(
            maxsize=4, retries=False, timeout=urllib3.Timeout(connect=5.0, read=_ANSWER_S), headers=self._headers
        )

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        """Return the reply to one POST /v1/<name>. Raises `Refused`, or `Unreachable` after `patience_s`."""
        return self._call(name, fields, self.patience_s)

    def _call(self, name: str, fields: dict[str, Any], patience_s: float) -> dict[str, Any]:
        body = json.dumps({"run": self.run, "request": uuid.uuid4().hex, **fields}).encode()
        deadline, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
        while True:
            try:
                response = self._pool.request("POST", f"{self.url}/v1/{name}", body=body)
            except urllib3.exceptions.HTTPError as error:
                problem = (
                    f"no coordinator answered at {self.url} for {patience_s:g} s ({error}): "
                    "start it again on the same journal, or correct the address"
                )
            else:
                if response.status == 200:
                    reply: dict[str, Any] = response.json()
                    return reply
                if response.status < 500:
                    raise _refusal(self.url, response)
                why = _refusal(self.url, response).args[0]
                problem = f"the coordinator at {self.url} could not do its part for {patience_s:g} s: {why}"
            if time.monotonic() + pause > deadline:
                raise Unreachable(problem)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def open_job(self, pack: str, job: JobSpec | None = None, *, plan: JobSpec | None = None) -> int:
        """Create the job, or join it, and return its generation. Run, pack and specification must be the same.

        `plan` is the former name of `job`.
        """
        if plan is not None:
            warnings.warn("open_job: the argument plan is called job now", FutureWarning, stacklevel=2)
        job = job or plan
        if job is None:
            raise ValueError("open_job was given no job: give a JobSpec")
        reply = self.call("job", pack=pack, plan=to_wire(job))
        self.job, self.generation = job, reply["generation"]
        return self.generation

    def shards(self, worker: str, ahead: int = 2) -> Iterator[HeldWorkItem]:
        """Return `work_items` under its former name."""
        warnings.warn("Client.shards is called work_items now", FutureWarning, stacklevel=2)
        return self.work_items(worker, ahead)

    def work_items(self, worker: str, ahead: int = 2) -> Iterator[HeldWorkItem]:
        """Lease work items until none is left for anyone; call `open_job` first.

        `ahead` work items are leased before they are needed. One is committed when the body of the loop has ended (at
        the latest a second later), and given back when the loop ends amid it. Leases are renewed in the background as
        long as this process lives and the loop is not left.
        """
        if self.job is None:
            raise ValueError("there is no job: call open_job(pack, job) first")
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}: must not be negative")
        keeper, waiting = _Keeper(self, worker, self.job), deque[HeldWorkItem]()
        with keeper.beating():
            while True:
                if len(waiting) <= ahead // 2:
                    reply = keeper.exchange(ahead + 1 - len(waiting))
                    if reply["reply"] == "SHARD":
                        waiting.extend(keeper.take(reply["leases"]))
                    elif not waiting and reply["reply"] == "END":
                        return
                    elif not waiting:
                        time.sleep(reply["retry_s"])
                if not waiting:
                    continue
                work_item = waiting.popleft()
                if work_item.lost:
                    continue
                try:
                    yield work_item
                except BaseException:  # the loop was left, by break or by an exception
                    keeper.give_back(f"worker {worker!r} left its loop")
                    raise
                keeper.finish(work_item)


def _refusal(url: str, response: urllib3.BaseHTTPResponse) -> Refused:
    try:
        found = response.json()
        return Refused(found["error"], found["stale"], found["lost"])
    except (ValueError, KeyError, TypeError):
        return Refused(f"{url} answered {response.status}, not as a gmeta coordinator does: correct the address")


@dataclass
class HeldWorkItem:
    """A work item in this worker's hands."""

    epoch: int
    work_item: int
    attempt: int
    done: int  # samples that an earlier attempt finished
    start: int
    stop: int
    lost: bool = False  # the lease ran out, or the job was rolled back: work done for it does not count
    finished: int = field(default=0)  # how many of `positions`, as told by `progress`

    @property
    def positions(self) -> range:
        """Return what is to do: positions in the epoch's order of samples."""
        return range(self.start + self.done, self.stop)

    @property
    def key(self) -> tuple[int, int, int]:
        """Return (epoch, work item, attempt)."""
        return self.epoch, self.work_item, self.attempt

    def progress(self, count: int) -> None:
        """Tell that the first `count` of `positions` are finished and need not be done again. It is sent within a
        second."""
        if not self.finished <= count <= len(self.positions):
            raise ValueError(
                f"{count} positions are reported finished: must be {self.finished} to {len(self.positions)}"
            )
        self.finished = count


class _Keeper:
    """What one worker holds, to be renewed, committed or given back."""

    def __init__(self, client: Client, worker: str, job: JobSpec) -> None:
        self._client, self._worker, self._lease_s = client, worker, job.lease_s
        self._held: dict[tuple[int, int, int], HeldWorkItem] = {}
        self._to_commit: list[tuple[int, int, int]] = []
        self._told: dict[tuple[int, int, int], int] = {}  # progress that the coordinator knows
        self._state, self._sending = threading.Lock(), threading.Lock()
        self._renewed = time.monotonic()
        self._end = threading.Event()
        self._problem: Exception | None = None

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Renew leases, and send what there is to say, in a thread of its own."""
        thread = threading.Thread(target=self._beat, name=f"gmeta leases of {self._worker}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join(_LEAVE_S)

    def _beat(self) -> None:
        while not self._end.wait(min(1.0, self._lease_s / 4)):
            with self._state:
                moved = any(self._told.get(key, 0) != work_item.finished for key, work_item in self._held.items())
                quiet = not (moved or self._to_commit or (self._held and self._renewal_due()))
            if quiet:
                continue
            try:
                self.exchange(0)
            except Exception as error:  # the loop raises it when it next asks for work items
                self._problem = error
                return

    def _renewal_due(self) -> bool:
        return time.monotonic() - self._renewed > self._lease_s / 3

    def exchange(self, count: int, patience_s: float | None = None) -> dict[str, Any]:
        """Say all there is to say, and lease up to `count` work items. Those that were lost are marked as lost."""
        if self._problem is not None:
            raise self._problem
        patience_s = self._client.patience_s if patience_s is None else patience_s
        if not self._sending.acquire(timeout=patience_s):
            raise Unreachable(f"the message before this one was not answered for {patience_s:g} s")
        try:
            while True:
                try:
                    return self._exchange(count, patience_s)
                except Refused as refused:
                    if not refused.lost:
                        raise
                    self._lose(refused)
        finally:
            self._sending.release()

    def _exchange(self, count: int, patience_s: float) -> dict[str, Any]:
        with self._state:
            every, sent = self._renewal_due(), time.monotonic()
            moved = {
                key: (work_item.done, work_item.finished)
                for key, work_item in self._held.items()
                if every or self._told.get(key, 0) != work_item.finished
            }
            commit = list(self._to_commit)
        fields = {
            "worker": self._worker,
            "count": count,
            "generation": self._client.generation,
            "commit": commit,
            "progress": [[*key, done + finished] for key, (done, finished) in moved.items()],
        }
        reply = self._client._call("exchange", fields, patience_s)
        with self._state:
            self._to_commit = self._to_commit[len(commit) :]
            self._told |= {key: finished for key, (_, finished) in moved.items() if key in self._held}
            self._renewed = sent if every else self._renewed
        return reply

    def _lose(self, refused: Refused) -> None:
        _log.warning("worker %s: %s; its work is dropped", self._worker, refused)
        with self._state:
            for key in refused.lost:
                work_item = self._held.pop(key, None)
                if work_item is not None:
                    work_item.lost = True
            self._to_commit = [key for key in self._to_commit if key not in refused.lost]

    def take(self, leases: list[dict[str, Any]]) -> list[HeldWorkItem]:
        """Take work items that were just leased."""
        work_items = [HeldWorkItem(**from_wire(lease)) for lease in leases]
        with self._state:
            self._held |= {work_item.key: work_item for work_item in work_items}
        return work_items

    def finish(self, work_item: HeldWorkItem) -> None:
        """Note that the work is done; it is committed with the next message."""
        with self._state:
            if self._held.pop(work_item.key, None) is not None:
                self._told.pop(work_item.key, None)
                self._to_commit.append(work_item.key)

    def give_back(self, reason: str) -> None:
        """Commit what is finished and give back the rest. Without a coordinator the leases run out by themselves."""
        with contextlib.suppress(Unreachable, Refused):
            self.exchange(0, _LEAVE_S)
            with self._state:
                rest = list(self._held)
            while rest:
                fields = {"generation": self._client.generation, "shards": rest, "reason": reason}
                try:
                    self._client._call("fail", fields, _LEAVE_S)
                    return
                except Refused as refused:
                    if not refused.lost:
                        raise
                    rest = [key for key in rest if key not in refused.lost]
