"""`gmeta benchmark antm2c` end to end on a small clone: a cell, the rest after a stop, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fails, gmeta
from encoders import WHY, tiny

pytest.importorskip("transformers", reason=WHY)
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]
CELLS = (
    *("scenarios-dnn-0", "scenarios-adapted", "new_users-adapted", "towers-upper-layers-by-lora"),
    *("new_scene_0-dlrm", "new_scene_0-adapted", "new_scene_0-dlrm-fine-tuned-100"),
)


def test_cells_are_run_once_and_all_that_are_kept_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gmeta("synth", "--kind", "antm2c", "--rows", 20_000, "--out", tmp_path / "log")
    encoder = tiny(tmp_path / "encoder", "bert")
    out = tmp_path / "out"
    words = ["benchmark", "antm2c", "--root", tmp_path / "log", "--out", out, "--encoder", encoder, "--layers", 2]
    words += ["--quick", "true", "--resamples", 20]
    fails([*words, "--cells", "new_scene_0-dlrm-fine-tuned-100"], capsys, "goes on from new_scene_0-dlrm-0")
    gmeta(*words, "--cells", "scenarios-dlrm")
    kept = out / "cells" / "scenarios-dlrm-0" / "cell.json"
    before = kept.stat().st_mtime_ns
    for cells in CELLS:
        gmeta(*words, "--cells", cells)
    assert kept.stat().st_mtime_ns == before
    found = json.loads((out / "results.json").read_text())
    assert found["label"] == "synthetic, AntM2C schema"
    assert not any(name.startswith(CELLS) for name in found["missing"])
    assert "inputs-ids-0" in found["missing"]
    values = {(r["case"], r["variant"], r["metric"]): r["value"] for r in found["records"]}
    for variant in ("dnn", "dlrm", "adapted", "reference, posterior"):
        assert 0.3 < values["scenarios", variant, "auc_macro"] < 0.95
    assert 0.3 < values["leave-one-out/0/100", "adapted", "auc"] < 0.9
    assert ("leave-one-out/all/100", "adapted - dlrm fine-tuned", "auc_macro") in values
    assert abs(values["scenarios", "dlrm", "calibration_corrected"] - 1) < 0.2
    page = (out / "report.html").read_text()
    for words_ in (
        "Scenarios",
        "New items",
        "Trained towers",
        "New users",
        "A new scene",
        "synthetic, AntM2C schema",
        "<svg",
    ):
        assert words_ in page
