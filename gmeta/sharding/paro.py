"""PaRO (arXiv 2310.06003): parameters, gradients and optimizer state, each sharded as far as memory needs.

mesh = node_mesh(8)                                     # 8 ranks of a node have fast links
engine = paro(model, partial(torch.optim.AdamW, lr=1e-3), mesh, sharding="IIG")
for micro_batches in loader:
    for k, batch in enumerate(micro_batches):
        engine.backward(loss(engine(batch)) / len(micro_batches), last=k == len(micro_batches) - 1)
    engine.step(clip_norm=1.0)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, overload

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gmeta.sharding.auto import AutoSharding, choose_strategies
from gmeta.sharding.engine import Paro
from gmeta.sharding.flat_parameters import CommStreams, FlatParameter
from gmeta.sharding.hierarchy import CollectiveAlgorithm, HierarchicalCollectives
from gmeta.sharding.materialise import Init, device_of, materialiser, require_shardable
from gmeta.sharding.optimizers import require_element_wise
from gmeta.sharding.order import GatherCheck
from gmeta.sharding.strategy import ShardingStrategy
from gmeta.sharding.streams import CommStream
from gmeta.sharding.torch_engine import TorchEngine
from gmeta.sharding.units import OptimizerFactory, broadcast_module, make_units


@overload
def paro(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None = ...,
    sharding: str | Mapping[str, str] = ...,
    *,
    units: Sequence[nn.Module] | None = ...,
    compute_dtype: torch.dtype | None = ...,
    grad_dtype: torch.dtype | None = ...,
    collectives: CollectiveAlgorithm = ...,
    average: bool = ...,
    timeout_s: float = ...,
    auto: AutoSharding | None = ...,
    backend: Literal["gmeta"] = ...,
    init: Init | None = ...,
    placement: str | Mapping[str, str] | None = ...,
) -> Paro: ...


@overload
def paro(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None,
    sharding: str,
    *,
    units: Sequence[nn.Module] | None = ...,
    compute_dtype: torch.dtype | None = ...,
    grad_dtype: torch.dtype | None = ...,
    backend: Literal["torch"],
    placement: str | None = ...,
) -> TorchEngine: ...


def paro(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None = None,
    sharding: str | Mapping[str, str] = "IIG",
    *,
    units: Sequence[nn.Module] | None = None,
    compute_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    collectives: CollectiveAlgorithm = "two_phase",
    average: bool = True,
    timeout_s: float = 300.0,
    auto: AutoSharding | None = None,
    backend: Literal["gmeta", "torch"] = "gmeta",
    init: Init | None = None,
    placement: str | Mapping[str, str] | None = None,
) -> Paro | TorchEngine:
    """Shard `module`'s training state over `mesh` and return the engine that trains it. Collective.

    mesh: has two dimensions, (nodes, ranks of a node), see `node_mesh`; None stands for this process alone.
    sharding: is three letters for all parameters, or a strategy by name of submodule, of which the longest prefix wins:
        {"": "NNN", "text": "IIG"}. With "auto" instead of letters the planner chooses; `auto` tells it what it cannot
        see by itself.
    units: are the submodules that are gathered one at a time; by default the items of every ModuleList and Sequential.
    compute_dtype: is the dtype of gathered parameters and floating inputs, while master weights keep the module's own;
        None computes in the module's own.
    grad_dtype: is the dtype in which gradients are summed; by default that of computing.
    average: divides gradients by the number of ranks, as DistributedDataParallel does.
    backend: torch has FSDP2 do the work behind the same methods; it has III and GGG, and averages.
    init: fills one submodule of a model on the meta device, in the order of `module.modules()`; by default its own
        `reset_parameters` does. Units are allocated one at a time, on the mesh's devices, and sharded at once.
    placement: is the former name of `sharding`.

    Rank 0's parameters and buffers go to all ranks. A parameter whose requires_grad is off costs no gradient and no
    state, and cannot be trained later; one whose flag is turned off later stays as it is. ValueError names an invalid
    strategy, a parameter that is in two units, or an optimizer that is not element-wise.
    """
    sharding = _renamed(sharding, placement)
    if backend not in ("gmeta", "torch"):
        raise ValueError(f"backend is {backend!r}: must be gmeta or torch")
    if backend == "torch":
        if mesh is None or not isinstance(sharding, str) or not average or init is not None:
            raise ValueError("backend torch takes a mesh, one strategy for all and no init, and averages gradients")
        return TorchEngine(module, optimizer_factory, mesh, sharding, units, compute_dtype, grad_dtype)
    device = device_of(module, mesh)
    require_shardable(module, device, init)
    require_element_wise(module, optimizer_factory, device)
    choose = partial(choose_strategies, compute_dtype=compute_dtype, grad_dtype=grad_dtype, timeout_s=timeout_s)
    strategies = choose(module, optimizer_factory, mesh, sharding, auto, units=units, collectives=collectives)
    dtypes = compute_dtype, grad_dtype
    return _open(module, optimizer_factory, mesh, strategies, units, *dtypes, collectives, average, timeout_s, init)


def _open(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None,
    strategies: Mapping[str, ShardingStrategy],
    units: Sequence[nn.Module] | None,
    compute_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
    collectives: CollectiveAlgorithm,
    average: bool,
    timeout_s: float,
    init: Init | None,
) -> Paro:
    """Open the process groups and streams, and make the engine. Collective."""
    device = device_of(module, mesh)
    opened = [HierarchicalCollectives.open(mesh, collectives, timeout_s, device) for _ in range(2)]
    streams = CommStreams(CommStream(device, "params"), CommStream(device, "grads"), opened[0], opened[1])
    if any(strategy.params != "N" for strategy in strategies.values()):
        streams = replace(streams, gathers=_open_check(mesh, timeout_s))
    settings = partial(
        FlatParameter, streams=streams, compute_dtype=compute_dtype, grad_dtype=grad_dtype, average=average
    )
    try:
        with opened[0].naming_lost_peers():
            broadcast_module(module, opened[0].rings.world)
            fill = materialiser(module, device, init, opened[0].rings.world)
            found = make_units(module, units, strategies, settings, fill)
        return Paro(module, found, optimizer_factory, streams, compute_dtype)
    except ValueError:
        streams.close()
        raise


def _open_check(mesh: DeviceMesh | None, timeout_s: float) -> GatherCheck | None:
    """Open the comparison of what ranks gather; None for one rank. Collective."""
    if mesh is None or mesh.size() == 1:
        return None
    cpu = torch.device("cpu")
    return GatherCheck(CommStream(cpu, "order"), HierarchicalCollectives.open(mesh, "two_phase", timeout_s, cpu))


def _renamed(sharding: str | Mapping[str, str], placement: str | Mapping[str, str] | None) -> str | Mapping[str, str]:
    """Return the strategy that `paro` was told under its present name, or under the name that it had before."""
    if placement is None:
        return sharding
    if sharding != "IIG":
        raise ValueError(f"paro got sharding={sharding!r} and placement={placement!r}: give sharding alone")
    warnings.warn("paro: the argument placement is called sharding now", FutureWarning, stacklevel=3)
    return placement
