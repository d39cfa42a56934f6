"""Dense layers: AdamW, the schedule of all learning rates, and clipping by the true global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

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
    return torch.optim.AdamW([group for group in groups if group["params"]])


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
    dense: Iterable[Tensor], rows: Mapping[str, RowGradients], mesh: Mesh, traffic: Traffic | None = None
) -> float:
    """Euclidean norm of the whole gradient; collective, the same number on every rank.

    dense: replicated gradients, already summed over ranks, hence counted once. rows: each rank's own rows, merged,
    added up over ranks; the AllReduce is counted in `traffic`. Squares are summed in float64.
    """
    mine = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for found in rows.values():
        mine += found.grad.double().square().sum()
    total = all_reduce_sum(mine, mesh, traffic)
    for grad in dense:
        total = total + grad.double().square().sum()
    return float(total.sqrt())


def clip_scale(norm: float, clip_norm: float) -> float:
    """Factor that brings a gradient of length `norm` down to `clip_norm`; 1 where it is shorter or clip_norm is 0."""
    return clip_norm / norm if 0 < clip_norm < norm else 1.0
