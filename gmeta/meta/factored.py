"""The factored inner loop: exact MAML for all tasks at once, without ever forming a task's weights.

An SGD step changes a linear layer's weight by -rate * D^T A, where A [T, S, in] are its support inputs and
D [T, S, out] the loss gradients at its outputs. So task t's adapted layer is, for any input x of the task,

    x W_t^T + b_t = x W^T + b - sum_k rate_k * ((x A_k^T) D_k + 1^T D_k)

and needs no weight gradient: `autograd.grad` with respect to the outputs alone. Second order is autograd through A
and D. Element-wise parameters are held per task; embedding rows likewise as shared row plus change
(`gmeta.meta.rows`). Derivation, costs and limits: docs/meta-learning.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmeta.batch import EmbeddedRows, Examples, TaskBatch
from gmeta.meta.adapt import Adapted, InnerLoop, rate_group
from gmeta.meta.dropout import QUERY_PASS, SeededDropout, row_keys
from gmeta.meta.losses import task_mean, widen
from gmeta.meta.modulation import Modulated, Modulation
from gmeta.meta.rows import Plan, by_feature, changed, shared_rows, split_sides
from gmeta.ops import cat, product


class Unsupported(ValueError):
    """The model uses an adapted parameter in a way that only the reference engine can follow."""

    def __init__(self, parameter: str, what: str) -> None:
        super().__init__(
            f"the factored engine cannot adapt {parameter!r}: {what}; set meta.engine to 'reference', "
            "or leave the parameter out of meta.adapt"
        )


class Site(NamedTuple):
    """A call of F.linear with an adapted weight, bias or both."""

    weight: str | None
    bias: str | None

    @property
    def name(self) -> str:
        """A name for messages."""
        return self.weight or self.bias or ""


_NOT_ADAPTED = Site(None, None)  # a layer that is modulated only


class Step(NamedTuple):
    """What one inner step changed at a site: W by `gradients^T inputs`, b by the sum of `gradients`."""

    inputs: Tensor  # A [T, R, in]
    gradients: Tensor  # -rate * D [T, R, out]


@dataclass(frozen=True, slots=True)
class Fast:
    """A state of the inner loop: what its steps so far changed, for every task."""

    sites: Mapping[Site, tuple[Step, ...]] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)  # element-wise parameter -> [T, *shape]
    deltas: Mapping[str, Tensor] = field(default_factory=dict)  # group -> change of private rows [P, d]


def run(model: nn.Module, loop: InnerLoop, rows: EmbeddedRows, batch: TaskBatch, plan: Plan) -> tuple[Tensor, Tensor]:
    """Adapt to the support, score the query: (logits [T, Q], first step's support loss [T], detached)."""
    shared = shared_rows(rows, plan)
    support, query = split_sides(shared, plan)
    if loop.modulator is not None:
        # A split of its own: the inner loop differentiates by `support`, but not through what made the modulation.
        examples = batch.support
        embedded = by_feature(split_sides(shared, plan)[0], plan, tuple(examples.mask.shape))
        loop = loop.modulated(examples.dense, embedded, examples.label, examples.mask)
    if not loop.second_order:
        support = {group: values.detach() for group, values in support.items()}
    fast = Fast()
    support_loss = batch.support.label.new_zeros(batch.num_tasks)
    for step in range(len(loop.rates)):
        fast, loss = _inner_step(model, loop, step, fast, support, batch, plan)
        if step == 0:
            support_loss = loss.detach()
    seen = {group: changed(values, fast.deltas.get(group), plan[group].query_pairs) for group, values in query.items()}
    logits, _ = _forward(model, loop, fast, batch.query, seen, batch, plan, QUERY_PASS)
    return logits, support_loss


def check(
    model: nn.Module, adapted: Adapted, dims: Mapping[str, int], num_numeric: int, modulated: Mapping[str, int]
) -> None:
    """`Unsupported` if this engine cannot adapt the model, found by one forward pass over zeros.

    `dims` is the embedding dimension of each feature, `modulated` the number of units of each modulated layer. Tasks
    and rows get different numbers, so that a model that moves these dimensions is found out.
    """
    leading = (2, 3)
    like = next(model.parameters(), torch.zeros(()))
    modulation = {layer: Modulated(like.new_ones(leading[0], units), None) for layer, units in modulated.items()}
    taped = AdaptedPass(model, adapted.parameters, Fast(), leading, modulation)
    embedded = {name: like.new_zeros(*leading, dim) for name, dim in dims.items()}
    dense = like.new_zeros(*leading, num_numeric)
    with torch.no_grad(), SeededDropout(None), taped:
        model(dense, embedded)
    taped.require_all_seen()


def _inner_step(
    model: nn.Module,
    loop: InnerLoop,
    step: int,
    fast: Fast,
    support: Mapping[str, Tensor],
    batch: TaskBatch,
    plan: Plan,
) -> tuple[Fast, Tensor]:
    """One SGD step of every task on its support: the next state, and the loss [T] before the step."""
    pairs = {group: part.support_pairs for group, part in plan.items() if part.support_pairs is not None}
    seen = {group: changed(values, fast.deltas.get(group), pairs.get(group)) for group, values in support.items()}
    read = {group: _differentiable(seen[group]) for group in pairs}
    logits, taped = _forward(model, loop, fast, batch.support, {**seen, **read}, batch, plan, step + 1)
    with _no_autocast(logits):
        loss = task_mean(loop.loss(logits, batch.support.label), batch.support.mask)
        num_rows = batch.support.mask.sum(-1).clamp(min=1).to(loss.dtype)
        targets = [out for _, out in taped.sites.values()] + list(taped.values.values()) + list(read.values())
        grads: Iterator[Tensor] = iter(
            torch.autograd.grad(
                (loss * (num_rows / (num_rows + loop.prior))).sum(),
                targets,
                create_graph=loop.second_order,
                materialize_grads=True,
                allow_unused=True,
            )
        )
        rates, adapted = -loop.rates[step], loop.adapted
        sites, values, deltas = {}, {}, {}
        for site, (inputs, out) in taped.sites.items():
            gradient = next(grads).reshape(*inputs.shape[:2], out.shape[-1]) * rates[adapted.rate_of(site.name)]
            kept = inputs if loop.second_order else inputs.detach()
            sites[site] = (*fast.sites.get(site, ()), Step(kept, gradient))
        for name, value in taped.values.items():
            values[name] = value + rates[adapted.rate_of(name)] * next(grads)
        for group, selection in pairs.items():
            gradient = next(grads)
            change = rates[0] * product(gradient.reshape(-1, gradient.shape[-1]), selection.transposed)
            deltas[group] = fast.deltas[group] + change if group in fast.deltas else change
    return Fast(sites, values, deltas), loss


def _forward(
    model: nn.Module,
    loop: InnerLoop,
    fast: Fast,
    examples: Examples,
    values: Mapping[str, Tensor],
    batch: TaskBatch,
    plan: Plan,
    pass_number: int,
) -> tuple[Tensor, AdaptedPass]:
    tasks, length = examples.mask.shape
    make_keys = None
    if loop.dropout_key is not None:
        positions = torch.arange(length, device=batch.task_id.device)
        make_keys = partial(row_keys, loop.dropout_key, batch.task_id, pass_number, positions)
    taped = AdaptedPass(model, loop.adapted.parameters, fast, (tasks, length), loop.modulation)
    with SeededDropout(make_keys), taped:
        logits = model(examples.dense, by_feature(values, plan, (tasks, length)))
    taped.require_all_seen()
    return widen(logits), taped


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


class AdaptedPass(TorchFunctionMode):
    """One forward pass in which calls that receive adapted parameters see every task's own values.

    Records what the next inner step differentiates: `sites` (inputs and outputs of linear layers) and `values`
    (element-wise parameters, one per task). `leading` is (T, S); inputs must keep these dimensions first. Linear layers
    named in `modulation` start from every task's own scale and shift, adapted or not.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Sequence[str],
        fast: Fast,
        leading: tuple[int, int],
        modulation: Modulation,
    ) -> None:
        super().__init__()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        owned = [f"{layer}.{kind}" for layer in modulation for kind in ("weight", "bias")]
        self.names = {id(parameters[name]): name for name in (*adapted, *owned) if name in parameters}
        self.adapted, self.modulation = frozenset(adapted), modulation
        self.fast, self.leading = fast, leading
        self.sites: dict[Site, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = list(self._names_in((*args, *kwargs.values())))
        if not found:
            return (_faster(func, *args, **kwargs) or func)(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func in _ELEMENTWISE and len(args) == 2:
            return self._elementwise(func, args, kwargs, found[0])
        out = func(*args, **kwargs)
        if func in _METADATA or (func.__name__ == "__get__" and not isinstance(out, Tensor)):
            return out
        raise Unsupported(found[0], f"{getattr(func, '__name__', func)} receives it")

    def require_all_seen(self) -> None:
        """`Unsupported` naming an adapted parameter that the pass did not meet."""
        for name in self.names.values():
            if name not in self.seen:
                raise Unsupported(name, "the model's forward never uses it")

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
        self.seen.add(name)

    def _require_leading(self, value: Any, name: str) -> None:
        if not isinstance(value, Tensor) or tuple(value.shape[:2]) != self.leading or self._name(value) is not None:
            shape = list(value.shape) if isinstance(value, Tensor) else value
            raise Unsupported(name, f"its input is {shape}, expected a tensor of [T, S, ...] = {list(self.leading)}")

    def _task_value(self, parameter: Tensor, name: str, operand: Tensor) -> Tensor:
        """An element-wise parameter per task, shaped to broadcast against `operand` [T, S, ...]."""
        self._see(name)
        if name not in self.adapted or rate_group(name) in self.modulation:
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

    def _elementwise(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Tensor:
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
        met = Site(self._name(weight), self._name(bias))
        self._require_leading(input, met.name)
        for name in met:
            if name is not None:
                self._see(name)
        if met.weight and met.bias and rate_group(met.weight) != rate_group(met.bias):
            raise Unsupported(met.bias, f"it belongs to another module than its layer's weight {met.weight!r}")
        start = self.modulation.get(rate_group(met.name))
        if start is not None and (met.weight is None or (bias is not None and met.bias is None)):
            raise Unsupported(met.name, "its layer is modulated, and this call has the layer's weight or bias alone")
        site = Site(*(name if name in self.adapted else None for name in met))
        steps = self.fast.sites.get(site, ())
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
        return out.view(*input.shape[:-1], weight.shape[0])


def _faster(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that gives the same and is faster to differentiate twice, if there is one for this call."""
    if func is torch.cat and torch.is_grad_enabled() and len({(p.dtype, p.dim()) for p in args[0]}) == 1:
        return cat if kwargs.keys() <= {"dim"} else None
    return None


def forming_is_cheaper(steps: Sequence[Step], inputs: Tensor, weight: Tensor) -> bool:
    """Whether a task's weight is cheaper formed than applied as a low-rank change, in multiplications per row."""
    num_out, num_in = weight.shape
    rank, num_rows = sum(step.inputs.shape[1] for step in steps), max(inputs.shape[1], 1)
    return rank * (num_in + num_out) > num_in * num_out * (1 + rank / num_rows)


def _modulated(out: Tensor, start: Modulated | None) -> Tensor:
    """A layer's output [T, R, out], or its bias [out], as every task's inner loop starts from it [T, R or 1, out]."""
    if start is None:
        return out
    out = out * start.scale.unsqueeze(1)
    return out if start.shift is None else out + start.shift.unsqueeze(1)


def _low_rank(out: Tensor, inputs: Tensor, site: Site, steps: Sequence[Step]) -> Tensor:
    """The shared layer's output plus the changes of all steps: out [T, R, out], inputs [T, R, in]."""
    one = out.new_ones(())
    for step in steps:
        if site.weight is None:
            out = out + step.gradients.sum(1, keepdim=True)
        else:
            mix = torch.baddbmm(one, inputs, step.inputs.mT, beta=0 if site.bias is None else 1)
            out = torch.baddbmm(out, mix, step.gradients)
    return out


def _formed(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: Site,
    steps: Sequence[Step],
    start: Modulated | None,
) -> Tensor:
    """The layer with every task's own weight [T, out, in] and bias."""
    own = weight.expand(inputs.shape[0], *weight.shape)
    own = own if start is None else own * start.scale.unsqueeze(-1)
    bias = None if bias is None else _modulated(bias, start)
    for step in steps:
        own = torch.baddbmm(own, step.gradients.mT, step.inputs)
        if bias is not None and site.bias is not None:
            bias = bias + step.gradients.sum(1, keepdim=True)
    return torch.bmm(inputs, own.mT) if bias is None else torch.baddbmm(bias, inputs, own.mT)


def _differentiable(value: Tensor) -> Tensor:
    """`value`, as something that `autograd.grad` accepts also where nothing before it requires a gradient."""
    return value if value.requires_grad or not torch.is_grad_enabled() else value.detach().requires_grad_()


def _no_autocast(value: Tensor) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(value.device.type):
        return torch.autocast(value.device.type, enabled=False)
    return nullcontext()
