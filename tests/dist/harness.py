"""Runs a function on N gloo workers. Pools of workers are kept for a test file, so that a test costs milliseconds.

    from harness import run_ranks
    results = run_ranks(2, function, *args)     # function(mesh, *args) on each rank; picklable, at module level

A failure on any rank fails the test with that rank's traceback; the pool is then thrown away. One rank runs in
this process.
"""

from __future__ import annotations

import atexit
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from forks import CONTEXT, begin_process

from gmeta.parallel.launch import worker_environment
from gmeta.parallel.mesh import Mesh, open_mesh

Function = Callable[..., Any]


def _worker(environment: dict[str, str], timeout_s: int, node_size: int, tasks: Connection) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    mesh = open_mesh("cpu", timeout_s, node_size)
    while True:
        try:
            function, args = tasks.recv()
        except EOFError:
            os._exit(0)
        try:
            tasks.send((True, function(mesh, *args)))
        except BaseException:
            tasks.send((False, traceback.format_exc()))


class Pool:
    """`nproc` workers; `results` are those of the ranks that came back from the last run, also from one that failed."""

    def __init__(self, nproc: int, mesh_timeout_s: int, node_size: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(nproc):
            ours, theirs = CONTEXT.Pipe()
            environment = worker_environment(rank, nproc, self.store.port)
            self.processes.append(begin_process(_worker, environment, mesh_timeout_s, node_size, theirs, daemon=True))
            theirs.close()
            self.pipes.append(ours)

    def run(self, function: Function, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        self.results = results = dict[int, Any]()
        errors: dict[int, str] = {}
        end = time.monotonic() + timeout_s
        while len(results) + len(errors) < len(self.pipes):
            waiting = [p for rank, p in enumerate(self.pipes) if rank not in results and rank not in errors]
            ready = wait(waiting, timeout=max(0.0, min(end - time.monotonic(), 5.0 if errors else timeout_s)))
            if not ready:
                late = [self.pipes.index(p) for p in waiting]
                errors.update(dict.fromkeys(late, "no answer (waiting for a peer that failed, or a deadlock)"))
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    fine, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(5)
                    fine, value = False, f"the process died, exit code {self.processes[rank].exitcode}"
                (results if fine else errors)[rank] = value
        if errors:
            raise AssertionError("\n".join(f"--- rank {rank} ---\n{errors[rank]}" for rank in sorted(errors)))
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


_POOLS: dict[tuple[int, int, int], Pool] = {}
_KEPT = 2
"""Pools that are kept. The threads of idle process groups wake a hundred times a second: a rank takes up to 10 % of a
core."""


def run_ranks(
    nproc: int, function: Function, *args: Any, timeout_s: float = 60.0, mesh_timeout_s: int = 60, node_size: int = 0
) -> list[Any]:
    """`function(mesh, *args)` on `nproc` ranks, in nodes of `node_size`; results in rank order.

    AssertionError with every rank's traceback.
    """
    if nproc == 1:
        return [function(Mesh(), *args)]
    key = (nproc, mesh_timeout_s, node_size)
    pool = _POOLS.pop(key, None) or Pool(*key)
    try:
        results = pool.run(function, args, timeout_s)
    except BaseException:
        pool.close()
        raise
    _POOLS[key] = pool
    if len(_POOLS) > _KEPT:
        _POOLS.pop(next(iter(_POOLS))).close()  # the one that was not used for longest
    return results


@atexit.register
def close_pools() -> None:
    """End all workers."""
    for pool in _POOLS.values():
        pool.close()
    _POOLS.clear()
