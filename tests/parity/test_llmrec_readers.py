"""What reads events with an encoder's layers computes what slow loops and plain `transformers` do, one event a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import WHY, minilm, tiny
from torch import Tensor

pytest.importorskip("transformers", reason=WHY)

import transformers

import gmeta.text.readers
from gmeta.core.batch import text_ids_of
from gmeta.core.sequences import Sequences, sequences_of
from gmeta.meta.unfused import unfused_attention
from gmeta.models.inputs import InputSpec
from gmeta.models.registry import build_model, find_model
from gmeta.models.sasrec import PROMPT
from gmeta.text.llmrec import LLMRec
from gmeta.text.lora import LoraLinear, merge_lora

TEXTS = ("", "w4 w5", "w6", "w7 w8 w9 w10 w11", "w5 w4", "", "w12 w13 w14", "w9 w9 w9 w9")
HISTORIES = [[1, 2, 3, 6], [3], [], [5, 7, 0, 7, 1, 2], [3]]
DIM, CUT, WINDOW = 8, 4, 3
EXACT = {"bert": 1e-10, "llama": 1e-6}
"""What gradients may differ, of the largest: a Llama's norms compute in float32 in any model."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("readers")
    return {kind: tiny(root / kind, kind) for kind in ("bert", "llama")}


def make(folder: Path, texts: tuple[str, ...] = TEXTS, **args: Any) -> LLMRec:
    inputs = InputSpec(
        {"title": DIM, "item": DIM, "domain": DIM},
        (),
        0.0,
        item="item",
        owned=("title", "item", "domain"),
        tables={"title": "text"},
        texts={"title": len(texts)},
        text_tables={"text": texts},
    )
    usual = {
        "layers": 2,
        "hidden": [6],
        "heads": 2,
        "max_tokens": CUT,
        "dropout": 0.0,
        "window": WINDOW,
        "id_dropout": 0.0,
    }
    model = build_model(find_model("llmrec"), inputs, {"encoder": str(folder), **usual, **args}, name="llmrec", seed=0)
    assert isinstance(model, LLMRec)
    return model.double()


def tokens_of(folder: Path, **args: Any) -> LLMRec:
    return make(folder, **{"reader": "tokens", "ids": False, "layers": 0, "similarity": "dot", **args})


def events_of(histories: list[list[int]], **more: Tensor) -> tuple[dict[str, Tensor], Sequences]:
    """Events of texts, with item and domain of some vectors each; padded to the longest."""
    width = max(1, *map(len, histories))
    mask = torch.tensor([[i < len(h) for i in range(width)] for h in histories])
    sequences, _ = sequences_of(mask)
    ids = torch.tensor([text for history in histories for text in history], dtype=torch.int64)
    vectors = torch.randn(len(TEXTS), 2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {text_ids_of("title"): ids.unsqueeze(-1), "item": vectors[ids, 0], "domain": vectors[ids, 1]}
    return {**found, **more}, sequences


def one_by_one(model: LLMRec, histories: list[list[int]]) -> Tensor:
    """The states of all events, each from its own task's events up to it alone."""
    return torch.stack(
        [model.states(*events_of([history[: t + 1]]))[-1] for history in histories for t in range(len(history))]
    )


def gradients_of(model: LLMRec, states: Tensor) -> list[Tensor]:
    """The gradients of a number made of states, by all that is trained."""
    weight = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(2))
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((states * weight).sum(), trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def assert_alike(found: list[Tensor], expected: list[Tensor], most: float = 1e-10) -> None:
    assert len(found) == len(expected) > 0
    scale = max(1.0, *(float(e.detach().abs().max()) for e in expected))
    gap = max(float((one - other).detach().abs().max()) for one, other in zip(found, expected, strict=True))
    assert gap <= most * scale


def stirred(model: LLMRec) -> LLMRec:
    """The model with adapters and paths beside the texts that have learned something."""
    generator = torch.Generator().manual_seed(5)
    for part in model.modules():
        if isinstance(part, LoraLinear):
            torch.nn.init.normal_(part.up.weight, 0, 0.2, generator=generator)
    if hasattr(model.reader, "lift"):
        torch.nn.init.normal_(model.reader.lift.weight, 0, 0.5, generator=generator)
    return model


# --------------------------------------------------------------------------------------------- reader high


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(
    "args", [{}, {"fusion": "gate"}, {"ids": False, "tune": "lora", "rank": 2}], ids=["views", "gate", "lora"]
)
def test_upper_layers_read_tasks_together_as_events_alone(
    kind: str, args: dict[str, Any], folders: dict[str, Path]
) -> None:
    model = stirred(make(folders[kind], reader="high", **args))
    together, alone = model.states(*events_of(HISTORIES)), one_by_one(model, HISTORIES)
    assert together.shape == (12, DIM if "fusion" in args or "ids" in args else 2 * DIM)
    assert_alike([together], [alone])
    assert_alike(gradients_of(model, together), gradients_of(model, alone), EXACT[kind])
    lengths = together[:, :DIM].norm(dim=-1) * 0.07
    assert (lengths - 1).abs().max() < 1e-6  # cosines, at the temperature that it starts with

    single = model.float()
    events, sequences = events_of(HISTORIES)
    events = {name: v.float() if v.is_floating_point() else v for name, v in events.items()}
    assert_alike([single.states(events, sequences)], [together.float()], 1e-5)


def test_without_texts_and_ids_there_is_nothing_to_learn_from(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no item has a text in 'title', and model\.args\.ids is false"):
        make(folders["bert"], ("", "", ""), ids=False)
    assert make(folders["bert"], ("", "", ""), ids=True).views == (DIM, DIM)
    with pytest.raises(ValueError, match=r"model\.args\.id_dropout is -1"):
        make(folders["bert"], id_dropout=-1)


def test_views_are_two_models_beside_each_other(folders: dict[str, Path]) -> None:
    """One of texts, and one of ids that is sasrec; they read the same prompt, and nothing of each other."""
    prompt = torch.randn(12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    events, sequences = events_of(HISTORIES, **{PROMPT: prompt})
    both, texts = make(folders["bert"]), make(folders["bert"], ids=False)
    texts.load_state_dict({name: v for name, v in both.state_dict().items() if not name.startswith("id_reader.")})
    ids = InputSpec({"item": DIM, "domain": DIM}, (), 0.0, item="item", owned=("item",))
    sasrec = build_model(find_model("sasrec"), ids, {}, name="sasrec", seed=0).double()
    assert both.id_reader is not None
    sasrec.eval().reader.load_state_dict(both.id_reader.state_dict())
    both.eval()
    found, items = both.states(events, sequences), both.items(events)
    assert_alike([found[:, :DIM]], [texts.eval().states(events, sequences)])
    assert_alike([found[:, DIM:]], [sasrec.states(events, sequences)])
    assert_alike([items[:, :DIM], items[:, DIM:]], [texts.items(events), sasrec.items(events)])
    assert both.views == (DIM, DIM)
    new = both.without_row(items)  # of items that no training row has the texts count twice
    assert_alike([(new * found).sum(-1)], [2 * (items * found)[:, :DIM].sum(-1)])
    alone = texts.items(events)
    assert texts.without_row(alone) is alone


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_upper_layers_read_what_the_encoder_in_one_piece_would(kind: str, folders: dict[str, Path]) -> None:
    """The last layers of the model as transformers makes it, over vectors that are computed here."""
    model = stirred(make(folders[kind], reader="high", ids=False))
    history = [1, 3, 6]
    events, sequences = events_of([history])
    whole = transformers.AutoModel.from_pretrained(folders[kind], dtype=torch.float64).eval()
    layers = (whole.encoder.layer if kind == "bert" else whole.layers)[2:]
    kept = model.source.kept[torch.tensor(history), 0].double()
    x = model.text_norm(kept)
    for layer in model.tower[:-1]:
        x = torch.relu(layer(x))
    beside = model.tower[-1](x) + events["domain"]
    x = (kept + model.reader.lift(beside) + model.reader.position[:3]).unsqueeze(0)
    causal = torch.full((3, 3), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    if kind == "bert":
        for layer in layers:
            x = layer(x, attention_mask=causal)
    else:
        rotated = whole.rotary_emb(x, torch.arange(3)[None])
        for layer in layers:
            x = layer(x, attention_mask=causal, position_embeddings=rotated)
        x = whole.norm(x)
    expected = torch.nn.functional.normalize(model.reader.out(x[0]), dim=-1) / 0.07
    assert_alike([model.states(events, sequences)], [expected], 1e-6)  # the temperature's logarithm is float32


def test_prompts_differentiate_twice_through_the_upper_layers(folders: dict[str, Path]) -> None:
    model = stirred(make(folders["bert"], reader="high"))
    prompt = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    events, sequences = events_of(HISTORIES)
    with unfused_attention():
        states = model.states({**events, PROMPT: prompt.expand(len(sequences.task), -1)}, sequences)
        (step,) = torch.autograd.grad(states[:, 0].sum(), [prompt], create_graph=True)
    found = torch.autograd.grad(step.square().sum(), [prompt, model.reader.lift.weight])
    assert step.abs().max() > 1e-4
    assert all(grad.abs().max() > 1e-6 for grad in found)


# --------------------------------------------------------------------------------------------- reader tokens


def titles_in_a_row(folder: Path, history: list[int], texts: tuple[str, ...] = TEXTS, cut: int = CUT) -> list[int]:
    """The ids of the tokens of the last titles, by the tokenizer of the folder itself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [tokenizer.encode(texts[text], add_special_tokens=False).ids[:cut] for text in history[-WINDOW:]]
    first, last = tokenizer.encode("").ids
    return [first, *(token for title in ids for token in title), last]


def plainly(whole: Any, tokens: list[int], pooling: str) -> Tensor:
    states = whole(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]


@pytest.mark.parametrize(
    ("kind", "pooling", "means"),
    [("bert", None, "cls"), ("llama", None, "last"), ("bert", "mean", "mean"), ("llama", "mean", "mean")],
)
def test_tokens_are_read_as_plain_transformers_reads_them(
    kind: str, pooling: str | None, means: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, vectors of items, and gradients; some of it computed again in the backward pass."""
    monkeypatch.setattr(gmeta.text.readers, "TOKENS_AT_ONCE", 24)
    monkeypatch.setattr(gmeta.text.readers, "TOKENS_HELD", 30)
    model = tokens_of(folders[kind], pooling=pooling)
    events, sequences = events_of(HISTORIES)
    states, items = model.states(events, sequences), model.items(events)

    whole = transformers.AutoModel.from_pretrained(folders[kind], dtype=torch.float64).eval()
    upper = whole.encoder.layer if kind == "bert" else torch.nn.ModuleList([*whole.layers, whole.norm])
    expected, vectors = [], []
    for history in HISTORIES:
        for t in range(len(history)):
            read = history[: t + 1][-WINDOW:]
            some = any(read)
            expected.append(plainly(whole, titles_in_a_row(folders[kind], read), means) * some)
            vectors.append(plainly(whole, titles_in_a_row(folders[kind], [history[t]]), means) * (history[t] > 0))
    assert_alike([states], [torch.stack(expected)])
    assert_alike([items], [torch.stack(vectors)])

    ours = [p for p in model.parameters() if p.requires_grad]
    theirs = list(upper.parameters())
    found = torch.autograd.grad((states @ items.mT).square().sum(), ours)
    slow = torch.autograd.grad((torch.stack(expected) @ torch.stack(vectors).mT).square().sum(), theirs)
    assert_alike(list(found), list(slow), EXACT[kind])


def test_states_that_nobody_looks_at_cost_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokens_of(folders["bert"])
    events, sequences = events_of(HISTORIES)
    rows: list[int] = []
    high = model.reader.high
    monkeypatch.setattr(high, "forward", lambda x, mask: (rows.append(len(x)), type(high).forward(high, x, mask))[1])
    every = model.states(events, sequences)
    assert sum(rows) == 11  # of 12 events, two with the same titles
    rows.clear()
    wanted = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([3, 10]), True)
    some = model.states(events, replace(sequences, wanted=wanted))
    assert sum(rows) == 3  # and nothing, for what is not wanted
    assert_alike([some[wanted]], [every[wanted]])
    assert not some[~wanted].any()


def test_memory_does_not_grow_with_the_tokens_of_a_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backward pass is left, of titles four times as many."""
    monkeypatch.setattr(gmeta.text.readers, "TOKENS_AT_ONCE", 100)
    monkeypatch.setattr(gmeta.text.readers, "TOKENS_HELD", 200)
    texts = ("", *(f"w{4 + i % 50} w{4 + i // 50} w9" for i in range(160)))
    model = tokens_of(folders["bert"], texts=texts)

    def left(num: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no other takes its place
            return tensor

        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.items({text_ids_of("title"): torch.arange(1, num + 1).unsqueeze(-1)})
        return sum(sizes.values())

    few, many = left(40), left(160)  # of 200 tokens, and of 800
    assert few < many < 1.5 * few


def test_a_decoder_whose_tokenizer_ends_no_text_gets_its_own_end(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    events, sequences = events_of(HISTORIES)
    found = tokens_of(folder).states(events, sequences)
    assert_alike([found], [tokens_of(folders["llama"]).states(events, sequences)])


@pytest.mark.parametrize(("reader", "layers"), [("high", 2), ("tokens", 1)])
def test_merged_adapters_are_the_same_layers(reader: str, layers: int, folders: dict[str, Path]) -> None:
    model = make(folders["bert"], reader=reader, layers=layers, tune="lora", rank=2, ids=False, similarity="dot")
    events, sequences = events_of(HISTORIES)
    before = model.states(events, sequences)
    after = stirred(model).states(events, sequences)
    assert (after - before).abs().max() > 1e-3
    merge_lora(model.reader.high)
    assert_alike([model.states(events, sequences)], [after])


def test_real_titles_are_read_as_plain_transformers_reads_them() -> None:
    folder = minilm()
    texts = ("", "Rose water face toner", "Shea butter hand cream, unscented", "Argan oil for dry hair")
    model = tokens_of(folder, texts=texts, max_tokens=6, pooling="mean").float()
    states = model.states(*events_of([[1, 2, 3], [3, 1]]))
    whole = transformers.AutoModel.from_pretrained(folder).eval()
    for state, history in zip(states, [[1], [1, 2], [1, 2, 3], [3], [3, 1]], strict=True):
        expected = plainly(whole, titles_in_a_row(folder, history, texts, 6), "mean")
        assert (state - expected).abs().max() < 1e-5


@pytest.mark.parametrize("reader", ["high", "tokens"])
def test_bf16_reads_nearly_the_same(reader: str, folders: dict[str, Path]) -> None:
    model = make(folders["bert"], reader=reader, ids=False, similarity="dot").float()
    events, sequences = events_of(HISTORIES)
    events = {name: v.float() if v.is_floating_point() else v for name, v in events.items()}
    exact = model.states(events, sequences)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.states(events, sequences)
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    rough.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_a_reader_cannot_read_is_refused(folders: dict[str, Path]) -> None:
    def refused(words: str, **args: Any) -> None:
        with pytest.raises(ValueError, match=words):
            make(folders["bert"], **args)

    refused("model.args.reader is 'words': must be one of blocks, high, tokens", reader="words")
    refused("model.args.tune is 'all': must be one of full, lora, norms, none", tune="all")
    refused("model.args.ids is True: reader tokens knows items by their texts alone", reader="tokens")
    refused("model.args.store is 'here': reader tokens reads tokens", reader="tokens", ids=False, store="here")
    refused("model.args.tune is 'none': reader tokens would train nothing", reader="tokens", ids=False, tune="none")
    refused("window is 20: 20 titles of 4 tokens are up to 82, .* 64", reader="tokens", ids=False, window=20)
    refused("model.args.window is 0", reader="tokens", ids=False, window=0)
    refused("model.args.positions is 0", reader="high", positions=0)
