"""A row of weight w counts as w rows: in both engines, in plain training and in a last layer in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import FEATURES, Problem, make_problem
from test_closed_form import Solved
from test_engines import Net, assert_same, learner_of
from torch import Tensor, nn

from gmeta.core.batch import Examples, Lookup

NAMES = ("user", "item", "city")  # one-valued features, whose rows are easily repeated
SIZES = {"support": (4, 2, 0, 3, 2), "query": (2, 3, 2, 0, 1)}


def weighted(weights: Tensor, problem: Problem) -> Problem:
    """The problem with weights [T, S] of its support; those of its query are the same numbers in reverse."""
    batch = problem.batch
    of_query = weights.flip(0)[:, : batch.query.mask.shape[1]]
    sides = ((batch.support, weights[:, : batch.support.mask.shape[1]]), (batch.query, of_query))
    support, query = (replace(side, weight=torch.where(side.mask, w, 0).double()) for side, w in sides)
    return Problem(problem.rows, replace(batch, support=support, query=query))


def repeated(problem: Problem) -> Problem:
    """Whole weights as rows, none of which has a weight."""
    sides = {}
    for name in ("support", "query"):
        side: Examples = getattr(problem.batch, name)
        assert side.weight is not None
        counts = torch.where(side.mask, side.weight, 0).long()
        places = [torch.arange(len(of)).repeat_interleave(of) for of in counts]
        longest = max(map(len, places))
        mask = torch.stack([torch.arange(longest) < len(place) for place in places])
        index = torch.stack([torch.nn.functional.pad(place, (0, longest - len(place))) for place in places])

        def rows(values: Tensor, index: Tensor = index, mask: Tensor = mask) -> Tensor:
            found = values[torch.arange(len(values)).unsqueeze(1), index]
            return torch.where(mask.view(*mask.shape, *[1] * (found.dim() - 2)), found, 0)

        ids = {feature: rows(side.ids[feature]) for feature in NAMES}
        sides[name] = Examples(ids, {}, rows(side.dense), rows(side.label), mask, rows(side.row), rows(side.item_cold))
    lookups = [{f: Lookup(FEATURES[f][0], side.ids[f]) for f in NAMES} for side in sides.values()]
    return Problem(replace(problem.rows, support=lookups[0], query=lookups[1]), replace(problem.batch, **sides))


def whole_weights(binary: bool = True) -> Problem:
    """Weights 0 to 3; all of one task are 0."""
    problem = make_problem(features=NAMES, binary=binary, **SIZES)
    weights = torch.randint(0, 4, (5, 4), generator=torch.Generator().manual_seed(2))
    weights[4] = 0
    return weighted(weights, problem)


def result(problem: Problem, model: nn.Module, **settings: object) -> dict[str, Tensor]:
    learner = learner_of(model, features=NAMES, **settings)
    loss, out = learner(problem.rows, problem.batch)
    named = {**dict(learner.named_parameters()), **problem.rows.weights}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    seen = {"loss": loss.detach(), "query_loss": out.query_loss, "support_loss": out.support_loss}
    return seen | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("engine", ["factored", "reference"])
@pytest.mark.parametrize("prior", [0.0, 2.0])
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_weight_is_so_many_rows(engine: str, prior: float, order: str) -> None:
    problem, settings = whole_weights(), {"engine": engine, "prior": prior, "order": order, "steps": 2}
    found = result(problem, Net(NAMES).double(), **settings)
    assert_same(found, result(repeated(problem), Net(NAMES).double(), **settings))
    assert found["loss"] > 0


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_plain_training_counts_weights(loss: str) -> None:
    problem = whole_weights(binary=loss == "bce")
    found = result(problem, Net(NAMES).double(), adapt=[], loss=loss)
    assert_same(found, result(repeated(problem), Net(NAMES).double(), adapt=[], loss=loss))


class _Solved(Solved):
    """Reads one-valued features alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6 + 6 + 3 + 2, 4)
        nn.init.constant_(self.first.weight, 0.05)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.cat([embedded[name] for name in NAMES] + [dense], -1)
        return self.end(torch.tanh(self.first(x)), embedded["city"].sum(-1))


@pytest.mark.parametrize("adapt", [["last_layer"], ["last_layer", "embeddings"]])
@pytest.mark.parametrize("loss", ["bce", "mse"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_last_layer_is_solved_for_weighted_rows(adapt: list[str], loss: str, order: str) -> None:
    problem, settings = whole_weights(binary=loss == "bce"), {"adapt": adapt, "loss": loss, "order": order}
    torch.manual_seed(0)
    model = _Solved().double()
    assert_same(result(problem, model, **settings), result(repeated(problem), model, **settings), 1e-8)


@pytest.mark.parametrize("engine", ["factored", "reference"])
def test_weights_of_one_change_nothing(engine: str) -> None:
    problem = make_problem(features=NAMES, **SIZES)
    ones = weighted(torch.ones(5, 4), problem)
    for settings in ({"prior": 1.0}, {"adapt": []}):
        found = result(ones, Net(NAMES).double(), engine=engine, **settings)
        assert_same(found, result(problem, Net(NAMES).double(), engine=engine, **settings), 1e-14)


def test_engines_agree_on_weights_that_are_no_whole_numbers() -> None:
    problem = make_problem(**SIZES)
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    problem = weighted(weights, problem)
    found = []
    for engine in ("factored", "reference"):
        learner = learner_of(Net().double(), engine=engine, steps=3, prior=0.5)
        loss, out = learner(problem.rows, problem.batch)
        grads = torch.autograd.grad(loss, list(learner.parameters()))
        found.append({"loss": loss.detach(), "support_loss": out.support_loss} | dict(enumerate(grads)))
    assert_same(*found)
