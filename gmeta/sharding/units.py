"""Which parameters are gathered together: the units of a module, and the checks made before any of it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gmeta.sharding.flat_parameters import FlatParameter, raw
from gmeta.sharding.ring import Ring
from gmeta.sharding.strategy import ShardingStrategy, ShardScope

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes an optimizer from named parameters, such as `partial(torch.optim.AdamW, lr=1e-3)`. On every rank it gets all
that are trained, by the module's names and in its order. While it runs they show the shapes of the module's parameters,
so that it may sort by shape; what is updated later are one-dimensional partitions, empty where the rank has none.
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
    materialise: Callable[[nn.Module], None] = lambda _: None,
) -> list[Unit]:
    """Return the units of `module` in its own order, the root last.

    `materialise` is called with every submodule, in order. A unit is sharded as soon as its parameters are there.
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
    flats: dict[nn.Module, list[FlatParameter]] = {}
    completed = _completed(module, members)
    for child in module.modules():
        materialise(child)
        for owner in completed.get(child, ()):
            flats[owner] = [make_flat(part, strategy) for part, strategy in _parts(members[owner], strategies)]
    units = [Unit(names[owner], owner, flat, owner is module) for owner, flat in flats.items()]
    order = {name: number for number, name in enumerate(names.values())}
    return sorted(units, key=lambda unit: (unit.root, order[unit.name]))


def _completed(
    module: nn.Module, members: Mapping[nn.Module, Sequence[tuple[str, nn.Parameter]]]
) -> dict[nn.Module, list[nn.Module]]:
    """Return the units whose last parameter is in a submodule, by submodule."""
    units = {param: owner for owner, found in members.items() for _, param in found}
    last = {owner: owner for owner in members}
    for child in module.modules():
        last |= {units[param]: child for param in child.parameters(recurse=False)}
    found: dict[nn.Module, list[nn.Module]] = {}
    for owner, child in last.items():
        found.setdefault(child, []).append(owner)
    return found


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
    """Copy the first rank's parameters and buffers to all ranks, but for those on the meta device."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            broadcast_tensor(tensor, everyone)


def broadcast_tensor(tensor: Tensor, everyone: Ring) -> None:
    """Copy the first rank's tensor to all ranks."""
    if everyone.size == 1:
        return
    with torch.no_grad():
        value = tensor.detach().contiguous()
        dist.broadcast(raw(value), src=everyone.ranks[0], group=everyone.group)
        tensor.copy_(value)


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
