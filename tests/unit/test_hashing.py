"""One hash for orders, initial rows and dropout masks: both forms agree, and no value ever changes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64

from gmeta.core.hashing import GAMMA, splitmix64, splitmix64_tensor
from gmeta.data.order import keyed_hash
from gmeta.embedding.permutation import normal_rows, table_key
from gmeta.meta.dropout import SeededDropout, example_keys


def test_the_numbers_are_those_of_the_published_generator() -> None:
    """The first numbers of the reference implementation of splitmix64 with seed 1234567."""
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * GAMMA
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_both_forms_give_the_same_bits(words: list[int]) -> None:
    state = np.array(words, np.uint64)
    given = state.copy()
    found = splitmix64_tensor(torch.from_numpy(state.view(np.int64)))
    assert found.numpy().view(np.uint64).tolist() == splitmix64(state).tolist()
    assert (state == given).all(), "the state is the caller's"


def digest(array: np.ndarray) -> str:
    return xxh3_64(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_orders_rows_and_masks_are_those_of_saved_runs() -> None:
    """Checkpoints and packs refer to these numbers: they were computed before the three users shared one hash."""
    assert digest(keyed_hash(np.arange(5000), 0, 3, 2**63, 2**64 - 1)) == "e9a069c2dbcc16ba"
    ids = torch.arange(0, 3000, 7)
    key = np.array([table_key(5, "item")], np.uint64).view(np.int64)
    assert digest(normal_rows(ids, torch.from_numpy(key).expand(len(ids)).clone(), 9).numpy()) == "c8f6701ca42724d4"
    keys = example_keys((7, 2**62, 5), torch.arange(0, 90, 3), 2, torch.arange(11))
    assert digest(keys.numpy()) == "2eef28b3a0bc4e9b"
    dropped = SeededDropout(lambda: keys).handle(F.dropout, (torch.ones(30, 11, 7),), {"p": 0.3})
    assert digest(dropped.numpy()) == "f0c97991d64618bc"
