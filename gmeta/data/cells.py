"""Values of a batch's cells: many of a cell behind each other, and padded to the longest cell of a side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import Bag, mask_of

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class CellBags:
    """A many-valued feature of the cells of a batch: cell (t, w) has values[first[t, w]:][: length[t, w]]."""

    values: Array
    first: Array  # [T, W]
    length: Array  # [T, W]

    def cut(self, columns: slice) -> Bag:
        """Return the bag of one side."""
        length = np.ascontiguousarray(self.length[:, columns])
        values = self.values[ranges(self.first[:, columns].reshape(-1), length.reshape(-1))]
        kind = np.int64 if values.dtype.kind == "i" else values.dtype
        return Bag(torch.from_numpy(values.astype(kind)), torch.from_numpy(length))


def padded(bags: Mapping[str, Bag]) -> dict[str, Tensor]:
    """Return numbers [T, S, L, 1] of each bag, zeros behind its values, and a mask bool [T, S, L], true for these.

    L is the longest of the side, and at least 1, as for the sequences that they are aligned with.
    """
    given: dict[str, Tensor] = {}
    for name, bag in bags.items():
        longest = max(1, int(bag.lengths.max()) if bag.lengths.numel() else 1)
        mask = torch.arange(longest) < bag.lengths.unsqueeze(-1)
        numbers = bag.values.new_zeros(*mask.shape)
        numbers[mask] = bag.values
        given |= {name: numbers.unsqueeze(-1), mask_of(name): mask}
    return given


def padded_ids(found: Array | CellBags, columns: slice) -> Tensor:
    """Return the texts of one side, int64 [T, S, L], 0 where there is none; L is 1 of a feature of one value."""
    if isinstance(found, CellBags):
        return padded({"": found.cut(columns)})[""].squeeze(-1)
    return torch.from_numpy(found[:, columns].astype(np.int64)).unsqueeze(-1)


def ranges(first: Array, length: Array) -> Array:
    """Return first[0], first[0] + 1, … (length[0] numbers), then those from first[1], and so on."""
    end = np.cumsum(length)
    ranges: Array = np.arange(int(length.sum())) + np.repeat(first - (end - length), length)
    return ranges


def joined_arrays(arrays: Sequence[Array]) -> Array:
    """Return arrays behind each other; one alone without a copy."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
