"""Losses of single examples, the predictions that go with them, and the mean over the examples of a task."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ExampleLoss = Callable[[Tensor, Tensor], Tensor]

_LOSSES: dict[str, ExampleLoss] = {
    "bce": lambda logits, label: F.binary_cross_entropy_with_logits(logits, label, reduction="none"),
    "mse": lambda logits, label: F.mse_loss(logits, label, reduction="none"),
    "l1": lambda logits, label: F.l1_loss(logits, label, reduction="none"),
    "huber": lambda logits, label: F.huber_loss(logits, label, reduction="none"),
}


def example_loss(name: str) -> ExampleLoss:
    """Return the loss called `name`: (logits [...], label [...]) -> [...], in at least float32.

    bce takes logits; huber has delta 1. Raises ValueError for an unknown name.
    """
    _require_known(name)
    loss = _LOSSES[name]
    return lambda logits, label: loss(widen(logits), label)


def prediction(name: str) -> Callable[[Tensor], Tensor]:
    """Return how a model trained with the loss `name` predicts: as a probability for bce, else the logit itself."""
    _require_known(name)
    return torch.sigmoid if name == "bce" else lambda logits: logits


def counts_of(mask: Tensor, weight: Tensor | None) -> Tensor:
    """Return how much each example counts, [T, S]: its weight, 0 on padding; or the mask, where examples have none."""
    return mask if weight is None else torch.where(mask, weight, 0)


def task_mean(loss: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over each task's examples: [T, S], `counts_of` them [T, S] -> [T]; it is 0 for a task without
    any, and for one whose weights are all 0.
    """
    if counts.dtype == torch.bool:
        return torch.where(counts, loss, 0).sum(1) / counts.sum(1).clamp(min=1)
    total = counts.sum(1)
    return torch.where(counts > 0, loss * counts, 0).sum(1) / torch.where(total > 0, total, 1)


def widen(values: Tensor) -> Tensor:
    """Turn half precision into float32, and leave wider types as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _require_known(name: str) -> None:
    if name not in _LOSSES:
        raise ValueError(f"loss is {name!r}: must be one of {', '.join(_LOSSES)}")
