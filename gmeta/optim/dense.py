"""Dense layers: AdamW, the schedule of all learning rates, and clipping by the true global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gmeta.batch import RowGradients
from gmeta.parallel.collectives import all_reduce_sum
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import Traffic


def dense_optimizer(
    module: nn.Module, *, lr: float, inner_lr_lr: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over `module`'s parameters; each group keeps its rate before scheduling as `peak_lr`.

    Weight decay goes to matrices only: not to biases and norm gains (ndim < 2), nor to learned inner rates
    (the parameter `inner_lr`), which have a rate of their own.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    rates = [p for name, p in named if name.rsplit(".", 1)[-1] == "inner_lr"]
    others = [p for name, p in named if name.rsplit(".", 1)[-1] != "inner_lr"]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "peak_lr": lr, "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "peak_lr": lr, "lr": lr, "weight_decay": 0.0},
        {"params": rates, "peak_lr": inner_lr_lr, "lr": inner_lr_lr, "weight_decay": 0.0},
    ]
    # fused: 3 to 8 times as fast as the default on CPU (measured: 345 k parameters 0.3 ms against 2.2), and it can be
    # told on the device to change nothing (`found_inf`)
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def lr_scale(step: int, warmup_steps: int, total_steps: int, decay: str) -> float:
    """Factor of every learning rate at `step` (0-based): linear warm-up, then none, linear or cosine decay.

    The first step has 1 / warmup_steps. Decay would reach 0 one step after the last, so that no step is wasted.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if decay == "linear":
        return 1.0 - progress
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if decay == "none":
        return 1.0
    raise ValueError(f"decay is {decay!r}: must be none, linear or cosine")


def global_norm(
    dense: list[Tensor], rows: Mapping[str, RowGradients], mesh: Mesh, traffic: Traffic | None = None
) -> Tensor:
    """Euclidean norm of the whole gradient, float64 [] on the device; collective, the same number on every rank.

    dense: replicated gradients, already summed over ranks, hence counted once. rows: each rank's own rows, merged,
    added up over ranks; the AllReduce is counted in `traffic`. Squares are summed in float64.
    """
    total = all_reduce_sum(_square_sum([found.grad for found in rows.values()], mesh), mesh, traffic)
    return (total + _square_sum(dense, mesh)).sqrt()


def _square_sum(tensors: list[Tensor], mesh: Mesh) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=mesh.device)
    # no float64 copy of a gradient is made (measured, one core, 345 k parameters: 0.3 ms, with copies 2.0)
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square().sum()


def clip_scale(norm: Tensor, clip_norm: float) -> Tensor:
    """Factor [] that brings a gradient of length `norm` [] down to `clip_norm` > 0; 1 where it is shorter."""
    return (clip_norm / norm).clamp(max=1.0)


def dense_step(
    optimizer: torch.optim.AdamW, *, lr_scale: float = 1.0, grad_scale: Tensor | None = None, ok: Tensor | None = None
) -> None:
    """One update of every dense parameter; its gradient is zero afterwards.

    lr_scale: factor of the schedule; grad_scale: factor [] of gradient clipping. ok: bool [] that the host has not
    read; where it is False nothing changes, neither parameters nor moments nor step counts.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_scale
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if grad_scale is not None and gradients:
            torch._foreach_mul_(gradients, grad_scale.to(gradients[0].dtype))
    optimizer.found_inf = None if ok is None else (~ok).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
