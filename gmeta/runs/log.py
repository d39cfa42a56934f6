"""The log that a run writes while it trains: metrics.jsonl, TensorBoard and the console; and environment.json.

Rank 0 writes; on the other ranks every call does nothing, so that the training loop need not ask.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gmeta.core.files import write_text
from gmeta.core.numbers import shown

METRICS_FILE = "metrics.jsonl"
_PLAIN_LINE_EVERY_S = 10.0
_BLOCK_BYTES = 1 << 20
_PACKAGES = ("gmeta", "torch", "numpy", "duckdb", "pyarrow", "safetensors", "jsonargparse")


class RunLog:
    """Writes a run's records. `start` opens the files, `close` closes them; on ranks other than 0 nothing happens."""

    def __init__(
        self, run_dir: Path | str, rank: int, *, total_steps: int | None = None, console: Console | None = None
    ) -> None:
        self._active = rank == 0
        self._run_dir = Path(run_dir)
        self._console = console or Console(stderr=True)
        self._total = total_steps
        self._step = 0
        self._file: TextIO | None = None
        self._board: _Board | None = None
        self._progress: Progress | None = None
        self._last_line_s = -math.inf

    def cut_back(self, step: int) -> None:
        """Continue after `step`: later records are of work that was not saved, and will be done and logged again."""
        self._step = step

    def start(self) -> None:
        """Open the files, and drop what they hold after the step to continue from (0: everything)."""
        if not self._active:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / METRICS_FILE
        with _naming(path):
            _cut_back(path, self._step)
            self._file = path.open("a", encoding="utf-8")
        self._board = _Board(self._run_dir / "tensorboard", purge_step=self._step + 1)
        if self._console.is_terminal:
            self._progress = _progress_bar(self._console)
            self._progress.add_task("", total=self._total, completed=self._step, text="")
            self._progress.start()

    def train(self, record: dict[str, Any]) -> None:
        """Log one training step: `step`, and the numbers that docs/training.md lists."""
        record = self._write("train", record)
        if not self._active:
            return
        step = record["step"]
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, text=_describe_step(record))
        elif time.monotonic() - self._last_line_s >= _PLAIN_LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self.say(f"step {step}{f'/{self._total}' if self._total else ''}  {_describe_step(record)}")

    def valid(self, record: dict[str, Any]) -> None:
        """Log one validation: `step`, and `<metric>_before` and `<metric>_after`."""
        record = self._write("valid", record)
        self.say(f"step {record['step']}  valid  {_describe_metrics(record)}")

    def _write(self, kind: str, record: dict[str, Any]) -> dict[str, Any]:
        """Append the record to the files; what is not finite becomes null, for JSON has no word for it."""
        record = {"kind": kind, **{key: _finite(value) for key, value in record.items()}}
        if self._active:
            assert self._file is not None, "start() comes first"
            assert self._board is not None
            with _naming(self._run_dir / METRICS_FILE):
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
                self._file.flush()
            self._board.scalars(record)
        return record

    def say(self, text: str) -> None:
        """Print a line on the console, above the progress bar."""
        if self._active:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the progress bar and close the files, if they were opened. Further calls do nothing."""
        self._active = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._file is not None and self._board is not None:
            with suppress(OSError):  # each record was flushed, and told of where the disk refused it
                self._file.close()
            self._board.close()
            self._file = None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, in order, none without a file; a last line torn by a kill is left out.

    Raises:
        ValueError: another line is not a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and line.strip():  # else the write was cut short
                records.append(_record(line, f"{path}, line {number}"))
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON record ({error}); delete the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
        raise ValueError(f"{where}: a record needs 'kind' and a whole 'step'; delete the line")
    return record


def _cut_back(path: Path, step: int) -> None:
    """Cut off the records after `step`, and a line torn by a kill. Steps ascend, so that only the end is read.

    Raises ValueError where a line there is no record.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        keep = file.seek(0, os.SEEK_END)
        for start, line in _lines_from_the_end(file):
            whole = line.endswith(b"\n") and line.strip()
            if whole and _record(line, f"{path}, the line at byte {start}")["step"] <= step:
                break
            keep = start
        file.truncate(keep)
        os.fsync(file.fileno())


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their offsets, the last one first; they are read block by block."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start:
        begin = max(0, start - _BLOCK_BYTES)
        file.seek(begin)
        first, *lines = (file.read(start - begin) + tail).splitlines(keepends=True)
        at = begin + len(first) + sum(map(len, lines))
        for line in reversed(lines):
            at -= len(line)
            yield at, line
        start, tail = begin, first
    if tail:
        yield 0, tail


def write_environment(path: Path | str, **facts: Any) -> None:
    """Write environment.json: versions, hardware, platform, commit, and `facts` of the caller (ranks, backend)."""
    text = json.dumps({**describe_environment(), **facts}, indent=2)
    write_text(Path(path), text + "\n")


def describe_environment() -> dict[str, Any]:
    """Return versions, hardware, platform, and the commit of gmeta's source (null for an installed wheel)."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(device) for device in devices],
        "cuda": torch.version.cuda if devices else None,
        "commit": _commit(Path(__file__).parent),
        "command": sys.argv,
    }


class _Board:
    """Writes events for TensorBoard, whose readers forget earlier ones from `purge_step` on.

    torch's writer has a thread, in which a full disk is a traceback that names no file.
    """

    def __init__(self, directory: Path, *, purge_step: int) -> None:
        with warnings.catch_warnings():
            # TensorBoard's own imports use deprecated names, which a user of gmeta cannot change.
            warnings.simplefilter("ignore", DeprecationWarning)
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # late: the import takes a second
            from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        # the files of a directory are read in the order of their names
        self._path = directory / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        with _naming(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(step=purge_step, file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, record: dict[str, Any]) -> None:
        """Write all numbers of a record as one event, in a fifth of the time of `SummaryWriter.add_scalar` for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        names = [key for key, value in record.items() if key != "step" and isinstance(value, int | float)]
        values = [Summary.Value(tag=f"{record['kind']}/{name}", simple_value=record[name]) for name in names]
        self._write(step=record["step"], summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        with _naming(self._path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise ValueError with the file and the cure, where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; free space there, then continue from the last checkpoint "
            "with --resume true"
        ) from error


def _progress_bar(console: Console) -> Progress:
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, refresh_per_second=4)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_step(record: dict[str, Any]) -> str:
    """Say in one line loss, speed, padding, and where the time went."""
    parts = []
    for key, form in (
        ("loss", "loss {}"),
        ("tasks_per_s", "{:,.0f} tasks/s"),
        ("samples_per_s", "{:,.0f} samples/s"),
        ("padding", "padding {:.0%}"),
        ("input_share", "input {:.0%}"),
        ("exchange_share", "exchange {:.0%}"),
        ("compute_share", "compute {:.0%}"),
    ):
        if record.get(key) is not None:
            parts.append(form.format(shown(record[key]) if key == "loss" else record[key]))
    return "  ".join(parts)


def _describe_metrics(record: dict[str, Any]) -> str:
    """Show each metric before -> after adaptation; one number where they are the same, or nothing adapts."""
    parts = []
    for key in record:
        if key.endswith("_after"):
            name = key.removesuffix("_after")
            values = [record[key] for key in (f"{name}_before", f"{name}_after") if key in record]
            both = [shown(v) if isinstance(v, float) else "n/a" for v in values]
            parts.append(f"{name} {' -> '.join(dict.fromkeys(both))}")
    return "  ".join(parts)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the marketing name of the CPU, where the platform tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit(source: Path) -> str | None:
    """Return the commit of the checkout that tracks `source`, with "+changes" when it has any; None if none does."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (
            FileNotFoundError,
            subprocess.TimeoutExpired,
        ):  # without git, or on a file system that hangs, the run still counts
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed copy may lie inside some other repository, which does not track it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--", ".") else commit
