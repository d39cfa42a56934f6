"""What examples/ holds runs, and says what it should."""

from __future__ import annotations

import ast
import json
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


ALONE = ["-W", "error", "-W", "ignore:torch.distributed is disabled"]  # so torch says that it saves in one process
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of a synthetic log, such as `make demo` makes."""
    out = tmp_path_factory.mktemp("examples")
    assert run(["synth", "--out", str(out / "log"), "--users", "600", "--items", "60"]) == 0
    words = ["--input", f"{out}/log/*.parquet", "--schema", f"{out}/log/schema.yaml", "--out", str(out / "pack")]
    assert run(["prepare", *words]) == 0
    return out / "pack"


def example(name: str, *words: object, processes: int = 1) -> str:
    """Run an example as a user would; its output."""
    launcher = [*TORCHRUN, processes] if processes > 1 else ALONE
    argv = [sys.executable, *launcher, EXAMPLES / name, *words]
    result = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss_after"] for line in lines if line["kind"] == "valid"]


def test_an_example_of_a_model_trains(pack: Path, tmp_path: Path) -> None:
    assert "best loss" in example("own_model.py", pack, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_model.py", "own_loop.py"])
def test_examples_that_train_learn_the_same_on_two_processes(pack: Path, tmp_path: Path, name: str) -> None:
    for processes in (1, 2):
        assert "best loss" in example(name, pack, tmp_path / str(processes), processes=processes)
    alone, together = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert alone == pytest.approx(together, rel=1e-4)
    assert alone[-1] < alone[0]


def test_a_model_of_ones_own_is_found_again(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command line, under the name that the script's run records."""
    monkeypatch.chdir(EXAMPLES)
    words = ["--pack", pack, "--schedule.max_steps", 3, "--model.args.hidden", 8]
    train = ["train", *words, "--run_dir", tmp_path / "run", "--model.name", "own_model:TwoTowers"]
    assert run(list(map(str, train))) == 0
    assert f"next: gmeta evaluate --run_dir {tmp_path / 'run'} --trust_model true" in "".join(capfd.readouterr())
    evaluate = ["evaluate", "--run_dir", tmp_path / "run", "--trust_model", "true", "--resamples", 5]
    assert run(list(map(str, evaluate))) == 0
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_one_user_is_adapted_in_memory(pack: Path, tmp_path: Path) -> None:
    gmeta.train({"pack": str(pack), "run_dir": str(tmp_path / "run"), "schedule": {"max_steps": 5}})
    lines = example("adapt_one_user.py", tmp_path / "run").splitlines()
    scores = [[float(x) for x in re.findall(r"0\.\d+", line)] for line in lines]
    assert len(scores) == 5
    assert any(after != before for after, before in scores)


def test_a_model_of_ones_own_takes_few_lines() -> None:
    """Code lines: neither blank, nor comment, nor docstring."""
    tree = ast.parse((EXAMPLES / "own_model.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    assert len(ast.unparse(tree).replace("\n\n", "\n").strip().splitlines()) <= 25


@pytest.mark.parametrize("processes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_sharded_layers_learn_and_resume(processes: int) -> None:
    last = example("sharded.py", "IIG", processes=processes).splitlines()[-1]
    first, before, again = (float(x) for x in re.findall(r"\d\.\d+", last))
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
