"""The dense layers' gradients and updates: replicated on all ranks, or sharded as `dense.placement` says.

Both do the same in a training step: `begin`, `whole` around forward and backward passes, `backward` for each
micro-batch, `flush` before any other collective, `finish`, and `step` once the norm of the whole gradient is known.
Gradients are sums over ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from gmeta.optim.dense import adamw, decayed_names, dense_step, first_state, set_rates, square_sum
from gmeta.parallel.collectives import GradientBuckets
from gmeta.parallel.levels import Collectives, group_mesh
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.paro import paro
from gmeta.parallel.traffic import Sum, Traffic


class ReplicatedDense:
    """Placement NNN: gradients are summed by bucketed AllReduce, every rank makes every update."""

    def __init__(self, module: nn.Module, optimizer: partial[torch.optim.AdamW], mesh: Mesh, how: Sum, overlap: bool):
        self._module, self._mesh = module, mesh
        self.optimizer = optimizer([(name, p) for name, p in module.named_parameters() if p.requires_grad])
        self._buckets = GradientBuckets(list(module.parameters()), mesh, how=how, overlap=overlap)

    def begin(self, several: bool) -> None:
        """A step; `several`: more than one micro-batch, on some rank."""
        self._buckets.several = several

    def whole(self) -> AbstractContextManager[None]:
        """All parameters can be used."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Of a micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Start what of the sums over ranks was not started yet."""
        self._buckets.flush()

    def finish(self, traffic: Traffic | None = None) -> None:
        """Wait for the sums."""
        self._buckets.finish(traffic)

    def square_sum(self) -> Tensor:
        """Of all numbers of the whole gradient, float64 []; the same on every rank."""
        return square_sum([p.grad for p in self._module.parameters() if p.grad is not None], self._mesh)

    def step(self, *, lr_scale: float, grad_scale: Tensor | None, ok: Tensor | None) -> None:
        """See `dense_step`."""
        dense_step(self.optimizer, lr_scale=lr_scale, grad_scale=grad_scale, ok=ok)

    @property
    def bucket_bytes(self) -> list[int]:
        """Bytes of each AllReduce of a step."""
        return self._buckets.bucket_bytes

    def tensors(self) -> dict[str, Tensor]:
        """Parameters as `dense.NAME` and moments as `optimizer.NAME.KEY`; 0-dim tensors as [1]."""
        found = {f"dense.{name}": p.detach().view(p.shape or (1,)) for name, p in self._module.named_parameters()}
        for name, parameter in self._module.named_parameters():
            state = self.optimizer.state.get(parameter) or first_state(self.optimizer, parameter)
            found |= {f"optimizer.{name}.{key}": v if v.dim() else v.view(1) for key, v in state.items()}
        return found

    def loaded(self) -> None:
        """Nothing is left to do after `tensors` were loaded."""

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._buckets.close()


class ShardedDense:
    """Any other placement, by PaRO's engine. Parameters are whole during a step: a meta step uses them as tensors."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: partial[torch.optim.AdamW],
        mesh: Mesh,
        placement: str,
        group_size: int,
        collectives: Collectives,
    ) -> None:
        device = mesh.device.type
        groups = group_mesh(group_size or mesh.local_world_size, device) if mesh.world_size > 1 else None
        self._engine = paro(
            module,
            optimizer,
            groups,
            placement,
            collectives=collectives,
            average=False,
            timeout_s=mesh.timeout_s,
        )
        self._several = False

    def begin(self, several: bool) -> None:
        """Ranks may have different numbers of micro-batches: then gradients are reduced once, after all of them."""
        self._several = self._engine.deferred = several

    def whole(self) -> AbstractContextManager[None]:
        """All parameters can be used."""
        return self._engine.gathered()

    def backward(self, loss: Tensor) -> None:
        """Of a micro-batch."""
        self._engine.backward(loss)

    def flush(self) -> None:
        """Start what of the reductions was not started yet."""
        if self._several:
            self._engine.collect()

    def finish(self, traffic: Traffic | None = None) -> None:
        """Nothing: `square_sum` waits. Its bytes are not in `traffic`; see `Paro.sent`."""

    def square_sum(self) -> Tensor:
        """Of all numbers of the whole gradient, float64 []; the same on every rank."""
        return self._engine.square_sum()

    def step(self, *, lr_scale: float, grad_scale: Tensor | None, ok: Tensor | None) -> None:
        """One update of every parameter, unless `ok` is False."""
        set_rates(self._engine.optimizer, lr_scale)
        if ok is None or bool(ok):
            self._engine.update(1.0 if grad_scale is None else float(grad_scale))
        else:
            self._engine.forget_gradients()

    @property
    def bucket_bytes(self) -> list[int]:
        """None: nothing goes through buckets."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """This rank's parts, under the names of `ReplicatedDense.tensors`."""
        state = self._engine.state()
        return {name if name.startswith("optimizer.") else f"dense.{name}": value for name, value in state.items()}

    def loaded(self) -> None:
        """After `tensors` were loaded: everyone gets the parameters."""
        self._engine.loaded()

    def close(self) -> None:
        """Parameters are whole again."""
        self._engine.close()


Dense = ReplicatedDense | ShardedDense


def open_dense(
    module: nn.Module,
    mesh: Mesh,
    *,
    lr: float,
    inner_lr_lr: float,
    weight_decay: float,
    placement: str = "NNN",
    group_size: int = 0,
    collectives: Collectives = "two_phase",
    how: Sum = "all_reduce",
    overlap: bool = True,
) -> Dense:
    """AdamW over `module`'s parameters, placed as told; collective. ValueError: see `paro`."""
    optimizer = partial(adamw, decayed=decayed_names(module), lr=lr, inner_lr_lr=inner_lr_lr, weight_decay=weight_decay)
    if placement == "NNN":
        return ReplicatedDense(module, optimizer, mesh, how, overlap)
    return ShardedDense(module, optimizer, mesh, placement, group_size, collectives)
