"""Parameters of one unit side by side in one buffer, of which a rank keeps its parts.

Buffers at the three levels nest (`Levels`): `full` holds all of the unit, `params` this rank's part at the level of
the parameters, `grads` at that of the gradients, `master` what the optimizer updates. Where dtypes agree, `master`
is a view of `params`; at level N `params` is `full`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmeta.sharding.hierarchy import Levels
from gmeta.sharding.strategy import Placement
from gmeta.sharding.streams import Handle, Lane


@dataclass(frozen=True)
class Member:
    """A parameter's place in its buffer."""

    name: str  # in the whole module
    param: nn.Parameter
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that this rank's optimizer updates: numbers `start` to `stop` of it, flattened."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    stop: int
    tensor: nn.Parameter  # one-dimensional, a view of the master weights


@dataclass(frozen=True)
class Lanes:
    """Where collectives run: parameters and gradients are on their way at the same time, each in its own order."""

    params: Lane
    grads: Lane
    params_levels: Levels
    grads_levels: Levels

    def close(self) -> None:
        """Once all jobs are done: end the threads, leave the process groups."""
        for lane, levels in ((self.params, self.params_levels), (self.grads, self.grads_levels)):
            lane.submit(lambda: None).wait()
            lane.close()
            levels.close()


class Flat:
    """Parameters of one unit, of one dtype, all trained or all frozen.

    `full` has storage only from `fetch` to `free` where parameters are sharded; the parameters' own data are views of
    it, and empty otherwise. The storage object stays the same, so what autograd saved in the forward pass is there
    again in the backward pass.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, nn.Parameter]],
        placement: Placement,
        lanes: Lanes,
        compute_dtype: torch.dtype | None,
        grad_dtype: torch.dtype | None,
        average: bool,
    ) -> None:
        self.placement, self.lanes = placement, lanes
        self.trained = members[0][1].requires_grad
        self._separate = False  # whether master weights are tensors of their own
        levels, groups = lanes.params_levels, lanes.params_levels.groups
        self.members: list[Member] = []
        at = 0
        for name, param in members:
            self.members.append(Member(name, param, param.shape, at, at + param.numel()))
            at += param.numel()
        self.size = -(-at // groups.world_size) * groups.world_size  # padded to equal parts
        self._own_params = levels.own(self.size, placement.params)
        original = members[0][1].detach().new_zeros(self.size)
        for member in self.members:
            original[member.start : member.stop].copy_(member.param.detach().reshape(-1))
        dtype = compute_dtype or original.dtype
        self.full = original.to(dtype)
        self.params = self.full if placement.params == "N" else self.full[self._own_params].clone()
        self.pieces: list[Piece] = []
        self.master: Tensor | None = None
        if self.trained:
            self._separate = dtype != original.dtype
            own = levels.own(self.size, placement.state)
            within = self.params[levels.own(self.size, placement.state, placement.params)]
            self.master = original[own].clone() if self._separate else within
            self.pieces = _pieces(self.members, self.master, own)
        self.grad_dtype = grad_dtype or dtype
        self._divide_by = groups.world_size if average else 1
        self._grads: Tensor | None = None  # this rank's part at the level of gradients, kept from step to step
        self._begun = False  # whether it holds something of this step
        self._staging: Tensor | None = None  # all of the unit's gradients of one micro-batch
        self._arrived: set[str] = set()
        self.reduced = Handle()
        self._updated = Handle()
        self._fetching: Handle | None = None
        self.present = True
        self._empty = self.full.new_empty(0)  # one for all times: one made in inference mode could not be trained
        self._views()
        if placement.params != "N":
            self.free()

    # Parameters

    def fetch(self) -> None:
        """Start to gather the parameters; nothing where they are, or are on their way."""
        if self.present or self._fetching is not None:
            return
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())

        def job() -> None:
            self.full[self._own_params].copy_(self.params)
            self.lanes.params_levels.gather(self.full, self.placement.params, "N")

        self._fetching = self.lanes.params.submit(job)

    def arrive(self) -> None:
        """Wait for the parameters; the module can compute then."""
        self._updated.wait()
        if self.present:
            return
        self.fetch()
        assert self._fetching is not None
        self._fetching.wait()
        self._fetching = None
        self.present = True
        self._views()

    def settle(self) -> None:
        """Wait for what was started."""
        self._updated.wait()
        self.reduced.wait()

    def free(self) -> None:
        """Forget gathered parameters; nothing at level N."""
        if self._fetching is not None:
            self.arrive()
        if self.placement.params == "N" or not self.present:
            return
        self.present = False
        for member in self.members:
            member.param.data = self._empty
        self.full.untyped_storage().resize_(0)
        self._versions = [member.param._version for member in self.members]

    def _views(self) -> None:
        for member in self.members:
            member.param.data = self.full[member.start : member.stop].view(member.shape)
        self._versions = [member.param._version for member in self.members]

    def touched(self) -> str | None:
        """Name of a parameter that somebody changed or replaced since its data were put in place."""
        for member, version in zip(self.members, self._versions, strict=True):
            param = member.param
            at = self.full.data_ptr() + member.start * self.full.element_size() if self.present else None
            same = param.data_ptr() == at and param.shape == member.shape if self.present else param.numel() == 0
            if not (same or not (member.stop - member.start)) or param._version != version:
                return member.name
        return None

    def write_back(self) -> None:
        """Take over what was written into the gathered parameters, on all ranks alike."""
        levels = self.lanes.params_levels
        for member in self.members:  # somebody may have replaced the data altogether
            self.full[member.start : member.stop].copy_(member.param.detach().reshape(-1))
        self._views()
        if self.placement.params != "N":
            self.params.copy_(self.full[self._own_params])
        if self.master is not None and self._separate:  # what was not changed keeps its digits
            full = self.full[levels.own(self.size, self.placement.state)]
            same = full == self.master.to(full.dtype)
            self.master.copy_(torch.where(same, self.master, full.to(self.master.dtype)))

    def frozen_pieces(self) -> list[Piece]:
        """This rank's parts of parameters that no optimizer updates."""
        own = self.lanes.params_levels.own(self.size, self.placement.params)
        return _pieces(self.members, self.params, own)

    def publish(self) -> None:
        """Once the optimizer's part has changed: it goes to all that hold the parameters. Starts, does not wait."""
        if self.master is None:
            return
        state, params, levels = self.placement.state, self.placement.params, self.lanes.params_levels
        master, own = self.master, self.params[levels.own(self.size, state, params)]

        def job() -> None:
            if self._separate:
                own.copy_(master)
            levels.gather(self.params, state, params)

        if self._separate or state != params:
            self._updated = self.lanes.params.submit(job)

    # Gradients

    def receive(self, member: Member) -> bool:
        """Take a parameter's gradient of this backward pass; True when all are there."""
        grad = member.param.grad
        assert grad is not None
        if member.name in self._arrived:
            raise RuntimeError(
                f"{member.name} got a gradient twice in one backward pass, as by a reentrant checkpoint of a layer "
                "that is used twice: take checkpoint(..., use_reentrant=False)"
            )
        into = self._stage()[member.start : member.stop].view(member.shape)
        if self._adds:
            into.add_(grad)
        else:
            into.copy_(grad)
            if self.placement.grads != "N":  # before it is summed: fp16 must not overflow. At N: at the step's end
                into.mul_(1.0 / self._divide_by)
        member.param.grad = None
        self._arrived.add(member.name)
        return len(self._arrived) == len(self.members)

    @property
    def _adds(self) -> bool:
        """Whether gradients are added where they arrive: they stay on this rank until the step's end."""
        return self.placement.grads == "N" and self._begun

    def _stage(self) -> Tensor:
        if self._staging is None:
            if self.placement.grads == "N":
                self._staging = self._kept()
            else:
                self._staging = self.full.new_empty(self.size, dtype=self.grad_dtype)
            self._staging[self.members[-1].stop :].zero_()
        return self._staging

    def _kept(self) -> Tensor:
        if self._grads is None:
            parts = self.lanes.grads_levels.groups.divisor(self.placement.grads)
            self._grads = self.full.new_empty(self.size // parts, dtype=self.grad_dtype)
        return self._grads

    def reduce(self, last: bool) -> None:
        """Start what a micro-batch's gradients need: a reduce-scatter to their level, at the last also to the state's.

        A parameter without a gradient counts as zeros.
        """
        staging = self._stage()
        if not self._adds:
            for member in self.members:
                if member.name not in self._arrived:
                    staging[member.start : member.stop].zero_()
        self._arrived.clear()
        self._staging = None
        first, self._begun = not self._begun, not last
        g, levels, kept = self.placement.grads, self.lanes.grads_levels, self._kept()
        own = levels.own(self.size, g)

        def job() -> None:
            if staging.is_cuda:
                staging.record_stream(torch.cuda.current_stream(staging.device))
            if g != "N":
                levels.reduce_scatter(staging, "N", g)
                kept.copy_(staging[own]) if first else kept.add_(staging[own])
            if last:
                self._synchronise(kept)

        if g != "N" or last:
            self.reduced = self.lanes.grads.submit(job)

    def _synchronise(self, kept: Tensor) -> None:
        """From the level of gradients to the optimizer's; summed over all ranks then."""
        g, state, levels = self.placement.grads, self.placement.state, self.lanes.grads_levels
        if g == "N":
            kept.mul_(1.0 / self._divide_by)
        if g == state:
            levels.all_reduce(kept, g)
        elif (g, state) == ("N", "I"):
            levels.reduce_scatter(kept, "N", "I")
            levels.all_reduce(kept[levels.own(self.size, "I")], "I")
        else:
            levels.reduce_scatter(kept, g, state)

    def gradient(self) -> Tensor:
        """This rank's part at the level of the optimizer's state, once `reduced` was waited for."""
        levels = self.lanes.grads_levels
        return self._kept()[levels.own(self.size, self.placement.state, self.placement.grads)]

    @property
    def kept_bytes(self) -> int:
        """Of gradients, from the first micro-batch on."""
        return 0 if self._grads is None else self._grads.nbytes

    @property
    def master_bytes(self) -> int:
        """Of master weights in a dtype of their own."""
        return 0 if self.master is None or not self._separate else self.master.nbytes

    def forget_gradients(self) -> None:
        """As if this step's micro-batches had not been."""
        self._begun, self._staging = False, None
        self._arrived.clear()


def _pieces(members: Sequence[Member], master: Tensor, own: slice) -> list[Piece]:
    found = []
    for member in members:
        start, stop = max(member.start, own.start), min(member.stop, own.stop)
        if start < stop:
            tensor = nn.Parameter(master[start - own.start : stop - own.start], requires_grad=True)
            found.append(Piece(member.name, member.shape, start - member.start, stop - member.start, tensor))
    return found
