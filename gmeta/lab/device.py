"""The emulated device of a worker: its computing takes what the scenario says, in proportion to the work.

A worker sleeps through the time for which a slower device would compute. So eight of them fit two cores, and the
system's scheduler does not decide how long a step takes. The real computing must be far below the emulated; how often
it was not is counted. A rank that shares its core with a burner (`contention`) cannot sleep: it computes for as much
CPU time, and what the burner makes of that is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from gmeta.elastic.scenario import Contention, Scenario
from gmeta.lab.folder import LabFolder, read_lines

_BLOCK = bytes(1 << 18)  # hashed in 0.2 to 0.4 ms, without holding the interpreter: loader and agent go on


class Device:
    """Emulates the device of one rank, and writes a line for every micro-batch.

    `incarnation` counts the machines that the rank has had.
    """

    def __init__(
        self,
        scenario: Scenario,
        rank: int,
        incarnation: int,
        folder: LabFolder,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.scenario, self.rank, self.incarnation = scenario, rank, incarnation
        self.contended = any(isinstance(e, Contention) and e.rank == rank for e in scenario.events)
        self._folder, self._now, self._sleep = folder, now, sleep
        self._started: float | None = None
        self._measured = 1.0  # slowdown of a contended core, last time
        path = folder.worker(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._file.write(json.dumps({"kind": "start", "pid": os.getpid(), "incarnation": incarnation}) + "\n")

    def __call__(self, step: int, work: float, first: bool, spent_s: float) -> None:
        """Wait until the device would have ended a micro-batch of `work` tasks, which took `spent_s` seconds here."""
        begun = self._now() - spent_s
        if self._started is None:
            self._started = self._folder.start_clock(begun)
        at = begun - self._started
        factor = self.scenario.slowdown(self.rank, step=step, time_s=at, incarnation=self.incarnation)
        nominal_s = self.scenario.fixed_s + work * self.scenario.slot_s if work > 0 else 0.0
        target_s = nominal_s * factor * self._noise(step)
        if self.contended:
            _burn(target_s - spent_s)
        elif target_s > spent_s:
            self._sleep(target_s - spent_s)
        took_s = self._now() - begun
        if self.contended and target_s > 0:
            self._measured = max(1.0, took_s / target_s)
        line = {
            "kind": "part",
            "step": step,
            "first": first,
            "work": work,
            "factor": factor * self._measured,
            "at": at,
            "took_s": took_s,
            "target_s": target_s,
            "spent_s": spent_s,
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _noise(self, step: int) -> float:
        """Return the noise factor of a step, which is the same for all its micro-batches."""
        if not self.scenario.noise:
            return 1.0
        draw = random.Random(f"{self.scenario.seed} noise {self.rank} {step}").gauss(0, self.scenario.noise)
        return 1 + max(-0.5, draw)


def _burn(seconds: float) -> None:
    """Compute for so many seconds of this thread's CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.blake2b(_BLOCK).digest()


def machines_so_far(trace: Path, rank: int) -> int:
    """Return how many machines of the rank were replaced, by the coordinator's trace."""
    settings = [line["setting"] for line in read_lines(trace) if line["kind"] == "decide" and line["setting"]]
    return sum(setting["restart"] == rank for setting in settings)


def contended_core() -> int:
    """Return the core that a contended worker and its burner share: the last that this process may use."""
    if not hasattr(psutil.Process, "cpu_affinity"):
        raise ValueError("contention needs a system that binds processes to cores, such as Linux: use persistent")
    return max(psutil.Process().cpu_affinity() or [0])


def bind_to(core: int, pid: int | None = None) -> None:
    """Let a process (this one by default) run on one core only."""
    psutil.Process(pid).cpu_affinity([core])
