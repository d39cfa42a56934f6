"""The clone's truth: items, users, and from what a click comes.

    logit = b_scene + c_split + e_i + a_u + (u + d_scene) . v_i,      label ~ Bernoulli(sigmoid(logit))

An item's vector v_i (E|v|^2 = 1) is the sum of what its text tells (a topic), what its image tells (a look), and a
rest that clicks alone reveal. A user's vector u is told in part by the topics of its bills, services and queries; the
rest, the taste of each scene d_scene and the user's leaning a_u are told by clicks alone. An item is of one scene. Some
items are on offer all the time, some in the days of train alone, and some later alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gmeta.data.antm2c.published import ITEMS, ROWS, SCENE_THOUSANDS, SCENES, TEST_ITEMS, TRAIN_ITEMS
from gmeta.data.clone.words import TOPICS
from gmeta.data.synthetic import random_vectors

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DIM = 4
"""Dimensions of tastes and of items' vectors."""
LOOKS = 24
"""Kinds of images."""
TEXT_SHARE, IMAGE_SHARE = 0.5, 0.25
"""What text and image tell of the variance of items' vectors."""
USER_TEXT_SHARE = 0.4
"""What bills, services and queries tell of the variance of users' vectors."""
TASTE_STD, SCENE_TASTE_STD, ITEM_STD, USER_STD, SCENE_STD = 1.5, 1.15, 0.7, 0.6, 0.3
"""Standard deviations of the parts of the logit: u . v, d . v, e, a, b."""
FAVOURITES = 3
"""Topics that a user's bills, services and queries are about."""
ZIPF = 0.8
NO_IMAGE = 0.08
"""The share of items without an image."""

LATER = 1 - TRAIN_ITEMS / ITEMS
"""The share of items that train has not."""
ALWAYS = TEST_ITEMS / ITEMS - LATER
"""The share of items that are on offer in train and later."""


@dataclass(frozen=True, slots=True)
class CloneItems:
    """Every item of the clone."""

    scene: Ints  # [I]
    topic: Ints  # [I]
    look: Ints  # [I]
    has_image: npt.NDArray[np.bool_]  # [I]
    in_train: npt.NDArray[np.bool_]  # [I], whether it is on offer in the days of train
    later: npt.NDArray[np.bool_]  # [I], and in those of valid and test
    popularity: Floats  # [I]
    effect: Floats  # [I], e_i
    of_text: Floats  # [I, K], what text tells of v_i
    of_image: Floats  # [I, K]
    latent: Floats  # [I, K], v_i

    def __len__(self) -> int:
        return len(self.scene)


@dataclass(frozen=True, slots=True)
class CloneWorld:
    """What all rows have in common."""

    items: CloneItems
    topics: Floats  # [topics, K], the direction of each topic
    scene: Floats  # [S], b_scene


@dataclass(frozen=True, slots=True)
class CloneUsers:
    """A block of users."""

    favourites: Ints  # [U, F], topics
    mean: Floats  # [U, K], what these tell of u
    taste: Floats  # [U, K], u
    of_scene: Floats  # [U, S, K], d_scene
    leaning: Floats  # [U], a_u
    weight: Floats  # [U, S], how often a user is in each scene, beside how often all are

    def __len__(self) -> int:
        return len(self.leaning)


def num_items(rows: int) -> int:
    """Return how many items a clone of so many rows has: as many a row as the released files, and a few a scene."""
    return max(20 * SCENES, round(rows * ITEMS / sum(ROWS)))


def draw_world(rows: int, seed: int) -> CloneWorld:
    """Return the world of a clone of so many rows."""
    rng = np.random.default_rng([seed, 0])
    num = num_items(rows)
    topics = random_vectors(rng, len(TOPICS), DIM, 1.0)
    looks = random_vectors(rng, LOOKS, DIM, IMAGE_SHARE**0.5)
    shares = np.asarray(SCENE_THOUSANDS, float).sum(0) ** 0.5
    scene = rng.permutation(np.searchsorted(np.cumsum(shares / shares.sum()), (np.arange(num) + 0.5) / num))
    # Each scene is about some topics more than others, and has some of all.
    of_scene = np.cumsum(rng.dirichlet(np.full(len(TOPICS), 0.7), SCENES), 1)
    topic = (of_scene[scene] < rng.random((num, 1))).sum(1).clip(max=len(TOPICS) - 1)
    look = rng.integers(LOOKS, size=num)
    life, has_image = rng.random(num), rng.random(num) >= NO_IMAGE
    rank = np.empty(num)
    for number in range(SCENES):
        at = np.flatnonzero(scene == number)
        rank[at] = rng.permutation(len(at)) + 1
    of_text, of_image = TEXT_SHARE**0.5 * topics[topic], looks[look]
    rest = random_vectors(rng, num, DIM, (1 - TEXT_SHARE - IMAGE_SHARE) ** 0.5)
    items = CloneItems(
        scene,
        topic,
        look,
        has_image,
        life >= LATER,
        life < LATER + ALWAYS,
        rank**-ZIPF,
        ITEM_STD * rng.standard_normal(num),
        of_text,
        of_image,
        of_text + of_image + rest,
    )
    bias = rng.standard_normal(SCENES)
    return CloneWorld(items, topics, SCENE_STD * (bias - bias.mean()) / bias.std())


def draw_users(world: CloneWorld, num: int, rng: np.random.Generator) -> CloneUsers:
    """Return a block of users."""
    favourites = rng.random((num, len(world.topics))).argpartition(FAVOURITES, 1)[:, :FAVOURITES]
    told = world.topics[favourites].sum(1) / FAVOURITES**0.5  # a mean square norm of 1, since topics are independent
    # A vector of norm std * sqrt(K) has the standard deviation std along an item's vector of norm 1.
    scale = TASTE_STD * DIM**0.5
    mean = USER_TEXT_SHARE**0.5 * scale * told
    rest = (1 - USER_TEXT_SHARE) ** 0.5 * TASTE_STD * rng.standard_normal((num, DIM))
    return CloneUsers(
        favourites,
        mean,
        mean + rest,
        SCENE_TASTE_STD * rng.standard_normal((num, SCENES, DIM)),
        USER_STD * rng.standard_normal(num),
        rng.gamma(3.0, 1 / 3, (num, SCENES)),
    )


def logits(world: CloneWorld, users: CloneUsers, user: Ints, item: Ints) -> Floats:
    """Return the logits of rows [R] before the shift of their split."""
    items = world.items
    scene = items.scene[item]
    taste = users.taste[user] + users.of_scene[user, scene]
    affinity = (taste * items.latent[item]).sum(1)
    found: Floats = world.scene[scene] + items.effect[item] + users.leaning[user] + affinity
    return found
