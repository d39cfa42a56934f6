"""Where ids live and what their rows start as: pure functions of the seed, never of the number of workers.

Integer arithmetic only, on values that never leave 63 bits, so that every machine and device gets the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 4  # a Feistel network of 4 rounds is a pseudo-random permutation (Luby and Rackoff, 1988)
_Step = Callable[[Tensor], Tensor]
_UNIFORMS = 8  # 16-bit uniforms summed for one approximately normal number


def keys_from(*parts: object) -> list[int]:
    """Eight 32-bit keys that depend on every part."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]


def _mix(x: Tensor, key: int) -> Tensor:
    """A 32-bit hash of int64 values in [0, 2**32): xor-shift and multiply, as in MurmurHash3's finaliser.

    Multipliers are below 2**31, so that no product overflows int64.
    """
    x = x ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Permutation:
    """A bijection of [0, size) chosen by the seed; scatters the hot low ids of a vocabulary evenly over all rows.

    A Feistel network over left x right cells, left * right being just above size; a value that lands outside
    [0, size) is permuted again until it lands inside (cycle walking; Black and Rogaway, 2002).
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.size < 2**62:
            raise ValueError(f"a group of tables has {self.size} rows: it must have between 1 and 2**62")

    @property
    def _sides(self) -> tuple[int, int]:
        left = max(1, math.isqrt(self.size))
        return left, -(-self.size // left)

    def forward(self, key: Tensor) -> Tensor:
        """key int64 in [0, size) -> row int64 in [0, size), any shape."""
        return self._walk(key, self._encrypt)

    def inverse(self, row: Tensor) -> Tensor:
        """The key whose `forward` is `row`."""
        return self._walk(row, self._decrypt)

    def _walk(self, x: Tensor, step: _Step) -> Tensor:
        x = step(x)
        while (outside := x >= self.size).any():
            x[outside] = step(x[outside])
        return x

    def _encrypt(self, x: Tensor) -> Tensor:
        left, right = self._sides
        a, b = x // right, x % right
        for key in keys_from("permutation", self.seed)[:_ROUNDS]:
            a = (a + _mix(b, key)) % left
            b = (b + _mix(a, key ^ _MASK)) % right
        return a * right + b

    def _decrypt(self, x: Tensor) -> Tensor:
        left, right = self._sides
        a, b = x // right, x % right
        for key in keys_from("permutation", self.seed)[:_ROUNDS][::-1]:
            b = (b - _mix(a, key ^ _MASK)) % right
            a = (a - _mix(b, key)) % left
        return a * right + b


def normal_rows(ids: Tensor, dim: int, *, table: str, seed: int) -> Tensor:
    """Initial rows float64 [n, dim] of `ids` int64 [n], about standard normal, each a function of (seed, table, id).

    A number is the centred sum of eight 16-bit uniforms (Irwin-Hall): integers until the last division, because
    log and cos differ in the last bit between vector widths, and rows must not depend on how they were chunked.
    """
    keys = keys_from("rows", seed, table)
    low, high = ids & _MASK, ids >> 32
    first = _mix(_mix(low, keys[0]) ^ high, keys[1])[:, None]  # [n, 1]
    second = _mix(_mix(low, keys[2]) ^ high, keys[3])[:, None]
    counter = torch.arange(dim * _UNIFORMS // 2, dtype=torch.int64, device=ids.device)
    columns = _mix(counter, keys[4]).view(_UNIFORMS // 2, dim)
    total = torch.zeros(ids.shape[0], dim, dtype=torch.int64, device=ids.device)
    for column in columns:
        # two independent 32-bit hashes a row: two rows are equal only where both collide
        word = _mix(((first ^ column) + second) & _MASK, keys[5])
        total += (word & 0xFFFF) + (word >> 16)
    mean = _UNIFORMS * 65535 / 2
    std = math.sqrt(_UNIFORMS * (65536**2 - 1) / 12)
    return (total.double() - mean) / std
