"""A cell: one training and its predictions, run by the commands a user would run, and kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmeta.core.files import write_text

_KEPT = "cell.json"
_TOLD = 15
"""Lines of a command's output that its failure tells."""


@dataclass(frozen=True)
class Cell:
    """One variant of a track, trained with one seed."""

    track: str
    variant: str
    seed: int
    pack: str  # its name
    words: tuple[str, ...]  # of `gmeta train`
    begins: str = ""  # name of the cell whose bundle it goes on from
    valid: bool = True  # whether valid rows are scored too, which say each scene's base rate

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return "-".join([self.track, *self.variant.replace(",", "").split(), str(self.seed)])


@dataclass(frozen=True)
class Spent:
    """What a command took."""

    cpu_s: float
    peak_mb: float  # of its largest process


class CellFolder:
    """The folder of a benchmark: packs, and one folder a cell."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.logs = out / "logs"

    def pack(self, name: str) -> Path:
        """Return where a pack is."""
        return self.out / "packs" / name

    def run_dir(self, cell: str) -> Path:
        """Return the run directory of a cell."""
        return self.out / "cells" / cell / "run"

    def predictions(self, cell: str, split: str) -> Path:
        """Return the predictions of a cell."""
        return self.out / "cells" / cell / split / "predictions.parquet"

    def kept(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a cell took; None where it has not been run, or now asks for something else."""
        file = self.out / "cells" / cell.name / _KEPT
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        same = found["asked"] == json.loads(json.dumps(asdict(cell)))
        return found if same and found.get("began") == self._asked(cell.begins) else None

    def _asked(self, name: str) -> Any:
        """Return what a cell asked for that another goes on from; None where there is none."""
        file = self.out / "cells" / name / _KEPT
        return json.loads(file.read_text())["asked"] if name and file.exists() else None

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train a cell, score test rows, and keep what it took. ValueError where a command fails."""
        place, run = self.out / "cells" / cell.name, self.run_dir(cell.name)
        shutil.rmtree(place, ignore_errors=True)
        words: list[object] = ["--pack", self.pack(cell.pack), "--run_dir", run, "--seed", cell.seed, *cell.words]
        if cell.begins:
            words += ["--warm_start", self.bundle(cell.begins)]
        spent = self.gmeta(cell.name, "train", *words)
        for split in ("valid", "test") if cell.valid else ("test",):
            told: list[object] = ["--run_dir", run, "--split", split, "--out", place / split, "--resamples", 1]
            self.gmeta(cell.name, "evaluate", *told, "--baselines", "false")
        found = {"asked": asdict(cell), "began": self._asked(cell.begins), **asdict(spent)}
        write_text(place / _KEPT, json.dumps(found, indent=1) + "\n")
        return found

    def bundle(self, cell: str) -> Path:
        """Return the bundle of a cell's best checkpoint; it is made where it is not there, and goes with the cell."""
        path = self.out / "cells" / cell / "bundle"
        if not path.exists():
            self.gmeta(cell, "bundle", "--run_dir", self.run_dir(cell), "--out", path)
        return path

    def gmeta(self, log: str, *words: object) -> Spent:
        """Run a command of gmeta in a process of its own; its output goes to a file. ValueError where it fails."""
        self.logs.mkdir(parents=True, exist_ok=True)
        file = self.logs / f"{log}.log"
        with file.open("a") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "gmeta", *map(str, words)], stdout=out, stderr=subprocess.STDOUT
            )
            try:
                _, status, used = os.wait4(child.pid, 0)
            except BaseException:
                child.kill()
                child.wait()
                raise
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            last = "\n".join(file.read_text(errors="replace").splitlines()[-_TOLD:])
            raise ValueError(f"gmeta {words[0]} of {log} failed with {child.returncode}; {file} ends:\n{last}")
        return Spent(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
