"""Processes forked from a server that has imported torch and gmeta once: they start in milliseconds, not in seconds.

Workers of a launch and commands of tests run in them as they would in an interpreter of their own. What is about the
start itself, or about imports, takes a real one.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # torch.optim imports it at the first step
        "torch.distributed.checkpoint",
        "torch.distributed.elastic.multiprocessing",
        "gmeta.embedding.exchange",
        "gmeta.training.run",
        "gmeta.evaluation.run",
    ]
)


class Inherited:
    """A file descriptor that goes to the process that is being started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(duplicate: Any) -> int:
    return int(duplicate.detach())


def _interpreter(words: Sequence[str], environment: Mapping[str, str], out: int, err: int, begun: Connection) -> None:
    """Do what `python -c code …` does."""
    import torch

    os.setsid()
    begun.send(None)
    begun.close()
    for ours, theirs in ((out, 1), (err, 2)):
        os.dup2(ours, theirs)
        os.close(ours)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    flag, code, *arguments = words
    assert flag == "-c"
    sys.argv = [flag, *arguments]
    exec(code, {"__name__": "__main__"})


class Forked:
    """What `subprocess.Popen` returns, of `[sys.executable, *words]` in a session of its own."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        begun, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (list(words), dict(environment), Inherited(1), Inherited(2), theirs)
        self._process = CONTEXT.Process(target=_interpreter, args=arguments)
        self._process.start()
        theirs.close()
        begun.recv()  # from now on signals reach its process group
        begun.close()
        self.pid = self._process.pid

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


def begin_worker(handler: Any, arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """In place of `SubprocessHandler._popen`."""
    python, *words = arguments
    assert python == sys.executable
    return Forked(words, environment)
