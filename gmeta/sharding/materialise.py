"""What a module must be like to be sharded, and models on the meta device, which are allocated unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy
from torch.utils import swap_tensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gmeta.sharding.ring import Ring
from gmeta.sharding.units import broadcast_tensor

Init = Callable[[nn.Module], Any]
"""Fills the parameters and buffers of one module, without those of modules inside it."""


def device_of(module: nn.Module, mesh: DeviceMesh | None) -> torch.device:
    """Return where the module's parameters are or, for a module on the meta device, where they will be: on this
    process's device of the mesh's type.
    """
    for param in module.parameters():
        if not param.is_meta:
            return param.device
    if mesh is None or mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def require_shardable(module: nn.Module, device: torch.device, init: Init | None) -> None:
    """Raise ValueError for parameters that cannot lie in a flat buffer, and for those on the meta device that nothing
    would fill.
    """
    for name, param in module.named_parameters():
        fault = _fault(param, device)
        if fault is not None:
            raise ValueError(f"parameter {name} {fault}")
    for prefix, child in module.named_modules():
        own = _own_tensors(child)
        on_meta = [name for name, tensor in own.items() if tensor.is_meta]
        called = prefix or "the module itself"
        if on_meta and len(on_meta) < len(own):
            raise ValueError(f"{called} has {on_meta[0]} on the meta device and others not: put all of them there")
        if on_meta and init is None and not callable(getattr(child, "reset_parameters", None)):
            raise ValueError(
                f"{called} ({type(child).__name__}) is on the meta device and has no reset_parameters(): give what "
                "fills one module, such as init=model._init_weights"
            )


def _fault(param: Tensor, device: torch.device) -> str | None:
    """Say what keeps a parameter from being sharded; None where nothing does."""
    if is_lazy(param):
        return "has no shape yet: call the module once"
    if is_traceable_wrapper_subclass(param):
        return f"is a {type(param).__name__}, which others have sharded or encoded: give plain tensors"
    if param.layout != torch.strided:
        return f"has the layout {param.layout}: make it dense, or keep it out of the module"
    if not param.is_meta and torch._debug_has_internal_overlap(param) == 1:
        return "has elements that share memory, as after expand(): make a copy of it, with clone()"
    if not param.is_meta and param.device != device:
        return f"is on {param.device} and others on {device}: put them on one device"
    return None


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def materialiser(
    module: nn.Module, device: torch.device, init: Init | None, everyone: Ring
) -> Callable[[nn.Module], None]:
    """Return what allocates and fills one submodule, if it is on the meta device, as the first rank fills it."""
    on_meta = {
        child: name
        for name, child in module.named_modules()
        if any(tensor.is_meta for tensor in _own_tensors(child).values())
    }

    def materialise(child: nn.Module) -> None:
        if child in on_meta:
            _materialise(child, on_meta[child], device, init, everyone)

    return materialise


def _materialise(child: nn.Module, prefix: str, device: torch.device, init: Init | None, everyone: Ring) -> None:
    for tensor in _own_tensors(child).values():
        if tensor.is_meta:  # a tied weight may be there already
            _allocate(tensor, device)
    fill: Any = child.reset_parameters if init is None else partial(init, child)
    fill()
    for name, tensor in _own_tensors(child).items():
        if _can_be_nan(tensor) and bool(tensor.detach().isnan().any()):
            raise ValueError(
                f"{name} of {prefix or 'the module itself'} is not filled by "
                f"{'its reset_parameters()' if init is None else 'init'}: give an init that fills it"
            )
        broadcast_tensor(tensor, everyone)


def _allocate(tensor: Tensor, device: torch.device) -> None:
    """Give a tensor on the meta device memory, in place, filled with NaN where that shows what nobody fills."""
    real = torch.empty_like(tensor, device=device, requires_grad=False)
    real.fill_(float("nan")) if _can_be_nan(real) else real.zero_()
    made = torch.Tensor._make_subclass(type(tensor), real, tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    swap_tensors(tensor, made)  # type: ignore[no-untyped-call]


def _can_be_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1
