"""`gmeta plan`: which placement of dense parameters, gradients and optimizer state trains fastest and fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from gmeta.config import require
from gmeta.parallel.cost import Links, Workload
from gmeta.parallel.placement import PLACEMENTS, Bytes, Groups
from gmeta.parallel.schedule import TIE, Cost, choose, cost, plan


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Which placement of dense parameters, gradients and optimizer state fits and trains fastest (PaRO)."""

    params: float
    """Parameters of the dense model, such as 7e9."""
    trainable_share: float = 1.0
    """Share of them that is trained."""
    group_size: int = 8
    """Ranks joined by fast links: the GPUs of a machine."""
    groups: int = 1
    """How many such groups."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    micro_batch_s: float = 0.0
    """Seconds that a rank computes for a micro-batch, forward and backward; 0: communication alone."""
    units: int = 32
    """Parts of the model that are gathered one at a time: its layers."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: parameters and gradients in bf16, master weights and AdamW's moments in fp32."""
    alltoall_mb: float = 0.0
    """MB of embedding rows that a rank asks for in a micro-batch (their gradients go back), over the same links."""
    memory_gb: float | None = None
    """GB a rank that parameters, gradients and optimizer state may take."""
    network: str | None = None
    """File that `gmeta doctor --network FILE` has measured; instead of the following."""
    inter_gbit_s: float = 100.0
    """Gbit/s of a link between groups."""
    intra_gbit_s: float = 2000.0
    """Gbit/s of a rank's link inside its group."""
    inter_us: float = 20.0
    """Microseconds of a message between groups."""
    intra_us: float = 5.0
    """Microseconds of a message inside a group."""
    shared_nic: bool = False
    """The ranks of a group share one link to other groups; otherwise each has its own."""
    collectives: Literal["flat", "two_phase", "ho"] = "two_phase"
    """How buffers are exchanged between all ranks."""

    def __post_init__(self) -> None:
        require(self.params >= 1, "params", self.params, "must be at least 1")
        require(0 <= self.trainable_share <= 1, "trainable_share", self.trainable_share, "must be in [0, 1]")
        for name in ("group_size", "groups", "accumulation", "units"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("inter_gbit_s", "intra_gbit_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be more than 0")
        for name in ("micro_batch_s", "alltoall_mb", "inter_us", "intra_us"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.memory_gb is None or self.memory_gb > 0, "memory_gb", self.memory_gb, "must be more than 0")


SIZES = {"bf16": Bytes(), "fp32": Bytes(param=4, grad=4, state=8)}
"""Bytes a parameter, gradient and optimizer state with AdamW; with bf16 master weights count as state."""


def read_links(path: str) -> Links:
    """What `gmeta doctor --network FILE` wrote. ValueError where it is something else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return Links(**{field.name: values[field.name] for field in fields(Links)})
    except OSError as error:
        raise ValueError(
            f"network {path} cannot be read ({error.strerror}): write it with gmeta doctor --network"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"network {path} holds no links ({error}): write it with gmeta doctor --network") from None


def make_plan(config: PlanConfig) -> list[Cost]:
    """All placements that fit, fastest first. ValueError where none does."""
    groups = Groups(config.group_size, config.groups)
    return plan(groups, _links(config), _workload(config), _cap(config), config.collectives)


def _links(config: PlanConfig) -> Links:
    if config.network is not None:
        return read_links(config.network)
    return Links(
        config.inter_gbit_s * 1e9,
        config.intra_gbit_s * 1e9,
        config.inter_us * 1e-6,
        config.intra_us * 1e-6,
        config.shared_nic,
    )


def _workload(config: PlanConfig) -> Workload:
    params = int(config.params)
    return Workload(
        params,
        int(params * config.trainable_share),
        config.accumulation,
        config.micro_batch_s,
        config.units,
        SIZES[config.precision],
        1e6 * config.alltoall_mb,
    )


def _cap(config: PlanConfig) -> float | None:
    return None if config.memory_gb is None else config.memory_gb * 1e9


def print_plan(config: PlanConfig, fitting: Sequence[Cost]) -> None:
    """A table of all 14, and why the first is the one to take."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    groups = Groups(config.group_size, config.groups)
    every = [cost(name, groups, _links(config), _workload(config), config.collectives) for name in PLACEMENTS]
    names = {c.placement for c in fitting}
    out = sorted((c for c in every if c.placement not in names), key=lambda c: c.memory)
    table = Table(title=f"{config.params:.3g} parameters on {groups.count} groups of {groups.size}")
    table.add_column("placement")
    for header in ("GB a rank", "s a step", "busy between", "busy inside", "computing"):
        table.add_column(header, justify="right")
    for c in (*fitting, *out):
        numbers = (c.memory / 1e9, c.step_s, c.inter_s, c.intra_s, c.compute_s)
        table.add_row(c.placement, *(f"{number:.3g}" for number in numbers), style="dim" if c in out else None)
    console.print(table)
    console.print(reason(config, fitting), highlight=False)


def reason(config: PlanConfig, fitting: Sequence[Cost]) -> str:
    """A sentence or two."""
    best = choose(fitting)
    busiest, seconds = max(
        (("computing", best.compute_s), ("links between groups", best.inter_s), ("links inside groups", best.intra_s)),
        key=lambda pair: pair[1],
    )
    told = [f"take {best.placement}: {best.step_s:.3g} s a step, {busiest} busy for {seconds:.3g} s"]
    if config.memory_gb is not None and len(fitting) < len(PLACEMENTS):
        out = [name for name in PLACEMENTS if name not in {c.placement for c in fitting}]
        told.append(f"what does not fit into {config.memory_gb:g} GB: {', '.join(out)}")
    if config.groups * config.group_size == 1:
        return "one rank: nothing to share, every placement is the same"
    equal = [c.placement for c in fitting if c.step_s <= TIE * fitting[0].step_s and c is not best]
    if equal:
        told.append(f"as fast, and larger: {', '.join(equal)}")
    return "; ".join(told)
