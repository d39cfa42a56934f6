"""The speed benchmark of next items compares loops that learn the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from encoders import WHY, tiny

pytest.importorskip("transformers", reason=WHY)

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package
import next_item_speed


def test_both_loops_have_one_loss_curve(tmp_path: Path) -> None:
    """Ours encodes fewer items, and pads less."""
    folder = tiny(tmp_path / "bert", "bert")
    texts = ["", "w4 w5", "w6", "w7 w8 w9", "w10", "w11 w12", "w13 w4 w5"]
    steps = next_item_speed.steps_of([[1, 2, 3], [4, 5, 6, 1, 1], [2, 6], [3, 3, 4]], len(texts), 3, 3)
    made = next_item_speed.loops(folder, texts, max_tokens=5, window=3, dtype=torch.float64)
    found = next_item_speed.run(made, steps)
    ours, plain = found["ours"], found["plain"]
    assert ours.losses == pytest.approx(plain.losses, abs=1e-9)
    assert len({round(loss, 6) for loss in ours.losses}) == 3
    assert ours.items < plain.items == sum(11 * len(step.targets) for step in steps)
    assert ours.tokens < plain.tokens
    assert 1 - ours.tokens / ours.places < 1 - plain.tokens / plain.places
