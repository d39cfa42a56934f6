"""The run log: what is written, what resume cuts away, and what other ranks do (nothing)."""

import io
import json
import math
import os
import subprocess

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmeta.runs import log as log_module
from gmeta.runs.log import RunLog, _commit, read_metrics, write_environment

STEP = {"epoch": 0, "loss": 0.5, "tasks_per_s": 1200.0, "samples_per_s": 24000.0, "padding": 0.05}
SHARES = {"input_share": 0.1, "exchange_share": 0.2, "compute_share": 0.7}


def run(run_dir, steps, *, after=0, terminal=False, loss=0.5):
    """Log some steps; the console's text."""
    text = io.StringIO()
    log = RunLog(run_dir, 0, total_steps=9, console=Console(file=text, force_terminal=terminal, width=160))
    log.cut_back(after)
    log.say("a banner [not markup]")
    log.start()
    for step in steps:
        log.train({"step": step, **STEP, **SHARES, "loss": loss})
    log.valid({"step": steps[-1], "auc_before": 0.61, "auc_after": math.nan})
    log.close()
    log.close()
    return text.getvalue()


def scalars(run_dir, tag):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_files_and_console_hold_the_same(tmp_path):
    text = run(tmp_path, [1, 2])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [("train", 1), ("train", 2), ("valid", 2)]
    assert records[0] == {"kind": "train", "step": 1, **STEP, **SHARES}
    assert records[2]["auc_after"] is None
    assert scalars(tmp_path, "train/padding") == pytest.approx({1: 0.05, 2: 0.05})
    assert scalars(tmp_path, "valid/auc_before") == pytest.approx({2: 0.61})
    assert "a banner [not markup]" in text
    line = "step 1/9  loss 0.5000  1,200 tasks/s  24,000 samples/s  padding 5%  input 10%  exchange 20%  compute 70%"
    assert line in text
    assert "step 2/9" not in text  # plain lines come every ten seconds
    assert "step 2  valid  auc 0.6100 -> n/a" in text


def test_terminal_gets_a_progress_bar(tmp_path):
    text = run(tmp_path, [1, 2, 3], terminal=True)
    assert "3/9" in text
    assert "compute 70%" in text


def test_each_record_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path, 0)
    log.start()
    log.train({"step": 1, "loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st', "\x00\x00\x00"])
def test_resume_cuts_back_to_the_checkpoint(tmp_path, torn):
    run(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run(tmp_path, [3], after=2, loss=0.25)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert scalars(tmp_path, "train/loss") == {1: 0.5, 2: 0.5, 3: 0.25}


def test_a_run_without_checkpoint_starts_over(tmp_path):
    run(tmp_path, [1, 2])
    run(tmp_path, [1])
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"kind": "train"}', '{"step": 2}'])
def test_damage_before_the_last_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "train", "step": 1}}\n{line}\n{{"kind": "train", "step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*delete the line"):
        read_metrics(path)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("torn", [b"", b'{"kind"', b"\n\n"])
def test_only_the_end_of_a_long_log_is_read(tmp_path, monkeypatch, block, torn):
    """Damage long before the end is not looked at, and the lines that stay keep their bytes."""
    monkeypatch.setattr(log_module, "_BLOCK_BYTES", block)
    lines = [b"damage\n", *(b'{"kind": "train",  "step": %d}\n' % step for step in range(1, 40))]
    for step in (1, 17, 38, 39, 50):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"".join(lines) + torn)
        log_module._cut_back(path, step)
        assert path.read_bytes() == b"".join(lines[: min(step, 39) + 1])
    path.write_bytes(b"".join(lines[1:]) + torn)
    log_module._cut_back(path, 0)
    assert path.read_bytes() == b""
    path.write_bytes(b"".join(lines[:2]) + b"damage\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, the line at byte 37: .*delete the line"):
        log_module._cut_back(path, 1)


def test_other_ranks_write_nothing(tmp_path):
    text = io.StringIO()
    log = RunLog(tmp_path / "run", 1, console=Console(file=text))
    log.cut_back(3)
    log.say("banner")
    log.start()
    log.train({"step": 4, **STEP})
    log.valid({"step": 4, "auc_after": 0.5})
    log.say("text")
    log.close()
    assert not (tmp_path / "run").exists()
    assert text.getvalue() == ""


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_told_of_with_the_file(tmp_path, full):
    log = RunLog(tmp_path, 0)
    log.start()
    log.train({"step": 1, **STEP})
    writer = log if full == "metrics.jsonl" else log._board
    writer._file.flush()
    with open("/dev/full", "wb") as device:
        os.dup2(device.fileno(), writer._file.fileno())
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"cannot write {tmp_path}/{full}.*: No space left on device; free space"):
            log.train({"step": 2, **STEP})
    log.close()


def test_closing_before_start_is_fine(tmp_path):
    RunLog(tmp_path, 0).close()
    assert not list(tmp_path.iterdir())


def test_environment_describes_the_machine(tmp_path):
    write_environment(tmp_path / "environment.json", ranks=2)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["cpus"] >= 1
    assert environment["memory_bytes"] > 0


def test_commit_is_that_of_the_repository_that_tracks_the_source(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert _commit(package) is None
    git("init")
    assert _commit(package) is None  # inside a repository that does not track it, as in a virtual environment
    git("add", ".")
    git("commit", "-m", "x")
    assert len(_commit(package)) == 40
    (package / "__init__.py").write_text("changed")
    assert _commit(package).endswith("+changes")
