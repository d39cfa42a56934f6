"""Collectives that gather and scatter between scopes, in place on one buffer, over a two-dimensional mesh of ranks.

A buffer is split into as many equal chunks as there are ranks. Rank (node i, local rank j) owns partition
j of m at scope I, which is chunks j * ng to (j + 1) * ng, and chunk j * ng + i of them at scope G. What a rank has at G
lies within what it has at I, so that going from one scope to the other moves nothing on the rank itself.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gmeta.parallel.collectives import tells_of_lost_peers
from gmeta.parallel.mesh import PeerLost
from gmeta.sharding.ring import Blocks, RankTraffic, Ring, RingCollectives, ring_reduce_scatter
from gmeta.sharding.strategy import NodeLayout, ShardScope
from gmeta.sharding.streams import CommStream

CollectiveAlgorithm = Literal["backend", "flat", "two_phase", "ho"]
"""How buffers are exchanged between all ranks: by the backend's own collectives over all of them, by a flat ring, by
the backend's collectives in two phases (between nodes, then inside them), or by HO-Ring."""


def node_mesh(node_size: int, device_type: str = "cpu") -> DeviceMesh:
    """Make the mesh (inter, intra) of all ranks, with `node_size` consecutive ranks in a node. Collective.

    It returns the same mesh each time, because a mesh has process groups, with threads, that nobody ends. ValueError
    where the world size is no multiple of `node_size`.
    """
    world_size = dist.get_world_size()
    if node_size < 1 or world_size % node_size:
        fits = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"nodes of {node_size} ranks do not divide a world of {world_size}: node_size must be one of {fits}, "
            "the ranks that share fast links"
        )
    world = dist.group.WORLD
    assert world is not None
    return _mesh(world.group_name, world_size // node_size, node_size, device_type)


@functools.cache
def _mesh(_world: str, num_nodes: int, node_size: int, device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (num_nodes, node_size), mesh_dim_names=("inter", "intra"))


@dataclass
class HierarchicalCollectives:
    """One rank's collectives between the scopes N, I and G. They block; every object has process groups of its own.

    `intra`, `inter` and `world` are None where they would hold one rank: then nothing is sent.
    """

    layout: NodeLayout
    node: int  # i
    local_rank: int  # j
    rank: int
    algorithm: CollectiveAlgorithm
    intra: dist.ProcessGroup | None
    inter: dist.ProcessGroup | None
    world: dist.ProcessGroup | None
    rings: RingCollectives
    timeout_s: float = 300.0
    sent: RankTraffic = field(default_factory=RankTraffic)

    @staticmethod
    def open(
        mesh: DeviceMesh | None, algorithm: CollectiveAlgorithm, timeout_s: float, device: torch.device
    ) -> HierarchicalCollectives:
        """Make new process groups over `mesh`, whose dimensions are nodes and the ranks of a node. Collective.

        A mesh of None stands for this process alone. ValueError names a mesh of other dimensions, or an unknown
        algorithm.
        """
        if algorithm not in get_args(CollectiveAlgorithm):
            raise ValueError(f"collectives is {algorithm!r}: must be one of {', '.join(get_args(CollectiveAlgorithm))}")
        ranks = torch.zeros(1, 1, dtype=torch.int64) if mesh is None else mesh.mesh
        if ranks.ndim != 2:
            raise ValueError(f"the mesh has {ranks.ndim} dimensions, it must have two: (nodes, ranks of a node)")
        if any(part.tolist() != sorted(part.tolist()) for part in (*ranks, *ranks.T, ranks.flatten())):
            raise ValueError(f"the mesh {ranks.tolist()} does not ascend: make it with node_mesh, of consecutive ranks")
        rank = 0 if mesh is None else dist.get_rank()
        (i, j) = (ranks == rank).nonzero()[0].tolist()
        everyone: list[int] = ranks.flatten().tolist()
        in_node: list[int] = ranks[i].tolist()
        across: list[int] = ranks[:, j].tolist()
        sent = RankTraffic()
        layout = NodeLayout(ranks.shape[1], ranks.shape[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Every rank makes every group, also those it is not in. Were groups made by their members alone, a name would
        # come again after its group was left, and would meet what that group has left in the store.
        intra = _own_group(ranks.tolist(), rank, backend, timeout_s)
        inter = _own_group(ranks.T.tolist(), rank, backend, timeout_s)
        world = _own_group([everyone], rank, backend, timeout_s)
        m, ng = layout.node_size, layout.num_nodes
        rings = RingCollectives(
            intra=Ring(tuple(in_node), j, intra, (False,) * m, sent),
            inter=Ring(tuple(across), i, inter, (True,) * ng, sent),
            world=Ring(tuple(everyone), i * m + j, world, ((False,) * (m - 1) + (ng > 1,)) * ng, sent),
            helper=CommStream(device, "helper"),
        )
        return HierarchicalCollectives(layout, i, j, rank, algorithm, intra, inter, world, rings, timeout_s, sent)

    def own(self, size: int, scope: ShardScope, within: ShardScope = "N") -> slice:
        """Return this rank's partition at `scope` of a buffer of `size` elements, counted from its partition at the
        coarser `within`.
        """
        at = self.partition(size, scope, self.node, self.local_rank)
        start = at.start - self.partition(size, within, self.node, self.local_rank).start
        return slice(start, start + at.stop - at.start)

    def partition(self, size: int, scope: ShardScope, node: int, local_rank: int) -> slice:
        """Return the partition at `scope` that rank (node, local rank) has of a buffer of `size` elements."""
        chunk = size // self.layout.world_size
        first = {"N": 0, "I": local_rank * self.layout.num_nodes, "G": local_rank * self.layout.num_nodes + node}[scope]
        return slice(first * chunk, first * chunk + size // self.layout.num_partitions(scope))

    def gather(self, buffer: Tensor, finer: ShardScope, coarser: ShardScope) -> None:
        """Fill `buffer`, this rank's partition at scope `coarser`, from all ranks' partitions at scope `finer`."""
        if finer == coarser or not buffer.numel():
            return
        with self.naming_lost_peers():
            self._gather(buffer, finer, coarser)

    def _gather(self, buffer: Tensor, finer: ShardScope, coarser: ShardScope) -> None:
        if coarser == "I":
            self._gather_across_nodes(buffer)
        elif finer == "I":
            self._gather_in_node(buffer)
        elif self._one_scope:
            if self.layout.num_nodes > 1:
                self._gather_across_nodes(buffer)
            else:
                self._gather_in_node(buffer)
        elif self.algorithm == "two_phase":
            self._gather_across_nodes(buffer[self.own(buffer.numel(), "I")])
            self._gather_in_node(buffer)
        elif self.algorithm == "backend":
            self._gather_world(buffer)
        else:
            self.rings.all_gather(self._blocks(buffer), "flat" if self.algorithm == "flat" else "ho")

    def reduce_scatter(self, buffer: Tensor, coarser: ShardScope, finer: ShardScope) -> None:
        """Sum `buffer`, a partition at scope `coarser`, over the ranks that share it, into this rank's partition at
        `finer`.

        The rest of the buffer is overwritten.
        """
        if finer == coarser or not buffer.numel():
            return
        with self.naming_lost_peers():
            self._reduce_scatter(buffer, coarser, finer)

    def _reduce_scatter(self, buffer: Tensor, coarser: ShardScope, finer: ShardScope) -> None:
        if coarser == "I":
            self._scatter(buffer, self.rings.inter)
        elif finer == "I":
            self._scatter(buffer, self.rings.intra)
        elif self._one_scope or self.algorithm == "two_phase":
            self._reduce_scatter(buffer, "N", "I")
            self._reduce_scatter(buffer[self.own(buffer.numel(), "I")], "I", "G")
        elif self.algorithm == "backend":
            self._scatter_world(buffer)
        else:
            self.rings.reduce_scatter(self._blocks(buffer), "flat" if self.algorithm == "flat" else "ho")

    def all_reduce(self, buffer: Tensor, scope: ShardScope) -> None:
        """Sum `buffer`, a partition at `scope`, over all ranks that hold the same partition."""
        if not buffer.numel():
            return
        if scope == "N" and self.algorithm != "backend":
            self.reduce_scatter(buffer, "N", "G")
            self.gather(buffer, "G", "N")
            return
        with self.naming_lost_peers():
            if scope == "I" and self.inter is not None:
                dist.all_reduce(buffer, group=self.inter)
                self.sent.inter += 2 * _ring_bytes(buffer, self.layout.num_nodes)
            elif scope == "N" and self.world is not None:
                dist.all_reduce(buffer, group=self.world)
                self.rings.world.count(2 * _ring_bytes(buffer, self.layout.world_size))

    def close(self) -> None:
        """Leave the process groups. Nothing may be in flight."""
        self.rings.helper.close()
        groups = [group for group in (self.intra, self.inter, self.world) if group is not None]
        self.intra = self.inter = self.world = None
        self.rings.leave()
        while groups:  # a group's threads end when nothing refers to it any more
            dist.destroy_process_group(groups.pop())

    def sum_scalars(self, values: Tensor) -> Tensor:
        """Sum a few numbers over all ranks; the result is bitwise the same on all of them. It is not counted as
        traffic."""
        if self.world is not None:
            with self.naming_lost_peers():
                dist.all_reduce(values, group=self.world)
        return values

    def extremes(self, number: int, scope: ShardScope) -> tuple[int, int]:
        """Return the least and the largest `number` of the ranks that share a buffer at `scope` (I: those of the node,
        G: all). It is not counted as traffic, and only for groups on the CPU.
        """
        both = torch.tensor([-number, number])
        for group in (self.intra, self.inter if scope == "G" else None):
            if group is not None:
                with self.naming_lost_peers():
                    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        return -int(both[0]), int(both[1])

    @contextmanager
    def naming_lost_peers(self) -> Iterator[None]:
        """Turn the backend's complaint into a `PeerLost` that names the ranks that are gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.world is None or not (isinstance(error, dist.DistError) or tells_of_lost_peers(error)):
                raise  # a fault of the caller's, which the others do not share
            silent = silent_ranks(self.rank, self.rings.world.ranks)
            names = ", ".join(f"rank {other}" for other in silent)
            who = f"no answer from {names} (dead, stuck or still waiting)" if silent else "all answer now: one was late"
            raise PeerLost(
                f"rank {self.rank} could not exchange with the others within {self.timeout_s:g} s: {who}. See their "
                f"messages, then go on from the last checkpoint. [{str(error).strip().splitlines()[0][:200]}]"
            ) from error

    @property
    def _one_scope(self) -> bool:
        """Whether there is only one node, or nodes of one rank: then there is one kind of link."""
        return 1 in (self.layout.node_size, self.layout.num_nodes)

    def _gather_in_node(self, buffer: Tensor) -> None:
        """Gather partitions of scope I into the full buffer."""
        if self.intra is not None:
            dist.all_gather_single(buffer, buffer[self.own(buffer.numel(), "I")], group=self.intra)
        self.sent.intra += _ring_bytes(buffer, self.layout.node_size)

    def _gather_across_nodes(self, buffer: Tensor) -> None:
        """Gather partitions of scope G into one of scope I."""
        if self.inter is not None:
            chunk = buffer.numel() // self.layout.num_nodes
            dist.all_gather_single(buffer, buffer[self.node * chunk : (self.node + 1) * chunk], group=self.inter)
        self.sent.inter += _ring_bytes(buffer, self.layout.num_nodes)

    def _gather_world(self, buffer: Tensor) -> None:
        """Gather partitions of scope G into the full buffer in one collective.

        Its result is in the order of ranks, (node, local rank), and is put into that of partitions, (local rank, node).
        """
        m, ng = self.layout.node_size, self.layout.num_nodes
        ordered = torch.empty_like(buffer)
        dist.all_gather_single(ordered, buffer[self.own(buffer.numel(), "G")].clone(), group=self.world)
        buffer.view(m, ng, -1).copy_(ordered.view(ng, m, -1).transpose(0, 1))
        self.rings.world.count(_ring_bytes(buffer, self.layout.world_size))

    def _scatter_world(self, buffer: Tensor) -> None:
        m, ng = self.layout.node_size, self.layout.num_nodes
        ordered = buffer.view(m, ng, -1).transpose(0, 1).contiguous()
        own = buffer[self.own(buffer.numel(), "G")]
        out = torch.empty_like(own)
        dist.reduce_scatter_single(out, ordered.view(-1), group=self.world)
        own.copy_(out)
        self.rings.world.count(_ring_bytes(buffer, self.layout.world_size))

    def _scatter(self, buffer: Tensor, ring: Ring) -> None:
        if ring.group is None:
            return
        if not buffer.is_cuda:
            # gloo's own is an all-reduce inside, which sends twice as much (measured: 6.0 buffers of 4 ranks, not 3.0)
            ring_reduce_scatter(buffer.view(ring.size, -1).unbind(), ring)
            return
        out = torch.empty_like(buffer[: buffer.numel() // ring.size])
        dist.reduce_scatter_single(out, buffer, group=ring.group)
        buffer.view(ring.size, -1)[ring.position].copy_(out)
        ring.count(_ring_bytes(buffer, ring.size))

    def _blocks(self, buffer: Tensor) -> Blocks:
        m, ng = self.layout.node_size, self.layout.num_nodes
        chunks: Sequence[Tensor] = buffer.view(self.layout.world_size, -1).unbind()
        return [[chunks[j * ng + i] for j in range(m)] for i in range(ng)]


def silent_ranks(rank: int, ranks: Sequence[int], wait_s: float = 2.0) -> list[int]:
    """After a failed collective, return the ranks that have not come to the same conclusion within `wait_s`.

    A rank that lives finds the failure too, at its next collective; the dead and the stuck do not.
    """
    end = time.monotonic() + wait_s
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"gmeta-failed-{rank}", "yes")
        silent = [other for other in ranks if other != rank]
        while silent and time.monotonic() < end:
            time.sleep(0.1)
            silent = [other for other in silent if not store.check([f"gmeta-failed-{other}"])]
        return silent
    except (RuntimeError, ValueError):  # the store is gone with the rank that held it
        return [ranks[0]]


def _own_group(groups: Sequence[Sequence[int]], rank: int, backend: str, timeout_s: float) -> dist.ProcessGroup | None:
    """Make all of `groups` and return the one that holds `rank`, or None where it would be alone."""
    own = None
    for members in groups:
        if len(members) > 1:
            made = dist.new_group(list(members), timedelta(seconds=timeout_s), backend)
            own = made if rank in members else own
    return own


def _ring_bytes(buffer: Tensor, ranks: int) -> float:
    """Return the bytes that a rank sends round a ring to gather, or to scatter, `buffer`."""
    return buffer.nbytes * (ranks - 1) / ranks
