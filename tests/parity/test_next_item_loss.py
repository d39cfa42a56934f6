"""The loss of next items is that of a slow reference: one task, one prefix and one candidate after the other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from next_items import split_of_events
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.core.sequences import sequences_of
from gmeta.data.candidates import AFTER_TRAINING, LOG_CHANCE, CandidateDraw, Draw
from gmeta.data.catalogue import Catalogue
from gmeta.data.schema import Feature, PackSchema
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.next_item import NextItemLearner
from gmeta.models.inputs import InputSpec
from gmeta.models.sasrec import PROMPT, SASRec

ITEMS, DOMAINS, DIM = 20, 3, 8
SEED = 3
HISTORIES = [[3, 5, 7, 2], [4], [9, 1], [6, 6, 11, 12, 8]]
DOMAIN = [0, *(1 + i % 2 for i in range(1, ITEMS))]


def side(tasks: list[list[int]]) -> tuple[Examples, dict[str, Lookup]]:
    width = max(1, *map(len, tasks))
    ids = torch.tensor([[*task, *[0] * (width - len(task))] for task in tasks])
    mask = torch.tensor([[i < len(task) for i in range(width)] for task in tasks])
    domain = torch.tensor(DOMAIN)[ids]
    examples = Examples(
        ids={"item": ids, "domain": domain},
        bags={},
        dense=torch.zeros(*ids.shape, 0),
        label=torch.ones(ids.shape),
        mask=mask,
        row=ids,
        item_cold=torch.zeros_like(mask),
    )
    return examples, {"item": Lookup("rows", ids), "domain": Lookup("rows", ITEMS + domain)}


def make(
    histories: list[list[int]], candidates: list[int], inner_loop: InnerLoop | None = None, **settings: object
) -> tuple[NextItemLearner, TaskBatch, EmbeddedRows]:
    torch.manual_seed(0)
    features = {"item": DIM, "domain": DIM}
    inputs = InputSpec(features, (), 0.0, item="item", owned=("item", "domain"))
    model = SASRec(inputs, blocks=2, heads=2, positions=4, **settings).double()
    learner = NextItemLearner(model, features, item="item", domain="domain", inner_loop=inner_loop, seed=SEED)
    learner = learner.double()
    weights = torch.randn(ITEMS + DOMAINS, DIM, dtype=torch.float64, requires_grad=True)
    (support, of_support), (query, of_query) = side([h[:-1] for h in histories]), side([h[-1:] for h in histories])
    shared, of_shared = side([candidates])
    task_id = torch.arange(len(histories)) + 10
    rows = sum(map(len, histories))
    batch = TaskBatch(support, query, task_id, len(histories), 1, 2, num_rows_global=rows, shared=shared)
    return learner, batch, EmbeddedRows({"rows": weights}, of_support, of_query, of_shared)


def slow_losses(
    learner: NextItemLearner,
    weights: Tensor,
    history: list[int],
    candidates: list[int],
    chance: list[float],
    prompt: Tensor | None = None,
    known: Sequence[int] = (),
    chosen: Callable[[int, list[int]], list[int]] = lambda place, positions: positions,
) -> list[Tensor]:
    """Return the loss of each event but the first, the sum over views, from a model that reads the events before it
    alone.

    Candidates that are `known` are left out, and `chosen(place, positions)` says which of the others are compared.
    """
    domain = torch.tensor(DOMAIN)
    bounds = [0, *accumulate(getattr(learner.model, "views", (DIM,)))]
    state_parts = [slice(*part) for part in pairwise(bounds)]

    def vectors(items: list[int]) -> dict[str, Tensor]:
        ids = torch.tensor(items)
        return {"item": weights[ids], "domain": weights[ITEMS + domain[ids]]}

    losses = []
    for t in range(1, len(history)):
        sequences, _ = sequences_of(torch.ones(1, t, dtype=torch.bool))
        events = vectors(history[:t])
        if prompt is not None:
            events[PROMPT] = prompt.expand(t, -1)
        state = learner.model.states(events, sequences)[-1]
        target = history[t]
        left = [
            position
            for position, c in enumerate(candidates)
            if c != target and DOMAIN[c] == DOMAIN[target] and c not in known
        ]
        compared = [candidates[position] for position in chosen(t, left)]
        losses.append(torch.zeros((), dtype=torch.float64))
        for view in state_parts:

            def score(item: int, view: slice = view, state: Tensor = state) -> Tensor:
                vector = learner.model.items(vectors([item]))[0]
                return vector[view] @ state[view] - chance[item]

            total = sum((score(c).exp() for c in compared), score(target).exp())
            losses[-1] = losses[-1] + total.log() - score(target)
    return losses


@pytest.mark.parametrize("views", [(DIM,), (3, 5)])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("every_event", [True, False])
@pytest.mark.parametrize("chances", [False, True])
def test_loss_and_gradients_are_those_of_the_slow_reference(
    views: tuple[int, ...], similarity: str, every_event: bool, chances: bool
) -> None:
    candidates = [1, 2, 3, 8, 8, 12, 13, 14]
    learner, batch, rows = make(HISTORIES, candidates, dropout=0.0, similarity=similarity, temperature=0.5)
    learner.every_event = every_event
    learner.model.views = views
    chance = [math.log(1 + i) / 10 for i in range(ITEMS)] if chances else [0.0] * ITEMS
    if chances:
        told = torch.tensor(chance, dtype=torch.float64)
        sides = {
            name: replace(part, given={LOG_CHANCE: told[part.ids["item"]].unsqueeze(-1)})
            for name, part in (("support", batch.support), ("query", batch.query), ("shared", batch.shared))
        }
        batch = replace(batch, **sides)

    loss, output = learner(rows, batch)
    weights = rows.weights["rows"]
    grads = torch.autograd.grad(loss, [weights, *learner.parameters()])

    slow = [slow_losses(learner, weights, history, candidates, chance) for history in HISTORIES]
    if every_event:
        expected = sum(sum(of) for of in slow) / sum(map(len, slow))
    else:
        expected = sum(of[-1] for of in slow if of) / len(HISTORIES)
    slow_grads = torch.autograd.grad(expected, [weights, *learner.parameters()])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert output.query_loss.shape == (4,)
    assert output.query_loss[1] == 0
    for grad, slow_grad in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow_grad, rtol=1e-10, atol=1e-10)


def slow_choice(task: int, each: int, epoch: int = 1, index: int = 2) -> Callable[[int, list[int]], list[int]]:
    """Choose the positions of the lowest hashes, one after the other, in whole numbers."""

    def chosen(place: int, positions: list[int]) -> list[int]:
        key = task
        for number in (SEED, epoch, index, -1):
            key = hashed(key + number)
        key = hashed(key + place)
        return sorted(positions, key=lambda position: hashed(key + position) % 2**63)[:each]

    return chosen


def hashed(word: int) -> int:
    """splitmix64 of a word."""
    x = (word + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("each", [0, 1, 3, 50])
@pytest.mark.parametrize("own_items", [True, False])
def test_few_candidates_and_own_items_are_those_of_the_slow_reference(each: int, own_items: bool) -> None:
    candidates = [1, 2, 3, 8, 8, 12, 13, 14, 5, 6, 7, 3, 11, 10, 9]
    learner, batch, rows = make(HISTORIES, candidates, dropout=0.0)
    learner.each, learner.own_items = each, own_items
    nothing = [0.0] * ITEMS

    def choice(task: int) -> Callable[[int, list[int]], list[int]]:
        return slow_choice(task, each or ITEMS)

    slow = [
        slow_losses(learner, rows.weights["rows"], h, candidates, nothing, None, () if own_items else h, choice(10 + t))
        for t, h in enumerate(HISTORIES)
    ]
    loss, _ = learner.train()(rows, batch)
    expected = sum(sum(of) for of in slow) / sum(map(len, slow))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    leaves = [rows.weights["rows"], *learner.parameters()]
    for grad, slow_grad in zip(*(torch.autograd.grad(value, leaves) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(grad, slow_grad, rtol=1e-10, atol=1e-10)


def test_adapting_leaves_out_what_the_user_had_and_not_what_is_asked() -> None:
    """After training candidates are chosen by the place of an event alone, so that a user's name changes nothing."""
    candidates, loop = [1, 2, 3, 8, 12, 13, 5, 7, 2], InnerLoop(adapt=[PROMPT], order="first", steps=1, lr=0.7)
    for train in (True, False):
        learner, batch, rows = make(HISTORIES, candidates, loop, dropout=0.0)
        learner.each, learner.own_items = 2, False
        learner.train(train)
        _, output = learner(rows, batch)
        for t, history in enumerate(HISTORIES):
            known = history[:-1]
            choice = slow_choice(10 + t, 2) if train else slow_choice(0, 2, AFTER_TRAINING, 0)
            nothing, weights = [0.0] * ITEMS, rows.weights["rows"]
            losses = slow_losses(learner, weights, known, candidates, nothing, learner.prompt, known, choice)
            expected = sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(output.support_loss[t], expected.detach(), rtol=1e-10, atol=1e-10)
    others = replace(batch, task_id=batch.task_id + 1, epoch=7, index=8)
    torch.testing.assert_close(learner.users(rows, others), learner.users(rows, batch), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["uniform", "popularity"])
@pytest.mark.parametrize("history", [[3, 5, 7, 2], [9, 1]])
def test_corrected_candidates_have_the_gradient_of_all_items_in_expectation(history: list[int], how: Draw) -> None:
    """exp(loss) - 1 is Q(target) times the sum over candidates c of exp(s_c - s_target) / Q(c). The mean over draws of
    that sum is the sum over all items of the domain that training has, and so is its derivative.
    """
    settings = {"dropout": 0.0, "similarity": "cosine", "temperature": 1.0}
    learner, batch, rows = make([history], sorted({item for events in HISTORIES for item in events}), **settings)
    leaves = [rows.weights["rows"], *learner.parameters()]
    learner.every_event = False
    full = learner(rows, batch)[0].exp() - 1
    expected = torch.autograd.grad(full, leaves)

    draw = draw_beside(HISTORIES, how)
    length = np.array([len(events) for events in HISTORIES])
    batch = replace(batch, stretches=np.stack([np.cumsum(length) - length, length]))
    drawn = [draw(replace(batch, index=index)) for index in range(600)]
    shared = [one.shared for one in drawn if one.shared is not None]
    _, batch, rows = make([history], torch.cat([one.ids["item"][0] for one in shared]).tolist(), **settings)
    chance = torch.cat([one.given[LOG_CHANCE] for one in shared], 1)
    assert batch.shared is not None
    batch = replace(batch, support=drawn[0].support, query=drawn[0].query)
    batch = replace(batch, shared=replace(batch.shared, given={LOG_CHANCE: chance}))
    times = DRAWN * drawn[0].query.given[LOG_CHANCE].double().exp().item()
    sampled = (learner(rows, batch)[0].exp() - 1) / (times * len(drawn))
    found = torch.autograd.grad(sampled, [rows.weights["rows"], *learner.parameters()])

    torch.testing.assert_close(sampled, full, rtol=0.04, atol=0)
    of_all = torch.cat([grad.flatten() for grad in expected])
    assert (torch.cat([grad.flatten() for grad in found]) - of_all).norm() <= 0.05 * of_all.norm()


DRAWN, IN_BATCH = 4, 6


def draw_beside(histories: list[list[int]], how: Draw) -> CandidateDraw:
    """A draw whose training events are those of these histories."""
    names = {"item": ITEMS, "domain": DOMAINS}
    features = tuple(Feature(name=n, kind="categorical", num_ids=num, table=n) for n, num in names.items())
    settings: dict[str, Any] = {"item": "item", "scenario": "domain", "next_item": True, "catalogue": ("domain",)}
    schema = PackSchema(features=features, numeric=(), label="label", binary_label=True, task="user", **settings)
    owned = {"domain": np.array(DOMAIN)}
    catalogue = Catalogue("item", owned, np.bincount(np.concatenate(histories), minlength=ITEMS))
    split = split_of_events(histories, schema, owned)
    return CandidateDraw(catalogue, schema, domain="domain", count=DRAWN, draw=how, in_batch=IN_BATCH, split=split)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("learn_lr", [True, False])
def test_adaptation_is_that_of_the_slow_reference(order: str, learn_lr: bool) -> None:
    """Each task takes its own steps, one after the other, and the outer gradient goes through them."""
    candidates = [1, 2, 3, 8, 12, 13]
    loop = InnerLoop(adapt=[PROMPT], order=order, steps=2, lr=0.7, learn_lr=learn_lr)
    learner, batch, rows = make(HISTORIES, candidates, loop, dropout=0.0)
    weights, rates = rows.weights["rows"], learner.inner_lr
    with torch.no_grad():
        learner.prompt.normal_()
        if rates is not None:
            rates.copy_(torch.tensor([[0.5], [0.9]]))
    leaves = [weights, *learner.parameters()]
    loss, output = learner(rows, batch)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)

    expected, before, nothing = torch.zeros((), dtype=torch.float64), [], [0.0] * ITEMS
    with sdpa_kernel(SDPBackend.MATH):
        for history in HISTORIES:
            prompt, first = learner.prompt, 0.0
            for step in range(2):
                losses = slow_losses(learner, weights, history[:-1], candidates, nothing, prompt)
                if not losses:
                    break
                support = sum(losses) / len(losses)
                first = support.item() if step == 0 else first
                (grad,) = torch.autograd.grad(support, [prompt], create_graph=order == "second", retain_graph=True)
                prompt = prompt - (0.7 if rates is None else rates[step, 0]) * grad
            before.append(first)
            asked = slow_losses(learner, weights, history, candidates, nothing, prompt)
            expected = expected + (asked[-1] if asked else 0)
    slow_grads = torch.autograd.grad(expected / len(HISTORIES), leaves, allow_unused=True)

    torch.testing.assert_close(loss, expected / len(HISTORIES), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.support_loss, torch.tensor(before, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    for grad, slow_grad in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow_grad, rtol=1e-8, atol=1e-9)
    users = learner.users(rows, batch)
    assert not torch.allclose(users[0], learner.users(rows, batch, steps=0)[0])


def test_tasks_together_are_tasks_alone_to_the_last_digits() -> None:
    learner, batch, rows = make(HISTORIES, [1, 2, 3], dropout=0.0)
    users = learner.users(rows, batch)

    for t, history in enumerate(HISTORIES):
        alone, one, own = make([history], [1, 2, 3], dropout=0.0)
        torch.testing.assert_close(alone.users(own, one)[0], users[t], rtol=1e-10, atol=1e-10)
    assert users[1].eq(0).all()  # nothing came before its only event


def test_dropout_depends_on_the_task_and_not_on_its_batch() -> None:
    learner, batch, rows = make(HISTORIES, [1, 2, 3], dropout=0.5)
    learner.train()
    together = learner(rows, batch)[1].query_loss

    for t, history in enumerate(HISTORIES):
        alone, one, own = make([history], [1, 2, 3], dropout=0.5)
        one = replace(one, task_id=batch.task_id[t : t + 1])
        torch.testing.assert_close(alone.train()(own, one)[1].query_loss[0], together[t], rtol=1e-6, atol=1e-6)
    learner.eval()
    assert not torch.equal(learner(rows, batch)[1].query_loss, together)


def test_a_rank_without_tasks_has_no_loss() -> None:
    learner, batch, rows = make(HISTORIES, [1, 2], dropout=0.0)
    none = torch.zeros(0, dtype=torch.int64)

    def empty(part: Examples) -> Examples:
        return replace(
            part,
            ids={name: ids[:0] for name, ids in part.ids.items()},
            mask=part.mask[:0],
            label=part.label[:0],
            dense=part.dense[:0],
        )

    lookups = [{n: replace(f, index=f.index[:0]) for n, f in of.items()} for of in (rows.support, rows.query)]
    batch = replace(batch, support=empty(batch.support), query=empty(batch.query), task_id=none)

    loss, output = learner(EmbeddedRows(rows.weights, *lookups, rows.shared), batch)

    assert loss.item() == 0
    loss.backward()
    assert output.query_loss.shape == (0,)
