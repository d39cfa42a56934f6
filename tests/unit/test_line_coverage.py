"""The coverage benchmark adds lines up by room, and keeps no numbers of tests that failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package
import line_coverage


def report(**files: tuple[int, int]) -> dict[str, Any]:
    """What coverage.py says of files: (lines that ran, lines that can run)."""
    return {
        "meta": {"version": "7"},
        "files": {
            f"gmeta/{name.replace('__', '/')}.py": {"summary": {"covered_lines": ran, "num_statements": lines}}
            for name, (ran, lines) in files.items()
        },
    }


def test_lines_are_added_up_by_room() -> None:
    found = line_coverage.by_room(report(cli=(4, 5), data__pack=(6, 8), data__loader=(1, 2), empty__a=(0, 0))["files"])
    assert found == {"cli": (4, 5), "data": (7, 10), "all": (11, 15)}
    assert list(found)[-1] == "all"


@pytest.mark.parametrize(("words", "code", "kept"), [([], 0, True), ([], 1, False), (["tests/unit"], 0, False)])
def test_only_whole_runs_that_passed_are_kept(
    words: list[str], code: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["line_coverage.py", *words])
    monkeypatch.setattr(line_coverage, "measure", lambda folder, tests: (report(cli=(4, 5)), code))
    monkeypatch.setitem(line_coverage.publish.__globals__, "RESULTS", tmp_path / "results")  # of its `common`
    assert line_coverage.main() == code
    assert (tmp_path / "results").exists() == kept
    for file in tmp_path.glob("results/*.md"):
        assert "| cli  | 5                  | 1       | 80.0%    |" in file.read_text()
