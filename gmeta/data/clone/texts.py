"""Texts and further columns of the clone's rows, as the log has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmeta.data.antm2c.published import COLUMNS, DEEP_FEATURES, SEQUENCES, SEVERAL_NAMES
from gmeta.data.clone.rows import CloneRows
from gmeta.data.clone.words import PLAIN, TOPICS
from gmeta.data.clone.world import CloneItems, CloneUsers, Ints

SEPARATOR = ","
"""Between the entries of a list. What the released files have there is not published."""
MOST_NAMES = 19
NO_TITLE, NUMBER_TITLE = 0.01, 0.01
"""Shares of items whose title is empty, or a number that tells nothing."""
_ABOUT = 0.8
"""The share of a user's entities that are about its favourite topics."""
_DAY = 86_400


class ItemTexts:
    """The title of each item, and the versions of its names."""

    def __init__(self, items: CloneItems, seed: int) -> None:
        rng = np.random.default_rng([seed, 2])
        num = len(items)
        words, plain = rng.random((num, len(TOPICS[0]))).argsort(1)[:, :3], rng.integers(len(PLAIN), size=(num, 2))
        kind = rng.random(num)
        titles = []
        for item in range(num):
            own = [TOPICS[items.topic[item]][word] for word in words[item]]
            title = " ".join([PLAIN[plain[item, 0]], *own, PLAIN[plain[item, 1]]])
            titles.append("" if kind[item] < NO_TITLE else str(item) if kind[item] < NO_TITLE + NUMBER_TITLE else title)
        self.titles = pa.array(titles)
        several = rng.random(num) < SEVERAL_NAMES
        versions = np.where(several, np.minimum(1 + rng.geometric(0.4, num), MOST_NAMES), 1)
        self.first, self.versions = np.cumsum(versions) - versions, versions
        of_version = np.repeat(items.topic, versions)
        chosen = rng.integers(len(TOPICS[0]), size=(len(of_version), 3))
        self.names = pa.array(
            [
                SEPARATOR.join(dict.fromkeys(TOPICS[topic][word] for word in words))
                for topic, words in zip(of_version, chosen, strict=True)
            ]
        )

    def names_of(self, item: Ints, rng: np.random.Generator) -> pa.Array:
        """Return the names of items [R], in a version that each row draws."""
        version = (rng.random(len(item)) * self.versions[item]).astype(np.int64)
        return self.names.take(pa.array(self.first[item] + version))


def table_of_rows(
    users: CloneUsers, rows: CloneRows, items: CloneItems, texts: ItemTexts, first_user: int, rng: np.random.Generator
) -> pa.Table:
    """Return rows with all columns of the log, in its order."""
    days, day_of_row = np.unique(rows.user * 1000 + (rows.second - rows.second.min()) // _DAY, return_inverse=True)
    columns: dict[str, Any] = {
        "user_id": first_user + rows.user,
        "item_id": rows.item,
        "log_time": pc.strftime(pa.array(rows.second, pa.timestamp("s")), format="%Y-%m-%d %H:%M:%S"),
        "label": rows.label,
        "item_entity_names": texts.names_of(rows.item, rng),
        "item_title": texts.titles.take(pa.array(rows.item)),
        "scene": items.scene[rows.item],
    }
    at = pa.array(day_of_row)
    for name in SEQUENCES:
        columns[name] = pa.array(_entities(users.favourites[days // 1000], rng)).take(at)
    columns |= _deep_features(rows, items, rng)
    return pa.table({name: columns[name] for name in COLUMNS})


def _entities(favourites: Ints, rng: np.random.Generator) -> list[str]:
    """Return the entities of some users on a day each, a list as text; a tenth are empty."""
    length = np.where(rng.random(len(favourites)) < 0.1, 0, rng.integers(2, 9, len(favourites)))
    about = rng.random((len(favourites), 8)) < _ABOUT
    own = favourites[np.arange(len(favourites))[:, None], rng.integers(favourites.shape[1], size=about.shape)]
    topic = np.where(about, own, rng.integers(len(TOPICS), size=about.shape))
    word = rng.integers(len(TOPICS[0]), size=about.shape)
    return [
        SEPARATOR.join(TOPICS[t][w] for t, w in zip(topics[:n], words[:n], strict=True))
        for topics, words, n in zip(topic.tolist(), word.tolist(), length.tolist(), strict=True)
    ]


def _deep_features(rows: CloneRows, items: CloneItems, rng: np.random.Generator) -> Mapping[str, Any]:
    """Return columns whose meaning is not told, of all kinds: numbers, codes, nearly nothing. They tell nothing of the
    click that ids and times do not tell.
    """
    num = len(rows.item)
    found: list[Any] = [
        np.log(items.popularity[rows.item]).round(4),
        (rows.second // 3600) % 24,
        np.bincount(rows.user)[rows.user],
        pa.array([f"c{code:02d}" for code in range(30)]).take(pa.array(rows.item % 30)),
        np.zeros(num, np.int64),
        pa.array(np.where(rng.random(num) < 0.95, np.nan, rng.integers(5, size=num)), from_pandas=True),
    ]
    found += [rng.integers(10**number, size=num) for number in range(1, 7)]
    found += [rng.standard_normal(num).round(3) for _ in range(len(DEEP_FEATURES) - len(found) - 3)]
    found += [pa.array([f"v{code}" for code in range(5)]).take(pa.array(rng.integers(5, size=num))) for _ in range(3)]
    return dict(zip(DEEP_FEATURES, found, strict=True))
