"""`sharding="auto"`: the planner's choice for a module, on the links that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gmeta.sharding.hierarchy import CollectiveAlgorithm, HierarchicalCollectives
from gmeta.sharding.links import measure_links
from gmeta.sharding.materialise import device_of
from gmeta.sharding.optimizers import state_bytes_of_element
from gmeta.sharding.schedule import Links, Workload, advise, choose
from gmeta.sharding.strategy import STRATEGIES, ElementBytes, ShardingStrategy, memory_bytes
from gmeta.sharding.units import OptimizerFactory, default_units, of_longest_prefix

AUTO = "auto"
REPLICATED = ShardingStrategy("N", "N", "N")
FREE_SHARE = 0.5
"""The fraction that is used of a CUDA device's free memory. The rest is for activations."""


@dataclass(frozen=True)
class AutoSharding:
    """What the planner cannot see in a module."""

    accumulation: int = 1  # micro-batches of an optimizer step
    micro_batch_s: float = 0.0  # seconds that a rank computes for one; 0 chooses by communication alone
    alltoall_bytes: float = 0.0  # of table rows that a rank asks for in a micro-batch, where they use the same links
    memory_bytes: float | None = None  # of a rank, for all but activations; None: see FREE_SHARE; no limit on CPU
    replicate: bool = False  # take NNN wherever it fits, even if others are as fast by the estimate
    links: Links | None = None  # None measures them, which takes seconds on slow links

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and not self.memory_bytes > 0:
            raise ValueError(f"memory_bytes is {self.memory_bytes}: must be more than 0")


def choose_strategies(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None,
    strategy: str | Mapping[str, str],
    auto: AutoSharding | None = None,
    *,
    units: Sequence[nn.Module] | None = None,
    compute_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    collectives: CollectiveAlgorithm = "two_phase",
    timeout_s: float = 300.0,
) -> dict[str, ShardingStrategy]:
    """Return the strategies by name of submodule. All that asked for `auto` get the same one. Collective.

    Only strategies that fit beside what is sharded by hand are considered. `schedule.choose` takes one of the fastest,
    the same on every rank. ValueError names an invalid strategy, or says that none fits and how
    much memory is missing.
    """
    asked = dict(strategy) if isinstance(strategy, Mapping) else {"": strategy}
    by_hand = {name: ShardingStrategy.parse(letters) for name, letters in asked.items() if letters != AUTO}
    if len(by_hand) == len(asked):
        return by_hand
    chosen = REPLICATED
    if mesh is not None and mesh.size() > 1:
        device = device_of(module, mesh)
        sizes = _bytes(module, optimizer_factory, compute_dtype, grad_dtype)
        hierarchy = HierarchicalCollectives.open(mesh, "backend", timeout_s, device)
        try:
            with hierarchy.naming_lost_peers():
                cap = _cap(auto or AutoSharding(), hierarchy, device)
                work, cap = _work(module, asked, auto or AutoSharding(), hierarchy, sizes, units, cap)
                chosen = _chosen(work, cap, auto or AutoSharding(), hierarchy, device, collectives)
        finally:
            hierarchy.close()
    return {name: by_hand.get(name, chosen) for name in asked}


def _work(
    module: nn.Module,
    asked: Mapping[str, str],
    auto: AutoSharding,
    hierarchy: HierarchicalCollectives,
    sizes: ElementBytes,
    units: Sequence[nn.Module] | None,
    cap: float | None,
) -> tuple[Workload, float | None]:
    """Return what the planner has to shard, and how many of the `cap` bytes a rank has for it."""
    params = trainable = 0
    for name, param in module.named_parameters():
        letters = of_longest_prefix(name, asked) or str(REPLICATED)
        trained = param.numel() if param.requires_grad else 0
        if cap is not None and not trained and sizes.param < param.itemsize:  # frozen master weights, at scope G
            cap -= param.nbytes / hierarchy.layout.world_size
        if letters == AUTO:
            params, trainable = params + param.numel(), trainable + trained
        elif cap is not None:
            held = memory_bytes(ShardingStrategy.parse(letters), hierarchy.layout, param.numel(), trained, sizes)
            cap -= sum(held.values())
    if cap is not None and cap <= 0:
        raise ValueError(
            f"what is sharded by hand takes {-cap / 1e9:.3g} GB a rank more than there is: give it less, or shard "
            "it more finely"
        )
    number = max(1, len(list(default_units(module) if units is None else units)))
    step = auto.accumulation, auto.micro_batch_s, number, sizes, auto.alltoall_bytes
    return Workload(max(1, params), trainable, *step), cap


def _chosen(
    work: Workload,
    cap: float | None,
    auto: AutoSharding,
    hierarchy: HierarchicalCollectives,
    device: torch.device,
    collectives: CollectiveAlgorithm,
) -> ShardingStrategy:
    replicated = memory_bytes(REPLICATED, hierarchy.layout, work.params, work.trainable, work.sizes)
    if auto.replicate and (cap is None or sum(replicated.values()) <= cap):
        return REPLICATED
    links = auto.links or measure_links(hierarchy, device)
    algorithm = "flat" if collectives == "backend" else collectives
    name = choose(advise(hierarchy.layout, links, work, cap, algorithm)).strategy
    agreed = torch.tensor(STRATEGIES.index(name), device=device)  # ranks may have been told different things
    dist.broadcast(agreed, src=hierarchy.rings.world.ranks[0], group=hierarchy.world)
    return ShardingStrategy.parse(STRATEGIES[int(agreed)])


def _cap(auto: AutoSharding, hierarchy: HierarchicalCollectives, device: torch.device) -> float | None:
    """Return the bytes that the rank with the least memory may hold; None where there is no limit."""
    cap = math.inf if auto.memory_bytes is None else auto.memory_bytes
    if auto.memory_bytes is None and device.type == "cuda":
        cap = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
    least = torch.tensor(cap, dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=hierarchy.world)
    return None if math.isinf(float(least)) else float(least)


def _bytes(
    module: nn.Module,
    factory: OptimizerFactory,
    compute_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
) -> ElementBytes:
    """Return the bytes of one element of a parameter, its gradient and its state."""
    like = next(module.parameters())
    state = state_bytes_of_element(module, factory, device_of(module, None))
    compute = compute_dtype or like.dtype
    master = like.dtype.itemsize if compute != like.dtype else 0
    return ElementBytes(compute.itemsize, (grad_dtype or compute).itemsize, state + master)
