"""Which of the shared candidates a target of next items is compared with, beside those of its domain."""

from __future__ import annotations

import torch
from torch import Tensor

from gmeta.core.hashing import splitmix64_tensor

_POSITIVE = (1 << 63) - 1


def had_by_tasks(task: Tensor, item: Tensor, candidates: Tensor, num_tasks: int) -> Tensor:
    """Return which candidates each task has among its own events, bool [T, C].

    Events are `task` and `item`, int64 [N] each; candidates, int64 [C], are items, one of which may come twice.
    """
    ids, _ = candidates.sort()
    place = torch.searchsorted(ids, item)
    there = ids[place.clamp(max=len(ids) - 1)] == item
    had = torch.zeros(num_tasks, len(ids) + 1, dtype=torch.bool, device=item.device)
    had[task, torch.where(there, place, len(ids))] = True
    return had[:, torch.searchsorted(ids, candidates)]


def all_but(count: int, left_out: Tensor, keys: Tensor) -> Tensor:
    """Return bool [P, C], false for `count` of the candidates of each target that are not left out already; for all of
    these, where there are no more.

    `keys` int64 [P] say which ones: those whose hash of the key and the position among the candidates is lowest.
    """
    place = torch.arange(left_out.shape[1], device=keys.device)
    hashed = splitmix64_tensor(keys.unsqueeze(-1) + place) & _POSITIVE
    lowest = hashed.masked_fill(left_out, _POSITIVE).topk(min(count, left_out.shape[1]), largest=False).indices
    return left_out | torch.ones_like(left_out).scatter(1, lowest, False)
