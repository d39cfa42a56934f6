"""What a step sends. It is counted where it is sent, formulas predict it, and tests check that the two are equal.

With U unique rows of width d that a worker needs, b bytes a number, K bytes of dense gradients and N workers, one step
moves per worker (G-Meta, arXiv 2401.04338; the ring of Patarasuk and Yuan, J. Parallel Distrib. Comput. 2009):

    ids 8 U    rows b d U    gradients b d U    dense 2 K (N - 1) / N by AllReduce
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("counts", "ids", "rows", "gradients", "dense", "control")
ID_BYTES = 8
"""Bytes of an id, and of a count."""


@dataclass
class Traffic:
    """Messages of one kind that this rank sends. Rows are sent by other ranks, and are counted by the rank that asks
    for them.
    """

    rank: int
    calls: int = 0  # collectives
    by_rank: dict[int, float] = field(default_factory=dict)  # bytes by the rank at the other end, this one included

    def add(self, sent: Mapping[int, float], calls: int = 1) -> None:
        """Count a collective, or `calls` of them, that move `sent[rank]` bytes in all."""
        self.calls += calls
        for rank, size in sent.items():
            self.by_rank[rank] = self.by_rank.get(rank, 0) + size

    @property
    def bytes(self) -> float:
        """Return all bytes, including those that this rank sends to itself."""
        return sum(self.by_rank.values())

    @property
    def remote_bytes(self) -> float:
        """Return the bytes that go to or come from other ranks."""
        return self.bytes - self.by_rank.get(self.rank, 0)


class CommStats:
    """Traffic by kind: counts and ids (on the host), rows and gradients (AlltoAll), dense, and control (small sums of
    the step).
    """

    def __init__(self, rank: int = 0) -> None:
        self.counts, self.ids, self.rows, self.gradients, self.dense, self.control = (Traffic(rank) for _ in KINDS)

    def record(self) -> dict[str, dict[str, Any]]:
        """Return {kind: {bytes, remote_bytes, calls}} for JSON, with rounded bytes."""
        kinds: dict[str, Traffic] = {kind: getattr(self, kind) for kind in KINDS}
        return {
            kind: {"bytes": round(t.bytes), "remote_bytes": round(t.remote_bytes), "calls": t.calls}
            for kind, t in kinds.items()
        }


def add_all_reduce(traffic: Traffic, num_bytes: int, world_size: int) -> None:
    """Count the AllReduce of a tensor of `num_bytes`. Nothing is sent in a world of one."""
    if world_size > 1:
        traffic.add(ring_traffic(num_bytes, traffic.rank, world_size))


def ring_traffic(num_bytes: int, rank: int, world_size: int) -> dict[int, float]:
    """Return what a rank sends in a ring AllReduce of `num_bytes`, all of it to its successor: 2 n (N - 1) / N."""
    return {(rank + 1) % world_size: 2 * num_bytes * (world_size - 1) / world_size}
