"""Processes forked from a server that has imported torch and gmeta once: they start in milliseconds, not in seconds.

Workers of a launch and commands of tests run in them as they would in an interpreter of their own. What is about the
start itself, or about imports, takes a real one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # torch.optim imports it at the first step
        "torch.distributed.checkpoint",
        "torch.distributed.elastic.multiprocessing",
        "gmeta.embedding.exchange",
        "gmeta.training.trainer",
        "gmeta.elastic.service",
        "gmeta.data.prepare.prepare",
        "warmed",
    ]
)
_HERE = str(Path(__file__).parent)


def begin_process(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """Fork the server, which it starts at the first call: it is a bare interpreter that finds modules of tests by
    PYTHONPATH alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", _HERE, prepend=os.pathsep)
        process = CONTEXT.Process(target=target, args=arguments, daemon=daemon)
        process.start()
    return process


class Inherited:
    """A file descriptor that goes to the process that is being started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(duplicate: Any) -> int:
    return int(duplicate.detach())


def _interpreter(
    words: Sequence[str], environment: Mapping[str, str], streams: Mapping[int, int], begun: Connection
) -> None:
    """Do what `python -c code …` or `python -m module …` does."""
    import torch

    os.setsid()
    begun.send(None)
    begun.close()
    for theirs, ours in streams.items():
        os.dup2(ours, theirs)
        os.close(ours)
    sys.stdin = open(0)  # noqa: SIM115 - multiprocessing has put /dev/null in its place
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    flag, what, *arguments = words
    sys.argv = [flag, *arguments]
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert flag == "-c"
        exec(what, {"__name__": "__main__"})


class Forked:
    """What `subprocess.Popen` returns, of `[sys.executable, *words]` in a session of its own.

    Its streams are this process's, but for those of `pipes` (0, 1, 2), which are text files here.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], pipes: Sequence[int] = ()) -> None:
        begun, theirs = CONTEXT.Pipe(duplex=False)
        ends = {number: os.pipe() for number in pipes}
        given = {number: ends[number][number > 0] if number in ends else number for number in (0, 1, 2)}
        streams = {number: Inherited(ours) for number, ours in given.items()}
        self._process = begin_process(_interpreter, list(words), dict(environment), streams, theirs)
        theirs.close()
        begun.recv()  # from now on signals reach its process group
        begun.close()
        self.pid = self._process.pid
        kept = {n: open(ours[n == 0], "r" if n else "w") for n, ours in ends.items()}  # noqa: SIM115
        for number in ends:
            os.close(given[number])
        self.stdin, self.stdout, self.stderr = (kept.get(number) for number in (0, 1, 2))

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Close stdin, read the other pipes to their ends, and wait."""
        files = (self.stdout, self.stderr)
        if self.stdin is not None:
            self.stdin.close()
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(lambda file: "" if file is None or file.closed else file.read(), files))
        for file in filter(None, files):
            file.close()
        self.wait(timeout)
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def begin_worker(handler: Any, arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """In place of `SubprocessHandler._popen`."""
    python, *words = arguments
    assert python == sys.executable
    return Forked(words, environment)
