"""An index of item vectors that looks at some of them for each user: fast for large catalogues, and not exact."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.recommender.top_items import TopItems

_PART = 4
"""A user is compared with the items of one cell in so many."""
_CELL = 39
"""Fewer items make no cell of their own: faiss asks for as many."""


class FaissShelf:
    """Cells of items whose vectors are near (k-means): a user is compared with the nearest ones. Arguments and results
    are those of `ExactShelf`. ValueError where faiss is not here.
    """

    def __init__(self, ids: NDArray[np.int64], vectors: Tensor) -> None:
        try:
            faiss: Any = import_module("faiss")
        except ImportError as error:
            raise ValueError(f"index is 'faiss', which needs faiss ({error}): pip install 'gmeta[faiss]'") from None
        self.ids = ids
        self._device = vectors.device
        rows = vectors[torch.from_numpy(ids).to(vectors.device)].cpu().numpy()
        cells = max(1, min(math.isqrt(len(ids)), len(ids) // _CELL))
        width, product = rows.shape[1], faiss.METRIC_INNER_PRODUCT
        self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, product)
        self._index.nprobe = -(-cells // _PART)
        self._index.train(rows)
        self._index.add(rows)

    def top(self, users: Tensor, k: int, out: tuple[Tensor, Tensor]) -> TopItems:
        """Return about the k best items: so many more are asked for as the user with the most leaves out."""
        if not len(users):
            return TopItems(torch.zeros(0, 0, dtype=torch.int64), users[:, :0])
        user, item = (part.cpu().numpy() for part in out)
        place = np.minimum(np.searchsorted(self.ids, item), len(self.ids) - 1)
        here = self.ids[place] == item
        longest = int(np.bincount(user[here]).max(initial=0)) if here.any() else 0
        asked = min(k + longest, len(self.ids))
        scores, found = self._index.search(users.cpu().numpy(), asked)
        left_out = user[here] * len(self.ids) + place[here]
        rows = np.arange(len(found))[:, None]
        scores[(found < 0) | np.isin(rows * len(self.ids) + found, left_out)] = -np.inf
        order = np.lexsort((found, -scores))[:, : min(k, len(self.ids))]
        items = self.ids[np.take_along_axis(found, order, 1)]
        score = np.take_along_axis(scores, order, 1).astype(np.float32)
        return TopItems(torch.from_numpy(items).to(self._device), torch.from_numpy(score).to(self._device))


def recall(found: TopItems, exact: TopItems) -> tuple[int, int]:
    """Return how many items of exact lists are found, and how many they are."""
    there = (exact.item[:, :, None] == found.item[:, None, :]) & (found.score[:, None, :] > -torch.inf)
    counted = exact.score > -torch.inf
    return int((there.any(2) & counted).sum()), int(counted.sum())
