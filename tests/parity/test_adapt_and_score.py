"""Adapt and score apart: the same numbers as in one go, for either engine, also when tasks are stored between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import FEATURES, Problem, lookup_of, make_problem, tasks_of
from safetensors.torch import load, save
from test_engines import ADAPTED_SETS, Net, learner_of
from test_modulation import modulated
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Examples, map_tensors
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.learner import MetaLearner

ENGINES = ("factored", "reference")


def learner_for(engine: str, modulation: str = "none", **settings: Any) -> MetaLearner:
    settings = {"adapt": ["embeddings", "dense"], "steps": 2, "engine": engine} | settings
    if modulation == "none":
        return learner_of(Net(dropout=0.3).double(), **settings)
    return modulated(Net(dropout=0.3), modulation, **settings)


def apart(learner: MetaLearner, problem: Problem, **changes: Any) -> tuple[FastWeights, Tensor]:
    """Adapt to the support's rows alone, then score with the query's alone, by indices made apart."""
    rows, batch = problem.rows, problem.batch
    sizes = {table: len(weight) for table, weight in rows.weights.items()}
    fast = learner.adapt(replace(rows, query={}), batch.support, learner.index_support(rows.support, sizes), **changes)
    index = learner.index_query(rows.query, sizes, fast.pairs)
    return fast, learner.score(fast, replace(rows, support={}), batch.query, index)


@pytest.mark.parametrize("modulation", ["none", "film", "cluster"])
@pytest.mark.parametrize("engine", ENGINES)
def test_apart_is_as_together(engine: str, modulation: str) -> None:
    problem, mask = make_problem(), make_problem().batch.query.mask
    for adapt in ADAPTED_SETS[::3]:
        learner = learner_for(engine, modulation, adapt=adapt).eval()
        together = learner(problem.rows, problem.batch)[1].query_logits
        fast, logits = apart(learner, problem)
        assert torch.equal(logits[mask], together[mask]), adapt
        assert not any(tensor.requires_grad for tensor in fast.tensors())
        assert logits.requires_grad
        for steps, expected in zip((0, 2), learner.predict(problem.rows, problem.batch), strict=True):
            assert torch.equal(apart(learner, problem, steps=steps)[1][mask], expected[mask]), adapt


@pytest.mark.parametrize("features", [tuple(FEATURES), ("user", "city"), ("history", "tags"), ("history", "user")])
@pytest.mark.parametrize("adapt", [["embeddings"], ["embeddings.[hc]*", "head"], ["dense"]])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_index_in_two_parts_is_the_joint_one(engine: str, adapt: list[str], features: tuple[str, ...]) -> None:
    if adapt == ["embeddings.[hc]*", "head"] and features == ("user", "city"):
        adapt = ["embeddings.city"]
    problem = make_problem(features=features, support=(4, 2, 0, 3), query=(2, 5, 2, 0))
    learner = learner_of(Net(features).double(), adapt=adapt, features=features, engine=engine)
    sizes = {table: len(weight) for table, weight in problem.rows.weights.items()}
    support, query = learner.index(problem.rows.support, problem.rows.query, sizes)
    alone = learner.index_support(problem.rows.support, sizes)
    after = learner.index_query(problem.rows.query, sizes, alone.pairs)
    assert bool(alone.pairs) == (adapt != ["dense"])
    for keys in alone.pairs.values():
        assert [*map(tuple, keys.tolist())] == sorted(set(map(tuple, keys.tolist())))
    for ours, theirs in ((alone, support), (after, query)):
        found: list[list[Tensor]] = [[], []]
        for plan, tensors in zip((ours, theirs), found, strict=True):
            map_tensors(plan, lambda tensor, tensors=tensors: tensors.append(tensor) or tensor)
        assert len(found[0]) == len(found[1])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def fetched(problem: Problem, seed: int) -> tuple[EmbeddedRows, EmbeddedRows, dict[str, Tensor], dict[str, Tensor]]:
    """Rows of the support and of the query as two fetches, each of the rows it needs, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    sides, names = [], []
    for side in (problem.rows.support, problem.rows.query):
        weights, table_rows, places = {}, {}, {}
        for table, weight in problem.rows.weights.items():
            needed = torch.cat([lookup.index.flatten() for lookup in side.values() if lookup.table == table]).unique()
            needed = needed[torch.randperm(len(needed), generator=generator)]
            places[table] = torch.full((len(weight),), -1).scatter(0, needed, torch.arange(len(needed)))
            weights[table], table_rows[table] = weight.detach()[needed], needed
        moved = {name: replace(lookup, index=places[lookup.table][lookup.index]) for name, lookup in side.items()}
        sides.append((weights, moved))
        names.append(table_rows)
    support, query = sides
    return EmbeddedRows(support[0], support[1], {}), EmbeddedRows(query[0], {}, query[1]), names[0], names[1]


@pytest.mark.parametrize("modulation", ["none", "film"])
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_the_query_are_fetched_later(engine: str, modulation: str) -> None:
    problem, mask = make_problem(), make_problem().batch.query.mask
    learner = learner_for(engine, modulation).eval()
    expected = learner.predict(problem.rows, problem.batch)[1]
    support, query, first, second = fetched(problem, 3)
    sizes = [{table: len(weight) for table, weight in rows.weights.items()} for rows in (support, query)]
    fast = learner.adapt(support, problem.batch.support, learner.index_support(support.support, sizes[0]))
    fast = FastWeights.from_state_dict(load(save(fast.with_row_ids(first).state_dict())))
    index = learner.index_query(query.query, sizes[1], fast.pairs, second)
    torch.testing.assert_close(learner.score(fast, query, problem.batch.query, index)[mask], expected[mask])


def stored(fast: FastWeights) -> FastWeights:
    return FastWeights.from_state_dict(dict(reversed(fast.state_dict().items())))


def query_of(problem: Problem, order: list[int]) -> tuple[EmbeddedRows, Examples]:
    """The query of some tasks, and how it reads the same rows."""
    lookups = {}
    for name, lookup in problem.rows.query.items():
        parts = [lookup_of(lookup, task, task + 1) for task in order]
        lengths = None if lookup.lengths is None else torch.cat([part.lengths for part in parts])
        lookups[name] = replace(lookup, index=torch.cat([part.index for part in parts]), lengths=lengths)
    side = problem.batch.query
    tensors = {name: getattr(side, name)[order] for name in ("dense", "label", "mask", "row", "item_cold")}
    return EmbeddedRows(problem.rows.weights, {}, lookups), Examples({}, {}, **tensors)


@pytest.mark.parametrize("modulation", ["none", "film", "cluster"])
@pytest.mark.parametrize("engine", ENGINES)
def test_tasks_are_chosen_joined_and_stored(engine: str, modulation: str) -> None:
    """In another order, one of them twice, adapted in two batches whose supports have different lengths."""
    problem, order = make_problem(), [3, 0, 2, 1, 0]
    learner = learner_for(engine, modulation, learn_lr=True).eval()
    fast, logits = apart(learner, problem)
    joined = FastWeights.join(
        [stored(fast.of_tasks([3, 0])), stored(fast.of_tasks([])), stored(fast.of_tasks([2, 1, 0]))]
    )
    rows, query = query_of(problem, order)
    scored = learner.score(joined, rows, query)
    torch.testing.assert_close(scored[query.mask], logits[order][query.mask], rtol=1e-12, atol=1e-12)
    halves = []
    for start, stop in ((0, 1), (1, 4)):
        lookups = {name: lookup_of(lookup, start, stop) for name, lookup in problem.rows.support.items()}
        support = tasks_of(problem.batch, start, stop).support
        longest = int(support.mask.sum(1).max())
        lookups = {
            name: replace(found, index=found.index[:, :longest])
            if found.lengths is None
            else replace(found, lengths=found.lengths[:, :longest])
            for name, found in lookups.items()
        }
        support = replace(
            support, dense=support.dense[:, :longest], label=support.label[:, :longest], mask=support.mask[:, :longest]
        )
        halves.append(learner.adapt(EmbeddedRows(problem.rows.weights, lookups, {}), support))
    rows, query = query_of(problem, [0, 1, 2, 3])
    again = learner.score(FastWeights.join(halves), rows, query)
    torch.testing.assert_close(again[query.mask], logits[query.mask], rtol=1e-12, atol=1e-12)


def test_the_reference_applies_what_the_factored_engine_adapted() -> None:
    problem = make_problem()
    for modulation in ("none", "film"):
        ours, theirs = (learner_for(engine, modulation).eval() for engine in ENGINES)
        fast, logits = apart(ours, problem)
        mask = problem.batch.query.mask
        torch.testing.assert_close(theirs.score(fast, problem.rows, problem.batch.query)[mask], logits[mask])
        whole, _ = apart(theirs, problem)
        with pytest.raises(ValueError, match=r"'first\.weight' whole.*reference engine"):
            ours.score(whole, problem.rows, problem.batch.query)


def test_what_does_not_fit_is_refused() -> None:
    problem, learner = make_problem(), learner_for("factored").eval()
    fast, _ = apart(learner, problem)
    with pytest.raises(ValueError, match=r"of 2 tasks cannot score examples of 4 tasks.*of_tasks"):
        learner.score(fast.of_tasks([0, 1]), problem.rows, problem.batch.query)
    with pytest.raises(IndexError, match="task 4 of fast weights that hold 4 tasks"):
        fast.of_tasks([4])
    with pytest.raises(ValueError, match="cannot join 2 fast weights of different inner loops"):
        FastWeights.join([fast, apart(learner, problem, steps=1)[0]])
    with pytest.raises(ValueError, match="cannot join 0 fast weights"):
        FastWeights.join([])


def test_plain_training_adapts_nothing_and_scores_all_the_same() -> None:
    problem = make_problem()
    learner = learner_of(Net(dropout=0.3).double(), adapt=[]).eval()
    fast, logits = apart(learner, problem)
    assert fast.tensors() == []
    assert fast.num_tasks == 4
    mask = problem.batch.query.mask
    torch.testing.assert_close(logits[mask], learner.predict(problem.rows, problem.batch)[1][mask])
    assert stored(FastWeights.join([fast, fast])).num_tasks == 8
