"""Worker processes that do what they are told, line by line, so that two systems go through the same events.

A line to a worker is a JSON object {"do": name, ...}; its answer is one line, too. Standard library alone: some workers
run in an interpreter without gmeta.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ANSWER_S = 100.0
"""A worker that says nothing for so long is lost; DLRover's client alone asks for 50 s."""


def serve(worker: object) -> None:
    """Serve calls in the worker's process. Every line of the input is a call of one of its methods."""
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        fields = json.loads(line)
        print(json.dumps(getattr(worker, fields.pop("do"))(**fields)), file=out, flush=True)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that shares two cores with a dozen others."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | dict(more)


class Puppet:
    """One worker process."""

    def __init__(self, words: Sequence[str], name: str, variables: Mapping[str, str], log: Path) -> None:
        self.name, self._log = name, log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(variables),
            )

    def send(self, do: str, **fields: Any) -> None:
        """Tell it what to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return its answer. RuntimeError when it ended, or says nothing."""
        out = self._process.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], ANSWER_S)  # one answer a line told: nothing is left in a buffer
        line = out.readline() if ready else ""
        if not line:
            raise RuntimeError(f"worker {self.name} did not answer; its last words:\n{self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Tell, and wait for the answer."""
        self.send(do, **fields)
        return self.receive()

    def signal(self, number: signal.Signals) -> None:
        """Send SIGSTOP, SIGCONT or SIGKILL."""
        self._process.send_signal(number)

    def end(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.communicate()
