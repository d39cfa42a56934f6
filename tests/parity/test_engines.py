"""Factored engine = reference engine = an independent torch.func implementation, gradients included."""

from __future__ import annotations

import pytest
import torch
from problems import DIMS, FEATURES, NUM_NUMERIC, Problem, gradients, make_problem, poison_padding, textbook
from torch import Tensor, nn

from gmeta.meta.learner import MetaLearner


class Net(nn.Module):
    """Linear layers, layer norm, an element-wise parameter, dropout: everything the factored engine adapts."""

    head = "out"
    decision_layers = ("first", "second", "out")

    def __init__(self, features: tuple[str, ...] = tuple(FEATURES), dropout: float = 0.0) -> None:
        super().__init__()
        self.features = features
        width = sum(DIMS[FEATURES[name][0]] for name in features) + NUM_NUMERIC
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(width, 7)
            self.norm = nn.LayerNorm(7)
            self.second = nn.Linear(7, 5, bias=False)
            self.context = nn.Parameter(torch.randn(5))
            self.scale = nn.Parameter(torch.rand(5) + 0.5)
            self.out = nn.Linear(5, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.cat([embedded[name] for name in self.features] + [dense], -1)
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        x = torch.tanh(self.scale * self.second(x) + self.context)
        return self.out(x).squeeze(-1)


def learner_of(model: nn.Module, dtype: torch.dtype = torch.float64, **settings: object) -> MetaLearner:
    settings = {"embedding_features": tuple(FEATURES), "adapt": ["embeddings", "dense"], "inner_lr": 0.3} | settings
    return MetaLearner(model, **settings).to(dtype)


def both(problem: Problem, model: nn.Module, **settings: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss, outputs and gradients) of the factored and of the reference engine."""
    results = []
    for engine in ("factored", "reference"):
        learner = learner_of(model, problem.batch.support.dense.dtype, engine=engine, **settings)
        loss, out = learner(problem.rows, problem.batch)
        mask = problem.batch.query.mask
        seen = {"loss": loss.detach(), "logits": torch.where(mask, out.query_logits, 0)}
        seen |= {"query_loss": out.query_loss, "support_loss": out.support_loss}
        results.append(seen | gradients(problem, learner, loss))
    return results[0], results[1]


def by_textbook(problem: Problem, learner: MetaLearner) -> dict[str, Tensor]:
    adapted = learner.adapted
    rate_of = {name: adapted.rate_of(name) for name in adapted.parameters} | {f"table {g}": 0 for g in DIMS}
    rates = learner.inner_lr
    if rates is None:
        rates = torch.full((learner.inner_steps, len(adapted.rates)), learner.initial_inner_lr, dtype=torch.float64)
    loss = textbook(
        problem,
        learner.model,
        adapted.parameters,
        adapted.features,
        rates,
        rate_of,
        learner.second_order,
        nn.BCEWithLogitsLoss(reduction="none"),
        nn.BCEWithLogitsLoss(reduction="none"),
    )
    return {"loss": loss.detach()} | gradients(problem, learner, loss)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in theirs.items():
        difference = (ours[name] - value).abs().max().item() if value.numel() else 0.0
        assert difference <= tolerance * max(1.0, value.abs().max().item() if value.numel() else 0), name


ADAPTED_SETS = [
    ["embeddings", "dense"],
    ["embeddings"],
    ["head"],
    ["decision"],
    ["dense"],
    ["embeddings.item"],
    ["embeddings.history", "embeddings.tags", "first.*"],
    ["*.bias", "context"],
    ["*.weight"],
]


@pytest.mark.parametrize("adapt", ADAPTED_SETS, ids=lambda names: "+".join(names))
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ["first", "second"])
def test_engines_agree_with_torch_func(adapt: list[str], steps: int, order: str) -> None:
    problem, model = poison_padding(make_problem()), Net().double()
    settings = {"adapt": adapt, "inner_steps": steps, "order": order}
    fast, slow = both(problem, model, **settings)
    assert_same(fast, slow)
    assert_same(fast, by_textbook(problem, learner_of(model, **settings)))
