"""Dropout whose mask depends on (seed, epoch, batch, task, inner step, example, unit) and on nothing else.

The same task drops the same units whatever rank, position or padding it gets, and in both engines: a counter-based hash
(the finaliser of splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
replaces the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmeta.core.hashing import splitmix64_tensor

QUERY_PASS = 0
"""Number of the query's forward pass; inner step k (from 0) is pass k + 1."""

_UNSEEDED = {
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
}


BatchKey = tuple[int, int, int]
"""(seed, epoch, index) of a batch."""


def example_keys(batch: BatchKey, task_id: Tensor, pass_number: int, positions: Tensor) -> Tensor:
    """Return a key for each example: task ids int64 [T], positions inside the task int64 [S] -> [T, S].

    A single task id, a scalar, gives [S].
    """
    key = task_id
    for number in (*batch, pass_number):
        key = splitmix64_tensor(key + number)
    return splitmix64_tensor(key.unsqueeze(-1) + positions)


class SeededDropout:
    """Replaces `F.dropout` and `torch.dropout` by a mask that is hashed from one key for each example.

    It is a handler of `gmeta.meta.interception`. `make_keys()` is called when a model first drops something, and gives
    int64 keys of the leading dimensions that the model is called with. Without it, dropout does nothing.
    """

    def __init__(self, make_keys: Callable[[], Tensor] | None) -> None:
        self.make_keys = make_keys
        self.keys: Tensor | None = None
        self.calls = 0

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the masked input for a call of dropout. Raises ValueError for kinds that cannot be seeded."""
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.dropout:  # which calls its third argument `train`
            given = dict(zip(("input", "p", "train"), args, strict=False)) | {**kwargs}
            return self._dropout(given["input"], given["p"], given["train"])
        if func in _UNSEEDED and kwargs.get("training", True) and self.make_keys is not None:
            raise ValueError(f"F.{func.__name__} cannot be seeded per task: use torch.nn.Dropout")
        return NotImplemented

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0 or self.make_keys is None:
            return input
        if self.keys is None:
            self.keys = self.make_keys()
        self.calls += 1
        if input.shape[: self.keys.dim()] != self.keys.shape:
            raise ValueError(
                f"dropout input has shape {list(input.shape)}, expected leading dimensions {list(self.keys.shape)}: "
                "a model must keep the dimensions of tasks and examples first"
            )
        width = input.shape[self.keys.dim() :].numel()
        # One hash of 64 bits decides four units: hashing is most of what dropout costs.
        fours = torch.arange(-(-width // 4), device=input.device)
        hashed = splitmix64_tensor(splitmix64_tensor(self.keys + self.calls).unsqueeze(-1) + fours)
        draws = (hashed.unsqueeze(-1) >> torch.arange(0, 64, 16, device=input.device)) & 0xFFFF
        keep = draws.flatten(-2)[..., :width] >= round(p * 0x10000)
        return input * (keep.reshape(input.shape).to(input.dtype) / (1 - p))
