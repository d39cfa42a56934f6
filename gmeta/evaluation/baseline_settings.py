"""baselines.json: the settings of baselines that were tuned on the valid tasks of a pack.

    {"format": 1, "tasks": checksum of the pack's tasks, "rows": {split: checksum of its rows},
     "plain_run": id of the run that was fine-tuned, or null,
     "factor-analysis": {"num_factors", …}, "plain-finetuned": {"steps", …}, "values": {name: {"metric", "value"}}}

A baseline that was not tuned is not there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmeta.config.evaluation import FactorConfig, FinetuneConfig
from gmeta.config.parse import parse_mapping
from gmeta.core.errors import nearest
from gmeta.core.files import read_mapping, write_text
from gmeta.data.pack import TaskPack
from gmeta.runs.directory import read_rows_checksums, read_run_id, read_tasks_checksum, rows_difference

FORMAT_VERSION = 1
FACTORS, FINETUNED = "factor-analysis", "plain-finetuned"
_CURE = "tune again, with `gmeta tune --baselines true`"
_KEYS = ("format", "tasks", "rows", "plain_run", FACTORS, FINETUNED, "values")


@dataclass(frozen=True)
class BaselineSettings:
    """Settings of baselines; None where one was not tuned."""

    factors: FactorConfig | None = None
    finetuned: FinetuneConfig | None = None


def write_baseline_settings(
    path: Path, settings: BaselineSettings, *, pack: TaskPack, plain_run: str | None, values: dict[str, Any]
) -> None:
    """Write baselines.json; `pack` is what they were tuned on, `plain_run` the id of a run."""
    found: dict[str, Any] = {"format": FORMAT_VERSION, "tasks": pack.tasks_checksum(), "rows": pack.rows_checksums()}
    found["plain_run"] = plain_run
    if settings.factors is not None:
        found[FACTORS] = asdict(settings.factors)
    if settings.finetuned is not None:
        found[FINETUNED] = asdict(settings.finetuned)
    write_text(path, json.dumps({**found, "values": values}, indent=1) + "\n")


def read_baseline_settings(path: Path, run_dir: Path, plain_run: str | None) -> BaselineSettings:
    """Return the settings for an evaluation of `run_dir`, beside `plain_run`.

    Raises ValueError where the file is not what gmeta writes, or was tuned on other tasks or rows, or for another plain
    run. What an earlier release did not record is not compared.
    """
    found = read_mapping(path, _CURE)
    for key in found:
        if key not in _KEYS:
            raise ValueError(f"{path} has an unknown key {key!r}, {nearest(str(key), _KEYS)}")
    if found.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {found.get('format')!r}; this gmeta reads {FORMAT_VERSION}: {_CURE}")
    tasks = read_tasks_checksum(run_dir)
    if tasks is not None and found.get("tasks") != tasks:
        raise ValueError(f"{path} was tuned on other tasks than run {run_dir} was trained on: {_CURE} on its pack")
    rows = found.get("rows")
    if rows is not None and not isinstance(rows, dict):
        raise ValueError(f"{path}: rows is {rows!r}, and holds no checksums: {_CURE}")
    if lines := rows_difference(read_rows_checksums(run_dir), rows):
        raise ValueError(
            f"{path} was tuned on another pack than run {run_dir} was trained on: {lines[0]}: {_CURE} on its pack"
        )
    factors = finetuned = None
    if FACTORS in found:
        factors = parse_mapping(FactorConfig, _section(found, FACTORS, path), f"{path}, {FACTORS}")
    if FINETUNED in found and plain_run is not None:
        if found.get("plain_run") != read_run_id(Path(plain_run)):
            raise ValueError(
                f"{path} was tuned for run {found.get('plain_run')}, and plain_run {plain_run} is another: {_CURE} "
                f"and --plain_run {plain_run}"
            )
        finetuned = parse_mapping(FinetuneConfig, _section(found, FINETUNED, path), f"{path}, {FINETUNED}")
    return BaselineSettings(factors, finetuned)


def _section(found: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = found[name]
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {name} is {section!r}, and holds no settings: {_CURE}")
    return section
