"""`gmeta plan`: which placement of dense parameters, gradients and optimizer state trains fastest and fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from gmeta.config.cluster import PlanConfig
from gmeta.sharding.cost import Links, Workload
from gmeta.sharding.schedule import TIE, Cost, choose, cost, plan
from gmeta.sharding.strategy import PLACEMENTS, Bytes, Groups

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
