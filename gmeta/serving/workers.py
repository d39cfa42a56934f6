"""The worker processes of a server: one listening socket, which all of them accept connections from."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from gmeta.config.serving import ServeConfig
from gmeta.elastic.service import url_of


@dataclass(frozen=True)
class ServerWorker:
    """What a worker process is told."""

    config: ServeConfig
    tokens: list[str]
    secret: bytes
    number: int
    folder: str  # of the workers' sockets
    bound: socket.socket


Work = Callable[[ServerWorker, Callable[[str], None]], None]
"""Serves, once it has told the version that it serves."""


def run_workers(config: ServeConfig, tokens: list[str], bound: socket.socket, work: Work) -> int:
    """Run `config.workers` processes until SIGTERM or Ctrl-C, and start one anew that dies. Return the exit code: 1
    where a worker cannot begin.
    """
    context = multiprocessing.get_context("spawn")
    folder, secret = tempfile.mkdtemp(prefix="gmeta-serve-"), secrets.token_bytes(32)
    stopping = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    running: dict[int, tuple[BaseProcess, Connection]] = {}

    def start(number: int) -> None:
        heard, told = context.Pipe(duplex=False)
        worker = ServerWorker(config, tokens, secret, number, folder, bound)
        process = context.Process(target=_work, args=(worker, told, work), daemon=True)
        process.start()
        told.close()
        running[number] = (process, heard)

    try:
        for number in range(config.workers):
            start(number)
        versions = [_hear(heard, stopping) for _, heard in running.values()]
        if None in versions:
            return 0 if stopping.is_set() else 1  # it has said why
        print(f"serves {versions[0]} on {url_of(bound)} with {config.workers} workers", flush=True)
        while not stopping.is_set():
            wait([process.sentinel for process, _ in running.values()], 0.2)
            for number, (process, heard) in list(running.items()):
                if process.exitcode is None or stopping.is_set():
                    continue
                if versions[number] is None and _hear(heard, stopping) is None:
                    return 1  # it would not begin the next time either
                print(f"gmeta serve: worker {number} died ({process.exitcode}) and is started anew", file=sys.stderr)
                versions[number] = None
                start(number)
        return 0
    finally:
        _stop([process for process, _ in running.values()], config.timeout_s + 5)
        shutil.rmtree(folder, ignore_errors=True)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _hear(heard: Connection, stopping: threading.Event) -> str | None:
    """Return the version that a worker tells when it is ready; None where it ends, or all shall."""
    while not stopping.is_set():
        if heard.poll(0.2):
            try:
                return heard.recv_bytes().decode()
            except EOFError:
                return None
    return None


def _stop(processes: list[BaseProcess], timeout_s: float) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _work(worker: ServerWorker, told: Connection, work: Work) -> None:
    """Run in the process of a worker; it ends with the process that started it."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        work(worker, lambda version: told.send_bytes(version.encode()))
        code = 0
    except ValueError as error:
        print(f"gmeta serve: error: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take the interpreter apart would free what libraries still hold


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
