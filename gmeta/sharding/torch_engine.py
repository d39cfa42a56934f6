"""torch's own FSDP2 behind the interface of `Paro`, for the strategies that it has: III (as HSDP) and GGG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gmeta.sharding.checkpoint import buffer_tensors, create_optimizer_state
from gmeta.sharding.muon import Muon
from gmeta.sharding.optimizers import group_numbers, read_groups, write_groups
from gmeta.sharding.ring import RankTraffic, Ring
from gmeta.sharding.units import OptimizerFactory, StepResult, broadcast_module, clipped_scale, default_units


class TorchEngine:
    """An engine that trains and saves as `Paro` does, whose checkpoints it shares.

    It averages gradients. Parameters that are in no unit belong to the root.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer_factory: OptimizerFactory,
        mesh: DeviceMesh,
        strategy: str,
        units: Sequence[nn.Module] | None,
        compute_dtype: torch.dtype | None,
        grad_dtype: torch.dtype | None,
    ) -> None:
        if strategy not in ("III", "GGG"):
            raise ValueError(
                f"backend torch has no {strategy}: it shards III (HSDP) and GGG (FSDP2); for NNN take "
                "DistributedDataParallel itself"
            )
        kinds = {param.device.type for param in module.parameters()}
        if "meta" in kinds:
            raise ValueError("backend torch takes no model on the meta device: allocate it, or take backend gmeta")
        if kinds != {mesh.device_type}:
            raise ValueError(
                f"the mesh is of {mesh.device_type} devices, the module on {', '.join(sorted(kinds))}: make it with "
                "node_mesh(size, device_type)"
            )
        self.module, self._late = module, strategy == "III"
        everyone = tuple(mesh.mesh.flatten().tolist())
        broadcast_module(module, Ring(everyone, 0, None, (), RankTraffic()))
        if strategy == "GGG":
            mesh = DeviceMesh(mesh.device_type, mesh.mesh.flatten(), mesh_dim_names=("all",))
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=grad_dtype)
        for unit in default_units(module) if units is None else units:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        self._parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.optimizer = optimizer_factory(self._named)
        if isinstance(self.optimizer, Muon):
            raise ValueError("backend torch shards matrices by rows, of which Muon sees too few: take backend gmeta")
        self._group_numbers = group_numbers(self.optimizer)
        self._groups: dict[str, Tensor] = {}
        self._first = dist.get_rank() == everyone[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool = True, others: Sequence[TorchEngine] = ()) -> None:
        """Run `loss.backward()` for a micro-batch, also where it comes from `others` too, see `Paro.backward`. III sums
        gradients between nodes in the last micro-batch only.
        """
        for engine in (self, *others):
            for part in engine._parts if engine._late else ():
                part.set_requires_all_reduce(last)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, clip_norm: float | None = None, grad_scale: float = 1.0) -> StepResult:
        """Update the parameters, see `Paro.step`."""
        gradients = [p.grad for _, p in self._named if p.grad is not None]
        total: Any = nn.utils.get_total_norm(gradients)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total) * grad_scale
        finite = math.isfinite(norm)
        if finite:
            scale = clipped_scale(norm, clip_norm, grad_scale)
            if scale != 1.0:
                for gradient in gradients:
                    gradient.mul_(scale)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(norm, finite)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Keep all parameters unsharded inside the block."""
        for part in self._parts:
            part.unshard()
        try:
            yield
        finally:
            for part in self._parts:
                part.reshard()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save and load; see `Paro.state`."""
        create_optimizer_state(self.optimizer)
        found: dict[str, Tensor] = {name: p.detach() for name, p in self.module.named_parameters()}
        for name, p in self._named:
            for key, value in self.optimizer.state[p].items():
                found[f"optimizer.{name}.{key}"] = value if value.ndim else value.view(1)
        self._groups = read_groups(self.optimizer, self._group_numbers)
        return {**found, **buffer_tensors(self.module, self._first), **self._groups}

    def loaded(self) -> None:
        """Take over what was loaded into the latest `state()`."""
        if self._groups:
            write_groups(self.optimizer, self._group_numbers, self._groups)

    def close(self) -> None:
        """Do nothing: parameters stay sharded."""
