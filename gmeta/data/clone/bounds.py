"""What the best models could know of the clone's rows of valid and test, and how well it sorts them.

A user is told by its own rows of train: its vectors have a Gaussian prior and enter the logit linearly, so that their
posterior is nearly Gaussian (Laplace's approximation: mode and curvature). Items that train has are known, as they are
to a model of unboundedly many users; of others text and image tell their part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gmeta.data.antm2c.published import SCENES
from gmeta.data.clone.rows import CloneRows
from gmeta.data.clone.world import (
    DIM,
    IMAGE_SHARE,
    ITEM_STD,
    SCENE_TASTE_STD,
    TASTE_STD,
    TEXT_SHARE,
    USER_STD,
    USER_TEXT_SHARE,
    CloneUsers,
    CloneWorld,
    Floats,
    Ints,
)
from gmeta.data.synthetic import exact_auc, sigmoid


@dataclass(frozen=True)
class Knowledge:
    """What a reference knows besides ids and the labels of train."""

    text: bool
    image: bool


REFERENCES: Mapping[str, Knowledge | None] = {
    "prior": None,
    "ids": Knowledge(text=False, image=False),
    "ids+image": Knowledge(text=False, image=True),
    "ids+text": Knowledge(text=True, image=False),
    "posterior": Knowledge(text=True, image=True),
    "oracle": None,
}
"""Name -> what it knows. `prior` knows rates of clicks alone, `oracle` the truth."""
MEANING = {
    "prior": "knows the rate of clicks of each scene",
    "ids": "knows users by their rows of train, and items that train has",
    "ids+image": "ids; items that train has not are told in part by their images",
    "ids+text": "ids; texts tell users in part, and items that train has not",
    "posterior": "ids, texts and images: the most that can be learned",
    "oracle": "knows the tastes themselves",
}


def scores_of_block(
    world: CloneWorld, shift: Floats, users: CloneUsers, rows: CloneRows
) -> tuple[Ints, dict[str, Floats]]:
    """Return which rows of a block are of valid and test, [Q], and their click probability by each of `REFERENCES`."""
    judged = np.flatnonzero(rows.split > 0)
    base = world.scene[world.items.scene[rows.item]] + shift[rows.split]
    found = {}
    for name, knowledge in REFERENCES.items():
        if knowledge is not None:
            found[name] = _posterior(world, knowledge, base, users, rows)[judged]
        else:
            found[name] = sigmoid((base if name == "prior" else rows.logit)[judged])
    return judged, found


def _posterior(world: CloneWorld, knows: Knowledge, base: Floats, users: CloneUsers, rows: CloneRows) -> Floats:
    """Return the click probability of rows of valid and test [R]; zeros for those of train."""
    items, out = world.items, np.zeros(len(rows.user))
    known, unknown_share = _known_vectors(world, knows)
    taste = TASTE_STD * ((1 - USER_TEXT_SHARE) ** 0.5 if knows.text else 1.0)
    scale = np.concatenate([[USER_STD], np.full(DIM, taste), np.full(SCENES * DIM, SCENE_TASTE_STD)])
    vector, scene, new = known[rows.item], items.scene[rows.item], ~items.in_train[rows.item]
    offset = base + np.where(new, 0.0, items.effect[rows.item])
    if knows.text:
        offset = offset + (users.mean[rows.user] * vector).sum(1)
    starts = np.searchsorted(rows.user, np.arange(len(users) + 1))
    for user in range(len(users)):
        mine = np.arange(starts[user], starts[user + 1])
        train, query = mine[rows.split[mine] == 0], mine[rows.split[mine] > 0]
        if not len(query):
            continue
        design = _design(vector[train], scene[train]) * scale
        mode, covariance = laplace(offset[train], design, rows.label[train])
        asked = _design(vector[query], scene[query]) * scale
        mean = offset[query] + asked @ mode
        spread = ((asked @ covariance) * asked).sum(1)
        # what is not known of a new item's vector, in any direction alike, and of its effect
        own = mode[1 : 1 + DIM] * taste + (mode[1 + DIM :] * SCENE_TASTE_STD).reshape(SCENES, DIM)[scene[query]]
        own = own + (users.mean[user] if knows.text else 0.0)
        hidden = unknown_share[rows.item[query]] * (own**2).sum(1) / DIM + ITEM_STD**2
        spread = spread + np.where(new[query], hidden, 0.0)
        out[query] = sigmoid(mean / np.sqrt(1 + math.pi / 8 * spread))
    return out


def _known_vectors(world: CloneWorld, knows: Knowledge) -> tuple[Floats, Floats]:
    """Return what is known of each item's vector [I, K], and what share of its variance is not [I]."""
    items = world.items
    image = (knows.image & items.has_image)[:, None]
    told = (items.of_text if knows.text else 0.0) + np.where(image, items.of_image, 0.0)
    share = 1 - (TEXT_SHARE if knows.text else 0.0) - np.where(image[:, 0], IMAGE_SHARE, 0.0)
    seen = items.in_train
    return np.where(seen[:, None], items.latent, told), np.where(seen, 0.0, share)


def _design(vector: Floats, scene: Ints) -> Floats:
    """Return what rows [n] multiply a user's numbers with, [n, 1 + K + S K]: the leaning, u, and d of each scene."""
    of_scene = np.zeros((len(scene), SCENES, DIM))
    of_scene[np.arange(len(scene)), scene] = vector
    return np.concatenate([np.ones((len(scene), 1)), vector, of_scene.reshape(len(scene), SCENES * DIM)], 1)


def laplace(offset: Floats, design: Floats, label: Ints) -> tuple[Floats, Floats]:
    """Return the mode [D] of z ~ N(0, I) given labels of logit = offset [n] + design [n, D] z, and the inverse of minus
    the second derivative of the log density there, [D, D]. Newton's steps, shortened where the density would fall.
    """
    dim = design.shape[1]
    sign = 2.0 * label - 1

    def objective(z: Floats) -> float:
        return float(np.logaddexp(0, -sign * (offset + design @ z)).sum() + 0.5 * z @ z)

    mode = np.zeros(dim)
    value, precision = objective(mode), np.eye(dim)
    for _ in range(50):
        p = sigmoid(offset + design @ mode)
        precision = np.eye(dim) + (design.T * (p * (1 - p))) @ design
        step = np.linalg.solve(precision, design.T @ (label - p) - mode)
        size = 1.0
        while (after := objective(mode + size * step)) > value and size > 1e-6:
            size /= 2
        mode, value = mode + size * step, min(value, after)
        if float(np.linalg.norm(step)) < 1e-5:
            break
    return mode, np.asarray(np.linalg.inv(precision), np.float64)


def aucs_by_scene(score: Floats, label: Ints, scene: Ints) -> list[float]:
    """Return the AUC of each scene, NaN where it has one kind of label alone."""
    return [exact_auc(score[scene == number], label[scene == number]) for number in range(SCENES)]
