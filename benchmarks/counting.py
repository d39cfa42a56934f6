"""What a step does, counted: operations of matrix products, bytes of operators; and the machine's rate of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import alternate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Work:
    """What one step does."""

    operations: int  # of matrix products: two for each multiplication
    bytes: int  # read and written
    peak_memory: int  # of the device; 0 on the CPU


def count(step: Callable[[], object], device: torch.device) -> Work:
    """Count what one step does. The step runs four times. What other threads do meanwhile is not counted."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    with FlopCounterMode(display=False) as operations:
        step()
    with Traffic() as traffic:
        step()
    return Work(operations.get_total_flops(), traffic.bytes, memory)


class Traffic(TorchDispatchMode):
    """The bytes that operators read and write, each as a kernel of its own. Of a table, only the rows that are touched
    count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written, read = _bytes(out), _bytes((args, kwargs))
        if func.is_view or name in ("detach", "empty", "empty_like", "empty_strided"):
            return out
        if name in ("index_select", "index", "embedding"):
            read = written
        elif name.startswith("_embedding_bag"):
            read = args[1].numel() * args[0].shape[1] * args[0].element_size()
        elif name in ("index_copy_", "index_put_"):
            read, written = _bytes(args[1:]), _bytes(args[-1])
        elif out is None:  # _foreach_ and _fused_, in place
            written = _bytes(args[0])
        self.bytes += read + written
        return out


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def waited(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Run the step and, on a CUDA device, wait for its end."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def peaks(
    device: torch.device, size: int, repetitions: int, precisions: Sequence[str] = PRECISIONS
) -> dict[str, float]:
    """Return the bytes/s of a copy of size^2 float32, and the operations/s of products of two such matrices in each
    precision.
    """
    a, b = torch.randn(2, size, size, device=device)
    steps: dict[str, Callable[[], Tensor]] = {"bytes": lambda: b.copy_(a)}
    for name in precisions:

        def product(name: str = name) -> Tensor:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
                return a @ b

        steps[name] = product
    times = alternate({name: waited(step, device) for name, step in steps.items()}, repetitions)
    work = dict.fromkeys(precisions, 2.0 * size**3) | {"bytes": 2.0 * a.numel() * a.element_size()}
    return {name: work[name] / min(seconds) for name, seconds in times.items()}
