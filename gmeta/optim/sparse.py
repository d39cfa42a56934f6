"""Row-wise optimizers: rows that took part in a step get exactly one update, all others stay as they are.

Each update is a function (rows, gradients, state) -> (rows, state) of the touched rows only; the state tensors
live beside the rows and are made by `gmeta.embedding.table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from gmeta.batch import RowGradients

BETAS = (0.9, 0.999)
EPS = 1e-8

State = dict[str, Tensor]


def sgd(rows: Tensor, grad: Tensor, state: State, lr: float) -> tuple[Tensor, State]:
    """x - lr g."""
    return rows - lr * grad, state


def rowwise_adagrad(rows: Tensor, grad: Tensor, state: State, lr: float) -> tuple[Tensor, State]:
    """Adagrad (Duchi et al., 2011) with one accumulator a row, the sum of mean(g^2) (arXiv 2104.05158)."""
    total = state["sum_squares"] + grad.square().mean(1)
    return rows - lr * grad / (total.sqrt() + EPS)[:, None], {"sum_squares": total}


def lazy_adam(rows: Tensor, grad: Tensor, state: State, lr: float) -> tuple[Tensor, State]:
    """Adam (Kingma and Ba, arXiv 1412.6980) on each row's own sequence of steps.

    Moments of a row decay, and its bias correction counts, only when it takes part: an untouched row neither
    moves nor ages.
    """
    steps = state["steps"] + 1
    first = BETAS[0] * state["exp_avg"] + (1 - BETAS[0]) * grad
    second = BETAS[1] * state["exp_avg_sq"] + (1 - BETAS[1]) * grad.square()
    count = steps.to(torch.float64)[:, None]
    unbiased_first = first / (1 - BETAS[0] ** count).to(first.dtype)
    unbiased_second = second / (1 - BETAS[1] ** count).to(second.dtype)
    rows = rows - lr * unbiased_first / (unbiased_second.sqrt() + EPS)
    return rows, {"exp_avg": first, "exp_avg_sq": second, "steps": steps}


UPDATES = {"sgd": sgd, "rowwise_adagrad": rowwise_adagrad, "adam": lazy_adam}


class Rows(Protocol):
    """A worker's rows of one group and their optimizer state (`embedding.table.TableGroup`)."""

    @property
    def weight(self) -> Tensor:
        """[local rows, d]."""

    @property
    def state(self) -> State:
        """Per-row state, first axis as in `weight`."""


class Tables(Protocol):
    """What the optimizer needs to see of `embedding.table.ShardedTables`."""

    @property
    def groups(self) -> Mapping[str, Rows]:
        """Group name -> rows."""


class SparseOptimizer:
    """Updates the rows that have gradients; holds no state of its own.

    weight_decay is decoupled (Loshchilov and Hutter, arXiv 1711.05101): a touched row is first scaled by
    1 - lr * weight_decay.
    """

    def __init__(self, name: str, *, lr: float, weight_decay: float = 0.0) -> None:
        if name not in UPDATES:
            raise ValueError(f"embedding optimizer is {name!r}: must be one of {', '.join(UPDATES)}")
        self.name = name
        self.lr = lr
        self.weight_decay = weight_decay

    def step(
        self, tables: Tables, gradients: Mapping[str, RowGradients], lr_scale: float = 1.0, grad_scale: float = 1.0
    ) -> None:
        """One update, in place, of every row in `gradients` (group -> unique local rows and their summed gradients).

        lr_scale: factor of the schedule; grad_scale: factor of gradient clipping.
        """
        for name, found in gradients.items():
            if found.rows.numel():
                self._update(tables.groups[name], found.rows, found.grad * grad_scale, self.lr * lr_scale)

    def _update(self, group: Rows, index: Tensor, grad: Tensor, lr: float) -> None:
        # index_select is 10 times as fast as [index] on CPU
        rows = group.weight.index_select(0, index) * (1 - lr * self.weight_decay)
        state = {key: value.index_select(0, index) for key, value in group.state.items()}
        rows, state = UPDATES[self.name](rows, grad, state, lr)
        group.weight.index_copy_(0, index, rows)
        for key, value in state.items():
            group.state[key].index_copy_(0, index, value)
