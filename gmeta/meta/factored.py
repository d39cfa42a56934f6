"""The factored inner loop: exact MAML for all tasks at once, without ever forming a task's weights.

An SGD step changes a linear layer's weight by -rate * D^T A, where A [T, S, in] are its support inputs and
D [T, S, out] the loss gradients at its outputs. So task t's adapted layer is, for any input x of the task,

    x W_t^T + b_t = x W^T + b - sum_k rate_k * ((x A_k^T) D_k + 1^T D_k)

and needs no weight gradient: `autograd.grad` with respect to the outputs alone. Second order is autograd through A
and D. Element-wise parameters are held per task; embedding rows likewise as shared row plus change
(`gmeta.meta.gather_plan`). Derivation, costs and limits: docs/meta-learning.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.batch import EmbeddedRows, Examples
from gmeta.core.selection import bmm_nt, product
from gmeta.meta.dropout import QUERY_PASS, SeededDropout
from gmeta.meta.fast_weights import FastWeights, LinearSite, LowRankUpdate
from gmeta.meta.gather_plan import GatherPlan, apply_deltas, shared_rows
from gmeta.meta.inner_loop import InnerPass, rate_group
from gmeta.meta.interception import Intercept
from gmeta.meta.losses import counts_of, over_labels, task_mean, widen
from gmeta.meta.modulation import Modulated
from gmeta.meta.recompute import recomputed
from gmeta.meta.unfused import unfused_attention
from gmeta.meta.views import Embedded


class Unsupported(ValueError):
    """Says that a model uses an adapted parameter in a way that only the reference engine can follow."""

    def __init__(self, parameter: str, what: str) -> None:
        super().__init__(
            f"the factored engine cannot adapt {parameter!r}: {what}; set meta.engine to 'reference', "
            "or leave the parameter out of meta.adapt"
        )


_NOT_ADAPTED = LinearSite(None, None)  # a layer that is modulated only


def adapt(inner: InnerPass, rows: EmbeddedRows, support: Examples, plan: GatherPlan) -> tuple[FastWeights, Tensor]:
    """Adapt every task to its support; return the fast weights, and the loss [T] before the first step, detached.

    The fast weights are differentiable with second order, and where the pass is modulated.
    """
    num_tasks, length = support.mask.shape
    shared = shared_rows(rows, plan)
    modulation: dict[str, Modulated] = {}
    if inner.modulator is not None:
        embedded = Embedded(shared, plan, (num_tasks, length), support.given)
        with Intercept(embedded):
            modulation = inner.modulation(support.dense, embedded.features, support.label, support.mask)
        # An alias: the inner loop differentiates by these rows, but not through what made the modulation.
        shared = {table: values.view_as(values) for table, values in shared.items()}
    if not inner.second_order:
        shared = {table: values.detach() for table, values in shared.items()}
    fast = FastWeights(num_tasks, pairs=plan.pairs, modulation=modulation)
    first = support.label.new_zeros(num_tasks)
    for step in range(len(inner.rates)):
        if inner.recompute and inner.second_order:
            fast, loss = _recomputed_step(inner, step, fast, shared, support, plan)
        else:
            fast, loss = _inner_step(inner, step, fast, shared, support, plan)
        if step == 0:
            first = loss.detach()
    return fast, first


def score(inner: InnerPass, fast: FastWeights, rows: EmbeddedRows, query: Examples, plan: GatherPlan) -> Tensor:
    """Return the logits [T, Q] of examples of the tasks that were adapted.

    Raises ValueError for fast weights of the reference engine that hold whole layers.
    """
    seen = apply_deltas(shared_rows(rows, plan), fast.deltas, plan)
    return _forward(inner, fast, query, seen, plan, QUERY_PASS)[0]


def _inner_step(
    inner: InnerPass,
    step: int,
    fast: FastWeights,
    shared: Mapping[str, Tensor],
    support: Examples,
    plan: GatherPlan,
) -> tuple[FastWeights, Tensor]:
    """Take one SGD step of every task on its support; return the next state, and the loss [T] before the step."""
    seen = apply_deltas(shared, fast.deltas, plan)
    read = {table: _differentiable(seen[table]) for table in plan.reads}
    twice = inner.second_order
    logits, taped = _forward(inner, fast, support, {**seen, **read}, plan, step + 1, twice=twice)
    with _no_autocast(logits):
        counts = counts_of(support)
        loss = task_mean(inner.loss(logits, support.label), counts)
        num_rows = counts.sum(1).to(loss.dtype)
        fraction = num_rows / (num_rows + inner.prior) if inner.prior else torch.ones_like(num_rows)
        targets = [out for _, out in taped.sites.values()] + list(taped.values.values()) + list(read.values())
        changes: Iterator[Tensor] = iter(
            torch.autograd.grad(
                loss,
                targets,
                fraction if inner.rate is None else fraction * -inner.rate,
                create_graph=inner.second_order,
                materialize_grads=True,
                allow_unused=True,
            )
        )
        if inner.rate is None:
            names = [site.name for site in taped.sites] + list(taped.values)
            of_parameter = [inner.adapted.rate_of(name) for name in names]
            rates = [-inner.rates[step, i] for i in [*of_parameter, *[0] * len(read)]]
            changes = (gradient * rate for gradient, rate in zip(changes, rates, strict=True))
        updates, values, deltas = {}, {}, {}
        for site, (inputs, out) in taped.sites.items():
            change = next(changes).reshape(*inputs.shape[:2], out.shape[-1])
            kept = inputs if inner.second_order else inputs.detach()
            updates[site] = (*fast.updates.get(site, ()), LowRankUpdate(kept, change))
        for name, value in taped.values.items():
            values[name] = value + next(changes)
        for table, reads in plan.reads.items():
            deltas[table] = product(next(changes).flatten(0, 1), reads.transposed, fast.deltas.get(table))
    return replace(fast, updates=updates, values=values, deltas=deltas), over_labels(loss)


def _recomputed_step(
    inner: InnerPass,
    step: int,
    fast: FastWeights,
    shared: Mapping[str, Tensor],
    support: Examples,
    plan: GatherPlan,
) -> tuple[FastWeights, Tensor]:
    """Take `_inner_step` without keeping its graph: the backward pass computes again all but the state."""
    after = fast

    def run(inputs: Sequence[Tensor], differentiable: bool) -> list[Tensor]:
        nonlocal after
        given = iter(inputs)
        own = replace(inner, rates=next(given), second_order=differentiable)
        result, loss = _inner_step(
            own, step, fast.filled(given), {table: next(given) for table in shared}, support, plan
        )
        # Only what this step added: earlier steps' tensors are inputs, and need no second copy of their gradients.
        added = {site: steps[-1:] for site, steps in result.updates.items()}
        after = replace(result, updates=added, modulation={})
        return [loss, *after.tensors()]

    leaves = [p for p in inner.model.parameters() if p.requires_grad]
    loss, *tensors = recomputed(run, leaves, [inner.rates, *fast.tensors(), *shared.values()])
    added = after.filled(iter(tensors))
    updates = {site: (*fast.updates.get(site, ()), *steps) for site, steps in added.updates.items()}
    return replace(added, updates=updates, modulation=fast.modulation), loss


def _forward(
    inner: InnerPass,
    fast: FastWeights,
    examples: Examples,
    values: Mapping[str, Tensor],
    plan: GatherPlan,
    pass_number: int,
    *,
    twice: bool = False,
) -> tuple[Tensor, AdaptedPass]:
    tasks, length = examples.mask.shape
    make_keys = None
    if inner.keys is not None:
        make_keys = partial(inner.keys, pass_number, torch.arange(length, device=examples.mask.device))
    taped = AdaptedPass(inner.model, inner.adapted.parameters, fast, (tasks, length))
    embedded = Embedded(values, plan, (tasks, length), examples.given)
    attention = (_Attention(taped, reads=bool(plan.reads)),) if twice else ()
    with Intercept(taped, *attention, embedded, SeededDropout(make_keys)):
        logits = inner.model(examples.dense, embedded.features)
    taped.finish()
    return widen(logits), taped


@dataclass(frozen=True)
class _Attention:
    """Has attention behind what adapts compute in parts: fused attention has no second derivative. Elsewhere it is
    differentiated once, and stays fused.
    """

    taped: AdaptedPass
    reads: bool  # whether rows adapt

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is not F.scaled_dot_product_attention or not (self.reads or self.taped.sites or self.taped.values):
            return NotImplemented
        with unfused_attention():
            return func(*args, **kwargs)


_ELEMENTWISE = {
    getattr(owner, name)
    for owner, names in (
        (torch, ("add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide")),
        (Tensor, ("add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide", "__rsub__")),
    )
    for name in names
}
_METADATA = {  # functions that read only shape, type or place
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty),
}


class AdaptedPass:
    """Handles one forward pass, in which calls that receive adapted parameters compute with every task's own values.

    It records what the next inner step differentiates: `sites` (inputs and outputs of linear layers) and `values`
    (element-wise parameters, one for each task). `leading` is (T, S); inputs must keep these dimensions first. Linear
    layers that `fast.modulation` names start from every task's own scale and shift, adapted or not.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Sequence[str],
        fast: FastWeights,
        leading: tuple[int, int],
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        owned = [f"{layer}.{kind}" for layer in fast.modulation for kind in ("weight", "bias")]
        self.names = {id(parameters[name]): name for name in (*owned, *adapted) if name in parameters}
        self.adapted = frozenset(adapted)
        self.fast, self.leading = fast, leading
        self.sites: dict[LinearSite, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.versions: list[tuple[str, Tensor, int]] = []
        self.differentiates = torch.is_grad_enabled()

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of a call that receives an adapted parameter. Raises `Unsupported` where no rule fits."""
        found = next(self._names_in((*args, *kwargs.values())), None)
        if found is None:
            if func is torch.autograd.grad:  # then D and A are not all that a weight's gradient depends on
                raise Unsupported(next(iter(self.names.values()), ""), "the model's forward differentiates itself")
            return NotImplemented
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func in _ELEMENTWISE and len(args) == 2:
            return self._elementwise(func, args, kwargs, found)
        name = getattr(func, "__name__", str(func))
        if func in _METADATA or name == "__get__":
            out = func(*args, **kwargs)
            if func in _METADATA or not isinstance(out, Tensor):
                return out
        raise Unsupported(found, f"{name} receives it")

    def finish(self) -> None:
        """Raise `Unsupported` for an adapted parameter that the pass did not meet, or could not follow to the end."""
        for name in self.names.values():
            if name not in self.seen:
                raise Unsupported(name, "the model's forward never uses it")
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise Unsupported(name, "the input or the output of its layer is changed in place")

    def _names_in(self, values: Sequence[Any]) -> Iterator[str]:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.names:
                    yield self.names[id(value)]
            elif isinstance(value, list | tuple):
                yield from self._names_in(value)

    def _name(self, value: Any) -> str | None:
        return self.names.get(id(value))

    def _see(self, name: str) -> None:
        if name in self.seen:
            raise Unsupported(name, "the model's forward uses it twice")
        if self.differentiates and not torch.is_grad_enabled():
            raise Unsupported(name, "the model's forward uses it where gradients are switched off")
        self.seen.add(name)

    def _require_leading(self, value: Any, name: str) -> None:
        if not isinstance(value, Tensor) or tuple(value.shape[:2]) != self.leading or self._name(value) is not None:
            shape = list(value.shape) if isinstance(value, Tensor) else value
            raise Unsupported(name, f"its input is {shape}, expected a tensor of [T, S, ...] = {list(self.leading)}")

    def _task_value(self, parameter: Tensor, name: str, operand: Tensor) -> Tensor:
        """Return an element-wise parameter of every task, shaped to broadcast against `operand` [T, S, ...]."""
        self._see(name)
        if name not in self.adapted or rate_group(name) in self.fast.modulation:
            raise Unsupported(name, "its layer is modulated, and the model's forward uses it outside F.linear")
        if parameter.dim() > operand.dim() - 2:
            raise Unsupported(name, f"its shape {list(parameter.shape)} spans the task and row dimensions")
        if name in self.fast.values:
            value = self.fast.values[name]
        else:
            value = parameter.expand(self.leading[0], *parameter.shape)
        self.values[name] = value = _differentiable(value)
        ones = [1] * (operand.dim() - 1 - parameter.dim())
        return value.view(self.leading[0], *ones, *parameter.shape)

    def _elementwise(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Tensor:
        first = self._name(args[0]) == name
        parameter, operand = (args[0], args[1]) if first else (args[1], args[0])
        self._require_leading(operand, name)
        value = self._task_value(parameter, name, operand)
        return func(*((value, operand) if first else (operand, value)), **kwargs)  # type: ignore[no-any-return]

    def _layer_norm(
        self, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        names = self._name(weight), self._name(bias)
        self._require_leading(input, names[0] or names[1] or "")
        out = F.layer_norm(input, shape, None, None, eps)
        if weight is not None:
            out = out * (weight if names[0] is None else self._task_value(weight, names[0], input))
        if bias is not None:
            out = out + (bias if names[1] is None else self._task_value(bias, names[1], input))
        return out

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        met = LinearSite(self._name(weight), self._name(bias))
        self._require_leading(input, met.name)
        if weight.dim() != 2:
            raise Unsupported(met.name, f"F.linear has a weight of shape {list(weight.shape)}")
        for name in met:
            if name is not None:
                self._see(name)
        if met.weight and met.bias and rate_group(met.weight) != rate_group(met.bias):
            raise Unsupported(met.bias, f"it belongs to another module than its layer's weight {met.weight!r}")
        start = self.fast.modulation.get(rate_group(met.name))
        if start is not None and (met.weight is None or (bias is not None and met.bias is None)):
            raise Unsupported(met.name, "its layer is modulated, and this call has the layer's weight or bias alone")
        for name in met:
            if name in self.fast.values:
                raise ValueError(
                    f"these fast weights hold {name!r} whole, as the reference engine makes them: the factored engine "
                    "cannot apply them; score them with the engine that adapted"
                )
        site = LinearSite(*(name if name in self.adapted else None for name in met))
        steps = self.fast.updates.get(site, ())
        with _no_autocast(input):
            inputs = widen(input).reshape(self.leading[0], input.shape[1:-1].numel(), input.shape[-1])
            form = site.weight is not None and forming_is_cheaper(steps, inputs, weight)
            out = _formed(inputs, weight, bias, site, steps, start) if form else None
        if out is None:
            out = widen(F.linear(input, weight, bias)).reshape(*inputs.shape[:2], weight.shape[0])
            with _no_autocast(input):
                out = _low_rank(_modulated(out, start), inputs, site, steps)
        if site != _NOT_ADAPTED:
            out = _differentiable(out)
            self.sites[site] = (inputs, out)
            self.versions += [(site.name, tensor, tensor._version) for tensor in (inputs, out)]
        return out.view(*input.shape[:-1], weight.shape[0])


def forming_is_cheaper(steps: Sequence[LowRankUpdate], inputs: Tensor, weight: Tensor) -> bool:
    """Whether forming a task's weight takes fewer multiplications than applying its low-rank changes."""
    num_out, num_in = weight.shape
    rank, num_rows = sum(step.inputs.shape[1] for step in steps), max(inputs.shape[1], 1)
    return rank * (num_in + num_out) > num_in * num_out * (1 + rank / num_rows)


def _modulated(out: Tensor, start: Modulated | None) -> Tensor:
    """Scale and shift a layer's output [T, R, out], or its bias [out] -> [T, 1, out], to where every task starts."""
    if start is None:
        return out
    out = out * start.scale.unsqueeze(1)
    return out if start.shift is None else out + start.shift.unsqueeze(1)


def _low_rank(out: Tensor, inputs: Tensor, site: LinearSite, steps: Sequence[LowRankUpdate]) -> Tensor:
    """Add the changes of all steps to the shared layer's output: out [T, R, out], inputs [T, R, in]."""
    for step in steps:
        if site.weight is None:
            out = out + step.gradients.sum(1, keepdim=True)
        else:
            mix = bmm_nt(inputs, step.inputs)
            out = torch.baddbmm(out, mix if site.bias is None else mix + 1, step.gradients)
    return out


def _formed(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: LinearSite,
    steps: Sequence[LowRankUpdate],
    start: Modulated | None,
) -> Tensor:
    """Compute the layer with every task's own weight [T, out, in] and bias."""
    own = weight.expand(inputs.shape[0], *weight.shape)
    own = own if start is None else own * start.scale.unsqueeze(-1)
    bias = None if bias is None else _modulated(bias, start)
    for step in steps:
        own = torch.baddbmm(own, step.gradients.mT, step.inputs)
        if bias is not None and site.bias is not None:
            bias = bias + step.gradients.sum(1, keepdim=True)
    out = bmm_nt(inputs, own)
    return out if bias is None else out + bias


def _differentiable(value: Tensor) -> Tensor:
    """Make `value` something that `autograd.grad` accepts, also where nothing before it requires a gradient."""
    return value if value.requires_grad or not torch.is_grad_enabled() else value.detach().requires_grad_()


def _no_autocast(value: Tensor) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(value.device.type):
        return torch.autocast(value.device.type, enabled=False)
    return nullcontext()
