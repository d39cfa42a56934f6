"""Who gets how many tasks of a batch: exact assignments of whole numbers that end as early as possible.

Worker i needs T_i(b) = a_i + b / v_i seconds for b > 0 tasks, and none for none. The fixed cost is a_i; the speed v_i,
in tasks a second, is that of computing only, because waiting for others would hide a straggler.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

MAX_ACCUMULATION = 8
"""Micro-batches of a rank's part of a batch, at most."""


@dataclass(frozen=True)
class Worker:
    """What is known of a worker, and what it may be given."""

    speed: float  # tasks a second
    fixed_s: float = 0.0  # seconds that any work takes at all
    least: int = 0
    most: int | None = None  # tasks that fit its memory; None for any number

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ValueError(f"speed is {self.speed}: must be more than 0 tasks a second")
        if not self.fixed_s >= 0:
            raise ValueError(f"fixed_s is {self.fixed_s}: must not be negative")
        if self.least < 0 or (self.most is not None and self.most < self.least):
            raise ValueError(f"a worker gets {self.least} to {self.most} tasks: must be 0 <= least <= most")

    def seconds(self, tasks: int) -> float:
        """Return T_i, the seconds in which a worker computes so many tasks."""
        return self.fixed_s + tasks / self.speed if tasks else 0.0


def proportional(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` in proportion to `weights` by the largest remainder; ties go to the first."""
    total_weight = sum(weights)
    if not total_weight > 0 or min(weights) < 0:
        raise ValueError(f"weights are {list(weights)}: must not be negative, not all 0")
    exact = [total * weight / total_weight for weight in weights]
    tasks = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (tasks[i] - exact[i], i))
    for i in by_remainder[: total - sum(tasks)]:
        tasks[i] += 1
    return tasks


def balanced(total: int, workers: Sequence[Worker]) -> list[int]:
    """Return the tasks of each worker, `total` in all, with the least possible max_i T_i. This is exact.

    Tasks are given one by one to whoever would end first with one more. That is optimal because no T_i falls with more
    tasks: an assignment with a smaller maximum would give some worker fewer, and so another one more, than was refused
    here. Of equally good choices the worker with fewer tasks is taken, then the first. Tasks that would end well before
    the time at which continuous fractions end are given at once: one by one, they would all have come first. ValueError
    where bounds leave no assignment.
    """
    least = [worker.least for worker in workers]
    most = [worker.most if worker.most is not None else total for worker in workers]
    if not sum(least) <= total <= max(sum(most), sum(least)):
        raise ValueError(f"{total} tasks do not fit workers that take {sum(least)} to {sum(most)}")
    tasks = _surely(total, workers, least, most)
    ends = [(worker.seconds(tasks[i] + 1), tasks[i], i) for i, worker in enumerate(workers) if tasks[i] < most[i]]
    heapq.heapify(ends)
    for _ in range(total - sum(tasks)):
        _, _, i = heapq.heappop(ends)
        tasks[i] += 1
        if tasks[i] < most[i]:
            heapq.heappush(ends, (workers[i].seconds(tasks[i] + 1), tasks[i], i))
    return tasks


def _surely(total: int, workers: Sequence[Worker], least: list[int], most: list[int]) -> list[int]:
    """Return the tasks that end before a time at which fewer than `total` have ended; `least` where no such time is
    found.

    The time is the end of continuous fractions, sum_i clip((T - a_i) v_i, least, most) = total, by Newton's method (the
    sum is piecewise linear), less a millionth. That is far above rounding, and only the last few tasks are then given
    singly.
    """
    end = (total + sum(w.fixed_s * w.speed for w in workers)) / sum(w.speed for w in workers)
    for _ in range(20):
        exact = [(end - w.fixed_s) * w.speed for w in workers]
        given = sum(min(max(x, lo), hi) for x, lo, hi in zip(exact, least, most, strict=True))
        slope = sum(w.speed for w, x, lo, hi in zip(workers, exact, least, most, strict=True) if lo <= x <= hi)
        step = (total - given) / slope if slope > 0 else 0.0
        end += step
        if abs(step) <= 1e-9 * end:
            break
    end -= 1e-6 * abs(end)
    tasks = [
        min(max(int((end - w.fixed_s) * w.speed), lo), hi) if 0 < (end - w.fixed_s) * w.speed < 2**53 else lo
        for w, lo, hi in zip(workers, least, most, strict=True)
    ]
    return tasks if sum(tasks) <= total else list(least)


@dataclass(frozen=True)
class DeviceClass:
    """`count` equal devices that run micro-batches of at most `most` tasks in T = a + m / v seconds each."""

    count: int
    worker: Worker


@dataclass(frozen=True)
class MicroBatching:
    """What each device of a class does in a step: `accumulation` micro-batches of `micro_batch` tasks."""

    micro_batch: int
    accumulation: int


def accumulated(
    total: int, classes: Sequence[DeviceClass], max_accumulation: int = MAX_ACCUMULATION
) -> list[MicroBatching]:
    """Return the micro-batch and accumulation of each device class, `total` tasks in all, that end first (AntDT-DD).
    This is exact.

    It minimises max_i c_i (a_i + m_i / v_i) with sum_i count_i c_i m_i = total and m_i within memory. Class by class,
    it keeps the choice that ends first for every number of tasks that the classes so far can take: whatever later
    classes do, no other choice for as many tasks can be better. Of equal choices it takes the one with fewer
    micro-batches. ValueError where no micro-batches give the total.
    """
    reached: dict[int, tuple[float, tuple[MicroBatching, ...]]] = {0: (0.0, ())}
    for last, options in ((k is classes[-1], _options(total, k, max_accumulation)) for k in classes):
        longer: dict[int, tuple[float, tuple[MicroBatching, ...]]] = {}
        for taken, (ends, chosen) in reached.items():
            room = total - taken
            # The last class must take all that is left.
            sizes = ((room,) if room in options else ()) if last else (size for size in options if size <= room)
            for size in sizes:
                seconds, choice = options[size]
                found, worst = longer.get(taken + size), max(ends, seconds)
                if found is None or worst < found[0]:
                    longer[taken + size] = worst, (*chosen, choice)
        reached = longer
    if total not in reached:
        sizes_text = ", ".join(f"{k.count} devices of up to {k.worker.most}" for k in classes)
        raise ValueError(f"{total} tasks cannot be split into micro-batches for {sizes_text}")
    return list(reached[total][1])


def _options(total: int, devices: DeviceClass, max_accumulation: int) -> dict[int, tuple[float, MicroBatching]]:
    """Return {tasks of all devices of the class: (seconds, the choice that ends first)}, up to `total` tasks."""
    worker, found = devices.worker, dict[int, tuple[float, MicroBatching]]()
    for c in range(1, max_accumulation + 1):
        most = total // (devices.count * c)
        for m in range(worker.least, (most if worker.most is None else min(worker.most, most)) + 1):
            size, seconds = devices.count * c * m, c * worker.fixed_s * (m > 0) + c * m / worker.speed
            if size not in found or seconds < found[size][0]:
                found[size] = seconds, MicroBatching(m, c)
    return found
