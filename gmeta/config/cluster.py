"""Settings of the commands about machines: `doctor`, `coordinate`, `plan`, `simulate` and `lab`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from gmeta.core.errors import require


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine: versions, devices, a two-process collective self-test, memory and disk."""

    timeout_s: int = 60
    """Seconds given to the self-test."""
    network: str | None = None
    """Instead of checking: measure the links between processes, started with --nproc or torchrun, and write them to
    this file (JSON), for `gmeta plan`."""
    node_size: int = 0
    """Ranks of a node, which are joined by fast links; 0: those of one machine."""

    def __post_init__(self) -> None:
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be at least 1")
        require(self.node_size >= 0, "node_size", self.node_size, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class CoordinateConfig:
    """Serve one job's work items, and balance its workers; restarted on the same journal it goes on where it was."""

    journal: str
    """File that records what was given out and done (SQLite), one for each job. It is created where there is none."""
    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines reach needs a token."""
    port: int = 0
    """Port to listen on; 0 takes a free one. It is printed as `listening on http://...`."""
    token_file: str | None = None
    """File with the secret that every request must name; it is created where there is none."""
    policy: str = "nd"
    """Who decides on stragglers: a policy by name, or your own as module:function."""
    durable: bool = False
    """Wait for the disk at each write. The journal then survives the loss of power too, at a fraction of the speed."""
    trace: str | None = None
    """File to which reports and decisions are appended, one JSON object a line."""
    max_restarts: int = 2
    """Slow workers that may be restarted in a run."""
    cooldown_s: float = 300.0
    """Seconds between two such restarts."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "must be in [0, 65535]")
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "must not be negative")
        finite = 0 <= self.cooldown_s < math.inf
        require(finite, "cooldown_s", self.cooldown_s, "must be a finite number that is not negative")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say which sharding of dense parameters, gradients and optimizer state fits and trains fastest (PaRO)."""

    params: float
    """Parameters of the dense model, such as 7e9."""
    trainable_share: float = 1.0
    """Fraction of them that is trained."""
    node_size: int = 8
    """Ranks of a node, joined by fast links: the GPUs of a machine."""
    nodes: int = 1
    """The number of nodes."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    micro_batch_s: float = 0.0
    """Seconds that a rank computes for a micro-batch, forward and backward; 0 looks at communication alone."""
    units: int = 32
    """Parts of the model that are gathered one at a time: its layers."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 has parameters and gradients in bf16, master weights and AdamW's moments in fp32."""
    alltoall_mb: float = 0.0
    """MB of embedding rows that a rank asks for in a micro-batch, over the same links; as much goes back as gradients.
    """
    memory_gb: float | None = None
    """GB of a rank that parameters, gradients and optimizer state may take."""
    network: str | None = None
    """File that `gmeta doctor --network FILE` has measured; it replaces the following settings."""
    inter_gbit_s: float = 100.0
    """Gbit/s of a link between nodes."""
    intra_gbit_s: float = 2000.0
    """Gbit/s of a rank's link inside its node."""
    inter_us: float = 20.0
    """Microseconds of a message between nodes."""
    intra_us: float = 5.0
    """Microseconds of a message inside a node."""
    shared_nic: bool = False
    """Whether the ranks of a node share one link to other nodes; otherwise each has its own."""
    collectives: Literal["flat", "two_phase", "ho"] = "two_phase"
    """How buffers are exchanged between all ranks."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, item.name, value, "must be a finite number")
        require(self.params >= 1, "params", self.params, "must be at least 1")
        require(0 <= self.trainable_share <= 1, "trainable_share", self.trainable_share, "must be in [0, 1]")
        for name in ("node_size", "nodes", "accumulation", "units"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.units <= self.params, "units", self.units, f"must be at most params, which is {self.params:g}")
        for name in ("inter_gbit_s", "intra_gbit_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be more than 0")
        for name in ("micro_batch_s", "alltoall_mb", "inter_us", "intra_us"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.memory_gb is None or self.memory_gb > 0, "memory_gb", self.memory_gb, "must be more than 0")


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Compare policies against stragglers on a virtual clock, with a scenario's workers or with those of a trace."""

    scenario: str | None = None
    """Scenario file: who is slow and when; the end of this help has an example with every key."""
    trace_in: str | None = None
    """Instead of a scenario: trace of a training job, whose workers' speeds over time are taken."""
    workers: int | None = None
    """Number of workers, if not that of the file: batch, devices and slow workers are repeated in proportion."""
    policies: list[str] = field(default_factory=lambda: ["static", "lb_bsp", "backup", "nd"])
    """Policies by name (static, nd, dd, lb_bsp, backup), or your own as module:function."""
    out: str | None = None
    """File for the trace of the simulated job; with several policies their names come before its suffix."""

    def __post_init__(self) -> None:
        one = (self.scenario is None) != (self.trace_in is None)
        require(one, "scenario", self.scenario, "give either a scenario or trace_in")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1")
        require(bool(self.policies), "policies", self.policies, "name at least one")


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Run a scenario of slow workers and faults on this machine, by real training on emulated devices."""

    scenario: str
    """YAML file that says who is slow, and what is killed, stopped or cut off, when; the end of this help
    has an example with every key."""
    out: str
    """Folder to create: the run, what was done to it, result.json and report.html."""
    policy: str = "nd"
    """Who decides on stragglers: nd, dd, lb_bsp, backup, static, or your own as module:function."""
    workers: int = 0
    """Number of workers; 0 takes the scenario's. Batch, devices and slow ranks grow in proportion."""
    steps: int = 0
    """Number of steps; 0 takes the scenario's."""
    compare: bool = False
    """Whether to train undisturbed as well, and compare the weights."""
    max_restarts: int = 2
    """Slow workers that the policy may replace."""

    def __post_init__(self) -> None:
        for key in ("workers", "steps", "max_restarts"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}: must not be negative")
