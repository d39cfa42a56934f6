"""The coordinator of a laboratory run: one that can be killed, and a line to it that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from pathlib import Path

from gmeta.parallel.launch import companion_environment

_CHUNK = 1 << 16


class LabCoordinator:
    """A `gmeta coordinate` process; after `kill` it is started again on the same journal and port."""

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
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process that is there, or was last."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gmeta", *map(str, self._words), "--port", str(self.port)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=companion_environment(),
                start_new_session=True,
            )
        assert process.stdout is not None
        with process.stdout as out:
            line = out.readline()
        if "listening on http://" not in line:
            process.wait()
            raise ValueError(f"the coordinator did not start: {self._log.read_text().strip()}")
        self.port = int(line.strip().rsplit(":", 1)[1])
        return process

    def kill(self, away_s: float) -> None:
        """SIGKILL; `away_s` later it is started again, which takes a second more."""
        self._process.kill()
        self._process.wait()
        self._again = threading.Timer(away_s, self._restart)
        self._again.daemon = True
        self._again.start()

    def _restart(self) -> None:
        self._process = self._start()

    def close(self) -> None:
        """End it."""
        if self._again is not None:
            self._again.cancel()
            self._again.join()
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Line:
    """A TCP proxy to 127.0.0.1:`port` that can be cut: connections break, new ones are refused, until it is mended."""

    def __init__(self, port: int) -> None:
        self._to, self.port = port, 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gmeta-lab-line", daemon=True)
        self._thread.start()
        self.mend()

    @property
    def url(self) -> str:
        """Where workers find the coordinator."""
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def mend(self) -> None:
        """Take connections again, at the same port."""
        asyncio.run_coroutine_threadsafe(self._mend(), self._loop).result()

    def close(self) -> None:
        """End it."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _mend(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            writer.transport.abort()
        while self._open:
            await asyncio.sleep(0.01)

    async def _end(self) -> None:
        await self._cut()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # transports that were aborted close their sockets in the loop's next round

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # the coordinator is away
            writer.transport.abort()
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        self._open |= {writer, back_writer}
        try:
            await asyncio.gather(_pump(reader, back_writer), _pump(back_reader, writer))
        finally:
            self._open -= {writer, back_writer}


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one side ends; then the other ends too."""
    try:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()
    finally:
        writer.transport.abort()
