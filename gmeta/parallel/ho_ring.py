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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gmeta.parallel.lanes import Handle, Lane
from gmeta.parallel.mesh import PeerLost

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
            _gather([block for row in blocks for block in row], self.everyone)
            return
        i, j = self.column.place, self.row.place
        if algorithm == "two_phase":
            _gather([row[j] for row in blocks], self.column)
            for row in blocks:
                _gather(row, self.row)
            return
        chunks = self._chunks(blocks)
        arrivals: list[list[Handle]] = [[Handle() for _ in chunks]]
        for t in range(self.column.size - 1):  # the helper goes round the column
            arrivals.append([self.helper.submit(self._pass_on(chunk, i, j, t)) for chunk in chunks])
        for t in range(self.column.size):
            for arrival, chunk in zip(arrivals[t], chunks, strict=True):
                arrival.wait()
                _gather(chunk[(i - t) % self.column.size], self.row)

    def _pass_on(self, chunk: Blocks, i: int, j: int, t: int) -> Callable[[], None]:
        ng = self.column.size
        return lambda: exchange(chunk[(i - t) % ng][j], chunk[(i - t - 1) % ng][j], self.column)

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
        # The mirror of the all-gather: a row is summed in the group while the row before it goes round the column. Row
        # i - 1 leaves first, row i stays: it is summed last.
        chunks = self._chunks(blocks)
        summed = [[self.helper.submit(self._sum_row(chunk, (i - 1 - t) % ng)) for chunk in chunks] for t in range(ng)]
        for t in range(ng - 1):
            for number, chunk in enumerate(chunks):
                summed[t][number].wait()
                mine = chunk[(i - 2 - t) % ng][j]
                into = torch.empty_like(mine)
                exchange(chunk[(i - 1 - t) % ng][j], into, self.column)
                summed[t + 1][number].wait()
                mine.add_(into)
        for handle in summed[-1]:
            handle.wait()

    def _sum_row(self, chunk: Blocks, row: int) -> Callable[[], None]:
        return lambda: scatter(chunk[row], self.row)

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


def _gather(blocks: Sequence[Tensor], circle: Circle) -> None:
    for t in range(circle.size - 1):
        exchange(blocks[(circle.place - t) % circle.size], blocks[(circle.place - t - 1) % circle.size], circle)


def scatter(blocks: Sequence[Tensor], circle: Circle) -> None:
    """Block `place` ends as the sum over the circle; each block starts at the rank after its owner."""
    n, place = circle.size, circle.place
    spare = torch.empty_like(max(blocks, key=Tensor.numel))
    for t in range(n - 1):
        mine = blocks[(place - 2 - t) % n]
        into = spare[: mine.numel()]
        exchange(blocks[(place - 1 - t) % n], into, circle)
        mine.add_(into)


def exchange(send: Tensor, receive: Tensor, circle: Circle) -> None:
    """Send to the next rank of the circle, receive from the one before; nothing where a tensor is empty.

    PeerLost names both where that fails.
    """
    following = circle.ranks[(circle.place + 1) % circle.size]
    before = circle.ranks[(circle.place - 1) % circle.size]
    ops = []
    if send.numel():
        ops.append(dist.P2POp(dist.isend, send, following, circle.group))
        if circle.crossing[circle.place]:
            circle.sent.inter += send.nbytes
        else:
            circle.sent.intra += send.nbytes
    if receive.numel():
        ops.append(dist.P2POp(dist.irecv, receive, before, circle.group))
    if not ops:
        return
    try:
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    except RuntimeError as error:
        raise PeerLost(
            f"rank {circle.ranks[circle.place]} could not exchange with its neighbours, rank {before} before it and "
            f"rank {following} after it: one of them died, or waits for another. [{str(error).splitlines()[0][:200]}]"
        ) from error
