"""An elastic group whose model trains lower layers and keeps their vectors: a kill changes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from encoders import WHY, tiny
from test_elastic_faults import command, finish, kill, learned, losses, start, wait_for_step
from text_models import in_words, text_pack, text_rows

pytest.importorskip("transformers", reason=WHY)
pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_kill_between_refreshes_changes_nothing(tmp_path: Path) -> None:
    """Kept vectors are made anew every five steps, by layers of the step; the restart is from a step between."""
    tiny(tmp_path / "bert", "bert")
    pack = text_pack(tmp_path, **in_words(text_rows()))
    words: list[object] = ["--model.name", "bahe", "--model.args.encoder", tmp_path / "bert", "--meta.adapt", "[head]"]
    words += ["--model.args.layers", 2, "--model.args.refresh", 5, "--schedule.epochs", 8]
    words += ["--schedule.checkpoint_every", 3]
    finish(start(command(pack, tmp_path / "plain", *words, elastic=False)))
    assert len(losses(tmp_path / "plain")) > 20
    process = start(command(pack, tmp_path / "run", *words))
    wait_for_step(process, tmp_path / "run", 12)
    assert kill(process, "worker", random.Random(4))
    said = finish(process)
    assert "restart 1, from the checkpoint of step" in said
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert learned(tmp_path / "run") == learned(tmp_path / "plain")
