"""Audits of a data-sharding service: the same script of events for every system, counted from what its workers finish.

A `System` is a server and its workers, which are puppets: each event happens when this script says so, amid a shard or
between two, not when a timer hits it by luck.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puppet import Puppet, environment

HERE = Path(__file__).resolve().parent
START_S = 60.0
ASK_AGAIN_S = 0.2


@dataclass(frozen=True)
class System:
    """How to start one system; the server keeps its state, if it does, in `folder`."""

    variant: str
    server: Callable[[int, Path], list[str]]  # port, folder -> command
    worker: Callable[[int, str], list[str]]  # port, name -> command
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of `open`, where they differ from an audit's
    leases: bool = True  # that run out
    checkpoints: bool = False  # workers take the server's own checkpoint, and restore it after its death


def gmeta_system(variant: str = "gmeta", **options: Any) -> System:
    """Return `gmeta coordinate` with its defaults, on this interpreter."""
    return System(
        variant,
        lambda port, folder: [
            *(sys.executable, "-m", "gmeta", "coordinate"),
            *("--journal", str(folder / "journal"), "--port", str(port)),
        ],
        lambda port, name: [sys.executable, str(HERE / "gmeta_driver.py"), f"127.0.0.1:{port}", name],
        options=options,
    )


def dlrover_system(python: Path, variant: str = "dlrover", checkpoints: bool = False) -> System:
    """Return DLRover's local master, started as its `dlrover-run` does, with errors alone in its log."""
    return System(
        variant,
        lambda port, folder: [
            *(str(python), "-u", "-m", "dlrover.python.master.main", "--platform", "local", "--job_name", "benchmark"),
            *("--port", str(port), "--node_num", "8", "--task_process_timeout", "3"),
        ],
        lambda port, name: [str(python), str(HERE / "dlrover_driver.py"), f"127.0.0.1:{port}", name],
        environment={"DLROVER_LOG_LEVEL": "ERROR"},
        leases=False,
        checkpoints=checkpoints,
    )


class Running:
    """A system's server and workers, in processes."""

    def __init__(self, system: System, folder: Path, num_workers: int, **plan: Any) -> None:
        self.system, self._folder, self._plan = system, folder, plan
        self._log, self._port = folder / "log", _free_port()
        self._server = self._start()
        self.workers = [
            Puppet(
                system.worker(self._port, f"w{number}"),
                f"{system.variant} {number}",
                {**system.environment, "NODE_ID": str(number)},
                self._log,
            )
            for number in range(num_workers)
        ]

    def _start(self) -> subprocess.Popen[str]:
        words, variables = self.system.server(self._port, self._folder), environment(self.system.environment)
        with self._log.open("a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, text=True, env=variables, cwd=self._folder)

    def wait(self) -> None:
        """Wait until the server accepts connections."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1.0):
                return
            if self._server.poll() is not None or time.monotonic() > deadline:
                words = self._log.read_text()[-2000:]
                raise RuntimeError(f"the server of {self.system.variant} did not start:\n{words}")
            time.sleep(0.05)

    def open(self) -> None:
        """Have every worker tell the server of the data, as it does when it starts."""
        for worker in self.workers:
            worker.ask("open", **self._plan)

    def restart_server(self) -> None:
        """Send SIGKILL, and run the same command on the same port and folder."""
        self._server.kill()
        self._server.wait()
        self._server = self._start()
        self.wait()

    def end(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.end()
        self._server.kill()
        self._server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running(system: System, folder: Path, num_workers: int, **plan: Any) -> Iterator[Running]:
    """Start a system, and tell it of the data."""
    folder.mkdir(parents=True)
    found = Running(system, folder, num_workers, **{**plan, **system.options})
    try:
        found.wait()
        found.open()
        yield found
    finally:
        found.end()


@dataclass(frozen=True)
class Coverage:
    """How many samples of an epoch nobody finished, and how often one was finished once more than needed."""

    missing: int
    repeated: int


def coverage(num_samples: int, finished: Iterable[range]) -> Coverage:
    """Count from the ranges of samples that workers finished, each as often as it was."""
    counts = Counter(sample for samples in finished for sample in samples)
    outside = [sample for sample in counts if not 0 <= sample < num_samples]
    if outside:
        raise ValueError(f"sample {outside[0]} was finished: there are only {num_samples}")
    return Coverage(num_samples - len(counts), sum(counts.values()) - len(counts))


@dataclass(frozen=True)
class Effort:
    """Sizes of the audits. A worker that was told the end asks again for `watch_s`."""

    shards: int
    shard_size: int
    lease_s: float
    max_failures: int
    watch_s: float

    @property
    def plan(self) -> dict[str, Any]:
        """Return what workers tell the server."""
        return {
            "num_samples": self.shards * self.shard_size,
            "shard_size": self.shard_size,
            "lease_s": self.lease_s,
            "max_failures": self.max_failures,
            "skip": False,
        }


class Scene:
    """What the workers of a running system hold and have finished."""

    def __init__(self, workers: Sequence[Puppet], num_samples: int) -> None:
        self._workers, self._num_samples = workers, num_samples
        self.held: dict[int, dict[str, Any]] = {}
        self.finished: list[range] = []
        self.taken: list[tuple[float, int]] = []  # when, the shard's first sample

    @property
    def coverage(self) -> Coverage:
        """Return the coverage until now."""
        return coverage(self._num_samples, self.finished)

    def take(self, worker: int) -> str:
        """Take a shard, and return SHARD, WAIT, END or REFUSED."""
        answer = self._workers[worker].ask("take")
        if answer["reply"] == "SHARD":
            self.held[worker] = answer
            self.taken.append((time.monotonic(), answer["start"]))
        return str(answer["reply"])

    def finish(self, worker: int) -> bool:
        """Finish the worker's shard, and return whether the server says that it counts."""
        shard = self.held.pop(worker)
        self.finished.append(range(shard["start"], shard["stop"]))
        return bool(self._workers[worker].ask("done", key=shard["key"])["accepted"])

    def fail(self, worker: int) -> None:
        """Have the worker give its shard up."""
        self._workers[worker].ask("fail", key=self.held.pop(worker)["key"])

    def rounds(self, count: int, workers: Sequence[int]) -> None:
        """Have every worker take a shard, then finish it, `count` times."""
        for _ in range(count):
            for worker in workers:
                assert self.take(worker) == "SHARD"
            for worker in workers:
                self.finish(worker)

    def drain(self, workers: Sequence[int], watch_s: float, poison: int | None = None) -> dict[int, str]:
        """Have workers take and finish until nothing is left, and return what each was told first, other than SHARD or
        WAIT.

        A worker that was told the end asks again for `watch_s` as long as samples are missing. The shard that starts at
        sample `poison` fails every time.
        """
        told: dict[int, str] = {}
        first_told = None
        while True:
            replies = [self._turn(worker, poison) for worker in workers]
            for worker, reply in zip(workers, replies, strict=True):
                if reply in ("END", "REFUSED"):
                    told.setdefault(worker, reply if self.coverage.missing else "END AFTER ALL")
            if len(told) == len(workers):
                first_told = first_told or time.monotonic()
                if self.coverage.missing == 0 or time.monotonic() - first_told > watch_s:
                    return told
            if "SHARD" not in replies:
                time.sleep(ASK_AGAIN_S)

    def _turn(self, worker: int, poison: int | None) -> str:
        reply = self.take(worker)
        if reply == "SHARD" and self.held[worker]["start"] == poison:
            self.fail(worker)
        elif reply == "SHARD":
            self.finish(worker)
        return reply


Numbers = dict[str, float]
"""Numbers by metric."""


def worker_killed(system: System, folder: Path, effort: Effort) -> Numbers:
    """Kill one of four workers (SIGKILL) amid a shard."""
    with running(system, folder, 4, **effort.plan) as found:
        scene = Scene(found.workers, effort.plan["num_samples"])
        scene.rounds(4, range(4))
        for worker in range(4):
            assert scene.take(worker) == "SHARD"
        found.workers[1].signal(signal.SIGKILL)
        killed, lost = time.monotonic(), scene.held.pop(1)["start"]
        for worker in (0, 2, 3):
            scene.finish(worker)
        told = scene.drain((0, 2, 3), effort.watch_s)
    again = [when - killed for when, start in scene.taken if start == lost and when > killed]
    return _numbers(scene) | {
        "told the end too early": sum(reply == "END" for reply in told.values()),
        **({"served again after": again[0]} if again else {}),
    }


def server_killed(system: System, folder: Path, effort: Effort) -> Numbers:
    """Kill the server (SIGKILL) while three of four workers are amid a shard; the fourth asks first, then all go on.

    Where the system has checkpoints of its own, one is taken before the fifth round and restored after the restart.
    """
    with running(system, folder, 4, **effort.plan) as found:
        scene = Scene(found.workers, effort.plan["num_samples"])
        scene.rounds(4, range(4))
        saved = found.workers[0].ask("save")["saved"] if system.checkpoints else None
        scene.rounds(1, range(4))
        for worker in range(3):
            assert scene.take(worker) == "SHARD"
        found.restart_server()
        early = scene.take(3) == "END"
        found.open()
        if saved is not None:
            found.workers[0].ask("restore", saved=saved)
        for worker in list(scene.held):
            scene.finish(worker)
        told = scene.drain(range(4), effort.watch_s)
    return _numbers(scene) | {"told the end too early": early + sum(reply == "END" for reply in told.values())}


def failing_shard(system: System, folder: Path, effort: Effort) -> Numbers:
    """Let the first shard fail in every worker's hands."""
    with running(system, folder, 4, **effort.plan) as found:
        scene = Scene(found.workers, effort.plan["num_samples"])
        told = scene.drain(range(4), min(effort.watch_s, 3.0), poison=0)
    return _numbers(scene) | {
        "attempts": sum(start == 0 for _, start in scene.taken),
        "told the end as if all were done": sum(reply == "END" for reply in told.values()),
        "told of the failure": sum(reply == "REFUSED" for reply in told.values()),
    }


def late_report(system: System, folder: Path, effort: Effort) -> Numbers:
    """Stop a worker amid the only shard and take it for dead; another has the shard when the first one wakes.

    A lease runs out by itself. For a system without leases a third worker reports the failure in the stopped one's
    name, as DLRover's master on Kubernetes does for the tasks of a pod that failed. At last the second worker fails.
    """
    plan = {**effort.plan, "num_samples": effort.shard_size}
    with running(system, folder, 3, **plan) as found:
        scene = Scene(found.workers, effort.shard_size)
        assert scene.take(0) == "SHARD"
        found.workers[0].signal(signal.SIGSTOP)
        if not system.leases:
            found.workers[2].ask("fail", key=scene.held[0]["key"])
        while scene.take(1) != "SHARD":
            time.sleep(ASK_AGAIN_S)
        found.workers[0].signal(signal.SIGCONT)
        accepted = scene.finish(0)
        scene.fail(1)
        again = scene.take(2) == "SHARD"
    return {"late report counted": accepted, "served again after the holder failed": again}


def _numbers(scene: Scene) -> Numbers:
    return {"missing": scene.coverage.missing, "repeated": scene.coverage.repeated}


AUDITS: Mapping[str, Callable[[System, Path, Effort], Numbers]] = {
    "worker killed": worker_killed,
    "server killed": server_killed,
    "failing shard": failing_shard,
    "late report": late_report,
}
