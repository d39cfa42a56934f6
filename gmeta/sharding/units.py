"""Which parameters are gathered together: the units of a module, and the checks made before any of it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gmeta.sharding.flat_parameters import FlatParameter, Partition
from gmeta.sharding.ring import Ring
from gmeta.sharding.strategy import ShardingStrategy, ShardScope

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes an optimizer from named parameters, such as `partial(torch.optim.AdamW, lr=1e-3)`. It gets one-dimensional
partitions of the module's parameters under the names that those have; the list is empty on a rank that updates nothing.
"""
T = TypeVar("T")
MakeFlatParameter = Callable[[Sequence[tuple[str, nn.Parameter]], ShardingStrategy], FlatParameter]


@dataclass(frozen=True)
class StepResult:
    """What an engine's `step` did."""

    grad_norm: float  # of the full gradient, before clipping
    finite: bool  # False: a gradient was not finite on some rank, and no rank changed anything


def clipped_scale(norm: float, clip_norm: float | None, grad_scale: float) -> float:
    """Return the factor of a gradient: `grad_scale`, less where its `norm`, scaled already, is above `clip_norm`."""
    return grad_scale * min(1.0, clip_norm / norm) if clip_norm and norm > 0 else grad_scale


@dataclass(eq=False)
class Unit:
    """A submodule whose parameters, except those of units inside it, are gathered and freed together."""

    name: str
    module: nn.Module
    flat_parameters: list[FlatParameter]
    root: bool = False  # the module itself, with all that no other unit has; stays until the end of backward

    @property
    def scopes(self) -> list[ShardScope]:
        """Return the scopes from which the unit is gathered."""
        return list(dict.fromkeys(flat.strategy.params for flat in self.flat_parameters if flat.strategy.params != "N"))

    def start_unshard(self, scope: ShardScope | None = None) -> None:
        """Start to gather the parameters of the unit, those of one scope or all."""
        for flat in self.flat_parameters:
            if scope in (None, flat.strategy.params):
                flat.start_unshard()

    def reshard(self) -> None:
        """Free what was gathered."""
        for flat in self.flat_parameters:
            flat.reshard()


def make_units(
    module: nn.Module,
    given: Sequence[nn.Module] | None,
    strategies: Mapping[str, ShardingStrategy],
    make_flat: MakeFlatParameter,
) -> list[Unit]:
    """Return the units of `module` in its own order, the root last.

    ValueError where a given unit is no submodule, where one parameter belongs to several units, or where the name of a
    strategy fits no parameter.
    """
    names = {child: name for name, child in module.named_modules()}
    chosen = list(default_units(module)) if given is None else list(given)
    for unit in chosen:
        if unit not in names:
            raise ValueError(f"a unit of type {type(unit).__name__} is no part of the module: give its submodules")
    for prefix in filter(None, strategies):
        if not any(name == prefix or name.startswith(f"{prefix}.") for name, _ in module.named_parameters()):
            raise ValueError(f"sharding for {prefix!r}: no parameter has a name that begins with it")
    inside = dict.fromkeys(unit for unit in chosen if unit is not module)  # ordered, as on all other ranks
    owners: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    members: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {module: [], **{unit: [] for unit in inside}}
    for name, param, unit in _owned(module, inside):
        if param in owners:
            other, owner = owners[param]
            if owner is not unit:
                raise ValueError(
                    f"{other} and {name} are one parameter in two units, {_called(names[owner])} and "
                    f"{_called(names[unit])}: name units that hold both, or none of them (units=...)"
                )
            continue
        owners[param] = name, unit
        members[unit].append((name, param))
    units = [
        Unit(
            names[owner],
            owner,
            [make_flat(part, strategy) for part, strategy in _parts(found, strategies)],
            owner is module,
        )
        for owner, found in members.items()
    ]
    order = {name: number for number, name in enumerate(names.values())}
    return sorted(units, key=lambda unit: (unit.root, order[unit.name]))


def _called(name: str) -> str:
    return name or "the module itself"


def default_units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost items of ModuleLists and Sequentials that have parameters."""
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from default_units(child)


def _owned(module: nn.Module, units: Container[nn.Module]) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield every (name, parameter, innermost unit); a shared parameter comes as often as it occurs."""

    def walk(child: nn.Module, prefix: str, unit: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
        unit = child if child in units else unit
        for name, param in child.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + name, param, unit
        for name, grandchild in child.named_children():
            yield from walk(grandchild, f"{prefix}{name}.", unit)

    yield from walk(module, "", module)


def _parts(
    members: Sequence[tuple[str, nn.Parameter]], strategies: Mapping[str, ShardingStrategy]
) -> Iterator[tuple[list[tuple[str, nn.Parameter]], ShardingStrategy]]:
    """Split members into groups of one strategy and one dtype that are all trained or all frozen."""
    found: dict[tuple[ShardingStrategy, torch.dtype, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, param in members:
        strategy = of_longest_prefix(name, strategies) or ShardingStrategy("N", "N", "N")
        found.setdefault((strategy, param.dtype, param.requires_grad), []).append((name, param))
    for (strategy, _, _), part in found.items():
        yield part, strategy


def of_longest_prefix(name: str, strategies: Mapping[str, T]) -> T | None:
    """Return the value for a parameter, by the longest of the names that it has or is inside; None where no name
    fits.
    """
    prefixes = [p for p in strategies if not p or name == p or name.startswith(f"{p}.")]
    return strategies[max(prefixes, key=len)] if prefixes else None


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def broadcast_module(module: nn.Module, everyone: Ring) -> None:
    """Copy the first rank's parameters and buffers to all ranks."""
    if everyone.size == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=everyone.ranks[0], group=everyone.group)
            tensor.copy_(value)


def require_element_wise(module: nn.Module, factory: OptimizerFactory) -> None:
    """Raise ValueError unless the optimizer treats elements one by one, so that a partition can be updated alone.

    It is tried on small tensors, once unsharded and once in two parts, under the name of a parameter of each number of
    dimensions, because factories often tell matrices from the rest.
    """
    if not callable(factory):
        raise ValueError(
            f"the optimizer is a {type(factory).__name__} already: give what makes one from named parameters, such as "
            "partial(torch.optim.AdamW, lr=1e-3)"
        )
    kinds = {param.ndim: (name, param) for name, param in module.named_parameters() if param.requires_grad}
    for name, like in kinds.values():
        _try_in_parts(name, like, factory)


def _try_in_parts(name: str, like: Tensor, factory: OptimizerFactory) -> None:
    draws = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 6, dtype=torch.float64, generator=draws).to(like) for _ in range(3))
    try:
        unsharded = _updated(factory, name, start, gradients)
        parts = [
            _updated(factory, name, start.flatten()[part], [gradient.flatten()[part] for gradient in gradients])
            for part in (slice(0, 10), slice(10, 24))
        ]
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"the optimizer cannot update parts of parameters ({type(error).__name__}: {error}): {_CURE}"
        ) from error
    if not torch.allclose(unsharded.flatten(), torch.cat(parts), rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"the optimizer updates part of a parameter otherwise than the whole (as LAMB or Adafactor do): {_CURE}"
        )


_CURE = "it must be element-wise, such as AdamW, SGD, RMSprop or Adagrad"


def _updated(
    factory: OptimizerFactory,
    name: str,
    start: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    param = nn.Parameter(start.clone())
    optimizer = factory([(name, param)])
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach()


class Leave(torch.autograd.Function):
    """The identity, which calls `left` when backward has come this far."""

    @staticmethod
    def forward(ctx: Any, left: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return `tensors`."""
        ctx.left = left
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return `grads`, after calling `left`."""
        ctx.left()
        return None, *grads


def cast(dtype: torch.dtype, value: Any) -> Any:
    """Return a floating tensor in `dtype`; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def make_optimizer(
    factory: OptimizerFactory, partitions: Sequence[Partition], module: nn.Module
) -> torch.optim.Optimizer:
    """Make an optimizer, also where this rank updates nothing, because schedules change rates on every rank."""
    if partitions:
        return factory([(partition.name, partition.tensor) for partition in partitions])
    name, like = next(iter(module.named_parameters()), ("none", torch.empty(0)))
    return factory([(name, nn.Parameter(torch.empty(0, device=like.device)))])
