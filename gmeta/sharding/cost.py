"""What a collective takes on links with latency and bandwidth (alpha-beta), by its algorithm. Pure.

PaRO's terms (arXiv 2310.06003) with what they leave out: latencies, groups that share one link, hierarchical rings.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gmeta.sharding.strategy import Bytes, Groups, Level, Placement


@dataclass(frozen=True)
class Links:
    """Of one rank. Bandwidths in bits a second, latencies in seconds a message."""

    inter_bits_s: float
    intra_bits_s: float
    inter_latency_s: float = 0.0
    intra_latency_s: float = 0.0
    shared_nic: bool = False  # all ranks of a group have one link to other groups together, otherwise each its own

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
    micro_batch_s: float = 0.0  # of computing: a third forward, two thirds backward
    units: int = 1  # gathered one at a time
    sizes: Bytes = field(default_factory=Bytes)
    alltoall_bytes: float = 0.0  # of embedding rows that a rank asks for in a micro-batch; their gradients go back

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
"""A collective's parts one after the other: (link, seconds that it is busy), links being inter and intra."""


def ring_s(bits: float, ranks: int, bits_s: float, latency_s: float) -> float:
    """An all-gather of `bits` in all, or a reduce-scatter, in a ring of links."""
    return (ranks - 1) * (latency_s + bits / (ranks * bits_s))


@dataclass(frozen=True)
class Wires:
    """Seconds of collectives on whole buffers of so many bits, with all ranks taking part at once."""

    groups: Groups
    links: Links
    algorithm: str = "two_phase"  # between all ranks: flat, two_phase or ho

    def between(self, bits: float, low: Level, high: Level) -> Phases:
        """From parts at the finer level `low` to the coarser `high`; a reduce-scatter the other way takes as long."""
        if low == high or not bits:
            return ()
        if low == "I":
            return self._row(bits)
        if high == "I":
            return self._column(bits)
        if self.groups.count == 1:
            return self._row(bits)
        if self.groups.size == 1 or self.algorithm == "two_phase":
            return (*self._column(bits), *self._row(bits))
        if self.algorithm == "flat":
            slowest = min(self.links.inter_bits_s, self.links.intra_bits_s)
            latency = max(self.links.inter_latency_s, self.links.intra_latency_s)
            return (("inter", ring_s(bits, self.groups.world_size, slowest, latency)),)
        m, ng, n = self.groups.size, self.groups.count, self.groups.world_size
        spread = (m - 1) * (self.links.intra_latency_s + bits / (n * self.links.intra_bits_s))
        outer = self.links.inter_latency_s + bits / (n * self._inter_bits_s)
        return (("inter", (ng - 1) * max(outer, spread)), ("intra", spread))

    def _row(self, bits: float) -> Phases:
        seconds = ring_s(bits, self.groups.size, self.links.intra_bits_s, self.links.intra_latency_s)
        return (("intra", seconds),) if self.groups.size > 1 else ()

    def _column(self, bits: float) -> Phases:
        part = bits / self.groups.size
        seconds = ring_s(part, self.groups.count, self._inter_bits_s, self.links.inter_latency_s)
        return (("inter", seconds),) if self.groups.count > 1 else ()

    @property
    def _inter_bits_s(self) -> float:
        return self.links.inter_bits_s / (self.groups.size if self.links.shared_nic else 1)

    def alltoall(self, bits: float) -> Phases:
        """Of so many bits that a rank gets from all ranks, itself included, in equal parts."""
        if not bits:
            return ()
        m, n, links = self.groups.size, self.groups.world_size, self.links
        phases = (
            ("inter", (n - m) / n, links.inter_latency_s, self._inter_bits_s),
            ("intra", (m - 1) / n, links.intra_latency_s, links.intra_bits_s),
        )
        return tuple((link, wait + bits * share / speed) for link, share, wait, speed in phases if share)

    def synchronised(self, bits: float, place: Placement) -> Phases:
        """Of gradients, once a step: summed over all ranks and cut down to the level of the optimizer's state."""
        if place.grads == place.state:
            return 2 * self.between(bits, "G", place.grads)
        if place.state == "I":
            return (*self.between(bits, "I", "N"), *2 * self.between(bits, "G", "I"))
        return self.between(bits, place.state, place.grads)
