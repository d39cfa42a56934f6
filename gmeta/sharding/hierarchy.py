"""Collectives between the levels of a placement, in place on one buffer, for the ranks of a two-dimensional mesh.

A buffer of S numbers, S divisible by the world size, is cut into n chunks. Rank (group i, place j) owns part j of m at
level I, chunks j * ng to (j + 1) * ng, and chunk j * ng + i of them at level G: what it has at G lies in what it has
at I, so that going from one to the other moves nothing.
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

from gmeta.parallel.mesh import PeerLost
from gmeta.sharding.ring import Blocks, Circle, Counter, Rings, scatter
from gmeta.sharding.strategy import Groups, Level
from gmeta.sharding.streams import Lane

Collectives = Literal["backend", "flat", "two_phase", "ho"]
"""How buffers are exchanged between all ranks: by the backend's own collectives over everybody, by a ring of ours over
everybody, by the backend's in two phases (between groups, within groups), or by HO-Ring."""


def group_mesh(group_size: int, device_type: str = "cpu") -> DeviceMesh:
    """The mesh (inter, intra) of all ranks in groups of `group_size` consecutive ones. Collective.

    The same one each time: a mesh has process groups, with threads, that nobody ends. ValueError where the world size
    is no multiple of `group_size`.
    """
    world_size = dist.get_world_size()
    if group_size < 1 or world_size % group_size:
        fits = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"groups of {group_size} ranks do not divide a world of {world_size}: group_size must be one of {fits}, "
            "the ranks that share fast links"
        )
    world = dist.group.WORLD
    assert world is not None
    return _mesh(world.group_name, world_size // group_size, group_size, device_type)


@functools.cache
def _mesh(_world: str, groups: int, group_size: int, device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (groups, group_size), mesh_dim_names=("inter", "intra"))


@dataclass
class Levels:
    """One rank's collectives between N, I and G. Blocking; every object has process groups of its own.

    `intra`, `inter` and `world` are None where there is one rank in them: then nothing is sent.
    """

    groups: Groups
    group: int  # i
    place: int  # j
    rank: int
    collectives: Collectives
    intra: dist.ProcessGroup | None
    inter: dist.ProcessGroup | None
    world: dist.ProcessGroup | None
    rings: Rings
    timeout_s: float = 300.0
    sent: Counter = field(default_factory=Counter)

    @staticmethod
    def open(mesh: DeviceMesh | None, collectives: Collectives, timeout_s: float, device: torch.device) -> Levels:
        """New process groups over `mesh`, two-dimensional: groups, and the ranks of each. Collective.

        None: this process alone.
        """
        if collectives not in get_args(Collectives):
            raise ValueError(f"collectives is {collectives!r}: must be one of {', '.join(get_args(Collectives))}")
        ranks = torch.zeros(1, 1, dtype=torch.int64) if mesh is None else mesh.mesh
        if ranks.ndim != 2:
            raise ValueError(f"the mesh has {ranks.ndim} dimensions, it must have two: (groups, ranks of a group)")
        if any(part.tolist() != sorted(part.tolist()) for part in (*ranks, *ranks.T, ranks.flatten())):
            raise ValueError(
                f"the mesh {ranks.tolist()} does not ascend: make it with group_mesh, of consecutive ranks"
            )
        rank = 0 if mesh is None else dist.get_rank()
        (i, j) = (ranks == rank).nonzero()[0].tolist()
        everyone: list[int] = ranks.flatten().tolist()
        row: list[int] = ranks[i].tolist()
        column: list[int] = ranks[:, j].tolist()
        sent = Counter()
        groups = Groups(ranks.shape[1], ranks.shape[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Every rank makes every group, also those it is not in. Names made by the members alone come again after a
        # group was left, and meet what the last group of that name left in the store.
        intra = _own_group(ranks.tolist(), rank, backend, timeout_s)
        inter = _own_group(ranks.T.tolist(), rank, backend, timeout_s)
        world = _own_group([everyone], rank, backend, timeout_s)
        m, ng = groups.size, groups.count
        rings = Rings(
            row=Circle(tuple(row), j, intra, (False,) * m, sent),
            column=Circle(tuple(column), i, inter, (True,) * ng, sent),
            everyone=Circle(tuple(everyone), i * m + j, world, ((False,) * (m - 1) + (ng > 1,)) * ng, sent),
            helper=Lane(device, "helper"),
        )
        return Levels(groups, i, j, rank, collectives, intra, inter, world, rings, timeout_s, sent)

    def own(self, size: int, level: Level, within: Level = "N") -> slice:
        """This rank's part at `level` of a buffer of `size` numbers, counted from its part at the coarser `within`."""
        chunk = size // self.groups.world_size
        starts = {"N": 0, "I": self.place * self.groups.count * chunk}
        starts["G"] = starts["I"] + self.group * chunk
        start = starts[level] - starts[within]
        return slice(start, start + size // self.groups.divisor(level))

    def gather(self, buffer: Tensor, low: Level, high: Level) -> None:
        """Fill `buffer`, this rank's part at the coarser level `high`, from all ranks' parts at level `low`."""
        if low == high or not buffer.numel():
            return
        with self.naming_lost_peers():
            self._gather(buffer, low, high)

    def _gather(self, buffer: Tensor, low: Level, high: Level) -> None:
        if high == "I":
            self._gather_column(buffer)
        elif low == "I":
            self._gather_row(buffer)
        elif self._alone:
            if self.groups.count > 1:
                self._gather_column(buffer)
            else:
                self._gather_row(buffer)
        elif self.collectives == "two_phase":
            self._gather_column(buffer[self.own(buffer.numel(), "I")])
            self._gather_row(buffer)
        elif self.collectives == "backend":
            self._gather_everyone(buffer)
        else:
            self.rings.all_gather(self._blocks(buffer), "flat" if self.collectives == "flat" else "ho")

    def reduce_scatter(self, buffer: Tensor, high: Level, low: Level) -> None:
        """Sum `buffer`, a part at `high`, over the ranks that share it; this rank's part at `low` holds it then.

        The rest of the buffer is used up.
        """
        if low == high or not buffer.numel():
            return
        with self.naming_lost_peers():
            self._reduce_scatter(buffer, high, low)

    def _reduce_scatter(self, buffer: Tensor, high: Level, low: Level) -> None:
        if high == "I":
            self._scatter(buffer, self.rings.column)
        elif low == "I":
            self._scatter(buffer, self.rings.row)
        elif self._alone or self.collectives == "two_phase":
            self._reduce_scatter(buffer, "N", "I")
            self._reduce_scatter(buffer[self.own(buffer.numel(), "I")], "I", "G")
        elif self.collectives == "backend":
            self._scatter_everyone(buffer)
        else:
            self.rings.reduce_scatter(self._blocks(buffer), "flat" if self.collectives == "flat" else "ho")

    def all_reduce(self, buffer: Tensor, level: Level) -> None:
        """Sum `buffer`, a part at `level`, over all ranks that hold the same part."""
        if not buffer.numel():
            return
        if level == "N" and self.collectives != "backend":
            self.reduce_scatter(buffer, "N", "G")
            self.gather(buffer, "G", "N")
            return
        with self.naming_lost_peers():
            if level == "I" and self.inter is not None:
                dist.all_reduce(buffer, group=self.inter)
                self.sent.inter += 2 * _share(buffer, self.groups.count)
            elif level == "N" and self.world is not None:
                dist.all_reduce(buffer, group=self.world)
                self._count(self.rings.everyone, 2 * _share(buffer, self.groups.world_size))

    def close(self) -> None:
        """Leave the process groups. Once nothing is on its way."""
        self.rings.helper.close()
        groups = [group for group in (self.intra, self.inter, self.world) if group is not None]
        self.intra = self.inter = self.world = None
        self.rings.leave()
        while groups:  # a group's threads end when nothing refers to it any more
            dist.destroy_process_group(groups.pop())

    def sum_scalars(self, values: Tensor) -> Tensor:
        """The sum of a few numbers over all ranks, bitwise the same on all of them. Not counted."""
        if self.world is not None:
            with self.naming_lost_peers():
                dist.all_reduce(values, group=self.world)
        return values

    @contextmanager
    def naming_lost_peers(self) -> Iterator[None]:
        """Turns the backend's complaint into `PeerLost` with the ranks that are gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.world is None:
                raise
            silent = silent_ranks(self.rank, self.rings.everyone.ranks)
            names = ", ".join(f"rank {other}" for other in silent)
            who = f"no answer from {names} (dead, stuck or still waiting)" if silent else "all answer now: one was late"
            raise PeerLost(
                f"rank {self.rank} could not exchange with the others within {self.timeout_s:g} s: {who}. See their "
                f"messages, then go on from the last checkpoint. [{str(error).strip().splitlines()[0][:200]}]"
            ) from error

    @property
    def _alone(self) -> bool:
        """Whether there is but one group, or groups of one rank: one level of links."""
        return 1 in (self.groups.size, self.groups.count)

    def _gather_row(self, buffer: Tensor) -> None:
        """Parts I to N."""
        if self.intra is not None:
            dist.all_gather_single(buffer, buffer[self.own(buffer.numel(), "I")], group=self.intra)
        self.sent.intra += _share(buffer, self.groups.size)

    def _gather_column(self, buffer: Tensor) -> None:
        """Parts G to I."""
        if self.inter is not None:
            chunk = buffer.numel() // self.groups.count
            dist.all_gather_single(buffer, buffer[self.group * chunk : (self.group + 1) * chunk], group=self.inter)
        self.sent.inter += _share(buffer, self.groups.count)

    def _gather_everyone(self, buffer: Tensor) -> None:
        """Parts G to N in one collective, whose result is in the order of ranks: (group, place), not (place, group)."""
        m, ng = self.groups.size, self.groups.count
        ordered = torch.empty_like(buffer)
        dist.all_gather_single(ordered, buffer[self.own(buffer.numel(), "G")].clone(), group=self.world)
        buffer.view(m, ng, -1).copy_(ordered.view(ng, m, -1).transpose(0, 1))
        self._count(self.rings.everyone, _share(buffer, self.groups.world_size))

    def _scatter_everyone(self, buffer: Tensor) -> None:
        m, ng = self.groups.size, self.groups.count
        ordered = buffer.view(m, ng, -1).transpose(0, 1).contiguous()
        own = buffer[self.own(buffer.numel(), "G")]
        out = torch.empty_like(own)
        dist.reduce_scatter_single(out, ordered.view(-1), group=self.world)
        own.copy_(out)
        self._count(self.rings.everyone, _share(buffer, self.groups.world_size))

    def _scatter(self, buffer: Tensor, circle: Circle) -> None:
        if circle.group is None:
            return
        if not buffer.is_cuda:
            # gloo's own is an all-reduce inside: it sends twice as much (measured: 6.0 buffers of 4 ranks, not 3.0)
            scatter(buffer.view(circle.size, -1).unbind(), circle)
            return
        out = torch.empty_like(buffer[: buffer.numel() // circle.size])
        dist.reduce_scatter_single(out, buffer, group=circle.group)
        buffer.view(circle.size, -1)[circle.place].copy_(out)
        self._count(circle, _share(buffer, circle.size))

    def _blocks(self, buffer: Tensor) -> Blocks:
        m, ng = self.groups.size, self.groups.count
        chunks: Sequence[Tensor] = buffer.view(self.groups.world_size, -1).unbind()
        return [[chunks[j * ng + i] for j in range(m)] for i in range(ng)]

    def _count(self, circle: Circle, nbytes: float) -> None:
        if circle.crossing[circle.place]:
            self.sent.inter += nbytes
        else:
            self.sent.intra += nbytes


def silent_ranks(rank: int, ranks: Sequence[int], wait_s: float = 2.0) -> list[int]:
    """After a failed collective: the ranks that have not come to the same conclusion within `wait_s`.

    Whoever lives finds the failure too, at its next collective; the dead and the stuck do not.
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
    """Makes all of `groups`; returns the one with `rank` in it, None where it is alone there."""
    own = None
    for members in groups:
        if len(members) > 1:
            made = dist.new_group(list(members), timedelta(seconds=timeout_s), backend)
            own = made if rank in members else own
    return own


def _share(buffer: Tensor, ranks: int) -> float:
    """Bytes that a rank sends round a circle to gather, or to scatter, `buffer`."""
    return buffer.nbytes * (ranks - 1) / ranks
