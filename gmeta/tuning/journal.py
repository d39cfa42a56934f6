"""The journal of a tuning: what it was asked, and one JSON line for each trial that finished a rung.

    {"kind": "asked", "format": 1, "pack": …, "space": …, "trials": …, "seeds": …, "train": {dotted key: value}}
    {"kind": "begun", "trial": 3, "rung": 0, "seed": 1, "step": 12}
    {"kind": "done", "trial": 3, "rung": 0, "values": [0.43, 0.44], "steps": 24, "seconds": 8.1, "failed": null}

The last line may be torn by a kill; it is cut off. `begun` lines find a trial that ends the process each time.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"
FORMAT_VERSION = 1
_MAX_BEGINNINGS = 3
"""Beginnings of one training at one step, none of which came to an end or a checkpoint, after which it counts as
failed."""


@dataclass(frozen=True)
class Done:
    """A trial that finished a rung, with the best validation of each seed's run so far; or failed in it."""

    trial: int
    rung: int
    values: list[float]  # one a seed; fewer where it failed
    steps: int  # that each run has made
    seconds: float  # of training in this rung, over all seeds
    failed: str | None = None


class TrialJournal:
    """The lines of a journal file; rank 0 appends, every rank reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[tuple[int, int], Done] = {}  # by trial and rung
        self._begun: Counter[tuple[int, int, int, int]] = Counter()
        self.asked: dict[str, Any] | None = None
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is not what gmeta writes ({error}): delete the line") from None

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.pop("kind")
        if kind == "asked":
            self.asked = record
        elif kind == "begun":
            self._begun[record["trial"], record["rung"], record["seed"], record["step"]] += 1
        else:
            done = Done(**record)
            self.done[done.trial, done.rung] = done

    def append(self, kind: str, record: dict[str, Any] | Done) -> None:
        """Write a line to the disk. Raises ValueError with the file where it refuses."""
        values = asdict(record) if isinstance(record, Done) else record
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"cannot write {self._path}: {error.strerror or error}; free space there and run the command again"
            ) from error

    def gave_up(self, trial: int, rung: int, seed: int, step: int) -> bool:
        """Say whether earlier starts of the command ended too often in this training, at this step."""
        return self._begun[trial, rung, seed, step] >= _MAX_BEGINNINGS

    @property
    def seconds(self) -> float:
        """Return the seconds of training that the journal counts."""
        return sum(done.seconds for done in self.done.values())


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that end, none without a file."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    return lines


def cut_torn_line(path: Path) -> None:
    """Cut off the last line where a kill tore it, so that the next one does not join it."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def require_same_question(asked: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise ValueError with what differs, unless a journal's tuning is the one that is wanted now."""
    if asked.get("format", 0) > FORMAT_VERSION:
        raise ValueError(f"{folder} was written by a newer gmeta (format {asked['format']}): upgrade gmeta")
    for key in wanted.keys() - {"space", "train"}:
        if asked.get(key) != wanted[key]:
            what = "another pack" if key == "pack" else f"{key} {asked.get(key)!r}, now it is {wanted[key]!r}"
            raise ValueError(f"{folder} holds a tuning of {what}: {_CURE}")
    for section, words in (("space", "space: {}"), ("train", "{}")):
        then, now = asked.get(section, {}), wanted[section]
        for key in dict.fromkeys([*now, *then]):
            if then.get(key) != now.get(key):
                raise ValueError(
                    f"{folder} holds a tuning with {words.format(key)} {_said(then, key)}, now it is "
                    f"{_said(now, key)}: {_CURE}"
                )


def _said(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "unset"


_CURE = "go on with what it was begun with, or name another out"
