"""The folder of a laboratory run: what lies where, and the scenario as it is run.

scenario.yaml  config.yaml  pack/  run/ (as of `gmeta train`)  workers/rank-N.jsonl
coordinator.{db,jsonl,log,token}  clock  faults.jsonl  result.json  report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from gmeta.core.files import write_text
from gmeta.elastic.scenario import EVENT_KINDS, Scenario, parse_scenario

_NAMES = {kind: name for name, kind in EVENT_KINDS.items()}


@dataclass(frozen=True)
class LabFolder:
    """The folder of one run."""

    path: Path

    @property
    def pack(self) -> Path:
        """Return the path of the task pack."""
        return self.path / "pack"

    @property
    def run_dir(self) -> Path:
        """Return the trainer's run directory."""
        return self.path / "run"

    @property
    def trace(self) -> Path:
        """Return the file of what the coordinator was told and what it decided."""
        return self.path / "coordinator.jsonl"

    @property
    def faults(self) -> Path:
        """Return the file that says what was done to the processes, and when."""
        return self.path / "faults.jsonl"

    def worker(self, rank: int) -> Path:
        """Return the file that says what the emulated device of a rank did."""
        return self.path / "workers" / f"rank-{rank}.jsonl"

    def scenario(self) -> Scenario:
        """Return the scenario of the run."""
        file = self.path / "scenario.yaml"
        return parse_scenario(file.read_text(encoding="utf-8"), str(file))

    def write_scenario(self, scenario: Scenario) -> None:
        """Write the scenario down, as it is run."""
        write_text(self.path / "scenario.yaml", yaml.safe_dump(_plain(scenario), sort_keys=False))

    def start_clock(self, at: float) -> float:
        """Return the Unix time at which the run began: `at`, unless somebody has said so before."""
        try:
            with (self.path / "clock").open("x") as file:
                file.write(f"{at!r}\n")
            return at
        except FileExistsError:
            return self.clock() or at

    def clock(self) -> float | None:
        """Return the Unix time at which the first step began; None before."""
        file = self.path / "clock"
        text = file.read_text() if file.exists() else ""
        return float(text) if text.endswith("\n") else None

    def elapsed_s(self) -> float | None:
        """Return the seconds since the first step began; None before."""
        started = self.clock()
        return None if started is None else time.time() - started


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, without a last line that was torn by a kill; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _plain(value: Any) -> Any:
    """Return a scenario as YAML holds it."""
    if is_dataclass(value):
        shown = {f.name: getattr(value, f.name) for f in fields(value) if not f.name.startswith("_")}
        kind = {"kind": _NAMES[type(value)]} if type(value) in _NAMES else {}
        return kind | {key: _plain(item) for key, item in shown.items() if item is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
