"""Who gets how many slots of a batch: exact assignments on integers that end as early as possible.

Worker i needs T_i(b) = a_i + b / v_i seconds for b > 0 slots, and none for none: a fixed cost (a_i) and a speed (v_i,
slots a second, of computing only; waiting for others would hide a straggler).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Worker:
    """What is known of a worker, and what it may be given."""

    speed: float  # slots a second
    fixed_s: float = 0.0  # seconds of any work at all
    least: int = 0
    most: int | None = None  # slots that fit its memory; None: any number

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ValueError(f"speed is {self.speed}: must be more than 0 slots a second")
        if not self.fixed_s >= 0:
            raise ValueError(f"fixed_s is {self.fixed_s}: must not be negative")
        if self.least < 0 or (self.most is not None and self.most < self.least):
            raise ValueError(f"a worker gets {self.least} to {self.most} slots: must be 0 <= least <= most")

    def seconds(self, slots: int) -> float:
        """T_i."""
        return self.fixed_s + slots / self.speed if slots else 0.0


def proportional(total: int, weights: Sequence[float]) -> list[int]:
    """`total` slots in proportion to `weights`, by largest remainder; ties go to the first."""
    whole = sum(weights)
    if not whole > 0 or min(weights) < 0:
        raise ValueError(f"weights are {list(weights)}: must not be negative, not all 0")
    exact = [total * weight / whole for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (slots[i] - exact[i], i))
    for i in by_remainder[: total - sum(slots)]:
        slots[i] += 1
    return slots


def balanced(total: int, workers: Sequence[Worker]) -> list[int]:
    """Slots of each worker, `total` in all, with the least possible max_i T_i; exact.

    Slots are given one by one to whoever would end first with one more. That is optimal because no T_i falls with
    more slots: an assignment with a smaller maximum would give some worker fewer, and so another one more, than was
    refused here. Of equally good choices whoever has fewer slots is taken, then the first. ValueError where bounds
    leave no assignment.
    """
    slots = [worker.least for worker in workers]
    room = sum(worker.most if worker.most is not None else total for worker in workers)
    if not sum(slots) <= total <= max(room, sum(slots)):
        raise ValueError(f"{total} slots do not fit workers that take {sum(slots)} to {room}")
    ends = [(worker.seconds(slots[i] + 1), slots[i], i) for i, worker in enumerate(workers) if slots[i] != worker.most]
    heapq.heapify(ends)
    for _ in range(total - sum(slots)):
        _, _, i = heapq.heappop(ends)
        slots[i] += 1
        if slots[i] != workers[i].most:
            heapq.heappush(ends, (workers[i].seconds(slots[i] + 1), slots[i], i))
    return slots


@dataclass(frozen=True)
class DeviceClass:
    """`count` equal devices that run micro-batches of at most `most` slots, T = a + m / v seconds each."""

    count: int
    worker: Worker


@dataclass(frozen=True)
class Share:
    """What each device of a class does in a step: `accumulation` micro-batches of `micro_batch` slots."""

    micro_batch: int
    accumulation: int


def accumulated(total: int, classes: Sequence[DeviceClass], max_accumulation: int = 8) -> list[Share]:
    """Micro-batch and accumulation of each device class, `total` slots in all, that end first (AntDT-DD).

    Minimises max_i c_i (a_i + m_i / v_i) with sum_i count_i c_i m_i = total, m_i within memory: enumerates c_i, and all
    splits of the total over the classes that whole micro-batches allow. ValueError where none does.
    """
    best: tuple[float, list[Share]] | None = None
    for counts in product(range(1, max_accumulation + 1), repeat=len(classes)):
        for micro in _splits(total, [k.count * c for k, c in zip(classes, counts, strict=True)], classes):
            ends = max(c * k.worker.seconds(m) for k, c, m in zip(classes, counts, micro, strict=True))
            if best is None or ends < best[0]:
                best = ends, [Share(m, c) for m, c in zip(micro, counts, strict=True)]
    if best is None:
        sizes = ", ".join(f"{k.count} devices of up to {k.worker.most}" for k in classes)
        raise ValueError(f"{total} slots cannot be cut into whole micro-batches for {sizes}")
    return best[1]


def _splits(total: int, units: Sequence[int], classes: Sequence[DeviceClass]) -> list[list[int]]:
    """All micro-batch sizes m with sum_i units_i m_i = total, each within its class's bounds."""
    worker = classes[0].worker
    most = total // units[0] if worker.most is None else min(worker.most, total // units[0])
    if len(units) == 1:
        exact = total % units[0] == 0 and worker.least <= total // units[0] <= most
        return [[total // units[0]]] if exact else []
    return [
        [m, *rest]
        for m in range(worker.least, most + 1)
        for rest in _splits(total - units[0] * m, units[1:], classes[1:])
    ]
