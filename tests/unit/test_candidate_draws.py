"""What a batch of next items is compared with is a function of (seed, epoch, batch)."""

import numpy as np
import torch

from gmeta.core.batch import Examples, TaskBatch
from gmeta.data.candidates import LOG_CHANCE, CandidateDraw, catalogue_examples
from gmeta.data.catalogue import Catalogue
from gmeta.data.schema import Feature, PackSchema

NUM_IDS = 31
DOMAIN = np.array([0, *([1] * 20), *([2] * 10)])
COUNT = np.array([0, *range(20), *([5] * 10)])
TITLE = np.arange(NUM_IDS) + 2
CATALOGUE = Catalogue("item", {"domain": DOMAIN, "title": TITLE}, COUNT)
SCHEMA = PackSchema(
    features=(
        Feature(name="item", kind="categorical", num_ids=NUM_IDS, table="item"),
        Feature(name="domain", kind="categorical", num_ids=3, table="domain"),
        Feature(name="hour", kind="categorical", num_ids=25, table="hour"),
        Feature(name="title", kind="categorical", num_ids=30, table="title", num_texts=40),
    ),
    numeric=(),
    label="label",
    binary_label=True,
    task="user",
    item="item",
    scenario="domain",
    next_item=True,
    catalogue=("domain", "title"),
)


def draw(count: int, **settings: object) -> CandidateDraw:
    return CandidateDraw(CATALOGUE, SCHEMA, domain="domain", count=count, **settings)


def test_each_domain_has_its_own_draws_and_batches_differ() -> None:
    first = draw(200).drawn(0, 0)

    assert np.bincount(DOMAIN[first]).tolist() == [0, 200, 200]
    assert np.array_equal(first, draw(200).drawn(0, 0))
    for other in (draw(200, seed=1).drawn(0, 0), draw(200).drawn(1, 0), draw(200).drawn(0, 1)):
        assert not np.array_equal(first, other)
    assert set(first[:200]) == set(range(1, 21))


def test_all_items_where_none_is_drawn() -> None:
    assert draw(0).drawn(3, 4).tolist() == list(range(1, NUM_IDS))


def test_popularity_draws_by_count_and_tells_chances() -> None:
    drawn = draw(50_000, draw="popularity").drawn(0, 0)
    shares = np.bincount(drawn[:50_000], minlength=21)[1:21] / 50_000

    np.testing.assert_allclose(shares, (COUNT[1:21] + 1) / 210, atol=0.005)
    batch = batch_of([[20, 1], [25, 21]])
    found = draw(4, draw="popularity")(batch)
    assert found.shared is not None
    chance = found.query.given[LOG_CHANCE].squeeze(-1).exp()
    np.testing.assert_allclose(chance.numpy(), [[20 / 210, 1 / 210], [0.1, 0.1]], rtol=1e-5)
    assert found.shared.given[LOG_CHANCE].shape == (1, 8, 1)


def test_candidates_have_what_items_own_and_nothing_else() -> None:
    found = catalogue_examples(CATALOGUE, np.array([1, 29, 30]), SCHEMA)

    assert found.ids["item"].tolist() == [[1, 29, 30]]
    assert found.ids["domain"].tolist() == [[1, 2, 2]]
    assert found.ids["hour"].tolist() == [[0, 0, 0]]
    assert found.ids["title"].tolist() == [[3, 0, 0]]  # 31 and 32 are texts that no row stands for
    assert found.given["title.text"].tolist() == [[[3], [31], [32]]]
    assert found.mask.all()


def batch_of(items: list[list[int]]) -> TaskBatch:
    ids = torch.tensor(items)
    side = Examples(
        {"item": ids}, {}, torch.zeros(2, 2, 0), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), ids, ids > 99
    )
    return TaskBatch(side, side, torch.arange(2), 2, 0, 0)
