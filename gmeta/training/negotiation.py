"""Domain negotiation: weights keep part of the way that a round over all scenarios took them.

Linhao Luo et al., "MAMDR: A Model Agnostic Learning Method for Multi-Domain Recommendation", ICDE 2023, arXiv
2202.12524, algorithm 1. From weights w a round trains on one scenario after the other, in a new order each time, to w';
then w + share (w' - w) is where the next one begins. To first order that favours steps on which gradients of scenarios
agree. A round is a window of the loader's batches, not an epoch, and optimizers keep their moments from round to round.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from gmeta.recommender.system import System

_ROWS = "rows"


class Negotiation:
    """The rounds of a training, and this worker's weights as they were when the present one began."""

    def __init__(
        self, system: System, share: float, *, window_batches: int, batches_per_epoch: int, total_steps: int
    ) -> None:
        self._system = system
        self._share = share
        self._window_batches = window_batches
        self._batches_per_epoch = batches_per_epoch
        self._total_steps = total_steps

    def ends(self, step: int, index: int) -> bool:
        """Say whether a round ends with `step`, batch `index` of an epoch: a window, the epoch or the training ends."""
        last = index + 1 == self._batches_per_epoch or step + 1 == self._total_steps
        return last or (index + 1) % self._window_batches == 0

    def begin(self) -> None:
        """Begin the first round, with the weights as they are."""
        for name, weight in self._weights().items():
            self._start[name].copy_(weight)

    @torch.no_grad()
    def end_round(self, ok: Tensor) -> None:
        """Go back part of the way, and begin the next round there. Where `ok`, a bool [], is False, stay."""
        share = torch.ones_like(ok, dtype=torch.float64).masked_fill_(ok, self._share)
        for name, weight in self._weights().items():
            start = self._start[name]
            start.lerp_(weight, share.to(start.dtype))
            weight.copy_(start)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that the round began with, for a checkpoint; rows of tables are this worker's."""
        return {f"negotiation.{name}": self._whole(name, start) for name, start in self._start.items()}

    def _whole(self, name: str, start: Tensor) -> Tensor:
        kind, _, table = name.partition(".")
        tables = self._system.tables
        return tables.as_global(start, tables.fused[table].num_rows) if kind == _ROWS else start

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        """Return the live weights: layers that are trained, a scalar as [1], and rows of each fused table."""
        trained = [(name, p.detach()) for name, p in self._system.objective.named_parameters() if p.requires_grad]
        layers = {f"dense.{name}": p.view(p.shape or (1,)) for name, p in trained}
        return {**layers, **{f"{_ROWS}.{name}": table.weight for name, table in self._system.tables.fused.items()}}
