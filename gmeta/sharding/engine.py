"""The engine of PaRO (arXiv 2310.06003), which `gmeta.sharding.paro.paro` makes.

There is one engine for all 14 strategies. The scopes of parameters, gradients and optimizer state decide which
collectives run, and when (`FlatParameter`). A unit, usually a layer, is gathered just before it computes, and the next
one meanwhile. Its gradients are reduced while backward goes on. What the optimizer changed is gathered while the next
forward pass begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from gmeta.sharding.checkpoint import PartitionTensor, buffer_tensors, create_optimizer_state
from gmeta.sharding.flat_parameters import CommStreams, FlatParameter, ParameterSpan, Partition, require_whole
from gmeta.sharding.muon import Muon
from gmeta.sharding.optimizers import group_numbers, make_optimizer, read_groups, state_bytes, write_groups
from gmeta.sharding.order import leaves_of, reordered
from gmeta.sharding.ring import RankTraffic
from gmeta.sharding.strategy import SCOPES, NodeLayout, NodeTraffic, ShardScope, sent_bytes
from gmeta.sharding.units import (
    Leave,
    OptimizerFactory,
    StepResult,
    Unit,
    cast,
    clipped_scale,
    tensors_in,
)

_FOREIGN_BACKWARD = (
    "backward was called on the loss itself, or by another engine alone: call engine.backward(loss), and "
    "engine.backward(loss, others=[...]) where a loss comes from several engines"
)


class Paro:
    """A module whose training state is sharded; `paro` makes it.

    All methods are collective but `forget_gradients` and those that say what is held or sent.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        optimizer_factory: OptimizerFactory,
        streams: CommStreams,
        input_dtype: torch.dtype | None,
    ) -> None:
        self.module = module
        self._units = list(units)
        self._streams = streams
        self._input_dtype = input_dtype
        self._flat_parameters = [flat for unit in units for flat in unit.flat_parameters]
        self._trained = [flat for flat in self._flat_parameters if flat.trained]
        self.partitions: list[Partition] = [partition for flat in self._trained for partition in flat.partitions]
        self.optimizer = make_optimizer(optimizer_factory, module, self._trained, streams.grads_collectives)
        self._group_numbers = group_numbers(self.optimizer)
        self._groups: dict[str, Tensor] = {}  # what `state` gave out for them, to be loaded into
        # The units as the last complete forward pass computed them: under N all, under I and G those that are gathered
        # from there. Ranks that share parameters compute the latter in one order, and so prefetch in one order.
        self._order: dict[ShardScope, list[Unit]] = {scope: [] for scope in SCOPES}
        self._visited: dict[ShardScope, list[Unit]] = {scope: [] for scope in SCOPES}  # in the present forward pass
        self._agreed = list(units)  # the order of computing by which all ranks exchange
        self._report: Tensor | None = None  # which parameters got gradients, and in which order units computed
        self._hidden: set[Unit] = set()  # computed without gradients since the last backward pass
        self._turn: list[FlatParameter] = []  # those whose gradients are still to be reduced, in launching order
        self._summed = False  # whether the gradients are summed over ranks and wait for the step
        self._in_backward = self._held = False
        self._last = True
        self.deferred = False  # whether gradients add up in .grad until `collect`
        self._provisional: list[Tensor] = []  # the partitions whose optimizer state exists only to be loaded into
        self._hooks: list[RemovableHandle] = []
        for unit in self._units:
            self._hook(unit)
        self._hook_saving()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        return self.module(*args, **kwargs)

    def _hook(self, unit: Unit) -> None:
        module = unit.module
        # what gathers must run, not be traced into the graph of a layer that is compiled
        hooks = (partial(self._before_forward, unit), partial(self._after_forward, unit))
        begin, end = (torch.compiler.disable(hook) for hook in hooks)  # type: ignore[no-untyped-call]
        before = module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        after = module.register_forward_hook(end, always_call=True, with_kwargs=True)
        self._hooks += [before, after]
        for flat in unit.flat_parameters:
            if flat.trained:
                for span in flat.spans:
                    ready = partial(self._gradient_is_there, flat, span)
                    self._hooks.append(span.param.register_post_accumulate_grad_hook(ready))  # type: ignore[no-untyped-call]

    def _hook_saving(self) -> None:
        """Have every module that is saved look whether its own parameters are there."""
        owners = {span.param: (flat, span) for flat in self._flat_parameters for span in flat.spans}
        for module in self.module.modules():
            held = [owners[param] for param in module.parameters(recurse=False)]
            if any(str(flat.strategy) != "NNN" or flat.master_bytes for flat, _ in held):
                hook = module.register_state_dict_pre_hook(partial(require_whole, held))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    # Forward

    def _before_forward(self, unit: Unit, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._in_backward and not self._held:
            self._refuse_touched(unit)
            if unit.root:
                self._visited = {scope: [] for scope in SCOPES}
            for scope in ("N", *unit.scopes):
                self._visited[scope].append(unit)
        self._unshard(unit)
        if not self._in_backward and not self._held:
            for scope in unit.scopes:
                self._prefetch(self._order[scope], len(self._visited[scope]), scope)
        if unit.root:
            if self._input_dtype is None or self._held:  # held parameters have the module's own dtype
                return None
            return tree_map(partial(cast, self._input_dtype), (args, kwargs))
        return self._expect_leaving(unit, (args, kwargs))

    def _after_forward(self, unit: Unit, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if not self._in_backward and not torch.is_grad_enabled():
            self._hidden.add(unit)
        if self._in_backward or self._held:  # activation checkpointing computes again in the backward pass
            if torch.is_grad_enabled() and not self._held:
                self._expect_backward(unit, output)
            return
        expected = self._expect_backward(unit, output) if torch.is_grad_enabled() else False
        if unit.root and output is not None:
            self._order = self._visited
        if not (unit.root and expected):
            unit.reshard()

    def _expect_backward(self, unit: Unit, output: Any) -> bool:
        """Have the unit gathered when backward reaches it; returns whether backward will come."""
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
        """Pass the inputs through a node of their own, which backward reaches when it has left the unit."""
        leaves, structure = tree_flatten(inputs)
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not positions or not torch.is_grad_enabled():
            return None
        passed = Leave.apply(partial(self._after_backward, unit), *(leaves[i] for i in positions))  # type: ignore[no-untyped-call]
        for i, tensor in zip(positions, passed, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, structure)

    # Backward

    def _before_backward(self, unit: Unit, _grad: Tensor) -> None:
        if self._held:  # an inner loop's torch.autograd.grad comes here too
            return
        if not self._in_backward:
            raise RuntimeError(
                f"{_FOREIGN_BACKWARD}; for torch.autograd.grad in a forward pass, gather the parameters first: "
                "`with engine.unsharded():`"
            )
        self._unshard(unit)
        for scope in unit.scopes:
            order = self._order[scope]
            if unit in order:
                self._prefetch(order[::-1], len(order) - order.index(unit), scope)

    def _after_backward(self, unit: Unit) -> None:
        if self._in_backward and not self._held:
            unit.reshard()

    def _gradient_is_there(self, flat: FlatParameter, span: ParameterSpan, _param: Tensor) -> None:
        if not self._in_backward:
            raise RuntimeError(_FOREIGN_BACKWARD)
        if self.deferred:
            return
        if flat not in self._turn:
            raise RuntimeError(
                f"{span.name} got another gradient after the unit's were complete, as by a reentrant checkpoint of a "
                "layer that is used twice: take checkpoint(..., use_reentrant=False)"
            )
        flat.receive(span)
        self._reduce_in_turn()

    def _reduce_in_turn(self, complete: bool = False) -> None:
        """Start the reductions whose turn it is, or with `complete` all that are left, since no gradient will come.

        All ranks start them in the same order. What a rank did not use counts as zeros.
        """
        while self._turn and (complete or self._turn[0].complete):
            self._turn.pop(0).reduce(self._last)

    def backward(self, loss: Tensor, last: bool = True, others: Sequence[Paro] = ()) -> None:
        """Run `loss.backward()` for a micro-batch; with `last`, the step's last one, gradients are summed over ranks.

        The gradients of a step's micro-batches add up: scale the loss where you want their mean. `others` are the other
        engines that the loss comes from, in the same order on all ranks: they too get their gradients, for their own
        `step` or `forget_gradients`. RuntimeError names a parameter that was frozen when the engine was made, and is to
        be trained now.
        """
        if self._summed:
            raise RuntimeError(
                "this step's gradients are summed over ranks already: call step(), or backward(loss, last=False) for "
                "all micro-batches but a step's last one"
            )
        self._refuse_unfrozen()
        self._in_backward, self._last = True, last
        self._turn = self._launching_order()
        try:
            if not self.deferred:
                self._expect_gradients(loss)
                self._reduce_in_turn()
            if others:
                others[0].backward(loss, last, others[1:])
            else:
                loss.backward()  # type: ignore[no-untyped-call]
            if not self.deferred:
                self._reduce_in_turn(complete=True)
            self._summed = last and not self.deferred
        except BaseException as error:
            if isinstance(error, Exception) and not self.deferred and (self._held or self._scopes == {"N"}):
                self._reduce_in_turn(complete=True)  # other ranks may have failed elsewhere: start the same reductions
            self.forget_gradients()
            raise
        finally:
            self._in_backward = False
            self._hidden.clear()
            if not self._held:
                self._reshard()

    def _launching_order(self) -> list[FlatParameter]:
        """Return the trained flat parameters as backward completes them: the last unit that computed comes first, the
        root at the end. It is the same on all ranks.
        """
        inner, root = ([u for u in reversed(self._agreed) if u.root == last] for last in (False, True))
        return [flat for unit in (*inner, *root) for flat in unit.flat_parameters if flat.trained]

    @property
    def _scopes(self) -> set[ShardScope]:
        return {flat.strategy.params for flat in self._flat_parameters}

    def _expect_gradients(self, loss: Tensor) -> None:
        """Find out which parameters get a gradient from `loss`, so that nobody waits for the others."""
        leaves, hides = leaves_of(loss)
        for unit in self._units:
            for flat in unit.flat_parameters:
                if flat.trained:
                    flat.expect(None if hides and unit in self._hidden else leaves)
        # With parameters at several scopes, ranks that share some may use others differently. One that waited for a
        # reduction would not gather what another one needs to come to that reduction.
        gathers = self._streams.gathers
        scope: ShardScope = "G" if "G" in self._scopes else "I"
        names = (name for flat in self._trained for name in sorted(flat.expected))
        alike = gathers is None or self._held or len(self._scopes) == 1 or gathers.same(names, scope)
        self._streams.staging.bounded = alike

    def collect(self) -> None:
        """Reduce the gradients of a step's `deferred` micro-batches, of which ranks may have different numbers."""
        self._streams.staging.bounded = True
        for flat in self._trained:
            for span in flat.spans:
                if span.param.grad is not None:
                    flat.receive(span)
            flat.reduce(last=True)
        self._summed = True

    def forget_gradients(self) -> None:
        """Drop what the micro-batches since the last step have added up."""
        self._summed, self._report = False, None
        for flat in self._trained:
            flat.forget_gradients()
        self._streams.staging.clear()

    # Step

    def step(self, clip_norm: float | None = None, grad_scale: float = 1.0) -> StepResult:
        """Update the parameters with the gradients of the micro-batches since the last step, all of them or none. A
        parameter that got no gradient on any rank stays as it is, and so does its optimizer state.

        The gradient is multiplied by `grad_scale` (such as 1 / loss scale), then shortened to `clip_norm` if its norm
        over all ranks and units is larger. Where it is not finite, no rank changes anything.
        """
        norm = float(self.square_sum().sqrt()) * grad_scale
        finite = math.isfinite(norm)
        if finite:
            self.update(clipped_scale(norm, clip_norm, grad_scale))
        else:
            self.forget_gradients()
        return StepResult(norm, finite)

    def square_sum(self) -> Tensor:
        """Return the sum of squares of the full gradient, float64 [], the same on every rank.

        Every element counts once: each of the ranks that hold a partition adds its fraction.
        """
        self._need_gradients()
        for flat in self._trained:
            flat.reduced.wait()
        self._streams.staging.clear()
        hierarchy = self._streams.grads_collectives
        total = torch.zeros((), dtype=torch.float64, device=self._streams.grads.device)
        for flat in self._trained:
            holders = hierarchy.layout.world_size / hierarchy.layout.num_partitions(flat.strategy.state)
            total += torch.linalg.vector_norm(flat.gradient(), dtype=torch.float64).square() / holders
        used = [float(span.name in flat.used) for flat in self._trained for span in flat.spans]
        first = hierarchy.rings.world.position == 0  # all ranks take over its order
        places = {unit: place for place, unit in enumerate(dict.fromkeys(self._order["N"]), 1)} if first else {}
        report = total.new_tensor([*used, *(places.get(unit, 0) for unit in self._agreed)])
        summed = hierarchy.sum_scalars(torch.cat([total.view(1), report]))
        self._report = summed[1:]
        return summed[0]

    def update(self, scale: float = 1.0) -> None:
        """Make one update with the gradient times `scale`, without looking at it; see `step`."""
        self._need_gradients()
        if self._report is None:
            self.square_sum()
        self._settle("step")
        assert self._report is not None
        report: list[float] = self._report.tolist()
        self._summed, self._report = False, None
        names = [span.name for flat in self._trained for span in flat.spans]
        used = {name for name, ranks in zip(names, report, strict=False) if ranks}
        self._agreed = reordered(self._agreed, report[len(names) :])
        for flat in self._trained:
            flat.used.clear()
            gradient = flat.gradient()
            if scale != 1.0:
                gradient.mul_(scale)
            assert flat.master is not None
            gradient = gradient.to(flat.master.dtype)
            at = 0
            for partition in flat.partitions:
                part = gradient[at : at + partition.tensor.numel()]
                partition.tensor.grad = part if partition.name in used else None
                at += partition.tensor.numel()
        for param in self._provisional:
            self.optimizer.state.pop(param, None)
        self._provisional = []
        if isinstance(self.optimizer, Muon):
            self.optimizer.used = frozenset(used)
        self.optimizer.step()
        for partition in self.partitions:
            partition.tensor.grad = None
        for unit in self._agreed:  # in the order in which the next forward pass needs them
            for flat in unit.flat_parameters:
                if flat.trained:
                    flat.publish()

    # Unsharded parameters

    @contextmanager
    def unsharded(self, write_back: bool = False) -> Iterator[None]:
        """Keep all parameters gathered inside the block, in forward and backward passes too.

        This is for a model that is not called unit by unit (a meta step), or to look at weights. They have the module's
        own dtype and all of their digits, also where `compute_dtype` is another: the model computes in it inside. With
        `write_back` what was changed inside, on all ranks alike, is taken over; RuntimeError where something was
        changed without it.
        """
        self._unshard_masters()
        outer, self._held = self._held, True
        try:
            yield
            self._refuse_replaced()
            if write_back:
                for flat in self._flat_parameters:
                    flat.write_back()
            for unit in self._units:
                self._refuse_touched(unit)
        finally:
            self._held = outer
            if not outer:
                self._reshard()

    def _unshard_masters(self) -> None:
        for flat in self._flat_parameters:
            flat.start_unshard(masters=True)
        for flat in self._flat_parameters:
            flat.wait_unshard()

    def _unshard(self, unit: Unit) -> None:
        for flat in unit.flat_parameters:
            flat.start_unshard()
        for flat in unit.flat_parameters:
            flat.wait_unshard()

    def _prefetch(self, order: Sequence[Unit], position: int, scope: ShardScope) -> None:
        if position < len(order):
            order[position].start_unshard(scope)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    # Errors

    def _need_gradients(self) -> None:
        if not self._summed:
            raise RuntimeError(
                "there is no gradient that is summed over ranks: call backward(loss, last=True) before step"
            )

    def _settle(self, what: str) -> None:
        """Wait until nothing is in flight, and free gathered copies, which would be out of date."""
        if self._held and any(flat.strategy.params != "N" or flat.separate for flat in self._flat_parameters):
            raise RuntimeError(
                f"{what}() inside unsharded() would leave the unsharded parameters out of date: call it after"
            )
        for flat in self._flat_parameters:
            flat.settle()
        self._reshard()

    def _refuse_touched(self, unit: Unit) -> None:
        for flat in unit.flat_parameters:
            name = flat.touched()
            if name is not None:
                raise RuntimeError(
                    f"parameter {name} was changed outside of the engine, whose own copy would undo it: change "
                    "parameters inside `with engine.unsharded(write_back=True):`, on all ranks alike"
                )

    def _refuse_replaced(self) -> None:
        for flat in self._flat_parameters:
            for span in flat.spans:
                if self.module.get_parameter(span.name) is not span.param:
                    raise RuntimeError(
                        f"parameter {span.name} was replaced by another tensor, which the engine would not train: "
                        "change it in place (load_state_dict without assign=True)"
                    )

    def _refuse_unfrozen(self) -> None:
        for flat in self._flat_parameters:
            for span in () if flat.trained else flat.spans:
                if span.param.requires_grad:
                    raise RuntimeError(
                        f"parameter {span.name} was frozen when the engine was made, so it has no optimizer state, and "
                        "its requires_grad is on now: make another engine, or one that trains it, and freeze it then"
                    )

    # Facts

    @property
    def layout(self) -> NodeLayout:
        """Return how ranks are spread over nodes."""
        return self._streams.params_collectives.layout

    @property
    def num_parameters(self) -> int:
        """Return the number of elements of all parameters, on all ranks together."""
        return sum(span.stop - span.start for flat in self._flat_parameters for span in flat.spans)

    @property
    def strategies(self) -> dict[str, str]:
        """Return every parameter's strategy, by name."""
        return {span.name: str(flat.strategy) for flat in self._flat_parameters for span in flat.spans}

    @property
    def sent(self) -> RankTraffic:
        """Return the bytes that this rank has sent since it began, to its node and to others. This waits for what is in
        flight.
        """
        for flat in self._flat_parameters:
            flat.settle()
        parts = (self._streams.params_collectives.sent, self._streams.grads_collectives.sent)
        return RankTraffic(sum(part.intra for part in parts), sum(part.inter for part in parts))

    def state(self) -> dict[str, Tensor]:
        """Return all that training goes on from, by name, for torch.distributed.checkpoint: `tensors()`, the module's
        persistent buffers and the numbers of the optimizer's groups, such as learning rates.

        It is saved under the module's names and shapes, so every strategy on any number of ranks can load it, into its
        own `state()`; call `loaded` afterwards. Make it anew for each checkpoint: the numbers are copies. Of buffers,
        which may differ between ranks, those of the first rank are saved. ValueError where the optimizer keeps
        something else than tensors.
        """
        self._groups = read_groups(self.optimizer, self._group_numbers)
        first = self._streams.params_collectives.rings.world.position == 0
        return {**self.tensors(), **buffer_tensors(self.module, first), **self._groups}

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's partitions of all parameters and of the optimizer's state, the latter as
        `optimizer.NAME.KEY`.
        """
        for flat in self._flat_parameters:
            flat.settle()
        if self.partitions:
            self._provisional += create_optimizer_state(self.optimizer)
        found: dict[str, Tensor] = {}
        for flat in self._flat_parameters:
            for partition in flat.partitions if flat.trained else flat.frozen_partitions():
                found[partition.name] = PartitionTensor.of(partition.tensor, partition.shape, partition.start)
        for partition in self.partitions:
            for key, value in self.optimizer.state[partition.tensor].items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"the optimizer keeps {key} = {value!r}: only tensors can be saved in parts")
                saved = value.view(1) if not value.ndim else PartitionTensor.of(value, partition.shape, partition.start)
                found[f"optimizer.{partition.name}.{key}"] = saved
        return found

    def loaded(self) -> None:
        """Take over what was loaded into the latest `state()` or `tensors()`, and send the parameters to all ranks."""
        self._provisional = []
        if self._groups:
            write_groups(self.optimizer, self._group_numbers, self._groups)
        self._settle("loaded")
        for flat in self._flat_parameters:
            flat.publish()

    def predicted_sent(self, accumulation: int = 1, gathers: int | None = None) -> NodeTraffic:
        """Return what this rank's node sends in a step of so many micro-batches, by the formulas
        (`strategy.sent_bytes`).

        `gathers` is how often a unit is gathered in a micro-batch; None means in forward and in backward, and the root
        once.
        """
        hierarchy = self._streams.params_collectives
        total = NodeTraffic()
        for unit in self._units:
            for flat in unit.flat_parameters:
                trained = flat.size if flat.trained else 0
                total += sent_bytes(
                    flat.strategy,
                    hierarchy.layout,
                    params=flat.size * flat.full.element_size(),
                    updated=trained * flat.full.element_size(),
                    grads=trained * flat.grad_dtype.itemsize,
                    accumulation=accumulation,
                    gathers=gathers or (1 if unit.root else 2),
                    flat=hierarchy.algorithm in ("backend", "flat"),
                )
        return total

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank holds from step to step: parameters, gradients, optimizer state with master
        weights, and the master weights of frozen parameters.
        """
        return {
            "params": sum(flat.params.nbytes for flat in self._flat_parameters),
            "grads": sum(flat.kept_bytes for flat in self._trained),
            "state": state_bytes(self.optimizer) + sum(flat.master_bytes for flat in self._trained),
            "frozen": sum(flat.master_bytes for flat in self._flat_parameters if not flat.trained),
        }

    def close(self) -> None:
        """Take the hooks off the module and leave its parameters unsharded, in their own dtype. The engine cannot be
        used any more.
        """
        self._unshard_masters()
        for hook in self._hooks:
            hook.remove()
        self._streams.close()
