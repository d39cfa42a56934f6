"""Several labels: both engines against each other, and against single labels, gradients included."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import DIMS, FEATURES, NUM_NUMERIC, Problem, make_problem
from test_engines import Net, assert_same, learner_of
from torch import Tensor, nn

from gmeta.data.schema import LabelColumn

LABELS = (LabelColumn(name="a", loss="bce"), LabelColumn(name="b", loss="mse", weight=0.3))


class Twin(nn.Module):
    """One network with two outputs."""

    head = "out"
    decision_layers = ("first", "out")

    def __init__(self) -> None:
        super().__init__()
        width = sum(DIMS[table] for table, _ in FEATURES.values()) + NUM_NUMERIC
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.out = nn.Linear(width, 5), nn.Linear(5, 2)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.cat([embedded[name] for name in FEATURES] + [dense], -1)
        return self.out(torch.tanh(self.first(x)))


def two_labels(missing: bool = True, weights: bool = False) -> Problem:
    """A click and a number for every row; with `missing` some rows lack one, and one task has no click at all."""
    problem, generator = make_problem(support=(4, 2, 0, 3), query=(2, 3, 2, 1)), torch.Generator().manual_seed(4)
    sides = {}
    for name in ("support", "query"):
        side = getattr(problem.batch, name)
        numbers = torch.randn(side.mask.shape, generator=generator, dtype=torch.float64)
        label = torch.stack([side.label, numbers], -1)
        if missing:
            label[0, 0, 0] = label[1, 0, 1] = label[3, :, 0] = math.nan
        label = torch.where(side.mask.unsqueeze(-1), label, 0)
        weight = torch.rand(side.mask.shape, generator=generator, dtype=torch.float64) if weights else None
        sides[name] = replace(side, label=label, weight=weight)
    return Problem(problem.rows, replace(problem.batch, **sides))


def result(problem: Problem, **settings: object) -> dict[str, Tensor]:
    learner = learner_of(Twin().double(), labels=LABELS, **settings)
    loss, out = learner(problem.rows, problem.batch)
    named = {**dict(learner.named_parameters()), **problem.rows.weights}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    seen = {"loss": loss.detach(), "query_loss": out.query_loss, "support_loss": out.support_loss}
    return seen | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("adapt", [["embeddings", "dense"], ["head"], ["embeddings.item"], ["*.bias"]])
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("weights", [False, True])
def test_engines_agree(adapt: list[str], order: str, weights: bool) -> None:
    problem = two_labels(weights=weights)
    settings = {"adapt": adapt, "order": order, "steps": 2, "prior": 0.5}
    found = result(problem, engine="factored", **settings)
    assert_same(found, result(problem, engine="reference", **settings))
    assert all(value.isfinite().all() for value in found.values())


def test_a_loss_is_the_sum_of_the_means_of_labels() -> None:
    """By hand, without an inner step: padding and missing labels count nothing."""
    problem = two_labels()
    learner = learner_of(Twin().double(), labels=LABELS, lr=0.0)
    _, out = learner(problem.rows, problem.batch)
    query = problem.batch.query
    for task in range(len(query.mask)):
        total = 0.0
        for k, label in enumerate(LABELS):
            rows = query.mask[task] & ~query.label[task, :, k].isnan()
            logits, truth = out.query_logits[task, rows, k], query.label[task, rows, k]
            loss = F.binary_cross_entropy_with_logits if label.loss == "bce" else F.mse_loss
            total += label.weight * float(loss(logits, truth).detach()) if rows.any() else 0.0
        assert float(out.query_loss[task]) == pytest.approx(total, rel=1e-12)


def test_plain_training_counts_both_sides() -> None:
    problem = two_labels()
    learner = learner_of(Twin().double(), labels=LABELS, adapt=[])
    loss, out = learner(problem.rows, problem.batch)
    assert loss.isfinite()
    assert out.query_logits.shape == (*problem.batch.query.mask.shape, 2)
    (gradient,) = torch.autograd.grad(loss, [learner.model.out.bias])
    assert gradient.isfinite().all()
    assert gradient.abs().min() > 0


def test_a_label_that_no_row_has_changes_nothing() -> None:
    """Two outputs of which the second has no labels are trained as the first alone."""
    problem = two_labels(missing=False)

    def without(side: Tensor) -> Tensor:
        return torch.stack([side[..., 0], torch.full_like(side[..., 1], math.nan)], -1)

    batch = problem.batch
    sides = {
        name: replace(getattr(batch, name), label=without(getattr(batch, name).label)) for name in ("support", "query")
    }
    ours = result(Problem(problem.rows, replace(batch, **sides)), steps=2)

    class First(Twin):
        def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
            return super().forward(dense, embedded)[..., 0]

    single = {
        name: replace(getattr(batch, name), label=getattr(batch, name).label[..., 0]) for name in ("support", "query")
    }
    alone = Problem(problem.rows, replace(batch, **single))
    learner = learner_of(First().double(), steps=2)
    loss, _ = learner(alone.rows, alone.batch)
    (gradient,) = torch.autograd.grad(loss, [learner.model.first.weight])
    assert_same(ours, {"loss": loss.detach(), "model.first.weight": gradient})


def test_a_model_of_one_output_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"Net\.forward returns \[6\].* it must return 2 logits an example, one for each of a, b"
    ):
        learner_of(Net().double(), labels=LABELS)
    with pytest.raises(ValueError, match="it must return one logit an example"):
        learner_of(Twin().double())
