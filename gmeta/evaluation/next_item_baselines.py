"""Baselines of next-item runs without a network, on the training rows: what is popular, and what goes together.

They are ranked as the model is, by `gmeta.evaluation.target_ranks.ranks_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.data.cells import ranges
from gmeta.data.schema import OOV
from gmeta.evaluation.score import Floats, Ints
from gmeta.evaluation.target_ranks import Targets

POPULARITY, ITEM_KNN, LAST_ITEM_KNN = "popularity", "item-knn", "last-item-knn"
NEXT_ITEM_BASELINES = (POPULARITY, ITEM_KNN, LAST_ITEM_KNN)
"""Names of the baselines, in the order they are reported."""
KNN_HISTORY = 20
"""The last items of a history that `item-knn` looks at."""

ScoreTargets = Callable[[Targets], Tensor]
"""Returns the scores [n, num_ids] of some targets for every item."""


@dataclass(frozen=True)
class ItemNeighbours:
    """The items that share users with each item: those of item i are at first[i] up to first[i + 1], rising."""

    first: Ints  # [num_ids + 1]
    item: Ints  # [pairs]
    cosine: Floats  # [pairs], users of both / sqrt(users of one · users of the other)

    def score(self, targets: Targets, last: int) -> Tensor:
        """Sum the cosines of every item with the `last` events of each history: float32 [n, num_ids].

        float32 ties sums of the same cosines, which float64 would order by their rounding.
        """
        num_ids = len(self.first) - 1
        scores = np.zeros(len(targets) * num_ids)
        for back in range(1, last + 1):
            position, item = targets.item_before(back)
            count = self.first[item + 1] - self.first[item]
            pair = ranges(self.first[item], count)
            scores[np.repeat(position * num_ids, count) + self.item[pair]] += self.cosine[pair]
        return torch.from_numpy(scores.astype(np.float32).reshape(len(targets), num_ids))


def fit_neighbours(user: Ints, item: Ints, num_ids: int) -> ItemNeighbours:
    """Count which items have users in common, of events [R] by user and item; an item is no neighbour of itself.

    A user who took an item twice counts once, and unknown items (id 0) have no neighbours.
    """
    user, item = np.unique(np.stack([user, item])[:, item != OOV], axis=1)
    of_user = np.searchsorted(user, np.arange(user.max(initial=-1) + 2))
    by_item = np.argsort(item, kind="stable")
    of_item = np.searchsorted(item[by_item], np.arange(num_ids + 1))
    popularity = np.diff(of_item)
    first, items, cosines = np.zeros(num_ids + 1, np.int64), [np.zeros(0, np.int64)], [np.zeros(0)]
    for one in range(num_ids):
        users = user[by_item[of_item[one] : of_item[one + 1]]]
        together = item[ranges(of_user[users], of_user[users + 1] - of_user[users])]
        other, count = np.unique(together[together != one], return_counts=True)
        first[one + 1] = first[one] + len(other)
        items.append(other)
        cosines.append(count / np.sqrt(popularity[one] * popularity[other]))
    return ItemNeighbours(first, np.concatenate(items), np.concatenate(cosines))


def fit_next_item_baselines(user: Ints, item: NDArray[Any], num_ids: int) -> dict[str, ScoreTargets]:
    """Return what scores targets, by the baseline's name; `user` and `item` [R] are those of the training events."""
    count = torch.from_numpy(np.bincount(item, minlength=num_ids))
    neighbours = fit_neighbours(user, item.astype(np.int64), num_ids)
    return {
        POPULARITY: lambda targets: count.expand(len(targets), -1),
        ITEM_KNN: lambda targets: neighbours.score(targets, KNN_HISTORY),
        LAST_ITEM_KNN: lambda targets: neighbours.score(targets, 1),
    }
