"""Optimizers over partitions: how one is made, the trial that it must pass, and what its groups keep.

A factory sorts parameters into groups, often by shape ("decay what has two dimensions"). So partitions show the shape
of the whole parameter while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmeta.sharding.flat_parameters import FlatParameter
from gmeta.sharding.hierarchy import HierarchicalCollectives
from gmeta.sharding.muon import MatrixExchange, Muon
from gmeta.sharding.units import OptimizerFactory

_CURE = "it must be element-wise, such as AdamW, SGD, RMSprop or Adagrad, or gmeta.sharding.muon.Muon"
_TRIAL_RATES = (None, 1e-2, 1.0)
"""Learning rates of the trial. None is the factory's own, which may be 0 while it warms up."""
_TRIAL_SCALES = (1.0, 30.0, 0.03)
"""Sizes of the trial's gradients in its three steps, because some optimizers shorten large ones."""
_TRIAL_TOLERANCE = 1e-6
"""How far updates may differ, relative to the largest. Rounding is 1e-10 at a learning rate of 1e-6."""


class _Whole(nn.Parameter):
    """A partition that shows the shape of the whole parameter."""

    whole: torch.Size

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Return the whole parameter's shape."""
        return self.whole

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Return the whole parameter's number of dimensions."""
        return len(self.whole)

    def dim(self) -> int:
        """Return the whole parameter's number of dimensions."""
        return len(self.whole)

    def size(self, dim: int | None = None) -> Any:
        """Return the whole parameter's shape, or one dimension of it."""
        return self.whole if dim is None else self.whole[dim]

    def numel(self) -> int:
        """Return the whole parameter's number of elements."""
        return math.prod(self.whole)

    nelement = numel


@contextmanager
def _showing(wholes: Sequence[torch.Size], partitions: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have partitions show the shapes of whole parameters inside the block."""
    for partition, whole in zip(partitions, wholes, strict=True):
        partition.__class__ = _Whole
        partition.whole = whole  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for partition in partitions:
            partition.__class__ = nn.Parameter
            del partition.whole  # type: ignore[attr-defined]


def _make(
    factory: OptimizerFactory, names: Sequence[str], wholes: Sequence[torch.Size], partitions: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    with _showing(wholes, partitions):
        return factory(list(zip(names, partitions, strict=True)))


def make_optimizer(
    factory: OptimizerFactory, module: nn.Module, trained: Sequence[FlatParameter], hierarchy: HierarchicalCollectives
) -> torch.optim.Optimizer:
    """Make an optimizer of this rank's partitions of trained parameters, which come in the order of `module`.

    Those of which it has nothing are there too, empty, so that all ranks have the same groups and schedules. `Muon`
    gets what brings its matrices together, over the groups of `hierarchy`.
    """
    device = hierarchy.rings.helper.device
    places = {name: place for place, (name, _) in enumerate(module.named_parameters())}
    spans = sorted((span for flat in trained for span in flat.spans), key=lambda span: places[span.name])
    held = {partition.name: partition.tensor for flat in trained for partition in flat.partitions}
    tensors = [held[s.name] if s.name in held else nn.Parameter(torch.empty(0, device=device)) for s in spans]
    if not spans:  # nothing is trained, and an optimizer needs something
        return factory([("none", nn.Parameter(torch.empty(0, device=device)))])
    optimizer = _make(factory, [span.name for span in spans], [span.shape for span in spans], tensors)
    if isinstance(optimizer, Muon):
        optimizer.bind(MatrixExchange(trained, hierarchy), {t: s.name for t, s in zip(tensors, spans, strict=True)})
    return optimizer


# The trial


def require_element_wise(module: nn.Module, factory: OptimizerFactory, device: torch.device) -> None:
    """Raise ValueError unless the optimizer treats elements one by one, so that a partition can be updated alone; what
    `Muon` orthogonalises is no concern here.

    It is tried on small tensors, once unsharded and once in two parts, in the place of a parameter of each group and
    number of dimensions. The updates of three steps are compared in float64, relative to their own size.
    """
    if not callable(factory):
        raise ValueError(
            f"the optimizer is a {type(factory).__name__} already: give what makes one from named parameters, such as "
            "partial(torch.optim.AdamW, lr=1e-3)"
        )
    trained = [(name, param.shape) for name, param in module.named_parameters() if param.requires_grad]
    if not trained:
        return
    trial = _Trial(factory, [name for name, _ in trained], [shape for _, shape in trained], device)
    with _refusing():
        optimizer, params = trial.optimizer()
    whole = optimizer.shapes if isinstance(optimizer, Muon) else {}  # these are brought together for an update
    for places in trial.kinds(optimizer, params):
        for rate in _TRIAL_RATES if params[places[0]] not in whole else ():
            _try_in_parts(trial, places[0], rate)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise ValueError(
            f"the optimizer cannot update parts of parameters ({type(error).__name__}: {error}): {_CURE}"
        ) from error


@dataclass(frozen=True)
class _Trial:
    """Optimizers as a factory makes them for a module's trained parameters, of which all but one are empty."""

    factory: OptimizerFactory
    names: Sequence[str]
    shapes: Sequence[torch.Size]
    device: torch.device

    def optimizer(self, values: Mapping[int, Tensor] | None = None) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """Return an optimizer and its parameters, which have `values` at their places."""
        empty = torch.empty(0, dtype=torch.float64, device=self.device)
        params = [nn.Parameter((values or {}).get(place, empty).clone()) for place in range(len(self.names))]
        return _make(self.factory, self.names, self.shapes, params), params

    def kinds(self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> list[list[int]]:
        """Return the places of parameters, by group and number of dimensions."""
        group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        found: dict[tuple[int, int], list[int]] = {}
        for place, param in enumerate(params):
            if id(param) in group_of:
                found.setdefault((group_of[id(param)], len(self.shapes[place])), []).append(place)
        return list(found.values())


def _try_in_parts(trial: _Trial, place: int, rate: float | None) -> None:
    ndim = len(trial.shapes[place])
    shape = torch.Size((2,) * (ndim - 1) + (12,)) if ndim else torch.Size(())
    draws = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, dtype=torch.float64, generator=draws).to(trial.device) for _ in range(4))
    gradients = [gradient * scale for gradient, scale in zip(gradients, _TRIAL_SCALES, strict=True)]
    cut = shape.numel() * 5 // 12
    with _refusing():
        unsharded = _update(trial, place, start, gradients, rate)
        parts = [
            _update(trial, place, start.flatten()[part], [g.flatten()[part] for g in gradients], rate)
            for part in (slice(0, cut), slice(cut, None))
            if start.flatten()[part].numel()
        ]
    differs = (unsharded.flatten() - torch.cat(parts)).abs().max()
    if not differs <= _TRIAL_TOLERANCE * unsharded.abs().max():
        raise ValueError(
            f"the optimizer updates part of {trial.names[place]} otherwise than the whole (as LAMB, Adafactor and Muon "
            f"do): {_CURE}"
        )


def _update(trial: _Trial, place: int, start: Tensor, gradients: Sequence[Tensor], rate: float | None) -> Tensor:
    """Return by how much `start`, all or part of the parameter at `place`, moves with `gradients`."""
    optimizer, params = trial.optimizer({place: start})
    for group in optimizer.param_groups:
        if rate is not None and "lr" in group:
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    for gradient in gradients:
        params[place].grad = gradient.clone()
        optimizer.step()
    return params[place].detach() - start


# What an optimizer keeps


def state_bytes_of_element(module: nn.Module, factory: OptimizerFactory, device: torch.device) -> float:
    """Return the bytes of optimizer state for an element that is trained, the mean over all, by a step on small
    tensors.
    """
    trained = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    if not trained:
        return 0.0
    trial = _Trial(factory, [name for name, _ in trained], [param.shape for _, param in trained], device)
    total = 0.0
    for places in trial.kinds(*trial.optimizer()):
        ndim, dtype = len(trial.shapes[places[0]]), trained[places[0]][1].dtype
        small = torch.zeros((2,) * (ndim - 1) + (32,) if ndim else (), dtype=dtype, device=device)
        optimizer, params = trial.optimizer({places[0]: small})
        params[places[0]].grad = small
        optimizer.step()
        total += state_bytes(optimizer) / small.numel() * sum(trained[place][1].numel() for place in places)
    return total / max(1, sum(param.numel() for _, param in trained))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the state's tensors, but for single numbers."""
    tensors = (value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim)


def group_numbers(optimizer: torch.optim.Optimizer) -> list[tuple[int, str]]:
    """Return (group, option) for every number, or tuple of numbers, that the optimizer's groups have, such as rates.

    Called right after the optimizer was made, it leaves out what schedules add: they make that again.
    """
    return [
        (number, key)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
        and (_is_number(value) or (isinstance(value, tuple) and value and all(map(_is_number, value))))
    ]


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_groups(optimizer: torch.optim.Optimizer, numbers: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
    """Return the present values as `optimizer.param_groups.GROUP.OPTION`, each float64 [numbers of the option]."""
    found = {}
    for number, key in numbers:
        value = optimizer.param_groups[number][key]
        values = [float(part) for part in (value if isinstance(value, tuple) else (value,))]
        found[f"optimizer.param_groups.{number}.{key}"] = torch.tensor(values, dtype=torch.float64)
    return found


def write_groups(
    optimizer: torch.optim.Optimizer, numbers: Sequence[tuple[int, str]], values: Mapping[str, Tensor]
) -> None:
    """Set the options of all groups to `values`, of the form that `read_groups` returns."""
    for number, key in numbers:
        group = optimizer.param_groups[number]
        loaded = values[f"optimizer.param_groups.{number}.{key}"].tolist()
        old = group[key]
        if isinstance(old, Tensor):
            old.fill_(loaded[0])
        elif isinstance(old, tuple):
            group[key] = tuple(type(part)(value) for part, value in zip(old, loaded, strict=True))
        else:
            group[key] = type(old)(loaded[0])
