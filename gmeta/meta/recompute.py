"""An inner step that keeps only its inputs and results, and builds its graph again in the backward pass.

`torch.utils.checkpoint` cannot do this: an inner step calls `autograd.grad`, at which it recomputes and keeps what it
recomputed (measured: more memory than without). The numbers are exactly the same, because nothing in an inner step
draws random numbers: dropout is a hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Sequence[Tensor], bool], Sequence[Tensor]], num_leaves: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.num_leaves = run, num_leaves
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with torch.enable_grad():  # for the inner gradient
            results = run([tensor.detach() for tensor in tensors[num_leaves:]], False)
        return tuple(result.detach() for result in results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        leaves, inputs = ctx.saved_tensors[: ctx.num_leaves], ctx.saved_tensors[ctx.num_leaves :]
        inputs = [value.detach().requires_grad_(value.requires_grad) for value in inputs]
        with torch.enable_grad():
            results = ctx.run(inputs, True)
        everything = (*leaves, *inputs)
        asked = [i for i, value in enumerate(everything) if value.requires_grad]
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        found: list[Tensor | None] = [None] * len(everything)
        if pairs and asked:
            by = [everything[i] for i in asked]
            values = torch.autograd.grad([r for r, _ in pairs], by, [g for _, g in pairs], allow_unused=True)
            for i, value in zip(asked, values, strict=True):
                found[i] = value
        return (None, None, *found)


def recomputed(
    run: Callable[[Sequence[Tensor], bool], Sequence[Tensor]], leaves: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Return the result of `run(inputs, ...)`, differentiable by `inputs` and by `leaves`, the parameters that `run`
    uses by itself.

    `run` takes the inputs, and whether its results must be differentiable.

    Differentiable once; autocast is as it was when this was called.
    """
    device = inputs[0].device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def with_autocast(values: Sequence[Tensor], differentiable: bool) -> Sequence[Tensor]:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return run(values, differentiable)

    return list(_Recomputed.apply(with_autocast, len(leaves), *leaves, *inputs))  # type: ignore[no-untyped-call]
