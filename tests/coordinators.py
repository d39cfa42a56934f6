"""Coordinators of tests' own, as processes, and the audit of their journals."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from forks import Forked

from gmeta.elastic.client import Client
from gmeta.elastic.ledger import JobSpec

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Process:
    """`gmeta coordinate` on one journal: killed and started again, always on the same port."""

    def __init__(self, journal: Path, *words: object, program: tuple[str, ...] = ("-m", "gmeta")) -> None:
        self.journal, self.words, self.program, self.port = journal, words, program, 0
        self.url = ""
        self.start()

    def start(self) -> None:
        words = [*self.program, "coordinate", "--journal", str(self.journal), "--port", str(self.port)]
        self.process = Forked([*words, *map(str, self.words)], ENVIRONMENT, pipes=(1, 2))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("listening on http://"):
            raise AssertionError(line + self.end())
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def end(self) -> str:
        """Ask it to end; what it wrote to stderr."""
        self.process.terminate()
        return self.process.communicate(timeout=60)[1]

    def client(self, token: str | None = None, patience_s: float = 60.0, run: str = "r") -> Client:
        return Client(self.url, token, run=run, patience_s=patience_s)


def fails(*words: object) -> str:
    """The one line of a coordinator that cannot begin."""
    argv = [sys.executable, "-m", "gmeta", "coordinate", *map(str, words)]
    done = subprocess.run(argv, text=True, capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def records(journal: Path) -> list[tuple[str, dict]]:
    """What stands in a journal, read without any of gmeta's code."""
    db = sqlite3.connect(journal)
    found = [(kind, json.loads(body)) for kind, body in db.execute("SELECT kind, body FROM records ORDER BY seq")]
    db.close()
    return found


def audit(journal: Path, spec: JobSpec, delivered: Counter[tuple[int, int]] | None = None) -> None:
    """Every sample was delivered as its mode promises, by the records alone, and by what workers `delivered`.

    Counts with a model of its own: who holds a work item, from which sample on, and what is finished.
    """
    held: dict[tuple[int, int], tuple[int, int]] = {}  # -> attempt, samples done
    done: dict[tuple[int, int], int] = {}
    given, ended = Counter(), Counter()
    for kind, body in records(journal):
        if kind == "Leased":
            for lease in body["leases"]:
                key = lease["epoch"], lease["shard"]
                assert key not in held, f"{key} was given out twice at a time"
                assert lease["attempt"] == given[key] + 1, f"{key} has an attempt number twice"
                assert lease["done"] == done.get(key, 0)
                assert not ended[key], f"{key} was given out after its end"
                given[key] += 1
                if spec.mode == "at_most_once":
                    ended[key] += 1
                else:
                    held[key] = lease["attempt"], lease["done"]
        elif kind == "Renewed":
            lease = body["lease"]
            key = lease["epoch"], lease["shard"]
            assert held[key][0] == lease["attempt"]
            held[key] = lease["attempt"], lease["done"]
        elif kind in ("Committed", "Returned"):
            key = body["epoch"], body["shard"]
            attempt, progress = held.pop(key)
            assert attempt == body["attempt"]
            done[key] = progress
            ended[key] += kind == "Committed"
    size = -(-spec.num_samples // spec.work_item_size)
    assert ended == {(epoch, work_item): 1 for epoch in range(spec.epochs) for work_item in range(size)}
    if delivered is not None:
        everything = {(epoch, position) for epoch in range(spec.epochs) for position in range(spec.num_samples)}
        if spec.mode == "at_most_once":
            assert set(delivered.values()) <= {1}
        else:
            assert set(delivered) == everything


def until(condition, seconds: float = 30.0) -> None:
    """Wait for something that other processes bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
