"""What a step sends: counted where it is sent, and predicted by formulas to hold the counts against.

With U unique rows of width d that a worker needs, b bytes a number, K bytes of dense gradients and N workers, one step
moves per worker (G-Meta, arXiv 2401.04338; the ring of Patarasuk and Yuan, J. Parallel Distrib. Comput. 2009):

    ids 8 U    rows b d U    gradients b d U    dense 2 K (N - 1) / N by AllReduce
    dense gathered: K from each worker to rank 0, hence (N - 1) K into it, and as much out of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

KINDS = ("counts", "ids", "rows", "gradients", "dense", "control")
ID_BYTES = 8
"""Bytes of an id, and of a count."""


@dataclass
class Traffic:
    """Messages of one kind, as this rank sends them (for rows, which others send: as it asks for them)."""

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
        """All bytes, this rank's own share included."""
        return sum(self.by_rank.values())

    @property
    def remote_bytes(self) -> float:
        """Bytes to or from other ranks."""
        return self.bytes - self.by_rank.get(self.rank, 0)


class CommStats:
    """Traffic by kind: counts and ids (host), rows, gradients (AlltoAll), dense, control (the step's small sums)."""

    def __init__(self, rank: int = 0) -> None:
        self.counts, self.ids, self.rows, self.gradients, self.dense, self.control = (Traffic(rank) for _ in KINDS)

    def record(self) -> dict[str, dict[str, Any]]:
        """{kind: {bytes, remote_bytes, calls}} for JSON, bytes rounded."""
        kinds: dict[str, Traffic] = {kind: getattr(self, kind) for kind in KINDS}
        return {
            kind: {"bytes": round(t.bytes), "remote_bytes": round(t.remote_bytes), "calls": t.calls}
            for kind, t in kinds.items()
        }


Sum = Literal["all_reduce", "gather"]
"""How dense gradients are summed: by AllReduce, or on rank 0 (gather, add, send back)."""


def add_sum(traffic: Traffic, how: Sum, num_bytes: int, world_size: int) -> None:
    """Count the sum over ranks of a tensor of `num_bytes`; nothing is sent in a world of one."""
    if world_size == 1:
        return
    if how == "all_reduce":
        traffic.add(ring_traffic(num_bytes, traffic.rank, world_size))
    else:
        traffic.add(central_traffic(num_bytes, traffic.rank, world_size), calls=2)


def ring_traffic(num_bytes: int, rank: int, world_size: int) -> dict[int, float]:
    """What a rank sends in a ring AllReduce of `num_bytes`, all of it to its successor: 2 n (N - 1) / N."""
    return {(rank + 1) % world_size: 2 * num_bytes * (world_size - 1) / world_size}


def central_traffic(num_bytes: int, rank: int, world_size: int) -> dict[int, float]:
    """What a rank sends when `num_bytes` go from everyone to rank 0 and the sum comes back to everyone."""
    return {r: float(num_bytes) for r in range(1, world_size)} if rank == 0 else {0: float(num_bytes)}


@dataclass(frozen=True)
class Asked:
    """What a rank asks of its peers in one AlltoAll of rows."""

    rows: Mapping[int, int]  # peer -> rows
    row_bytes: int
    gradient_bytes: int


def predicted_traffic(
    rank: int,
    world_size: int,
    stages: Sequence[Sequence[Asked]],
    *,
    control_bytes: Sequence[int] = (),
) -> CommStats:
    """The formulas above for one step of one rank.

    `stages` holds, for each stage of the AlltoAll (one, or two with nodes), what is asked in each of its exchanges: one
    a group of tables, two with separate fetches. With two stages the second holds what a rank asks for its whole
    node. `control_bytes` are the sizes of the small AllReduces. One worker exchanges nothing: it reads its own
    rows. What dense layers send, they predict themselves (`optim.sharded`).
    """
    expected = CommStats(rank)
    for stage in stages:
        expected.counts.add({peer: ID_BYTES * len(stage) for peer in stage[0].rows})
        for asked in stage:
            expected.ids.add({peer: ID_BYTES * n for peer, n in asked.rows.items()})
            expected.rows.add({peer: asked.row_bytes * n for peer, n in asked.rows.items()})
            expected.gradients.add({peer: asked.gradient_bytes * n for peer, n in asked.rows.items()})
    for size in control_bytes:
        add_sum(expected.control, "all_reduce", size, world_size)
    return expected
