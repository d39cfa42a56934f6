"""The items of highest score for each user: an exact product of vectors, some users and some items at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
_USERS, _ITEMS = 256, 1 << 16
"""Scores of so many users and items are held at a time (64 MiB of float32)."""


@dataclass(frozen=True)
class TopItems:
    """The items of some users in the order of their scores. One with fewer than k has scores of minus infinity."""

    item: Tensor  # int64 [U, k], ids; of equal scores the lower id is first
    score: Tensor  # float32 [U, k]


class Shelf(Protocol):
    """Items of which the best are found."""

    ids: Ints  # ascending

    def top(self, users: Tensor, k: int, out: tuple[Tensor, Tensor]) -> TopItems:
        """Return the k best items of users [U, d]; `out` are pairs of a user's position and an item that is left out,
        int64 [n] each.
        """


class ExactShelf:
    """Compares with every item. `ids` are those of the items, ascending; `vectors` [num_ids, d] has all by id."""

    def __init__(self, ids: Ints, vectors: Tensor) -> None:
        self.ids = ids
        self._ids = torch.from_numpy(ids).to(vectors.device)
        self._vectors = vectors[self._ids]
        self._place = torch.full((len(vectors),), -1, device=vectors.device)
        self._place[self._ids] = torch.arange(len(ids), device=vectors.device)

    def top(self, users: Tensor, k: int, out: tuple[Tensor, Tensor]) -> TopItems:
        """Return the k best items, exactly."""
        known = out[1] < len(self._place)  # others came later, and are not here
        user, place = out[0][known], self._place[out[1][known]]
        k = min(k, len(self._ids))
        parts = []
        for begin in range(0, max(1, len(users)), _USERS):
            some = slice(begin, begin + _USERS)
            mine = (user >= begin) & (user < begin + _USERS) & (place >= 0)
            parts.append(self._top(users[some], k, user[mine] - begin, place[mine]))
        return TopItems(torch.cat([part.item for part in parts]), torch.cat([part.score for part in parts]))

    def _top(self, users: Tensor, k: int, user: Tensor, place: Tensor) -> TopItems:
        score, item = users.new_zeros(len(users), 0), self._ids.new_zeros(len(users), 0)
        for begin in range(0, len(self._ids), _ITEMS):
            some = slice(begin, begin + _ITEMS)
            here = (place >= begin) & (place < begin + _ITEMS)
            scores = users @ self._vectors[some].mT
            scores[user[here], place[here] - begin] = -torch.inf
            found = highest(scores, k)
            # Both are sorted, and the ids of the former are lower: a stable sort keeps ties in the order of ids.
            score = torch.cat([score, scores.gather(1, found)], 1)
            item = torch.cat([item, self._ids[some][found]], 1)
            score, order = score.sort(dim=1, descending=True, stable=True)
            score, item = score[:, :k], item.gather(1, order[:, :k])
        return TopItems(item, score)


def highest(scores: Tensor, k: int) -> Tensor:
    """Return where the k highest of scores [n, C] are, int64 [n, min(k, C)]; of equal scores the first is first."""
    if k >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)[1]
    value, place = scores.topk(k + 1, dim=1)
    tied = (value[:, k - 1] == value[:, k]).nonzero()[:, 0]  # topk may take any of those
    place = place[:, :k].sort(1)[0]
    order = scores.gather(1, place).sort(dim=1, descending=True, stable=True)[1]
    place = place.gather(1, order)
    if len(tied):
        place[tied] = scores[tied].sort(dim=1, descending=True, stable=True)[1][:, :k]
    return place


def shelves_of(domain: Ints, listed: NDArray[np.bool_], *, by_domain: bool) -> Iterator[tuple[int, Ints]]:
    """Yield the listed items of each domain with its id, or with 0 all of them together."""
    items = np.flatnonzero(listed)
    if not by_domain:
        yield 0, items
        return
    for number in np.unique(domain[items]).tolist():
        yield number, items[domain[items] == number]
