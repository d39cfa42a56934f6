"""Losses of single examples, the predictions that go with them, and the mean over the examples of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gmeta.core.batch import Examples

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


def several_losses(names: Sequence[str], weights: Sequence[float]) -> ExampleLoss:
    """Return the losses of K labels: (logits [..., K], label [..., K]) -> [..., K], times `weights`; finite where a
    label is NaN.
    """
    losses = [example_loss(name) for name in names]

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        label = label.nan_to_num(0.0)
        found = [of(logits[..., k], label[..., k]) * weights[k] for k, of in enumerate(losses)]
        return torch.stack(found, -1)

    return loss


def prediction(name: str) -> Callable[[Tensor], Tensor]:
    """Return how a model trained with the loss `name` predicts: as a probability for bce, else the logit itself."""
    _require_known(name)
    return torch.sigmoid if name == "bce" else lambda logits: logits


def predictions(names: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """Return how a model predicts that was trained with these losses, one a label: logits [...], or [..., K] of several
    labels, become what `prediction` makes of each.
    """
    if len(names) == 1:
        return prediction(names[0])
    found = [prediction(name) for name in names]
    return lambda logits: torch.stack([of(logits[..., k]) for k, of in enumerate(found)], -1)


def counts_of(examples: Examples) -> Tensor:
    """Return how much each example counts, [T, S]: its weight, 0 on padding; or the mask, where examples have none.

    Of several labels [T, S, K]: it counts 0 for a label that it lacks.
    """
    mask, weight = examples.mask, examples.weight
    if examples.label.dim() > mask.dim():
        mask = mask.unsqueeze(-1) & ~examples.label.isnan()
        weight = None if weight is None else weight.unsqueeze(-1)
    return mask if weight is None else torch.where(mask, weight, 0)


def over_labels(means: Tensor) -> Tensor:
    """Return the loss of each task, [T], from its mean loss [T], or from those of its labels [T, K]: their sum."""
    return means if means.dim() == 1 else means.sum(-1)


def task_mean(loss: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over each task's examples: [T, S], `counts_of` them [T, S] -> [T]; it is 0 for a task without
    any, and for one whose weights are all 0. Of several labels: [T, S, K] -> [T, K].
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
