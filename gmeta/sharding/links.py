"""What links between ranks carry: measured with the messages that collectives send."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor

from gmeta.sharding.cost import Links
from gmeta.sharding.hierarchy import Levels
from gmeta.sharding.ring import Circle, exchange

SMALL, LARGE = 1 << 10, 1 << 21
"""Bytes of the messages that show latency, and bandwidth."""
CUDA_TIMES = 64
"""So much larger on CUDA, where starting a message takes the host as long as 2 MiB take on the way."""
MORE = 4
"""Messages after the first, over which its time is taken."""
SHARED = 0.6
"""Links are shared where all ranks of a group at once get less than this of what one of them alone gets."""


def measure_links(levels: Levels, device: torch.device, repeats: int = 5) -> Links:
    """Latency and bandwidth inside groups and between them, the slowest rank's; the same on every rank. Collective.

    Every rank sends to the next one of its circle, as in a ring. Where there is one group, or one rank in a group, the
    link that is not there counts as fast as the other.
    """
    inside = _measured(levels, levels.rings.row, device, repeats, True)
    between = _measured(levels, levels.rings.column, device, repeats, True)
    alone = _measured(levels, levels.rings.column, device, repeats, levels.place == 0)
    one, other = inside or between, between or inside
    if one is None or other is None:
        raise ValueError("one process has no links to measure: start several, on the machines that will train")
    shared = between is not None and alone is not None and between[1] < SHARED * alone[1]
    bits_s = alone[1] if shared and alone is not None else other[1]
    return Links(bits_s, one[1], other[0], one[0], shared)


def _measured(
    levels: Levels, circle: Circle, device: torch.device, repeats: int, takes_part: bool
) -> tuple[float, float] | None:
    """(seconds, bits a second) of a message; None where the circle is of one rank."""
    size = LARGE * (CUDA_TIMES if device.type == "cuda" else 1)
    small, large = (
        _message_s(levels, circle, torch.zeros(nbytes, dtype=torch.uint8, device=device), repeats, takes_part)
        for nbytes in (SMALL, size)
    )
    if circle.size == 1:
        return None
    return small, 8 * size / max(large - small, 0.1 * large)  # in case of noise


def _message_s(levels: Levels, circle: Circle, message: Tensor, repeats: int, takes_part: bool) -> float:
    """One of many messages in a row, as in a ring: what it takes to meet, and to find the speed, is not its."""
    times = {}
    for count in (1, 1 + MORE):
        found = [_exchanges_s(levels, circle, message, count if takes_part else 0) for _ in range(repeats + 1)]
        times[count] = statistics.median(found[1:])
    slowest = torch.tensor([times[1 + MORE] - times[1]], dtype=torch.float64, device=message.device) / MORE
    if levels.world is not None:
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=levels.world)
    return max(float(slowest), 1e-7)


def _exchanges_s(levels: Levels, circle: Circle, message: Tensor, count: int) -> float:
    into = torch.empty_like(message)
    _together(levels)
    begun = time.perf_counter()
    for _ in range(count if circle.size > 1 else 0):
        exchange(message, into, circle)
    _finish(message)
    return time.perf_counter() - begun


def _together(levels: Levels) -> None:
    if levels.world is not None:
        dist.barrier(levels.world)


def _finish(message: Tensor) -> None:
    if message.is_cuda:
        torch.cuda.synchronize(message.device)


def describe(links: Links) -> str:
    """For people: a line for each kind of link."""
    nic = "one for a whole group" if links.shared_nic else "one for each rank"
    return (
        f"inside groups   {links.intra_bits_s / 1e9:8.3f} Gbit/s {links.intra_latency_s * 1e6:8.0f} us a message\n"
        f"between groups  {links.inter_bits_s / 1e9:8.3f} Gbit/s {links.inter_latency_s * 1e6:8.0f} us a message, {nic}"
    )
