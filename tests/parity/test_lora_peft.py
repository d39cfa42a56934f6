"""Adapters made by hand are those of `peft`: outputs, gradients, and merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import WHY, tiny

pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("peft", reason="needs peft: make dev")

import peft
from transformers import AutoModel

from gmeta.text.encoder import open_encoder
from gmeta.text.lora import LoraLinear, add_lora, merge_lora

pytestmark = pytest.mark.slow  # to import peft takes seconds


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that goes away
@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query", "value"]), ("llama", ["q_proj", "down_proj"])])
def test_adapters_are_those_of_peft(kind: str, targets: list[str], tmp_path: Path) -> None:
    folder = tiny(tmp_path / kind, kind, layers=2)
    encoder = open_encoder(folder, 0, dtype=torch.float64)
    names = add_lora(encoder.high, 3, alpha=4.5, targets=targets)
    whole = AutoModel.from_pretrained(folder, dtype=torch.float64)
    made = peft.get_peft_model(whole, peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=targets)).double().eval()

    ours = [part for part in encoder.high.modules() if isinstance(part, LoraLinear)]
    theirs = [part for part in made.modules() if isinstance(part, peft.tuners.lora.Linear)]
    assert len(ours) == len(theirs) == len(names) == 4
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for own, other in zip(ours, theirs, strict=True):
        for mine, yours in ((own.down, other.lora_A["default"]), (own.up, other.lora_B["default"])):
            torch.nn.init.normal_(mine.weight, 0, 0.3, generator=generator)
            yours.weight.data.copy_(mine.weight)
            pairs.append((mine.weight, yours.weight))

    ids, mask = encoder.batch([[4, 5, 6, 7], [8, 9]])
    told = {"input_ids": ids, "attention_mask": mask.long()}
    found, expected = encoder(ids, mask)[mask], made(**told).last_hidden_state[mask]
    assert (found - expected).abs().max() < 1e-10
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad((found * weight).sum(), [mine for mine, _ in pairs])
    others = torch.autograd.grad((expected * weight).sum(), [yours for _, yours in pairs])
    scale = max(float(grad.abs().max()) for grad in others)
    most = 1e-10 if kind == "bert" else 1e-6  # a Llama's norms compute in float32
    assert all((grad - other).abs().max() < most * scale for grad, other in zip(grads, others, strict=True))

    merge_lora(encoder.high)
    merged = made.merge_and_unload()
    assert (encoder(ids, mask)[mask] - merged(**told).last_hidden_state[mask]).abs().max() < 1e-10
