"""gmeta's commands in this process, and what a run of them logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gmeta.cli import run

TELL_PEAK = """
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""
"""Code that prints the most memory that its process held, in MB. What `getrusage` tells counts that of its parent."""
_TIMED = ("tasks_per_s", "samples_per_s", "time_s", "input_share", "exchange_share", "compute_share")


def gmeta(*words: object) -> None:
    """The command ends well."""
    assert run([str(word) for word in words]) == 0


def fails(words: list[object] | list[str], capsys: pytest.CaptureFixture[str], *expected: str) -> str:
    """The command ends with code 2 and one message that holds all of `expected`."""
    assert run([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.count(": error: ") == 1, message
    assert "Traceback" not in message
    for text in expected:
        assert text in message, message
    return message


def train_words(pack: Path, run_dir: Path, *more: object, epochs: int = 2) -> list[str]:
    """A `gmeta train` that takes a second or two; what `more` says comes last and counts."""
    words = ["train", "--pack", pack, "--run_dir", run_dir, "--loader.tasks_per_batch", 20, "--model.name", "melu"]
    words += ["--model.args.hidden", "[8]", "--schedule.epochs", epochs, *more]
    return [str(word) for word in words]


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, without what they say of time."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in _TIMED} for record in records]
