"""`gmeta benchmark antm2c`: run the cells that are asked for, and tell what all that are kept measure."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gmeta.benchmark.cells import Cell, CellFolder
from gmeta.benchmark.leaderboards import boards_of
from gmeta.benchmark.packs import apart, make_pack, scene_rows
from gmeta.benchmark.page import write_page
from gmeta.benchmark.scored import is_new_scene
from gmeta.benchmark.tracks import Tracks
from gmeta.config.benchmark import BenchmarkConfig
from gmeta.core.files import make_folder, only_writer, read_mapping, write_text
from gmeta.data.antm2c.read import part_files
from gmeta.data.image_vectors import image_dim

_SYNTHETIC = "synthetic, AntM2C schema"


def benchmark(config: BenchmarkConfig) -> int:
    """Run `gmeta benchmark`; writes results.json, results.md and report.html at the end, also where a cell fails.

    Raises:
        ValueError: files, encoder or images cannot be used, another run holds the folder, or a cell fails.
    """
    _check(config)
    out = make_folder("out", config.out)
    # a stop from outside ends the command that runs too
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with only_writer(out / "benchmark.lock", "benchmark"):
            _run(config, CellFolder(out))
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(*_: object) -> None:
    print("gmeta benchmark: stopped; the same command goes on with the cell that was being run", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def _run(config: BenchmarkConfig, folder: CellFolder) -> None:
    _bind(config, folder.out)
    tracks = Tracks(config, apart(scene_rows, Path(config.root)))
    cells = list(tracks.cells())
    asked = [cell for cell in cells if cell.name.startswith(config.cells)]
    if not asked:
        raise ValueError(f"cells is {config.cells!r}, and no cell begins so: they are {', '.join(_kinds(cells))}")
    try:
        for place, cell in enumerate(asked):
            if folder.kept(cell) is not None:
                continue
            print(f"{place + 1} of {len(asked)}: {cell.name} …", file=sys.stderr, flush=True)
            _require_begun(folder, cell, cells)
            make_pack(folder, config, cell.pack, _known(tracks, cell.pack))
            spent = folder.run(cell)
            print(f"  {spent['cpu_s']:.0f} CPU s, {spent['peak_mb']:.0f} MB", file=sys.stderr, flush=True)
    except ValueError:
        tell(config, folder, cells)
        raise
    tell(config, folder, cells)


def _check(config: BenchmarkConfig) -> None:
    """Raise ValueError for an encoder or images that are not there."""
    if not Path(config.encoder).is_dir():
        raise ValueError(f"encoder is {config.encoder}, which is no folder: name one with a text encoder in it")
    if config.images is not None:
        image_dim(Path(config.images))


def _bind(config: BenchmarkConfig, out: Path) -> None:
    """Write what the packs and cells of a folder are of. ValueError where they are of something else."""
    parts = {str(path.resolve()): path.stat().st_size for path in part_files(Path(config.root))}
    images = None if config.images is None else str(Path(config.images).resolve())
    asked = {"parts": parts, "images": images, "quick": config.quick}
    file = out / "benchmark.json"
    found = read_mapping(file, "name another folder") if file.exists() else asked
    if found != asked:
        told = [
            f"{key}: {found.get(key)} before, {value} now" for key, value in asked.items() if found.get(key) != value
        ]
        raise ValueError(f"out is {out}, which is of something else ({'; '.join(told)}): name another folder")
    write_text(file, json.dumps(asked, indent=1) + "\n")


def tell(config: BenchmarkConfig, folder: CellFolder, cells: Sequence[Cell]) -> None:
    """Measure what is kept, and write results.json, results.md and report.html."""
    kept = {cell: found for cell in cells if (found := folder.kept(cell)) is not None}
    summary = Path(config.root) / "summary.json"
    clone = json.loads(summary.read_text()) if summary.exists() else {}
    label = _SYNTHETIC if clone.get("label") == _SYNTHETIC else f"files in {config.root}"
    boards = boards_of(folder, kept, clone.get("reference", {}), config.resamples)
    missing = [cell.name for cell in cells if cell not in kept]
    # a scene whose rows are all clicked, or none, has no AUC
    records = [record for board in boards for record in board.records if math.isfinite(record["value"])]
    facts = {"label": label, "cells": len(kept), "missing": missing, "settings": clone.get("settings", {})}
    write_text(folder.out / "results.json", json.dumps({**facts, "records": records}, indent=1) + "\n")
    text = "\n\n".join([f"# AntM2C: {label}", *_missing(missing), *(board.markdown() for board in boards)])
    write_text(folder.out / "results.md", text + "\n")
    write_page(folder.out / "report.html", label, boards, missing)
    print(text)
    print(f"\nwrote {folder.out / 'results.json'}, results.md and report.html")


def _missing(names: Sequence[str]) -> Iterable[str]:
    if names:
        yield f"{len(names)} cells are not there yet; the same command goes on."


def _kinds(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.track for cell in cells))


def _known(tracks: Tracks, pack: str) -> tuple[int, ...]:
    """Return the numbers of rows that test tasks of a pack with a new scene know."""
    return (0, *tracks.rows_of(int(pack.partition("_")[2]))) if is_new_scene(pack) else ()


def _require_begun(folder: CellFolder, cell: Cell, cells: Sequence[Cell]) -> None:
    """Raise ValueError where the cell that another goes on from has not been run."""
    needed = [one for one in cells if one.name == cell.begins]
    if needed and folder.kept(needed[0]) is None:
        raise ValueError(f"{cell.name} goes on from {cell.begins}, which has not been run: run it first (--cells)")
