"""The coordinator of a laboratory run, which can be killed, and the line to it, which can be cut."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from pathlib import Path

from gmeta.training.supervise import end_coordinator, start_coordinator

_CHUNK = 1 << 16


class LabCoordinator:
    """A `gmeta coordinate` process. After `kill` it is started again on the same journal and port."""

    def __init__(self, folder: Path, policy: str, max_restarts: int) -> None:
        self.token_file = folder / "coordinator.token"
        self._words = ["coordinate", "--journal", folder / "coordinator.db", "--token_file", self.token_file]
        self._words += ["--policy", policy, "--trace", folder / "coordinator.jsonl", "--max_restarts", max_restarts]
        self._log = folder / "coordinator.log"
        self.port = 0
        self._process = self._start()
        self._again: threading.Timer | None = None

    @property
    def url(self) -> str:
        """Return the address at which it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Return the process that is there, or was last."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[str]:
        process, self.port = start_coordinator(self._words, self.port, self._log)
        return process

    def kill(self, away_s: float) -> None:
        """Send SIGKILL. It is started again `away_s` later, which takes a second more."""
        self._process.kill()
        self._process.wait()
        self._again = threading.Timer(away_s, self._restart)
        self._again.daemon = True
        self._again.start()

    def _restart(self) -> None:
        self._process = self._start()

    def close(self) -> None:
        """End the coordinator."""
        if self._again is not None:
            self._again.cancel()
            self._again.join()
        end_coordinator(self._process)


class Line:
    """A TCP proxy to 127.0.0.1:`port`. While it is cut, connections are broken and new ones are refused."""

    def __init__(self, port: int) -> None:
        self._to, self.port = port, 0
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.mend()

    @property
    def url(self) -> str:
        """Return the address at which workers find the coordinator."""
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        """Take connections (again), at the same port."""
        self._server = socket.create_server(("127.0.0.1", self.port))
        self.port = self._server.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="gmeta-lab-line", daemon=True)
        self._accepting.start()

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        _shut(self._server)
        self._accepting.join()
        self._server.close()
        while self._threads:
            for connection in list(self._open):
                _shut(connection)
            self._threads[0].join(0.01)
            self._threads = [thread for thread in self._threads if thread.is_alive()]

    def close(self) -> None:
        """End the proxy."""
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # the line was cut
                return
            thread = threading.Thread(target=self._serve, args=(near,), name="gmeta-lab-line", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            ends = {near, far}
            self._open |= ends
            back = threading.Thread(target=_copy, args=(far, near), name="gmeta-lab-line", daemon=True)
            back.start()
            _copy(near, far)
            back.join()
            self._open -= ends


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until one end closes; then close both."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
    _shut(source)
    _shut(target)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        end.shutdown(socket.SHUT_RDWR)
