"""A laboratory run from end to end: a slow worker and a killed one, audited, and compared with an undisturbed run."""

from __future__ import annotations

import json

import pytest

from gmeta.elastic.scenario import Deterministic, Kill, Scenario
from gmeta.lab.folder import read_lines
from gmeta.lab.run import run_lab, summary

pytestmark = pytest.mark.faults


@pytest.mark.slow
def test_a_slow_worker_and_a_killed_one(tmp_path):
    scenario = Scenario(
        workers=2,
        steps=36,
        tasks_per_batch=16,
        slot_s=0.004,
        checkpoint_steps=6,
        events=(Deterministic(0, 3.0), Kill("rank 1", at_step=20)),
    )
    out = tmp_path / "lab"
    result = run_lab(scenario, "nd", out, compare=True, max_restarts=0)
    assert (result.lost, result.repeated, result.problems) == (0, 0, [])
    assert result.expected == 36 * 16
    assert result.restarts == 1
    assert result.repeated_steps > 0
    assert result.actions["ADJUST_BATCH"] >= 1
    slots = [r["slots"] for r in read_lines(out / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert slots[-1][0] < slots[-1][1]
    assert result.difference is not None
    assert result.difference["weights"] < 1e-12
    assert [line["what"] for line in read_lines(out / "faults.jsonl")] == ["kill rank 1"]
    assert json.loads((out / "result.json").read_text())["lost"] == 0
    assert "kill rank 1" in (out / "report.html").read_text()
    assert "0 lost, 0 repeated" in summary(result)
