"""The launcher of an elastic group: coordinators that stall, and what it says of a run that leads nowhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from packs import make_pack

from gmeta.config.train import ElasticConfig, TrainConfig
from gmeta.parallel.launch import EXIT_STOPPED
from gmeta.training import supervise as module
from gmeta.training.supervise import start_coordinator, supervise

pytestmark = pytest.mark.faults


def stalling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `python` a program that says nothing and goes on for ever; return the file with its process id."""
    pid = tmp_path / "pid"
    program = tmp_path / "stalls"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    return pid


def gone(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_coordinator_that_does_not_listen_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, log = stalling(tmp_path, monkeypatch), tmp_path / "coordinator.log"
    with pytest.raises(ValueError, match=rf"did not listen within 1 s; its log is {log}"):
        start_coordinator(["coordinate"], 0, log, timeout_s=1)
    assert gone(pid)


def test_a_run_that_ends_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, closing, begun = stalling(tmp_path, monkeypatch), threading.Event(), time.monotonic()
    threading.Timer(0.5, closing.set).start()
    with pytest.raises(ValueError, match="did not listen"):
        start_coordinator(["coordinate"], 0, tmp_path / "coordinator.log", closing=closing)
    assert time.monotonic() - begun < 30
    assert gone(pid)


@dataclass
class Launches:
    """In place of `launch`: returns codes one by one, and notes what it was asked for."""

    codes: list[int]
    asked_for: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, nproc: int, argv: list[str], **options: Any) -> int:
        self.asked_for.append({"argv": argv, **options})
        return self.codes.pop(0)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    pack = make_pack(tmp_path / "pack", train=4, valid=0, test=0)
    elastic = ElasticConfig(enabled=True, url="http://127.0.0.1:9", max_restarts=1)
    return TrainConfig(pack=str(pack), run_dir=str(tmp_path / "run"), elastic=elastic)


def test_a_restart_is_announced_only_where_there_is_one(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches([128 + signal.SIGKILL] * 2)
    monkeypatch.setattr(module, "launch", launches)
    assert supervise(config, 2, ["train"]) == 128 + signal.SIGKILL
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "the group is started again",
        "1 restarts without a new checkpoint",
    ]
    assert all(call["advice"] == "" for call in launches.asked_for), "the launcher knows not whether it goes on"
    assert "giving up. Once the cause is mended, the same command goes on from the last checkpoint" in said[1]


def test_a_coordinator_of_the_config_is_the_only_one(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches([EXIT_STOPPED])
    monkeypatch.setattr(module, "launch", launches)
    assert supervise(config, 2, ["train"]) == EXIT_STOPPED
    assert launches.asked_for[0]["argv"] == ["train"]
    assert launches.asked_for[0]["coordinator"] is None
