"""The dense layers' gradients and updates: replicated on all ranks, or sharded as `dense.sharding` says.

Both do the same in a training step: `begin`, `unsharded` around forward and backward passes, `backward` for each
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
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import Sum, Traffic, add_sum
from gmeta.sharding.auto import AUTO, AutoSharding, choose_strategies
from gmeta.sharding.engine import Paro
from gmeta.sharding.hierarchy import node_mesh
from gmeta.sharding.paro import paro
from gmeta.sharding.ring import RankTraffic


class ReplicatedDense:
    """Sharding NNN: gradients are summed by bucketed AllReduce, every rank makes every update."""

    def __init__(self, module: nn.Module, optimizer: partial[torch.optim.AdamW], mesh: Mesh, how: Sum, overlap: bool):
        self._module, self._mesh, self._how = module, mesh, how
        self.optimizer = optimizer([(name, p) for name, p in module.named_parameters() if p.requires_grad])
        self._buckets = GradientBuckets(list(module.parameters()), mesh, how=how, overlap=overlap)

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(p.numel() for p in self._module.parameters())

    def begin(self, several: bool) -> None:
        """A step; `several`: more than one micro-batch, on some rank."""
        self._buckets.several = several

    def unsharded(self) -> AbstractContextManager[None]:
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

    def predict(self, traffic: Traffic) -> None:
        """What `finish` counts, by the formulas."""
        for size in self._buckets.bucket_bytes:
            add_sum(traffic, self._how, size, self._mesh.world_size)

    def square_sum(self) -> Tensor:
        """Of all numbers of the whole gradient, float64 []; the same on every rank."""
        return square_sum([p.grad for p in self._module.parameters() if p.grad is not None], self._mesh)

    def step(self, *, lr_scale: float, grad_scale: Tensor | None, ok: Tensor | None) -> None:
        """See `dense_step`."""
        dense_step(self.optimizer, lr_scale=lr_scale, grad_scale=grad_scale, ok=ok)

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
    """Any other sharding, by PaRO's engine. Parameters are whole during a step: a meta step uses them as tensors."""

    def __init__(self, engine: Paro) -> None:
        self._engine = engine
        self._several = False
        self._counted = RankTraffic()  # what was sent until the last step's end
        self._gathers = self._counted_gathers = 0

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters, on all ranks together."""
        return self._engine.num_parameters

    def begin(self, several: bool) -> None:
        """Ranks may have different numbers of micro-batches: then gradients are reduced once, after all of them."""
        self._several = self._engine.deferred = several

    def unsharded(self) -> AbstractContextManager[None]:
        """All parameters can be used."""
        self._gathers += 1
        return self._engine.unsharded()

    def backward(self, loss: Tensor) -> None:
        """Of a micro-batch."""
        self._engine.backward(loss)

    def flush(self) -> None:
        """Start what of the reductions was not started yet."""
        if self._several:
            self._engine.collect()

    def finish(self, traffic: Traffic | None = None) -> None:
        """Wait for the reductions; count what was sent since the last step's, its updated parameters among it."""
        sent = self._engine.sent
        if traffic is not None:
            self._add(traffic, sent.intra - self._counted.intra, sent.inter - self._counted.inter)
        self._counted, self._counted_gathers, self._gathers = sent, self._gathers, 0

    def predict(self, traffic: Traffic) -> None:
        """What `finish` counts, by the formulas (`strategy.sent_bytes`)."""
        sent, size = self._engine.predicted_sent(gathers=self._counted_gathers), self._engine.layout.node_size
        self._add(traffic, sent.intra / size, sent.inter / size)

    def _add(self, traffic: Traffic, intra: float, inter: float) -> None:
        """As one call; all as if to the next rank of the group, and to the same place of the next group."""
        layout, rank = self._engine.layout, traffic.rank
        if layout.world_size == 1:
            return
        first = rank - rank % layout.node_size
        traffic.add({first + (rank - first + 1) % layout.node_size: intra}, calls=0)
        traffic.add({(rank + layout.node_size) % layout.world_size: inter})

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
    sharding: str = "NNN",
    node_size: int = 0,
    memory_bytes: float | None = None,
    how: Sum = "all_reduce",
    overlap: bool = True,
) -> Dense:
    """AdamW over `module`'s parameters, placed as told; collective.

    With sharding auto it is NNN where it holds no more than `memory_bytes` a rank, otherwise what the planner takes.
    ValueError: see `paro`.
    """
    optimizer = partial(adamw, decayed=decayed_names(module), lr=lr, inner_lr_lr=inner_lr_lr, weight_decay=weight_decay)
    ranks = None
    if sharding != "NNN" and mesh.world_size > 1:
        ranks = node_mesh(node_size or mesh.local_world_size, mesh.device.type)
    if sharding == AUTO:
        auto = AutoSharding(memory_bytes=memory_bytes, replicate=True)  # its AllReduce goes in buckets of many layers
        sharding = str(choose_strategies(module, optimizer, ranks, AUTO, auto, timeout_s=mesh.timeout_s)[""])
    if sharding == "NNN":
        return ReplicatedDense(module, optimizer, mesh, how, overlap)
    return ShardedDense(paro(module, optimizer, ranks, sharding, average=False, timeout_s=mesh.timeout_s))
