"""Rows of the clone: who met what, when, and with what label. Users are drawn in blocks, each from its own seed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta, timezone
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gmeta.data.antm2c.published import (
    POSITIVES,
    ROWS,
    SCENE_THOUSANDS,
    SCENES,
    SPLITS,
    TRAIN_ENDS,
    USERS,
    VALID_ENDS,
)
from gmeta.data.clone.world import CloneUsers, CloneWorld, Floats, Ints, draw_users, logits
from gmeta.data.synthetic import sigmoid

BLOCK_USERS = 512
"""Users drawn from one seed; they have about 85,000 rows."""
_STARTS = TRAIN_ENDS - timedelta(days=2)
_ENDS = VALID_ENDS + timedelta(days=3)
_CALIBRATION = 1_000_000
"""Number of the block by which click rates are set; no log has so many."""


@dataclass(frozen=True, slots=True)
class CloneRows:
    """Rows of a block, in the order of users and time."""

    user: Ints  # [R], position in the block
    item: Ints  # [R]
    split: Ints  # [R], 0 train, 1 valid, 2 test
    second: Ints  # [R], Unix time
    logit: Floats  # [R]
    label: npt.NDArray[np.int8]  # [R]


def bounds_of_splits() -> Ints:
    """Return the first and the last second of each split, [3, 2]; seconds are Unix time, of a clock without a zone."""
    ends = [_STARTS - timedelta(seconds=1), TRAIN_ENDS, VALID_ENDS, _ENDS]
    seconds = [int(end.replace(tzinfo=timezone.utc).timestamp()) for end in ends]
    return np.array([(before + 1, last) for before, last in pairwise(seconds)])


def num_users(rows: int) -> int:
    """Return how many users a clone of about so many rows has."""
    return max(1, round(rows * USERS / sum(ROWS)))


def draw_block(
    world: CloneWorld, seed: int, block: int, users: int = BLOCK_USERS, shift: Floats | None = None
) -> tuple[CloneUsers, CloneRows]:
    """Return the first `users` users of block `block`, and their rows. `shift` [3] is added to the logits of splits."""
    rng = np.random.default_rng([seed, 1, block])
    drawn = draw_users(world, BLOCK_USERS, rng)
    mean = sum(ROWS) / USERS
    counts = np.maximum(5, rng.gamma(1.5, mean / 1.5, BLOCK_USERS)).round().astype(np.int64)
    user = np.repeat(np.arange(BLOCK_USERS), counts)
    split, scene = _split_and_scene(drawn, user, rng)
    item = _items(world, split, scene, rng)
    second = _seconds(split, rng)
    logit = logits(world, drawn, user, item) + (0.0 if shift is None else shift[split])
    label = (rng.random(len(user)) < sigmoid(logit)).astype(np.int8)
    order = np.lexsort((second, user))
    order = order[user[order] < users]
    return drawn, CloneRows(user[order], item[order], split[order], second[order], logit[order], label[order])


def shifts(world: CloneWorld, seed: int) -> Floats:
    """Return what is added to the logits of each split, [3], so that it has the click rate of the released files."""
    _, rows = draw_block(world, seed, _CALIBRATION)
    found = []
    for number, _ in enumerate(SPLITS):
        logit, rate = rows.logit[rows.split == number], POSITIVES[number] / ROWS[number]
        low, high = -20.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if sigmoid(logit + middle).mean() < rate else (low, middle)
        found.append(middle)
    return np.array(found)


def _split_and_scene(users: CloneUsers, user: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Return the split and the scene of rows, by the mix of the released files and each user's own weights."""
    mix = np.asarray(SCENE_THOUSANDS, float) * users.weight[:, None, :]  # [U, splits, S]
    chance = np.cumsum(mix.reshape(len(mix), -1), 1)
    cell = (chance[user] < rng.random(len(user))[:, None] * chance[user, -1:]).sum(1)
    return cell // SCENES, cell % SCENES


def _items(world: CloneWorld, split: Ints, scene: Ints, rng: np.random.Generator) -> Ints:
    items = world.items
    found = np.empty(len(split), np.int64)
    for number in range(SCENES):
        for later in (False, True):
            there = np.flatnonzero((items.scene == number) & (items.later if later else items.in_train))
            at = np.flatnonzero((scene == number) & ((split > 0) == later))
            chance = np.cumsum(items.popularity[there])
            found[at] = there[np.searchsorted(chance, rng.random(len(at)) * chance[-1], side="right")]
    return found


def _seconds(split: Ints, rng: np.random.Generator) -> Ints:
    bounds = bounds_of_splits()
    first, last = bounds[split].T
    return np.asarray(first + np.floor(rng.random(len(split)) * (last - first + 1)), np.int64)
