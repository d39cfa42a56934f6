"""The two forms of `Dense`: replicated on all ranks, or sharded as `dense.sharding` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from gmeta.optim.dense import Dense, OuterReduce, adamw, decayed_names, dense_step, first_state, set_rates, square_sum
from gmeta.parallel.collectives import GradientBuckets
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import Traffic
from gmeta.sharding.auto import AUTO, AutoSharding, choose_strategies
from gmeta.sharding.engine import Paro
from gmeta.sharding.hierarchy import node_mesh
from gmeta.sharding.paro import paro
from gmeta.sharding.ring import RankTraffic


class ReplicatedDense:
    """Every rank holds all parameters and makes every update (sharding NNN). `reduce` sums the gradients over ranks."""

    def __init__(
        self, module: nn.Module, optimizer: partial[torch.optim.AdamW], mesh: Mesh, reduce: OuterReduce
    ) -> None:
        self._module, self._mesh, self._reduce = module, mesh, reduce
        self.optimizer = optimizer([(name, p) for name, p in module.named_parameters() if p.requires_grad])

    @property
    def num_parameters(self) -> int:
        """Return the number of elements of all parameters."""
        return sum(p.numel() for p in self._module.parameters())

    @contextmanager
    def computing(self, several: bool) -> Iterator[None]:
        """Start sums over ranks during the backward pass, and the remaining ones when the context ends."""
        self._reduce.begin(several)
        yield
        self._reduce.flush()

    def unsharded(self) -> AbstractContextManager[None]:
        """Give a context that does nothing: the parameters are never sharded."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of one micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, traffic: Traffic | None = None) -> Tensor:
        """Wait for the sums, and return the sum of the gradient's squares, float64 []."""
        self._reduce.finish(traffic)
        return square_sum([p.grad for p in self._module.parameters() if p.grad is not None], self._mesh)

    def step(self, *, lr_scale: float, grad_scale: Tensor | None, ok: Tensor | None) -> None:
        """Update every parameter once; see `dense_step`."""
        dense_step(self.optimizer, lr_scale=lr_scale, grad_scale=grad_scale, ok=ok)

    def add_expected(self, traffic: Traffic) -> None:
        """Add to `traffic` what `reduce` counts, by the formulas."""
        self._reduce.add_expected(traffic)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters as `dense.NAME` and their moments as `optimizer.NAME.KEY`. A 0-dim tensor has shape
        [1].
        """
        found = {f"dense.{name}": p.detach().view(p.shape or (1,)) for name, p in self._module.named_parameters()}
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state.get(parameter) or first_state(self.optimizer, parameter)
            found |= {f"optimizer.{name}.{key}": v if v.dim() else v.view(1) for key, v in state.items()}
        return found

    def loaded(self) -> None:
        """Do nothing: `tensors` returns the live tensors."""

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._reduce.close()


class ShardedDense:
    """Dense layers under any other sharding, by PaRO's engine.

    Parameters are unsharded during a step, because the inner loop uses them as tensors again and again.
    """

    def __init__(self, engine: Paro) -> None:
        self._engine = engine
        self._counted = RankTraffic()  # what was sent until the last step's end
        self._gathers = self._counted_gathers = 0

    @property
    def num_parameters(self) -> int:
        """Return the number of elements of all parameters, on all ranks together."""
        return self._engine.num_parameters

    @contextmanager
    def computing(self, several: bool) -> Iterator[None]:
        """Reduce gradients during the backward pass, or once after all of `several` micro-batches.

        Ranks may have different numbers of micro-batches. With one reduction for each of them, the ranks would wait for
        each other forever.
        """
        self._engine.deferred = several
        with self.unsharded():
            yield
        if several:
            self._engine.collect()

    def unsharded(self) -> AbstractContextManager[None]:
        """Give a context in which all parameters are unsharded."""
        self._gathers += 1
        return self._engine.unsharded()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of one micro-batch."""
        self._engine.backward(loss)

    def reduce(self, traffic: Traffic | None = None) -> Tensor:
        """Wait for the reductions, and return the sum of the full gradient's squares, float64 [], the same on every
        rank.

        `traffic` counts what was sent since the reductions of the last step, including the updated parameters.
        """
        sent = self._engine.sent
        if traffic is not None:
            self._add(traffic, sent.intra - self._counted.intra, sent.inter - self._counted.inter)
        self._counted, self._counted_gathers, self._gathers = sent, self._gathers, 0
        return self._engine.square_sum()

    def add_expected(self, traffic: Traffic) -> None:
        """Add to `traffic` what `reduce` counts, by the formulas (`strategy.sent_bytes`)."""
        sent, size = self._engine.predicted_sent(gathers=self._counted_gathers), self._engine.layout.node_size
        self._add(traffic, sent.intra / size, sent.inter / size)

    def _add(self, traffic: Traffic, intra: float, inter: float) -> None:
        """Count one call that sends all to the next rank of the node, and to the same rank of the next node."""
        layout, rank = self._engine.layout, traffic.rank
        if layout.world_size == 1:
            return
        first = rank - rank % layout.node_size
        traffic.add({first + (rank - first + 1) % layout.node_size: intra}, calls=0)
        traffic.add({(rank + layout.node_size) % layout.world_size: inter})

    def step(self, *, lr_scale: float, grad_scale: Tensor | None, ok: Tensor | None) -> None:
        """Update every parameter once, unless `ok` is False."""
        set_rates(self._engine.optimizer, lr_scale)
        if ok is None or bool(ok):
            self._engine.update(1.0 if grad_scale is None else float(grad_scale))
        else:
            self._engine.forget_gradients()

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's partitions, under the names of `ReplicatedDense.tensors`."""
        tensors = self._engine.tensors()
        return {name if name.startswith("optimizer.") else f"dense.{name}": value for name, value in tensors.items()}

    def loaded(self) -> None:
        """Give all ranks the parameters that were loaded into `tensors`."""
        self._engine.loaded()

    def close(self) -> None:
        """Leave the module unsharded."""
        self._engine.close()


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
    alltoall_bytes: float = 0.0,
    outer_reduce: Callable[[Iterable[nn.Parameter], Mesh], OuterReduce] | None = None,
) -> Dense:
    """Return the dense layers of `module` with AdamW, sharded as `sharding` says; collective.

    With `sharding` auto, NNN is taken where it holds at most `memory_bytes` a rank, and otherwise what the planner
    chooses beside `alltoall_bytes` of table rows a batch. `outer_reduce` makes the sum of replicated gradients over
    ranks; the default is `GradientBuckets`. Raises ValueError where it is given for sharded layers, which reduce in
    their own way. For other errors see `paro`.
    """
    optimizer = partial(adamw, decayed=decayed_names(module), lr=lr, inner_lr_lr=inner_lr_lr, weight_decay=weight_decay)
    nodes = None
    if sharding != "NNN" and mesh.world_size > 1:
        nodes = node_mesh(node_size or mesh.local_world_size, mesh.device.type)
    if sharding == AUTO:
        # NNN's AllReduce goes in buckets of many layers, so it is taken wherever it fits
        auto = AutoSharding(memory_bytes=memory_bytes, replicate=True, alltoall_bytes=alltoall_bytes)
        sharding = str(choose_strategies(module, optimizer, nodes, AUTO, auto, timeout_s=mesh.timeout_s)[""])
    if sharding == "NNN":
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return ReplicatedDense(module, optimizer, mesh, (outer_reduce or GradientBuckets)(trained, mesh))
    if outer_reduce is not None:
        raise ValueError(
            f"an outer_reduce is given, and dense layers are sharded as {sharding}: it sums replicated gradients; use "
            "NNN with it, or leave it out"
        )
    return ShardedDense(paro(module, optimizer, nodes, sharding, average=False, timeout_s=mesh.timeout_s))
