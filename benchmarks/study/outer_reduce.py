"""Naive ways to sum dense gradients over ranks. Each satisfies `gmeta.optim.dense.OuterReduce`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmeta.parallel.collectives import GradientBuckets, naming_lost_peers
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import Traffic


class NoOverlap:
    """The product's AllReduce, after the row gradients have gone home instead of during backward."""

    def __init__(self, params: Iterable[nn.Parameter], mesh: Mesh) -> None:
        self._buckets = GradientBuckets(params, mesh)
        self.finish, self.add_expected, self.close = (
            self._buckets.finish,
            self._buckets.add_expected,
            self._buckets.close,
        )

    def begin(self, several: bool) -> None:
        """Do nothing: no sum starts during the backward pass."""
        self._buckets.begin(several=True)

    def flush(self) -> None:
        """Do nothing: no sum starts before `finish`."""


class CentralReduce:
    """The central outer rule that G-Meta replaces: rank 0 gathers all gradients, adds them and sends the sum back.

    Gradients set off when backward has ended: with `overlap` they travel to rank 0 under the return of row gradients,
    without it after that. Rank 0 adds them in the order of ranks.
    """

    def __init__(self, params: Iterable[nn.Parameter], mesh: Mesh, *, overlap: bool = True) -> None:
        self._params, self._mesh, self._overlap = list(params), mesh, overlap
        self._flat = self._params[0].new_zeros(sum(p.numel() for p in self._params))
        self._gathered: list[Tensor] | None = None
        if mesh.is_main:
            self._gathered = [torch.empty_like(self._flat) for _ in range(mesh.world_size)]
        self._work: dist.Work | None = None

    def _parts(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        parts = torch.split(self._flat, [p.numel() for p in self._params])
        return ((p, part.view_as(p)) for p, part in zip(self._params, parts, strict=True))

    def begin(self, several: bool) -> None:
        """Do nothing: no sum starts during the backward pass."""

    def flush(self) -> None:
        """Send the gradients to rank 0, with `overlap`."""
        if self._overlap:
            self._start()

    def _start(self) -> None:
        if self._mesh.dense_group is None or self._work is not None:
            return
        for p, part in self._parts():
            if p.grad is None:
                part.zero_()
            else:
                part.copy_(p.grad)
        with naming_lost_peers(self._mesh):
            self._work = dist.gather(self._flat, self._gathered, dst=0, group=self._mesh.dense_group, async_op=True)

    def finish(self, traffic: Traffic | None = None) -> None:
        """Rank 0 adds what it has gathered, and everyone gets the sum."""
        self._start()
        if self._work is not None:
            with naming_lost_peers(self._mesh):
                self._work.wait()
                copies = None
                if self._gathered is not None:
                    copies = [sum(self._gathered[1:], start=self._gathered[0])] * len(self._gathered)
                dist.scatter(self._flat, copies, src=0, group=self._mesh.dense_group)
            self._work = None
            for p, part in self._parts():
                p.grad = part.clone() if p.grad is None else p.grad.copy_(part)
        if traffic is not None:
            self.add_expected(traffic)

    def add_expected(self, traffic: Traffic) -> None:
        """Add K bytes from everyone to rank 0, hence (N - 1) K into it, and as much out of it: a gather and a
        scatter.
        """
        if self._mesh.world_size > 1:
            traffic.add(central_traffic(self._flat.nbytes, traffic.rank, self._mesh.world_size), calls=2)

    def close(self) -> None:
        """Do nothing: there is nothing to undo."""


def central_traffic(num_bytes: int, rank: int, world_size: int) -> dict[int, float]:
    """Return what a rank sends when `num_bytes` go from everyone to rank 0 and the sum comes back to everyone."""
    return {r: float(num_bytes) for r in range(1, world_size)} if rank == 0 else {0: float(num_bytes)}
