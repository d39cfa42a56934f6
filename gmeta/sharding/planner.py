"""`gmeta plan`: which strategy for dense parameters, gradients and optimizer state fits and trains fastest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from gmeta.config.cluster import PlanConfig
from gmeta.sharding.schedule import Links, StepCost, Workload, advise, choose, equally_fast, step_cost
from gmeta.sharding.strategy import STRATEGIES, ElementBytes, NodeLayout

SIZES = {"bf16": ElementBytes(), "fp32": ElementBytes(param=4, grad=4, state=8)}
"""Bytes of a parameter, a gradient and the optimizer state with AdamW; with bf16 master weights count as state."""


def read_links(path: str) -> Links:
    """Read what `gmeta doctor --network FILE` wrote. ValueError where the file holds something else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return Links(**{field.name: values[field.name] for field in fields(Links)})
    except OSError as error:
        raise ValueError(
            f"network {path} cannot be read ({error.strerror}): write it with gmeta doctor --network"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"network {path} holds no links ({error}): write it with gmeta doctor --network") from None


def build_advice(config: PlanConfig) -> list[StepCost]:
    """Return all strategies that fit, fastest first. ValueError where none does."""
    layout = NodeLayout(config.node_size, config.nodes)
    return advise(layout, _links(config), _workload(config), _cap(config), config.collectives)


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


def print_advice(config: PlanConfig, fitting: Sequence[StepCost]) -> None:
    """Print a table of all 14 strategies, and why the best one is the one to take."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    layout, links, work = NodeLayout(config.node_size, config.nodes), _links(config), _workload(config)
    every = [step_cost(name, layout, links, work, config.collectives) for name in STRATEGIES]
    names = {c.strategy for c in fitting}
    out = sorted((c for c in every if c.strategy not in names), key=lambda c: c.memory)
    table = Table(title=f"{config.params:.3g} parameters on {layout.num_nodes} nodes of {layout.node_size}")
    table.add_column("sharding")
    for header in ("GB a rank", "s a step", "busy between", "busy inside", "computing"):
        table.add_column(header, justify="right")
    for c in (*fitting, *out):
        numbers = (c.memory / 1e9, c.step_s, c.inter_s, c.intra_s, c.compute_s)
        table.add_row(c.strategy, *(f"{number:.3g}" for number in numbers), style="dim" if c in out else None)
    console.print(table)
    console.print(reason(config, fitting), highlight=False)


def reason(config: PlanConfig, fitting: Sequence[StepCost]) -> str:
    """Say in a sentence or two which strategy to take, and why."""
    best = choose(fitting)
    busiest, seconds = max(
        (("computing", best.compute_s), ("links between nodes", best.inter_s), ("links inside nodes", best.intra_s)),
        key=lambda pair: pair[1],
    )
    if config.nodes * config.node_size == 1:
        return "one rank: nothing to share, every strategy is the same"
    told = [
        f"take {best.strategy}: {best.step_s:.3g} s a step, {busiest} busy for {seconds:.3g} s, "
        f"{best.memory / 1e9:.3g} GB a rank"
    ]
    if config.memory_gb is None:
        told.append("no limit was given (--memory_gb)")
    elif len(fitting) < len(STRATEGIES):
        out = [name for name in STRATEGIES if name not in {c.strategy for c in fitting}]
        told.append(f"what does not fit into {config.memory_gb:g} GB: {', '.join(out)}")
    if equal := [f"{c.strategy} ({c.memory / 1e9:.3g} GB)" for c in equally_fast(fitting) if c is not best]:
        told.append(f"as fast by the estimate: {', '.join(equal)}")
    return "; ".join(told)
