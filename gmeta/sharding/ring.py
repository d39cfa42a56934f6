"""All-gather, reduce-scatter and all-reduce over groups of ranks: flat ring, two phases, and HO-Ring.

Ranks are (i, j): group i, place j. A rank has two circles, its *column* (rank j of every group, over the slow links)
and its *row* (the ranks of its group, over the fast ones). Block (i, j) is what rank (i, j) contributes to an
all-gather, or gets from a reduce-scatter.

- flat: one circle of all ranks; every block crosses every slow link.
- two_phase: all-gather along the column, then along the row; reduce-scatter the other way round.
- ho (hierarchical, overlapping; arXiv 2310.06003 as HO-Ring, NeurIPS 2024 as PaRO-CC): while block (i - t, j) goes
  round the column, row i - t is spread in the group, in chunks, so that only the last chunk's spreading is not hidden.

All functions block; a `Lane` makes them asynchronous. They work in place, on views of one buffer or on any tensors, of
any sizes (also 0), as long as all ranks know them.
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
from gmeta.sharding.streams import Handle, Lane

Algorithm = Literal["flat", "two_phase", "ho"]
ALGORITHMS: tuple[Algorithm, ...] = ("flat", "two_phase", "ho")
Blocks = Sequence[Sequence[Tensor]]
"""Blocks [group][place]."""


@dataclass
class Counter:
    """Bytes that this rank has sent, by where to."""

    intra: float = 0.0
    inter: float = 0.0


@dataclass(frozen=True)
class Circle:
    """Ranks in a circle that each send to the next; `place` is this rank's."""

    ranks: tuple[int, ...]
    place: int
    group: dist.ProcessGroup | None  # None where there is one rank
    crossing: tuple[bool, ...]  # whether what the rank at a place sends to the next goes to another group
    sent: Counter

    @property
    def size(self) -> int:
        """Ranks in it."""
        return len(self.ranks)


@dataclass
class Rings:
    """This rank's circles. `helper` carries one of the two in the overlapping algorithm."""

    row: Circle
    column: Circle
    everyone: Circle
    helper: Lane
    chunk_bytes: int = 1 << 20

    def leave(self) -> None:
        """Forget the process groups, which others destroy."""
        self.row, self.column, self.everyone = (
            replace(circle, group=None) for circle in (self.row, self.column, self.everyone)
        )

    def all_gather(self, blocks: Blocks, algorithm: Algorithm = "ho") -> None:
        """Every rank's block, from this rank's own; in place."""
        if algorithm == "flat":
            gather([block for row in blocks for block in row], self.everyone)
            return
        i, j = self.column.place, self.row.place
        if algorithm == "two_phase":
            gather([row[j] for row in blocks], self.column)
            for row in blocks:
                gather(row, self.row)
            return
        chunks = self._chunks(blocks)
        rings = [_gathering([row[j] for row in chunk], self.column) for chunk in chunks]
        # The helper goes round the column, all chunks a step before the first one takes the next.
        passed = [[self.helper.submit(partial(next, ring, None)) for ring in rings] for _ in range(self.column.size)]
        spread = _Wave()
        for t in range(self.column.size):
            for arrived, chunk in zip(passed[t], chunks, strict=True):
                arrived.wait()
                spread.add(_gathering(chunk[(i - t) % self.column.size], self.row))
        spread.end()

    def reduce_scatter(self, blocks: Blocks, algorithm: Algorithm = "ho") -> None:
        """This rank's block holds the sum of all ranks' blocks of its place; the other blocks are used up. In place."""
        if algorithm == "flat":
            scatter([block for row in blocks for block in row], self.everyone)
            return
        i, j, ng = self.column.place, self.row.place, self.column.size
        if algorithm == "two_phase":
            for row in blocks:
                scatter(row, self.row)
            scatter([row[j] for row in blocks], self.column)
            return
        # The mirror of the all-gather: a row is summed in the group, by the helper, while the row before it goes round
        # the column. Row i - 1 leaves first, row i stays: it is summed last.
        chunks = self._chunks(blocks)
        rows = _Wave()
        jobs = [
            self.helper.submit(partial(rows.add, _scattering(chunk[(i - 1 - t) % ng], self.row)))
            for t in range(ng)
            for chunk in chunks
        ]
        jobs += [self.helper.submit(rows.move) for _ in range(self.row.size - 1)]
        done = jobs[self.row.size - 1 :]  # a row has made its steps when so many others have begun
        rings = [
            _scattering([row[j] for row in chunk], self.column, done[k :: len(chunks)])
            for k, chunk in enumerate(chunks)
        ]
        for _ in range(ng):
            for ring in rings:
                next(ring, None)

    def all_reduce(self, blocks: Blocks, algorithm: Algorithm = "ho") -> None:
        """Every block holds the sum of all ranks' blocks of its place: a reduce-scatter and an all-gather. In place."""
        self.reduce_scatter(blocks, algorithm)
        self.all_gather(blocks, algorithm)

    def _chunks(self, blocks: Blocks) -> list[Blocks]:
        """`blocks` cut into so many parts that none is longer than `chunk_bytes`; part k of every block, in order."""
        longest = max(block.nbytes for row in blocks for block in row)
        parts = max(1, -(-longest // self.chunk_bytes))
        return [[[_part(block, k, parts) for block in row] for row in blocks] for k in range(parts)]


def _part(block: Tensor, k: int, parts: int) -> Tensor:
    return block[k * block.numel() // parts : (k + 1) * block.numel() // parts]


class _Wave:
    """Several rings of one circle on their way: when another joins, those before it move a step."""

    def __init__(self) -> None:
        self._flying: list[Iterator[None]] = []

    def add(self, ring: Iterator[None]) -> None:
        """Its first step begins; it is through once so many others as it has steps have joined, or were moved."""
        next(ring, None)
        self.move()
        self._flying.append(ring)

    def move(self) -> None:
        """A step of all of them."""
        self._flying = [ring for ring in self._flying if next(ring, self) is not self]

    def end(self) -> None:
        """All the steps that are left."""
        while self._flying:
            self.move()


def _gathering(blocks: Sequence[Tensor], circle: Circle) -> Iterator[None]:
    """Every block from its owner; a step begins before each `yield`, and ends after it."""
    for t in range(circle.size - 1):
        flight = _begin(blocks[(circle.place - t) % circle.size], blocks[(circle.place - t - 1) % circle.size], circle)
        yield
        _end(flight, circle)


def _scattering(blocks: Sequence[Tensor], circle: Circle, there: Sequence[Handle] = ()) -> Iterator[None]:
    """Block `place` ends as the sum over the circle, in steps as `_gathering`; each starts at the rank after its owner.

    there[t]: to be waited for before block place - 1 - t is used.
    """
    n, place = circle.size, circle.place
    for handle in there[:1]:
        handle.wait()
    for t in range(n - 1):
        mine = blocks[(place - 2 - t) % n]
        into = torch.empty_like(mine)
        flight = _begin(blocks[(place - 1 - t) % n], into, circle)
        yield
        _end(flight, circle)
        for handle in there[t + 1 : t + 2]:
            handle.wait()
        mine.add_(into)


def gather(blocks: Sequence[Tensor], circle: Circle) -> None:
    """All-gather on a circle: this rank's block `place` is there, then all are."""
    for _ in _gathering(blocks, circle):
        pass


def scatter(blocks: Sequence[Tensor], circle: Circle) -> None:
    """Reduce-scatter on a circle: block `place` ends as the sum of everybody's; the others are used up."""
    for _ in _scattering(blocks, circle):
        pass


def exchange(send: Tensor, receive: Tensor, circle: Circle) -> None:
    """Send to the next rank of the circle, receive from the one before; nothing where a tensor is empty.

    PeerLost names both where that fails.
    """
    _end(_begin(send, receive, circle), circle)


def _begin(send: Tensor, receive: Tensor, circle: Circle) -> list[dist.Work]:
    ops = []
    if send.numel():
        ops.append(dist.P2POp(dist.isend, send, _next(circle), circle.group))
        if circle.crossing[circle.place]:
            circle.sent.inter += send.nbytes
        else:
            circle.sent.intra += send.nbytes
    if receive.numel():
        ops.append(dist.P2POp(dist.irecv, receive, _before(circle), circle.group))
    with _naming_neighbours(circle):
        return dist.batch_isend_irecv(ops) if ops else []


def _end(flight: Sequence[dist.Work], circle: Circle) -> None:
    with _naming_neighbours(circle):
        for work in flight:
            work.wait()


def _next(circle: Circle) -> int:
    return circle.ranks[(circle.place + 1) % circle.size]


def _before(circle: Circle) -> int:
    return circle.ranks[(circle.place - 1) % circle.size]


@contextmanager
def _naming_neighbours(circle: Circle) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(
            f"rank {circle.ranks[circle.place]} could not exchange with its neighbours, rank {_before(circle)} before "
            f"it and rank {_next(circle)} after it: one of them died, or waits for another. "
            f"[{str(error).splitlines()[0][:200]}]"
        ) from error
