"""PaRO (arXiv 2310.06003): parameters, gradients and optimizer state, each sharded as far as memory needs.

    mesh = group_mesh(8)                                     # groups of 8 ranks with fast links
    engine = paro(model, partial(torch.optim.AdamW, lr=1e-3), mesh, placement="IIG")
    for micro_batches in loader:
        for k, batch in enumerate(micro_batches):
            engine.backward(loss(engine(batch)) / len(micro_batches), last=k == len(micro_batches) - 1)
        engine.step(clip_norm=1.0)

One engine for all 14 placements: the levels of parameters, gradients and optimizer state decide which collectives run,
and when (`Flat`). A unit, usually a layer, is gathered just before it computes, the next one meanwhile; its gradients
are reduced while backward goes on; what the optimizer changed is gathered while the next forward pass begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from gmeta.sharding.auto import Auto, resolve
from gmeta.sharding.checkpoint import PieceTensor, first_state
from gmeta.sharding.flat_parameters import Flat, Lanes, Member, Piece
from gmeta.sharding.hierarchy import Collectives, Levels
from gmeta.sharding.ring import Counter
from gmeta.sharding.strategy import Groups, Sent, sent_bytes
from gmeta.sharding.streams import Lane
from gmeta.sharding.torch_engine import TorchEngine
from gmeta.sharding.units import (
    Leave,
    OptimizerFactory,
    Stepped,
    Unit,
    broadcast_module,
    cast,
    element_wise,
    make_optimizer,
    make_units,
    tensors_in,
)


class Paro:
    """A module whose training state is sharded; made by `paro`. All methods that are not properties are collective."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        optimizer_factory: OptimizerFactory,
        lanes: Lanes,
        input_dtype: torch.dtype | None,
    ) -> None:
        self.module = module
        self._units = list(units)
        self._lanes = lanes
        self._input_dtype = input_dtype
        self._flats = [flat for unit in units for flat in unit.flats]
        self._trained = [flat for flat in self._flats if flat.trained]
        self.pieces: list[Piece] = [piece for flat in self._trained for piece in flat.pieces]
        self.optimizer = make_optimizer(optimizer_factory, self.pieces, module)
        self._order: list[Unit] = []  # in which units computed in the last whole forward pass
        self._visited: list[Unit] = []  # in this one
        self._turn: list[Flat] = []  # trained flats whose gradients are still to be reduced, in the order of launching
        self._complete: set[Flat] = set()
        self._summed = False  # the gradients of a step are summed over ranks, and wait for it
        self._in_backward = self._held = False
        self._last = True
        self.deferred = False  # gradients stay in .grad, and add up there, until `collect`
        self._provisional = False  # the optimizer's state is only a place to load into
        self._hooks: list[RemovableHandle] = []
        for unit in self._units:
            self._hook(unit)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self.module(*args, **kwargs)

    def _hook(self, unit: Unit) -> None:
        module = unit.module
        before = module.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True, prepend=True)
        after = module.register_forward_hook(partial(self._after_forward, unit), always_call=True, with_kwargs=True)
        self._hooks += [before, after]
        for flat in unit.flats:
            if flat.trained:
                for member in flat.members:
                    ready = partial(self._gradient_is_there, flat, member)
                    self._hooks.append(member.param.register_post_accumulate_grad_hook(ready))  # type: ignore[no-untyped-call]
        if unit.root:
            self._hooks.append(module.register_state_dict_pre_hook(self._refuse_when_sharded))  # type: ignore[no-untyped-call]

    # Forward

    def _before_forward(self, unit: Unit, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._in_backward and not self._held:
            self._refuse_touched(unit)
            if unit.root:
                self._visited = []
            self._visited.append(unit)
        self._arrive(unit)
        if not self._in_backward and not self._held:
            self._prefetch(self._order, len(self._visited))
        if unit.root:
            return None if self._input_dtype is None else tree_map(partial(cast, self._input_dtype), (args, kwargs))
        return self._expect_leaving(unit, (args, kwargs))

    def _after_forward(self, unit: Unit, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if self._in_backward or self._held:  # activation checkpointing computes again, in the backward pass
            if torch.is_grad_enabled() and not self._held:
                self._expect_backward(unit, output)
            return
        expected = self._expect_backward(unit, output) if torch.is_grad_enabled() else False
        if unit.root and output is not None:
            self._order = self._visited
        if not (unit.root and expected):
            unit.free()

    def _expect_backward(self, unit: Unit, output: Any) -> bool:
        """Have the unit there when backward reaches it; whether backward will come."""
        found = tensors_in(output)
        if output is not None and not found:
            raise TypeError(
                f"unit {unit.name!r} returns a {type(output).__name__} in which no tensor is found: return tensors, or "
                "tuples, lists and dictionaries of them, so that backward finds the unit"
            )
        out = [tensor for tensor in found if tensor.requires_grad]
        for tensor in out:
            tensor.register_hook(partial(self._before_backward, unit))  # type: ignore[no-untyped-call]
        return bool(out)

    def _expect_leaving(self, unit: Unit, inputs: Any) -> Any:
        """The inputs through a node of their own, which backward reaches when it has left the unit."""
        leaves, structure = tree_flatten(inputs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places or not torch.is_grad_enabled():
            return None
        passed = Leave.apply(partial(self._after_backward, unit), *(leaves[i] for i in places))  # type: ignore[no-untyped-call]
        for i, tensor in zip(places, passed, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, structure)

    # Backward

    def _before_backward(self, unit: Unit, _grad: Tensor) -> None:
        if self._held:  # also in an inner loop's torch.autograd.grad
            return
        if not self._in_backward:
            raise RuntimeError(
                "backward was called on the loss itself: call engine.backward(loss); for torch.autograd.grad in a "
                "forward pass, have the parameters whole: `with engine.gathered():`"
            )
        self._arrive(unit)
        if unit in self._order:
            self._prefetch(self._order[::-1], len(self._order) - self._order.index(unit))

    def _after_backward(self, unit: Unit) -> None:
        if self._in_backward and not self._held:
            unit.free()

    def _gradient_is_there(self, flat: Flat, member: Member, _param: Tensor) -> None:
        if not self._in_backward:
            raise RuntimeError("backward was called on the loss itself: call engine.backward(loss)")
        if self.deferred:
            return
        if flat not in self._turn:
            raise RuntimeError(
                f"{member.name} got another gradient after the unit's were complete, as by a reentrant checkpoint of a "
                "layer that is used twice: take checkpoint(..., use_reentrant=False)"
            )
        if flat.receive(member):
            self._complete.add(flat)
            while self._turn and self._turn[0] in self._complete:  # all ranks launch in one order
                self._turn.pop(0).reduce(self._last)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """`loss.backward()` of a micro-batch; `last`: it is the step's last one, gradients are summed over ranks.

        Gradients of a step's micro-batches add up: scale the loss where you want their mean.
        """
        if self._summed:
            raise RuntimeError(
                "this step's gradients are summed over ranks already: call step(), or backward(loss, last=False) for "
                "all micro-batches but a step's last one"
            )
        self._in_backward, self._last = True, last
        self._turn, self._complete = self._launching_order(), set()
        try:
            loss.backward()  # type: ignore[no-untyped-call]
            while self._turn and not self.deferred:  # units without a gradient on this rank: others may have one
                self._turn.pop(0).reduce(last)
            self._summed = last and not self.deferred
        except BaseException:
            self.forget_gradients()
            raise
        finally:
            self._in_backward = False
            if not self._held:
                self._free()

    def _launching_order(self) -> list[Flat]:
        """Trained flats as backward completes them: the last unit that computed first, the root's at the end."""
        units = dict.fromkeys([*self._order, *self._units])
        inner = [unit for unit in units if not unit.root]
        return [flat for unit in [*inner[::-1], *(u for u in units if u.root)] for flat in unit.flats if flat.trained]

    def collect(self) -> None:
        """Reduce the gradients of a step's `deferred` micro-batches, of which ranks may have different numbers."""
        for flat in self._trained:
            for member in flat.members:
                if member.param.grad is not None:
                    flat.receive(member)
            flat.reduce(last=True)
        self._summed = True

    def forget_gradients(self) -> None:
        """Drop what the micro-batches since the last step have added up."""
        self._summed = False
        for flat in self._trained:
            flat.forget_gradients()

    # Step

    def step(self, clip_norm: float | None = None, grad_scale: float = 1.0) -> Stepped:
        """Update the parameters with the gradients of the micro-batches since the last step, all of them or none.

        The gradient is multiplied by `grad_scale` (such as 1 / loss scale), then shortened to `clip_norm` if its norm
        over all ranks and units is larger. Where it is not finite, no rank changes anything.
        """
        norm = float(self.square_sum().sqrt()) * grad_scale
        finite = math.isfinite(norm)
        if finite:
            scale = grad_scale * min(1.0, clip_norm / norm) if clip_norm and norm > 0 else grad_scale
            self.update(scale)
        else:
            self.forget_gradients()
        return Stepped(norm, finite)

    def square_sum(self) -> Tensor:
        """Of all numbers of the whole gradient, float64 []; the same on every rank.

        Every part counts once: whoever shares it with others adds its share.
        """
        self._need_gradients()
        for flat in self._trained:
            flat.reduced.wait()
        levels = self._lanes.grads_levels
        total = torch.zeros((), dtype=torch.float64, device=self._lanes.grads.device)
        for flat in self._trained:
            holders = levels.groups.world_size / levels.groups.divisor(flat.placement.state)
            total += torch.linalg.vector_norm(flat.gradient(), dtype=torch.float64).square() / holders
        return levels.sum_scalars(total)

    def update(self, scale: float = 1.0) -> None:
        """One update with the gradient times `scale`, without a look at it; see `step`."""
        self._need_gradients()
        self._settle("step")
        self._summed = False
        for flat in self._trained:
            gradient = flat.gradient()
            if scale != 1.0:
                gradient.mul_(scale)
            assert flat.master is not None
            gradient = gradient.to(flat.master.dtype)
            at = 0
            for piece in flat.pieces:
                piece.tensor.grad = gradient[at : at + piece.tensor.numel()]
                at += piece.tensor.numel()
        if self._provisional:
            self.optimizer.state.clear()
            self._provisional = False
        self.optimizer.step()
        for piece in self.pieces:
            piece.tensor.grad = None
        for unit in dict.fromkeys([*self._order, *self._units]):  # what the next forward pass needs first, first
            for flat in unit.flats:
                if flat.trained:
                    flat.publish()

    # Whole parameters

    @contextmanager
    def gathered(self, write_back: bool = False) -> Iterator[None]:
        """All parameters are whole inside, and stay so in forward and backward passes.

        For a model that is not called unit by unit (a meta step), or to look at weights. With `write_back` what was
        changed inside, on all ranks alike, is taken over; RuntimeError where something was changed without it.
        """
        for unit in self._units:
            unit.fetch()
        for unit in self._units:
            self._arrive(unit)
        outer, self._held = self._held, True
        try:
            yield
            self._refuse_replaced()
            if write_back:
                for flat in self._flats:
                    flat.write_back()
            for unit in self._units:
                self._refuse_touched(unit)
        finally:
            self._held = outer
            if not outer:
                self._free()

    def _arrive(self, unit: Unit) -> None:
        for flat in unit.flats:
            flat.fetch()
        for flat in unit.flats:
            flat.arrive()

    def _prefetch(self, order: Sequence[Unit], place: int) -> None:
        if place < len(order):
            order[place].fetch()

    def _free(self) -> None:
        for unit in self._units:
            unit.free()

    # Errors

    def _need_gradients(self) -> None:
        if not self._summed:
            raise RuntimeError(
                "there is no gradient that is summed over ranks: call backward(loss, last=True) before step"
            )

    def _settle(self, what: str) -> None:
        """Nothing is on its way, and no gathered copy is left that would be out of date."""
        if self._held and any(flat.placement.params != "N" for flat in self._flats):
            raise RuntimeError(
                f"{what}() inside gathered() would leave the whole parameters out of date: call it after"
            )
        for flat in self._flats:
            flat.settle()
        self._free()

    def _refuse_touched(self, unit: Unit) -> None:
        for flat in unit.flats:
            name = flat.touched()
            if name is not None:
                raise RuntimeError(
                    f"parameter {name} was changed outside of the engine, whose own copy would undo it: change "
                    "parameters inside `with engine.gathered(write_back=True):`, on all ranks alike"
                )

    def _refuse_replaced(self) -> None:
        for flat in self._flats:
            for member in flat.members:
                if self.module.get_parameter(member.name) is not member.param:
                    raise RuntimeError(
                        f"parameter {member.name} was replaced by another tensor, which the engine would not train: "
                        "change it in place (load_state_dict without assign=True)"
                    )

    def _refuse_when_sharded(self, *_: Any) -> None:
        if not all(flat.present for flat in self._flats):
            raise RuntimeError(
                "this rank holds parts of the parameters only: call module.state_dict() inside "
                "`with engine.gathered():`, or save engine.state() with torch.distributed.checkpoint"
            )
        for flat in self._flats:  # updated parameters may be on their way
            flat.settle()

    # Facts

    @property
    def groups(self) -> Groups:
        """Of ranks."""
        return self._lanes.params_levels.groups

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters, on all ranks together."""
        return sum(member.stop - member.start for flat in self._flats for member in flat.members)

    @property
    def placements(self) -> dict[str, str]:
        """Every parameter's placement, by name."""
        return {member.name: str(flat.placement) for flat in self._flats for member in flat.members}

    @property
    def sent(self) -> Counter:
        """Bytes that this rank has sent since it began, to its group and to others; waits for what is on its way."""
        for flat in self._flats:
            flat.settle()
        parts = (self._lanes.params_levels.sent, self._lanes.grads_levels.sent)
        return Counter(sum(part.intra for part in parts), sum(part.inter for part in parts))

    def state(self) -> dict[str, Tensor]:
        """This rank's parts of all parameters and of the optimizer's state, by name, for torch.distributed.checkpoint.

        They are saved under the module's names and shapes, the optimizer's as `optimizer.NAME.KEY`, so that every
        placement on any number of ranks loads them, into the tensors of its own `state()`; call `loaded` then.
        ValueError where the optimizer keeps something else than tensors.
        """
        for flat in self._flats:
            flat.settle()
        if self.pieces and not self.optimizer.state:
            first_state(self.optimizer)
            self._provisional = True
        found: dict[str, Tensor] = {}
        for flat in self._flats:
            for piece in flat.pieces if flat.trained else flat.frozen_pieces():
                found[piece.name] = PieceTensor.of(piece.tensor, piece.shape, piece.start)
        for piece in self.pieces:
            for key, value in self.optimizer.state[piece.tensor].items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"the optimizer keeps {key} = {value!r}: only tensors can be saved in parts")
                whole = value.view(1) if not value.ndim else PieceTensor.of(value, piece.shape, piece.start)
                found[f"optimizer.{piece.name}.{key}"] = whole
        return found

    def loaded(self) -> None:
        """To be called after the tensors of `state()` were loaded: everyone gets the parameters."""
        self._provisional = False
        self._settle("loaded")
        for flat in self._flats:
            flat.publish()

    def predicted_sent(self, accumulation: int = 1, gathers: int | None = None) -> Sent:
        """What this rank's group sends in a step of so many micro-batches, by the formulas (`placement.sent_bytes`).

        gathers: how often a unit is gathered in a micro-batch; None: in forward and backward, the root once.
        """
        levels = self._lanes.params_levels
        total = Sent()
        for unit in self._units:
            for flat in unit.flats:
                trained = flat.size if flat.trained else 0
                total += sent_bytes(
                    flat.placement,
                    levels.groups,
                    params=flat.size * flat.full.element_size(),
                    updated=trained * flat.full.element_size(),
                    grads=trained * flat.grad_dtype.itemsize,
                    accumulation=accumulation,
                    gathers=gathers or (1 if unit.root else 2),
                    flat=levels.collectives in ("backend", "flat"),
                )
        return total

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds from step to step: parameters, gradients, optimizer state with master weights."""
        state = sum(
            value.nbytes
            for values in self.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor) and value.ndim
        )
        return {
            "params": sum(flat.params.nbytes for flat in self._flats),
            "grads": sum(flat.kept_bytes for flat in self._trained),
            "state": state + sum(flat.master_bytes for flat in self._trained),
        }

    def close(self) -> None:
        """Take the hooks off the module, whose parameters are whole again; the engine is over."""
        for unit in self._units:
            self._arrive(unit)
        for hook in self._hooks:
            hook.remove()
        self._lanes.close()


@overload
def paro(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None = ...,
    placement: str | Mapping[str, str] = ...,
    *,
    units: Sequence[nn.Module] | None = ...,
    compute_dtype: torch.dtype | None = ...,
    grad_dtype: torch.dtype | None = ...,
    collectives: Collectives = ...,
    average: bool = ...,
    timeout_s: float = ...,
    auto: Auto | None = ...,
    backend: Literal["gmeta"] = ...,
) -> Paro: ...


@overload
def paro(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None,
    placement: str,
    *,
    units: Sequence[nn.Module] | None = ...,
    compute_dtype: torch.dtype | None = ...,
    grad_dtype: torch.dtype | None = ...,
    backend: Literal["torch"],
) -> TorchEngine: ...


def paro(
    module: nn.Module,
    optimizer_factory: OptimizerFactory,
    mesh: DeviceMesh | None = None,
    placement: str | Mapping[str, str] = "IIG",
    *,
    units: Sequence[nn.Module] | None = None,
    compute_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    collectives: Collectives = "two_phase",
    average: bool = True,
    timeout_s: float = 300.0,
    auto: Auto | None = None,
    backend: Literal["gmeta", "torch"] = "gmeta",
) -> Paro | TorchEngine:
    """Shard `module`'s training state over `mesh` and return the engine that trains it. Collective.

    mesh: two-dimensional, (groups, ranks of a group), see `group_mesh`; None: this process alone.
    placement: three letters for all, or by name of submodule, the longest prefix wins: {"": "NNN", "text": "IIG"};
        "auto" instead of letters has the planner choose, told what it cannot see by `auto`.
    units: submodules that are gathered at a time; the items of every ModuleList and Sequential where not given.
    compute_dtype: parameters and floating inputs in it, master weights in the module's own; None: the module's own.
    grad_dtype: in which gradients are summed; that of computing where not given.
    average: gradients are divided by the number of ranks, as DistributedDataParallel does.
    backend: torch has FSDP2 do it, for III and GGG, averaging, behind the same methods.

    Rank 0's parameters and buffers go to all ranks. A parameter whose requires_grad is off costs no gradient and no
    state; the flag may not change later. ValueError: an invalid placement, one parameter in two units, an optimizer
    that is not element-wise.
    """
    if backend not in ("gmeta", "torch"):
        raise ValueError(f"backend is {backend!r}: must be gmeta or torch")
    if backend == "torch":
        if mesh is None or not isinstance(placement, str) or not average:
            raise ValueError("backend torch takes a mesh and one placement for all, and averages gradients")
        return TorchEngine(module, optimizer_factory, mesh, placement, units, compute_dtype, grad_dtype)
    device = next((param.device for param in module.parameters()), torch.device("cpu"))
    element_wise(module, optimizer_factory)
    places = resolve(
        module,
        optimizer_factory,
        mesh,
        placement,
        auto,
        units=units,
        compute_dtype=compute_dtype,
        grad_dtype=grad_dtype,
        collectives=collectives,
        timeout_s=timeout_s,
    )
    opened = [Levels.open(mesh, collectives, timeout_s, device) for _ in range(2)]
    lanes = Lanes(Lane(device, "params"), Lane(device, "grads"), *opened)
    settings = partial(Flat, lanes=lanes, compute_dtype=compute_dtype, grad_dtype=grad_dtype, average=average)
    try:
        with opened[0].naming_lost_peers():
            broadcast_module(module, opened[0].rings.everyone)
        found = make_units(module, units, places, settings)
        return Paro(module, found, optimizer_factory, lanes, compute_dtype)
    except ValueError:
        lanes.close()
        raise
