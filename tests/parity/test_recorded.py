"""Recorded programs = the learner, for batches of other numbers and sizes, and for other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import NUM_NUMERIC, Problem, make_problem
from test_closed_form import solved
from test_engines import Net, learner_of
from test_modulation import modulated
from torch import Tensor, nn

from gmeta.core.batch import Examples
from gmeta.meta import recorded
from gmeta.meta.gather_plan import shared_rows
from gmeta.meta.learner import MetaLearner
from gmeta.meta.recorded import Programs, RecordedLearner
from gmeta.meta.tape import NotRecordable, Program, record


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is made at a shape's third batch."""
    monkeypatch.setattr(recorded, "_WORTH", 2)


def values_of(learner: MetaLearner, problem: Problem, side: str) -> tuple[dict[str, Tensor], Examples]:
    rows = problem.rows
    sizes = {table: len(weight) for table, weight in rows.weights.items()}
    plan = (
        learner.index_support(rows.support, sizes) if side == "support" else learner.index_query(rows.query, sizes, {})
    )
    return shared_rows(rows, plan), getattr(problem.batch, side)


def recorded_of(learner: MetaLearner, programs: Programs, note: Callable[[str], None] = pytest.fail) -> RecordedLearner:
    tables = learner.index_support(make_problem().rows.support, {"wide": 9, "narrow": 5}).features
    return RecordedLearner(learner, tables, programs, note)


def by_recording(found: RecordedLearner, learner: MetaLearner, problem: Problem) -> tuple[list[Tensor], Tensor]:
    fast = found.adapt(*values_of(learner, problem, "support"))
    return fast.tensors(), found.score(fast, *values_of(learner, problem, "query"))


def by_learner(learner: MetaLearner, problem: Problem) -> Tensor:
    return learner.score(learner.adapt(problem.rows, problem.batch.support), problem.rows, problem.batch.query).detach()


def assert_alike(found: RecordedLearner, learner: MetaLearner, batches: int) -> None:
    """Batches of other numbers, whose sizes are padded to the same shape."""
    for seed in range(batches):
        problem = make_problem(seed=seed, support=(4 + seed % 3, 2, 0), query=(2, 3 + seed % 2, 2))
        _, logits = by_recording(found, learner, problem)
        mask = problem.batch.query.mask
        torch.testing.assert_close(logits[mask], by_learner(learner, problem)[mask], rtol=0, atol=1e-12)


LEARNERS: dict[str, Callable[[], MetaLearner]] = {
    "steps": lambda: learner_of(Net(), adapt=["dense"], steps=3),
    "learned rates": lambda: learner_of(Net(), adapt=["head", "second.*"], steps=2, learn_lr=True, prior=2.0),
    "plain": lambda: learner_of(Net(), adapt=[]),
    "film": lambda: modulated(Net(), "film", adapt=["decision"], steps=2),
    "squared": lambda: solved(loss="mse"),
    "squared after steps": lambda: solved(("last_layer", "first.*"), loss="mse"),
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_programs_give_what_the_learner_gives(kind: str) -> None:
    learner, programs = LEARNERS[kind]().eval(), Programs()
    found = recorded_of(learner, programs)
    assert_alike(found, learner, 6)
    shapes = [shape for shape in found._shapes.values() if shape.form is None or shape.form.tensors()]
    assert shapes
    assert all(shape.program is not None for shape in shapes)

    again = LEARNERS[kind]().eval()  # a later version: other weights, and the same programs at its second batch
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.1).add_(0.01)
    made = list(programs.made)
    later = recorded_of(again, programs)
    assert_alike(later, again, 2)
    assert all(shape.program is not None for shape in later._shapes.values() if shape.form is None)
    assert list(programs.made) == made


def test_clicks_of_a_last_layer_stay_with_the_learner_where_numbers_decide() -> None:
    """Newton's steps end when they are small: that depends on numbers. Scoring does not."""
    notes: list[str] = []
    learner = solved().eval()
    found = recorded_of(learner, Programs(), notes.append)
    assert_alike(found, learner, 5)
    assert len(notes) == 1
    assert "depends on numbers" in notes[0]
    assert any(shape.program is not None for shape in found._shapes.values())


class LeavesTorch(nn.Module):
    """A model of which a part is no operation of torch's: the tape holds its result for a constant."""

    head = "out"

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(NUM_NUMERIC, 1)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return self.out(dense + torch.from_numpy(np.tanh(dense.detach().numpy()))).squeeze(-1)


def test_a_model_that_leaves_torch_is_found_out_by_another_batch() -> None:
    notes: list[str] = []
    learner = learner_of(LeavesTorch(), adapt=["head"], steps=2).eval()
    found = recorded_of(learner, Programs(), notes.append)
    assert_alike(found, learner, 5)
    assert len(notes) == 1
    assert "other numbers on another batch" in notes[0]
    assert not any(shape.program for shape in found._shapes.values())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: [x if bool(x.sum() > 0) else -x], "depends on numbers"),
        (lambda x: [x[x > 0]], "depends on numbers"),
        (lambda x: [x + torch.rand_like(x)], "depends on numbers"),
        (lambda x: [x.mul_(2)], "an input or a parameter in place"),
        (lambda x: [x + _CONSTANT.add_(1)], "an input or a parameter in place"),
    ],
)
def test_what_cannot_be_recorded(function: Callable[..., list[Tensor]], message: str) -> None:
    with pytest.raises(NotRecordable, match=message):
        record(function, [torch.ones(3)])


_CONSTANT = torch.zeros(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapt": ["embeddings"]}, "embedding rows adapt"),
        ({"adapt": ["dense"], "engine": "reference"}, "its engine is the reference"),
    ],
)
def test_learners_that_cannot_be_recorded_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordedLearner(learner_of(Net(), **settings), {"wide": ("user",)}, Programs(), pytest.fail)
    with pytest.raises(ValueError, match="it embeds no feature"):
        RecordedLearner(learner_of(Net(), adapt=["dense"]), {}, Programs(), pytest.fail)


def test_a_tape_keeps_in_place_steps_views_and_inputs_that_are_outputs() -> None:
    weight = torch.arange(6.0).view(2, 3).requires_grad_()

    def function(x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            y = (x @ weight).relu()
            (slope,) = torch.autograd.grad((y * y).sum(), weight)
        z = slope.clone()
        z[:, 1:].mul_(3)
        return [z, slope, x, weight.detach().t()]

    x = torch.tensor([[1.0, -2.0]])
    recording, outputs = record(function, [x])
    assert len(recording.constants) == 1
    other = torch.tensor([[3.0, 4.0]])
    program = Program(recording, [x])
    for one, expected in zip(program([other], recording.constants), function(other), strict=True):
        assert torch.equal(one, expected)
    assert torch.equal(outputs[0], function(x)[0])


def test_digests_tell_other_numbers_in_the_code_apart() -> None:
    """A version whose code has another constant has another program."""
    digests = {record(lambda x, scale=scale: [x * scale], [torch.ones(2)])[0].digest for scale in (1.0, 2.0, 2.0)}
    assert len(digests) == 2
