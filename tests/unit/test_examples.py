"""What examples/ holds runs, and says what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gmeta
from gmeta.cli import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted(path for path in EXAMPLES.glob("*.yaml") if not path.name.startswith("schema"))


def test_own_model_learns() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "own_model.py", "30"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, last = (float(x) for x in re.findall(r"\d\.\d+", result.stdout.splitlines()[-1]))
    assert last < first - 0.05


@pytest.mark.parametrize("words", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]])
def test_sharded_layers_learn_and_resume(words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *words, EXAMPLES / "sharded.py", "IIG"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, before, again = (float(x) for x in re.findall(r"\d\.\d+", result.stdout.splitlines()[-1]))
    assert before < first - 0.1
    assert before == again


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = yaml.safe_load(path.read_text())
    command = "train" if "model" in keys else "prepare"
    needed = {"train": ("pack", "run_dir"), "prepare": ("out",)}[command]
    words = [word for key in needed if key not in keys for word in (f"--{key}", "x")]
    with pytest.raises(SystemExit) as stopped:
        run([command, "--config", str(path), *words, "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)


def test_public_names_are_there() -> None:
    assert len(gmeta.__all__) <= 25
    for name in gmeta.__all__:
        assert getattr(gmeta, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gmeta.nothing
