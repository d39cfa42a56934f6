"""Trained lower layers beside kept vectors of bounded age: as in a plain loop that encodes each text by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import WHY, tiny
from torch import Tensor, nn

pytest.importorskip("transformers", reason=WHY)

from test_bahe import INPUTS, TEXTS, examples, learner_of, make

from gmeta.core.batch import text_ids_of
from gmeta.core.sequences import sequences_of
from gmeta.models.inputs import InputSpec
from gmeta.models.registry import build_model, find_model
from gmeta.text.encoder import LowLayers
from gmeta.text.llmrec import LLMRec
from gmeta.text.model import TextModel
from gmeta.text.sources import TextStates

OF_ITEMS = InputSpec(
    {"title": 8},
    (),
    0.0,
    tables={"title": "text"},
    texts={"title": len(TEXTS)},
    text_tables={"text": TEXTS},
    owned=("title",),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("refreshed")
    return {kind: tiny(root / kind, kind) for kind in ("bert", "llama")}


class PlainTexts:
    """A source without tables: each text alone, through the layers as they are or as they were copied."""

    def __init__(self, model: TextModel, every: int) -> None:
        self.model, self.every = model, every
        self.encoder, self.spec = model.source.encoder, model.source.spec
        self.before = copy.deepcopy(self.encoder.low)

    def before_step(self, step: int) -> None:
        if step % self.every == 0:
            self.before = copy.deepcopy(self.encoder.low)

    def fresh(self, ids: Tensor, dtype: torch.dtype) -> TextStates:
        if not self.model.training:
            return self.states(ids, dtype)
        return self._read(ids, lambda text: self._encoded(text, self.encoder.low))

    def states(self, ids: Tensor, dtype: torch.dtype) -> TextStates:
        low = self.before if self.model.training else self.encoder.low
        return self._read(ids, lambda text: self._encoded(text, low).detach().half().to(dtype))

    def _encoded(self, text: str, low: LowLayers) -> Tensor:
        (tokens,), _ = self.encoder.tokenizer([text], self.spec.max_tokens)
        states = low(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.bool))[0]
        return states.mean(0) if self.spec.pooling == "mean" else states[-1]

    def _read(self, ids: Tensor, encoded: Callable[[str], Tensor]) -> TextStates:
        rows = [torch.stack([encoded(TEXTS[text]) for text in row]) for row in ids.tolist()]
        return TextStates(torch.stack(rows), ids > 0, torch.arange(ids.shape[1]).expand_as(ids))


def of_clicks(model: TextModel) -> Tensor:
    label = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    return nn.functional.binary_cross_entropy_with_logits(model(*examples()), label)


def of_next_items(model: TextModel) -> Tensor:
    assert isinstance(model, LLMRec)
    sequences, _ = sequences_of(torch.ones(2, 3, dtype=torch.bool))
    events = {text_ids_of("title"): torch.tensor([1, 2, 3, 3, 6, 2])}
    own = model.items(events)
    vectors = torch.cat([own, model.shared_items({text_ids_of("title"): torch.tensor([1, 4, 5, 6])})])
    before = model.states(events, sequences)[[0, 1, 3, 4]]
    return nn.functional.cross_entropy(before @ vectors.mT, torch.tensor([1, 2, 4, 5]))


LOSSES = {"bahe": of_clicks, "llmrec": of_next_items}


def made(name: str, folder: Path, **args: Any) -> TextModel:
    if name == "bahe":
        return make(folder, **args)
    chosen = {"encoder": str(folder), "layers": 2, "hidden": [6], "heads": 2, "ids": False, "dropout": 0.0, **args}
    model = build_model(find_model("llmrec"), OF_ITEMS, chosen, name="llmrec", seed=0)
    assert isinstance(model, LLMRec)
    return model.double()


def train(model: TextModel, loss: Callable[[TextModel], Tensor], steps: range) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in steps:
        model.before_step(step)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("name", "kind", "args"),
    [
        ("bahe", "bert", {}),
        ("bahe", "llama", {"tune": "lora", "rank": 2, "pooling": "last"}),
        pytest.param("bahe", "bert", {"tune": "norms"}, marks=pytest.mark.slow),
        ("llmrec", "bert", {}),
        ("llmrec", "bert", {"reader": "high", "tune": "lora", "rank": 2, "positions": 4}),
    ],
)
def test_it_learns_what_a_plain_loop_learns(
    name: str, kind: str, args: dict[str, Any], folders: dict[str, Path]
) -> None:
    """With 1 each step encodes everything by the layers as they are; with 3 what is kept is up to 2 steps old."""
    loss, learned = LOSSES[name], {}
    for every in (1, 3):
        ours, plain = (made(name, folders[kind], refresh=every, **args) for _ in range(2))
        start = {name: p.detach().clone() for name, p in ours.named_parameters()}
        plain._source = [PlainTexts(plain, every)]  # type: ignore[list-item]
        learned[every], expected = train(ours, loss, range(5)), train(plain, loss, range(5))
        assert gap(learned[every], expected) < 1e-9
        assert gap(start, learned[every]) > 1e-3
        moved = [key for key in start if key.startswith("low.") and not torch.equal(start[key], learned[every][key])]
        assert moved
        assert torch.allclose(loss(ours.eval()), loss(plain.eval()), atol=1e-9)  # by the layers as they are now
    assert gap(learned[1], learned[3]) > 1e-6


def test_what_is_computed_again_has_the_same_gradient(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(made("llmrec", folders["bert"], refresh=2), of_next_items, range(2))
    calls: list[int] = []
    monkeypatch.setattr("gmeta.text.refreshed.TOKENS_HELD", 8)
    monkeypatch.setattr("gmeta.text.refreshed.TOKENS_PER_BATCH", 6)
    model = made("llmrec", folders["bert"], refresh=2)
    model.low.stack.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = train(model, of_next_items, range(2))
    assert gap(found, expected) < 1e-12
    assert sum(calls) == 2 * (4 + 2)  # in each step four batches of one text, and two of them again


@pytest.mark.parametrize("name", ["bahe", "llmrec"])
def test_a_run_that_is_loaded_goes_on_with_the_same_bits(name: str, folders: dict[str, Path]) -> None:
    """Between two refreshes: the kept vectors are made anew of the layers as they were."""
    loss, args = LOSSES[name], {"refresh": 4}
    whole, begun, resumed = (made(name, folders["bert"], **args) for _ in range(3))
    expected = train(whole, loss, range(7))
    train(begun, loss, range(6))
    loss(begun.eval())  # a validation changes nothing
    resumed.load_state_dict(begun.state_dict())
    resumed.check_loaded()
    for model in (begun.train(), resumed):
        found = train(model, loss, range(6, 7))
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tables_of_kept_vectors_follow_weights_and_texts(folders: dict[str, Path]) -> None:
    model = make(folders["bert"], refresh=2)
    train(model, of_clicks, range(3))
    read = torch.tensor([[1, 3, 5]])
    before = model.eval().source.states(read, torch.float64).values
    model.add_texts("text", ["w5 w4", "w9 w9"])
    added = model.source.states(torch.tensor([[7, 8]]), torch.float64).values
    assert torch.allclose(added[:, 0], model.source.states(torch.tensor([[4]]), torch.float64).values[:, 0], atol=1e-3)
    assert not torch.allclose(added[:, 0], added[:, 1], atol=1e-3)
    model.forget_texts("text")
    assert len(model.source) == len(TEXTS)
    assert torch.equal(model.source.states(read, torch.float64).values, before)
    train(model.train(), of_clicks, range(3, 4))
    assert not torch.equal(model.eval().source.states(read, torch.float64).values, before)


def test_the_state_holds_the_layers_as_they_are_and_as_they_were(folders: dict[str, Path]) -> None:
    model = make(folders["bert"], refresh=2)
    names = {name for name in model.state_dict() if name.startswith("low.")}
    assert "low.refreshed" in names
    assert not any("embeddings" in name for name in names)  # a table of all tokens stays as the encoder has it
    assert model.save_assets(folders["bert"].parent / "assets") == {"encoder": "encoder", "store": ""}
    assert torch.equal(copy.deepcopy(model)(*examples()), model(*examples()))


def test_a_task_does_not_adapt_lower_layers(folders: dict[str, Path]) -> None:
    learner = learner_of(make(folders["bert"], refresh=2), "reference", adapt=["dense"])
    assert not any(name.startswith("low.") for name in learner.adapted.parameters)
    with pytest.raises(ValueError, match=r"'low.\*', but 'low.stack.* shared by all tasks"):
        learner_of(make(folders["bert"], refresh=2), "reference", adapt=["low.*"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"refresh": -1}, r"model.args.refresh is -1: must be 0"),
        ({"refresh": 2, "tune": "none"}, "asks for trained lower layers, and there are none"),
        ({"refresh": 2, "encode": "batch"}, "model.args.encode is 'batch': model.args.refresh is 2"),
        ({"refresh": 2, "store": "texts"}, "model.args.store is 'texts': model.args.refresh is 2"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        make(folders["bert"], INPUTS, **args)


def test_weights_that_fp16_cannot_hold_say_so(folders: dict[str, Path]) -> None:
    model = make(folders["bert"], refresh=1)
    with torch.no_grad():
        for parameter in model.low.parameters():
            parameter.mul_(1e6)
    with pytest.raises(ValueError, match=r"more than the fp16 .*lower dense.lr"):
        model.before_step(0)
