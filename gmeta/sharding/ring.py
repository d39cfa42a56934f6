"""All-gather, reduce-scatter and all-reduce between all ranks: as a flat ring, in two phases, and as HO-Ring.

A rank is (i, j): local rank j of node i. It is in two rings: the *inter* ring joins local rank j of every node over the
slow links, the *intra* ring joins the ranks of a node over the fast ones. Block (i, j) is what rank (i, j) contributes
to an all-gather, or what it gets from a reduce-scatter.

- flat: there is one ring of all ranks, and every block crosses every slow link.
- two_phase: an all-gather goes along the inter ring and then along the intra ring; a reduce-scatter goes the other way.
- ho (hierarchical and overlapping; arXiv 2310.06003 calls it HO-Ring, NeurIPS 2024 PaRO-CC): while block (i - t, j)
  goes round the inter ring, the blocks of node i - t are spread inside this node. They go in chunks, so that only the
  spreading of the last chunk is not hidden.

All functions block; a `CommStream` makes them asynchronous. They work in place, on views of one buffer or on any
tensors. Blocks may have any sizes, also 0, as long as all ranks know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gmeta.parallel.mesh import PeerLost
from gmeta.sharding.streams import CommStream, Handle

Algorithm = Literal["flat", "two_phase", "ho"]
ALGORITHMS: tuple[Algorithm, ...] = ("flat", "two_phase", "ho")
Blocks = Sequence[Sequence[Tensor]]
"""Blocks [node][local rank]."""
_MOST_CHUNKS = 8
"""How many chunks a block has at most. The spreading of the last one, 1 / 8 of it all, is not hidden."""


@dataclass
class RankTraffic:
    """Bytes that this rank has sent, by destination."""

    intra: float = 0.0  # to ranks of its own node
    inter: float = 0.0  # to other nodes


@dataclass(frozen=True)
class Ring:
    """Ranks that each send to the next one; the last sends to the first."""

    ranks: tuple[int, ...]
    position: int  # of this rank
    group: dist.ProcessGroup | None  # None where the ring has one rank
    crossing: tuple[bool, ...]  # by position: whether the rank there sends to another node
    sent: RankTraffic

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)

    def count(self, nbytes: float) -> None:
        """Count bytes that this rank sends to the next one."""
        if self.crossing[self.position]:
            self.sent.inter += nbytes
        else:
            self.sent.intra += nbytes


@dataclass
class RingCollectives:
    """Collectives over this rank's rings. In the overlapping algorithm `helper` drives one of the two rings."""

    intra: Ring
    inter: Ring
    world: Ring
    helper: CommStream
    chunk_bytes: int = 128 << 10  # with 1 MiB a layer's block is one chunk, and nothing overlaps (see docs/paro.md)

    def leave(self) -> None:
        """Forget the process groups, which their owner destroys."""
        self.intra, self.inter, self.world = (
            replace(ring, group=None) for ring in (self.intra, self.inter, self.world)
        )

    def all_gather(self, blocks: Blocks, algorithm: Algorithm = "ho") -> None:
        """Fill every rank's block in place, starting from this rank's own block."""
        if algorithm == "flat":
            ring_all_gather([block for node in blocks for block in node], self.world)
            return
        i, j = self.inter.position, self.intra.position
        if algorithm == "two_phase":
            ring_all_gather([node[j] for node in blocks], self.inter)
            for node in blocks:
                ring_all_gather(node, self.intra)
            return
        chunks = self._chunks(blocks)
        rounds = [_gather_steps([node[j] for node in chunk], self.inter) for chunk in chunks]
        # The helper goes round the inter ring: all chunks make a step before the first one makes the next.
        passed = [[self.helper.submit(partial(next, steps, None)) for steps in rounds] for _ in range(self.inter.size)]
        spread = _Pipeline()
        for t in range(self.inter.size):
            for arrived, chunk in zip(passed[t], chunks, strict=True):
                arrived.wait()
                spread.add(_gather_steps(chunk[(i - t) % self.inter.size], self.intra))
        spread.end()

    def reduce_scatter(self, blocks: Blocks, algorithm: Algorithm = "ho") -> None:
        """Sum all ranks' blocks (i, j) into the block of rank (i, j), in place; the other blocks are overwritten."""
        if algorithm == "flat":
            ring_reduce_scatter([block for node in blocks for block in node], self.world)
            return
        i, j, num_nodes = self.inter.position, self.intra.position, self.inter.size
        if algorithm == "two_phase":
            for node in blocks:
                ring_reduce_scatter(node, self.intra)
            ring_reduce_scatter([node[j] for node in blocks], self.inter)
            return
        # This mirrors the all-gather. The helper sums one node's blocks inside this node, while the blocks of the node
        # before go round the inter ring. Node i - 1 leaves first; node i stays here and is summed last.
        chunks = self._chunks(blocks)
        sums = _Pipeline()
        jobs = [
            self.helper.submit(partial(sums.add, _scatter_steps(chunk[(i - 1 - t) % num_nodes], self.intra)))
            for t in range(num_nodes)
            for chunk in chunks
        ]
        jobs += [self.helper.submit(sums.move) for _ in range(self.intra.size - 1)]
        done = jobs[self.intra.size - 1 :]  # a sum has made all its steps when so many others have begun
        rounds = [
            _scatter_steps([node[j] for node in chunk], self.inter, done[k :: len(chunks)])
            for k, chunk in enumerate(chunks)
        ]
        for _ in range(num_nodes):
            for steps in rounds:
                next(steps, None)

    def all_reduce(self, blocks: Blocks, algorithm: Algorithm = "ho") -> None:
        """Sum all ranks' blocks (i, j) into every rank's block (i, j): a reduce-scatter, then an all-gather."""
        self.reduce_scatter(blocks, algorithm)
        self.all_gather(blocks, algorithm)

    def _chunks(self, blocks: Blocks) -> list[Blocks]:
        """Cut every block into the same number of parts: of `chunk_bytes` at most, but no more than `_MOST_CHUNKS`.

        Chunk k holds part k of every block.
        """
        longest = max(block.nbytes for node in blocks for block in node)
        parts = min(max(1, -(-longest // self.chunk_bytes)), _MOST_CHUNKS)
        return [[[_part(block, k, parts) for block in node] for node in blocks] for k in range(parts)]


def _part(block: Tensor, k: int, parts: int) -> Tensor:
    return block[k * block.numel() // parts : (k + 1) * block.numel() // parts]


class _Pipeline:
    """Several rounds of one ring in flight: when another round joins, those before it move by a step."""

    def __init__(self) -> None:
        self._in_flight: list[Iterator[None]] = []

    def add(self, steps: Iterator[None]) -> None:
        """Begin a round's first step. The round has ended once it was moved as often as it has steps."""
        next(steps, None)
        self.move()
        self._in_flight.append(steps)

    def move(self) -> None:
        """Move every round by a step."""
        self._in_flight = [steps for steps in self._in_flight if next(steps, self) is not self]

    def end(self) -> None:
        """Make all steps that are left."""
        while self._in_flight:
            self.move()


def _gather_steps(blocks: Sequence[Tensor], ring: Ring) -> Iterator[None]:
    """Gather every block from its owner; a step begins before each `yield` and ends after it."""
    for t in range(ring.size - 1):
        send, receive = blocks[(ring.position - t) % ring.size], blocks[(ring.position - t - 1) % ring.size]
        flight = _begin(send, receive, ring)
        yield
        _end(flight, ring)


def _scatter_steps(blocks: Sequence[Tensor], ring: Ring, ready: Sequence[Handle] = ()) -> Iterator[None]:
    """Sum block p over the ring into the rank at position p, in steps like those of `_gather_steps`.

    Each block starts at the rank after its owner. `ready[t]` is waited for before block `position - 1 - t` is used.
    """
    n, position = ring.size, ring.position
    for handle in ready[:1]:
        handle.wait()
    for t in range(n - 1):
        mine = blocks[(position - 2 - t) % n]
        into = torch.empty_like(mine)
        flight = _begin(blocks[(position - 1 - t) % n], into, ring)
        yield
        _end(flight, ring)
        for handle in ready[t + 1 : t + 2]:
            handle.wait()
        mine.add_(into)


def ring_all_gather(blocks: Sequence[Tensor], ring: Ring) -> None:
    """Fill all blocks in place; block `ring.position` is this rank's own."""
    for _ in _gather_steps(blocks, ring):
        pass


def ring_reduce_scatter(blocks: Sequence[Tensor], ring: Ring) -> None:
    """Sum block `ring.position` over all ranks of the ring, in place; the other blocks are overwritten."""
    for _ in _scatter_steps(blocks, ring):
        pass


def send_and_receive(send: Tensor, receive: Tensor, ring: Ring) -> None:
    """Send to the next rank of the ring and receive from the one before; an empty tensor is not sent.

    PeerLost names both neighbours where that fails.
    """
    _end(_begin(send, receive, ring), ring)


def _begin(send: Tensor, receive: Tensor, ring: Ring) -> list[dist.Work]:
    ops = []
    if send.numel():
        ops.append(dist.P2POp(dist.isend, send, _next(ring), ring.group))
        ring.count(send.nbytes)
    if receive.numel():
        ops.append(dist.P2POp(dist.irecv, receive, _before(ring), ring.group))
    with _naming_neighbours(ring):
        return dist.batch_isend_irecv(ops) if ops else []


def _end(flight: Sequence[dist.Work], ring: Ring) -> None:
    with _naming_neighbours(ring):
        for work in flight:
            work.wait()


def _next(ring: Ring) -> int:
    return ring.ranks[(ring.position + 1) % ring.size]


def _before(ring: Ring) -> int:
    return ring.ranks[(ring.position - 1) % ring.size]


@contextmanager
def _naming_neighbours(ring: Ring) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(
            f"rank {ring.ranks[ring.position]} could not exchange with its neighbours, rank {_before(ring)} before "
            f"it and rank {_next(ring)} after it: one of them died, or waits for another. "
            f"[{str(error).splitlines()[0][:200]}]"
        ) from error
