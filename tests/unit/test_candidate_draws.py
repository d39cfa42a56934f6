"""What a batch of next items is compared with is a function of (seed, epoch, batch)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from next_items import split_of_events

from gmeta.core.batch import Examples, TaskBatch
from gmeta.data.candidates import LOG_CHANCE, CandidateDraw, catalogue_examples
from gmeta.data.catalogue import Catalogue
from gmeta.data.loader import TaskLoader
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
    assert set(first[:200]) == set(range(2, 21)), "no training row has item 1"


def test_all_items_that_training_has_where_none_is_drawn() -> None:
    assert draw(0).drawn(3, 4).tolist() == list(range(2, NUM_IDS))


def test_of_a_domain_that_training_lacks_all_items_are_drawn() -> None:
    catalogue = Catalogue("item", CATALOGUE.owned, np.where(DOMAIN == 2, 0, COUNT))
    drawn = CandidateDraw(catalogue, SCHEMA, domain="domain", count=200).drawn(0, 0)
    assert set(drawn[200:]) == set(range(21, 31))


def test_popularity_draws_by_count_and_tells_chances() -> None:
    drawn = draw(50_000, draw="popularity").drawn(0, 0)
    shares = np.bincount(drawn[:50_000], minlength=21)[1:21] / 50_000

    np.testing.assert_allclose(shares, [0, *(COUNT[2:21] + 1) / 209], atol=0.005)
    batch = batch_of([[20, 1], [25, 21]])
    found = draw(4, draw="popularity")(batch)
    assert found.shared is not None
    chance = found.query.given[LOG_CHANCE].squeeze(-1).exp()
    np.testing.assert_allclose(chance.numpy(), [[20 / 209, 2 / 209], [0.1, 0.1]], rtol=1e-5)
    assert found.shared.given[LOG_CHANCE].shape == (1, 8, 1)


EVENTS = [[1, 2, 1, 25], [3, 1], [1, 21, 22, 21, 5], [20, 25, 1], [2, 2, 30]]
OF_EVENTS = Catalogue("item", CATALOGUE.owned, np.bincount(np.concatenate(EVENTS), minlength=NUM_IDS))


def draw_of_events(count: int, in_batch: int, **settings: object) -> CandidateDraw:
    split = split_of_events(EVENTS, SCHEMA, OF_EVENTS.owned)
    return CandidateDraw(OF_EVENTS, SCHEMA, domain="domain", count=count, in_batch=in_batch, split=split, **settings)


def batches(rank: int = 0, world_size: int = 1, tasks: int = 5) -> TaskLoader[TaskBatch]:
    split = split_of_events(EVENTS, SCHEMA, OF_EVENTS.owned)
    return TaskLoader(split, tasks_per_batch=tasks, seed=0, rank=rank, world_size=world_size, prefetch=0)


def items_of(batch: TaskBatch) -> list[int]:
    assert batch.shared is not None
    return batch.shared.ids["item"][0].tolist()


def test_events_of_the_whole_batch_are_candidates_on_every_rank() -> None:
    draws = draw_of_events(4, 100)
    found = [items_of(draws(next(batches(rank, 3)))) for rank in range(3)]

    assert found[0] == found[1] == found[2]
    assert found[0][:8] == draws.drawn(0, 0).tolist()
    assert sorted(found[0][8:]) == sorted(np.concatenate(EVENTS))  # 100 are asked for, and there are 17

    few = [items_of(draw_of_events(4, 6)(batch))[8:] for _, batch in zip(range(3), batches(), strict=False)]
    assert [len(items) for items in few] == [6, 6, 6]
    assert few[0] != few[1]  # another epoch, and so other events
    for items in few:
        assert all(np.bincount(items, minlength=NUM_IDS) <= OF_EVENTS.count)


def test_a_short_batch_has_the_events_that_it_has() -> None:
    events = [np.concatenate([EVENTS[task] for task in batch.task_id.tolist()]) for batch in loaded(2, 3)]
    draws = draw_of_events(4, 4)
    for batch, own in zip(loaded(2, 3), events, strict=True):
        found = items_of(draws(batch))[8:]
        assert len(found) == min(4, len(own))
        assert set(found) <= set(own)


def loaded(tasks: int, count: int) -> list[TaskBatch]:
    return [batch for _, batch in zip(range(count), batches(tasks=tasks), strict=False)]


@pytest.mark.parametrize("how", ["uniform", "popularity"])
def test_chances_are_the_expected_numbers(how: str) -> None:
    """So that the sum over candidates of exp(score) / chance is that over all items, in expectation."""
    draws, (batch,) = draw_of_events(3, 5, draw=how), loaded(5, 1)
    found = [items_of(draws(replace(batch, index=index))) for index in range(400)]
    numbers = np.stack([np.bincount(items, minlength=NUM_IDS) for items in found])[:, 1:]
    every = catalogue_examples(OF_EVENTS, np.arange(1, NUM_IDS), SCHEMA)
    told = draws._with_chances(TaskBatch(every, every, torch.arange(1), 1, 0, 0, shared=every), 5)
    expected = 3 * told.query.given[LOG_CHANCE].double().exp().numpy().reshape(-1)

    assert expected[25 - 1] == pytest.approx(3 * (1 / 4 if how == "uniform" else 3 / 10) + 5 * 2 / 17)
    error = numbers.std(0) / len(numbers) ** 0.5
    trained = OF_EVENTS.count[1:] > 0
    assert (np.abs(numbers.mean(0) - expected) < 4.5 * error)[trained].all()
    assert not numbers[:, ~trained].any()


def test_events_of_training_stand_for_those_of_a_batch_after_it() -> None:
    draws = draw_of_events(3, 2000)
    found = items_of(draws.after_training(batch_of([[20, 1], [25, 21]])))

    assert found[:6] == draws.drawn((1 << 31) - 1, 0).tolist()
    share = np.bincount(found[6:], minlength=NUM_IDS) / 2000
    np.testing.assert_allclose(share, OF_EVENTS.count / OF_EVENTS.count.sum(), atol=0.04)
    assert share[OF_EVENTS.count == 0].sum() == 0


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
