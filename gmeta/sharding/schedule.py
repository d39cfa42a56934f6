"""The engine's schedule on a virtual clock: which placement trains fastest, for any number of ranks. Pure.

A rank computes unit after unit. Its lanes, for parameters, for gradients and for embedding rows, each carry one
collective at a time, in order; all share the links inside the group and between groups, which carry one at a time. What
is modelled is what `Paro` does, in the order in which it does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gmeta.sharding.cost import Links, Phases, Wires, Workload
from gmeta.sharding.strategy import PLACEMENTS, Groups, Placement, memory_bytes

TIE = 1.02
"""Placements within so much of the fastest are as fast: estimates are not better than that."""


@dataclass(frozen=True)
class Cost:
    """One optimizer step under a placement."""

    placement: str
    memory: float  # bytes that a rank holds all the time, activations not counted
    step_s: float
    compute_s: float
    inter_s: float  # that the links between groups are busy
    intra_s: float

    @property
    def bound_s(self) -> float:
        """No schedule is faster: the busiest of computing and links."""
        return max(self.compute_s, self.inter_s, self.intra_s)


@dataclass
class _Clock:
    """When lanes and links are free again."""

    lanes: dict[str, float] = field(default_factory=lambda: {"params": 0.0, "grads": 0.0, "rows": 0.0})
    links: dict[str, float] = field(default_factory=lambda: {"inter": 0.0, "intra": 0.0})
    busy: dict[str, float] = field(default_factory=lambda: {"inter": 0.0, "intra": 0.0})

    def run(self, lane: str, start: float, phases: Phases) -> float:
        """When a collective ends that is submitted at `start`."""
        now = max(start, self.lanes[lane])
        for link, seconds in phases:
            now = max(now, self.links[link]) + seconds
            self.links[link] = now
            self.busy[link] += seconds
        self.lanes[lane] = now
        return now


def cost(placement: str, groups: Groups, links: Links, work: Workload, algorithm: str = "two_phase") -> Cost:
    """What a step comes to, once training has settled."""
    place, sizes, wires = Placement.parse(placement), work.sizes, Wires(groups, links, algorithm)
    params = 8.0 * sizes.param * work.params / work.units
    updated = 8.0 * sizes.param * work.trainable / work.units
    grads = 8.0 * sizes.grad * work.trainable / work.units
    gather, reduce = wires.between(params, place.params, "N"), wires.between(grads, place.grads, "N")
    sync, publish = wires.synchronised(grads, place), wires.between(updated, place.state, place.params)
    exchange = wires.alltoall(8.0 * work.alltoall_bytes)
    clock = _Clock()
    now = before = 0.0
    published = [0.0] * work.units
    for _ in range(3):
        before, clock.busy = now, dict.fromkeys(clock.busy, 0.0)
        for micro_batch in range(work.accumulation):
            last = micro_batch == work.accumulation - 1
            now = clock.run("rows", now, exchange)
            now = _pass(clock, now, gather, (), published, work.micro_batch_s / 3 / work.units)
            ends = reduce + sync if last else reduce
            now = _pass(clock, now, gather, ends, [0.0] * work.units, work.micro_batch_s * 2 / 3 / work.units)
            now = clock.run("rows", now, exchange)
        now = max(now, clock.lanes["grads"])
        published = [clock.run("params", now, publish) if publish else 0.0 for _ in range(work.units)]
    memory = sum(memory_bytes(place, groups, work.params, work.trainable, sizes).values())
    compute = work.accumulation * work.micro_batch_s
    return Cost(placement, memory, now - before, compute, clock.busy["inter"], clock.busy["intra"])


def _pass(clock: _Clock, now: float, gather: Phases, ends: Phases, ready: list[float], unit_s: float) -> float:
    """A forward or a backward pass: gather a unit, start the next one's gathering, compute, start its reduction."""
    arrived = clock.run("params", now, gather) if gather else now
    for number, published in enumerate(ready):
        now = max(now, arrived, published)
        if number + 1 < len(ready):
            arrived = clock.run("params", now, gather) if gather else now
        now += unit_s
        if ends:
            clock.run("grads", now, ends)
    return now


def plan(
    groups: Groups, links: Links, work: Workload, memory_cap: float | None = None, algorithm: str = "two_phase"
) -> list[Cost]:
    """The placements that fit into `memory_cap` bytes a rank, fastest first; of equals, the one that holds less.

    ValueError where none fits: how much is missing, and what would do.
    """
    found = [cost(name, groups, links, work, algorithm) for name in PLACEMENTS]
    fitting = [c for c in found if memory_cap is None or c.memory <= memory_cap]
    if fitting:
        return sorted(fitting, key=lambda c: (float(f"{c.step_s:.6g}"), c.memory))
    assert memory_cap is not None
    least = min(found, key=lambda c: c.memory)
    ranks = -(-least.memory * groups.world_size // memory_cap)
    least_gb, missing_gb = least.memory / 1e9, (least.memory - memory_cap) / 1e9
    raise ValueError(
        f"no placement fits into {memory_cap / 1e9:.3g} GB a rank: {least.placement} needs least, {least_gb:.3g} GB, "
        f"{missing_gb:.3g} GB too much, activations not counted. {ranks:.0f} ranks would do, or fewer trainable "
        "parameters"
    )


def choose(fitting: Sequence[Cost]) -> Cost:
    """Of those that are as fast as the fastest, the one that holds least."""
    return min((c for c in fitting if c.step_s <= TIE * fitting[0].step_s), key=lambda c: (c.memory, c.step_s))
