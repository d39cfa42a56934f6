"""Messages between workers and servers: a fixed header and raw tensors over TCP; every wait ends in bounded time.

Plain sockets, because a round trip of a task's row pull (200 ids, 200 rows x 16, one machine of two cores) took 0.05
to 0.07 ms over them, 0.25 ms over gloo's send and recv while the machine was idle and up to 3.7 ms while it was busy,
and 1.0 ms over torch.distributed.rpc: either would slow this baseline for a reason that parameter servers are not to
blame for. A lost peer also shows at once, where gloo's receive from any rank waits for its timeout.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor, distributed

from gmeta.parallel.mesh import PeerLost

HEADER = struct.Struct("<2q")  # kind, count
HELLO, DENSE, ROWS, PUSH, STATE, SQUARES, END = range(7)
_JOIN_BYTES = 1 << 16  # a message up to this size is copied into one buffer and one system call
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """One process of the cluster: ranks [0, workers) are workers, the others servers."""

    rank: int
    workers: int
    servers: int
    timeout_s: float = 300.0

    @property
    def server(self) -> int:
        """Return the number of this server; negative for a worker."""
        return self.rank - self.workers

    @property
    def name(self) -> str:
        """Return what messages call this process."""
        return self.name_of(self.rank)

    def name_of(self, rank: int) -> str:
        """Return what messages call the process `rank`."""
        return f"worker {rank}" if rank < self.workers else f"server {rank - self.workers}"


class Wire:
    """A connection to one peer. Whatever ends it, or keeps it silent for `timeout_s`, is a `PeerLost` naming both."""

    def __init__(self, connection: socket.socket, place: Place, peer: str) -> None:
        connection.settimeout(place.timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.place = place
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0

    def fileno(self) -> int:
        """Return the file descriptor, for selectors."""
        return self.socket.fileno()

    def send(self, kind: int, count: int = 0, *tensors: Tensor) -> None:
        """Send a header and tensors. The receiver knows their dtypes and derives their shapes from `count`."""
        parts = [HEADER.pack(kind, count), *map(_bytes, tensors)]
        self._send(parts)

    def reply(self, *tensors: Tensor) -> None:
        """Send tensors alone: the asker knows what comes."""
        self._send([_bytes(tensor) for tensor in tensors])

    def _send(self, parts: list[bytes | memoryview]) -> None:
        size = sum(len(part) for part in parts)
        self.sent_bytes += size
        try:
            for part in [b"".join(parts)] if size <= _JOIN_BYTES else parts:
                self.socket.sendall(part)
        except OSError as error:
            raise self._lost(error) from error

    def header(self) -> tuple[int, int]:
        """Return (kind, count) of the next message."""
        buffer = bytearray(HEADER.size)
        self._receive(memoryview(buffer))
        kind, count = HEADER.unpack(buffer)
        return kind, count

    def fill(self, *tensors: Tensor) -> None:
        """Receive into contiguous tensors."""
        for tensor in tensors:
            self._receive(memoryview(_bytes(tensor)))

    def _receive(self, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                count = self.socket.recv_into(view[done:])
                if not count:
                    raise ConnectionResetError("connection closed")
                done += count
        except OSError as error:
            raise self._lost(error) from error
        self.received_bytes += done

    def _lost(self, error: OSError) -> PeerLost:
        how = f"no answer in {self.place.timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
        return PeerLost(
            f"{self.place.name} lost {self.peer} ({how}): it died, or hangs; see the other processes' messages. "
            "Nothing was saved, start again"
        )

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


@dataclass(frozen=True)
class Links:
    """A process's connections: a worker has servers only, server 0 the other servers too, these only server 0."""

    workers: list[Wire] = field(default_factory=list)
    servers: list[Wire] = field(default_factory=list)

    def close(self) -> None:
        """Close all connections."""
        for wire in (*self.workers, *self.servers):
            wire.close()


def meet(place: Place, store: distributed.Store) -> Links:
    """Connect this process to its peers; servers tell their ports through `store`. PeerLost after `timeout_s`."""
    store.set_timeout(timedelta(seconds=place.timeout_s))
    try:
        if place.server < 0:
            return Links(servers=[_call(place, store, server) for server in range(place.servers)])
        with socket.create_server((_HOST, 0), backlog=place.workers + place.servers) as listener:
            store.set(f"server{place.server}", str(listener.getsockname()[1]))
            listener.settimeout(place.timeout_s)
            fellows = place.servers - 1 if place.server == 0 else 0
            callers = dict(_answer(place, listener) for _ in range(place.workers + fellows))
    except (OSError, RuntimeError) as error:
        if isinstance(error, PeerLost):
            raise
        raise PeerLost(f"{place.name} waited {place.timeout_s:g} s for the others to start: {error}") from error
    workers = [callers[rank] for rank in range(place.workers)]
    others = [callers[rank] for rank in sorted(callers) if rank >= place.workers]
    return Links(workers, others if place.server == 0 else [_call(place, store, 0)])


def _call(place: Place, store: distributed.Store, server: int) -> Wire:
    port = int(store.get(f"server{server}"))
    wire = Wire(socket.create_connection((_HOST, port), place.timeout_s), place, f"server {server}")
    wire.send(HELLO, place.rank)
    return wire


def _answer(place: Place, listener: socket.socket) -> tuple[int, Wire]:
    wire = Wire(listener.accept()[0], place, "a peer that just connected")
    rank = wire.header()[1]
    wire.peer = place.name_of(rank)
    return rank, wire


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, in place."""
    assert tensor.is_contiguous()
    return tensor.detach().view(-1).view(torch.uint8).numpy().data if tensor.numel() else np.empty(0, np.uint8).data
