"""Modulated starts: factored engine = reference engine = the formulas through torch.func, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import DIMS, FEATURES, NUM_NUMERIC, Inputs, Problem, gradients, inputs_of, make_problem, poison_padding
from test_engines import Net, Tied, assert_same, by_textbook, learner_of
from torch import Tensor, nn

from gmeta.core.batch import TaskBatch
from gmeta.meta import factored
from gmeta.meta.learner import MetaLearner
from gmeta.meta.modulation import build_modulator
from gmeta.models.dlrm import DLRM
from gmeta.models.melu import MeLU
from gmeta.models.taste import Taste

KINDS = ("cluster", "film")


def modulated(
    model: nn.Module, kind: str, features: tuple[str, ...] = tuple(FEATURES), trained: bool = True, **settings: Any
) -> MetaLearner:
    """A learner in float64 with a modulator; unless trained, as it is built."""
    dims = {name: DIMS[FEATURES[name][0]] for name in features}
    modulator = build_modulator(kind, model, dims=dims, num_numeric=NUM_NUMERIC, width=4, clusters=3)
    if trained:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in modulator.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.4
    return learner_of(model.double(), modulator=modulator, features=features, **settings)


def run(problem: Problem, learner: MetaLearner) -> dict[str, Tensor]:
    loss, out = learner(problem.rows, problem.batch)
    logits = torch.where(problem.batch.query.mask, out.query_logits, 0)
    seen = {"loss": loss.detach(), "logits": logits, "query_loss": out.query_loss, "support_loss": out.support_loss}
    return seen | gradients(problem, learner, loss)


def both(problem: Problem, model: nn.Module, kind: str, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fast, slow = (
        run(problem, modulated(model, kind, engine=engine, **settings)) for engine in ("factored", "reference")
    )
    return fast, slow


def by_formula(problem: Problem, learner: MetaLearner, kind: str) -> Callable[[Inputs], dict[str, Tensor]]:
    """Where a task starts, from the modulator's weights alone, row by row."""
    weights = dict(learner.modulator.named_parameters())
    layers = {name: layer for name, layer in learner.model.named_modules() if isinstance(layer, nn.Linear)}

    def start(support: Inputs) -> dict[str, Tensor]:
        matrices, dense, label, mask = support
        vector = torch.zeros_like(weights["encoder.layer.bias"])
        rows = [row for row in range(len(mask)) if mask[row]]
        for row in rows:
            read = [matrices[name][row] @ problem.rows.weights[FEATURES[name][0]] for name in matrices]
            x = torch.cat([*read, dense[row], label[row : row + 1]])
            vector = vector + (weights["encoder.layer.weight"] @ x + weights["encoder.layer.bias"]).relu() / len(rows)
        if kind == "cluster":
            nearness = torch.stack([torch.exp(-(vector - c).square().sum() / 2) for c in weights["centroids"]])
            mix = sum(n / nearness.sum() * c for n, c in zip(nearness, weights["centroids"], strict=True))
            numbers = weights["gate.weight"] @ torch.cat([vector, mix]) + weights["gate.bias"]
            numbers = 1 / (1 + torch.exp(-numbers))
        else:
            numbers = weights["head.weight"] @ vector + weights["head.bias"]
        values, taken = {}, 0
        for name, layer in layers.items():
            scale = numbers[taken : taken + layer.out_features] + (kind == "film")
            taken += layer.out_features
            values[f"{name}.weight"] = torch.diag(scale) @ layer.weight
            if layer.bias is not None:
                values[f"{name}.bias"] = scale * layer.bias
        for name, layer in layers.items():
            if kind == "film" and layer.bias is not None:
                values[f"{name}.bias"] = values[f"{name}.bias"] + numbers[taken : taken + layer.out_features]
                taken += layer.out_features
        assert taken == len(numbers)
        return values

    return start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "adapt",
    [["embeddings", "dense"], ["embeddings"], ["head"], ["*.bias", "context"], ["embeddings.item", "*.weight"]],
    ids=lambda names: "+".join(names),
)
def test_engines_agree_with_the_formulas(kind: str, order: str, steps: int, adapt: list[str]) -> None:
    """With and without biases; most of these sets leave layers that are modulated and not adapted."""
    problem, model = poison_padding(make_problem()), Net()
    settings = {"adapt": adapt, "steps": steps, "order": order}
    fast, slow = both(problem, model, kind, **settings)
    assert_same(fast, slow)
    learner = modulated(model, kind, **settings)
    assert_same(fast, by_textbook(problem, learner, modulate=by_formula(problem, learner, kind)))
    for name, value in fast.items():
        if name.startswith("modulator."):
            assert value.abs().max() > 1e-6, name
    plain = run(problem, learner_of(model, **settings))
    assert (fast["loss"] - plain["loss"]).abs() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_inner_steps_give_the_same(kind: str) -> None:
    problem, model = make_problem(), Net()
    kept, again = (
        run(problem, modulated(model, kind, engine="factored", steps=3, recompute=recompute))
        for recompute in (False, True)
    )
    assert_same(again, kept, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_forming_weights_is_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, model = make_problem(), Net()
    slow = run(problem, modulated(model, kind, engine="reference", steps=3))
    for always in (True, False):
        monkeypatch.setattr(factored, "forming_is_cheaper", lambda *args, always=always: always)
        assert_same(run(problem, modulated(model, kind, engine="factored", steps=3)), slow)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", [(), (0, 0)])
@pytest.mark.parametrize("engine", ["factored", "reference"])
def test_no_tasks_or_no_support(kind: str, support: tuple[int, ...], engine: str) -> None:
    problem = make_problem(support=support, query=tuple(2 for _ in support))
    found = run(problem, modulated(Net(), kind, engine=engine, steps=2))
    assert found["query_loss"].shape == (len(support),)
    assert all(value.isfinite().all() for value in found.values())
    if support:
        assert found["modulator.encoder.layer.weight"].abs().max() == 0  # there is no row to encode
        head = "modulator.gate.bias" if kind == "cluster" else "modulator.head.bias"
        assert found[head].abs().max() > 1e-6
    else:
        assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["factored", "reference"])
def test_before_adaptation_nothing_of_the_support_is_seen(kind: str, engine: str) -> None:
    problem, mask = make_problem(), make_problem().batch.query.mask
    learner = modulated(Net(), kind, engine=engine, steps=2)
    before, after = learner.predict(problem.rows, problem.batch)
    torch.testing.assert_close(before[2][mask[2]], after[2][mask[2]], rtol=0, atol=1e-14)  # a task without support
    assert (before - after)[[0, 1]][mask[[0, 1]]].abs().min() > 1e-4
    flipped = replace(problem.batch.support, label=1 - problem.batch.support.label)
    other: TaskBatch = replace(problem.batch, support=flipped)
    assert torch.equal(before[mask], learner.predict(problem.rows, other)[0][mask])
    unlike = learner.predict(problem.rows, other, steps=1, inner_lr=0.0)[1]  # no step, and still another start
    assert (unlike - learner.predict(problem.rows, problem.batch, steps=1, inner_lr=0.0)[1]).abs().max() > 1e-4


def test_film_starts_from_the_unmodulated_model() -> None:
    problem, model = make_problem(), Net()
    fresh = run(problem, modulated(model, "film", trained=False, steps=2))
    assert_same(fresh, run(problem, learner_of(model, steps=2)), 1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["melu", "dlrm", "taste"])
def test_models(kind: str, name: str) -> None:
    features = ("user", "item", "history")
    problem = make_problem(features=features)
    inputs = inputs_of(features, DIMS["wide"], NUM_NUMERIC)
    sizes = {"hidden": [8, 5], "dropout": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "melu":
            model = MeLU(inputs, layer_norm=True, **sizes)
        elif name == "dlrm":
            model = DLRM(inputs, bottom=[4], **sizes)
        else:
            model = Taste(inputs, task_features=["user"], bottom=[4], **sizes)
    for adapt in (["decision"], ["embeddings", "dense"]):
        settings = {"adapt": adapt, "features": features, "steps": 2, "learn_lr": True}
        assert_same(*both(problem, model, kind, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_bf16(kind: str) -> None:
    exact = run(make_problem(), modulated(Net(), kind, steps=2, engine="reference"))
    problem = make_problem(torch.float32)
    for engine in ("factored", "reference"):
        learner = modulated(Net(), kind, steps=2, engine=engine).float()
        assert run(problem, learner)["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = learner(problem.rows, problem.batch)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact["loss"].item(), rel=0.03)


def test_auto_takes_the_reference_for_what_factored_cannot_modulate() -> None:
    """`square` is used twice: not adapted here, only modulated."""
    problem, learner = make_problem(), modulated(Tied(), "film", adapt=["head"], steps=2)
    found = run(problem, learner)
    assert "'square.weight': the model's forward uses it twice" in learner.engine_reason
    assert_same(found, by_textbook(problem, learner, modulate=by_formula(problem, learner, "film")))


class Odd(Net):
    """Uses a linear layer's bias without its weight, or its weight without its bias."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.cat([embedded[name] for name in self.features] + [dense], -1)
        if self.how == "apart":
            x = torch.tanh(self.norm(nn.functional.linear(x, self.first.weight) + self.first.bias))
        else:
            x = torch.tanh(self.norm(nn.functional.linear(x, self.first.weight, self.first.bias.clone())))
        return self.out(self.second(x) * self.scale + self.context).squeeze(-1)


@pytest.mark.parametrize("how", ["apart", "copied"])
@pytest.mark.parametrize("adapt", [["embeddings"], ["dense"]])
def test_a_modulated_layer_in_parts_is_left_to_the_reference(how: str, adapt: list[str]) -> None:
    problem, learner = make_problem(), modulated(Odd(how), "film", adapt=adapt)
    found = run(problem, learner)
    assert learner.engine_reason.startswith("reference, because the factored engine cannot adapt 'first.")
    assert_same(found, by_textbook(problem, learner, modulate=by_formula(problem, learner, "film")))


def test_what_cannot_be_modulated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meta.modulation is 'film', but LayerNorm has no linear layer"):
        modulated(nn.LayerNorm(3), "film")
    with pytest.raises(ValueError, match=r"adapt \[\] takes none: name what they adapt"):
        modulated(Net(), "cluster", adapt=[])


@pytest.mark.parametrize("adapt", [(), ("last_layer",)])
def test_without_steps_there_is_nothing_to_modulate(adapt: tuple[str, ...]) -> None:
    from test_closed_form import Solved

    with pytest.raises(
        ValueError, match=r"a modulator decides where SGD steps start, but adapt \[.*\] takes none: name"
    ):
        modulated(Solved(), "film", adapt=adapt)
