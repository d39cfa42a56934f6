"""Measures the links between ranks, with the messages that collectives send."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor

from gmeta.sharding.hierarchy import HierarchicalCollectives
from gmeta.sharding.ring import Ring, send_and_receive
from gmeta.sharding.schedule import Links

SMALL, LARGE = 1 << 10, 1 << 21
"""Bytes of the messages that show latency, and bandwidth."""
CUDA_TIMES = 64
"""Messages are so many times larger on CUDA, where the host takes as long to start one as 2 MiB take on the way."""
MORE = 4
"""The number of messages after the first, over which the time of one is taken."""
SHARED = 0.6
"""Links count as shared where all ranks of a node at once get less than this fraction of what one of them gets alone.
"""


def measure_links(hierarchy: HierarchicalCollectives, device: torch.device, repeats: int = 5) -> Links:
    """Measure latency and bandwidth inside nodes and between them. Collective; the same result on every rank.

    Every rank sends to the next one of its ring, and the slowest rank counts. Where there is only one node, or one rank
    in each, the link that does not exist counts as fast as the other. ValueError where there is one process.
    """
    inside = _measured(hierarchy, hierarchy.rings.intra, device, repeats, True)
    between = _measured(hierarchy, hierarchy.rings.inter, device, repeats, True)
    alone = _measured(hierarchy, hierarchy.rings.inter, device, repeats, hierarchy.local_rank == 0)
    one, other = inside or between, between or inside
    if one is None or other is None:
        raise ValueError("one process has no links to measure: start several, on the machines that will train")
    shared = between is not None and alone is not None and between[1] < SHARED * alone[1]
    bits_s = alone[1] if shared and alone is not None else other[1]
    return Links(bits_s, one[1], other[0], one[0], shared)


def _measured(
    hierarchy: HierarchicalCollectives, ring: Ring, device: torch.device, repeats: int, takes_part: bool
) -> tuple[float, float] | None:
    """Return (seconds, bits a second) of a message; None where the ring has one rank."""
    if ring.size == 1:
        return None
    size = LARGE * (CUDA_TIMES if device.type == "cuda" else 1)
    small, large = (
        _message_s(hierarchy, ring, torch.zeros(nbytes, dtype=torch.uint8, device=device), repeats, takes_part)
        for nbytes in (SMALL, size)
    )
    return small, 8 * size / max(large - small, 0.1 * large)  # noise can make the difference tiny


def _message_s(
    hierarchy: HierarchicalCollectives, ring: Ring, message: Tensor, repeats: int, takes_part: bool
) -> float:
    """Return the seconds of one message among many in a row, as in a ring.

    The first one is subtracted, so that neither meeting the peer nor finding the speed counts.
    """
    times = {}
    for count in (1, 1 + MORE):
        found = [_exchanges_s(hierarchy, ring, message, count if takes_part else 0) for _ in range(repeats + 1)]
        times[count] = statistics.median(found[1:])
    slowest = torch.tensor([times[1 + MORE] - times[1]], dtype=torch.float64, device=message.device) / MORE
    if hierarchy.world is not None:
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=hierarchy.world)
    return max(float(slowest), 1e-7)


def _exchanges_s(hierarchy: HierarchicalCollectives, ring: Ring, message: Tensor, count: int) -> float:
    into = torch.empty_like(message)
    _together(hierarchy)
    begun = time.perf_counter()
    for _ in range(count):
        send_and_receive(message, into, ring)
    _finish(message)
    return time.perf_counter() - begun


def _together(hierarchy: HierarchicalCollectives) -> None:
    if hierarchy.world is not None:
        dist.barrier(hierarchy.world)


def _finish(message: Tensor) -> None:
    if message.is_cuda:
        torch.cuda.synchronize(message.device)


def describe(links: Links) -> str:
    """Describe links for people, with a line for each kind."""
    nic = "one for a whole node" if links.shared_nic else "one for each rank"
    return (
        f"inside nodes    {links.intra_bits_s / 1e9:8.3f} Gbit/s {links.intra_latency_s * 1e6:8.0f} us a message\n"
        f"between nodes   {links.inter_bits_s / 1e9:8.3f} Gbit/s {links.inter_latency_s * 1e6:8.0f} us a message, {nic}"
    )


def suspicion(links: Links) -> str | None:
    """Return what looks wrong about measured links, and what to do; None where nothing does."""
    if links.intra_bits_s >= links.inter_bits_s:
        return None
    return (
        f"links inside nodes are slower than those between nodes ({links.intra_bits_s / 1e9:.3g} and "
        f"{links.inter_bits_s / 1e9:.3g} Gbit/s): see that consecutive ranks share a machine, and that node_size is "
        "the number of ranks on each; otherwise sharding inside nodes gains nothing"
    )
