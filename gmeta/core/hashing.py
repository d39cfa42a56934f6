"""The one hash behind every order and mask of batches: splitmix64, as numpy and as torch compute it.

`gmeta.elastic.ledger` has it in plain Python, since a coordinator runs without either.

A hash replaces a random generator wherever numbers must outlive a release. Checkpoints refer to an order of batches, to
rows and to dropout masks that may not change, and numpy and torch may change the streams of their generators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The step between two states of a splitmix64 stream: 2**64 divided by the golden ratio, made odd."""
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the number that a splitmix64 stream gives out at each state, for states of any shape. The function is a
    bijection of 64-bit words.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. The state advances by
    `GAMMA` before it is mixed, so that the n-th number of a stream is `splitmix64(start + (n - 1) * GAMMA)`.
    """
    x: NDArray[np.uint64] = state + GAMMA
    x ^= x >> np.uint64(30)
    x *= _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)
    mixed: NDArray[np.uint64] = x
    return mixed


def _signed(word: np.uint64) -> int:
    """Return the int64 that has the bits of `word`."""
    return int(word.astype(np.int64))


_SIGNED_GAMMA, _SIGNED_FIRST, _SIGNED_SECOND = map(_signed, (GAMMA, _FIRST, _SECOND))


def splitmix64_tensor(state: Tensor) -> Tensor:
    """Return `splitmix64` of int64 words, on any device: int64 [...] -> int64 [...].

    torch has no arithmetic on unsigned words. Sums and products wrap around in two's complement, which gives the same
    bits. A shift to the right copies the sign, so that a mask clears the bits that the shift fills.
    """
    x = state + _SIGNED_GAMMA
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _SIGNED_FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SIGNED_SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)
