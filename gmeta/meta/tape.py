"""Record what a function of tensors computes, as a program of torch's own operations, and run it without Python.

An adaptation of one task is several hundred operations of a few microseconds each; the Python between them takes ten
times as long. A tape notes the operations of one run, those of the backward pass too, as a line of TorchScript each.
The program then runs on other numbers of the same shapes. (torch.compile would need a C++ compiler where it serves, and
seconds for each shape.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_DATA_DEPENDENT = {
    torch.Tag.data_dependent_output,  # a number of Python's made from a tensor, as `item` does
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
_WARM_UP = 3
"""Runs after which TorchScript's executor has made its plan."""


class NotRecordable(Exception):
    """Says why a run is no list of operations on its inputs."""


@dataclass(frozen=True)
class Recording:
    """One run: `program(*inputs, *constants)` in TorchScript, and the constants, what it read beside its inputs."""

    source: str
    constants: tuple[Tensor, ...]

    @cached_property
    def digest(self) -> bytes:
        """Return a checksum of all but the constants' values: recordings with equal ones have one program."""
        shapes = [(tuple(constant.shape), constant.dtype) for constant in self.constants]
        return xxhash.xxh3_128_digest(f"{self.source}{shapes}".encode())


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation below autograd. It keeps all tensors, so that no two share an identity."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _DATA_DEPENDENT.isdisjoint(func.tags):
            raise NotRecordable(f"{func} depends on numbers, not only on shapes")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


class _Names:
    """The names of tensors in a program."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [f"i{number}" for number in range(len(inputs))]
        self.constants: list[Tensor] = []
        self._names = dict(zip(map(id, inputs), self.inputs, strict=True))
        self._kept = set(self._names)  # what a program must not change
        self._made = 0

    def new(self, tensor: object) -> str:
        """Name a result."""
        name = f"v{self._made}"
        self._made += 1
        if tensor is not None:
            self._names[id(tensor)] = name
        return name

    def read(self, value: Any) -> str:
        """Write an argument in TorchScript. A tensor that is not known is a constant."""
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self._names[id(value)] = f"c{len(self.constants)}"
                self._kept.add(id(value))
                self.constants.append(value)
            return self._names[id(value)]
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.read, value))}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if isinstance(value, torch.device):
            return f"torch.device('{value}')"
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return str(value)
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        raise NotRecordable(f"a {type(value).__name__} is an argument")

    def known(self, tensor: Tensor) -> str:
        """Return the name of a tensor. Raises `NotRecordable` where it has none."""
        if id(tensor) not in self._names:
            raise NotRecordable("an output is made outside of torch's operations")
        return self._names[id(tensor)]

    def changes_what_is_kept(self, values: Sequence[object]) -> bool:
        """Whether an argument is an input or a constant."""
        return any(id(value) in self._kept for value in values)


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> tuple[Recording, Sequence[Tensor]]:
    """Run `function(*inputs)`; return what it did, and its outputs. Raises `NotRecordable`."""
    with _Tape() as tape:
        outputs = function(*inputs)
    names, lines = _Names(inputs), []
    for op, args, kwargs, out in tape.calls:
        namespace, _, short = op._schema.name.partition("::")
        words = [*map(names.read, args), *(f"{key}={names.read(value)}" for key, value in kwargs.items())]
        if op._schema.is_mutable and names.changes_what_is_kept(tree_flatten((args, kwargs))[0]):
            raise NotRecordable(f"{op} may change an input or a parameter in place")
        call = f"torch.ops.{namespace}.{short}({', '.join(words)})"
        if isinstance(out, list):
            whole = names.new(None)
            lines.append(f"{whole} = {call}")
            lines += [f"{names.new(part)} = {whole}[{place}]" for place, part in enumerate(out)]
        else:
            results = out if isinstance(out, tuple) else (out,)
            lines.append(f"{', '.join([names.new(result) for result in results])} = {call}")
    lines.append(f"return [{', '.join(map(names.known, outputs))}]\n")
    given = [f"{name}: Tensor" for name in (*names.inputs, *(f"c{i}" for i in range(len(names.constants))))]
    source = "\n    ".join([f"def program({', '.join(given)}):", *lines])
    return Recording(source, tuple(constant.detach() for constant in names.constants)), outputs


class Program:
    """Runs a recording's source on inputs and constants of its shapes. Raises `NotRecordable` where it cannot."""

    def __init__(self, recording: Recording, inputs: Sequence[Tensor]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._run: Any = torch.jit.CompilationUnit(recording.source).program
            for _ in range(_WARM_UP):
                self(inputs, recording.constants)
        except RuntimeError as error:
            raise NotRecordable(f"TorchScript refuses ({str(error).strip().splitlines()[-1]})") from error

    def __call__(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the outputs."""
        with torch.no_grad():
            return self._run(*inputs, *constants)  # type: ignore[no-any-return]
