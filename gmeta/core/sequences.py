"""Events of tasks, one task behind the other, without padding: what a sequence model computes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the N events of T tasks stand, in the order of the tasks, and of each task's events."""

    lengths: Tensor  # int64 [T], 0 of a task without events
    task: Tensor  # int64 [N], position of the task
    place: Tensor  # int64 [N], from 0 for the first event of a task
    wanted: Tensor | None = None  # bool [N], events whose states are looked at, others may be anything; None: all

    @property
    def longest(self) -> int:
        """Return L, the length of the longest sequence, at least 1."""
        return max(1, int(self.lengths.max())) if len(self.lengths) else 1

    @property
    def last(self) -> Tensor:
        """Return which event is each task's last one, int64 [T]; -1 or that of the task before where it has none."""
        return self.lengths.cumsum(0) - 1

    def padded(self, values: Tensor) -> Tensor:
        """Return values [N, ...] of events as [T, L, ...], zeros behind the last event of each task."""
        out = values.new_zeros(len(self.lengths), self.longest, *values.shape[1:])
        return out.index_put((self.task, self.place), values)

    def flat(self, values: Tensor) -> Tensor:
        """Return the events [N, ...] of padded values [T, L, ...]."""
        return values[self.task, self.place]


def sequences_of(*masks: Tensor) -> tuple[Sequences, Tensor]:
    """Return the sequences of tasks whose events lie in several blocks, such as support and query: bool [T, S] each.

    Also returns from where each event comes, int64 [N]: a position in the flattened blocks, one behind the other.
    """
    before, cells = 0, []
    for mask in masks:
        cells.append(before + torch.arange(mask.numel(), device=mask.device).view(mask.shape))
        before += mask.numel()
    mask, place = torch.cat(masks, 1), torch.cat(cells, 1)
    task = torch.arange(len(mask), device=mask.device).unsqueeze(-1).expand_as(mask)
    return Sequences(mask.sum(1), task[mask], (mask.cumsum(1) - 1)[mask]), place[mask]
