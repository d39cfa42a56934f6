"""`placement="auto"`: the planner's choice for a module, on the links that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gmeta.sharding.cost import Links, Workload
from gmeta.sharding.hierarchy import Collectives, Levels
from gmeta.sharding.links import measure_links
from gmeta.sharding.schedule import choose, plan
from gmeta.sharding.strategy import PLACEMENTS, Bytes, Placement, memory_bytes
from gmeta.sharding.units import OptimizerFactory, items, placed

AUTO = "auto"
REPLICATED = Placement("N", "N", "N")
FREE_SHARE = 0.5
"""Of the memory that a CUDA device has free when it is chosen: the rest is for activations, and what is gathered."""


@dataclass(frozen=True)
class Auto:
    """What the planner cannot see in a module."""

    accumulation: int = 1  # micro-batches of an optimizer step
    micro_batch_s: float = 0.0  # that a rank computes for one; 0: choose by communication alone
    memory_bytes: float | None = None  # a rank's, for parameters, gradients and state; None: see FREE_SHARE; CPU: any
    replicate: bool = False  # NNN wherever it fits, also where others are as fast by the plan
    links: Links | None = None  # None: measured, which takes seconds on slow links

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and not self.memory_bytes > 0:
            raise ValueError(f"memory_bytes is {self.memory_bytes}: must be more than 0")


def resolve(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None,
    placement: str | Mapping[str, str],
    auto: Auto | None = None,
    *,
    units: Sequence[nn.Module] | None = None,
    compute_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    collectives: Collectives = "two_phase",
    timeout_s: float = 300.0,
) -> dict[str, Placement]:
    """Placements by name of submodule, with one and the same chosen wherever `auto` was asked for. Collective.

    Of the placements that fit beside what was placed by hand, the one that holds least of those as fast as the fastest;
    the same on every rank. ValueError: an invalid placement; none fits, and how much is missing.
    """
    asked = dict(placement) if isinstance(placement, Mapping) else {"": placement}
    by_hand = {name: Placement.parse(letters) for name, letters in asked.items() if letters != AUTO}
    if len(by_hand) == len(asked):
        return by_hand
    chosen = REPLICATED
    if mesh is not None and mesh.size() > 1:
        device = next(module.parameters()).device
        sizes = _bytes(module, optimizer_factory, compute_dtype, grad_dtype)
        levels = Levels.open(mesh, "backend", timeout_s, device)
        try:
            with levels.naming_lost_peers():
                work, cap = _work(module, asked, auto or Auto(), levels, sizes, units)
                chosen = _chosen(work, cap, auto or Auto(), levels, device, collectives)
        finally:
            levels.close()
    return {name: by_hand.get(name, chosen) for name in asked}


def _work(
    module: nn.Module,
    asked: Mapping[str, str],
    auto: Auto,
    levels: Levels,
    sizes: Bytes,
    units: Sequence[nn.Module] | None,
) -> tuple[Workload, float | None]:
    """What is to be placed, and how many bytes a rank has for it."""
    cap = _cap(auto, levels, next(module.parameters()).device)
    params = trainable = 0
    for name, param in module.named_parameters():
        letters, trained = placed(name, asked) or str(REPLICATED), param.numel() if param.requires_grad else 0
        if letters == AUTO:
            params, trainable = params + param.numel(), trainable + trained
        elif cap is not None:
            held = memory_bytes(Placement.parse(letters), levels.groups, param.numel(), trained, sizes)
            cap -= sum(held.values())
    if cap is not None and cap <= 0:
        raise ValueError(
            f"what is placed by hand takes {-cap / 1e9:.3g} GB a rank more than there is: give it less, or shard it "
            "more finely"
        )
    number = max(1, len(list(items(module) if units is None else units)))
    return Workload(max(1, params), trainable, auto.accumulation, auto.micro_batch_s, number, sizes), cap


def _chosen(
    work: Workload, cap: float | None, auto: Auto, levels: Levels, device: torch.device, collectives: Collectives
) -> Placement:
    whole = memory_bytes(REPLICATED, levels.groups, work.params, work.trainable, work.sizes)
    if auto.replicate and (cap is None or sum(whole.values()) <= cap):
        return REPLICATED
    links = auto.links or measure_links(levels, device)
    algorithm = "flat" if collectives == "backend" else collectives
    name = choose(plan(levels.groups, links, work, cap, algorithm)).placement
    agreed = torch.tensor(PLACEMENTS.index(name), device=device)  # ranks may have been told different things
    dist.broadcast(agreed, src=levels.rings.everyone.ranks[0], group=levels.world)
    return Placement.parse(PLACEMENTS[int(agreed)])


def _cap(auto: Auto, levels: Levels, device: torch.device) -> float | None:
    """Bytes that the rank with least may hold; None: no limit."""
    cap = math.inf if auto.memory_bytes is None else auto.memory_bytes
    if auto.memory_bytes is None and device.type == "cuda":
        cap = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
    least = torch.tensor(cap, dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=levels.world)
    return None if math.isinf(float(least)) else float(least)


def _bytes(
    module: nn.Module,
    factory: OptimizerFactory,
    compute_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
) -> Bytes:
    """Of one number of a parameter; the optimizer's are tried out on a small one."""
    name, like = next(iter(module.named_parameters()))
    trial = nn.Parameter(torch.zeros(64, dtype=like.dtype, device=like.device))
    optimizer = factory([(name, trial)])
    trial.grad = torch.zeros_like(trial)
    optimizer.step()
    state = sum(v.nbytes for v in optimizer.state[trial].values() if isinstance(v, Tensor) and v.ndim) // trial.numel()
    compute = compute_dtype or like.dtype
    master = like.dtype.itemsize if compute != like.dtype else 0
    return Bytes(compute.itemsize, (grad_dtype or compute).itemsize, state + master)
