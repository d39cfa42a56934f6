"""BAHE reads kept vectors, or tokens, with the same trained layers; it adapts, adds texts, and saves its assets."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import WHY, tiny
from problems import NUM_NUMERIC, Problem, gradients, make_problem
from torch import Tensor, nn

pytest.importorskip("transformers", reason=WHY)

from gmeta.config.train import ModelConfig, TrainConfig
from gmeta.core.batch import text_ids_of
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.models.inputs import InputSpec
from gmeta.models.registry import build_model, find_model, is_foreign, name_of
from gmeta.recommender.build import resolve_model
from gmeta.text.bahe import BAHE
from gmeta.text.encode import encode_texts
from gmeta.text.encoder import open_encoder
from gmeta.text.store import spec_of, writing_store

TEXTS = ("", "w4 w5", "w6", "w7 w8 w9 w10 w11", "w5 w4", "", "w12 w13 w14")
INPUTS = InputSpec(
    {"user": 6, "title": 6},
    ("x0", "x1"),
    0.3,
    sequences={"seen": 6, "bought": 6},
    tables={"user": "user", "title": "text", "seen": "text", "bought": "text"},
    texts=dict.fromkeys(("title", "seen", "bought"), len(TEXTS)),
    text_tables={"text": TEXTS},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bahe")
    return {kind: tiny(root / kind, kind) for kind in ("bert", "llama")}


def make(folder: Path, inputs: InputSpec = INPUTS, **args: Any) -> BAHE:
    chosen = {"encoder": str(folder), "layers": 2, "hidden": [5], "positions": 3, "max_tokens": 16, **args}
    model = build_model(find_model("bahe"), inputs, chosen, name="bahe", seed=0)
    assert isinstance(model, BAHE)
    return model.double()


def examples() -> tuple[Tensor, dict[str, Tensor]]:
    """Four: of usual histories, one that is empty, and one with gaps of padding."""
    generator = torch.Generator().manual_seed(1)
    seen = torch.tensor([[1, 2, 3], [3, 6, 0], [0, 0, 0], [4, 0, 0]])
    bought = torch.tensor([[5, 0], [1, 4], [2, 0], [0, 0]])
    user = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    texts = {"title": torch.tensor([[1], [6], [2], [3]]), "seen": seen, "bought": bought}
    embedded = {text_ids_of(name): ids for name, ids in texts.items()} | {"user": user}
    return torch.randn(4, 2, generator=generator, dtype=torch.float64), embedded


def exactly(model: BAHE) -> BAHE:
    """The model with vectors that were not rounded."""
    source, kept = model.source, []
    for text in TEXTS:
        ids, mask = source.encoder.batch(source.encoder.tokenizer([text], source.spec.max_tokens)[0])
        states = source.encoder.low(ids, mask)
        kept.append(source.encoder.pooled(states, mask, source.spec.pooling, source.spec.vectors))
    source.kept = torch.cat(kept).detach()
    return model


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_kept_vectors_are_those_of_the_lower_layers(kind: str, vectors: int, folders: dict[str, Path]) -> None:
    dense, embedded = examples()
    kept, anew = (make(folders[kind], encode=how, vectors=vectors) for how in ("behaviours", "batch"))
    rounded, expected = kept(dense, embedded), anew(dense, embedded)
    assert (rounded - expected).abs().max() < 5e-2
    assert not torch.equal(rounded, expected)
    assert (exactly(kept)(dense, embedded) - expected).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_token_states_that_are_kept_are_tokens_of_single_texts(kind: str, folders: dict[str, Path]) -> None:
    """The lower layers of `tokens` see the texts of a history together, where `states` has seen each alone."""
    dense, embedded = examples()
    embedded = {n: ids[:, :1] if n.endswith(".text") else ids for n, ids in embedded.items()}  # a text a history
    states, tokens = (make(folders[kind], encode=how) for how in ("states", "tokens"))
    encoder = states.source.encoder
    ids, mask = encoder.batch(encoder.tokenizer(TEXTS, 16)[0])
    exact = encoder.low(ids, mask)
    assert (states.source.kept - exact).abs().max() < 1e-3 * exact.abs().max()
    states.source.kept = exact
    assert torch.allclose(states(dense, embedded), tokens(dense, embedded), atol=1e-11)
    together = examples()[1]
    assert not torch.allclose(states(dense, together), tokens(dense, together), atol=1e-6)


def test_tokens_of_a_history_lie_behind_each_other(folders: dict[str, Path]) -> None:
    model = make(folders["bert"], encode="tokens")
    found = model.source.states(torch.tensor([[3, 0, 2], [2, 0, 0]]), torch.float64)
    tokens = model.source.encoder.tokenizer([TEXTS[3], TEXTS[2]], 16)[0]
    ids, mask = model.source.encoder.batch([tokens[0] + tokens[1], tokens[1]])
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.text[0], torch.tensor([0] * len(tokens[0]) + [2] * len(tokens[1])))
    expected = model.source.encoder.low(ids, mask)
    assert torch.allclose(found.values[mask], expected[mask], atol=1e-12)


def train(model: BAHE, steps: int = 4) -> dict[str, Tensor]:
    dense, embedded = examples()
    label = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(dense, embedded), label).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_training_in_two_steps_is_training_in_one(kind: str, folders: dict[str, Path]) -> None:
    """Vectors made before, or by frozen lower layers in every step: the same weights to 1e-10."""
    one, two = make(folders[kind], encode="batch"), exactly(make(folders[kind]))
    before = {name: value.detach().clone() for name, value in two.named_parameters()}
    first, second = train(one), train(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-10
    assert any(float((before[name] - second[name]).abs().max()) > 1e-3 for name in first if name.startswith("high."))


@pytest.mark.parametrize("user", ["mean", "last", "target"])
@pytest.mark.parametrize("encode", ["behaviours", "tokens"])
def test_a_logit_is_that_of_its_example_alone(user: str, encode: str, folders: dict[str, Path]) -> None:
    dense, embedded = examples()
    model = make(folders["bert"], user=user, encode=encode)
    logits = model(dense, embedded)
    assert logits.isfinite().all()
    for i in range(4):
        alone = model(dense[i : i + 1], {name: value[i : i + 1] for name, value in embedded.items()})
        assert torch.allclose(alone, logits[i : i + 1], atol=1e-10)
    wider = {name: nn.functional.pad(v, (0, 3)) if v.dtype == torch.int64 else v for name, v in embedded.items()}
    assert torch.allclose(model(dense, wider), logits, atol=1e-10)
    shaped = {name: value.view(2, 2, *value.shape[1:]) for name, value in embedded.items()}
    assert torch.allclose(model(dense.view(2, 2, -1), shaped).flatten(), logits, atol=1e-10)
    # a history without texts is the zero vector, whatever the layers make of padding
    assert torch.equal(model._users(embedded, torch.zeros(4, 32, dtype=torch.float64))[0][2], torch.zeros(32).double())


def test_equal_histories_are_read_once(folders: dict[str, Path]) -> None:
    """A user's candidates share his states: exact, and the cost of one."""
    dense, embedded = examples()
    model = make(folders["bert"], user="target")
    same = {name: value[:1].repeat(6, *[1] * (value.dim() - 1)) for name, value in embedded.items()}
    same[text_ids_of("title")] = torch.arange(1, 7).unsqueeze(-1)
    read = []
    model.high.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    logits = model(dense[:1].expand(6, -1), same)
    assert read == [6, 2]  # six items, and two histories
    apart = [model(dense[:1], {name: value[i : i + 1] for name, value in same.items()}) for i in range(6)]
    assert torch.allclose(torch.cat(apart), logits, atol=1e-10)


def test_a_history_that_is_left_out_in_training_is_an_empty_one(folders: dict[str, Path]) -> None:
    dense, embedded = examples()
    usual, model = make(folders["bert"]), make(folders["bert"], history_dropout=0.999).eval()
    assert torch.equal(model(dense, embedded), usual(dense, embedded))  # after training nothing is left out
    empty = {n: torch.zeros_like(ids) if n in ("seen.text", "bought.text") else ids for n, ids in embedded.items()}
    torch.manual_seed(0)
    assert torch.allclose(model.train()(dense, embedded), usual(dense, empty), atol=1e-12)
    assert not torch.allclose(usual(dense, embedded), usual(dense, empty), atol=1e-3)


def test_texts_count_from_the_last_one(folders: dict[str, Path]) -> None:
    """BERT's layers know no order, so what depends on it comes from the learned vectors of recency."""
    dense, embedded = examples()
    model = make(folders["bert"])
    swapped = {**embedded, text_ids_of("seen"): embedded[text_ids_of("seen")][:, [1, 0, 2]]}
    assert not torch.allclose(model(dense, swapped)[0], model(dense, embedded)[0], atol=1e-6)
    nn.init.zeros_(model.recency)
    assert torch.allclose(model(dense, swapped)[0], model(dense, embedded)[0], atol=1e-10)


def test_a_direction_may_be_set(folders: dict[str, Path]) -> None:
    x, mask = torch.randn(1, 4, 32, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    changed = x.clone()
    changed[:, 3] += 1
    for kind, own in (("bert", False), ("llama", True)):
        for direction, causal in (("own", own), ("causal", True), ("both", False)):
            high = make(folders[kind], direction=direction).high
            assert torch.equal(high(x, mask)[:, 0], high(changed, mask)[:, 0]) == causal


@pytest.mark.parametrize(
    ("tune", "trained"),
    [("full", {"query.weight", "LayerNorm.weight"}), ("lora", {"down.weight"}), ("norms", {"LayerNorm.weight"})],
)
def test_what_is_tuned(tune: str, trained: set[str], folders: dict[str, Path]) -> None:
    model = make(folders["bert"], tune=tune, rank=2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    after = train(model, steps=2)
    changed = {name for name in after if name.startswith("high.") and not torch.equal(after[name], before[name])}
    changed |= {name for name in after if name.endswith("key.bias") and tune == "full"}  # which a softmax does not see
    assert changed == {n for n, p in model.named_parameters() if n.startswith("high.") and p.requires_grad}
    for ending in ("query.weight", "LayerNorm.weight", "down.weight"):
        assert any(name.endswith(ending) for name in changed) == (ending in trained)
    frozen = make(folders["bert"], tune="none")
    assert not any(p.requires_grad for p in frozen.high.parameters())


def test_ids_pass_a_gate(folders: dict[str, Path]) -> None:
    dense, embedded = examples()
    generator = torch.Generator().manual_seed(5)
    model = make(folders["bert"], ids=True)
    assert model.features == ("user", "title", "seen", "bought")
    rows = {"title": (4, 6), "seen": (4, 3, 6), "bought": (4, 2, 6)}
    more = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in rows.items()}
    logits = model(dense, {**embedded, **more})
    changed = {**more, "seen": more["seen"].clone()}
    changed["seen"][0, 1] += 1  # a row of a text that counts
    changed["seen"][3, 1:] += 1  # rows of padding
    found = model(dense, {**embedded, **changed})
    assert not torch.allclose(found[0], logits[0], atol=1e-9)
    assert torch.allclose(found[1:], logits[1:], atol=1e-12)


# ------------------------------------------------------------------------------------------ adaptation


def problem_of() -> Problem:
    problem = make_problem(features=("user",))

    def given(side, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = {
            text_ids_of(name): torch.randint(0, 7, (*side.mask.shape, length), generator=generator)
            * side.mask.unsqueeze(-1)
            for name, length in (("title", 1), ("seen", 3), ("bought", 2))
        }
        return replace(side, given=ids)

    batch = replace(problem.batch, support=given(problem.batch.support, 1), query=given(problem.batch.query, 2))
    return Problem(problem.rows, batch)


def learner_of(model: BAHE, engine: str, **loop: Any) -> MetaLearner:
    return MetaLearner(
        model, {"user": 6}, NUM_NUMERIC, InnerLoop(lr=0.2, **loop), texts=INPUTS.texts_of(model), engine=engine
    ).double()


def results(learner: MetaLearner, problem: Problem) -> dict[str, Tensor]:
    loss, out = learner(problem.rows, problem.batch)
    trained = {name for name, p in learner.named_parameters() if not p.requires_grad}
    for name in trained:
        learner.get_parameter(name).requires_grad_(True)  # a frozen one has no gradient to ask for
    logits = torch.where(problem.batch.query.mask, out.query_logits, 0)
    found = gradients(problem, learner, loss) if not trained else {}
    for name in trained:
        learner.get_parameter(name).requires_grad_(False)
    return {"loss": loss.detach(), "logits": logits.detach(), **found}


@pytest.mark.parametrize("adapt", [["decision"], ["embeddings", "head"], ["last_layer"]], ids=lambda a: "+".join(a))
def test_both_engines_adapt_the_head(adapt: list[str], folders: dict[str, Path]) -> None:
    problem = problem_of()
    found = []
    for engine in ("factored", "reference"):
        model = make(folders["bert"], taste=3 if adapt == ["last_layer"] else 0)
        found.append(results(learner_of(model, engine, adapt=adapt, order="second", steps=2), problem))
    for name, value in found[1].items():
        assert torch.allclose(found[0][name], value, rtol=0, atol=1e-9 * max(1.0, float(value.abs().max()))), name


class Attentive(nn.Module):
    """A layer, fused attention behind it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(NUM_NUMERIC + 6, 6), nn.Linear(6, 1)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = self.layer(torch.cat([embedded["user"], dense], -1))
        x = torch.stack([x, embedded["user"]], -2).flatten(0, -3).unsqueeze(1)
        read = nn.functional.scaled_dot_product_attention(x, x, x)
        return self.out(read[:, 0, 0].view(*dense.shape[:-1], 6)).squeeze(-1)


@pytest.mark.parametrize("adapt", [["embeddings", "out.*"], ["layer.*"], ["out.*"]], ids=lambda a: "+".join(a))
def test_both_engines_adapt_below_attention(adapt: list[str]) -> None:
    """Fused attention has no second derivative; they do without, where they need one."""
    problem, found = make_problem(features=("user",)), []
    torch.manual_seed(3)
    model = Attentive()
    for engine in ("factored", "reference"):
        loop = InnerLoop(lr=0.2, adapt=adapt, order="second", steps=2)
        learner = MetaLearner(model, {"user": 6}, NUM_NUMERIC, loop, engine=engine).double()
        found.append(results(learner, problem))
    for name, value in found[1].items():
        assert torch.allclose(found[0][name], value, rtol=0, atol=1e-9 * max(1.0, float(value.abs().max()))), name


def test_weights_know_the_encoder_that_they_were_trained_above(folders: dict[str, Path], tmp_path: Path) -> None:
    """In a run and in a bundle alike: other lower layers would give other scores, and no error."""
    model, other = make(folders["bert"]), make(tiny(tmp_path / "other", "bert", type_vocab_size=3))
    model.check_loaded()
    weights = {name: value for name, value in other.state_dict().items() if name != "encoder_digest"}
    model.load_state_dict({**model.state_dict(), **weights})
    model.check_loaded()
    model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=rf"{folders['bert']} holds another encoder .*restore its files"):
        model.check_loaded()


def test_a_run_keeps_absolute_paths(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders["bert"].parent)
    model = ModelConfig(name="bahe", args={"encoder": "bert", "layers": 2})
    found = resolve_model(TrainConfig(pack="pack", run_dir="run", model=model)).model.args
    assert (found["encoder"], found["store"]) == (str(folders["bert"]), "")
    assert (
        resolve_model(TrainConfig(pack="pack", run_dir="run", model=ModelConfig(name="bahe", args=found))).model.args
        == found
    )


def test_a_history_of_too_many_tokens_says_what_to_do(folders: dict[str, Path]) -> None:
    model = make(folders["bert"], encode="tokens")
    with pytest.raises(ValueError, match=r"a history has 84 tokens.*64 positions; lower model.args.max_tokens"):
        model.source.states(torch.full((1, 12), 3), torch.float64)


def test_vectors_beyond_fp16_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmeta.text.sources.encode_texts", lambda *_: torch.full((7, 1, 32), 7e4))
    with pytest.raises(ValueError, match=r"7e\+04, more than the fp16 .*encode batch"):
        make(folders["bert"])


@pytest.mark.parametrize("order", ["first", "second"])
def test_adapters_of_the_upper_layers_adapt_to_a_task(order: str, folders: dict[str, Path]) -> None:
    """Layers see histories, not tasks, so these adapt one task at a time, by the reference engine."""
    problem, model = problem_of(), make(folders["bert"], tune="lora", rank=2)
    learner = learner_of(model, "auto", adapt=["high.*.up.weight", "head"], order=order, steps=1)
    assert learner.engine == "reference"
    before, after = learner.eval().predict(problem.rows, problem.batch)
    assert before is not None
    assert not torch.allclose(before[0], after[0], atol=1e-6)
    loss, _ = learner.train()(problem.rows, problem.batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------- texts and assets


def test_added_texts_read_as_given_ones(folders: dict[str, Path]) -> None:
    dense, embedded = examples()
    whole = make(folders["bert"])
    few = make(folders["bert"], replace(INPUTS, text_tables={"text": TEXTS[:4]}))
    few.add_texts("another", ["w1"])
    few.add_texts("text", TEXTS[4:])
    assert torch.allclose(few(dense, embedded), whole(dense, embedded), atol=1e-2)
    few.forget_texts("text")
    assert len(few.source) == 4
    few.add_texts("text", TEXTS[4:])
    assert len(few.source) == len(TEXTS)


def test_a_model_is_made_again_of_its_assets(tmp_path: Path, folders: dict[str, Path]) -> None:
    dense, embedded = examples()
    inputs = replace(INPUTS, text_tables={"text": ("", "w4 w5", "w6", "w7 w8 w9 w10 w11", "w5 w4", "w9", "w12 w13")})
    for encode in ("behaviours", "tokens"):
        model = make(folders["bert"], inputs, encode=encode)
        args = model.save_assets(tmp_path / encode)
        found = {key: str(tmp_path / encode / value) if value else "" for key, value in args.items()}
        again = make(tmp_path / encode, inputs, encode=encode, **found)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(dense, embedded), model(dense, embedded))


def test_more_texts_leave_the_files_of_earlier_ones(tmp_path: Path, folders: dict[str, Path], monkeypatch) -> None:
    monkeypatch.setattr("gmeta.text.model._TEXTS_PER_SHARD", 3)
    days = []
    for day, number in enumerate((4, 6)):
        texts = tuple(f"w{i + 4} w5" if i else "" for i in range(number))
        make(folders["bert"], replace(INPUTS, text_tables={"text": texts})).save_assets(tmp_path / str(day))
        shards = (tmp_path / str(day) / "texts" / "shards").glob("*.safetensors")
        days.append({path.name: path.read_bytes() for path in shards})
    assert len(days[0]) == 1
    assert days[0].items() <= days[1].items()


def test_a_store_must_be_that_of_the_model(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = open_encoder(folders["bert"], 2)
    texts = TEXTS[1:4]
    with writing_store(tmp_path / "store", spec_of(encoder, max_tokens=16)) as writer:
        writer.append(texts, encode_texts(encoder, writer.spec, texts))
    inputs = replace(INPUTS, text_tables={"text": TEXTS[:4]})
    store = str(tmp_path / "store")
    dense, embedded = examples()
    embedded = {n: v.clamp(max=3) if v.dtype == torch.int64 else v for n, v in embedded.items()}
    read, made = make(folders["bert"], inputs, store=store), make(folders["bert"], inputs)
    assert torch.allclose(read(dense, embedded), made(dense, embedded), atol=1e-2)
    more, every = make(folders["bert"], store=store), make(folders["bert"])  # what the store lacks is encoded
    assert torch.allclose(more(*examples()), every(*examples()), atol=1e-2)
    with writing_store(tmp_path / "int8", spec_of(encoder, max_tokens=16, dtype="int8")) as writer:
        writer.append(texts, encode_texts(encoder, writer.spec, texts))
    small = make(folders["bert"], inputs, store=str(tmp_path / "int8"))  # vectors may be kept in fewer bytes
    assert torch.allclose(small(dense, embedded), made(dense, embedded), atol=5e-2)
    half = open_encoder(folders["bert"], 2, dtype=torch.bfloat16)
    with writing_store(tmp_path / "bf16", spec_of(half, max_tokens=16)) as writer:
        writer.append(texts, encode_texts(half, writer.spec, texts))
    rough = make(folders["bert"], inputs, store=str(tmp_path / "bf16"))  # and computed in them
    assert torch.allclose(rough(dense, embedded), made(dense, embedded), atol=5e-2)
    (shard,) = (tmp_path / "bf16/shards").iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-64] + b"\xff" * 64)
    with pytest.raises(ValueError, match="gives numbers that are not finite: `gmeta embed verify --store"):
        make(folders["bert"], inputs, store=str(tmp_path / "bf16"))
    monkeypatch.setattr("gmeta.text.sources.QUIETLY", 2)
    with pytest.warns(UserWarning, match=r"lacks 3 of 6 texts.*gmeta embed"):
        make(folders["bert"], store=store)
    for change, named in (
        ({"layers": 3}, "layers 2, not 3"),
        ({"template": "Title: {text}"}, "template"),
        ({"pooling": "last"}, "pooling"),
        ({"vectors": 2}, "vectors 1, not 2"),
        ({"max_tokens": 8}, "max_tokens 16, not 8"),
    ):
        with pytest.raises(ValueError, match=f"a store of other vectors.*{named}"):
            make(folders["bert"], inputs, store=store, **change)
    other = tiny(tmp_path / "other", "bert", layers=5)
    with pytest.raises(ValueError, match=r"of other vectors .encoder.*or restore the encoder's folder"):
        make(other, inputs, store=store)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"encode": "words"}, "model.args.encode"),
        ({"tune": "all"}, "model.args.tune"),
        ({"user": "first"}, "model.args.user"),
        ({"direction": "left"}, "model.args.direction"),
        ({"pooling": "max"}, "model.args.pooling"),
        ({"positions": 0}, "model.args.positions"),
        ({"taste": -1}, "model.args.taste"),
        ({"layers": 4}, r"layers is 4.*in \[0, 3\]"),
        ({"target": "seen"}, "model.args.target names 'seen'.*title"),
        ({"histories": ["seen", "seen"]}, "must differ from each other"),
        ({"histories": ["title"]}, "model.args.histories names 'title'.*seen|bought"),
        ({"vectors": 5}, "vectors"),
        ({"encode": "states", "store": "nowhere"}, "model.args.store is 'nowhere': nothing is read of it with"),
        ({"encoder": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        make(folders["bert"], **args)


def test_what_holds_no_texts_is_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"reads no feature of texts.*`text: true`.*model.features"):
        make(folders["bert"], replace(INPUTS, texts={}))
    with pytest.raises(ValueError, match=r"reads no history: a sequence with .*`table: text`"):
        make(folders["bert"], replace(INPUTS, texts={"title": 7}))
    both = replace(INPUTS, features={"title": 6, "query": 6}, texts={**INPUTS.texts, "query": 7})
    with pytest.raises(ValueError, match="target is not set: name one of title, query"):
        make(folders["bert"], both)


def test_the_name_is_gmetas_own(folders: dict[str, Path]) -> None:
    assert not is_foreign("bahe")
    assert name_of(BAHE) == "bahe"
    model = make(folders["bert"])
    assert not any("low" in name or "kept" in name for name in model.state_dict())
    assert copy.deepcopy(model)(*examples()).isfinite().all()
