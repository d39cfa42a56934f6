"""Which lines of gmeta the tests run, in all their processes, as a share of those that can run: `make coverage`.

Ranks that the tests keep alive in pools (tests/dist/harness.py) are killed at the end and leave no record, nor do those
that a test kills: lines that only they run count as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT, Record, add_json, parse, publish, table

SETTINGS = """
[run]
source_pkgs = gmeta
parallel = true
patch = subprocess
data_file = {folder}/data
disable_warnings = no-data-collected, module-not-measured, module-not-imported, couldnt-parse
"""
TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", "600")


def measure(folder: Path, tests: list[str]) -> tuple[dict[str, Any], int]:
    """Run the tests, and return coverage.py's report and pytest's exit code."""
    settings = folder / "coveragerc"
    settings.write_text(SETTINGS.format(folder=folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def coverage(command: str, *words: str) -> int:
        argv = [sys.executable, "-m", "coverage", command, f"--rcfile={settings}", *words]
        return subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode

    code = coverage("run", *TESTS, *tests)
    if coverage("combine", "--quiet") or coverage("json", "--quiet", "-o", str(folder / "report.json")):
        raise SystemExit(f"the tests ended with {code} and left no coverage that could be read")
    return json.loads((folder / "report.json").read_text()), code


def by_room(files: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return room -> (lines that ran, lines that can run), "all" last. A file at the root of the package is a room."""
    found = defaultdict[str, list[int]](lambda: [0, 0])
    for path, file in sorted(files.items()):
        summary = file["summary"]
        for room in (Path(path).parts[1].removesuffix(".py"), "all"):
            found[room][0] += summary["covered_lines"]
            found[room][1] += summary["num_statements"]
    return {room: (ran, lines) for room, (ran, lines) in found.items() if lines and room != "all"} | {
        "all": (found["all"][0], found["all"][1])
    }


def show(report: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Publish the report's lines by room."""
    rooms = by_room(report["files"])
    records = []
    for room, (ran, lines) in rooms.items():
        records.append(Record(room, "lines", "coverage", ran / lines, "1"))
        records.append(Record(room, "lines", "not_run", lines - ran, "1"))
    rows = [(room, f"{lines:,}", f"{lines - ran:,}", f"{ran / lines:.1%}") for room, (ran, lines) in rooms.items()]
    body = table(("room", "lines that can run", "not run", "coverage"), rows)
    config = {"command": f"coverage run {' '.join(TESTS)}", "coverage": report["meta"]["version"]}
    publish("coverage", body, records, config, arguments)


def main() -> int:
    """Run all tests but the slow ones, or those that are named, and publish what they cover.

    Result files are written only where all tests were run, and passed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="print the table; writes no result files")
    parser.add_argument("tests", nargs="*", help="tests instead of all")
    add_json(parser)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        report, code = measure(Path(folder), args.tests)
    args.quick |= bool(args.tests or code)
    show(report, args)
    return code


if __name__ == "__main__":
    sys.exit(main())
