"""Text encoders are split without changing what they compute, positions and norms once; and adapted by low rank."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from encoders import WHY, change_json, minilm, tiny, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason=WHY)

from gmeta.text.encode import encode_texts, pack_by_length
from gmeta.text.encoder import TextEncoder, open_encoder, pool_states
from gmeta.text.lora import LoraLinear, add_lora, merge_lora
from gmeta.text.store import spec_of

KINDS = ("bert", "roberta", "distilbert", "electra", "llama", "mistral", "qwen2", "qwen3", "gemma")
TEXTS = ["w4 w5", "w6", "w7 w8 w9 w10 w11", "w5 w4", "w4 w5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("encoders")
    yield {kind: tiny(root / kind, kind) for kind in KINDS}
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, TextEncoder]:
    return {kind: open_encoder(folder, 2, dtype=torch.float64) for kind, folder in folders.items()}


def whole(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """The states of the model that transformers makes of a folder."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return found


def vectors(n: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(n, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_both_halves_compute_what_the_whole_does(kind: str, folders: dict[str, Path]) -> None:
    for layers in (0, 1, 3):
        encoder = open_encoder(folders[kind], layers, dtype=torch.float64)
        tokens, cut = encoder.tokenizer(TEXTS, 16)
        assert not any(cut)
        ids, mask = encoder.batch(tokens)
        expected = whole(folders[kind], ids, mask)
        assert (encoder(ids, mask) - expected)[mask].abs().max() < 1e-12
        assert not encoder(ids, mask)[~mask].any()
        assert not any(p.requires_grad for p in encoder.low.parameters())
        assert all(p.requires_grad for p in encoder.high.parameters())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_upper_layers_see_positions_from_zero_and_no_embeddings(kind: str, opened: dict[str, TextEncoder]) -> None:
    """What a sequence of vectors becomes is what its own layers make of it, computed here one by one."""
    encoder = opened[kind]
    x = vectors(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        found = encoder.high(x, mask)
        expected = x
        if kind == "bert":
            for layer in encoder.high.layers:
                expected = layer(expected)
        else:
            rotated = encoder.high.rotary(x, torch.arange(5)[None])
            causal = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            for layer in encoder.high.layers:
                expected = layer(expected, attention_mask=causal, position_embeddings=rotated)
            expected = encoder.high.norm(expected)
        shuffled = encoder.high(x.flip(1), mask).flip(1)
    assert (found - expected).abs().max() < 1e-12
    # BERT's layers know no order; a decoder's do, by the rotation.
    assert ((shuffled - found).abs().max() < 1e-12) == (kind == "bert")


def test_a_decoder_looks_back_alone_and_an_encoder_both_ways(opened: dict[str, TextEncoder]) -> None:
    x = vectors(1, 6)
    changed = x.clone()
    changed[:, 4] += 1
    mask = torch.ones(1, 6, dtype=torch.bool)
    with torch.no_grad():
        before = {
            kind: (opened[kind].high(x, mask) - opened[kind].high(changed, mask))[0, :4] for kind in ("bert", "llama")
        }
    assert not before["llama"].any()
    assert before["bert"].any(-1).all()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_anywhere_changes_nothing_and_gives_zeros(kind: str, opened: dict[str, TextEncoder]) -> None:
    x = vectors(3, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    poisoned = x.masked_fill(~mask[..., None], 1e6)
    with torch.no_grad():
        found, again = opened[kind].high(x, mask), opened[kind].high(poisoned, mask)
        alone = opened[kind].high(x[:1, :3], mask[:1, :3])
    assert torch.isfinite(found).all()
    assert torch.equal(found, again)
    assert not found[~mask].any()
    assert (found[:1, :3] - alone).abs().max() < 1e-12


def test_gradients_reach_the_upper_layers_and_vectors_alone(opened: dict[str, TextEncoder]) -> None:
    for kind in ("bert", "llama"):
        encoder = copy.deepcopy(opened[kind])
        ids, mask = encoder.batch([[4, 5], [6]])
        encoder.high(encoder.low(ids, mask), mask).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.high.parameters())
        assert all(p.grad is None for p in encoder.low.parameters())
        assert not encoder.train().low.training
        assert encoder.high.training


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_two_steps_learn_what_one_piece_learns(kind: str, opened: dict[str, TextEncoder]) -> None:
    """The same weights after five steps, whether vectors are made once before or in each step, to 1e-10.

    By SGD: a key's bias moves nothing, its gradient is rounding alone, and Adam would blow that up to a whole step.
    """
    history = torch.tensor([[0, 1, 2], [3, 4, 0]])  # rows of TEXTS
    label = torch.tensor([0.0, 1.0], dtype=torch.float64)
    kept = torch.ones(2, 3, dtype=torch.bool)

    def trained(*, at_once: bool) -> dict[str, Tensor]:
        encoder = copy.deepcopy(opened[kind])
        head = nn.Linear(32, 1, dtype=torch.float64)
        nn.init.constant_(head.weight, 0.1)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD([*encoder.high.parameters(), *head.parameters()], 1e-2, momentum=0.9)
        spec = spec_of(encoder)
        ids, mask = encoder.batch(encoder.tokenizer([TEXTS[i] for i in history.flatten()], 16)[0])
        with torch.no_grad():
            one, own = encoder.batch(encoder.tokenizer(TEXTS, 16)[0])
            table = encoder.pooled(encoder.low(one, own), own, spec.pooling)[:, 0]
        for _ in range(5):
            made = encoder.pooled(encoder.low(ids, mask), mask)[:, 0].view(2, 3, 32) if at_once else table[history]
            logits = head(encoder.high(made, kept)[:, -1])[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return encoder.high.state_dict()

    ours, theirs, start = trained(at_once=False), trained(at_once=True), opened[kind].high.state_dict()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-10
    assert max(float((ours[name] - start[name]).abs().max()) for name in ours) > 1e-4


def test_bfloat16_keeps_its_positions_and_is_near(folders: dict[str, Path], opened: dict[str, TextEncoder]) -> None:
    encoder = open_encoder(folders["llama"], 2, dtype=torch.bfloat16)
    ids, mask = encoder.batch([[4, 5, 6, 7], [8]])
    found, expected = encoder(ids, mask), opened["llama"](ids, mask)
    assert found.dtype == torch.bfloat16
    assert encoder.high.rotary.inv_freq.dtype == torch.float32  # rounded ones would turn far positions elsewhere
    assert (found.double() - expected).abs().max() < 0.1 * expected.abs().max()


# ---------------------------------------------------------------------------------------------- pooling


def test_pooling_against_loops() -> None:
    states = vectors(4, 7)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0] * 7, [0, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    for pooling in ("mean", "last", "cls"):
        for count in (1, 2, 4):
            found = pool_states(states, mask, pooling, count)
            assert found.shape == (4, count, 32)
            for row in range(4):
                real = [states[row, at] for at in range(7) if mask[row, at]]
                for segment in range(count):
                    own = [state for rank, state in enumerate(real) if rank * count // len(real) == segment]
                    choose = {"mean": lambda s: sum(s) / len(s), "last": lambda s: s[-1], "cls": lambda s: s[0]}
                    expected = choose[pooling](own) if own else torch.zeros(32, dtype=torch.float64)
                    assert (found[row, segment] - expected).abs().max() < 1e-12


def test_texts_of_like_length_are_packed() -> None:
    lengths = [3, 9, 1, 9, 2, 40, 3]
    batches = list(pack_by_length(lengths, budget=18))
    assert sorted(at for batch in batches for at in batch) == list(range(7))
    assert [[lengths[at] for at in batch] for batch in batches] == [[1, 2, 3, 3], [9, 9], [40]]
    assert list(pack_by_length([], 18)) == []


def test_a_text_has_one_vector_whatever_it_is_encoded_with(opened: dict[str, TextEncoder]) -> None:
    for kind in ("bert", "llama"):
        encoder = copy.deepcopy(opened[kind]).float()
        spec = spec_of(encoder, vectors=2, template="w9 {text}", max_tokens=6)
        texts = [*TEXTS, "", "w4 " * 50_000, "{text} w4"]
        together = encode_texts(encoder, spec, texts)
        assert together.shape == (8, 2, 32)
        for at, text in enumerate(texts):
            assert (encode_texts(encoder, spec, [text])[0] - together[at]).abs().max() < 1e-4
        assert torch.equal(together[0], together[4])
        # Cut at six tokens, of which the tokenizer's own are two.
        assert torch.equal(encode_texts(encoder, spec, ["w4 w4 w4"])[0], together[6])


def test_texts_without_tokens_have_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = shutil.copytree(folders["llama"], tmp_path / "bare")
    bare = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w3"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.save(str(folder / "tokenizer.json"))
    encoder = open_encoder(folder, 2)
    found = encode_texts(encoder, spec_of(encoder), ["", "w4", "  "])
    assert not found[0].any()
    assert not found[2].any()
    assert found[1].any()


# ------------------------------------------------------------------------------------------ real weights


def test_real_weights_give_what_transformers_gives() -> None:
    from transformers import AutoModel

    folder = minilm()
    encoder = open_encoder(folder, 3)
    assert (encoder.dim, encoder.layers, encoder.num_layers, encoder.max_tokens) == (384, 3, 6, 512)
    texts = ["Toy Story (1995)", "A film about a very long train ride through the night", "Alien"]
    ids, mask = encoder.batch(encoder.tokenizer(texts, 64)[0])
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        told = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        low = encoder.low(ids, mask)
        mean = encoder.pooled(encoder.high(low, mask), mask)[:, 0]
    assert (low - told.hidden_states[3])[mask].abs().max() < 1e-4
    expected = (told.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert (mean - expected).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------- bad folders


def test_a_digest_stands_for_weights_config_and_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    base = open_encoder(folders["bert"], 2).digest
    same = shutil.copytree(folders["bert"], tmp_path / "same")
    (same / "README.md").write_text("not part of it")
    assert open_encoder(same, 3).digest == base
    write_tokenizer(same, 40)
    other = open_encoder(same, 2).digest
    change_json(same / "config.json", layer_norm_eps=1e-3)
    assert len({base, other, open_encoder(same, 2).digest}) == 3


def test_what_is_no_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(folder: Path, words: str, **more: object) -> None:
        with pytest.raises(ValueError, match=words):
            open_encoder(folder, **{"layers": 2, **more})  # type: ignore[arg-type]

    def copied(name: str) -> Path:
        return shutil.copytree(folders["bert"], tmp_path / name)

    refused(tmp_path / "nowhere", "is no folder: name one with config.json")
    (folder := copied("no-config")).joinpath("config.json").unlink()
    refused(folder, "has no config.json")
    (folder := copied("pickled")).joinpath("model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"weights are pickled \(pytorch_model.bin\), which can run code")
    change_json((folder := copied("code")) / "config.json", auto_map={"AutoModel": "mine.Model"})
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    refused(folder, "wants to run code of its own .*refused")
    change_json((folder := copied("unknown")) / "config.json", model_type="nothing-like-it")
    refused(folder, "cannot be opened by transformers .*nothing-like-it")
    (folder := copied("untold")).joinpath("tokenizer.json").unlink()
    refused(folder, "has no tokenizer.json: write one")
    (folder := copied("broken")).joinpath("tokenizer.json").write_text("{}")
    refused(folder, "is no tokenizer")
    write_tokenizer(folder := copied("another"), 500)
    refused(folder, "64 token embeddings, its tokenizer.json 500 tokens: it is the tokenizer of another")
    change_json((folder := copied("lacking")) / "config.json", num_hidden_layers=5)
    refused(folder, "lacks weights")
    change_json((folder := copied("cut-off")) / "config.json", num_hidden_layers=3)
    refused(folder, "has weights of layers that its config does not name .*restore config.json")
    (folder := copied("cut")).joinpath("model.safetensors").write_bytes(b"x" * 100)
    refused(folder, r"cut/model\.safetensors cannot be read .*restore the file")
    weights = load_file((folder := copied("nan")) / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "gives numbers that are not finite: its weights are broken")
    for layers in ("2", True, None, 2.0):
        refused(folders["bert"], "must be a whole number", layers=layers)
    with pytest.raises(ValueError, match="name the folder of a text encoder"):
        open_encoder("", 2)
    for layers in (4, -1):
        refused(folders["bert"], rf"layers is {layers}: .* has 4: must be in \[0, 3\]", layers=layers)
    refused(folders["bert"], r"max_tokens is 65: must be in \[1, 64\]", max_tokens=65)
    refused(folders["bert"], "dtype is torch.float16", dtype=torch.float16)


def test_architectures_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    for kind, words in (("gpt2", "names that are known"), ("granite", "something else than its parts")):
        more = {"embedding_multiplier": 3.0} if kind == "granite" else {}
        folder = tiny(tmp_path / kind, kind, **more)
        with pytest.raises(ValueError, match=f"{words}.*it cannot be split"):
            open_encoder(folder, 2)


def test_what_is_too_long_or_no_text_is_refused(folders: dict[str, Path], opened: dict[str, TextEncoder]) -> None:
    encoder = opened["bert"]
    ids = torch.full((1, 65), 4)
    with pytest.raises(ValueError, match="a text has 65 tokens: this encoder has 64 positions"):
        encoder.low(ids, torch.ones_like(ids, dtype=torch.bool))
    mistral = open_encoder(folders["mistral"], 2)
    mistral.high.span = type(mistral.high.span)(causal=True, window=8)
    with pytest.raises(ValueError, match="a sequence has 9 positions: this encoder looks at 8"):
        mistral.high(torch.zeros(1, 9, 32), torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="text 1 is no Unicode"):
        encoder.tokenizer(["w4", "\ud800"], 8)
    with pytest.raises(ValueError, match="max_tokens is 2: the tokenizer adds 2 of its own"):
        encoder.tokenizer(["w4"], 2)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        encoder.pooled(vectors(1, 2), torch.ones(1, 2, dtype=torch.bool), "max")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- LoRA


def test_adapters_begin_as_nothing_and_merge_to_the_same(opened: dict[str, TextEncoder]) -> None:
    generator = torch.Generator().manual_seed(3)
    high = copy.deepcopy(opened["llama"].high)
    x, mask = vectors(2, 5), torch.ones(2, 5, dtype=torch.bool)
    before = high(x, mask)
    names = add_lora(high, 4, alpha=6.0, targets=["q_proj", "v_proj"], generator=generator)
    assert names == [f"layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in ("q", "v")]
    assert torch.equal(high(x, mask), before)
    trained = {name: p for name, p in high.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{name}.{part}.weight" for name in names for part in ("down", "up")}
    assert sum(p.numel() for p in trained.values()) == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert all(isinstance(high.get_submodule(f"{name}.{part}"), nn.Linear) for name in names for part in ("down", "up"))
    for parameter in trained.values():
        nn.init.normal_(parameter, 0, 0.2, generator=generator)
    layer = high.get_submodule(names[0])
    assert isinstance(layer, LoraLinear)
    dense = layer.base.weight + 6.0 / 4 * layer.up.weight @ layer.down.weight
    assert (layer(x) - nn.functional.linear(x, dense)).abs().max() < 1e-12
    after = high(x, mask)
    assert (after - before).abs().max() > 1e-3
    merge_lora(high)
    assert not any(isinstance(part, LoraLinear) for part in high.modules())
    assert (high(x, mask) - after).abs().max() < 1e-10


def test_adapters_that_cannot_be_put_are_refused(opened: dict[str, TextEncoder]) -> None:
    high = copy.deepcopy(opened["bert"].high)
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(high, 0)
    with pytest.raises(ValueError, match="targets is 'q_proj': there is: dense, key, query, value"):
        add_lora(high, 2, targets=["q_proj"])
    assert len(add_lora(high, 2)) == 12
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(high, 2)
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(nn.LayerNorm(3), 2)
