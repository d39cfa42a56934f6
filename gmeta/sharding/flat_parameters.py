"""The parameters of one unit side by side in one buffer, of which a rank keeps its partitions.

The buffers at the three scopes nest (see `HierarchicalCollectives`): `full` holds the unit, `params` is this rank's
partition at the scope of the parameters, `grads` that at the scope of the gradients, and `master` is what the optimizer
updates. Where dtypes agree, `master` is a view of `params`; at scope N `params` is `full`. Frozen parameters have
master weights too where they compute in fewer digits, at scope G, so that no digit is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gmeta.sharding.hierarchy import HierarchicalCollectives
from gmeta.sharding.order import GatherCheck
from gmeta.sharding.strategy import ShardingStrategy, ShardScope
from gmeta.sharding.streams import CommStream, Handle, StagingBuffers


@dataclass(frozen=True)
class ParameterSpan:
    """The position of a parameter in its buffer."""

    name: str  # in the whole module
    param: nn.Parameter
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True)
class Partition:
    """The part of a parameter that this rank's optimizer updates: elements `start` to `stop` of it, flattened."""

    name: str
    shape: torch.Size  # of the full parameter
    start: int
    stop: int
    tensor: nn.Parameter  # one-dimensional, a view of the master weights


@dataclass(frozen=True)
class CommStreams:
    """Where collectives run. Parameters and gradients are in flight at the same time, each on a stream of its own."""

    params: CommStream
    grads: CommStream
    params_collectives: HierarchicalCollectives
    grads_collectives: HierarchicalCollectives
    gathers: GatherCheck | None = None  # None where no rank gathers from another one just in time
    staging: StagingBuffers = field(default_factory=StagingBuffers)

    def close(self) -> None:
        """Wait for all jobs, end the threads and leave the process groups."""
        for stream, hierarchy in ((self.params, self.params_collectives), (self.grads, self.grads_collectives)):
            stream.submit(lambda: None).wait()
            stream.close()
            hierarchy.close()
        if self.gathers is not None:
            self.gathers.close()


class FlatParameter:
    """Parameters of one unit and one dtype, which are all trained or all frozen.

    Where parameters are sharded, `full` has storage only from `start_unshard` to `reshard`; the data of the parameters
    are views of it, and are empty otherwise. The storage object stays the same, so that what autograd saved in the
    forward pass is there again in the backward pass.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        strategy: ShardingStrategy,
        streams: CommStreams,
        compute_dtype: torch.dtype | None,
        grad_dtype: torch.dtype | None,
        average: bool,
    ) -> None:
        self.strategy, self.streams = strategy, streams
        self.trained = named[0][1].requires_grad
        hierarchy, layout = streams.params_collectives, streams.params_collectives.layout
        self.spans: list[ParameterSpan] = []
        at = 0
        for name, param in named:
            self.spans.append(ParameterSpan(name, param, param.shape, at, at + param.numel()))
            at += param.numel()
        self.size = -(-at // layout.world_size) * layout.world_size  # padded to equal partitions
        self._own_params = hierarchy.own(self.size, strategy.params)
        original = named[0][1].detach().new_zeros(self.size)
        for span in self.spans:
            original[span.start : span.stop].copy_(span.param.detach().reshape(-1))
        dtype = computing_dtype(original.dtype, compute_dtype)
        self.separate = dtype != original.dtype  # whether master weights are tensors of their own
        self.full = original.to(dtype)
        self._shown = self.full  # what the parameters are views of while they are unsharded
        self.params = self.full if strategy.params == "N" else self.full[self._own_params].clone()
        self.partitions: list[Partition] = []
        self.master: Tensor | None = None
        self._master_scope: ShardScope = strategy.state if self.trained else "G"
        if self.trained or self.separate:
            own = hierarchy.own(self.size, self._master_scope)
            within = self.params[hierarchy.own(self.size, self._master_scope, strategy.params)]
            self.master = original[own].clone() if self.separate else within
        if self.trained and self.master is not None:
            self.partitions = _partitions(self.spans, self.master, hierarchy.own(self.size, strategy.state))
        self.grad_dtype = grad_dtype or dtype
        self._divide_by = layout.world_size if average else 1
        self._grads: Tensor | None = None  # this rank's partition, kept from step to step
        self._begun = False  # whether `_grads` holds something of this step
        self._staging: Tensor | None = None  # the unit's gradients of one micro-batch
        self._arrived: set[str] = set()
        self.expected: set[str] = set()  # names that get a gradient in this backward pass
        self.used: set[str] = set()  # names that have got a gradient on this rank since the last step
        self.reduced = Handle()
        self._updated = Handle()
        self._unsharding: Handle | None = None
        self._number = -1 if streams.gathers is None else streams.gathers.register(named[0][0])
        self.is_unsharded = True
        self._empty = self.full.new_empty(0)  # made once: one made in inference mode could not be trained
        self._views()
        if strategy.params != "N":
            self.reshard()

    # Parameters

    def start_unshard(self, masters: bool = False) -> None:
        """Start to gather the parameters, unless they are there or are being gathered.

        With `masters` they come in the module's own dtype, and stay so until `reshard`.
        """
        if masters and self.separate and not self.shows_masters:
            self._start_masters()
        if self.is_unsharded or self._unsharding is not None:
            return
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())

        gathers = self.streams.gathers
        compared = None if gathers is None else gathers.start(self._number, self.strategy.params)

        def job() -> None:
            if compared is not None:
                compared.wait()
            self.full[self._own_params].copy_(self.params)
            self.streams.params_collectives.gather(raw(self.full), self.strategy.params, "N")

        self._unsharding = self.streams.params.submit(job)

    @property
    def shows_masters(self) -> bool:
        """Whether the parameters are gathered copies of master weights, in a dtype in which they do not compute."""
        return self._shown is not self.full

    def _start_masters(self) -> None:
        self.reshard()
        assert self.master is not None
        master, scope, hierarchy = self.master, self._master_scope, self.streams.params_collectives
        self._shown, self.is_unsharded = master.new_empty(self.size), False
        whole = self._shown

        def job() -> None:
            whole[hierarchy.own(self.size, scope)].copy_(master)
            hierarchy.gather(whole, scope, "N")

        self._unsharding = self.streams.params.submit(job)

    def wait_unshard(self) -> None:
        """Wait until the parameters are gathered, so that the module can compute."""
        self._updated.wait()
        if self.is_unsharded:
            return
        self.start_unshard()
        assert self._unsharding is not None
        self._unsharding.wait()
        self._unsharding = None
        self.is_unsharded = True
        self._views()

    def settle(self) -> None:
        """Wait for everything that was started."""
        self._updated.wait()
        self.reduced.wait()

    def reshard(self) -> None:
        """Free the gathered parameters; at scope N there is nothing to free but gathered master weights."""
        if self._unsharding is not None:
            self.wait_unshard()
        if self.shows_masters:
            self._shown = self.full
            if self.strategy.params == "N":
                self._views()
        if self.strategy.params == "N" or not self.is_unsharded:
            return
        self.is_unsharded = False
        for span in self.spans:
            span.param.data = self._empty
        self.full.untyped_storage().resize_(0)
        self._versions = [span.param._version for span in self.spans]

    def _views(self) -> None:
        for span in self.spans:
            span.param.data = self._shown[span.start : span.stop].view(span.shape)
        self._versions = [span.param._version for span in self.spans]

    def touched(self) -> str | None:
        """Return the name of a parameter that somebody changed or replaced since its data were put in place; None where
        nobody did.
        """
        for span, version in zip(self.spans, self._versions, strict=True):
            param = span.param
            at = self._shown.data_ptr() + span.start * self._shown.element_size() if self.is_unsharded else None
            same = param.data_ptr() == at and param.shape == span.shape if self.is_unsharded else param.numel() == 0
            if not (same or not (span.stop - span.start)) or param._version != version:
                return span.name
        return None

    def write_back(self) -> None:
        """Take over what was written into the gathered parameters, on all ranks alike."""
        for span in self.spans:  # somebody may have replaced the data altogether
            self._shown[span.start : span.stop].copy_(span.param.detach().reshape(-1))
        self._views()
        if self._shown is not self.params:
            self.params.copy_(self._shown[self._own_params])
        if self.separate and self.master is not None:
            self.master.copy_(self._shown[self.streams.params_collectives.own(self.size, self._master_scope)])

    def frozen_partitions(self) -> list[Partition]:
        """Return this rank's partitions of parameters that no optimizer updates."""
        hierarchy = self.streams.params_collectives
        if self.master is not None:
            return _partitions(self.spans, self.master, hierarchy.own(self.size, self._master_scope))
        return _partitions(self.spans, self.params, hierarchy.own(self.size, self.strategy.params))

    def publish(self) -> None:
        """Start to send master weights that have changed to all ranks that hold the parameters. This does not wait."""
        if self.master is None:
            return
        state, params, hierarchy = self._master_scope, self.strategy.params, self.streams.params_collectives
        master, own = self.master, self.params[hierarchy.own(self.size, state, params)]

        def job() -> None:
            if self.separate:
                own.copy_(master)
            hierarchy.gather(self.params, state, params)

        if self.separate or state != params:
            self._updated = self.streams.params.submit(job)

    # Gradients

    def expect(self, leaves: AbstractSet[Tensor] | None) -> None:
        """Wait in this backward pass for the gradients of `leaves`, or of all parameters where that is not known."""
        self.expected = {span.name for span in self.spans if leaves is None or span.param in leaves}

    @property
    def complete(self) -> bool:
        """Whether all gradients of this backward pass are there."""
        return self.expected <= self._arrived

    def receive(self, span: ParameterSpan) -> None:
        """Take a parameter's gradient of this backward pass."""
        grad = span.param.grad
        assert grad is not None
        if span.name in self._arrived:
            raise RuntimeError(
                f"{span.name} got a gradient twice in one backward pass, as by a reentrant checkpoint of a layer "
                "that is used twice: take checkpoint(..., use_reentrant=False)"
            )
        into = self._stage()[span.start : span.stop].view(span.shape)
        if self._adds:
            into.add_(grad)
        else:
            into.copy_(grad)
            if (
                self.strategy.grads != "N"
            ):  # before summing, so that fp16 does not overflow; N divides at the step's end
                into.mul_(1.0 / self._divide_by)
        span.param.grad = None
        self._arrived.add(span.name)
        self.used.add(span.name)

    @property
    def _adds(self) -> bool:
        """Whether gradients are added where they arrive, because they stay on this rank until the step ends."""
        return self.strategy.grads == "N" and self._begun

    def _stage(self) -> Tensor:
        if self._staging is None:
            if self.strategy.grads == "N":
                self._staging = self._kept()
            else:
                self.streams.staging.make_room()
                self._staging = self.full.new_empty(self.size, dtype=self.grad_dtype)
            self._staging[self.spans[-1].stop :].zero_()
        return self._staging

    def _kept(self) -> Tensor:
        if self._grads is None:
            parts = self.streams.grads_collectives.layout.num_partitions(self.strategy.grads)
            self._grads = self.full.new_empty(self.size // parts, dtype=self.grad_dtype)
        return self._grads

    def reduce(self, last: bool) -> None:
        """Start to reduce a micro-batch's gradients to their scope and, after the last micro-batch, to that of the
        state.

        A parameter without a gradient counts as zeros.
        """
        staging = self._stage()
        if not self._adds:
            for span in self.spans:
                if span.name not in self._arrived:
                    staging[span.start : span.stop].zero_()
        self._arrived.clear()
        self._staging = None
        first, self._begun = not self._begun, not last
        g, hierarchy, kept = self.strategy.grads, self.streams.grads_collectives, self._kept()
        own = hierarchy.own(self.size, g)

        def job() -> None:
            if g != "N":
                hierarchy.reduce_scatter(staging, "N", g)
                kept.copy_(staging[own]) if first else kept.add_(staging[own])
            if last:
                self._synchronise(kept)

        if g != "N" or last:
            self.reduced = self.streams.grads.submit(job)
        if g != "N":
            self.streams.staging.add(self.reduced, staging)

    def _synchronise(self, kept: Tensor) -> None:
        """Sum gradients over all ranks, from their own scope to that of the optimizer's state."""
        g, state, hierarchy = self.strategy.grads, self.strategy.state, self.streams.grads_collectives
        if g == "N":
            kept.mul_(1.0 / self._divide_by)
        if g == state:
            hierarchy.all_reduce(kept, g)
        elif (g, state) == ("N", "I"):
            hierarchy.reduce_scatter(kept, "N", "I")
            hierarchy.all_reduce(kept[hierarchy.own(self.size, "I")], "I")
        else:
            hierarchy.reduce_scatter(kept, g, state)

    def gradient(self) -> Tensor:
        """Return this rank's partition at the scope of the optimizer's state, once `reduced` was waited for."""
        hierarchy = self.streams.grads_collectives
        return self._kept()[hierarchy.own(self.size, self.strategy.state, self.strategy.grads)]

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of the gradients that are kept, from the first micro-batch on."""
        return 0 if self._grads is None else self._grads.nbytes

    @property
    def master_bytes(self) -> int:
        """Return the bytes of master weights that have a dtype of their own."""
        return 0 if self.master is None or not self.separate else self.master.nbytes

    def forget_gradients(self) -> None:
        """Drop the gradients of this step's micro-batches, once no sum of them is in flight."""
        self.reduced.wait()
        self._begun, self._staging = False, None
        self._arrived.clear()
        self.used.clear()


def _partitions(spans: Sequence[ParameterSpan], master: Tensor, own: slice) -> list[Partition]:
    found = []
    for span in spans:
        start, stop = max(span.start, own.start), min(span.stop, own.stop)
        if start < stop:
            part = master[start - own.start : stop - own.start]
            tensor = nn.Parameter(part, requires_grad=part.is_floating_point() or part.is_complex())
            found.append(Partition(span.name, span.shape, start - span.start, stop - span.start, tensor))
    return found


def require_whole(held: Sequence[tuple[FlatParameter, ParameterSpan]], *_: Any) -> None:
    """Wait for what updates parameters, so that they can be saved. RuntimeError names one that is not there whole.

    It is a hook: what follows `held` is ignored.
    """
    for flat, span in held:
        if not flat.is_unsharded or flat.shows_masters != flat.separate:
            kind = "a rounded copy" if flat.is_unsharded else "a part"
            raise RuntimeError(
                f"this rank holds {kind} of {span.name} only: call state_dict(), or what saves the module, inside "
                "`with engine.unsharded():`, or save engine.state() with torch.distributed.checkpoint"
            )
        flat.settle()


def computing_dtype(own: torch.dtype, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which parameters of dtype `own` compute; quantised ones keep theirs."""
    return own if compute_dtype is None or _is_quantised(own) else compute_dtype


def raw(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as backends can send it: as bytes, flattened, where it is quantised."""
    return tensor.view(-1).view(torch.uint8) if _is_quantised(tensor.dtype) else tensor


def _is_quantised(dtype: torch.dtype) -> bool:
    """Whether parameters of `dtype` are codes of numbers: integers, or floats of 8 bits."""
    return not dtype.is_floating_point or dtype.itemsize == 1
