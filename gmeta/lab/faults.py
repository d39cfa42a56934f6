"""Does to the processes of a laboratory run what its scenario says, and writes down when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from gmeta.elastic.scenario import Contention, Cut, Event, Kill, Pause, Scenario
from gmeta.lab.coordinator import LabCoordinator, Line
from gmeta.lab.device import bind_to, contended_core
from gmeta.lab.folder import LabFolder, read_lines

_POLL_S = 0.02
_BURNER = "while True: pass"


@dataclass(frozen=True)
class ScriptStep:
    """Something to do once `due(step, seconds since the start)`."""

    due: Callable[[int, float], bool]
    do: Callable[[], None]


class Faults:
    """A thread that lives as long as the run, and works off the script of its faults. `close` raises an error in it."""

    def __init__(self, scenario: Scenario, folder: LabFolder, coordinator: LabCoordinator, line: Line | None) -> None:
        self._folder, self._coordinator, self._line = folder, coordinator, line
        self._script = [step for event in scenario.events for step in self._steps_of(event)]
        self._stopped: dict[int, int] = {}  # rank -> pid
        self._burners: dict[int, subprocess.Popen[bytes]] = {}  # rank -> process
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._file = folder.faults.open("a", buffering=1)
        self._thread = threading.Thread(target=self._run, name="gmeta-lab-faults", daemon=True)
        self._thread.start()

    def _steps_of(self, event: Event) -> list[ScriptStep]:
        if isinstance(event, Kill):
            return [ScriptStep(event.due, lambda: self._kill(event))]
        if isinstance(event, Pause):
            begin, end, rank = event.at_s, event.at_s + event.for_s, event.rank
            return [_at(begin, lambda: self._stop(rank)), _at(end, lambda: self._go_on(rank))]
        if isinstance(event, Cut):
            return [_at(event.at_s, self._cut), _at(event.at_s + event.for_s, self._mend)]
        if isinstance(event, Contention):
            found = [_at(event.from_s, lambda: self._burn(event.rank))]
            until = event.from_s + event.for_s if event.for_s is not None else float("inf")
            return [*found, _at(until, lambda: self._put_out(event.rank))]
        return []  # slowness is the emulated device's

    def _run(self) -> None:
        progress = _Progress(self._folder)
        try:
            while self._script and not self._closing.wait(_POLL_S):
                elapsed = self._folder.elapsed_s()
                if elapsed is None:
                    continue
                for step in [p for p in self._script if p.due(progress.step(), elapsed)]:
                    self._script.remove(step)
                    step.do()
        except BaseException as error:
            self._error = error

    def close(self) -> None:
        """Undo what still lasts, and end."""
        self._closing.set()
        self._thread.join()
        for rank in list(self._stopped):
            self._go_on(rank)
        for rank in list(self._burners):
            self._put_out(rank)
        self._file.close()
        if self._error is not None:
            raise self._error

    def _tell(self, what: str, **values: object) -> None:
        line = {"at": self._folder.elapsed_s(), "what": what, **values}
        self._file.write(json.dumps(line) + "\n")

    def _pid(self, rank: int) -> int | None:
        """Return the worker's process; None while the group is being started again."""
        starts = [line["pid"] for line in read_lines(self._folder.worker(rank)) if line["kind"] == "start"]
        pid: int | None = starts[-1] if starts and _is_alive(starts[-1]) else None
        return pid

    def _kill(self, event: Kill) -> None:
        if event.rank is not None and self._signal(event.rank, signal.SIGKILL) is not None:
            self._tell(f"kill rank {event.rank}")
        if event.coordinator:
            self._coordinator.kill(event.away_s)
            self._tell("kill coordinator", away_s=event.away_s)

    def _stop(self, rank: int) -> None:
        pid = self._signal(rank, signal.SIGSTOP)
        if pid is not None:
            self._stopped[rank] = pid
            self._tell(f"stop rank {rank}")

    def _go_on(self, rank: int) -> None:
        pid = self._stopped.pop(rank, None)
        if pid is not None and _is_alive(pid):
            os.kill(pid, signal.SIGCONT)
            self._tell(f"continue rank {rank}")

    def _signal(self, rank: int, number: signal.Signals) -> int | None:
        """Signal a worker, and return its process. Where there is none, the file says so and None is returned."""
        pid = self._pid(rank)
        if pid is None:
            self._tell(f"no rank {rank} to signal", signal=number.name)
            return None
        os.kill(pid, number)
        return pid

    def _burn(self, rank: int) -> None:
        burner = subprocess.Popen([sys.executable, "-c", _BURNER])
        bind_to(contended_core(), burner.pid)
        self._burners[rank] = burner
        self._tell(f"burner beside rank {rank}")

    def _put_out(self, rank: int) -> None:
        burner = self._burners.pop(rank, None)
        if burner is not None:
            burner.kill()
            burner.wait()
            self._tell(f"burner of rank {rank} ends")

    def _cut(self) -> None:
        assert self._line is not None
        self._line.cut()
        self._tell("line cut")

    def _mend(self) -> None:
        assert self._line is not None
        self._line.mend()
        self._tell("line mended")


def _at(when_s: float, do: Callable[[], None]) -> ScriptStep:
    return ScriptStep(lambda _, elapsed: elapsed >= when_s, do)


def _is_alive(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Progress:
    """The step that the run is in, from the file of rank 0's device, each line of which is read once."""

    def __init__(self, folder: LabFolder) -> None:
        self._path, self._offset, self._step = folder.worker(0), 0, 0

    def step(self) -> int:
        """Return the number of steps that rank 0 has computed."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            self._step = json.loads(line).get("step", self._step - 1) + 1
        return self._step
