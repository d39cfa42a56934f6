"""Workers of one server ask each other for states, and tell each other to erase them, over local sockets.

A message is its length (4 bytes), JSON of that length, and the bytes that the JSON announces as `size`. The sockets lie
in a folder that only their owner can enter. Nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from gmeta.serving.metrics import Family, Metrics
from gmeta.serving.refusal import Declined
from gmeta.serving.states import Kept, States

_TIMEOUT_S = 5.0


class Peers:
    """The workers of a server, of which this process is number `own`; `folder` has a socket for each."""

    def __init__(self, own: int, count: int, folder: Path, states: States, metrics: Metrics) -> None:
        self._own, self._count, self._folder = own, count, folder
        self._states, self._metrics = states, metrics

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Answer the others meanwhile."""
        if self._count == 1:
            yield
            return
        path = self._socket(self._own)
        path.unlink(missing_ok=True)  # of a worker that was killed
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield
        finally:
            server.close()

    def _socket(self, worker: int) -> Path:
        return self._folder / f"worker-{worker}.sock"

    async def find(self, owner: str, state_id: str) -> Kept:
        """Return the kept rows of a state, whoever has them. Raises `Declined` as `States.find` does."""
        worker = self._states.worker_of(owner, state_id)
        if worker == self._own or worker >= self._count:
            return self._states.find(owner, state_id)
        head, content = await self._ask(worker, {"ask": "find", "owner": owner, "id": state_id})
        support = pa.ipc.open_stream(content).read_all()
        return Kept(head["key"], support, {name: bytes.fromhex(digest) for name, digest in head["digests"].items()})

    async def erase(self, owner: str, state_id: str) -> None:
        """Erase a state everywhere. Raises `Declined` as `States.find` does, and 503 where a worker does not answer."""
        key = (await self.find(owner, state_id)).key
        self._states.erase(owner, state_id, key)
        message = {"ask": "erase", "owner": owner, "id": state_id, "key": key}
        await asyncio.gather(*(self._ask(worker, message) for worker in self._others))

    async def families(self) -> dict[str, list[Family]]:
        """Return what every worker counts; one that does not answer is left out."""
        found = {str(self._own): self._metrics.families()}
        for worker in self._others:
            try:
                head, _ = await self._ask(worker, {"ask": "metrics"})
            except Declined:
                continue
            found[str(worker)] = head["families"]
        return found

    @property
    def _others(self) -> Sequence[int]:
        return [worker for worker in range(self._count) if worker != self._own]

    async def _ask(self, worker: int, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            return await asyncio.wait_for(self._exchange(worker, message), _TIMEOUT_S)
        except (OSError, EOFError, asyncio.TimeoutError):
            raise Declined(
                503, "worker_gone", "the worker that has the state does not answer", retry_after_s=1
            ) from None

    async def _exchange(self, worker: int, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        reader, writer = await asyncio.open_unix_connection(self._socket(worker))
        try:
            await _send(writer, message)
            head, content = await _receive(reader)
        finally:
            writer.close()
        if "refused" in head:
            raise Declined(*head["refused"])
        return head, content

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            message, _ = await _receive(reader)
            try:
                head, content = self._answer(message)
            except Declined as refusal:
                head, content = {"refused": [refusal.status, refusal.code, refusal.message]}, b""
            await _send(writer, head, content)
        except (OSError, EOFError):  # whoever asked is gone
            pass
        finally:
            writer.close()

    def _answer(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if message["ask"] == "metrics":
            return {"families": self._metrics.families()}, b""
        if message["ask"] == "erase":
            self._states.erase(message["owner"], message["id"], message["key"])
            return {}, b""
        kept = self._states.find(message["owner"], message["id"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, kept.support.schema) as stream:
            stream.write_table(kept.support)
        digests = {version: digest.hex() for version, digest in kept.digests.items()}
        return {"key": kept.key, "digests": digests}, sink.getvalue().to_pybytes()


async def _send(writer: asyncio.StreamWriter, head: dict[str, Any], content: bytes = b"") -> None:
    text = json.dumps({**head, "size": len(content)}).encode()
    writer.write(struct.pack("<I", len(text)) + text + content)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<I", await reader.readexactly(4))
    head = json.loads(await reader.readexactly(length))
    return head, await reader.readexactly(head["size"])
