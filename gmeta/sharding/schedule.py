"""The time of an optimizer step on a virtual clock: which strategy trains fastest, for any number of ranks. Pure.

`CollectiveCost` says what a collective takes on links with latency and bandwidth (the alpha-beta model). It has PaRO's
terms (arXiv 2310.06003), and what they leave out: latencies, nodes whose ranks share one link, hierarchical rings.
`step_cost` then runs the engine's schedule. A rank computes one unit after the other. It has a stream each for
parameters, gradients and embedding rows, and every stream carries one collective at a time, in order. All streams share
the links inside a node and between nodes, which carry one collective at a time too. What is modelled is what `Paro`
does, in the order in which it does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gmeta.sharding.strategy import STRATEGIES, ElementBytes, NodeLayout, ShardingStrategy, ShardScope, memory_bytes
from gmeta.sharding.streams import MAX_IN_FLIGHT

TIE = 1.02
"""Strategies whose time is within this factor of the fastest count as equal, because estimates are not better than
that."""


@dataclass(frozen=True)
class Links:
    """The links of one rank, with bandwidths in bits a second and latencies in seconds a message."""

    inter_bits_s: float
    intra_bits_s: float
    inter_latency_s: float = 0.0
    intra_latency_s: float = 0.0
    shared_nic: bool = False  # whether a node's ranks share one link to other nodes; otherwise each has its own

    def __post_init__(self) -> None:
        for name in ("inter_bits_s", "intra_bits_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must be more than 0")
        for name in ("inter_latency_s", "intra_latency_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class Workload:
    """A model, and one optimizer step of it."""

    params: int
    trainable: int
    accumulation: int = 1  # micro-batches
    micro_batch_s: float = 0.0  # seconds of computing, a third in forward and two thirds in backward
    units: int = 1  # parts of the model that are gathered one at a time, taken for equal
    sizes: ElementBytes = field(default_factory=ElementBytes)
    alltoall_bytes: float = 0.0  # embedding rows that a rank asks for in a micro-batch; as many gradients go back

    def __post_init__(self) -> None:
        if not 0 <= self.trainable <= self.params or self.params < 1:
            raise ValueError(
                f"{self.trainable} trainable of {self.params} parameters: must be between 0 and all, of 1 up"
            )
        for name in ("accumulation", "units"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least 1")
        for name in ("micro_batch_s", "alltoall_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must not be negative")


Phases = tuple[tuple[str, float], ...]
"""The phases of a collective, one after the other: (link, seconds that it is busy), where a link is inter or intra."""


def ring_s(bits: float, ranks: int, bits_s: float, latency_s: float) -> float:
    """Return the seconds of an all-gather, or of a reduce-scatter, of `bits` in all in a ring of links."""
    return (ranks - 1) * (latency_s + bits / (ranks * bits_s))


@dataclass(frozen=True)
class CollectiveCost:
    """Seconds of collectives on whole buffers of so many bits, in which all ranks take part at once."""

    layout: NodeLayout
    links: Links
    algorithm: str = "two_phase"  # between all ranks: flat, two_phase or ho

    def gather(self, bits: float, finer: ShardScope, coarser: ShardScope) -> Phases:
        """Gather partitions of scope `finer` into those of scope `coarser`; the reduce-scatter back takes as long."""
        if finer == coarser or not bits:
            return ()
        if finer == "I":
            return self._in_node(bits)
        if coarser == "I":
            return self._across_nodes(bits)
        if self.layout.num_nodes == 1:
            return self._in_node(bits)
        if self.layout.node_size == 1 or self.algorithm == "two_phase":
            return (*self._across_nodes(bits), *self._in_node(bits))
        if self.algorithm == "flat":
            slowest = min(self.links.inter_bits_s, self.links.intra_bits_s)
            latency = max(self.links.inter_latency_s, self.links.intra_latency_s)
            return (("inter", ring_s(bits, self.layout.world_size, slowest, latency)),)
        m, ng, n = self.layout.node_size, self.layout.num_nodes, self.layout.world_size
        spread = (m - 1) * (self.links.intra_latency_s + bits / (n * self.links.intra_bits_s))
        outer = self.links.inter_latency_s + bits / (n * self._inter_bits_s)
        return (("inter", (ng - 1) * max(outer, spread)), ("intra", spread))

    def _in_node(self, bits: float) -> Phases:
        seconds = ring_s(bits, self.layout.node_size, self.links.intra_bits_s, self.links.intra_latency_s)
        return (("intra", seconds),) if self.layout.node_size > 1 else ()

    def _across_nodes(self, bits: float) -> Phases:
        part = bits / self.layout.node_size
        seconds = ring_s(part, self.layout.num_nodes, self._inter_bits_s, self.links.inter_latency_s)
        return (("inter", seconds),) if self.layout.num_nodes > 1 else ()

    @property
    def _inter_bits_s(self) -> float:
        return self.links.inter_bits_s / (self.layout.node_size if self.links.shared_nic else 1)

    def alltoall(self, bits: float) -> Phases:
        """Return the phases of an AlltoAll in which a rank gets so many bits, in equal parts from all ranks and
        itself. Each peer's part is a message of its own, and they come one after the other.
        """
        if not bits:
            return ()
        m, n, links = self.layout.node_size, self.layout.world_size, self.links
        phases = (
            ("inter", n - m, links.inter_latency_s, self._inter_bits_s),
            ("intra", m - 1, links.intra_latency_s, links.intra_bits_s),
        )
        return tuple((link, peers * (wait + bits / n / speed)) for link, peers, wait, speed in phases if peers)

    def synchronise(self, bits: float, strategy: ShardingStrategy) -> Phases:
        """Sum gradients over all ranks once a step, down to the partitions of the optimizer's state."""
        if strategy.grads == strategy.state:
            return 2 * self.gather(bits, "G", strategy.grads)
        if strategy.state == "I":
            return (*self.gather(bits, "I", "N"), *2 * self.gather(bits, "G", "I"))
        return self.gather(bits, strategy.state, strategy.grads)


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step takes under a strategy."""

    strategy: str
    memory: float  # bytes that a rank holds at most, with gathered units and staging; activations are not counted
    passing: float  # those of them that come and go in a pass
    step_s: float
    compute_s: float
    inter_s: float  # seconds that the links between nodes are busy
    intra_s: float  # seconds that the links inside nodes are busy

    @property
    def bound_s(self) -> float:
        """Return the seconds of the busiest of computing and links. No schedule is faster."""
        return max(self.compute_s, self.inter_s, self.intra_s)


@dataclass
class _Clock:
    """The times at which streams and links are free again."""

    streams: dict[str, float] = field(default_factory=lambda: {"params": 0.0, "grads": 0.0, "rows": 0.0})
    links: dict[str, float] = field(default_factory=lambda: {"inter": 0.0, "intra": 0.0})
    busy: dict[str, float] = field(default_factory=lambda: {"inter": 0.0, "intra": 0.0})

    def run(self, stream: str, start: float, phases: Phases) -> float:
        """Submit a collective at `start`, and return when it ends."""
        now = max(start, self.streams[stream])
        for link, seconds in phases:
            now = max(now, self.links[link]) + seconds
            self.links[link] = now
            self.busy[link] += seconds
        self.streams[stream] = now
        return now


def step_cost(name: str, layout: NodeLayout, links: Links, work: Workload, algorithm: str = "two_phase") -> StepCost:
    """Return what a step takes under the strategy `name`, once training has settled."""
    strategy, sizes, wires = ShardingStrategy.parse(name), work.sizes, CollectiveCost(layout, links, algorithm)
    params = 8.0 * sizes.param * work.params / work.units
    updated = 8.0 * sizes.param * work.trainable / work.units
    grads = 8.0 * sizes.grad * work.trainable / work.units
    gather, reduce = wires.gather(params, strategy.params, "N"), wires.gather(grads, strategy.grads, "N")
    sync, publish = wires.synchronise(grads, strategy), wires.gather(updated, strategy.state, strategy.params)
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
            unit_s = work.micro_batch_s * 2 / 3 / work.units
            now = _pass(clock, now, gather, ends, [0.0] * work.units, unit_s, held_back=strategy.grads != "N")
            now = clock.run("rows", now, exchange)
        now = max(now, clock.streams["grads"])
        published = [clock.run("params", now, publish) if publish else 0.0 for _ in range(work.units)]
    memory = sum(memory_bytes(strategy, layout, work.params, work.trainable, sizes).values())
    passing = passing_bytes(strategy, work)
    compute = work.accumulation * work.micro_batch_s
    return StepCost(name, memory + passing, passing, now - before, compute, clock.busy["inter"], clock.busy["intra"])


def passing_bytes(strategy: ShardingStrategy, work: Workload) -> float:
    """Return the bytes that come and go in a pass: the root, the unit that computes and the next one, gathered; and
    staging buffers, one that fills and one that is reduced.
    """
    gathered = work.sizes.param * work.params * min(1.0, 3 / work.units) if strategy.params != "N" else 0.0
    staged = work.sizes.grad * work.trainable * min(1.0, 2 / work.units) if strategy.grads != "N" else 0.0
    return gathered + staged


def _pass(
    clock: _Clock, now: float, gather: Phases, ends: Phases, ready: list[float], unit_s: float, held_back: bool = False
) -> float:
    """Make a forward or a backward pass, and return when it ends.

    For each unit: wait for it, start to gather the next one, compute, and start the reduction of its gradients. Where
    computing is `held_back`, a unit waits until of the reductions before it one alone is on its way.
    """
    reduced: list[float] = []
    arrived = clock.run("params", now, gather) if gather else now
    for number, published in enumerate(ready):
        now = max(now, arrived, published, *(reduced[:-MAX_IN_FLIGHT] if held_back else ()))
        if number + 1 < len(ready):
            arrived = clock.run("params", now, gather) if gather else now
        now += unit_s
        if ends:
            reduced.append(clock.run("grads", now, ends))
    return now


def advise(
    layout: NodeLayout, links: Links, work: Workload, memory_cap: float | None = None, algorithm: str = "two_phase"
) -> list[StepCost]:
    """Return the strategies that fit into `memory_cap` bytes a rank, fastest first; of equal ones first the one that
    holds less.

    ValueError where none fits: it says how much memory is missing, and what would do.
    """
    found = [step_cost(name, layout, links, work, algorithm) for name in STRATEGIES]
    fitting = [c for c in found if memory_cap is None or c.memory <= memory_cap]
    if fitting:
        return sorted(fitting, key=lambda c: (float(f"{c.step_s:.6g}"), c.memory))
    assert memory_cap is not None
    least = min(found, key=lambda c: c.memory)
    ranks = min(_ranks_that_fit(name, layout, work, memory_cap) for name in STRATEGIES)
    more = "more units, each of which is gathered alone," if math.isinf(ranks) else f"{ranks:.0f} ranks"
    least_gb, missing_gb = least.memory / 1e9, (least.memory - memory_cap) / 1e9
    raise ValueError(
        f"no strategy fits into {memory_cap / 1e9:.3g} GB a rank: {least.strategy} needs least, {least_gb:.3g} GB, "
        f"{missing_gb:.3g} GB too much, activations not counted. {more} would do, or fewer trainable "
        "parameters"
    )


def _ranks_that_fit(name: str, layout: NodeLayout, work: Workload, memory_cap: float) -> float:
    """Return how many ranks a strategy needs, inf where no number suffices."""
    strategy = ShardingStrategy.parse(name)
    held = memory_bytes(strategy, layout, work.params, work.trainable, work.sizes)
    shrinking = sum(part for part, scope in zip(held.values(), name, strict=True) if scope == "G")
    room = memory_cap - (sum(held.values()) - shrinking) - passing_bytes(strategy, work)
    return math.ceil(shrinking * layout.world_size / room) if room > 0 else math.inf


def choose(fitting: Sequence[StepCost]) -> StepCost:
    """Take one of those that are as fast as the fastest: the one that replicates most if memory is not short, which is
    where NNN fits, and otherwise the one that holds least. `fitting` is in the order of `advise`.
    """
    roomy = any(c.strategy == "NNN" for c in fitting)
    return (max if roomy else min)(equally_fast(fitting), key=lambda c: c.memory)


def equally_fast(fitting: Sequence[StepCost]) -> list[StepCost]:
    """Return those of `fitting` that are as fast as the first, within `TIE`."""
    return [c for c in fitting if c.step_s <= TIE * fitting[0].step_s]
