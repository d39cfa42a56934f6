"""A rank's side: it reports in the background what its steps took, and tells how each coming batch is divided.

Whoever loads batch `step` asks `setting(step)`. It waits until the coordinator has granted the step, and with the grant
it knows every setting up to there (see `gmeta.elastic.controller`). Rank 0 also keeps the ledger's account: it leases
windows of the order ahead, reports progress, and commits them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gmeta.elastic.actions import Setting, setting_from_json
from gmeta.elastic.monitor import StepTime

_WINDOWS_AHEAD = 2
_TELL_S = 2.0
"""Seconds between two messages of mere progress. A finished window is told at once, and a checkpoint knows all."""

_SILENT_S = 1.0
"""Seconds after which an agent reports even though no step was made."""


class Caller(Protocol):
    """The part of `gmeta.elastic.client.Client` that an agent needs."""

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        """Send one request, and repeat it until it was answered."""
        ...


class RestartRequested(Exception):
    """The setting of a step says to replace a worker: save, end, and be started again."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(f"before step {setting.step} the worker of rank {setting.restart} is replaced")
        self.setting = setting


@dataclass
class LeaseBook:
    """Rank 0's account of the ledger's work items. Each is a window of the order, and they are leased in order.

    Tasks that were put back leave their window open until the end of the epoch, when all are done.
    """

    window_tasks: int  # of a full window
    epoch_tasks: int
    leases: dict[tuple[int, int], int] = field(default_factory=dict)  # (epoch, window) -> attempt
    done: dict[tuple[int, int], int] = field(default_factory=dict)  # tasks that took effect, by (epoch, window)
    epochs_finished: int = 0
    ended: bool = False  # whether nothing is left to lease

    def size(self, window: int) -> int:
        """Return the number of tasks of a window. The last one of an epoch may be short."""
        return min(self.window_tasks, self.epoch_tasks - window * self.window_tasks)

    def take(self, lease: Mapping[str, Any]) -> None:
        """Enter a lease, as the coordinator answers it. It may come late, since training does not wait for it."""
        key = (int(lease["epoch"]), int(lease["shard"]))
        self.leases[key] = int(lease["attempt"])
        self.done[key] = self.done.get(key, 0) + int(lease["done"])

    def add(self, epoch: int, window: int, tasks: int) -> None:
        """Enter that so many tasks of a window took effect. Those of an epoch's tail are not counted: see
        `epochs_finished`."""
        if tasks:
            self.done[epoch, window] = self.done.get((epoch, window), 0) + tasks

    @property
    def outrun(self) -> bool:
        """Whether steps were faster than leases, so that the ledger does not know of all that has begun or is
        finished."""
        begun = self.done.keys() - self.leases.keys()
        return not self.ended and (bool(begun) or all(epoch < self.epochs_finished for epoch, _ in self.leases))

    @property
    def ahead(self) -> int:
        """Return the windows that are leased and not begun. Those that wait for the epoch's tail may be any number."""
        return sum(not self.done.get(key) for key in self.leases)

    def message(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return (commit, progress) of the leases at hand."""
        commit, progress = [], []
        for (epoch, window), attempt in self.leases.items():
            done = self.done.get((epoch, window), 0)
            if epoch < self.epochs_finished or done >= self.size(window):
                commit.append([epoch, window, attempt])
            elif done:
                progress.append([epoch, window, attempt, done])
        return commit, progress

    def committed(self, commit: list[list[int]]) -> None:
        """Remove leases whose commits the coordinator has."""
        for epoch, window, _ in commit:
            del self.leases[epoch, window]
            self.done.pop((epoch, window), None)


class Agent:
    """The agent of one rank in generation `generation`. Its thread reports every `report_s` seconds while steps are
    made.

    `facts` gives the node's state, as fractions of 1; `about` is told once. Errors of the thread are raised by the next
    `setting` or `saved`: the coordinator refuses this generation, or was away for longer than the client's patience.
    """

    def __init__(
        self,
        client: Caller,
        *,
        generation: int,
        rank: int,
        report_s: float,
        about: Mapping[str, Any] | None = None,
        facts: Callable[[], dict[str, float]] = dict,
        lease_book: LeaseBook | None = None,
    ) -> None:
        self._client = client
        self._generation = generation
        self._rank = rank
        self._report_s = report_s
        self._about: Mapping[str, Any] | None = about
        self._facts = facts
        self._lease_book = lease_book
        self._steps: deque[StepTime] = deque()
        self._settings: list[Setting] = []
        self._until = -1
        self._told, self._reported = -_TELL_S, -_SILENT_S
        self._wanted = -1  # the step that somebody waits for
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._call = threading.Lock()  # held for a conversation: the thread's, or that of `saved`
        self.cpu_s = 0.0  # CPU time of the thread so far
        self._thread = threading.Thread(target=self._run, name="gmeta-agent", daemon=True)
        self._thread.start()

    def setting(self, step: int) -> Setting:
        """Return how the batch of `step` is divided; waits until it is granted. Raises RestartRequested where a worker
        is replaced.
        """
        with self._changed:
            if step > self._until:
                self._wanted = max(self._wanted, step)
                self._changed.notify_all()
                self._changed.wait_for(lambda: step <= self._until or self._error is not None or self._closed)
            if self._error is not None:
                raise self._error
            if step > self._until:
                raise RuntimeError("the agent was closed")
            found = next(s for s in reversed(self._settings) if s.step <= step)
        if found.restart is not None:
            raise RestartRequested(found)
        return found

    def finished(self, time: StepTime, epoch: int, window: int, tasks: int) -> None:
        """Note that a step is finished: `tasks` of a window took effect in all ranks together."""
        with self._changed:
            self._steps.append(time)
            if self._lease_book is not None:
                self._lease_book.add(epoch, window, tasks)

    def finish_epoch(self, epoch: int) -> None:
        """Note that every task of the epoch took effect."""
        with self._changed:
            if self._lease_book is not None:
                self._lease_book.epochs_finished = epoch + 1

    def saved(self) -> dict[str, Any]:
        """Return the ledger as of the last finished step, for the checkpoint of that step. Only rank 0 may ask."""
        if self._error is not None:
            raise self._error
        assert self._lease_book is not None
        with self._call:
            while self._lease_book.outrun:
                before, self._told = dict(self._lease_book.leases), -_TELL_S
                self._lease()
                if self._lease_book.leases == before and not self._lease_book.ended:
                    raise RuntimeError(f"the ledger gives out nothing beyond the windows {sorted(before)}")
            with self._changed:
                commit, progress = self._lease_book.message()
            answer = self._client.call("saved", generation=self._generation, commit=commit, progress=progress)
            with self._changed:
                self._lease_book.committed(commit)
        saved: dict[str, Any] = answer["saved"]
        return saved

    def close(self) -> None:
        """Report what is left, if the coordinator is there, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while True:
                started = time.thread_time()
                with self._call:
                    if self._steps or self._urgent() or time.monotonic() - self._reported > _SILENT_S:
                        self._reported = time.monotonic()
                        self._report()
                    if self._lease_book is not None:
                        self._lease()
                self.cpu_s += time.thread_time() - started
                with self._changed:
                    self._changed.wait_for(self._urgent, timeout=self._report_s)
                    if self._closed and not self._steps:
                        return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _urgent(self) -> bool:
        return self._closed or self._wanted > self._until

    def _report(self) -> None:
        with self._changed:
            steps = list(self._steps)
            known = self._settings[-1].number if self._settings else -1
        answer = self._client.call(
            "report",
            generation=self._generation,
            rank=self._rank,
            known=known,
            steps=[[s.step, s.compute_s, s.input_s, s.wait_s, s.work] for s in steps],
            facts=self._facts(),
            about=self._about,
        )
        self._about = None
        with self._changed:
            for _ in steps:
                self._steps.popleft()
            self._settings += [setting_from_json(values) for values in answer["settings"]]
            self._until = int(answer["until"])
            self._changed.notify_all()

    def _lease(self) -> None:
        """Commit what is done, and lease the next windows."""
        assert self._lease_book is not None
        with self._changed:
            commit, progress = self._lease_book.message()
            missing = _WINDOWS_AHEAD - self._lease_book.ahead
        recent = time.monotonic() - self._told < _TELL_S
        if self._lease_book.ended or (not commit and (recent or (not progress and missing <= 0))):
            return
        self._told = time.monotonic()
        answer = self._client.call(
            "exchange",
            worker="trainer",
            generation=self._generation,
            commit=commit,
            progress=progress,
            count=max(0, missing),
        )
        with self._changed:
            self._lease_book.committed(commit)
            self._lease_book.ended = answer["reply"] == "END"
            for lease in answer.get("leases", ()):
                self._lease_book.take(lease)
